"""Reservations: a large job does not starve, and nobody pays more for that than is said.

Problem: starvation shows only over hours of small jobs that come and go. So a fleet is driven
through hours of virtual time: a queue of small jobs that is never empty, each of which lasts as
long as a seed says, and a large job among them.
"""

from dataclasses import replace
from random import Random

import pytest

from coordinator.core import decisions
from coordinator.core.keeps import Keep
from coordinator.core.messages import (
    AgentEvent,
    AttemptExited,
    AttemptStarted,
    FromAgent,
    Heartbeat,
    HeldAttempt,
    Hello,
    Reply,
    Request,
    Submit,
    Submitted,
    Tick,
)
from coordinator.core.model import CLASS_RANK, HostFacts, JobClass, JobSpec, Progress
from coordinator.core.options import Options
from coordinator.core.phases import AttemptPhase, GpuPhase, JobPhase
from coordinator.core.placement import Need, Plan, place
from coordinator.core.rooms import Offer, Tenant
from coordinator.core.state import State
from tests.core.coordinator_checks import check_guaranteed
from tests.core.coordinator_harness import GIGABYTE, UNIX_MS_AT_START, Rig, gpus_of
from tests.core.training_fleet import Fleet, training

NODES = ("n1", "n2")
GPUS_EACH = 4
HOST = HostFacts("box", "", 4, 256 * GIGABYTE)
WAIT_MS, RESERVED_MS = 120_000, 600_000
STEP_MS = 5_000
SMALL_MS = (30_000, 400_000)


class Stream:
    """A fleet whose small jobs never end to come."""

    def __init__(self, seed: int, wait_ms: int = WAIT_MS, *, told: bool = False) -> None:
        self.rig = Rig(Options(reservation_wait_ms=wait_ms, reservation_ms=RESERVED_MS))
        self.random = Random(seed)
        self.told = told
        self.ends_ms: dict[str, int] = {}
        self.sequences = dict.fromkeys(NODES, 0)
        self.beats = dict.fromkeys(NODES, 0)
        self.free_since_ms: dict[str, int] = {}
        self.idle_ms = 0
        for session, name in enumerate(NODES, start=1):
            gpus = gpus_of(name, f"{GPUS_EACH}xA100:40")
            self.rig.handle(FromAgent(session, Hello(name, "j", f"{name}:1", HOST, gpus, (), ())))

    @property
    def state(self) -> State:
        return self.rig.core.state

    def submit(self, gpus: int, ranks: int = 1, job_class: JobClass = JobClass.STANDARD) -> int:
        spec = JobSpec(command=("x",), gpus=gpus, ranks=ranks, job_class=job_class)
        effects = self.rig.handle(Request(1, Submit(spec)))
        answer = next(effect.answer for effect in effects if isinstance(effect, Reply))
        assert isinstance(answer, Submitted)
        return answer.job_id

    def say(self, attempt_id: str, body: AttemptStarted | AttemptExited) -> None:
        name = self.state.attempts[attempt_id].node
        self.sequences[name] += 1
        event = AgentEvent(self.sequences[name], UNIX_MS_AT_START, attempt_id, body)
        self.rig.handle(FromAgent(NAMES[name], event))

    def step(self, job_class: JobClass = JobClass.STANDARD) -> None:
        """Some seconds: small jobs come, begin and end, and others take their places."""
        self.rig.now_ms += STEP_MS
        waiting = [self.state.jobs[job_id] for job_id in self.state.queued]
        while sum(job.spec.ranks == 1 and job.spec.gpus == 1 for job in waiting) < 2:
            self.submit(1, job_class=job_class)
            waiting = [self.state.jobs[job_id] for job_id in self.state.queued]
            if len(self.state.jobs) > 5_000:
                raise AssertionError("everything starts at once")
        for attempt_id in list(self.state.indices.open_attempts):
            attempt = self.state.attempts[attempt_id]
            if attempt.phase is AttemptPhase.ASSIGNED:
                self.say(attempt_id, AttemptStarted(1, "", 0, ()))
                self.ends_ms[attempt_id] = self.rig.now_ms + self.random.randint(*SMALL_MS)
            elif attempt.phase is AttemptPhase.STOPPING:
                self.say(attempt_id, AttemptExited(75))
            elif self.ends_ms[attempt_id] <= self.rig.now_ms:
                self.say(attempt_id, AttemptExited(0))
        for name in NODES:
            self.beats[name] += 1
            held = tuple(
                HeldAttempt(known, self.state.attempts[known].gpu_uuids, True)
                for known in self.state.nodes[name].attempts
            )
            beat = Heartbeat(self.beats[name], attempts=held, progress=self.progress(name))
            self.rig.handle(FromAgent(NAMES[name], beat))
        self.rig.handle(Tick())
        self.look()

    def progress(self, name: str) -> tuple[tuple[str, Progress], ...]:
        """Where jobs say how many steps they have: one a second."""
        if not self.told:
            return ()
        found = []
        for attempt_id in self.state.indices.open_attempts:
            attempt = self.state.attempts[attempt_id]
            if attempt.node == name and attempt.phase is AttemptPhase.RUNNING:
                began_ms = attempt.assigned_unix_ms - UNIX_MS_AT_START
                step = (self.rig.now_ms - began_ms) // 1_000
                total = (self.ends_ms[attempt_id] - began_ms) // 1_000
                found.append((attempt_id, Progress(step, total)))
        return tuple(found)

    def look(self) -> None:
        """For how long a GPU has been free while small jobs waited."""
        for live in self.state.nodes.values():
            for uuid, gpu in live.gpus.items():
                if gpu.phase is GpuPhase.FREE:
                    since_ms = self.free_since_ms.setdefault(uuid, self.rig.now_ms)
                    self.idle_ms = max(self.idle_ms, self.rig.now_ms - since_ms)
                else:
                    self.free_since_ms.pop(uuid, None)

    def runs(self, job_id: int, within_ms: int, job_class: JobClass = JobClass.STANDARD) -> bool:
        until_ms = self.rig.now_ms + within_ms
        while self.rig.now_ms < until_ms and self.state.jobs[job_id].phase is JobPhase.QUEUED:
            self.step(job_class)
        return self.state.jobs[job_id].phase is not JobPhase.QUEUED


