"""Checkpoints of the time after the copy that a store was put back from: it does not know them, and
nodes have them, of jobs that it knows or not. What runs: `test_restored.py`."""

from dataclasses import replace

from coordinator.core.checkpoint_requests import Manifest, NoteManifests
from coordinator.core.found import unread
from coordinator.core.messages import (
    AttemptExited,
    CheckpointProposed,
    ExplainJob,
    Explanation,
    HeldAttempt,
    Refusal,
    ReleaseJob,
    Request,
    StartAttempt,
    Submit,
    Submitted,
)
from coordinator.core.model import JobSpec, Part
from coordinator.core.numbering import EPOCHS_MIN
from coordinator.core.phases import JobPhase
from tests.core.test_restored import AGE_MS, SPEC, World, answer


def committed_before_the_copy() -> World:
    world = World("n1:1")
    world.submit()
    world.box.say("1.1", CheckpointProposed("aa", "", 5, 1, ("n0", "n1")))
    world.go_back(world.copy())
    return world


def test_what_was_committed_after_the_copy_is_found_on_nodes() -> None:
    """By epoch, then by step; what is known has one copy more."""
    world = committed_before_the_copy()
    world.hello(checkpoints=("bb", "cc", "dd"))
    world.hello(checkpoints=("aa", "bb"), node=1)
    state = world.box.rig.core.state
    assert unread(state) == [("n0", "n0:1", ("bb", "cc", "dd")), ("n1", "n1:1", ("bb",))]
    old, bb = Manifest("dd", 1, 1, 4, "", 1), Manifest("bb", 1, 1, 9, "aa", 1)
    assert world.read(Manifest("cc", 1, 2, 7, "aa", 1), bb, old) == ("cc", "aa")
    assert unread(state) == [("n1", "n1:1", ("bb",))]
    assert world.read(bb, node=1) == ("cc", "aa")
    assert world.read(Manifest("cc", 1, 2, 7, "aa", 1), node=1) == ("cc", "aa")
    assert state.checkpoints[1][-1].replicas == ("n0", "n1")
    assert (world.phase(1), state.jobs[1].head_step) == (JobPhase.HELD, 7)
    world.box.take(Request(1, ReleaseJob(1)))
    starts = [order for order in world.box.sent if isinstance(order, StartAttempt)]
    assert [one.digest for one in starts[0].candidates] == ["cc", "aa"]
    # From here on commits are known, and what else may lie there is of who does not hold the job.
    assert world.read(Manifest("ee", 1, 3, 99, "cc", 1)) == ("cc", "aa")


def test_of_what_runs_its_own_checkpoints_alone_are_found() -> None:
    """Of another attempt's nobody knows that it held the job."""
    world = committed_before_the_copy()
    world.hello("1.2", checkpoints=("aa", "bb", "cc"))
    assert world.read(Manifest("bb", 1, 1, 9, "aa", 1)) == ("aa",)
    assert world.read(Manifest("cc", 1, 2, 7, "aa", 1)) == ("cc", "aa")
    world.box.say("1.2", CheckpointProposed("dd", "cc", 8, 1, ("n0",)))
    assert world.read(Manifest("cc", 1, 2, 7, "aa", 1))[0] == "dd"


def part(digest: str, rank: int, step: int) -> Manifest:
    return Manifest(digest, 1, 1, step, "", 10, rank)


def test_parts_of_one_step_are_a_checkpoint_when_those_of_all_ranks_are_found() -> None:
    """On whichever nodes; of what a rank has saved twice at a step nobody can say what belongs
    together."""
    world = World("n1:1")
    world.submit(ranks=2)
    world.go_back(world.copy())
    here, there = ("a4", "a6", "a8", "a9"), ("b4", "b6", "x8", "b8")
    world.hello(checkpoints=here)
    world.hello(checkpoints=there, node=1)
    state = world.box.rig.core.state
    assert world.read(*(part(digest, 0, int(digest[1])) for digest in here)) == ()
    parts = [part(digest, 1, int(digest[1])) for digest in there]
    assert world.read(*parts[:3], node=1) == (), "it has a b8 as well"
    assert world.read(*parts[3:], node=1) == ("a6", "a4")
    found = state.checkpoints[1][-1]
    assert found.pieces == (Part("a6", 10, ("n0",)), Part("b6", 10, ("n1",)))
    # A copy of a part that was sent to its standby.
    world.read(part("b6", 1, 6))
    assert state.checkpoints[1][-1].parts == (Part("b6", 10, ("n1", "n0")),)
    world.box.take(Request(1, ReleaseJob(1)))
    starts = [order for order in world.box.sent if isinstance(order, StartAttempt)]
    assert [[one.digest for one in order.candidates] for order in starts] == [["a6", "a4"]] * 2
    # Rank 0 alone may write for all.
    whole = World()
    whole.submit(ranks=2)
    whole.go_back(whole.copy())
    whole.hello()
    assert whole.read(Manifest("bb", 1, 1, 9, "", 1)) == ("bb",)


