"""A node that says what is another one's: it is refused, said so, and harms nothing. What follows
from a store that was put back, where a node may know more: `test_restored.py`."""

import pytest

from coordinator.core.checkpoint_requests import Manifest
from coordinator.core.live import FOREIGN_SAID_MAX
from coordinator.core.messages import (
    AgentEvent,
    AgentEventBody,
    AttemptExited,
    AttemptMilestone,
    AttemptRefused,
    AttemptStarted,
    CheckpointProposed,
    CommitResult,
    FromAgent,
    GpuHealthChanged,
    Heartbeat,
    HeldAttempt,
    Log,
    Request,
    Submit,
)
from coordinator.core.model import GpuHealth, GpuVerdict, JobSpec, Progress, Replication
from coordinator.core.numbering import JOB_IDS_MIN
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.restored import PATIENCE_MS
from tests.core.coordinator_harness import UNIX_MS_AT_START
from tests.core.test_restored import SPEC, World


def two_nodes(ranks: int = 1) -> World:
    """`n0` runs job 1, or rank 0 of it, and has committed step 5; `n1` will lie."""
    world = World("n1:1")
    world.submit(ranks)
    if ranks == 1:
        world.box.say("1.1", CheckpointProposed("aa", "", 5, 1, ("n0", "n1")))
    return world


def lie(world: World, attempt: str, body: AgentEventBody, node: int = 1) -> list[Log]:
    """As an event of `n1`; what is logged."""
    world.box.sequences[node] += 1
    event = AgentEvent(world.box.sequences[node], UNIX_MS_AT_START, attempt, body)
    world.box.take(FromAgent(node, event))
    return [effect for effect in world.box.rig.handled[-2][2] if isinstance(effect, Log)]


def goes_on(world: World, attempt: str = "1.1") -> None:
    """Job 1 is `n0`'s as before: nobody has stopped it, and it commits."""
    state = world.box.rig.core.state
    job = state.jobs[1]
    assert (job.phase, job.epoch, job.reason) != (JobPhase.HELD, 1, "")
    assert (job.phase, job.epoch) == (JobPhase.ACTIVE, 1)
    assert state.attempts[attempt].phase is AttemptPhase.RUNNING
    if state.attempts[attempt].ranks == 1:
        world.box.say(attempt, CheckpointProposed("bb", job.head, 9, 1, ("n0", "n1")))
        assert (state.jobs[1].head, state.jobs[1].head_step) == ("bb", 9)


@pytest.mark.parametrize("at_once", [True, False])
def test_no_node_takes_a_job_from_another_by_a_later_attempt(at_once: bool) -> None:
    """In its hello, or in a heartbeat; with what is known of it or not."""
    world = two_nodes()
    if at_once:
        world.hello("1.2", node=1, acknowledged=0)
    for spec in (None, SPEC):
        world.answer(HeldAttempt("1.2", (), spec=spec, checkpoint="cc"), node=1)
        assert world.killed() == []
    assert "1.2" not in world.box.rig.core.state.attempts
    lie(world, "1.2", CheckpointProposed("cc", "aa", 99, 1, ("n1", "n0")))
    results = [order for order in world.box.sent if isinstance(order, CommitResult)]
    assert [one.accepted for one in results] == [False]
    lie(world, "1.2", AttemptExited(0))
    goes_on(world)


def test_no_node_takes_the_rank_of_another() -> None:
    world = two_nodes(ranks=2)
    for _ in range(2):
        world.answer(HeldAttempt("1.2.0", ()), HeldAttempt("1.2.1", ()), node=1)
        world.answer(HeldAttempt("1.1.0", ()), node=0)
    assert "1.1.0" not in world.killed()
    assert "1.2.0" not in world.box.rig.core.state.attempts


def test_no_node_makes_a_job_or_has_ids_used_up_again_and_again() -> None:
    world = two_nodes()
    for number in range(1, 5):
        name = f"{number * JOB_IDS_MIN}.1"
        world.answer(HeldAttempt(name, (), spec=SPEC), node=1)
    state = world.box.rig.core.state
    assert (list(state.jobs), state.last_job_id) == ([1], 1 + JOB_IDS_MIN)
    goes_on(world)
    # What lies on its disk makes none, either.
    world.hello(node=1, checkpoints=("ee",), acknowledged=0)
    assert state.nodes["n1"].unlisted == ()
    world.read(Manifest("ee", 7, 1, 5, "", 1), Manifest("ff", 1, 1, 500, "", 1), node=1)
    assert (list(state.jobs), state.jobs[1].head) == ([1], "bb")


def test_its_word_makes_nobody_else_commit_what_does_not_follow() -> None:
    world = two_nodes()
    world.answer(HeldAttempt("1.2", ()), node=1)
    world.box.say("1.1", CheckpointProposed("dd", "cc", 9, 1, ("n0",)))
    (result,) = [order for order in world.box.sent if isinstance(order, CommitResult)]
    assert (result.accepted, world.box.rig.core.state.jobs[1].head) == (False, "aa")


