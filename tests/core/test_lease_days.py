"""Once a day, and not twice: what is worth leasing is asked for, told and handed on.

Problem: numbers that somebody signs a month's lease by must come each day, must not come again
because a coordinator was restarted or a clock went astray, and must be those that the same person
would be told by `baton leases`.
"""

from collections.abc import Iterable
from dataclasses import replace

from coordinator.core import bills
from coordinator.core.cost_requests import CostPage, GetCosts
from coordinator.core.demand_history import MINUTE_MS, SETTLE_MS
from coordinator.core.lease_advice import NOTHING, advise
from coordinator.core.lease_messages import LeasesMade, MakeLeases, PublishLeases, PutLeaseDay
from coordinator.core.messages import Effect, Log, Reply, Request, Tick
from coordinator.core.model import Attempt, Job, JobSpec
from coordinator.core.options import Options
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.tariffs import Prices, Tariff
from tests.core.coordinator_harness import UNIX_MS_AT_START, Rig
from tests.core.training_fleet import Fleet

DAY_MS = bills.MS_PER_DAY
PRICED = Options(prices=Prices({"H100": Tariff(lease_usd=1.0, burst_usd=2.0)}))
HELD_GPUS = 4


def rig_of(
    days: float, options: Options = PRICED, gpu_type: str = "H100", flexible_ms: int = 0
) -> Rig:
    """Four GPUs were held for so many days, on a node that is known."""
    fleet = Fleet(f"8x{gpu_type}")
    disk = fleet.rig.disk
    (node,) = disk.nodes.values()
    begun_ms = UNIX_MS_AT_START - round(days * DAY_MS)
    spec = JobSpec(command=("x",), gpus=HELD_GPUS, flexible_ms=flexible_ms)
    job = Job(1, spec, JobPhase.ACTIVE, begun_ms, epoch=1)
    uuids = tuple(gpu.uuid for gpu in node.gpus[:HELD_GPUS])
    attempt = Attempt(1, 1, node.id, uuids, AttemptPhase.RUNNING, begun_ms, begun_ms)
    rig = Rig(options)
    rig.disk.nodes, rig.disk.jobs, rig.disk.last_job_id = {node.id: node}, {1: job}, 1
    rig.disk.attempts = {attempt.id: attempt}
    rig.restart()
    return rig


def asked(effects: Iterable[Effect]) -> list[MakeLeases]:
    return [effect for effect in effects if isinstance(effect, MakeLeases)]


def said(effects: Iterable[Effect], event: str) -> list[dict[str, object]]:
    return [
        dict(effect.fields)
        for effect in effects
        if isinstance(effect, Log) and effect.event == event
    ]


def answered(rig: Rig) -> list[Effect]:
    """A minute later, with the answer where one was asked for."""
    rig.now_ms += MINUTE_MS
    effects = rig.handle(Tick())
    for each in asked(effects):
        effects = effects + rig.handle(advise(each))
    return effects


def test_a_day_is_asked_for_once_told_and_handed_on() -> None:
    rig = rig_of(days=20)
    effects = answered(rig)
    (question,) = asked(effects)
    (told,) = said(effects, "leases.recommended")
    assert (told["gpu_type"], told["level_gpus"]) == ("H100", HELD_GPUS)
    (published,) = (effect for effect in effects if isinstance(effect, PublishLeases))
    assert [each.sentence for each in published.found] == [told["reason"]]
    assert PutLeaseDay(question.day) in effects
    for _ in range(3):
        assert not asked(answered(rig))
    rig.now_ms += DAY_MS
    assert [each.day for each in asked(answered(rig))] == [question.day + 1]


def test_not_twice_while_the_answer_is_being_made() -> None:
    rig = rig_of(days=20)
    rig.now_ms += MINUTE_MS
    assert asked(rig.handle(Tick()))
    assert not asked(answered(rig))


def test_a_restart_makes_no_day_twice_and_a_crash_loses_none() -> None:
    """The crash comes before anything of the answer is durable."""
    rig = rig_of(days=20)
    rig.now_ms += MINUTE_MS
    (question,) = asked(rig.handle(Tick()))
    rig.crash_on(advise(question))
    assert len(asked(answered(rig))) == 1
    rig.restart()
    assert not asked(answered(rig))
    rig.now_ms += DAY_MS
    assert len(asked(answered(rig))) == 1


def test_an_answer_that_comes_again_says_nothing() -> None:
    rig = rig_of(days=20)
    (question,) = asked(answered(rig))
    assert rig.handle(advise(question)) == []