NAMES = {name: number for number, name in enumerate(NODES, start=1)}


def _settled(stream: Stream) -> Stream:
    for _ in range(60):
        stream.step()
    return stream


@pytest.mark.long
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_gang_does_not_starve_under_an_endless_stream(seed: int, told: bool) -> None:
    """All that runs in its room ends within the reservation."""
    stream = _settled(Stream(seed, told=told))
    gang = stream.submit(GPUS_EACH, ranks=2)
    assert stream.runs(gang, WAIT_MS + SMALL_MS[1] + 4 * STEP_MS)
    assert stream.idle_ms <= RESERVED_MS + 2 * STEP_MS


@pytest.mark.long
def test_without_reservations_it_starves() -> None:
    stream = _settled(Stream(0, wait_ms=0))
    gang = stream.submit(GPUS_EACH, ranks=2)
    assert not stream.runs(gang, 4 * (WAIT_MS + RESERVED_MS))
    assert stream.idle_ms <= STEP_MS, "nothing idles for it either"


def test_where_nothing_comes_free_it_expires_and_others_have_their_turn() -> None:
    """Half of the room is held for hours: the other half idles for the bound and no longer."""
    stream = _settled(Stream(1))
    held = list(stream.state.indices.open_attempts)[:1]
    stream.ends_ms[held[0]] = 10**9
    gang = stream.submit(GPUS_EACH, ranks=2)
    pair = stream.submit(2)
    assert not stream.runs(gang, 3 * (WAIT_MS + RESERVED_MS))
    assert stream.idle_ms <= RESERVED_MS + 2 * STEP_MS
    assert stream.idle_ms > RESERVED_MS // 4, "it had a reservation"
    assert stream.state.jobs[pair].phase is not JobPhase.QUEUED


