"""A store that was put back from a copy: what the nodes know and it does not is not killed, and no
number is given twice. The copy is of T0; what happens until T1 the rig's disk then has forgotten.
With real processes: `tests/e2e/test_restarts.py`."""

from copy import deepcopy
from dataclasses import replace

import pytest

from coordinator.core import restored, taken_back
from coordinator.core.checkpoint_requests import Manifest, NoteManifests
from coordinator.core.messages import (
    AttemptExited,
    AttemptStarted,
    CancelJob,
    CheckpointProposed,
    CommitResult,
    ExplainJob,
    Explanation,
    FromAgent,
    Heartbeat,
    HeldAttempt,
    Hello,
    HoldJob,
    ListNodes,
    Log,
    NodePage,
    ReleaseJob,
    Reply,
    Request,
    RequestBody,
    SessionClosed,
    StartAttempt,
    StopAttempt,
    Submit,
    Tick,
    Welcome,
)
from coordinator.core.model import JobSpec, Snapshot
from coordinator.core.numbering import EPOCHS_MIN, JOB_IDS_MIN, Numbering, put_back
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.restored import UNSURE, held
from coordinator.core.state import LiveNode
from tests.core.coordinator_harness import UNIX_MS_AT_START, Disk
from tests.core.test_gangs import HOST, Box

AGE_MS = 86_400_000


class World:
    """One node, `n0`, and a coordinator on a disk that goes back."""

    def __init__(self, *addresses: str) -> None:
        self.box = Box("n0:1", *addresses)

    def submit(self, ranks: int = 1) -> None:
        for order in self.box.submit(ranks):
            self.box.say(order.attempt, AttemptStarted(1))

    def copy(self) -> Disk:
        return deepcopy(self.box.rig.disk)

    def go_back(self, copy: Disk, *, declared: bool = True) -> None:
        """The coordinator starts on the copy, as its store opens one that says what it is."""
        rig = self.box.rig
        snapshot, rig.disk = copy.snapshot(), deepcopy(copy)
        if declared:
            epoch_max = max((one.epoch for one in snapshot.attempts), default=0)
            back = put_back(snapshot.numbering, snapshot.last_job_id, epoch_max, AGE_MS)
            for record in held(snapshot, UNIX_MS_AT_START, back.leader_epochs):
                rig.disk.write(record)
            rig.disk.last_job_id = back.last_job_id
        rig.restart()
        if declared:
            rig.core.state.numbering = rig.core.state.proven = back.numbering

    def hello(
        self,
        *attempts: str,
        node: int = 0,
        checkpoints: tuple[str, ...] = (),
        acknowledged: int = 100,
    ) -> None:
        """Of a node that is in already it says what it has now. `asked`: of which it is asked what
        they are."""
        held_attempts = tuple(HeldAttempt(one, ()) for one in attempts)
        name = f"n{node}"
        hello = Hello(name, "j", f"{name}:1", HOST, (), held_attempts, checkpoints, acknowledged)
        self.box.sequences[node] = acknowledged
        self.box.take(FromAgent(node, hello))
        self.told = [
            effect.event
            for effect in self.box.rig.handled[-2][2]
            if isinstance(effect, Log) and effect.event.startswith("store.")
        ]
        welcomes = [order for order in self.box.sent if isinstance(order, Welcome)]
        self.asked = welcomes[0].unknown

    def answer(self, *held_attempts: HeldAttempt, node: int = 0) -> None:
        self.box.rig.now_ms += 1_000
        self.box.take(FromAgent(node, Heartbeat(self.box.rig.now_ms, attempts=held_attempts)))

    def read(self, *manifests: Manifest, node: int = 0, job_id: int = 1) -> tuple[str, ...]:
        """Somebody has read these there. What of its job the coordinator knows then, the last
        checkpoint first."""
        digests = tuple(one.digest for one in manifests)
        self.box.take(Request(2, NoteManifests(f"n{node}", digests, manifests)))
        state = self.box.rig.core.state
        known = tuple(one.digest for one in state.good_checkpoints(state.jobs[job_id]))
        assert (*known[:1], "")[0] == state.jobs[job_id].head
        return known

    def node(self, number: int) -> LiveNode:
        return self.box.rig.core.state.nodes[f"n{number}"]

    def phase(self, job_id: int) -> JobPhase:
        return self.box.rig.core.state.jobs[job_id].phase

    def killed(self) -> list[str]:
        return [order.attempt for order in self.box.sent if isinstance(order, StopAttempt)]

    def started(self) -> list[str]:
        return [order.attempt for order in self.box.sent if isinstance(order, StartAttempt)]

    def restarts(self) -> list[int]:
        return [order.restart_count for order in self.box.sent if isinstance(order, StartAttempt)]

    def why(self) -> str:
        replies = [e for e in self.box.rig.handle(Request(9, ListNodes())) if isinstance(e, Reply)]
        page = replies[0].answer
        assert isinstance(page, NodePage)
        return page.nodes[0].reason


