"""All that is held since the store was put back goes on by one word, and nothing else does."""

from dataclasses import replace

import pytest

from coordinator.core import jobs
from coordinator.core.messages import CordonNode, HoldJob, ReleaseJob, Request, Submit
from coordinator.core.model import JobIntent, JobSpec, JobView
from coordinator.core.phases import JobPhase
from tests.core.test_restored import World, answer

WAITS = JobSpec(command=("x",))
ALL = ReleaseJob(0, restored=True)
HELD, QUEUED, ACTIVE = JobPhase.HELD, JobPhase.QUEUED, JobPhase.ACTIVE


def released(world: World) -> int:
    """How many; a refusal is none, and says so."""
    said = answer(world, ALL)
    if isinstance(said, JobView):
        return said.changed
    assert getattr(said, "sentence", "") == "no job is held since the database was put back"
    return 0


def put_back_with(*specs: JobSpec) -> World:
    """Job 1 ran when the copy was made, and these waited, since its node takes nothing new."""
    world = World()
    world.submit()
    answer(world, CordonNode("n0"))
    for spec in specs:
        world.box.take(Request(1, Submit(spec)))
    world.go_back(world.copy())
    return world


def phases(world: World) -> list[JobPhase]:
    return [job.phase for _, job in sorted(world.box.rig.core.state.jobs.items())]


def test_what_nobody_is_sure_of_goes_on_and_what_its_owner_holds_does_not() -> None:
    world = put_back_with(WAITS, replace(WAITS, hold=True), WAITS)
    world.hello()
    assert phases(world) == [HELD] * 4
    assert released(world) == 3
    assert phases(world) == [QUEUED, QUEUED, HELD, QUEUED]
    # The message comes twice, also after a restart.
    assert released(world) == 0
    world.box.rig.restart()
    assert released(world) == 0
    answer(world, HoldJob(2))
    assert released(world) == 0
    assert phases(world)[1] is HELD


def test_what_runs_on_is_no_ones_to_release() -> None:
    world = put_back_with()
    world.hello("1.1")
    assert released(world) == 0
    assert (phases(world), world.killed()) == ([ACTIVE], [])


def test_before_its_node_is_back_a_job_is_released_and_runs_on_there() -> None:
    world = put_back_with()
    assert released(world) == 1
    assert world.box.rig.core.state.jobs[1].intent is JobIntent.RUN
    world.hello("1.1")
    assert (phases(world), world.killed(), world.started()) == ([ACTIVE], [], [])


def test_so_many_at_once_the_first_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RELEASED_MAX", 2)
    world = put_back_with(WAITS, WAITS)
    world.hello()
    assert (released(world), phases(world)) == (2, [QUEUED, QUEUED, HELD])
    assert (released(world), released(world)) == (1, 0)
