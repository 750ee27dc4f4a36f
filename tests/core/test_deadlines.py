"""Jobs that want to have ended by some time: when they go first, and what people are told.

Problem: a deadline that is kept too early takes GPUs from others for nothing, one that is kept too
late is missed, and one that cannot be kept must be told before the night is over. So these drive
the real core through hours of training, with one job that has to be done by a time.
"""

import pytest

from coordinator.core import deadlines
from coordinator.core import messages as m
from coordinator.core.explain import explain
from coordinator.core.messages import Refusal, Reply, RequestBody, Submitted
from coordinator.core.model import JobClass, JobSpec
from coordinator.core.phases import JobPhase
from coordinator.core.state import Options
from tests.core.training_fleet import Fleet, training

MEASURED = 60  # seconds of training after which the fleet knows how fast such a training is


def measured(*gpus: str) -> Fleet:
    """A fleet that has seen the training, and where one of a length that nobody knows runs."""
    fleet = Fleet(*gpus)
    fleet.tick_ms = 1_000
    first = fleet.submit(training(MEASURED))
    fleet.run(MEASURED)
    fleet.end(first)
    fleet.submit(name="filler")
    fleet.run(5)
    return fleet


def by(fleet: Fleet, seconds: float) -> int:
    return fleet.rig.now.unix_ms + round(seconds * 1_000)


def told(fleet: Fleet, job_id: int) -> str:
    return explain(fleet.state, fleet.rig.now, fleet.job(job_id)).sentence


def answer(fleet: Fleet, body: RequestBody) -> object:
    effects = fleet.rig.handle(m.Request(1, body))
    return next(effect.answer for effect in effects if isinstance(effect, Reply))


@pytest.mark.parametrize(
    ("within_s", "first"), [(0, "short"), (2_600, "short"), (2_130, "long"), (1_000, "short")]
)
def test_whose_latest_start_has_come_goes_first(within_s: int, first: str) -> None:
    """It needs 2,000 s, a minute of which may be lost by a restart; and it is looked a minute
    before. Without a deadline, with time, or when it is lost, the short one comes first."""
    fleet = measured("1xH100")
    deadline_unix_ms = by(fleet, within_s + 40) if within_s else 0
    long = fleet.submit(training(2_000, deadline_unix_ms=deadline_unix_ms))
    short = fleet.submit(training(200))
    fleet.run(100)
    fleet.end(2)
    fleet.run(5)
    expected = {"long": long, "short": short}[first]
    assert fleet.job(expected).phase is JobPhase.ACTIVE


def test_who_runs_is_stopped_for_it_and_told_why() -> None:
    fleet = measured("1xH100")
    fleet.end(2)
    runs = fleet.submit(training(3_000))
    fleet.run(700)
    without = fleet.submit(training(5_000))
    fleet.run(90)
    assert fleet.stops() == [], "that one is worth less"
    late = fleet.submit(training(5_000, deadline_unix_ms=by(fleet, 5_100)))
    fleet.run(90)
    assert fleet.job(late).phase is JobPhase.ACTIVE
    assert [fleet.job(one).phase for one in (runs, without)] == [JobPhase.QUEUED] * 2
    assert len(fleet.stops()) == 1
    assert fleet.stops()[0].startswith(
        f"gives way to job {late}, which has to run now to keep its deadline at "
    )


@pytest.mark.parametrize(
    ("gpus", "of_two"), [(2, (9_300, 9_000, 9_100, 9_200)), (4, (8_000, 9_000) * 4)]
)
def test_one_of_several_gpus_has_them_on_one_node(gpus: int, of_two: tuple[int, ...]) -> None:
    """Who is worth least is on the one node and on the other, so the decision would stop some on
    each; for a deadline all of one node go, whoever they are, and nobody else."""
    fleet = Fleet(f"{gpus}xH100", f"{gpus}xH100")
    fleet.tick_ms = 2_000
    for width in (1, gpus):
        fleet.submit(training(MEASURED, gpus=width))
        fleet.run(MEASURED)
        fleet.end(fleet.state.last_job_id)
    runs = [fleet.submit(training(steps)) for steps in of_two]
    fleet.run(700)
    late = fleet.submit(training(5_000, gpus=gpus, deadline_unix_ms=by(fleet, 5_600)))
    while late not in deadlines.late(fleet.state):
        fleet.run(30)
    fleet.run(90)
    assert fleet.job(late).phase is JobPhase.ACTIVE
    assert len(fleet.stops()) == gpus
    assert all("which has to run now" in why for why in fleet.stops())
    assert sum(fleet.job(one).phase is JobPhase.ACTIVE for one in runs) == gpus


