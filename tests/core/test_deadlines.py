"""Jobs that want to have ended by some time: when they go first, and what people are told.

Problem: a deadline that is kept too early takes GPUs from others for nothing, one that is kept too
late is missed, and one that cannot be kept must be told before the night is over. So these drive
the real core through hours of training, with one job that has to be done by a time.
"""

from dataclasses import replace

import pytest

from coordinator.core import coruns, deadlines
from coordinator.core import messages as m
from coordinator.core.explain import explain
from coordinator.core.messages import Refusal, Reply, RequestBody, Submitted
from coordinator.core.model import JobClass, JobSpec
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.quotas import Quota
from coordinator.core.state import Options
from tests.core.coordinator_harness import GIGABYTE
from tests.core.training_fleet import Fleet, training

MEASURED = 60  # seconds of training after which the fleet knows how fast such a training is
SHARE_BYTES = 8 * GIGABYTE


def measured(*gpus: str, kept: float = 1.0) -> Fleet:
    """A fleet that has seen the training, and where one of a length that nobody knows runs."""
    fleet = Fleet(*gpus, kept=kept)
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


@pytest.mark.long
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


@pytest.mark.long
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


# --- jobs that share a GPU ------------------------------------------------------------------------


def light(steps: int, within_s: float = 0, fleet: Fleet | None = None) -> JobSpec:
    """With that deadline, if any, and a share of a GPU whatever comes of it."""
    deadline_unix_ms = by(fleet, within_s) if fleet is not None else 0
    return training(steps, shared_gpu_memory_bytes=SHARE_BYTES, deadline_unix_ms=deadline_unix_ms)


def automatic(steps: int, within_s: float = 0, fleet: Fleet | None = None) -> JobSpec:
    return replace(light(steps, within_s, fleet), share_automatic=True)


def beside_strangers_s(fleet: Fleet, steps: int) -> float:
    """How long a light job is taken to need for so many steps."""
    fleet.submit(light(steps), hold=True)
    job = fleet.job(fleet.state.last_job_id)
    return steps / coruns.kept_ratio_expected(fleet.state, job)


@pytest.mark.parametrize(("slack_s", "first"), [(150, "light"), (1_500, "short"), (-500, "short")])
def test_who_shares_goes_first_from_when_it_has_to_at_the_speed_of_who_shares(
    slack_s: int, first: str
) -> None:
    """It is in time alone in each case."""
    fleet = measured("1xH100")
    within_s = beside_strangers_s(fleet, 2_000) + slack_s
    assert within_s > 2_200
    short = fleet.submit(training(200))
    waits = fleet.submit(light(2_000, within_s, fleet))
    fleet.run(100)
    fleet.end(2)
    fleet.run(5)
    expected = {"light": waits, "short": short}[first]
    assert fleet.job(expected).phase is JobPhase.ACTIVE
    other = ({waits, short} - {expected}).pop()
    assert fleet.job(other).phase is JobPhase.QUEUED


def test_who_runs_is_stopped_for_one_who_shares_and_has_to_run_now() -> None:
    fleet = measured("1xH100")
    fleet.end(2)
    runs = fleet.submit(training(30_000))
    fleet.run(700)
    within_s = beside_strangers_s(fleet, 2_000) + 150
    late = fleet.submit(light(2_000, within_s, fleet))
    fleet.run(90)
    assert fleet.job(late).phase is JobPhase.ACTIVE
    assert fleet.job(runs).phase is JobPhase.QUEUED
    assert len(fleet.stops()) == 1
    assert f"gives way to job {late}, which has to run now to keep" in fleet.stops()[0]


def test_who_shares_is_told_by_which_speed_that_is_and_what_may_come_of_it() -> None:
    fleet = measured("1xH100")
    asked = answer(fleet, m.Submit(light(2_000, 2_500, fleet)))
    assert isinstance(asked, Submitted)
    assert "may be missed: beside others it is expected to need about 5" in asked.reason
    job_id = fleet.submit(light(2_000, 9_000, fleet))
    fleet.run(70)
    assert "; it goes first in its class from " in told(fleet, job_id)
    assert " of its speed, since it shares" in told(fleet, job_id)


