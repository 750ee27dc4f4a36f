"""Failures that repeat at one step: what is suspected, what is held, and what is forgotten.

A `Line` is one job on a node or two, driven attempt by attempt: a trainer that commits every so
many steps and fails where the test says. The rules are checked from outside, on what the core
recorded.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.messages import (
    AgentEvent,
    AgentEventBody,
    AttemptExited,
    AttemptRefused,
    AttemptStarted,
    CancelJob,
    CheckpointProposed,
    ExplainJob,
    Explanation,
    FromAgent,
    Heartbeat,
    HeldAttempt,
    Hello,
    ReleaseJob,
    Reply,
    Request,
    RequestBody,
    RequeueJob,
    Submit,
    Tick,
)
from coordinator.core.model import Attempt, HostFacts, Job, JobSpec, Progress, Trouble
from coordinator.core.phases import JobPhase
from coordinator.core.poison import TRIED_MAX, Verdict, judge
from tests.core.coordinator_harness import GIGABYTE, Rig, gpus_of

# No verdict takes more attempts than these: the first failure, two from one checkpoint, one from
# the one before, and as many again for a place further back.
ATTEMPTS_MAX = 12


@dataclass
class Line:
    """One job, its nodes, and the trainer's side of what happened. `lineage` are the digests that a
    checkpoint stands on, itself included; `sessions` are those of the nodes that are up."""

    restarts: int = 3
    keep: int = 3
    rig: Rig = field(default_factory=Rig)
    sequences: dict[str, int] = field(default_factory=dict)
    heartbeats: int = 0
    made: int = 0
    session: int = 0
    sessions: dict[str, int] = field(default_factory=dict)
    lineage: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})

    def begin(self) -> None:
        self.hello()
        spec = JobSpec(command=("train",), max_restarts=self.restarts, keep_checkpoints=self.keep)
        self.rig.handle(Request(1, Submit(spec)))

    def hello(self, node: str = "n1") -> None:
        self.session += 1
        self.sessions[node] = self.session
        kept = self.rig.disk.checkpoints.values()
        present = tuple(one.digest for one in kept if node in one.replicas)
        host = HostFacts("box", "", 8, GIGABYTE)
        gpus = gpus_of(node, "1xH100")
        hello = Hello(node, f"j-{node}", f"{node}:7001", host, gpus, checkpoints=present)
        self.rig.handle(FromAgent(self.session, hello))

    def lose(self, node: str) -> None:
        """It says nothing until its lease has ended."""
        self.sessions.pop(node)
        for _ in range(2 * self.rig.options.lease_ms // 500):
            self.beat()

    def restart(self) -> None:
        """The coordinator, while nothing runs."""
        self.rig.restart()
        self.hello()

    @property
    def job(self) -> Job:
        return self.rig.disk.jobs[1]

    @property
    def attempt(self) -> Attempt:
        return self.rig.disk.attempts[f"1.{self.job.epoch}"]

    def say(self, body: AgentEventBody) -> None:
        node = self.attempt.node
        self.sequences[node] = self.sequences.get(node, 0) + 1
        event = AgentEvent(self.sequences[node], 0, self.attempt.id, body)
        self.rig.handle(FromAgent(self.sessions[node], event))

    def commit(self, step: int, *replicas: str) -> str:
        self.made += 1
        digest, head = f"{self.made:064x}", self.job.head
        self.lineage[digest] = (*self.lineage[head], digest)
        self.say(CheckpointProposed(digest, head, step, GIGABYTE, replicas))
        return digest

    def fail(self, step: int = 0, body: AttemptExited | None = None) -> str:
        """An attempt that resumes and ends without a commit; on which node."""
        self.wait_active()
        self.say(AttemptStarted(100, self.job.head, self.job.head_step))
        self.progress(step)
        self.say(body or AttemptExited(1))
        return self.attempt.node

    def ask(self, body: RequestBody) -> list[object]:
        effects = self.rig.handle(Request(1, body))
        return [effect.answer for effect in effects if isinstance(effect, Reply)]

    def run(self, fails_at: Callable[[str], int], *, every: int, end: int = 1_000) -> None:
        """An attempt: resume, commit every `every` steps, and fail at the step that `fails_at`
        gives for the last checkpoint it stands on, or finish at `end`."""
        self.wait_active()
        self.rig.handle(Tick())
        step, head = self.job.head_step, self.job.head
        self.say(AttemptStarted(100, head, step))
        while step < fails_at(head):
            step += 1
            if step % every == 0:
                head = self.commit(step, self.attempt.node)
        self.progress(step)
        self.say(AttemptExited(0 if step >= end else 1))

    def progress(self, step: int) -> None:
        self.heartbeats += 1
        name = self.attempt.id
        uuids = self.attempt.gpu_uuids
        held, said = (HeldAttempt(name, uuids),), ((name, Progress(step)),)
        session = self.sessions[self.attempt.node]
        self.rig.handle(FromAgent(session, Heartbeat(self.heartbeats, None, (), held, said)))

    def wait_active(self) -> None:
        """Past the pause before the next try."""
        for _ in range(200):
            if self.job.phase is not JobPhase.QUEUED:
                break
            self.beat()
        assert self.job.phase is JobPhase.ACTIVE, self.job

    def beat(self) -> None:
        """Half a second, in which the nodes that are up say so."""
        self.rig.now_ms += 500
        self.heartbeats += 1
        for session in self.sessions.values():
            self.rig.handle(FromAgent(session, Heartbeat(self.heartbeats)))
        self.rig.handle(Tick())

    def explained(self) -> str:
        (answer,) = self.ask(ExplainJob(1))
        assert isinstance(answer, Explanation)
        return answer.sentence

    def told(self, name: str) -> list[str]:
        return [event.message for event in self.rig.disk.events if event.name == name]

    def kept(self) -> list[str]:
        return [digest for _, digest in self.rig.disk.checkpoints]


def until_it_rests(line: Line, fails_at: Callable[[str], int], *, every: int, end: int) -> None:
    """Attempts until the job is held or has ended."""
    for _ in range(ATTEMPTS_MAX):
        if line.job.phase not in (JobPhase.QUEUED, JobPhase.ACTIVE):
            return
        line.run(fails_at, every=every, end=end)
    raise AssertionError(f"{ATTEMPTS_MAX} attempts, and no end: {line.job}")


@settings(max_examples=150, deadline=None)
@given(
    step=st.integers(1, 40), every=st.integers(1, 15), restarts=st.integers(0, 6),
    keep=st.integers(1, 4),
)  # fmt: skip
def test_a_program_that_always_fails_there_comes_to_rest(
    step: int, every: int, restarts: int, keep: int
) -> None:
    """Liveness; and safety: what is the last checkpoint then is the newest that was committed."""
    line = Line(restarts, keep)
    line.begin()
    until_it_rests(line, lambda head: step, every=every, end=1_000)
    assert line.job.phase in (JobPhase.HELD, JobPhase.FAILED)
    newest = step // every * every
    assert line.job.head_step == newest
    assert line.job.head in ("", *line.kept())
    if line.job.phase is JobPhase.HELD:
        assert f"exit status 1 at step {step}, " in line.job.reason
        assert line.explained() == f"job 1 is held: {line.job.reason}"
        assert line.told("job.quarantined") == [line.job.reason]
    else:
        assert restarts < 3 or newest == 0


@settings(max_examples=150, deadline=None)
@given(every=st.integers(1, 8), bad=st.integers(2, 6), reach=st.integers(0, 7))
def test_a_poisoned_checkpoint_costs_no_more_than_itself(every: int, bad: int, reach: int) -> None:
    """Whatever stands on checkpoint number `bad` fails; what is made in its place does not."""
    line = Line(restarts=4)
    line.begin()
    place = bad * every + min(reach, every - 1)
    poison = f"{bad:064x}"

    def fails_at(head: str) -> int:
        return place if poison in line.lineage[head] else 10 * every

    until_it_rests(line, fails_at, every=every, end=10 * every)
    assert line.job.phase is JobPhase.SUCCEEDED
    assert poison not in line.lineage[line.job.head]
    assert line.lineage[line.job.head][: bad - 1] == tuple(f"{n:064x}" for n in range(1, bad))
    assert len(line.told("checkpoint.set_aside")) == 1
    assert not line.told("job.quarantined")
    assert line.job.trouble is None
    assert poison not in line.kept(), "it is given up only when others came further"


def test_stops_and_lost_nodes_are_no_failures() -> None:
    line = Line()
    line.begin()
    line.run(lambda head: 23, every=10)
    for _ in range(5):
        line.wait_active()
        line.say(AttemptStarted(100, line.job.head, line.job.head_step))
        line.progress(23)
        line.ask(RequeueJob(1))
        line.say(AttemptExited(143))
    assert line.job.trouble is None
    line.run(lambda head: 23, every=10)
    line.restart()
    line.run(lambda head: 23, every=10)
    (said,) = line.told("checkpoint.set_aside")
    assert "(step 20) is set aside, since 2 attempts from it failed at step 23; the next" in said
    assert said.endswith("(step 10)")


@pytest.mark.parametrize("again", [RequeueJob(1), ReleaseJob(1)])
def test_a_quarantined_job_runs_again_when_its_owner_says_so(again: RequestBody) -> None:
    line = Line()
    line.begin()
    until_it_rests(line, lambda head: 23, every=10, end=1_000)
    assert (line.job.phase, line.job.head_step) == (JobPhase.HELD, 20)
    line.restart()
    line.ask(again)
    assert (line.job.phase, line.job.failures, line.job.trouble) == (JobPhase.ACTIVE, 0, None)
    until_it_rests(line, lambda head: 50, every=10, end=50)
    assert line.job.phase is JobPhase.SUCCEEDED


def test_a_quarantined_job_can_be_cancelled() -> None:
    line = Line()
    line.begin()
    until_it_rests(line, lambda head: 23, every=10, end=1_000)
    line.ask(CancelJob(1))
    assert line.job.phase is JobPhase.CANCELLED
    assert line.kept() == [line.job.head]


def test_a_limit_that_ends_the_job_gives_back_what_was_set_aside() -> None:
    line = Line(restarts=3)
    line.begin()
    line.run(lambda head: 23, every=10)
    newest = line.job.head
    line.run(lambda head: 23, every=100)
    line.run(lambda head: 23, every=100)
    assert line.job.head_step == 10
    line.run(lambda head: 15, every=100)
    assert line.job.phase is JobPhase.FAILED
    assert line.job.head == newest
    assert line.kept() == [newest]


def test_a_job_that_failed_before_its_first_checkpoint_says_where_its_output_is() -> None:
    line = Line(restarts=0)
    line.begin()
    line.run(lambda head: 3, every=10)
    assert line.job.phase is JobPhase.FAILED
    assert line.explained().startswith("job 1 has failed: ")
    assert line.explained().endswith("; `baton logs 1` shows what it wrote")


def test_a_job_that_never_ran_has_written_nothing() -> None:
    line = Line(restarts=0)
    line.begin()
    line.say(AttemptRefused("no such file: /x", permanent=True))
    assert line.explained() == "job 1 has failed: n1 could not start it: no such file: /x"


def test_what_is_set_aside_stays_while_it_may_be_wanted() -> None:
    line = Line(restarts=9, keep=2)
    line.begin()
    line.run(lambda head: 45, every=10)
    bad = line.job.head
    line.run(lambda head: 45, every=100)
    line.run(lambda head: 45, every=100)
    assert line.job.trouble is not None
    assert line.job.trouble.set_aside == bad
    assert "(step 40) is set aside, since 2 attempts from it failed at" in line.explained()
    line.wait_active()
    assert line.explained().endswith("is set aside: 2 attempts from it failed at step 45")
    line.restart()
    assert bad in line.kept()
    line.run(lambda head: 47, every=12)
    assert bad in line.kept()
    line.run(lambda head: 60, every=12, end=60)
    assert bad not in line.kept()


@pytest.mark.parametrize(("status", "said"), [(1, None), (75, None), (1, 75), (1, 2)])
def test_saving_the_same_step_again_is_no_progress(status: int, said: int | None) -> None:
    """A trainer that saves on its way out makes a new checkpoint each time, and comes no further:
    it waits between its tries, and there is an end to them."""
    line = Line(restarts=1_000)
    line.begin()
    line.run(lambda head: 20, every=10)
    for _ in range(40):
        if line.job.phase not in (JobPhase.QUEUED, JobPhase.ACTIVE):
            break
        line.wait_active()
        line.say(AttemptStarted(100, line.job.head, 20))
        line.commit(20, "n1")
        line.say(AttemptExited(status, said_exit_code=said))
    if 75 in (status, said):
        assert line.job.phase is JobPhase.FAILED
        assert "21 times in a row without a further checkpoint" in line.job.reason
    else:
        assert line.job.phase is JobPhase.HELD
        below = f", {said} below its launcher" if said else ""
        assert f"quarantined: exit status 1{below} at step 20, 3 times" in line.job.reason
    assert line.rig.now_ms > 1_000
    assert line.job.head == f"{line.made:064x}"


def test_no_step_back_to_what_nobody_can_reach() -> None:
    line = Line(restarts=5)
    line.begin()
    line.hello("n2")
    line.say(AttemptStarted(100))
    line.commit(10, "n1")
    newest = line.commit(20, "n1", "n2")
    line.lose("n1")
    assert (line.fail(23), line.fail(23)) == ("n2", "n2")
    assert (line.job.phase, line.job.head) == (JobPhase.HELD, newest)
    assert not line.told("checkpoint.set_aside")
    assert "(step 20) twice, and the one before it is out of reach; `baton" in line.job.reason


def test_giving_up_what_nobody_can_reach_takes_what_was_set_aside() -> None:
    """The older one is lost after the step back."""
    line = Line(restarts=5)
    line.begin()
    line.hello("n2")
    line.say(AttemptStarted(100))
    older = line.commit(10, "n1")
    newest = line.commit(20, "n1", "n2")
    line.say(AttemptExited(1))
    line.fail(23)
    line.fail(23)
    assert line.job.head == older
    line.lose("n1")
    assert "lies only on n1, which is lost" in line.explained()
    line.ask(RequeueJob(1, abandon_unreachable_checkpoints=True))
    line.wait_active()
    assert (line.job.head, line.job.head_step, line.attempt.node) == (newest, 20, "n2")
    assert line.told("checkpoint.abandoned")[0].endswith("it goes on from step 20")


@pytest.mark.parametrize("place", [24, 26])
def test_a_failure_elsewhere_does_not_forget_what_was_set_aside(place: int) -> None:
    line = Line(restarts=9)
    line.begin()
    line.run(lambda head: 25, every=10)
    newest = line.job.head
    line.fail(25)
    line.fail(25)
    assert line.job.head_step == 10
    line.fail(place)
    assert line.job.trouble is not None
    assert line.job.trouble.set_aside == newest
    line.fail(place)
    assert (line.job.phase, line.job.head, line.job.head_step) == (JobPhase.HELD, newest, 20)
    assert "none before it" not in line.job.reason


def test_what_was_set_aside_is_better_than_to_begin_again() -> None:
    """The one before it does not verify anywhere."""
    line = Line(restarts=9)
    line.begin()
    line.run(lambda head: 25, every=10)
    newest = line.job.head
    line.fail(25)
    line.fail(25)
    line.wait_active()
    line.say(AttemptStarted(100, skipped=((line.job.head, "altered"),)))
    assert line.attempt.stop_reason == "it started from the beginning and not from the last commit"
    assert (line.job.head, line.job.head_step) == (newest, 20)
    line.say(AttemptExited(143))
    line.run(lambda head: 60, every=10, end=60)
    assert line.job.phase is JobPhase.SUCCEEDED


def test_a_broken_node_is_not_the_checkpoints_fault() -> None:
    """Who got no further on one node is tried on another one, and waits for none."""
    line = Line(restarts=9)
    line.begin()
    line.hello("n2")
    line.run(lambda head: 20, every=10)
    assert line.attempt.node == "n1", "it came further there, and its checkpoints lie there"
    assert line.fail(20) == "n1"
    line.run(lambda head: 60, every=10, end=60)
    assert (line.attempt.node, line.job.phase) == ("n2", JobPhase.SUCCEEDED)
    assert not line.told("checkpoint.set_aside")


def test_a_job_does_not_wait_for_another_node() -> None:
    line = Line(restarts=9)
    line.begin()
    line.hello("n2")
    line.run(lambda head: 20, every=10)
    line.fail(23)
    line.lose("n2")
    assert line.fail(23) == "n1"
    assert line.job.head_step == 10, "no other node could have been tried"


def test_an_end_that_nobody_saw_says_nothing_of_the_checkpoint() -> None:
    """The box rebooted, or the supervisor was killed: it counts towards the limit alone."""
    line = Line(restarts=3)
    line.begin()
    line.run(lambda head: 23, every=10)
    for _ in range(2):
        line.fail(23, AttemptExited(reason="the box rebooted"))
    assert (line.job.trouble, line.job.head_step, line.job.failures) == (None, 20, 3)
    line.fail(23, AttemptExited(reason="the box rebooted"))
    assert line.job.phase is JobPhase.FAILED


HISTORY = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.booleans(), st.booleans()),
    max_size=30,
)


@settings(max_examples=300)
@given(HISTORY)
def test_verdicts_over_random_failures(history: list[tuple[str, int, bool, bool]]) -> None:
    """Safety: nothing is suspected after one failure, nor without two alike in a row of failures
    that came no further; what is remembered is bounded."""
    trouble: Trouble | None = None
    since: list[tuple[str, int]] = []
    for digest, step, last, older in history:
        if trouble is None or step > trouble.step:
            since = []
        since.append((digest, step))
        trouble, verdict = judge(trouble, (digest, 0), step, last=last, older=older)
        assert trouble.step == step
        assert len(trouble.tried) <= TRIED_MAX
        alike = since.count((digest, step))
        if verdict is Verdict.STEP_BACK:
            assert (alike >= 2, last, older, trouble.set_aside) == (True, True, True, "")
            trouble = Trouble(trouble.step, trouble.tried, digest)
        elif verdict is Verdict.QUARANTINE:
            here = [at for _, at in since].count(step)
            assert here >= 2
            assert trouble.set_aside or not older or here >= 3
            trouble = None


def test_two_failures_at_different_steps_are_chance() -> None:
    """Seeded histories of a program that fails anywhere: held only where two places were alike."""
    for seed in range(30):
        chance = random.Random(seed)
        line = Line(restarts=1_000, keep=3)
        line.begin()
        place = 0
        for _ in range(10):
            # A new place each time, sometimes further back than the last one.
            place = place + chance.choice((-1, 2)) * chance.randint(1, 3) * 10 + 1
            place = max(place, line.job.head_step + 1, 10)
            if line.job.trouble is not None and place == line.job.trouble.step:
                place += 1
            line.run(lambda head, place=place: place, every=5)  # type: ignore[misc]
        assert not line.told("checkpoint.set_aside"), f"seed {seed}"
        assert line.job.phase in (JobPhase.QUEUED, JobPhase.ACTIVE)  # not held