def test_no_reservation_keeps_gpus_from_who_has_to_run_now() -> None:
    fleet = Fleet("2xH100", options=Options(reservation_wait_ms=60_000))
    fleet.tick_ms = 1_000
    for _ in range(2):
        first = fleet.submit(training(MEASURED))
        fleet.run(MEASURED)
        fleet.end(first)
    filler = fleet.submit(name="filler")
    large = fleet.submit(gpus=2)
    fleet.run(100)
    assert [kept.job_id for kept in fleet.state.reservations.values()] == [large]
    ordinary = fleet.submit(training(2_000))
    fleet.run(70)
    assert fleet.job(ordinary).phase is JobPhase.QUEUED, "the free GPU is reserved"
    late = fleet.submit(training(2_000, deadline_unix_ms=by(fleet, 2_130)))
    fleet.run(70)
    assert fleet.job(late).phase is JobPhase.ACTIVE
    assert fleet.job(filler).phase is JobPhase.ACTIVE
    assert fleet.stops() == []


def test_no_higher_class_is_stopped_for_a_deadline() -> None:
    fleet = measured("1xH100")
    fleet.end(2)
    fleet.submit(training(3_000, job_class=JobClass.GUARANTEED))
    fleet.run(700)
    fleet.submit(training(5_000, deadline_unix_ms=by(fleet, 5_100)))
    fleet.run(300)
    assert fleet.stops() == []


def test_who_needs_to_go_on_for_a_deadline_of_his_own_is_not_stopped_for_another() -> None:
    fleet = measured("1xH100")
    fleet.end(2)
    runs = fleet.submit(training(3_000, deadline_unix_ms=by(fleet, 3_000)))
    fleet.run(700)
    fleet.submit(training(5_000, deadline_unix_ms=by(fleet, 5_000)))
    fleet.run(300)
    assert fleet.job(runs).phase is JobPhase.ACTIVE
    assert fleet.stops() == []


def test_when_it_has_passed_it_is_as_any_other() -> None:
    fleet = measured("1xH100")
    long = fleet.submit(training(2_000, deadline_unix_ms=by(fleet, 300)))
    short = fleet.submit(training(200))
    fleet.run(100)
    assert "cannot be kept: it would end about" in told(fleet, long)
    fleet.run(300)
    assert "its deadline has passed 100 s ago, and it goes on as any other" in told(fleet, long)
    fleet.end(2)
    fleet.run(5)
    assert fleet.job(short).phase is JobPhase.ACTIVE


def test_each_is_told_from_when_it_goes_first() -> None:
    fleet = measured("1xH100")
    job_id = fleet.submit(training(2_000, deadline_unix_ms=by(fleet, 9_000)))
    assert "; its deadline is at " in told(fleet, job_id), "no decision yet"
    fleet.run(70)
    assert "; it goes first in its class from " in told(fleet, job_id)
    assert "for its deadline at " in told(fleet, job_id)
    close = fleet.submit(training(2_000, deadline_unix_ms=by(fleet, 2_100)))
    fleet.run(30)
    assert "; it goes first in its class, to keep its deadline at " in told(fleet, close)


def test_who_does_not_say_his_steps_is_told_that_nobody_knows() -> None:
    fleet = measured("1xH100")
    job_id = fleet.submit(gpus=1, deadline_unix_ms=by(fleet, 900))
    fleet.run(70)
    assert "nobody knows when it has to start for its deadline at " in told(fleet, job_id)
    assert deadlines.late(fleet.state) == {}