def pair(
    within_s: float, *, kept: float, host: JobSpec, host_within_s: float = 0, before_s: int = 150
) -> tuple[Fleet, int]:
    """The host has a GPU for some time, and then beside it a job with a deadline; the other GPU has
    job 2 alone."""
    fleet = measured("1xH100", "1xH100", kept=kept)
    fleet.tick_ms = 5_000
    if host_within_s:
        host = replace(host, deadline_unix_ms=by(fleet, host_within_s))
    fleet.submit(host)
    fleet.run(before_s)
    guest = fleet.submit(automatic(2_000, within_s, fleet), 2_000)
    assert fleet.state.attempts[f"{guest}.1"].gpu_uuids == fleet.state.attempts["3.1"].gpu_uuids
    return fleet, guest


def test_company_leaves_when_it_would_cost_a_deadline_that_is_kept_alone() -> None:
    """At 0.75 it would need 2,667 s. Alone it has to be after 1,520 s, and then it is in time."""
    fleet, guest = pair(2_500, kept=0.75, host=automatic(20_000))
    fleet.run(1_400)
    assert fleet.stops() == []
    assert " after its deadline at " in told(fleet, guest)
    assert " with company, and in time if it begins to run alone at " in told(fleet, guest)
    fleet.run(200)
    assert len(fleet.stops()) == 1
    assert f"gives way to job {guest}, which has to run alone now to keep" in fleet.stops()[0]
    assert fleet.job(3).phase is JobPhase.QUEUED
    assert f"not beside job {guest} on n2: that one has to run alone to keep" in told(fleet, 3)
    fleet.run(840)
    assert fleet.steps[f"{guest}.1"] >= 2_000
    assert len(fleet.stops()) == 1


@pytest.mark.long
def test_company_that_has_left_does_not_come_back_where_another_type_is_faster() -> None:
    """Alone it needs 2,800 s on the A100, where it is, and 1,120 s on the H100, which is not to be
    had."""
    fleet = Fleet("1xH100", "1xA100:80", kept=0.75)
    fleet.tick_ms = 5_000
    fleet.submit(training(100))
    fleet.submit(training(100))
    fleet.run(300)
    for job_id in (1, 2):
        fleet.end(job_id)
    fleet.submit(training(20_000), job_class=JobClass.GUARANTEED)
    host = fleet.submit(automatic(20_000))
    fleet.run(150)
    guest = fleet.submit(automatic(1_120, 3_200, fleet), 1_120)
    fleet.run(3_100)
    assert len(fleet.stops()) == 1
    assert f"not beside job {guest} on n2: that one has to run alone to keep" in told(fleet, host)
    assert fleet.steps[f"{guest}.1"] >= 1_120


@pytest.mark.long
@pytest.mark.parametrize(
    ("within_s", "kept", "why"),
    [
        (2_900, 0.75, "with company it is in time"),
        (1_500, 0.75, "it is not in time alone"),
    ],
)
def test_company_does_not_leave_for_nothing(within_s: float, kept: float, why: str) -> None:
    fleet, _ = pair(within_s, kept=kept, host=automatic(20_000))
    fleet.run(round(within_s))
    assert fleet.stops() == [], why


def test_company_with_a_deadline_of_its_own_near_does_not_leave() -> None:
    """It would be back too late: a quarter of an hour before that it was not, when they met."""
    fleet, guest = pair(2_500, kept=0.75, host=automatic(20_000), host_within_s=21_100)
    fleet.run(1_700)
    assert guest in deadlines.late(fleet.state)
    assert fleet.stops() == []


