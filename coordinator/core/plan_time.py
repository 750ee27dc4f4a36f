"""The plan's own time, which is wall time wherever demand is real.

Problem: the rule has hours in it, and days: how long a node is idle before it goes, how often it is
started in a day. Whoever wants to watch a day of it in some minutes needs all of them shorter by
the same, and one that is forgotten is a different rule. So nothing of the rule changes: a minute of
it lasts `Options.demand_minute_ms`, and what the plan sees of the world (its clock, since when
nodes are in a phase, how long they boot) is told in its own milliseconds, of which a minute has
sixty thousand.
"""

from dataclasses import replace

from coordinator.core.boot_times import BootTimes
from coordinator.core.capacity_model import Outlook
from coordinator.core.demand_history import MINUTE_MS
from coordinator.core.options import Options


def plan_ms(options: Options, in_wall_ms: int) -> int:
    """So many milliseconds of the plan."""
    return in_wall_ms * MINUTE_MS // options.demand_minute_ms


def wall_ms(options: Options, in_plan_ms: int) -> int:
    """The other way."""
    return in_plan_ms * options.demand_minute_ms // MINUTE_MS


def boots(options: Options, seen: BootTimes) -> BootTimes:
    return BootTimes(
        {model: plan_ms(options, took_ms) for model, took_ms in seen.priors_ms.items()},
        plan_ms(options, seen.prior_ms),
        {
            model: tuple(plan_ms(options, took_ms) for took_ms in took)
            for model, took in seen.seen_ms.items()
        },
    )


def outlook(options: Options, seen: Outlook) -> Outlook:
    if seen.frees_ms is None:
        return seen
    return replace(seen, frees_ms=plan_ms(options, seen.frees_ms))