def test_what_runs_on_is_kept_and_what_is_unknown_left_alone() -> None:
    world = World()
    world.submit()
    copy = world.copy()
    world.submit()
    world.go_back(copy)
    world.hello("1.1", "2.1")
    assert world.killed() == []
    assert world.phase(1) is JobPhase.ACTIVE
    assert world.box.rig.core.state.jobs[1].reason == "has run on since the copy"
    for _ in range(restored.PATIENCE_MS // 1_000):
        assert world.why() == "", "its node is asked what it is"
        world.answer(HeldAttempt("1.1", ()), HeldAttempt("2.1", ()))
    assert "runs 2.1: the coordinator's database does not know it" in world.why()
    world.box.take(Request(1, Submit(JobSpec(command=("x",)))))
    assert world.started() == [f"{2 + JOB_IDS_MIN + 10 * AGE_MS // 1000}.1"]
    world.box.pass_ms(1_000)
    assert world.killed() == []


@pytest.mark.parametrize("declared", [True, False])
def test_a_later_attempt_of_a_known_job_is_taken_back_and_goes_on_committing(
    declared: bool,
) -> None:
    """Also where nobody has said that the store is a copy, since the job was that node's."""
    world = World()
    world.submit()
    copy = world.copy()
    world.go_back(copy, declared=declared)
    world.hello("1.3")
    assert world.told == ([] if declared else ["store.behind"])
    assert world.killed() == []
    state = world.box.rig.core.state
    assert (world.phase(1), state.jobs[1].epoch) == (JobPhase.ACTIVE, 3)
    assert state.attempts["1.1"].phase is AttemptPhase.LOST
    world.box.say("1.3", CheckpointProposed("dd", "cc", 9, 1, ("n0",)))
    results = [order for order in world.box.sent if isinstance(order, CommitResult)]
    assert [result.accepted for result in results] == [True]
    assert state.checkpoints[1][0].parent == ""  # the last that is known
    world.box.say("1.3", AttemptExited(0))
    assert world.phase(1) is JobPhase.SUCCEEDED


def test_of_a_plain_copy_what_a_node_that_knows_more_does_not_run_is_held() -> None:
    """It would begin again beside whoever has it now. No id of after the copy is given again, and
    what others should run is theirs."""
    world = World("n1:1")
    world.box.rig.now_ms += 1_000
    for _ in range(2):
        world.submit()
    nodes = [world.box.rig.core.state.attempts[f"{job}.1"].node for job in (1, 2)]
    assert nodes == ["n0", "n1"]
    world.go_back(world.copy(), declared=False)
    world.hello()
    assert world.told == ["store.behind"]
    assert (world.phase(1), world.started()) == (JobPhase.HELD, [])
    assert world.box.rig.core.state.jobs[1].reason == UNSURE
    world.hello("2.1", "3.1", node=1)
    assert (world.told, world.killed(), world.asked) == (["store.behind"], [], ("3.1",))
    world.answer(HeldAttempt("2.1", ()), HeldAttempt("3.1", (), spec=SPEC), node=1)
    # It may be, or the node errs: left alone, and shown.
    state = world.box.rig.core.state
    assert (3 in state.jobs, list(world.node(1).strays), world.killed()) == (False, ["3.1"], [])
    assert world.box.rig.core.state.jobs[2].reason == "has run on since the copy"
    world.box.take(Request(1, Submit(JobSpec(command=("x",)))))
    assert world.started() == [f"{2 + JOB_IDS_MIN + 1}.1"]


def test_what_nobody_runs_any_more_is_held_and_starts_above_all_that_was() -> None:
    world = World()
    world.submit()
    world.go_back(world.copy())
    world.hello()
    job = world.box.rig.core.state.jobs[1]
    assert (job.phase, job.reason, world.started()) == (JobPhase.HELD, UNSURE, [])
    explained = answer(world, ExplainJob(1))
    assert isinstance(explained, Explanation)
    assert explained.sentence == f"job 1 is held: {UNSURE}"
    world.box.take(Request(1, ReleaseJob(1)))
    assert world.started() == [f"1.{1 + EPOCHS_MIN + AGE_MS // 1000}"]
    assert world.restarts() == [1]
    # No order to switch a node off has a key that its driver has seen.
    assert world.box.rig.disk.nodes["n0"].power.changes == EPOCHS_MIN + AGE_MS // 1000
    # Who has run it since, and comes only now, is too late: two would be in one place.
    world.hello("1.2")
    assert "1.2" in world.killed()


@pytest.mark.parametrize("told_first", [True, False])
def test_what_its_owner_has_cancelled_since_does_not_come_back(told_first: bool) -> None:
    """Held by then, or not told yet whether it runs. Also after another restart."""
    world = World()
    world.submit()
    world.go_back(world.copy())
    if told_first:
        world.hello()
    world.box.take(Request(1, CancelJob(1)))
    world.hello("1.2")
    numbering = world.box.rig.core.state.numbering
    world.box.rig.restart()
    state = world.box.rig.core.state
    state.numbering = state.proven = numbering
    world.hello("1.2")
    assert (world.killed(), world.phase(1)) == (["1.2"], JobPhase.CANCELLED)


def test_what_its_owner_holds_before_its_node_has_told_that_it_runs_stays_held() -> None:
    world = World()
    world.submit()
    world.go_back(world.copy())
    world.box.take(Request(1, HoldJob(1)))
    world.hello("1.1")
    assert world.killed() == ["1.1"]
    world.box.say("1.1", AttemptExited(signal=15))
    assert (world.started(), world.phase(1)) == ([], JobPhase.HELD)


def answer(world: World, body: RequestBody) -> object:
    replies = [e for e in world.box.rig.handle(Request(9, body)) if isinstance(e, Reply)]
    return replies[0].answer


def lost_before_the_copy() -> World:
    """Both nodes are lost, with job 1, when the copy is made; it waits for one of them."""
    world = World("n1:1")
    world.submit()
    for node in range(2):
        world.box.rig.handle(FromAgent(node, SessionClosed()))
    world.box.rig.now_ms += 600_000
    world.box.rig.handle(Tick())
    attempts = world.box.rig.core.state.attempts.values()
    assert {one.phase for one in attempts} == {AttemptPhase.UNREACHABLE}
    assert world.phase(1) is JobPhase.QUEUED
    world.go_back(world.copy())
    return world


def test_what_was_out_of_reach_is_not_started_beside_who_has_taken_its_place() -> None:
    world = lost_before_the_copy()
    world.hello(node=1)
    assert (world.started(), world.phase(1)) == ([], JobPhase.HELD)
    world.hello("1.2")
    assert (world.killed(), world.phase(1)) == ([], JobPhase.ACTIVE)
    assert world.box.rig.core.state.jobs[1].epoch == 2


def test_what_was_out_of_reach_goes_on_when_it_is_back() -> None:
    """Unless another node has its place by then."""
    world = lost_before_the_copy()
    world.hello("1.1")
    assert (world.killed(), world.phase(1)) == ([], JobPhase.ACTIVE)
    world.hello("1.2", node=1)
    assert world.phase(1) is JobPhase.ACTIVE
    assert world.box.rig.core.state.attempts["1.1"].phase is AttemptPhase.LOST
    world.hello("1.1")
    assert world.killed() == ["1.1"]


@pytest.mark.parametrize("last", [0, 1])
def test_a_gang_of_a_later_epoch_is_taken_back_once_all_its_ranks_are_there(last: int) -> None:
    """Each on a node of its own. Until then they are left alone, and none is started beside it."""
    world = World("n1:1")
    world.submit(ranks=2)
    world.go_back(world.copy())
    world.hello(f"1.2.{1 - last}", node=1 - last)
    assert world.started() == []
    assert world.killed() == ["1.1.1"] * last  # with the rank that the copy has beside it
    assert list(world.node(1 - last).strays) == [f"1.2.{1 - last}"]
    world.hello(f"1.2.{last}", node=last)
    state = world.box.rig.core.state
    assert (world.started(), world.killed(), world.phase(1)) == ([], [], JobPhase.ACTIVE)
    assert [rank.node for rank in state.gang(state.jobs[1])] == ["n0", "n1"]
    assert not any(live.strays or live.unknown for live in state.nodes.values())
    assert state.attempts["1.1.0"].phase is AttemptPhase.LOST
    world.box.say("1.2.0", CheckpointProposed("aa", "xx", 7, 1, ("n0",), 2))
    world.box.say("1.2.1", CheckpointProposed("bb", "yy", 7, 1, ("n1",), 2))
    assert (state.jobs[1].head, state.jobs[1].head_step) == ("aa", 7)
    for rank in range(2):
        world.box.say(f"1.2.{rank}", AttemptExited(0))
    assert world.phase(1) is JobPhase.SUCCEEDED


SPEC = JobSpec(command=("x", "5"), project="p", max_restarts=7, array="0-9", hold=True)


def test_a_job_that_nobody_knows_is_what_its_node_was_told_to_run() -> None:
    world = World()
    world.submit()
    copy = world.copy()
    world.submit()
    world.go_back(copy)
    world.hello("1.1", "2.3", checkpoints=("cc", "ee"))
    assert world.asked == ("2.3",)
    world.answer(HeldAttempt("1.1", ()), HeldAttempt("2.3", (), spec=SPEC, checkpoint="cc"))
    state = world.box.rig.core.state
    assert world.why() == ""
    job = world.box.rig.disk.jobs[2]
    assert (job.phase, job.epoch) == (JobPhase.ACTIVE, 3)
    assert job.spec == replace(SPEC, array="", hold=False)
    # What it continues is its last checkpoint, whoever has made it; of others nobody knows that.
    manifests = Manifest("cc", 2, 2, 7, "bb", 1), Manifest("ee", 2, 1, 9, "aa", 1)
    assert world.read(*manifests, job_id=2) == ("cc",)
    world.box.say("2.3", CheckpointProposed("dd", "cc", 9, 1, ("n0",)))
    assert (state.jobs[2].head, state.jobs[2].head_step) == ("dd", 9)
    world.box.say("2.3", AttemptExited(1))
    assert world.started() == [f"2.{1 + EPOCHS_MIN + AGE_MS // 1000}"]


def test_a_gang_that_nobody_knows_is_taken_back_when_all_its_nodes_have_told_it() -> None:
    world = World("n1:1")
    spec = replace(SPEC, ranks=2)
    world.go_back(world.copy())
    for node in (1, 0):
        world.hello(f"7.2.{node}", node=node)
        # What its job is the first one says; what it continues each says for itself.
        assert (7 in world.box.rig.core.state.jobs, world.asked) == (node == 0, (f"7.2.{node}",))
        told = HeldAttempt(f"7.2.{node}", (), spec=spec, checkpoint=f"c{node}")
        world.answer(told, node=node)
        world.answer(HeldAttempt(f"7.2.{node}", ()), node=node)
    state = world.box.rig.core.state
    assert [rank.restored_digest for rank in state.gang(state.jobs[7])] == ["c0", "c0"]
    assert world.phase(7) is JobPhase.ACTIVE
    world.box.say("7.2.0", AttemptExited(signal=9))
    assert world.killed() == ["7.2.1"]


@pytest.mark.parametrize("first", [0, 1])
def test_one_rank_is_enough_to_tell_what_the_job_of_all_is(first: int) -> None:
    """The other's agent was an older one when it started that, and nobody can say it any more."""
    world = World("n1:1")
    spec = replace(SPEC, ranks=2)
    world.go_back(world.copy())
    for node in (first, 1 - first):
        world.hello(f"7.2.{node}", node=node)
        told = HeldAttempt(f"7.2.{node}", (), spec=spec if node else None)
        world.answer(told, node=node)
    state = world.box.rig.core.state
    assert (world.phase(7), [rank.node for rank in state.gang(state.jobs[7])]) == (
        JobPhase.ACTIVE,
        ["n0", "n1"],
    )
    world.box.say("7.2.0", CheckpointProposed("aa", "xx", 7, 1, ("n0",), 2))
    world.box.say("7.2.1", CheckpointProposed("bb", "yy", 7, 1, ("n1",), 2))
    assert state.jobs[7].head == "aa"


def test_what_a_node_says_of_a_job_is_not_taken_for_one_if_it_can_be_none() -> None:
    world = World()
    world.go_back(world.copy())
    world.hello("2.1")
    shared = replace(SPEC, gpus=1, shared_gpu_memory_bytes=1)
    for spec in (JobSpec(), replace(SPEC, ranks=10**9), replace(SPEC, gpus=-1), shared):
        world.answer(HeldAttempt("2.1", (), spec=spec))
        assert world.box.rig.core.state.jobs == {}
    world.answer(HeldAttempt("2.1", ("g", "g"), spec=replace(SPEC, gpus=2)))
    assert world.box.rig.core.state.jobs == {}
    assert (list(world.node(0).strays), world.killed()) == (["2.1"], [])


def test_no_node_has_more_jobs_made_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taken_back, "JOBS_OPEN_MAX", 2)
    world = World()
    world.go_back(world.copy())
    world.hello()
    world.answer(*(HeldAttempt(f"{job}.1", (), spec=SPEC) for job in range(1, 5)))
    assert (list(world.box.rig.core.state.jobs), world.killed()) == ([1, 2], [])


