"""Advice is true: who follows it sees his job start, and an expected start comes.

Problem: a suggestion is made from rooms that a pass leaves, and followed in a live queue. So each
one is followed here, with the options of the real command line, in a copy of the coordinator that
made it.
"""

import shlex
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.cli import units
from coordinator.cli.submit import submit
from coordinator.core.explanations import Explanation, Suggestion
from coordinator.core.messages import (
    AgentEvent,
    AttemptExited,
    AttemptStarted,
    CancelJob,
    CordonNode,
    ExplainJob,
    FromAgent,
    Heartbeat,
    Hello,
    Reply,
    Request,
    Submit,
    Tick,
    UncordonNode,
)
from coordinator.core.model import HostFacts, JobClass, JobSpec, Progress
from coordinator.core.options import Options
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.reservations import LOOK_MS
from coordinator.core.state import REASON_CHARACTERS_MAX
from tests.core.coordinator_harness import GIGABYTE, UNIX_MS_AT_START, Rig, gpus_of

FLEET = {"n1": "4xA100:40", "n2": "2xH100:80", "n3": "2xH100:80,1xL4:24", "n4": "3xA100:40"}
NAMES = list(FLEET)
HOST = HostFacts("box", "", 4, 256 * GIGABYTE)

WHOLE = st.builds(
    JobSpec,
    command=st.just(("train",)),
    job_class=st.sampled_from(JobClass),
    gpus=st.integers(1, 4),
    gpu_types=st.sampled_from([(), (), ("H100",), ("A100",)]),
    gpu_memory_bytes_min=st.sampled_from([0, 0, 30 * GIGABYTE, 60 * GIGABYTE]),
    memory_bytes=st.sampled_from([0, 0, 100 * GIGABYTE]),
)
SHARING = st.builds(
    JobSpec,
    command=st.just(("train",)),
    job_class=st.sampled_from(JobClass),
    gpus=st.just(1),
    gpu_types=st.sampled_from([(), ("H100",)]),
    shared_gpu_memory_bytes=st.sampled_from([8 * GIGABYTE, 30 * GIGABYTE, 60 * GIGABYTE]),
)
GANGS = st.builds(lambda spec, ranks: replace(spec, ranks=ranks), WHOLE, st.integers(2, 3))
SPECS = st.lists(st.one_of(WHOLE, WHOLE, SHARING, GANGS), min_size=4, max_size=14)


ROUNDS_MAX = 10


class Fleet:
    """Some nodes that do as they are told."""

    def __init__(self, options: Options | None = None) -> None:
        self.rig = Rig(options)
        self.sequences = dict.fromkeys(NAMES, 0)
        for session, (name, text) in enumerate(FLEET.items(), start=1):
            hello = Hello(name, "j1", f"{name}:1", HOST, gpus_of(name, text), (), ())
            self.rig.handle(FromAgent(session, hello))

    def copy(self) -> "Fleet":
        self.rig.handled.clear()  # what is behind is not needed, and takes long to copy
        return deepcopy(self)

    def ask(self, body: Any) -> Any:
        effects = self.rig.handle(Request(1, body))
        return next(effect.answer for effect in effects if isinstance(effect, Reply))

    def say(self, attempt_id: str, body: Any) -> None:
        name = self.rig.core.state.attempts[attempt_id].node
        self.sequences[name] += 1
        event = AgentEvent(self.sequences[name], UNIX_MS_AT_START, attempt_id, body)
        self.rig.handle(FromAgent(NAMES.index(name) + 1, event))

    def attempts(self, *phases: AttemptPhase) -> list[str]:
        state = self.rig.core.state
        found = [state.attempts[known] for known in state.indices.open_attempts]
        return [attempt.id for attempt in found if attempt.phase in phases]

    def run_all(self) -> None:
        for attempt_id in self.attempts(AttemptPhase.ASSIGNED):
            self.say(attempt_id, AttemptStarted(1, "", 0, ()))

    def phase(self, job_id: int) -> JobPhase:
        return self.rig.core.state.jobs[job_id].phase


def _explained(fleet: Fleet, job_id: int) -> Explanation:
    answer = fleet.ask(ExplainJob(job_id))
    assert isinstance(answer, Explanation)
    assert len(answer.sentence) <= REASON_CHARACTERS_MAX
    return answer


def _altered(spec: JobSpec, change: str) -> JobSpec:
    """As `baton submit` would read the options."""
    option, value = shlex.split(change)
    assert any(option in parameter.opts for parameter in submit.params), change
    match option:
        case "--gpus":
            return replace(spec, gpus=int(value))
        case "--ranks":
            return replace(spec, ranks=int(value))
        case "--gpu-type":
            return replace(spec, gpu_types=(value,))
        case "--gpu-memory-min":
            return replace(spec, gpu_memory_bytes_min=units.parse_size(value))
        case "--share-gpu":
            return replace(spec, gpus=1, shared_gpu_memory_bytes=units.parse_size(value))
        case "--class":
            return replace(spec, job_class=JobClass(value))
    raise AssertionError(f"no such option: {change}")


