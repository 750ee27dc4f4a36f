"""Traces and rates as Gavel's authors published them, reshaped to CSV.

Problem: a comparison on a trace of our own proves little. Gavel (Narayanan et al., OSDI 2020) comes
with the traces of its physical experiments and the steps a second that each of its jobs made on
V100, P100 and K80, alone and in pairs. They are read from a folder that the caller has; none of it
is part of Baton.
"""

import csv
import gzip
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coordinator.sim.model import Fleet, SimJob

PHYSICAL_FLEET: Final = Fleet(
    {"v100": 8, "p100": 16, "k80": 24}, {"v100": 0.74, "p100": 0.43, "k80": 0.135}
)
CONTINUOUS: Final = "trace_physical_max_min_fairness.csv"
STATIC: Final = "trace_physical_minimize_makespan.csv"
RATES: Final = "physical_cluster_throughputs.csv.gz"
SIMULATED_RATES: Final = "simulation_throughputs.csv.gz"


class NoTrace(ValueError):
    """A file is missing or not what it should be; the text is a sentence that names it."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Steps a second: alone by (model, GPUs) and type, in pairs by (type, model, partner)."""

    alone: Mapping[tuple[str, int], Mapping[str, float]]
    pairs: Mapping[tuple[str, str, str], float]


def read_rates(path: Path) -> Rates:
    """The table of rates; types whose GPUs are spread over servers are left out."""
    alone: dict[tuple[str, int], dict[str, float]] = {}
    pairs: dict[tuple[str, str, str], float] = {}
    for row in _rows(path):
        name, model, gpus = row["gpu_type"], row["model"], int(row["scale_factor"])
        rate = float(row["steps_per_s"])
        if name.endswith("_unconsolidated") or rate <= 0:
            continue
        other = row["colocated_model"]
        if not other:
            alone.setdefault((model, gpus), {})[name] = rate
        elif gpus == 1 and row["colocated_scale_factor"] == "1":
            pairs[name, model, other] = rate
            pairs[name, other, model] = float(row["colocated_steps_per_s"])
    return Rates(alone, pairs)


def same_kept(table: Rates, other: Rates) -> dict[tuple[str, str, str], float]:
    """Rates of pairs for `other`, of which each keeps the part of its speed alone that it keeps in
    `table`: the published tables differ in the rates alone, and not in those of pairs."""
    found = {}
    for (name, one, beside), rate in table.pairs.items():
        before = table.alone.get((one, 1), {}).get(name)
        alone = other.alone.get((one, 1), {}).get(name)
        if before and alone:
            found[name, one, beside] = rate / before * alone
    return found


def read_trace(path: Path, rates: Rates, restart_s: float) -> list[SimJob]:
    """The jobs of a trace, numbered from 1."""
    jobs = []
    for row in _rows(path):
        model, gpus = row["model"], int(row["gpus"])
        known = rates.alone.get((model, gpus))
        if known is None:
            raise NoTrace(f"{path}: no rate is known of {model} on {gpus} GPUs")
        jobs.append(
            SimJob(
                job_id=int(row["job_id"]) + 1,
                gpus=gpus,
                steps=float(row["total_steps"]),
                rates=known,
                model=model,
                arrival_ms=round(float(row["arrival_s"]) * 1000),
                restart_s=restart_s,
            )
        )
    return jobs


def family(model: str) -> str:
    """A model without its batch size."""
    return re.sub(r" \(batch size \d+\)", "", model)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            yield from csv.DictReader(lines)
    except OSError as error:
        raise NoTrace(f"{path} cannot be read ({error.strerror or error})") from error
