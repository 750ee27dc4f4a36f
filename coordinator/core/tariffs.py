"""What a GPU costs by the month and by the hour, and what it draws.

Problem: money can only be compared where every figure has a source and a date, and a site's own
figures come before anybody's table. So here is a default for each type of GPU, from public pages,
and the configuration (`tariffs`) replaces any of it. What is not known is `None`, never a guess.

Sources, as of 2026-11-29. Prices by the hour are those of `gpu_types.py`, with their sources. By
the month they are 0.7 of that: "reserved contracts deliver 20-40% discounts but require 1-3 month
commitments", https://packet.ai/blog/gpu-pricing-models-compared; providers seldom print a price for
30 days, so ask for yours. `loaded_watts` is the board's limit, which training comes near to and
does not pass: SXM boards, L40S, RTX 4090 and T4 from
https://nemulai.com/blog/gpu-electricity-cost-per-training-run (June 2026), H100 PCIe from
https://runpod.io/ai-faq/what-is-the-power-consumption-of-the-nvidia-h100-gpu, the NVL boards from
https://onestopsystems.com/pages/one-stop-systems-blog, L40 from https://www.mullet.se (its table of
L40 and L40S), L4 from https://grokipedia.com/page/NVIDIA_L4_vs_L40S, B200, P100 and A40 from
https://hmc-tech.com (its comparisons), RTX 3090, A6000 and 6000 Ada from
https://huggingface.co/datasets/ohdoking/gpu_spec, A10 and V100 from
https://huggingface.co/RajBhope/gpu-runtime-predictor.

`OVERHEAD_RATIO`: what a node draws at its plug over what its boards may draw: 8.4 kW were the most
that a box with eight H100 drew in training (Latif et al., IEEE Access 2025, arXiv:2412.08602), of
which boards at their limit are 5.6 kW. `ENERGY_USD_PER_KWH` is the mean of the USA as the first
page says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

from coordinator.core import gpu_types

LEASE_RATIO: Final = 0.7
OVERHEAD_RATIO: Final = 1.5
ENERGY_USD_PER_KWH: Final = 0.12
TYPES_KEPT: Final = 1_024  # of tariffs; a fleet has some tens, and a bill asks for each attempt
SOURCE: Final = "public pages, 2026-11-29 (coordinator/core/tariffs.py)"
CONFIGURED: Final = "the coordinator's configuration"

_LOADED_WATTS: Final[Mapping[str, float]] = {
    "B200": 1000.0,
    "H200 NVL": 600.0,
    "H200": 700.0,
    "H100 NVL": 400.0,
    "H100 PCIe": 350.0,
    "H100": 700.0,
    "A100 80GB": 400.0,
    "A100 40GB": 400.0,
    "L40S": 350.0,
    "L40": 300.0,
    "L4": 72.0,
    "A40": 300.0,
    "A10": 150.0,
    "RTX A6000": 300.0,
    "RTX 6000 Ada": 300.0,
    "RTX 4090": 450.0,
    "RTX 3090": 350.0,
    "T4": 70.0,
    "V100": 300.0,
    "P100": 250.0,
}


@dataclass(frozen=True, slots=True)
class Tariff:
    """Of one GPU of a type; prices in US dollars an hour. `lease_usd` is that of a lease of
    30 days, `burst_usd` of renting by the hour, `owned_usd` what an hour of an own GPU is
    written off with, beside its energy."""

    lease_usd: float | None = None
    burst_usd: float | None = None
    owned_usd: float | None = None
    loaded_watts: float | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """GPUs that are paid for until its end, used or not; `nodes` is a pattern of their names. `usd`
    is of one GPU, an hour; None: as the tariff of the type says."""

    name: str
    gpu_type: str
    gpus: int
    begin_unix_ms: int
    end_unix_ms: int
    nodes: str
    usd: float | None = None


@dataclass(frozen=True, slots=True)
class Prices:
    """All that an operator may set of money: by type of GPU what differs from the table, the price
    of energy, and the watts at the plug for each watt of a board."""

    tariffs: Mapping[str, Tariff] = field(default_factory=dict)
    energy_usd_per_kwh: float = ENERGY_USD_PER_KWH
    overhead_ratio: float = OVERHEAD_RATIO

    def of(self, gpu_type: str) -> Tariff:
        """By the key of a type or a name of NVML's; fields that nobody knows are `None`."""
        own = self.tariffs.get(gpu_type)
        table = public(gpu_type)
        return table if own is None else _over(own, table)

    def source(self, gpu_type: str) -> str:
        """Where the prices of this type are from."""
        return CONFIGURED if gpu_type in self.tariffs else SOURCE


@lru_cache(maxsize=TYPES_KEPT)
def _over(own: Tariff, table: Tariff) -> Tariff:
    """The table with what was said instead."""
    said = {name: getattr(own, name) for name in Tariff.__slots__}
    return replace(table, **{name: value for name, value in said.items() if value is not None})


@lru_cache(maxsize=TYPES_KEPT)
def public(gpu_type: str) -> Tariff:
    """What the table says; nothing of an unknown type."""
    by_key = next((one for one in gpu_types.TYPES if one.key == gpu_type), None)
    known = by_key or gpu_types.find(gpu_type)
    if known is None:
        return Tariff()
    burst_usd, watts = known.usd_per_hour, _LOADED_WATTS.get(known.key)
    return Tariff(
        lease_usd=None if burst_usd is None else LEASE_RATIO * burst_usd,
        burst_usd=burst_usd,
        loaded_watts=watts,
    )
