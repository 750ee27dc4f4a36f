"""How claims on room bear one another: reservations, promises of moves, and projects' quotas.

Problem: each keeps room for somebody by rules of its own, and each has its tests. What breaks is
what nobody thought of: a job that has two of them, or two jobs with one each on the same GPUs.
"""

from dataclasses import replace
from random import Random

import pytest

from coordinator.core import messages as m
from coordinator.core.model import GpuFacts, JobClass, JobSpec
from coordinator.core.options import Options
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.quotas import Quota
from tests.core.coordinator_harness import gpus_of
from tests.core.training_fleet import A100, H100, HOST, Fleet, training

WAIT_MS = Options().reservation_wait_ms


@pytest.mark.long
def test_a_job_that_was_promised_a_type_may_be_the_next_for_a_reservation() -> None:
    """Safety: who is counted anywhere is placed anywhere."""
    fleet = Fleet("2xH100", "2xA100:80")
    for steps in (50_000, 60_000):
        fleet.submit(training(steps, gpus=2), total=50_000)
    fleet.run(10)
    short = fleet.submit(training(900, gpus=2), total=900)
    fleet.run(WAIT_MS // 1_000 + 60)
    assert fleet.type_of(short) == H100


@pytest.mark.long
def test_nobody_is_moved_to_what_is_reserved_for_somebody_else() -> None:
    """Liveness: else it is stopped, cannot go there, and comes back, again and again."""
    fleet = Fleet("2xH100", "1xA100:80")
    first = fleet.submit(name="first")
    fleet.submit(name="first")  # for how long nobody knows
    large = fleet.submit(gpus=2, gpu_types=("H100",))
    moved = fleet.submit(name="second", total=100_000)
    fleet.run(WAIT_MS // 1_000 + 300)
    fleet.end(first)
    assert fleet.state.reservations
    fleet.run(1_200)
    assert fleet.type_of(moved) == A100
    assert fleet.job(moved).epoch == 1
    assert fleet.job(large).phase is JobPhase.QUEUED


def test_a_small_job_that_was_there_before_does_not_starve_behind_large_ones() -> None:
    fleet = Fleet("8xA100:80")
    fleet.tick_ms = 5_000
    running = fleet.submit(gpus=8)
    small = fleet.submit(gpus=1)
    fleet.submit(gpus=8)
    for _ in range(3):
        fleet.submit(gpus=8)
        fleet.run(1_200)
        if fleet.job(running).phase is JobPhase.ACTIVE:
            fleet.end(running)
            fleet.run(10)
        if fleet.job(small).phase is JobPhase.ACTIVE:
            break
        running = next(job.id for job in fleet.state.jobs.values() if job.phase is JobPhase.ACTIVE)
    assert fleet.job(small).phase is JobPhase.ACTIVE


def test_who_is_within_a_quota_does_not_wait_for_what_is_reserved_for_who_is_beyond_it() -> None:
    fleet = Fleet("8xA100:80", options=Options(projects={"a": Quota(gpu_hours=400.0)}))
    fleet.tick_ms = 2_000
    fleet.submit(gpus=8, project="c")
    fleet.submit(gpus=8, project="b")
    fleet.run(WAIT_MS // 1_000 + 20)
    assert fleet.state.reservations
    entitled = fleet.submit(gpus=4, project="a")
    fleet.run(40)
    assert fleet.job(entitled).phase is JobPhase.ACTIVE


@pytest.mark.long
def test_who_could_not_have_room_at_all_takes_no_turn_from_who_could() -> None:
    """Three gangs need a node that is closed; another large job needs none of it."""
    chance = Random(1)
    fleet = Fleet("4xA100:80", "4xA100:80", "4xA100:80")
    fleet.tick_ms = 5_000
    for _ in range(12):
        fleet.submit()
    for _ in range(3):
        fleet.submit(gpus=4, ranks=3)
    fleet.rig.handle(m.Request(1, m.CordonNode("n3")))
    large = fleet.submit(JobSpec(command=("train",), gpus=4))
    for _ in range(60):
        while sum(1 for n in fleet.state.queued if fleet.job(n).spec.gpus == 1) < 4:
            fleet.submit()
        fleet.run(60)
        if fleet.job(large).phase is JobPhase.ACTIVE:
            return
        small = [job.id for job in fleet.state.jobs.values() if job.phase is JobPhase.ACTIVE]
        fleet.end(chance.choice(small))
    raise AssertionError(f"it waits after an hour: {fleet.state.waits[large]}")


def fail(fleet: Fleet, job_id: int) -> None:
    """The node of its first rank cannot start it, or it ends badly; the others are killed."""
    first, *others = fleet.state.gang(fleet.job(job_id))
    runs = first.phase is AttemptPhase.RUNNING
    fleet.say(first.id, m.AttemptExited(1) if runs else m.AttemptRefused("the disk is full"))
    for rank in others:
        fleet.say(rank.id, m.AttemptExited(None, 9))


def displacing() -> tuple[Fleet, list[int], int]:
    """Two small jobs have left for a gang, which has just begun."""
    fleet = Fleet("2xA100:80")
    small = [fleet.submit(job_class=JobClass.SPARE) for _ in range(2)]
    fleet.run(30)
    gang = fleet.submit(gpus=1, ranks=2)
    fleet.run(2)
    assert fleet.job(gang).phase is JobPhase.ACTIVE
    return fleet, small, gang


def pass_time(fleet: Fleet) -> None:
    """Half a second in which nobody does what he is told."""
    fleet.rig.now_ms += 500
    fleet.train(0.5, save=False)
    fleet.rig.handle(m.Tick())


def test_what_others_left_for_a_gang_is_kept_when_it_fails_at_its_start() -> None:
    fleet, small, gang = displacing()
    for tries in range(2, 7):
        fail(fleet, gang)
        while fleet.job(gang).phase is not JobPhase.ACTIVE:
            pass_time(fleet)
            assert [fleet.job(one).phase for one in small] == [JobPhase.QUEUED] * 2
        assert fleet.job(gang).epoch == tries
    assert "tried again after 16 s, and what others left for it is kept" in str(
        fleet.rig.disk.events
    )


def test_it_is_kept_for_a_while_and_not_for_ever() -> None:
    fleet, small, gang = displacing()
    began_ms = fleet.rig.now_ms
    while all(fleet.job(one).phase is JobPhase.QUEUED for one in small):
        if fleet.job(gang).phase is JobPhase.ACTIVE:
            fail(fleet, gang)
        pass_time(fleet)
        assert fleet.rig.now_ms - began_ms < 900_000
    assert fleet.rig.now_ms - began_ms > 500_000


def refusing(fleet: Fleet, **asks: object) -> int:
    """A job of two GPUs comes that no node can start."""
    fleet.tick_ms = 1_000
    spec = replace(JobSpec(command=("train",), gpus=2), **asks)  # type: ignore[arg-type]
    fleet.rig.handle(m.Request(1, m.Submit(spec)))
    return fleet.state.last_job_id


def pass_second(fleet: Fleet, refused: int) -> None:
    """In which it is refused if it is tried, and everybody else does what he is told."""
    for attempt in list(fleet.state.attempts.values()):
        if attempt.job_id == refused and attempt.phase is AttemptPhase.ASSIGNED:
            fleet.say(attempt.id, m.AttemptRefused("the disk is full"))
    fleet.obey()
    fleet.rig.now_ms += 1_000
    fleet.train(1.0, save=False)
    fleet.rig.handle(m.Tick())


@pytest.mark.long
def test_who_cannot_start_at_all_has_one_claim_and_no_more() -> None:
    """Else each job that is stopped for it again gives it another ten minutes of idle GPUs."""
    fleet = Fleet("2xA100:80")
    small = [fleet.submit(job_class=JobClass.SPARE) for _ in range(2)]
    fleet.run(30)
    large = refusing(fleet)
    idle_s = 0
    for _ in range(3_600):
        pass_second(fleet, large)
        idle_s += all(fleet.job(one).phase is JobPhase.QUEUED for one in small)
    assert 500 < idle_s < 1_200


def test_what_is_kept_for_who_is_beyond_a_quota_goes_first_to_who_is_within_his() -> None:
    """Of the same class: and who waits beside it is told for whom it is kept."""
    fleet = Fleet("2xA100:80", options=Options(projects={"a": Quota(gpu_hours=48.0)}))
    for _ in range(2):
        fleet.submit(job_class=JobClass.SPARE)
    fleet.run(30)
    beyond = refusing(fleet, project="b")
    for _ in range(60):
        pass_second(fleet, beyond)
    other = fleet.submit(gpus=2, project="b")
    assert fleet.job(other).phase is JobPhase.QUEUED
    assert f"2 GPUs on n1 are kept for job {beyond}" in fleet.state.waits[other]
    within = fleet.submit(gpus=2, project="a")
    for _ in range(10):
        pass_second(fleet, beyond)
    assert fleet.job(within).phase is JobPhase.ACTIVE


def test_who_took_nothing_from_anybody_keeps_nothing() -> None:
    fleet = Fleet("2xA100:80")
    gang = fleet.submit(gpus=1, ranks=2)
    fleet.obey()
    fail(fleet, gang)
    fail(fleet, gang)
    assert fleet.job(gang).phase is JobPhase.QUEUED
    small = fleet.submit(job_class=JobClass.SPARE)
    assert fleet.job(small).phase is JobPhase.ACTIVE


def say_hello(fleet: Fleet, session: int, node: str, gpus: tuple[GpuFacts, ...]) -> None:
    """Its agent is back, with what it had and these GPUs."""
    held = tuple(
        m.HeldAttempt(one.id, one.gpu_uuids)
        for one in fleet.state.attempts.values()
        if one.node == node and one.ended_unix_ms is None
    )
    live = fleet.state.nodes.get(node)
    known = 0 if live is None else live.node.acknowledged
    hello = m.Hello(node, f"{node}-1", f"{node}:1", HOST, gpus, held, (), known)
    fleet.rig.handle(m.FromAgent(session, hello))


def test_nothing_is_kept_of_a_gpu_that_is_gone_from_its_node() -> None:
    """It is gone before a restart of the coordinator; the job is then out of reach, others are
    stopped for it elsewhere, and it comes back only to fail."""
    fleet = Fleet("1xA100:80")
    fleet.tick_ms = 1_000
    job_id = fleet.submit(training(9_000))
    fleet.run(30, saving=False)
    say_hello(fleet, 2, "n2", gpus_of("n2", "1xA100:80"))
    fleet.submit(job_class=JobClass.SPARE)
    fleet.run(30, saving=False)
    say_hello(fleet, 10, "n1", ())
    fleet.rig.restart()
    say_hello(fleet, 11, "n2", gpus_of("n2", "1xA100:80"))
    spare = fleet.state.nodes["n2"]
    while not fleet.stops():
        fleet.rig.now_ms += 1_000
        fleet.beats += 1
        held = tuple(
            m.HeldAttempt(one, fleet.state.attempts[one].gpu_uuids) for one in spare.attempts
        )
        fleet.rig.handle(m.FromAgent(11, m.Heartbeat(fleet.beats, None, (), held, ())))
        fleet.rig.handle(m.Tick())
    say_hello(fleet, 12, "n1", ())
    fleet.say("1.1", m.AttemptExited(None, 9))
    assert fleet.job(job_id).phase is JobPhase.QUEUED
    assert job_id not in fleet.state.standing.promises