@pytest.mark.parametrize(("within_s", "side"), [(3_000, "before"), (1_500, "after")])
def test_who_runs_is_told_whether_it_will_be_kept(within_s: int, side: str) -> None:
    fleet = measured("2xH100")
    job_id = fleet.submit(training(2_000), 2_000, deadline_unix_ms=by(fleet, within_s))
    fleet.run(60)
    assert f" {side} its deadline at " in told(fleet, job_id)


def test_who_submits_one_that_cannot_be_kept_is_warned() -> None:
    fleet = measured("1xH100")
    vain = answer(fleet, m.Submit(training(2_000, deadline_unix_ms=by(fleet, 600))))
    assert isinstance(vain, Submitted)
    assert vain.reason.startswith("its deadline at ")
    assert vain.reason.endswith("cannot be kept: it needs about 33 min on H100, the best")
    kept = answer(fleet, m.Submit(training(2_000, deadline_unix_ms=by(fleet, 6_000))))
    assert isinstance(kept, Submitted)
    assert kept.reason == ""


def test_a_deadline_that_has_passed_is_refused() -> None:
    fleet = measured("1xH100")
    found = answer(
        fleet, m.Submit(JobSpec(command=("x",), gpus=1, deadline_unix_ms=by(fleet, -60)))
    )
    assert isinstance(found, Refusal)
    assert found.sentence == "the deadline has passed 60 s ago; give a time to come, or none"


@pytest.mark.parametrize(("within_s", "moved"), [(2_500, 0), (20_000, 1)])
def test_nobody_is_moved_to_make_room_who_has_to_go_on_for_a_deadline(
    within_s: int, moved: int
) -> None:
    fleet = Fleet("2xA100:80", "2xA100:80", slow=1.0)
    fleet.tick_ms = 5_000
    first = [fleet.submit(training(2_000, deadline_unix_ms=by(fleet, within_s))) for _ in range(4)]
    fleet.run(720)
    fleet.end(first[0])
    fleet.end(first[2])
    fleet.submit(gpus=2)
    fleet.run(300)
    assert len(fleet.stops()) == moved


def test_nobody_is_stopped_for_a_deadline_that_is_lost() -> None:
    fleet = measured("1xH100")
    fleet.end(2)
    fleet.submit(training(3_000))
    fleet.run(700)
    fleet.submit(training(50_000, deadline_unix_ms=by(fleet, 9_000)))
    fleet.run(120)
    assert fleet.stops() == []


def test_who_has_lost_his_deadline_gives_way_to_who_can_keep_one() -> None:
    fleet = measured("1xH100")
    fleet.end(2)
    lost = fleet.submit(training(100_000, deadline_unix_ms=by(fleet, 32_400)), 100_000)
    fleet.run(700)
    kept = fleet.submit(training(2_000, deadline_unix_ms=by(fleet, 2_150)), 2_000)
    fleet.run(120)
    assert fleet.job(kept).phase is JobPhase.ACTIVE
    assert fleet.job(lost).phase is JobPhase.QUEUED


@pytest.mark.parametrize("slack_s", [300, 400, 600])
def test_who_could_not_be_back_in_time_is_not_stopped_for_an_ordinary_job(slack_s: int) -> None:
    fleet = measured("1xH100")
    fleet.end(2)
    runs = training(5_000, deadline_unix_ms=by(fleet, 5_000 + slack_s))
    job_id = fleet.submit(runs, 5_000)
    fleet.run(700)
    fleet.submit(training(1_500), 1_500)
    fleet.run(300)
    assert fleet.job(job_id).phase is JobPhase.ACTIVE
    assert fleet.stops() == []


def test_who_has_to_run_now_is_not_told_that_he_may_wait() -> None:
    fleet = measured("1xH100")
    asks = training(2_000, flexible_ms=36_000_000, deadline_unix_ms=by(fleet, 2_100))
    job_id = fleet.submit(asks)
    fleet.run(30)
    assert "to keep its deadline" in told(fleet, job_id)
    assert "it may wait for" not in told(fleet, job_id)
