"""What an operator sets of the fleet's size, and the core's values that it comes to.

Problem: the plan has a setting for every bound, and an operator has three questions: may it act,
what does waiting cost compared with idling, and how long do my machines take. So the configuration
has these, and what may be spent on rented nodes, and leaves the rest as the plan has it
(`docs/scaling.md` names every bound).
"""

from typing import TYPE_CHECKING, Final

import msgspec

from coordinator import config_tariffs
from coordinator.core.boot_times import BootTimes
from coordinator.core.bursts import Burst
from coordinator.core.demand_history import MINUTE_MS
from coordinator.core.guard_rails import Bounds
from coordinator.core.node_power import PowerOptions
from coordinator.core.scaler import ScalingOptions
from coordinator.core.scaling import Mode, Rules
from coordinator.core.tariffs import Prices
from coordinator.sources import choice_problem, range_problem

if TYPE_CHECKING:
    from coordinator.capacity_settings import CapacityGroup
    from coordinator.config import Config

MODES: Final = ("", *(mode.value for mode in Mode))
DAY_MS: Final = 86_400_000
RATIO_MAX: Final = 10_000  # beyond it the quantile is the most that a forecast knows
SPARES_MAX: Final = 10_000
MINUTE_MS_MIN: Final = 250  # a round of the loop: more samples than rounds there cannot be
BUDGET_USD_MAX: Final = 10_000_000  # of a day; a hundred thousand of the dearest GPUs
CYCLES_MAX: Final = 16  # starts of a day that are kept


class TypeScaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one type of GPU."""

    spares: int


def scaling_problems(config: "Config") -> list[str]:
    """What is wrong, as sentences."""
    times = {
        "scaling_interval_ms": (config.scaling_interval_ms, 1_000, 600_000),
        "scaling_idle_ms": (config.scaling_idle_ms, 0, 7 * DAY_MS),
        "scaling_up_ms": (config.scaling_up_ms, 0, 7 * DAY_MS),
        "scaling_boot_ms": (config.scaling_boot_ms, 1_000, 7_200_000),
        "scaling_boot_deadline_ms": (config.scaling_boot_deadline_ms, 1_000, 14_400_000),
        "scaling_stop_deadline_ms": (config.scaling_stop_deadline_ms, 1_000, 14_400_000),
        "demand_minute_ms": (config.demand_minute_ms, MINUTE_MS_MIN, MINUTE_MS),
        "scaling_wait_ratio": (config.scaling_wait_ratio, 1, RATIO_MAX),
        "scaling_spares": (config.scaling_spares, 0, SPARES_MAX),
        "scaling_margin_percent": (config.scaling_margin_percent, 0, 100),
        **{
            f"spares of {name} in scaling_of": (its.spares, 0, SPARES_MAX)
            for name, its in config.scaling_of.items()
        },
        "scaling_cycles_per_day": (config.scaling_cycles_per_day, 1, CYCLES_MAX),
        "scaling_budget_usd_per_day": (config.scaling_budget_usd_per_day, 0, BUDGET_USD_MAX),
    }
    found = [range_problem(name, value, low, high) for name, (value, low, high) in times.items()]
    found += _rent_problems(config)
    found += _late_problems(config)
    if config.scaling_boot_ms >= config.scaling_boot_deadline_ms:
        found.append(
            f"'scaling_boot_deadline_ms' must be more than the {config.scaling_boot_ms} of "
            "'scaling_boot_ms', or every start fails"
        )
    found.append(choice_problem("scaling_mode", config.scaling_mode, MODES))
    return [sentence for sentence in found if sentence]


def _late_problems(config: "Config") -> list[str | None]:
    """A driver that is slower than the coordinator is patient switches off who works again."""
    return [
        f"'scaling_stop_deadline_ms' must be more than the {group.deadline_ms} of 'deadline_ms' of "
        f"'{name}' in 'capacity': until then an order may still be carried out"
        for name, group in config.capacity.items()
        if group.deadline_ms >= config.scaling_stop_deadline_ms
    ]


def _rent_problems(config: "Config") -> list[str | None]:
    """What is rented must have a price, or nobody could keep to a budget."""
    return [
        f"'{name}' in 'capacity' rents {group.gpu_type}, which has no price: say 'burst_usd' in "
        f"[tariffs.{group.gpu_type}]"
        for name, group in rented_groups(config).items()
        if not _prices(config).of(group.gpu_type).burst_usd
    ]


def rented_groups(config: "Config") -> dict[str, "CapacityGroup"]:
    """Of the tables in `capacity` those of nodes that are rented."""
    return {name: group for name, group in config.capacity.items() if group.gpu_type}


def rented_names(config: "Config") -> tuple[str, ...]:
    """All that rented nodes may have."""
    return tuple(name for group in rented_groups(config).values() for name in group.names())


def _prices(config: "Config") -> Prices:
    return config_tariffs.prices(
        config.tariffs, config.energy_usd_per_mwh, config.power_overhead_percent
    )


def power_options(config: "Config") -> PowerOptions:
    return PowerOptions(
        acts=bool(config.capacity),
        boot_deadline_ms=config.scaling_boot_deadline_ms,
        stop_deadline_ms=config.scaling_stop_deadline_ms,
        boot_guess_ms=config.scaling_boot_ms,
    )


def scaling_options(config: "Config") -> ScalingOptions:
    """Dollars matter only by their ratio, as long as nothing is rented; work that waits is then
    worth as many of them as it is compared with a GPU that idles."""
    defaults, prices = Rules(), _prices(config)
    groups = rented_groups(config).values()
    rules = Rules(
        wait_usd_per_gpu_h=config.scaling_wait_ratio * defaults.idle_usd_per_gpu_h,
        idle_ms_min=config.scaling_idle_ms,
        margin_ratio=config.scaling_margin_percent / 100,
        boots=BootTimes(prior_ms=config.scaling_boot_ms),
        bounds=Bounds(
            spares={name: its.spares for name, its in config.scaling_of.items()},
            spares_min=config.scaling_spares,
            up_ms_min=config.scaling_up_ms,
            cycles_per_day_max=config.scaling_cycles_per_day,
        ),
        bursts={
            group.gpu_type: Burst(prices.of(group.gpu_type).burst_usd or 0.0, group.gpus_per_node)
            for group in groups
        },
        budget_usd_per_day=config.scaling_budget_usd_per_day,
        spends_alone=config.scaling_spends_alone,
    )
    names = {group.gpu_type: dict.fromkeys(group.names()) for group in groups}
    mode = Mode(config.scaling_mode) if config.scaling_mode else None
    return ScalingOptions(rules, mode, config.scaling_interval_ms, names)
