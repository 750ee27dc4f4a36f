"""Hours whose attempts are forgotten, out of the history of demand.

Problem: a fleet that ends thousands of jobs a day keeps the attempts of a few days, and a month's
lease is signed by what was wanted for weeks. What was sampled meanwhile is still there; it must
come in once, as what it is, and nothing may be made up where nobody looked.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from coordinator.core import bills, past_demand
from coordinator.core.cost_requests import CostPage, GetCosts, Grouping
from coordinator.core.demand_history import (
    GPU_TYPES_MAX,
    OTHER,
    DemandRow,
    PutDemandSeries,
    Series,
)
from coordinator.core.lease_advice import PAST_DAYS, advise
from coordinator.core.lease_messages import PastDemand
from coordinator.core.messages import Reply, Request, Tick
from coordinator.core.model import AttemptTimes
from coordinator.core.phases import JobPhase
from coordinator.core.state import Instant
from tests.core import test_bills
from tests.core.coordinator_harness import UNIX_MS_AT_START, Rig
from tests.core.test_lease_days import DAY_MS, HELD_GPUS, PRICED, asked, rig_of

H_MS = bills.MS_PER_H
NOW_H = UNIX_MS_AT_START // H_MS
KEPT_DAYS = 2
# Of the last two days those that are whole and begin after the first end that is kept.
KEPT_HOURS = 24 * KEPT_DAYS - 1
PAST_HOURS = 24 * PAST_DAYS - KEPT_HOURS
DAY_H = 24


def busy(rig: Rig, wanted: Mapping[int, float], gpu_type: str = "H100") -> Rig:
    """Of jobs that ended more than two days ago all but one are forgotten; `wanted` was, by hours
    ago."""
    ended_ms = UNIX_MS_AT_START - KEPT_DAYS * DAY_MS
    jobs = rig.disk.jobs
    jobs[3] = replace(jobs[1], id=3, phase=JobPhase.SUCCEEDED, ended_unix_ms=ended_ms)
    rig.disk.last_job_id = 3  # and 2 is not kept any more
    rig.disk.series[0] = PutDemandSeries(0, Series(gpu_type, "demo", "standard"))
    for ago_h, gpus in wanted.items():
        row = DemandRow(60, NOW_H - ago_h, (0,), (gpus,)) if gpus else DemandRow(60, NOW_H - ago_h)
        rig.disk.demand[60, row.step] = row
    rig.restart()
    return rig


def hours(begin_ago_d: int, gpus: float, end_ago_d: int = 0) -> dict[int, float]:
    return dict.fromkeys(range(DAY_H * end_ago_d + 1, DAY_H * begin_ago_d + 1), gpus)


def past_of(rig: Rig, end_unix_ms: int = UNIX_MS_AT_START) -> PastDemand | None:
    return past_demand.read(rig.core.state, end_unix_ms)


def test_what_was_sampled_stands_for_what_is_forgotten() -> None:
    """Outages stay unknown, and the hours of which all attempts are kept are theirs. The job that
    has run for weeks is not all that was wanted, and 7 GPUs would be wrong later."""
    sampled = hours(40, 1.0) | hours(KEPT_DAYS, 7.0)
    for ago_h in range(200, 248):
        del sampled[ago_h]
    rig = busy(rig_of(days=40), sampled)
    (make,) = asked(rig.handle(Tick()))
    (found,) = advise(make).found
    assert found.level_gpus == 1, "for most of the time one was wanted"
    assert (found.quantiles[0], found.quantiles[-1]) == (1.0, HELD_GPUS)
    assert (found.known_hours, found.sampled_hours) == (KEPT_HOURS + PAST_HOURS - 48,
                                                        PAST_HOURS - 48)  # fmt: skip
    told = "649 of the 696 hours of demand are known from samples, the others from attempts"
    assert found.sentence.endswith(f"; {told}")


def test_a_question_has_the_same_hours() -> None:
    rig = busy(rig_of(days=40), hours(40, 1.0))
    body = GetCosts(UNIX_MS_AT_START - 5 * DAY_MS, UNIX_MS_AT_START, Grouping.GPU_TYPE)
    (page,) = (one.answer for one in rig.handle(Request(1, body)) if isinstance(one, Reply))
    assert isinstance(page, CostPage)
    assert page.kept_since_unix_ms == UNIX_MS_AT_START - KEPT_DAYS * DAY_MS
    (use,) = page.uses
    assert use.past_gpus == (1.0,) * PAST_HOURS
    of_one = replace(body, project=rig.core.state.jobs[1].spec.project)
    (page,) = (one.answer for one in rig.handle(Request(1, of_one)) if isinstance(one, Reply))
    assert isinstance(page, CostPage)
    assert [each.past_gpus for each in page.uses] == [()], "leases are not one project's"


def test_of_a_span_that_is_over_the_hours_before_its_end() -> None:
    """Also where all of it is forgotten."""
    rig = busy(rig_of(days=40), hours(10, 1.0, 4) | hours(4, 2.0))
    past = past_of(rig, UNIX_MS_AT_START - 3 * DAY_MS)
    assert past is not None
    assert past.gpus["H100"] == (1.0,) * 6 * DAY_H + (2.0,) * DAY_H


def test_while_nothing_is_forgotten_samples_say_nothing() -> None:
    rig = busy(rig_of(days=3), hours(30, 1.0))
    del rig.disk.jobs[3]
    rig.disk.last_job_id = 1
    rig.restart()
    assert past_of(rig) is None


def test_before_anything_was_wanted_is_no_demand_of_none() -> None:
    """A fleet that is new; a week in which nothing was wanted later is one."""
    rig = busy(rig_of(days=40), hours(30, 0.0) | hours(20, 1.0) | hours(10, 0.0))
    past = past_of(rig)
    assert past is not None
    assert past.gpus["H100"] == (1.0,) * 240 + (0.0,) * (240 - KEPT_HOURS)


def test_a_type_that_has_no_series_of_its_own_is_not_known() -> None:
    """It is one too many, and among the others: none of it would be too little."""
    rig = busy(rig_of(days=40), hours(30, 1.0), gpu_type=OTHER)
    for number in range(1, GPU_TYPES_MAX + 1):
        series = Series(f"T{number}", "demo", "standard")
        rig.disk.series[number] = PutDemandSeries(number, series)
    rig.restart()
    (make,) = asked(rig.handle(Tick()))
    made = advise(make)
    assert (made.found, [none.why for none in made.unadvised]) == ((), ["history"])
    assert make.books.past is not None
    assert list(make.books.past.gpus) == sorted(f"T{n}" for n in range(1, GPU_TYPES_MAX + 1))


def test_where_a_minute_is_shorter_an_hour_is_none() -> None:
    rig = busy(rig_of(days=40, options=replace(PRICED, demand_minute_ms=250)), hours(30, 1.0))
    past = past_of(rig)
    assert past is not None
    assert past.gpus == {}


@pytest.mark.parametrize(("may_wait_h", "part"), [(0, 1.0), (24, 0.4), (3, 0.7)])
def test_who_waits_by_his_own_wish_wants_no_more_by_it(may_wait_h: int, part: float) -> None:
    """Samples count him while he waits. Of what they had counted of the attempts that are kept,
    so much was wanted: six hours in the queue and four on a GPU, and one that is forgotten."""
    begin = test_bills.BEGIN
    ran = test_bills.attempt(1, 1, "own-1", 106, 110)
    ran = replace(ran, times=AttemptTimes(queued_unix_ms=begin + 100 * H_MS))
    older = test_bills.attempt(2, 1, "own-1", 50, 90)
    jobs = [test_bills.job(1, flexible_ms=may_wait_h * H_MS), test_bills.job(2)]
    state = test_bills.state_of(jobs, [ran, older])
    past = PastDemand(begin + 100 * H_MS, {"H100": (10.0, math.nan)})
    body = GetCosts(begin, begin + 120 * H_MS, Grouping.GPU_TYPE)
    page = bills.answer(state, Instant(0, begin + 120 * H_MS), body, past)
    assert isinstance(page, CostPage)
    (use,) = page.uses
    assert use.past_gpus[0] == pytest.approx(10.0 * part)
    assert math.isnan(use.past_gpus[1])
    assert use.flexible_ratio == (1.0 if may_wait_h else 0.0), "of those whose attempts are kept"
