"""Prices in the coordinator's configuration: what an operator may say, and whether it can be.

Problem: everybody pays something else, so each figure of `core/tariffs.py` can be replaced, one at
a time, and a slip of the finger in a price is money in a plan. So every figure has a range that no
real one leaves.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Final

import msgspec

from coordinator.core import tariffs as core

USD_PER_HOUR_MAX: Final = 1_000.0  # of one GPU; a hundred times the dearest
WATTS_MAX: Final = 10_000.0  # of one GPU, likewise
TARIFFS_MAX: Final = 256  # types of GPU in one fleet; far above real use
ENERGY_USD_PER_MWH_MAX: Final = 10_000  # ten dollars a kilowatt-hour
OVERHEAD_PERCENT_MIN: Final = 100  # a box draws what its boards draw, at least
OVERHEAD_PERCENT_MAX: Final = 1_000
LEASES_MAX: Final = 1_000  # a lot a day for almost three years
LEASE_GPUS_MAX: Final = 1_000_000
MWH_PER_KWH: Final = 1e-3


class Tariff(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one GPU of a type, US dollars an hour; what is left out is as in the table."""

    lease_usd: float | None = None
    burst_usd: float | None = None
    owned_usd: float | None = None
    loaded_watts: float | None = None


class Lease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """GPUs that are leased from the beginning of one day until that of another, by UTC; `nodes` is
    a pattern of names. Without `usd` an hour costs what the tariff of its type says."""

    gpu_type: str
    gpus: int
    begin: str
    end: str
    nodes: str
    usd: float | None = None


def problems(tariffs: Mapping[str, Tariff]) -> Iterator[str]:
    """As sentences."""
    if len(tariffs) > TARIFFS_MAX:
        yield f"'tariffs' has {len(tariffs)} tables; at most {TARIFFS_MAX} may be"
    for name, tariff in tariffs.items():
        for key in tariff.__struct_fields__:
            value = getattr(tariff, key)
            high = WATTS_MAX if key == "loaded_watts" else USD_PER_HOUR_MAX
            if value is not None and not 0 <= value <= high:
                yield f"'{key}' of '{name}' in 'tariffs' must be 0 to {high:.8g}, not {value:g}"


def lease_problems(leases: Mapping[str, Lease]) -> Iterator[str]:
    """As sentences."""
    if len(leases) > LEASES_MAX:
        yield f"'leases' has {len(leases)} tables; at most {LEASES_MAX} may be"
    for name, lease in leases.items():
        days = [_unix_ms(lease.begin), _unix_ms(lease.end)]
        for key, text, day in zip(("begin", "end"), (lease.begin, lease.end), days, strict=True):
            if day is None:
                yield f"'{key}' of '{name}' in 'leases' must be a day as 2026-11-29, not '{text}'"
        begin, end = days
        if begin is not None and end is not None and begin >= end:
            yield f"'end' of '{name}' in 'leases' must come after its beginning, {lease.begin}"
        if not 1 <= lease.gpus <= LEASE_GPUS_MAX:
            yield f"'gpus' of '{name}' in 'leases' must be 1 to {LEASE_GPUS_MAX}, not {lease.gpus}"
        if lease.usd is not None and not 0 <= lease.usd <= USD_PER_HOUR_MAX:
            high = f"{USD_PER_HOUR_MAX:g}"
            yield f"'usd' of '{name}' in 'leases' must be 0 to {high}, not {lease.usd:g}"


def leases(said: Mapping[str, Lease]) -> tuple[core.Lease, ...]:
    """As the core has them; call after `lease_problems`."""
    return tuple(
        core.Lease(
            name,
            lease.gpu_type,
            lease.gpus,
            _unix_ms(lease.begin) or 0,
            _unix_ms(lease.end) or 0,
            lease.nodes,
            lease.usd,
        )
        for name, lease in said.items()
    )


def _unix_ms(day: str) -> int | None:
    try:
        begin = datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        return None
    return round(begin.timestamp() * 1000)


def prices(
    tariffs: Mapping[str, Tariff], energy_usd_per_mwh: int, overhead_percent: int
) -> core.Prices:
    """As the core has them."""
    return core.Prices(
        {name: core.Tariff(**msgspec.structs.asdict(said)) for name, said in tariffs.items()},
        energy_usd_per_mwh * MWH_PER_KWH,
        overhead_percent / 100,
    )