def test_of_a_job_that_has_left_meanwhile_no_parts_are_put_together() -> None:
    """What lies on a node is read a part at a time, and the oldest job leaves for a new one."""
    world = World()
    world.submit(ranks=2)
    for rank in range(2):
        world.box.say(f"1.1.{rank}", AttemptExited(0))
    world.go_back(world.copy())
    world.hello(checkpoints=("a4", "b4"))
    world.read(part("a4", 0, 4))
    state = world.box.rig.core.state
    state.drop_job(1)
    world.box.take(Request(2, NoteManifests("n0", ("b4",), (part("b4", 1, 4),))))
    assert (state.jobs, state.checkpoints) == ({}, {})


def test_a_job_that_is_known_by_its_checkpoints_alone_goes_on_when_it_is_said_again() -> None:
    """It was submitted after the copy, and nobody runs it."""
    world = World()
    world.submit()
    world.go_back(world.copy())
    world.hello("1.1", checkpoints=("cc", "dd"))
    far = world.box.rig.core.state.last_job_id + 1
    given = Manifest("dd", far, 1, 5, "", 1), Manifest("ee", 1, 9, 5, "", 1)
    assert world.read(*given, Manifest("cc", 2, 3, 7, "bb", 1), job_id=2) == ("cc",)
    assert sorted(world.box.rig.core.state.jobs) == [1, 2], "an id that was never given"
    explained = answer(world, ExplainJob(2))
    assert isinstance(explained, Explanation)
    assert "`baton submit --for-job 2`" in explained.sentence
    for no in (ReleaseJob(2), Submit(SPEC, "", 2), Submit(JobSpec(command=("x",)), "", 1)):
        assert isinstance(answer(world, no), Refusal)
    again = Submit(JobSpec(command=("x",), max_restarts=9), "once", 2)
    world.box.take(Request(1, again))
    (start,) = [order for order in world.box.sent if isinstance(order, StartAttempt)]
    assert [one.digest for one in start.candidates] == ["cc"]
    assert start.attempt == f"2.{EPOCHS_MIN + 1 + AGE_MS // 1000}"
    assert start.spec.max_restarts == 9
    said = answer(world, again)
    assert isinstance(said, Submitted)
    assert said.job_id == 2


def test_what_runs_of_such_a_job_after_all_is_taken_back() -> None:
    """Its node comes late, with the attempt that wrote the checkpoint."""
    world = World("n1:1")
    world.go_back(world.copy())
    world.hello(checkpoints=("cc",))
    assert world.read(Manifest("cc", 2, 1, 7, "bb", 1), job_id=2) == ("cc",)
    world.hello("2.1", node=1)
    assert (world.asked, world.killed()) == (("2.1",), [])
    world.answer(HeldAttempt("2.1", (), spec=SPEC, checkpoint="cc"), node=1)
    job = world.box.rig.core.state.jobs[2]
    assert (job.phase, job.epoch, job.spec.project) == (JobPhase.ACTIVE, 1, "p")
    world.box.say("2.1", CheckpointProposed("dd", "cc", 9, 1, ("n1",)))
    assert world.box.rig.core.state.jobs[2].head == "dd"


def test_parts_of_such_a_job_are_put_together_when_its_ranks_are_known() -> None:
    world = World()
    world.go_back(world.copy())
    world.hello(checkpoints=("aa", "bb"))
    parts = [replace(part(name, rank, 6), job_id=3) for rank, name in enumerate(("aa", "bb"))]
    assert world.read(*parts, job_id=3) == ()
    world.box.take(Request(1, Submit(JobSpec(command=("x",), ranks=2), "", 3)))
    starts = [order for order in world.box.sent if isinstance(order, StartAttempt)]
    assert [order.candidates[0].step for order in starts] == [6, 6]


def test_where_no_copy_was_put_back_nothing_is_looked_for() -> None:
    world = World()
    world.submit()
    world.hello("1.1", checkpoints=("aa",), acknowledged=1)
    assert unread(world.box.rig.core.state) == []
    assert isinstance(answer(world, NoteManifests("n9", (), ())), Refusal)