@pytest.mark.parametrize("told", [False, True])
def test_a_higher_class_never_waits_for_what_is_reserved(told: bool) -> None:
    stream = _settled(Stream(2, told=told))
    gang = stream.submit(GPUS_EACH, ranks=2)
    for _ in range(2 * WAIT_MS // STEP_MS):
        stream.step()
    assert stream.state.jobs[gang].phase is JobPhase.QUEUED
    free = [
        uuid
        for live in stream.state.nodes.values()
        for uuid, gpu in live.gpus.items()
        if gpu.phase is GpuPhase.FREE
    ]
    assert free, "something is reserved and free"
    urgent = stream.submit(1, job_class=JobClass.GUARANTEED)
    assert stream.state.jobs[urgent].phase is JobPhase.ACTIVE


def test_a_lower_class_runs_inside_and_gives_way() -> None:
    stream = _settled(Stream(3))
    gang = stream.submit(GPUS_EACH, ranks=2)
    assert stream.runs(gang, WAIT_MS + SMALL_MS[1] + 8 * STEP_MS, JobClass.SPARE)
    spare = [job for job in stream.state.jobs.values() if job.spec.job_class is JobClass.SPARE]
    assert any(job.epoch for job in spare), "they ran inside"


def test_who_is_gone_in_time_may_use_what_is_reserved() -> None:
    """And nobody else of the class, neither its GPUs nor its host memory."""
    gpus = gpus_of("n1", "2xA100:40")
    offer = Offer("n1", gpus, ("n1-g0", "n1-g1"), 64 * GIGABYTE, 4, ())
    keep = Keep(9, 1, (("n1", ("n1-g0",)),), 40 * GIGABYTE, 60_000, "noon")

    def starts(job_id: int, lasts_ms: int | None, gpus: int = 2, memory: int = 0) -> bool:
        spec = JobSpec(command=("x",), gpus=gpus, memory_bytes=memory * GIGABYTE)
        return bool(place([Need(job_id, spec, lasts_ms=lasts_ms)], [offer], None, [keep]).starts)

    assert starts(11, 60_000)
    assert starts(9, None), "its own job"
    assert not starts(11, 60_001)
    assert not starts(11, None)
    assert starts(11, None, gpus=1)
    assert starts(11, None, gpus=0, memory=24)
    assert not starts(11, None, gpus=0, memory=30)
    unknown = replace(keep, free_in_ms=None)
    need = Need(11, JobSpec(command=("x",), gpus=2), lasts_ms=1)
    waits = place([need], [offer], None, [unknown]).waits[0][1]
    assert waits.endswith("; there is room on n1 that is reserved for job 9 until noon")


def test_who_would_be_given_way_to_is_told_for_whom_the_room_is_reserved() -> None:
    """A lower class works there until the rest is free: for its own job it gives way, and for
    nobody else of that class, who might stay for longer."""
    gpus = gpus_of("n1", "2xA100:40")
    spare = Tenant("5.1", CLASS_RANK[JobClass.SPARE], 0, ("n1-g0",), 0, stopping=False)
    equal = Tenant("6.1", CLASS_RANK[JobClass.STANDARD], 0, ("n1-g1",), 0, stopping=False)
    offer = Offer("n1", gpus, (), 64 * GIGABYTE, 4, (spare, equal))
    keep = Keep(9, 1, (("n1", ("n1-g0", "n1-g1")),), 0, None, "noon")

    def plan(ranks: int = 1, **asks: object) -> Plan:
        spec = JobSpec(command=("x",), gpus=1, ranks=ranks)
        asking = replace(spec, **asks)  # type: ignore[arg-type]
        return place([Need(11, asking)], [offer], None, [keep])

    for ranks in (1, 2):
        made = plan(ranks)
        assert not made.displacements
        said = "; others would give way on n1, where room is reserved for job 9 until noon"
        assert made.waits[0][1].endswith(said) is (ranks == 1), "of two places it would have one"
    assert "reserved" not in plan(job_class=JobClass.SPARE).waits[0][1], "it sees all of it"
    anybody = place([Need(11, JobSpec(command=("x",), gpus=1))], [offer])
    assert [each.attempt for each in anybody.displacements] == ["5.1"]


def test_a_guaranteed_job_waits_beside_a_standard_one_for_a_larger_one_and_says_so() -> None:
    """It is short, and so the first of its class; it has its place when nothing is reserved."""
    waits = Options(reservation_wait_ms=20_000, reservation_ms=60_000)
    fleet = Fleet("2xA100:40", options=waits)
    fleet.tick_ms = 5_000
    first = fleet.submit(training(5_000, job_class=JobClass.GUARANTEED))
    standard = fleet.submit(job_class=JobClass.STANDARD)
    fleet.run(120)
    large = fleet.submit(training(5_000, gpus=2, job_class=JobClass.GUARANTEED))
    fleet.run(30)
    assert [kept.job_id for kept in fleet.state.reservations.values()] == [large]
    small = fleet.submit(training(50, job_class=JobClass.GUARANTEED))
    fleet.run(15)
    queue = [fleet.job(large), fleet.job(small)]
    assert [job.id for job in decisions.in_turn(fleet.state, queue, {})] == [small, large]
    assert fleet.job(standard).phase is JobPhase.ACTIVE
    said = f"others would give way on n1, where room is reserved for job {large} until"
    assert said in fleet.state.wait_reason(fleet.job(small))
    check_guaranteed(fleet.state, fleet.rig.now_ms)
    fleet.run(60)
    assert [fleet.job(each).phase is JobPhase.ACTIVE for each in (first, standard, small)] == [
        True, False, True
    ]  # fmt: skip


def test_who_was_there_before_and_who_is_within_a_quota_see_what_is_reserved() -> None:
    gpus = gpus_of("n1", "2xA100:40")
    offer = Offer("n1", gpus, ("n1-g0", "n1-g1"), 64 * GIGABYTE, 4, ())
    keep = Keep(9, 1, (("n1", ("n1-g0", "n1-g1")),), 0, None, "noon")

    def starts(job_id: int, kept: Keep, *, lent: bool = False) -> bool:
        need = Need(job_id, JobSpec(command=("x",), gpus=1), lent=lent)
        return bool(place([need], [offer], None, [kept]).starts)

    assert starts(8, keep)
    assert not starts(10, keep)
    assert starts(10, replace(keep, lent=True))
    assert not starts(10, replace(keep, lent=True), lent=True)