def _followed(fleet: Fleet, job_id: int, suggestion: Suggestion) -> None:
    spec = fleet.rig.core.state.jobs[job_id].spec
    if suggestion.change.startswith("baton uncordon "):
        fleet.ask(UncordonNode(suggestion.change.rpartition(" ")[2]))
    else:
        old_id, job_id = job_id, fleet.ask(Submit(_altered(spec, suggestion.change))).job_id
        fleet.ask(CancelJob(old_id))
    if suggestion.outcome.startswith("now on "):
        assert fleet.phase(job_id) is JobPhase.ACTIVE, suggestion
        return
    assert suggestion.outcome.endswith("would give way to it")
    # Who has left may make another node the better one: then somebody else leaves there.
    for _ in range(ROUNDS_MAX):
        for attempt_id in fleet.attempts(AttemptPhase.STOPPING):
            fleet.say(attempt_id, AttemptExited(75))
    assert fleet.phase(job_id) is JobPhase.ACTIVE, suggestion


@pytest.mark.long
@settings(max_examples=50)
@given(SPECS, st.sampled_from([(), ("n1",), ("n2", "n4"), ("n3",)]), st.booleans())
def test_who_follows_advice_sees_the_job_start(
    specs: list[JobSpec], cordoned: tuple[str, ...], reserves: bool
) -> None:
    """Also where room is reserved for large jobs."""
    fleet = Fleet(Options(reservation_wait_ms=int(reserves)))
    for name in cordoned:
        fleet.ask(CordonNode(name))
    for spec in specs:
        fleet.ask(Submit(spec))
        fleet.run_all()
    fleet.rig.now_ms += 2_000
    fleet.rig.core.state.reservations_looked_ms = -LOOK_MS
    fleet.rig.handle(Tick())
    for job_id in list(fleet.rig.core.state.queued):
        for suggestion in _explained(fleet, job_id).suggestions:
            _followed(fleet.copy(), job_id, suggestion)


@pytest.mark.long
@settings(max_examples=50)
@given(
    st.lists(st.one_of(WHOLE, SHARING), min_size=4, max_size=14),
    st.lists(st.integers(0, 4), min_size=30, max_size=30),
)
def test_an_expected_start_comes(specs: list[JobSpec], hundreds: list[int]) -> None:
    """When those who say how many steps they have end in that order; some say nothing."""
    fleet = Fleet()
    for spec in specs:
        fleet.ask(Submit(spec))
        fleet.run_all()
    ends: list[tuple[int, str]] = []
    for step in (0, 10):
        for attempt_id, hundred in zip(
            fleet.attempts(AttemptPhase.RUNNING), hundreds, strict=False
        ):
            # No two end at once.
            total = hundred and hundred * 100 + int(attempt_id.partition(".")[0])
            name = fleet.rig.core.state.attempts[attempt_id].node
            beat = Heartbeat(step + 1, progress=((attempt_id, Progress(step, total)),))
            fleet.rig.handle(FromAgent(NAMES.index(name) + 1, beat))
            if step and total:
                ends.append((total, attempt_id))
        fleet.rig.now_ms += 10_000 - step * 1_000
    told = {job_id: _explained(fleet, job_id) for job_id in fleet.rig.core.state.queued}
    for job_id, explanation in told.items():
        start = explanation.expected_start
        if start is None or fleet.attempts(AttemptPhase.STOPPING):
            continue
        later = fleet.copy()
        for _, attempt_id in sorted(ends):
            later.say(attempt_id, AttemptExited(0))
            if attempt_id.startswith(f"{start.after_job_id}."):
                break
        assert later.phase(job_id) is JobPhase.ACTIVE, explanation.sentence


def test_the_end_is_where_the_pace_leads() -> None:
    fleet = Fleet()
    fleet.ask(Submit(JobSpec(command=("x",), gpus=4, gpu_types=("A100",))))
    fleet.run_all()
    node = fleet.rig.core.state.attempts["1.1"].node
    session = NAMES.index(node) + 1

    def say(beat: int, step: int, total: int = 100) -> int | None:
        progress = (("1.1", Progress(step, total)),)
        fleet.rig.handle(FromAgent(session, Heartbeat(beat, progress=progress)))
        end_unix_ms = _explained(fleet, 1).expected_end_unix_ms
        return None if end_unix_ms is None else end_unix_ms - UNIX_MS_AT_START

    assert say(1, 20) is None, "the first word is no pace"
    fleet.rig.now_ms = 20_000
    assert say(2, 30) == 20_000 + 70 * 2_000
    fleet.rig.now_ms = 30_000
    assert say(3, 30) == 20_000 + 70 * 2_000, "a step that is long is not two"
    assert say(4, 50) == 30_000 + 50 * 1_000
    assert say(5, 60, 0) is None, "who tells no total has no known end"
    assert say(6, 40) is None, "it has gone back, and is measured anew"
    fleet.rig.now_ms = 40_000
    assert say(7, 50) == 40_000 + 50 * 1_000
    fleet.rig.now_ms = 400_000
    assert say(8, 50) == 400_000, "what is late is due"
