"""What people ask of the history of demand.

Problem: a series of two years by the minute is a million numbers, and whoever asks for a GPU type
that nobody ever wanted gets a line of zeros that looks like an answer. So an answer is one
resolution, bounded by its ring, and a name that is not known is refused with those that are.
"""

from coordinator.core import demand_samples, holds
from coordinator.core.demand_history import KEPT_STEPS, DemandHistory, Series, Still, matches
from coordinator.core.demand_messages import DemandSeries, GetDemand
from coordinator.core.held_ahead import held_ahead, still_wanted
from coordinator.core.sentences import some
from coordinator.core.state import Instant, State

PERIOD_MIN_DEFAULT = 10
NAMES_SHOWN_MAX = 20
# Of a large fleet each costs milliseconds of the loop; and after a week nobody knows anything.
AHEAD_COUNT_MAX, AHEAD_MIN_MAX = 16, 7 * 1_440


class UnknownDemand(ValueError):
    """What is asked for is not there; the text is a sentence."""


def read(state: State, now: Instant, asked: GetDemand) -> DemandSeries:
    """Raises `UnknownDemand`."""
    history = state.demand_history
    period_min = asked.period_min or PERIOD_MIN_DEFAULT
    if period_min not in KEPT_STEPS:
        kept = ", ".join(map(str, KEPT_STEPS))
        raise UnknownDemand(f"demand is kept in steps of {kept} minutes, not of {period_min}")
    gpu_type = _gpu_type(history, asked.gpu_type)
    projects = sorted(dict.fromkeys(series.project for series in history.series()))
    if asked.project and asked.project not in projects:
        raise UnknownDemand(_nobody("project", asked.project, projects))
    if len(asked.ahead_min) > AHEAD_COUNT_MAX or max(asked.ahead_min, default=1) > AHEAD_MIN_MAX:
        raise UnknownDemand(
            f"what is held is said of at most {AHEAD_COUNT_MAX} times, at most {AHEAD_MIN_MAX}"
            " minutes ahead"
        )
    newest = history.newest_step(period_min)
    if newest is None:
        return DemandSeries(0, period_min, (), gpu_type)
    count = min(asked.steps or KEPT_STEPS[period_min], KEPT_STEPS[period_min])
    which = Series(gpu_type, asked.project, asked.job_class)
    gpus = history.read(period_min, newest - count + 1, count, which)
    first = next((place for place, value in enumerate(gpus) if value is not None), count)
    begin_min = (newest - count + 1 + first) * period_min
    held, ahead = held_ahead(state, now, which, asked.ahead_min)
    begin_unix_ms = begin_min * state.options.demand_minute_ms
    return DemandSeries(
        begin_unix_ms,
        period_min,
        tuple(gpus[first:]),
        gpu_type,
        held,
        ahead,
        holds.read(state, now, which, begin_unix_ms) if asked.holds else None,
        _still(state, now, which, begin_min) if asked.still else (),
    )


def _still(
    state: State, now: Instant, which: Series, begin_min: int
) -> tuple[tuple[float, Still], ...]:
    """As it was known then, and as it is now."""
    found = [
        (float(minute - begin_min), still)
        for minute, still in state.demand_history.read_still(begin_min, which)
    ]
    wanted = demand_samples.wanted(state)
    mine = {series: gpus for series, gpus in wanted.items() if matches(which, series)}
    here = list(still_wanted(state, now, mine, which).values())
    if here:
        now_min = now.unix_ms / state.options.demand_minute_ms
        gpus = tuple(map(sum, zip(*(each.gpus for each in here), strict=True)))
        found.append((now_min - begin_min, Still(sum(each.said_gpus for each in here), gpus)))
    return tuple(found)


def _gpu_type(history: DemandHistory, name: str) -> str:
    """What a person means by it."""
    known = history.gpu_types()
    same = [gpu_type for gpu_type in known if gpu_type.lower() == name.lower()]
    like = same or [gpu_type for gpu_type in known if name.lower() in gpu_type.lower()]
    if name and len(like) != 1:
        if like:
            raise UnknownDemand(f"GPU type {name!r} may be {_listed(like)}: say which")
        raise UnknownDemand(_nobody("GPU type", name, known))
    return like[0] if name else ""


def _nobody(what: str, name: str, known: list[str]) -> str:
    return f"nothing of {what} {name!r} was ever wanted; of these something was: {_listed(known)}"


def _listed(names: list[str]) -> str:
    return some(names, NAMES_SHOWN_MAX) or "none"
