"""How many of the GPUs that are held now still are in some time, as far as anybody can say.

Problem: a forecast that looks at sums alone does not know that the largest job says that it ends in
ten minutes, or that another has a day to go. What is known of those who run is known demand.

How: of an attempt whose trainer says how many steps it has, and is seen to make them, the end is
known (`foresight.py`): it is held for certain until then, and not after. Of one that says nothing
the age is known, and that is all: jobs whose lives differ by orders of magnitude are as likely to
last as long again as not, so after `k` more it is there with the chance `age / (age + k)` (as
`reservations.py` takes it; for a Pareto tail of index one it is exact). What is reserved for a job
that waits is taken by it when it comes free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.core import foresight
from coordinator.core.demand_history import Series, matches
from coordinator.core.demand_messages import HeldAhead
from coordinator.core.model import Attempt
from coordinator.core.state import Instant, State

MINUTE_MS: Final = 60_000
# Whoever has just begun has not lived for no time at all: most that fail do so within it.
AGE_MS_MIN: Final = MINUTE_MS


@dataclass(frozen=True, slots=True)
class _Holder:
    """`end_ms`: when it leaves, in milliseconds from now; `None`: nobody knows, but it is `age_ms`
    old. `kept_ratio` of its GPUs are reserved for somebody else until `kept_ms` from now."""

    gpus: float
    end_ms: int | None
    age_ms: int
    kept_ratio: float
    kept_ms: int


def held_ahead(
    state: State, now: Instant, which: Series, ahead_min: Sequence[int]
) -> tuple[float, tuple[HeldAhead, ...]]:
    """How many are held now, and for each of these minutes how many then are."""
    holders = _holders(state, now, which)
    found = []
    for minutes in ahead_min:
        certain = expected = 0.0
        for holder in holders:
            stays, likely = _chances(holder, minutes * MINUTE_MS)
            certain += holder.gpus * stays
            expected += holder.gpus * likely
        found.append(HeldAhead(minutes, round(certain, 3), round(expected, 3)))
    return round(sum(holder.gpus for holder in holders), 3), tuple(found)


def _chances(holder: _Holder, ahead_ms: int) -> tuple[float, float]:
    """For certain, and with which chance, of each of its GPUs."""
    if holder.end_ms is None:
        stays, likely = 0.0, holder.age_ms / (holder.age_ms + ahead_ms)
    else:
        stays = likely = float(holder.end_ms > ahead_ms)
    if holder.kept_ms > ahead_ms:
        stays += (1.0 - stays) * holder.kept_ratio
    likely += (1.0 - likely) * holder.kept_ratio
    return stays, likely


def _holders(state: State, now: Instant, which: Series) -> list[_Holder]:
    kept_ms = {
        uuid: reservation.until_ms - now.now_ms
        for reservation in state.reservations.values()
        for place in reservation.places
        for uuid in place.gpu_uuids
    }
    found = []
    for attempt_id, (job_id, counts) in state.demand_history.counted.held.items():
        attempt = state.attempts.get(attempt_id)
        gpus = sum(count for series, count in counts if matches(which, series))
        if attempt is None or not gpus or job_id in state.queued:
            continue
        kept = [kept_ms[uuid] for uuid in attempt.gpu_uuids if uuid in kept_ms]
        end_ms = _end_ms(state, now, attempt)
        age_ms = max(AGE_MS_MIN, now.unix_ms - attempt.assigned_unix_ms)
        ratio = len(kept) / len(attempt.gpu_uuids)
        found.append(_Holder(gpus, end_ms, age_ms, ratio, min(kept, default=0)))
    return found


def _end_ms(state: State, now: Instant, attempt: Attempt) -> int | None:
    """Rank 0 speaks for all."""
    first = state.current(state.jobs[attempt.job_id]) if attempt.rank else attempt
    at_ms = None if first is None else foresight.end_ms(state, now, first)
    return None if at_ms is None else at_ms - now.now_ms