def test_a_clock_that_jumps_days_ahead_and_back_makes_no_day_twice() -> None:
    """While it is doubted there is no sample and no day; once it is believed the wrong day is made,
    and when it is set right today's stays made, also over a restart."""
    rig = rig_of(days=20)
    days = [each.day for each in asked(answered(rig))]
    right_ms = rig.now_ms
    for jump_ms in (5 * DAY_MS, -5 * DAY_MS):
        shifted = Jumping(rig, jump_ms)
        assert not asked(shifted.minute()), "it is doubted at first"
        for _ in range(SETTLE_MS // MINUTE_MS + 1):
            days += [each.day for each in asked(shifted.minute())]
        rig = shifted.rig
    assert days == [days[0], days[0] + 5]
    assert rig.now_ms > right_ms
    rig.restart()
    for _ in range(3):
        assert not asked(answered(rig))


class Jumping:
    """Wall time is off by so much from now on, while the monotonic clock goes on."""

    def __init__(self, rig: Rig, jump_ms: int) -> None:
        self.rig = rig
        self._jump_ms = max(0, jump_ms)  # the second jump takes back the first

    def minute(self) -> list[Effect]:
        self.rig.now_ms += MINUTE_MS
        now = replace(self.rig.now, unix_ms=self.rig.now.unix_ms + self._jump_ms)
        effects = self._handled(now, Tick())
        for each in asked(effects):
            effects = effects + self._handled(now, advise(each))
        return effects

    def _handled(self, now: object, event: Tick | LeasesMade) -> list[Effect]:
        effects = self.rig.core.handle(now, event)  # type: ignore[arg-type]
        for effect in effects:
            if isinstance(effect, PutLeaseDay):
                self.rig.disk.write(effect)
        return effects


def test_too_little_history_is_said_once_and_nothing_is_handed_on() -> None:
    rig = rig_of(days=3)
    effects = answered(rig)
    (none,) = said(effects, "leases.none")
    assert none["reason"] == "H100: 3.0 days of demand are known, and 7 are needed"
    assert not said(effects, "leases.recommended")
    assert not [effect for effect in effects if isinstance(effect, PublishLeases)]
    rig.now_ms += DAY_MS
    later = answered(rig)
    assert asked(later)
    assert not said(later, "leases.none"), "its number has changed, its reason has not"
    rig.now_ms += 4 * DAY_MS
    assert said(answered(rig), "leases.recommended")


def test_a_type_without_a_price_is_named_beside_one_that_has() -> None:
    rig = rig_of(days=20, options=Options(), gpu_type="L40S")
    (none,) = said(answered(rig), "leases.none")
    assert none["reason"] == "L40S: no price by the month and by the hour is known"


def test_before_a_whole_hour_nothing_is_known() -> None:
    (none,) = said(answered(rig_of(days=0)), "leases.none")
    assert none["reason"] == NOTHING


def test_before_anything_has_run_nobody_is_asked() -> None:
    rig = Fleet("8xH100").rig
    rig.now_ms += MINUTE_MS
    assert not asked(rig.handle(Tick()))


def test_what_is_handed_to_the_thread_does_not_change_any_more() -> None:
    rig = rig_of(days=20)
    (question,) = asked(answered(rig))
    first = advise(question)
    state = rig.core.state
    state.attempts.clear()
    state.job_attempts[1].clear()
    state.nodes.clear()
    assert advise(question) == first


def test_one_that_runs_for_weeks_is_not_all_that_was_wanted_in_them() -> None:
    """Others of that time are forgotten: less than a week is known, and nothing is recommended."""
    rig = rig_of(days=40)
    known = rig.disk.jobs[1]
    ended_ms = UNIX_MS_AT_START - 5 * DAY_MS
    rig.disk.jobs[3] = replace(known, id=3, phase=JobPhase.SUCCEEDED, ended_unix_ms=ended_ms)
    rig.disk.last_job_id = 3  # and 2 is not kept any more
    rig.restart()
    (make,) = asked(rig.handle(Tick()))
    assert make.books.past is not None
    assert make.books.past.since_unix_ms == ended_ms
    made = advise(make)
    assert made.found == ()
    (none,) = made.unadvised
    assert none.why == "history"
    body = GetCosts(make.unix_ms - 30 * DAY_MS, make.unix_ms)
    (page,) = (one.answer for one in rig.handle(Request(1, body)) if isinstance(one, Reply))
    assert isinstance(page, CostPage)
    assert page.kept_since_unix_ms == ended_ms
