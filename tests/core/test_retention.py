"""What is kept of a job's checkpoints: the newest few, the pinned ones, and what nodes are told."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.config import JOBS_KEPT_MIN
from coordinator.core import retention, validate
from coordinator.core.checkpoint_requests import (
    CheckpointChoice,
    FindCheckpoint,
    ListCheckpoints,
    PinCheckpoint,
    UnpinCheckpoint,
)
from coordinator.core.checkpoints import DIGESTS_MAX
from coordinator.core.messages import (
    AgentEvent,
    AttemptExited,
    AttemptStarted,
    CheckpointPage,
    CheckpointProposed,
    FromAgent,
    Heartbeat,
    Hello,
    KeepCheckpoints,
    Refusal,
    RefusalKind,
    Reply,
    Request,
    RequestBody,
    Send,
    Submit,
    Tick,
)
from coordinator.core.model import HostFacts, JobSpec
from coordinator.core.phases import JobPhase
from tests.core.coordinator_harness import GIGABYTE, Rig, gpus_of

LAST = CheckpointChoice()


class Fleet:
    """One node, and jobs that commit when the test says so."""

    def __init__(self) -> None:
        self.rig = Rig()
        self.sequence = 0
        self.session = 0
        self.heads: dict[int, tuple[str, int]] = {}
        self.made = 0
        self.keep: tuple[str, ...] = ()
        self.hello()

    def hello(self) -> None:
        self.session += 1
        present = tuple(digest for _, digest in self.rig.disk.checkpoints)
        host, gpus = HostFacts("box", "", 8, GIGABYTE), gpus_of("n1", "8xH100")
        hello = Hello("n1", "j1", "n1:7001", host, gpus, checkpoints=present)
        self.rig.handle(FromAgent(self.session, hello))

    def submit(self, keep: int = 3) -> int:
        spec = JobSpec(command=("train",), keep_checkpoints=keep)
        self.ask(Submit(spec))
        job_id = self.rig.disk.last_job_id
        self.say(job_id, AttemptStarted(100))
        self.heads[job_id] = ("", 0)
        return job_id

    def commit(self, job_id: int) -> str:
        """A checkpoint ten steps on."""
        self.made += 1
        parent, step = self.heads[job_id]
        digest = f"{self.made:08x}" + "0" * 56
        self.say(job_id, CheckpointProposed(digest, parent, step + 10, GIGABYTE, ("n1",)))
        self.heads[job_id] = (digest, step + 10)
        return digest

    def say(self, job_id: int, body: AttemptStarted | AttemptExited | CheckpointProposed) -> None:
        self.sequence += 1
        event = AgentEvent(self.sequence, 0, f"{job_id}.1", body)
        self.rig.handle(FromAgent(self.session, event))

    def ask(self, body: RequestBody) -> object:
        effects = self.rig.handle(Request(1, body))
        (answer,) = [effect.answer for effect in effects if isinstance(effect, Reply)]
        return answer

    def listed(self, job_id: int) -> list[str]:
        answer = self.ask(ListCheckpoints(job_id))
        assert isinstance(answer, CheckpointPage)
        return [view.checkpoint.digest for view in answer.checkpoints]

    def told_to_keep(self) -> list[str]:
        """What the node has last been told to keep, after the next tick."""
        self.rig.now_ms += 1_000
        self.rig.handle(FromAgent(self.session, Heartbeat(self.rig.now_ms)))
        for effect in self.rig.handle(Tick()):
            if isinstance(effect, Send) and isinstance(effect.order, KeepCheckpoints):
                self.keep = effect.order.digests
        return list(self.keep)


STEP = st.one_of(
    st.tuples(st.just("commit"), st.integers(0, 1)),
    st.tuples(st.just("pin"), st.integers(0, 1)),
    st.tuples(st.just("unpin"), st.integers(0, 1)),
    st.tuples(st.just("unpin all"), st.integers(0, 1)),
    st.tuples(st.just("end"), st.integers(0, 1)),
    st.tuples(st.just("restart"), st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=30), st.integers(1, 4), st.randoms(use_true_random=False))
def test_what_is_kept_is_what_the_rule_says(
    steps: list[tuple[str, int]], keep: int, chance: random.Random
) -> None:
    """Safety, over random histories: the newest `keep` (of an ended job one), and the pinned, no
    more and no fewer; and the node is told exactly that, also after a restart."""
    fleet = Fleet()
    jobs = [fleet.submit(keep), fleet.submit(keep)]
    made: dict[int, list[str]] = {job: [] for job in jobs}
    kept: dict[int, list[str]] = {job: [] for job in jobs}
    pinned: dict[str, None] = {}
    ended: dict[int, None] = {}

    def settle(job: int) -> None:
        newest = made[job][-1:] if job in ended else made[job][-keep:]
        kept[job] = [d for d in kept[job] if d in pinned or d in newest]

    for what, index in steps:
        job = jobs[index]
        if what == "commit" and job not in ended:
            digest = fleet.commit(job)
            made[job].append(digest)
            kept[job].append(digest)
            settle(job)
        elif what in ("pin", "unpin") and kept[job]:
            digest = chance.choice(kept[job])
            choice = CheckpointChoice(digest[:8])
            if what == "pin":
                fleet.ask(PinCheckpoint(job, choice))
                pinned[digest] = None
            else:
                fleet.ask(UnpinCheckpoint(job, choice))
                pinned.pop(digest, None)
                settle(job)
        elif what == "unpin all":
            fleet.ask(UnpinCheckpoint(job, None))
            pinned = {d: None for d in pinned if d not in kept[job]}
            settle(job)
        elif what == "end" and job not in ended:
            fleet.say(job, AttemptExited(0))
            ended[job] = None
            settle(job)
        elif what == "restart" and len(ended) == len(jobs):
            fleet.rig.restart()
            fleet.hello()
        for each in jobs:
            assert fleet.listed(each)[::-1] == kept[each]
    wanted = sorted(digest for job in jobs for digest in kept[job])
    assert fleet.told_to_keep() == wanted


def test_the_last_checkpoint_of_an_ended_job_can_be_found_and_read() -> None:
    fleet = Fleet()
    job = fleet.submit()
    digests = [fleet.commit(job) for _ in range(3)]
    fleet.say(job, AttemptExited(0))
    answer = fleet.ask(FindCheckpoint(job, LAST))
    assert isinstance(answer, CheckpointPage)
    assert [view.checkpoint.digest for view in answer.checkpoints] == digests[-1:]
    assert answer.checkpoints[0].checkpoint.replicas == ("n1",)


def test_used_by_names_the_head_and_who_runs_from_it() -> None:
    fleet = Fleet()
    job = fleet.submit()
    first = fleet.commit(job)
    fleet.say(job, AttemptExited(75))
    fleet.sequence += 1
    fleet.rig.handle(Tick())
    event = AgentEvent(fleet.sequence, 0, f"{job}.2", AttemptStarted(101, first, 10))
    fleet.rig.handle(FromAgent(fleet.session, event))
    answer = fleet.ask(ListCheckpoints(job))
    assert isinstance(answer, CheckpointPage)
    assert [view.used_by for view in answer.checkpoints] == [("head", f"{job}.2")]


def test_pins_are_bounded_and_say_so() -> None:
    fleet = Fleet()
    job = fleet.submit(keep=2)
    for number in range(retention.PINS_PER_JOB_MAX + 1):
        fleet.commit(job)
        answer = fleet.ask(PinCheckpoint(job, LAST))
        assert isinstance(answer, Refusal) == (number == retention.PINS_PER_JOB_MAX)
    assert isinstance(answer, Refusal)
    assert (answer.kind, "64 is the limit" in answer.sentence) == (RefusalKind.EXHAUSTED, True)
    assert min(DIGESTS_MAX, JOBS_KEPT_MIN) > retention.PINS_MAX
    assert validate.KEEP_CHECKPOINTS_MAX < DIGESTS_MAX


def test_pins_of_the_whole_fleet_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet()
    monkeypatch.setattr(retention, "PINS_MAX", 2)
    jobs = [fleet.submit() for _ in range(3)]
    answers = []
    for job in jobs:
        fleet.commit(job)
        answers.append(fleet.ask(PinCheckpoint(job, LAST)))
    assert [isinstance(answer, Refusal) for answer in answers] == [False, False, True]
    fleet.ask(UnpinCheckpoint(jobs[0], None))
    assert isinstance(fleet.ask(PinCheckpoint(jobs[2], LAST)), CheckpointPage)


def test_of_equal_steps_the_pinned_one_is_unpinned() -> None:
    """A trainer that saves on its way out commits one step twice."""
    fleet = Fleet()
    job = fleet.submit(keep=1)
    first = fleet.commit(job)
    fleet.ask(PinCheckpoint(job, CheckpointChoice(step=10)))
    second = "f" * 64
    fleet.say(job, CheckpointProposed(second, first, 10, GIGABYTE, ("n1",)))
    assert fleet.listed(job) == [second, first]
    fleet.ask(UnpinCheckpoint(job, CheckpointChoice(step=10)))
    assert fleet.listed(job) == [second]


def test_a_job_with_a_pin_is_not_forgotten() -> None:
    fleet = Fleet()
    fleet.rig.keep(2)
    first = fleet.submit()
    digest = fleet.commit(first)
    fleet.ask(PinCheckpoint(first, LAST))
    fleet.say(first, AttemptExited(0))
    for _ in range(3):
        job = fleet.submit()
        fleet.say(job, AttemptExited(0))
    assert fleet.rig.disk.jobs[first].phase is JobPhase.SUCCEEDED
    assert sorted(fleet.rig.disk.jobs) == [first, job]
    assert fleet.listed(first) == [digest]
    assert digest in fleet.told_to_keep()
    fleet.ask(UnpinCheckpoint(first, None))
    fleet.submit()
    assert first not in fleet.rig.disk.jobs


def test_wishes_that_nothing_fits_are_answered_with_what_there_is() -> None:
    fleet = Fleet()
    job = fleet.submit()
    for _ in range(2):
        fleet.commit(job)
    for choice, kind, part in (
        (CheckpointChoice("00000"), RefusalKind.INVALID, "at least 6 digits"),
        (CheckpointChoice("000000"), RefusalKind.INVALID, "2 checkpoints of job 1 begin with"),
        (CheckpointChoice("ffffff"), RefusalKind.NOT_FOUND, "keeps those of steps 20, 10"),
        (CheckpointChoice(step=15), RefusalKind.NOT_FOUND, "keeps those of steps 20, 10"),
    ):
        for body in (
            PinCheckpoint(job, choice),
            UnpinCheckpoint(job, choice),
            FindCheckpoint(job, choice),
        ):
            answer = fleet.ask(body)
            assert isinstance(answer, Refusal)
            assert (answer.kind, part in answer.sentence) == (kind, True), answer
    for nobody in (ListCheckpoints(9), PinCheckpoint(9, LAST), UnpinCheckpoint(9, None)):
        assert fleet.ask(nobody) == Refusal(RefusalKind.NOT_FOUND, "there is no job 9")