def test_what_it_says_that_it_runs_is_shown_until_it_has_ended() -> None:
    world = two_nodes()
    for _ in range(PATIENCE_MS // 1_000 + 2):
        world.answer(HeldAttempt("1.2", ()), node=1)
    handled = world.box.rig.handled
    logs = [one for _, _, effects in handled for one in effects if isinstance(one, Log)]
    events = [(one.level, one.event) for one in logs if one.event.endswith((".unknown", ".behind"))]
    assert events == [("error", "store.behind"), ("error", "attempt.unknown")]


@pytest.mark.parametrize(
    "body",
    [
        AttemptStarted(1, "aa", 3),
        AttemptExited(0),
        AttemptRefused("no such program", permanent=True),
        AttemptMilestone("first_step"),
        CheckpointProposed("cc", "aa", 99, 1, ("n1", "n0")),
    ],
)
def test_of_what_another_node_runs_no_event_counts(body: AgentEventBody) -> None:
    world = two_nodes()
    before = world.box.rig.core.state.jobs[1]
    (said,) = lie(world, "1.1", body)
    assert (said.level, said.event) == ("warning", "attempt.foreign")
    fields = dict(said.fields)
    assert (fields["node"], fields["attempt"]) == ("n1", "1.1")
    assert "n0" in str(fields["reason"])
    assert world.box.rig.core.state.jobs[1] == before
    goes_on(world)


def test_a_node_that_errs_all_the_time_does_not_fill_the_log() -> None:
    world = two_nodes()
    said = [lie(world, "1.1", AttemptExited(0)) for _ in range(FOREIGN_SAID_MAX + 9)]
    assert sum(map(len, said)) == FOREIGN_SAID_MAX
    world.hello(node=1, acknowledged=len(said))
    assert len(lie(world, "1.1", AttemptExited(0))) == 1
    goes_on(world)


def test_what_is_late_is_no_lie() -> None:
    """Of an attempt that is over, or whose job has left."""
    world = World()
    world.submit()
    world.box.say("1.1", AttemptExited(0))
    assert lie(world, "1.1", AttemptExited(0), node=0) == []
    world.box.rig.core.state.drop_job(1)
    assert lie(world, "1.1", AttemptExited(0), node=0) == []


def test_of_what_another_node_runs_no_heartbeat_counts() -> None:
    world = two_nodes()
    beat = Heartbeat(
        world.box.rig.now_ms + 1,
        attempts=(HeldAttempt("1.1", ("n0-g0",), precopy_gain_ms=1, copies_failed=99),),
        progress=(("1.1", Progress(10**6, 10**6, (), None)),),
    )
    world.box.take(FromAgent(1, beat))
    state = world.box.rig.core.state
    assert world.killed() == ["1.1"]  # there, where it is not to be
    assert "1.1" not in state.progress
    goes_on(world)


def test_a_gpu_of_another_node_is_not_forgotten_to_be_ill() -> None:
    world = two_nodes()
    state = world.box.rig.core.state
    state.held_back["n0-g0"] = "not cordoned: too many were"
    well = GpuHealth("n0-g0", GpuVerdict.HEALTHY, "", "", ())
    lie(world, "", GpuHealthChanged((well,)))
    assert list(state.held_back) == ["n0-g0"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_copy_off_the_node_is_one_on_another(ranks: int) -> None:
    """The node named twice, or one that is none of the fleet's, is no other."""
    world = World("n1:1")
    spec = JobSpec(command=("x",), ranks=ranks, replication=Replication.REQUIRED)
    world.box.take(Request(1, Submit(spec)))
    own = "1.1.0" if ranks > 1 else "1.1"
    state = world.box.rig.core.state
    there = state.attempts[own].node
    for replicas in ((there, there), (there, "nowhere"), (there,)):
        world.box.say(own, CheckpointProposed("aa", "", 5, 1, replicas))
        (result,) = [order for order in world.box.sent if isinstance(order, CommitResult)]
        assert (result.accepted, state.jobs[1].head) == (False, "")


def test_what_could_not_be_read_is_written_down_within_bounds() -> None:
    world = two_nodes()
    world.box.say("1.1", AttemptExited(1))
    world.box.pass_ms(1_000)
    name = f"1.{world.box.rig.core.state.jobs[1].epoch}"
    skipped = tuple((f"d{number}", "rotten") for number in range(5_000))
    before = world.box.rig.core.state.jobs[1].event_count
    world.box.say(name, AttemptStarted(1, "aa", 5, skipped))
    assert world.box.rig.core.state.jobs[1].event_count - before < 100


def test_after_a_restore_no_other_node_says_what_a_running_job_continues() -> None:
    world = World("n1:1")
    world.submit()
    world.go_back(world.copy())
    world.hello("1.1", checkpoints=("cc",))
    world.hello(node=1, checkpoints=("ff",))
    assert world.read(Manifest("ff", 1, 1, 10**9, "", 1), node=1) == ()
    assert world.read(Manifest("cc", 1, 1, 7, "", 1)) == ("cc",)


def test_after_a_restore_nobody_tells_of_what_can_only_have_been_given_since() -> None:
    """Its epoch is above all that the copy may have forgotten, or another node had it."""
    world = World("n1:1")
    world.submit()
    world.go_back(world.copy())
    world.hello()
    world.hello("1.1", node=1)
    assert (world.killed(), world.phase(1)) == (["1.1"], JobPhase.HELD)
    floor = world.box.rig.core.state.numbering.epoch_floor
    world.hello(f"1.{floor}", node=1)
    assert world.phase(1) is JobPhase.HELD


def test_after_a_restore_one_attempt_on_two_nodes_is_taken_from_neither() -> None:
    world = World("n1:1")
    world.submit(ranks=2)
    world.go_back(world.copy())
    world.hello("1.2.0", "1.2.1", node=1)
    job = world.box.rig.core.state.jobs[1]
    assert job.epoch == 2, "else nothing is shown here"
    world = World("n1:1")
    world.submit(ranks=2)
    world.go_back(world.copy())
    world.hello("1.2.0")
    world.hello("1.2.0", "1.2.1", node=1)
    assert world.box.rig.core.state.jobs[1].epoch == 1