@pytest.mark.parametrize("shares", [True, False])
def test_nobody_within_its_quota_leaves_for_one_in_a_hurry_who_is_beyond_his(shares: bool) -> None:
    """It would have its place back at once, and both had lost a restart."""
    fleet = Fleet("1xH100", kept=0.75, options=Options(projects={"own": Quota(48.0)}))
    for project in ("lent", "own"):
        fleet.submit(training(MEASURED), project=project)
        fleet.run(MEASURED)
        fleet.end(fleet.state.last_job_id)
    fleet.tick_ms = 5_000
    runs = fleet.submit(automatic(20_000) if shares else training(20_000), project="own")
    fleet.run(150 if shares else 700)
    within_s = 2_500 if shares else beside_strangers_s(fleet, 2_000) + 150
    spec = automatic(2_000, within_s, fleet) if shares else light(2_000, within_s, fleet)
    hurries = fleet.submit(spec, 2_000, project="lent")
    fleet.run(1_700 if shares else 90)
    assert fleet.stops() == []
    assert hurries in deadlines.late(fleet.state)
    assert fleet.job(runs).phase is JobPhase.ACTIVE


@pytest.mark.parametrize("asked", [True, False])
def test_company_that_stays_is_left_for_a_gpu_that_is_free(asked: bool) -> None:
    """Who asked to share whatever comes of it stays, and who has not run for its minimum."""
    host, before_s = (light(20_000), 700) if asked else (automatic(20_000), 150)
    fleet, guest = pair(2_160, kept=0.9, host=host, before_s=before_s)
    fleet.run(420)
    assert fleet.stops() == [], "there is no other GPU"
    assert " with company, and in time if it begins to run alone now" in told(fleet, guest)
    fleet.end(2)
    fleet.run(70)
    assert fleet.stops() == ["moves to where it has a GPU to itself, to keep its deadline"]
    assert fleet.state.attempts[f"{guest}.2"].node == "n1"
    assert fleet.state.attempts["3.1"].phase is AttemptPhase.RUNNING


def test_nobody_takes_the_gpu_meanwhile_for_which_company_is_left() -> None:
    fleet, guest = pair(2_160, kept=0.9, host=light(20_000), before_s=700)
    fleet.run(420)
    fleet.end(2)
    while fleet.state.attempts[f"{guest}.1"].phase is AttemptPhase.RUNNING:
        fleet.rig.now_ms += 5_000
        fleet.rig.handle(m.Tick())
    other = fleet.state.last_job_id + 1
    fleet.rig.handle(m.Request(1, m.Submit(training(100))))
    fleet.rig.handle(m.Decide())
    assert fleet.job(other).phase is JobPhase.QUEUED
    fleet.run(20)
    assert fleet.state.attempts[f"{guest}.2"].node == "n1"


@pytest.mark.long
@pytest.mark.parametrize(("left_steps", "parted"), [(30, False), (1_000, True)])
def test_who_ends_soon_does_not_leave_company_for_a_gpu_that_is_free(
    left_steps: int, parted: bool
) -> None:
    """At 0.9 of its speed it loses 3 s, and 111 s; a restart takes a minute."""
    fleet, _ = pair(100_000, kept=0.9, host=automatic(20_000), before_s=700)
    fleet.run(round((2_000 - left_steps) / 0.9))
    fleet.end(2)
    fleet.run(60)
    assert bool(fleet.stops()) is parted


def test_nobody_leaves_for_one_who_shares_whatever_comes_of_it() -> None:
    fleet = measured("1xH100", "1xH100", kept=0.75)
    fleet.tick_ms = 5_000
    fleet.submit(light(20_000))
    fleet.run(700)
    guest = fleet.submit(light(2_000, 2_500, fleet), 2_000)
    fleet.run(1_800)
    assert fleet.stops() == []
    assert "beside others: nobody leaves for it" in told(fleet, guest)


def test_so_long_from_now_is_counted_by_the_coordinators_clock() -> None:
    """Who asks has a clock that is a day ahead, and asks again when the answer was lost."""
    fleet = Fleet("1xH100")
    day_ahead = training(2_000, deadline_unix_ms=by(fleet, 86_400 + 3_600))
    body = m.Submit(day_ahead, "once", deadline_in_ms=3_600_000)
    wanted_unix_ms = by(fleet, 3_600)
    first = answer(fleet, body)
    assert isinstance(first, Submitted)
    fleet.rig.now_ms += 5_000
    again = answer(fleet, body)
    assert isinstance(again, Submitted)
    assert (again.job_id, again.reason) == (first.job_id, fleet.job(first.job_id).reason)
    assert fleet.job(first.job_id).spec.deadline_unix_ms == wanted_unix_ms
