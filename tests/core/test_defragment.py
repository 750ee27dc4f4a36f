"""Small jobs move together so that a large one fits.

Problem: free GPUs that lie scattered are no use to a large job, and gathering them stops others. So
these drive the real core over fleets that have been fragmented, and look at who is stopped, where
he goes, what is kept for whom, and that nobody is stopped where it is not worth it.
"""

from dataclasses import replace

import pytest

from coordinator.core import costs, defragment
from coordinator.core import messages as m
from coordinator.core.explain import explain
from coordinator.core.model import JobClass, JobSpec
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.state import Options
from tests.core.training_fleet import Fleet

FOUR = "4xA100:80"
LONG = 100_000
SMALL = JobSpec(command=("train",), gpus=1)


def scattered(
    *gpus: str, options: Options | None = None, total: int = LONG, spec: JobSpec = SMALL
) -> Fleet:
    """Small jobs have run for twelve minutes, one on every second GPU of each node."""
    fleet = Fleet(*(gpus or (FOUR, FOUR)), options=options)
    count = sum(len(live.gpus) for live in fleet.state.nodes.values())
    small = [fleet.submit(spec, total) for _ in range(count)]
    fleet.tick_ms = 5_000
    fleet.run(720)
    fleet.tick_ms = 1_000
    for job_id in small[::2]:
        fleet.end(job_id)
    return fleet


def nodes_of(fleet: Fleet, job_id: int) -> list[str]:
    return [rank.node for rank in fleet.state.gang(fleet.job(job_id))]


def runs(fleet: Fleet) -> list[int]:
    return [job.id for job in fleet.state.jobs.values() if job.phase is JobPhase.ACTIVE]


def until_stopped(fleet: Fleet) -> None:
    """Time passes, and nobody obeys yet."""
    for _ in range(400):
        fleet.rig.now_ms += 500
        fleet.rig.handle(m.Tick())
        if fleet.stops():
            return
    raise AssertionError("nobody was asked to move")


@pytest.mark.long
def test_small_jobs_move_together_and_the_large_one_starts() -> None:
    fleet = scattered()
    before = {job_id: fleet.steps[f"{job_id}.1"] for job_id in runs(fleet)}
    large = fleet.submit(gpus=4)
    fleet.run(10)
    assert fleet.job(large).phase is JobPhase.ACTIVE
    assert nodes_of(fleet, large) == ["n1"]
    assert [nodes_of(fleet, job_id) for job_id in before] == [["n2"]] * 4
    assert len(fleet.stops()) == 2
    for job_id, steps in before.items():
        attempt = fleet.state.current(fleet.job(job_id))
        assert attempt is not None
        assert fleet.job(job_id).epoch == 1 or attempt.restored_step >= steps - 4, "from its save"
    fleet.run(1_200)
    assert len(fleet.stops()) == 2, "and that is all"


def test_each_is_told_why_with_numbers() -> None:
    fleet = scattered()
    large = fleet.submit(gpus=4)
    until_stopped(fleet)
    told = fleet.stops()[0]
    assert told.startswith(
        "moves to n2 to make room on n1 for job 9, which would else wait 2.9 days"
    )
    assert told.endswith("for 4 GPUs; a restart takes about 62 s here")
    sentence = explain(fleet.state, fleet.rig.now, fleet.job(large)).sentence
    assert "jobs 2 and 4 have to save and leave n1 first" in sentence
    assert "; makes room: jobs 2 and 4 move n1 -> n2, since it would else wait 2.9 days" in sentence


def test_what_was_promised_is_kept_by_node() -> None:
    """Who comes meanwhile takes neither what the large one gets nor where the small ones go."""
    fleet = scattered()
    large = fleet.submit(gpus=4)
    until_stopped(fleet)
    late = [fleet.submit() for _ in range(2)]
    fleet.run(10)
    assert fleet.job(large).phase is JobPhase.ACTIVE
    assert [fleet.job(job_id).phase for job_id in late] == [JobPhase.QUEUED] * 2
    assert sorted(runs(fleet)) == [2, 4, 6, 8, large]


@pytest.mark.long
def test_a_higher_class_waits_for_no_promise_and_everybody_ends_up_somewhere() -> None:
    fleet = scattered()
    large = fleet.submit(gpus=4)
    until_stopped(fleet)
    urgent = fleet.submit(gpus=2, job_class=JobClass.GUARANTEED)
    fleet.run(900)
    assert fleet.job(urgent).phase is JobPhase.ACTIVE
    assert fleet.job(large).phase is JobPhase.QUEUED
    assert len(runs(fleet)) == 5
    assert fleet.state.standing.promises == {}


def test_it_is_not_done_where_others_end_soon_anyway() -> None:
    """Two restarts cost two minutes of a GPU; four GPUs wait for twenty seconds."""
    fleet = scattered(total=296)
    fleet.submit(gpus=4)
    fleet.run(5)
    assert fleet.stops() == []


def test_who_has_waited_for_long_is_worth_it_where_nobody_says_when_he_ends() -> None:
    fleet = scattered(total=0)
    large = fleet.submit(gpus=4)
    fleet.run(20)
    assert fleet.stops() == [], "it has waited for 20 s, which comes to less than two restarts"
    fleet.run(180)
    assert fleet.job(large).phase is JobPhase.ACTIVE
    assert "which has waited 6" in fleet.stops()[0]


