"""Prices in the coordinator's configuration: what an operator may say, and whether it can be.

Problem: everybody pays something else, so each figure of `core/tariffs.py` can be replaced, one at
a time, and a slip of the finger in a price is money in a plan. So every figure has a range that no
real one leaves.
"""

from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from coordinator.core import tariffs as core

USD_PER_HOUR_MAX: Final = 1_000.0  # of one GPU; a hundred times the dearest
WATTS_MAX: Final = 10_000.0  # of one GPU, likewise
BOOT_S_MAX: Final = 86_400.0  # a day; a box that needs longer does not come
TARIFFS_MAX: Final = 256  # types of GPU in one fleet; far above real use
ENERGY_USD_PER_MWH_MAX: Final = 10_000  # ten dollars a kilowatt-hour
OVERHEAD_PERCENT_MIN: Final = 100  # a box draws what its boards draw, at least
OVERHEAD_PERCENT_MAX: Final = 1_000
MWH_PER_KWH: Final = 1e-3


class Tariff(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one GPU of a type, US dollars an hour; what is left out is as in the table."""

    lease_usd: float | None = None
    burst_usd: float | None = None
    owned_usd: float | None = None
    idle_watts: float | None = None
    loaded_watts: float | None = None
    boot_s: float | None = None


def problems(tariffs: Mapping[str, Tariff]) -> Iterator[str]:
    """As sentences."""
    if len(tariffs) > TARIFFS_MAX:
        yield f"'tariffs' has {len(tariffs)} tables; at most {TARIFFS_MAX} may be"
    for name, tariff in tariffs.items():
        for key in tariff.__struct_fields__:
            value = getattr(tariff, key)
            high = (
                BOOT_S_MAX
                if key == "boot_s"
                else WATTS_MAX
                if key.endswith("_watts")
                else USD_PER_HOUR_MAX
            )
            if value is not None and not 0 <= value <= high:
                yield f"'{key}' of '{name}' in 'tariffs' must be 0 to {high:.8g}, not {value:g}"


def prices(
    tariffs: Mapping[str, Tariff], energy_usd_per_mwh: int, overhead_percent: int
) -> core.Prices:
    """As the core has them."""
    return core.Prices(
        {name: core.Tariff(**msgspec.structs.asdict(said)) for name, said in tariffs.items()},
        energy_usd_per_mwh * MWH_PER_KWH,
        overhead_percent / 100,
    )
