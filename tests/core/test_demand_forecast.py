"""What the core asks of who forecasts, and what it makes of the answer.

Problem: a plan that goes by a forecast of an hour ago, or by one made under a wrong clock, switches
off what is needed now. So an old one says that it is old.
"""

from dataclasses import replace

from coordinator.core.demand_forecast import FRESH_MS, outlooks
from coordinator.core.demand_history import MINUTE_MS
from coordinator.core.demand_messages import AskedType, ForecastMade, MakeForecast, TypeForecast
from coordinator.core.messages import Tick
from coordinator.core.model import JobClass
from coordinator.core.state import Instant
from tests.core.training_fleet import A100, H100, Fleet

# A boot of nine minutes and one decision more; two hours off pay for a boot.
AHEAD_MIN = (10, 120)
SOON = tuple(float(n) for n in range(9))
LATER = tuple(float(n) for n in range(1, 10))


def fleet() -> Fleet:
    found = Fleet("2xH100", "4xA100")
    found.submit(gpus=2, gpu_types=("H100",), job_class=JobClass.GUARANTEED)
    found.submit(gpus=3, gpu_types=("A100",))
    found.submit(gpus=4, gpu_types=("A100",), job_class=JobClass.GUARANTEED)
    return found


def test_with_each_sample_a_forecast_is_asked_for() -> None:
    rig = fleet().rig
    rig.now_ms += MINUTE_MS
    (asked,) = (effect for effect in rig.handle(Tick()) if isinstance(effect, MakeForecast))
    assert asked.minute == rig.now.unix_ms // MINUTE_MS
    assert asked.types == (
        AskedType(A100, 7.0, *AHEAD_MIN),
        AskedType(H100, 2.0, *AHEAD_MIN),
    )
    assert not any(isinstance(effect, MakeForecast) for effect in rig.handle(Tick()))


def test_a_boot_is_as_many_minutes_as_it_lasts() -> None:
    here = fleet()
    here.state.options = replace(here.state.options, demand_minute_ms=30_000)
    here.rig.now_ms += 30_000
    effects = here.rig.handle(Tick())
    (asked,) = (effect for effect in effects if isinstance(effect, MakeForecast))
    assert [(one.soon_min, one.later_min) for one in asked.types] == [(20, 120)] * 2


def test_an_outlook_has_the_present_and_the_newest_forecast_with_its_age() -> None:
    here = fleet()
    rig = here.rig
    told = TypeForecast(A100, SOON, LATER, 0.94)
    before = outlooks(here.state, rig.now)
    assert [(o.gpu_type, o.running_gpus, o.queued_gpus, o.guaranteed_gpus) for o in before] == [
        (A100, 4, 3, 4),
        (H100, 2, 0, 2),
    ]
    assert all(o.stale and o.soon_gpus == () for o in before)
    rig.handle(ForecastMade(5, (told,)))
    rig.handle(ForecastMade(4, (replace(told, soon_gpus=LATER),)))  # out of turn
    first, second = outlooks(here.state, rig.now)
    assert (first.soon_gpus, first.later_gpus, first.coverage) == (SOON, LATER, 0.94)
    assert (first.stale, second.soon_gpus) == (False, ())
    rig.now_ms += FRESH_MS + 1
    assert all(o.stale for o in outlooks(here.state, rig.now))


def test_under_a_doubtful_clock_every_outlook_is_stale() -> None:
    here = fleet()
    rig = here.rig
    rig.handle(Tick())
    rig.handle(ForecastMade(5, (TypeForecast(A100, SOON, LATER),)))
    assert not outlooks(here.state, rig.now)[0].stale
    rig.core.handle(Instant(rig.now_ms + 250, rig.now.unix_ms + 7_200_000), Tick())
    assert all(o.stale for o in outlooks(here.state, rig.now))