def test_what_has_been_forgotten_is_still_killed() -> None:
    """An id that the copy had given, of a job that has left since."""
    world = World()
    world.submit()
    world.box.say("1.1", AttemptExited(0))
    world.box.rig.core.state.drop_job(1)
    world.hello("1.1")
    assert world.killed() == ["1.1"]


def test_what_was_given_and_forgotten_after_the_copy_is_killed_too() -> None:
    """Its id is above all that the nodes may know and the store does not."""
    world = World()
    world.go_back(world.copy())
    world.hello()
    (start,) = world.box.submit(1)
    world.box.say(start.attempt, AttemptExited(0))
    state = world.box.rig.core.state
    state.drop_job(state.last_job_id)
    world.hello(start.attempt)
    assert (world.killed(), world.asked) == ([start.attempt], ())


def test_a_node_that_came_after_a_plain_copy_tells_that_it_is_one() -> None:
    """Nobody had heard anything of it; what it runs is no stray when it says so again."""
    world = World()
    world.submit()
    world.go_back(world.copy(), declared=False)
    world.hello("1.1", acknowledged=1)
    world.box.sequences.append(0)
    world.hello("2.1", node=1)
    assert world.told == ["store.behind"]
    for _ in range(2):
        world.answer(HeldAttempt("2.1", ()), node=1)
        assert (world.killed(), list(world.node(1).strays)) == ([], ["2.1"])
    world.answer(HeldAttempt("2.1", (), spec=SPEC), node=1)
    assert (2 in world.box.rig.core.state.jobs, world.killed()) == (False, [])