@pytest.mark.long
@pytest.mark.parametrize(
    "spec",
    [
        replace(SMALL, job_class=JobClass.GUARANTEED),
        replace(SMALL, shared_gpu_memory_bytes=60 * 10**9),
    ],
    ids=["of a higher class", "one of those that share a GPU"],
)
def test_these_are_not_moved(spec: JobSpec) -> None:
    fleet = scattered(spec=spec)
    fleet.submit(gpus=4)
    fleet.run(300)
    assert fleet.stops() == []


def test_who_has_nothing_to_go_on_from_is_not_moved() -> None:
    fleet = Fleet(FOUR, FOUR)
    fleet.tick_ms = 1_000
    small = [fleet.submit(total=LONG) for _ in range(8)]
    fleet.run(720, saving=False)
    for job_id in small[::2]:
        fleet.end(job_id)
    fleet.submit(gpus=4)
    fleet.run(300, saving=False)
    assert fleet.stops() == []


def test_who_has_just_begun_is_not_moved() -> None:
    fleet = Fleet(FOUR, FOUR)
    fleet.tick_ms = 1_000
    small = [fleet.submit(total=LONG) for _ in range(8)]
    fleet.run(30)
    for job_id in small[::2]:
        fleet.end(job_id)
    large = fleet.submit(gpus=4)
    fleet.run(300)
    assert fleet.stops() == []
    fleet.run(420)
    assert fleet.job(large).phase is JobPhase.ACTIVE


@pytest.mark.long
@pytest.mark.parametrize("moves_per_hour", [0, 1])
def test_no_more_are_moved_than_may_be_and_none_where_some_would_not_do(
    moves_per_hour: int,
) -> None:
    fleet = scattered(options=Options(moves_per_hour=moves_per_hour))
    fleet.submit(gpus=4)
    fleet.run(300)
    assert fleet.stops() == []


def test_nobody_moves_to_what_others_were_promised() -> None:
    """Room can be made for one of them, and for the second only on what the movers get."""
    fleet = scattered()
    first, second = fleet.submit(gpus=4), fleet.submit(gpus=4)
    fleet.run(300)
    assert fleet.job(first).phase is JobPhase.ACTIVE
    assert fleet.job(second).phase is JobPhase.QUEUED
    assert len(fleet.stops()) == 2


def test_a_small_job_that_waits_moves_nobody() -> None:
    """It fits wherever a GPU is free."""
    fleet = scattered("2xA100:80")
    fleet.submit()
    fleet.submit()
    fleet.run(300)
    assert fleet.stops() == []


@pytest.mark.long
def test_room_is_made_for_all_ranks_of_a_gang_or_for_none() -> None:
    pair = "2xA100:80"
    fleet = scattered(pair, pair, pair, pair)
    gang = fleet.submit(gpus=2, ranks=2)
    fleet.run(10)
    assert fleet.job(gang).phase is JobPhase.ACTIVE
    assert len(set(nodes_of(fleet, gang))) == 2
    assert len(fleet.stops()) == 2
    assert len(runs(fleet)) == 5
    fleet = scattered(pair, pair, pair, pair, options=Options(moves_per_hour=1))
    fleet.submit(gpus=2, ranks=2)
    fleet.run(300)
    assert fleet.stops() == []


def test_a_rank_of_a_gang_is_not_moved() -> None:
    fleet = Fleet(FOUR, FOUR)
    fleet.tick_ms = 1_000
    fleet.submit(gpus=1, ranks=2, total=LONG)
    filler = fleet.submit(gpus=2)
    fleet.submit(gpus=1, ranks=2, total=LONG)
    fleet.run(720)
    fleet.end(filler)
    fleet.submit(gpus=4)
    fleet.run(300)
    assert fleet.stops() == []


def test_copies_go_where_it_goes() -> None:
    fleet = scattered(FOUR, FOUR, FOUR)
    fleet.submit(gpus=4)
    until_stopped(fleet)
    stopping = [a for a in fleet.state.attempts.values() if a.phase is AttemptPhase.STOPPING]
    targets = [fleet.state.standing.promises[attempt.job_id].nodes for attempt in stopping]
    assert [(attempt.replica_node,) for attempt in stopping] == targets
    assert len(targets) == 2


def test_rooms_are_as_before_where_nothing_comes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that fails leaves no trace: whoever comes next in the queue sees all of the room."""
    fleet = scattered()
    monkeypatch.setattr(costs, "RESTART_S_DEFAULT", 1e9)  # nothing is worth that
    large = fleet.submit(gpus=4)
    fleet.run(0)
    seen: list[int] = []
    look = defragment._Round.look

    def watched(self: defragment._Round) -> None:
        before = [len(room.free) for room in self.rooms]
        look(self)
        assert [len(room.free) for room in self.rooms] == before
        assert not any(one.stopping for room in self.rooms for one in room.tenants.values())
        seen.append(self.sought)

    monkeypatch.setattr(defragment._Round, "look", watched)
    fleet.run(5)
    assert 1 in seen
    assert fleet.job(large).phase is JobPhase.QUEUED
    assert fleet.submit(JobSpec(command=("x",), gpus=2)) in runs(fleet)


@pytest.mark.long
def test_nobody_moves_for_a_job_that_may_wait() -> None:
    fleet = scattered()
    large = fleet.submit(gpus=4, flexible_ms=24 * 3_600_000)
    fleet.run(600)
    assert fleet.stops() == []
    assert fleet.job(large).phase is JobPhase.QUEUED
