"""How many of the GPUs that are held now still are in some time, as far as anybody can say.

Problem: a forecast that looks at sums alone does not know that the largest job says that it ends in
ten minutes, or that another has a day to go. What is known of those who run is known demand.

How: of an attempt whose trainer says how many steps it has, and is seen to make them, the end is
known (`foresight.py`): it is held for certain until then, and not after. One that says nothing is
expected to be there after `k` more with a chance that its age and those who ended before say
(`life_table.py`). What is reserved for a job that waits is taken by it when it comes free, and what
a trial leaves by those of its array that are behind it: until they are over, as long as its last
trials took, what they are on is nobody else's (`trials.py`).

What is said of now is soon forgotten, and whoever is to learn how far it comes true needs what was
said then. So once an hour it is kept with demand, as what is wanted still (`still_wanted`): of that
nobody leaves who waits, and nobody comes who waited. Who is being stopped may go on elsewhere.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from coordinator.core import foresight, lifetimes, trials
from coordinator.core.demand_history import STILL_MIN, Series, Still, matches
from coordinator.core.demand_messages import HeldAhead
from coordinator.core.life_table import Course, kind_of
from coordinator.core.model import Attempt
from coordinator.core.phases import AttemptPhase
from coordinator.core.state import Instant, State

# Where it is asked each minute, in the loop: of more than these every second is looked at, or every
# third, and so on, some microseconds each.
HOLDERS_MAX: Final = 1_000
EVERYTHING: Final = Series()
# When it is looked how many have come free; in between they come free evenly.
LOOKS_MIN: Final = (1, 2, 5, 10, 20, 30, 60, 120, 240, 480, 960, 1_440, 2_880, 5_760, 10_080)


@dataclass(frozen=True, slots=True)
class Holder:
    """`end_ms`: when it leaves, in milliseconds from now; `None`: nobody knows, but it is `age_ms`
    old, and lives on by its `course`. `kept_ratio` of its GPUs are reserved for somebody else until
    `kept_ms` from now; others of its array are expected to follow it for `refill_ms`. It `says`
    itself when it leaves; who is told to stop does not."""

    gpus: float
    end_ms: int | None
    age_ms: int
    kept_ratio: float
    kept_ms: int
    refill_ms: int
    course: Course
    says: bool


def held_ahead(
    state: State, now: Instant, which: Series, ahead_min: Sequence[int]
) -> tuple[float, tuple[HeldAhead, ...]]:
    """How many are held now, and for each of these minutes how many then are."""
    minute_ms = state.options.demand_minute_ms
    holders = [holder for _, holder in _holders(state, now, which)]
    found = []
    for minutes in ahead_min:
        certain = expected = 0.0
        for holder in holders:
            certain += holder.gpus * _certain(holder, minutes * minute_ms)
            expected += holder.gpus * _likely(holder, (minutes * minute_ms,))[0]
        found.append(HeldAhead(minutes, round(certain, 3), round(expected, 3)))
    return round(sum(holder.gpus for holder in holders), 3), tuple(found)


def still_wanted(
    state: State, now: Instant, wanted: Mapping[Series, float], which: Series = EVERYTHING
) -> dict[Series, Still]:
    """Of what is `wanted` now of `which`, by series; empty where nobody of it says when he ends."""
    minute_ms = state.options.demand_minute_ms
    said = dict.fromkeys(wanted, 0.0)
    still = {series: [gpus] * len(STILL_MIN) for series, gpus in wanted.items()}
    for series, holder in _holders(state, now, which, _every(state)):
        said[series] = said.get(series, 0.0) + holder.gpus * holder.says
        gone = leaving(holder, [minutes * minute_ms for minutes in STILL_MIN])
        had = still.get(series, [0.0] * len(STILL_MIN))
        still[series] = [max(0.0, gpus - left) for gpus, left in zip(had, gone, strict=True)]
    if not any(said.values()):
        return {}
    return {series: Still(said[series], tuple(gpus)) for series, gpus in still.items()}


def leaving(holder: Holder, aheads_ms: Sequence[int]) -> list[float]:
    """How many of its GPUs nobody is expected to want any more after each of these times, of those
    who hold GPUs now. Who they are reserved for waits, and is wanted himself."""
    end_ms = holder.end_ms if holder.says else None
    alone = replace(holder, end_ms=end_ms, kept_ratio=0.0)
    return [holder.gpus * (1.0 - likely) for likely in _likely(alone, aheads_ms)]


def frees_ms(state: State, now: Instant, needed: Mapping[str, float]) -> dict[str, int]:
    """By GPU type: after how long so many GPUs of those that are held are expected to have come
    free for somebody else. What is not expected within a week is left out."""
    freed = freed_ahead(state, now, needed)
    found = {gpu_type: after_ms(freed[gpu_type], gpus) for gpu_type, gpus in needed.items()}
    return {gpu_type: at_ms for gpu_type, at_ms in found.items() if at_ms is not None}


def freed_ahead(
    state: State, now: Instant, gpu_types: Iterable[str]
) -> dict[str, list[tuple[int, float]]]:
    """By GPU type: after how long how many are expected to have come free, at each look."""
    minute_ms = state.options.demand_minute_ms
    every = _every(state)
    by_type: dict[str, list[Holder]] = {gpu_type: [] for gpu_type in gpu_types}
    for series, holder in _holders(state, now, Series(), every) if by_type else ():
        if series.gpu_type in by_type:
            by_type[series.gpu_type].append(holder)
    looks_ms = [minutes * minute_ms for minutes in LOOKS_MIN]
    found = {}
    for gpu_type, holders in by_type.items():
        freed = [0.0] * len(looks_ms)
        for holder in holders:
            for place, likely in enumerate(_likely(holder, looks_ms)):
                freed[place] += holder.gpus * (1.0 - likely)
        found[gpu_type] = list(zip(looks_ms, freed, strict=True))
    return found


def ending_gpus(
    state: State, now: Instant, ahead_ms: Mapping[str, int], nodes: Container[str]
) -> dict[str, float]:
    """By GPU type: how many, of those that are held on these nodes, are known to come free within
    so long. Of who is overdue nothing is known; who is being stopped may go on elsewhere. What a
    trial leaves is free when those behind it are over."""
    refills = trials.refills(state, now)
    held = state.demand_history.counted.held
    every = 1 + len(held) // HOLDERS_MAX
    found: dict[str, float] = {}
    for attempt_id in list(held)[::every]:
        job_id, counts = held[attempt_id]
        attempt = state.attempts.get(attempt_id)
        if attempt is None or attempt.node not in nodes or job_id in state.queued:
            continue
        runs = attempt.phase is AttemptPhase.RUNNING
        end_ms = _end_ms(state, now, attempt) if runs else None
        if not end_ms:
            continue
        free_ms = end_ms + _refill_ms(state, now, refills, attempt, end_ms)
        for series, gpus in counts:
            if free_ms <= ahead_ms.get(series.gpu_type, 0):
                found[series.gpu_type] = found.get(series.gpu_type, 0.0) + gpus * every
    return found


def after_ms(freed: Sequence[tuple[int, float]], gpus: float) -> int | None:
    """When as many have come free; `None`: not within a week. Between two looks, evenly."""
    earlier_ms, had = 0, 0.0
    for at_ms, count in freed:
        if count >= gpus:
            part = (gpus - had) / (count - had)
            return round(earlier_ms + part * (at_ms - earlier_ms))
        earlier_ms, had = at_ms, count
    return None


def _every(state: State) -> int:
    return 1 + len(state.demand_history.counted.held) // HOLDERS_MAX


def _certain(holder: Holder, ahead_ms: int) -> float:
    """The part of its GPUs that is held for certain."""
    stays = float(holder.end_ms is not None and holder.end_ms > ahead_ms)
    if holder.kept_ms > ahead_ms:
        stays += (1.0 - stays) * holder.kept_ratio
    return stays


def _likely(holder: Holder, aheads_ms: Sequence[int]) -> list[float]:
    """The part of its GPUs that is expected to be held after each of these times."""
    lefts_ms = [max(0, ahead_ms - holder.refill_ms) for ahead_ms in aheads_ms]
    if holder.end_ms is None:
        found = holder.course.to_live(holder.age_ms, lefts_ms)
    else:
        found = [float(holder.end_ms > left_ms) for left_ms in lefts_ms]
    ratio = holder.kept_ratio
    return [likely + (1.0 - likely) * ratio for likely in found] if ratio else found


def _holders(
    state: State, now: Instant, which: Series, every: int = 1
) -> list[tuple[Series, Holder]]:
    """With the series of each; `every` so many of them is looked at, and stands for as many."""
    kept_ms = {
        uuid: reservation.until_ms - now.now_ms
        for reservation in state.reservations.values()
        for place in reservation.places
        for uuid in place.gpu_uuids
    }
    found, refills = [], trials.refills(state, now)
    chances = lifetimes.chances(state, now)
    for attempt_id in list(state.demand_history.counted.held)[::every]:
        job_id, counts = state.demand_history.counted.held[attempt_id]
        attempt = state.attempts.get(attempt_id)
        mine = [(series, gpus) for series, gpus in counts if matches(which, series)]
        if attempt is None or not mine or job_id in state.queued:
            continue
        kept = [kept_ms[uuid] for uuid in attempt.gpu_uuids if uuid in kept_ms] if kept_ms else []
        end_ms = _end_ms(state, now, attempt)
        says = end_ms is not None and not _stops(state, attempt)
        job = state.jobs[job_id]
        age_ms = lifetimes.age_ms(state, now, job_id)
        ratio = len(kept) / len(attempt.gpu_uuids)
        refill_ms = _refill_ms(state, now, refills, attempt, end_ms or 0)
        for series, gpus in mine:
            course = chances.course(kind_of(series.gpu_type, job.spec.gpus * job.spec.ranks))
            until_ms = min(kept, default=0)
            holder = Holder(gpus * every, end_ms, age_ms, ratio, until_ms, refill_ms, course, says)
            found.append((series, holder))
    return found


def _refill_ms(
    state: State,
    now: Instant,
    refills: Mapping[int, trials.Refill],
    attempt: Attempt,
    end_ms: int,
) -> int:
    """For how long others of its array follow who ends then."""
    refill = refills.get(state.jobs[attempt.job_id].array_id)
    if refill is None:
        return 0
    return refill.lasts_ms(lifetimes.age_ms(state, now, attempt.job_id) + end_ms)


def _first(state: State, attempt: Attempt) -> Attempt | None:
    """Rank 0 speaks for all."""
    return state.current(state.jobs[attempt.job_id]) if attempt.rank else attempt


def _stops(state: State, attempt: Attempt) -> bool:
    first = _first(state, attempt)
    return first is not None and first.phase is AttemptPhase.STOPPING


def _end_ms(state: State, now: Instant, attempt: Attempt) -> int | None:
    first = _first(state, attempt)
    at_ms = None if first is None else foresight.end_ms(state, now, first)
    return None if at_ms is None else at_ms - now.now_ms