def test_a_number_that_no_copy_explains_counts_for_nothing() -> None:
    """The peer lies, or its disk does: one such attempt may neither have the job of another, nor
    use up the ids of all that come."""
    world = World()
    world.submit()
    lies = ["1.999999999999999999", "999999999999999999.1"]
    world.hello("1.1", *lies)
    assert sorted(world.killed()) == lies
    job = world.box.rig.core.state.jobs[1]
    assert (job.epoch, job.phase) == (1, JobPhase.ACTIVE)
    world.box.take(Request(1, Submit(JobSpec(command=("x",)))))
    # One step above, since it was answered for more than is known.
    assert world.box.rig.core.state.last_job_id == 2 + JOB_IDS_MIN


def test_the_same_copy_put_back_again_gives_other_numbers() -> None:
    first = put_back(Numbering(), 7, 3, 1_000)
    again = put_back(Numbering(), 7, 3, 60_000)
    assert again.last_job_id > first.last_job_id + 500
    assert again.numbering.epoch_floor > first.numbering.epoch_floor + 50
    assert again.leader_epochs > first.leader_epochs + 50
    second = put_back(first.numbering, first.last_job_id + 5, 3, -1)
    assert second.numbering.remembered_job_id == 7
    assert second.numbering.given_job_id == second.last_job_id
    assert second.last_job_id == first.last_job_id + 5 + JOB_IDS_MIN
    assert second.numbering.epoch_floor == first.numbering.epoch_floor + EPOCHS_MIN
    assert list(held(Snapshot(), 0, 1)) == []
