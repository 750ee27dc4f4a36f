"""What a regression looks at: a column each, a row a step, and none knows anything of later.

Problem: a series is a sum, and says neither who holds GPUs nor since when. But what was there at
every moment of the last three hours cannot have come within them, so demand above the least of
these hours is young, and of young jobs most soon end: the last come is the first gone. In the same
way demand below the most of these hours is what has just left. A sum of its own says thereby what
ages of jobs would.
"""

from typing import Final

import numpy as np

from coordinator.forecast.grid import HOURS_PER_DAY, HOURS_PER_WEEK, Grid
from coordinator.forecast.quantiles import Floats

YOUNG_HOURS: Final = (1, 3, 12, 48)
# Of so many last days the usual change from this time of day on is a mean.
USUAL_DAYS: Final = (3, 7)


def from_means(grid: Grid) -> Floats:
    """How far demand is from the means of the last day and week."""
    far = [grid.known - grid.mean(hours) for hours in (HOURS_PER_DAY, HOURS_PER_WEEK)]
    return np.stack(far, axis=1)


def all_of_it(grid: Grid, ahead: int) -> Floats:
    """The distance from several means, what followed a day and a week ago, and the time."""
    return grid.once(("all of it", ahead), lambda: _all_of_it(grid, ahead))


def _all_of_it(grid: Grid, ahead: int) -> Floats:
    columns = [grid.known - grid.mean(hours) for hours in (3, 12, 24, 72, 168)]
    columns += [change_before(grid, ahead, hours) for hours in (24, 168) if ahead]
    waves = grid.nervousness[:, -6:] * grid.mean(HOURS_PER_WEEK)[:, None]
    return np.concatenate([np.stack(columns, axis=1), waves], axis=1)


def and_lately(grid: Grid, ahead: int) -> Floats:
    """All of it, what is young, what has just left, and what is usual at the time it is about."""
    return grid.once(("and lately", ahead), lambda: _and_lately(grid, ahead))


def _and_lately(grid: Grid, ahead: int) -> Floats:
    columns = [grid.known - grid.least(hours) for hours in YOUNG_HOURS]
    columns += [grid.most(hours) - grid.known for hours in YOUNG_HOURS]
    columns += [_usual_change(grid, ahead, days) for days in USUAL_DAYS]
    columns += [_from_usual(grid, ahead, days) for days in USUAL_DAYS]
    return np.concatenate([all_of_it(grid, ahead), np.stack(columns, axis=1)], axis=1)


def change_before(grid: Grid, ahead: int, hours: int) -> Floats:
    """What followed within `ahead` steps so many hours ago; zero where that is not known."""
    back = hours * grid.per_hour
    change = np.zeros(len(grid.values))
    if ahead <= back < len(change):
        then = np.arange(back, len(change)) - back
        change[back:] = grid.known[then + ahead] - grid.known[then]
    return change


def _usual_change(grid: Grid, ahead: int, days: int) -> Floats:
    """What followed at the same time of the last `days`, as a mean of those that are known."""
    hours = _hours_known(grid, ahead, days)
    changes = [change_before(grid, ahead, each) for each in hours]
    return np.mean(changes, axis=0) if hours else np.zeros(len(grid.values))


def _from_usual(grid: Grid, ahead: int, days: int) -> Floats:
    """How far demand is from what was wanted on the last `days` at the time that is asked about."""
    hours = _hours_known(grid, ahead, days)
    since = [grid.known - _before(grid, each * grid.per_hour - ahead) for each in hours]
    return np.mean(since, axis=0) if hours else np.zeros(len(grid.values))


def _hours_known(grid: Grid, ahead: int, days: int) -> list[int]:
    """So many hours ago it was the same time of day, and what followed is known by now."""
    hours = [HOURS_PER_DAY * day for day in range(1, days + 1)]
    return [each for each in hours if each * grid.per_hour >= ahead]


def _before(grid: Grid, steps: int) -> Floats:
    """Demand so many steps ago; demand now where that is not known."""
    before = grid.known.copy()
    before[steps:] = grid.known[: max(0, len(before) - steps)]
    return before
