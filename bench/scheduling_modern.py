"""A modern fleet, composed: H100, H200, A100 and RTX 4090 with jobs that tune and transfer models.

There is no public trace of such a fleet that says how fast its jobs are on each type, so this one
is put together, and what it shows is a comparison of policies and no measurement of GPUs:

- *When* jobs come is measured: a seed draws half a day of a public cluster's series of GPUs that
  were asked for in each ten minutes, and arrivals follow it.
- *What* they are is composed: seven kinds of training, from an image backbone on one GPU to a full
  fine-tuning of 8 billion parameters on eight; how long they run is log-normal, so much that the
  fleet is asked for more than it has.
- *How fast* they are is what production believes before it has measured anything: the public
  figures of `coordinator/core/gpu_types.py` through `rates.py` and `workload.py`, each kind and
  type off by a factor that the seed draws with the deviations of `estimates.py`. Where a kind does
  not fit by its memory it does not run.
- *Pairs* for packing are composed: two jobs on one GPU slow down where the parts of its time that
  they keep it busy add up to more than all of it, and by 5% in any case.

Prices are those of the same table. Every policy is charged 60 s for each restart, and each run is
verified by the simulator's judges. The series is not part of Baton: `--demand FOLDER`, or
BATON_BENCH_DEMAND, names a folder with `philly_jobs_10min.csv` (from Microsoft's Philly traces,
CC BY 4.0) or `helios_venus_10min.csv` (from SenseTime's Helios) with columns `time`, `submitted`.
"""

import csv
import math
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import report
from coordinator.core import gpu_types, workload
from coordinator.core.allocation import Aims
from coordinator.core.estimates import CELL_VARIANCE, TYPE_DEVIATION, Place
from coordinator.core.rates import Work, place_prior
from coordinator.core.workload import ModelFacts, Training
from coordinator.sim import checks
from coordinator.sim.engine import simulate
from coordinator.sim.model import Chance, Fleet, PairRates, Policy, SimJob
from coordinator.sim.ours import Ours
from coordinator.sim.policies import Fifo, Packing, PerDollar, StaticPartition
from coordinator.sim.report import Figures, figures
from coordinator.sim.rounds import Goal, Rounds
from coordinator.solver import solve

SERIES = {"philly": "philly_jobs_10min.csv", "helios": "helios_venus_10min.csv"}
COUNTS = {"H100": 8, "H200": 4, "A100 80GB": 8, "RTX 4090": 16}
BIN_S = 600
BINS = 72  # half a day
LOAD_RATIO = 1.3  # GPU-hours on an average GPU that are asked for, of those that there are
SIGMA = 1.2
MEDIAN_H = 1.5
RESTART_S = 60.0
SEEDS = (1, 2, 3, 4, 5)
INTERFERENCE_RATIO = 1.05
PAIR_MEMORY_RATIO = 0.9
WIDTH = 190

QWEN = ModelFacts(494_000_000, 24, 896, 4864, 151_936, gated=True)
LLAMA_1B = ModelFacts(1_236_000_000, 16, 2048, 8192, 128_256, gated=True)
LLAMA_8B = ModelFacts(8_030_000_000, 32, 4096, 14_336, 128_256, gated=True, tied=False)
GPT2 = ModelFacts(124_439_808, 12, 768, 3072, 50_257)


@dataclass(frozen=True, slots=True)
class Kind:
    """A training; `share` of all jobs. `memory_bytes` is of one GPU."""

    name: str
    gpus: int
    share: float
    work: Work
    memory_bytes: int


def _language(name: str, gpus: int, share: float, facts: ModelFacts, **more: object) -> Kind:
    given = {"trainer": "lora", "model": name, "steps": 1, "precision": "bfloat16", **more}
    training = Training(**given)  # type: ignore[arg-type]
    needed = workload.memory_bytes(training, facts, gpus, 1)
    return Kind(name, gpus, share, workload.work(training, facts), needed)


# A ResNet-50 makes 4.1 GFLOPs of multiplications forward for an image; frozen, that is all. Traffic
# is some 100 MB of activations for each image.
KINDS = (
    Kind("backbone, frozen", 1, 0.25, Work(64 * 8.2e9, 64 * 1e8, True, 0.05), 4 * 1000**3),
    Kind("backbone, whole", 1, 0.15, Work(64 * 24.6e9, 64 * 3e8, True, 0.08), 9 * 1000**3),
    _language("gpt2", 1, 0.2, GPT2, trainer="finetune", window_tokens=512),
    _language("0.5B", 1, 0.12, QWEN, trainer="finetune", window_tokens=512),
    _language("lora-1B", 1, 0.1, LLAMA_1B, window_tokens=1024, base_precision="bfloat16"),
    _language("lora-8B", 2, 0.12, LLAMA_8B, window_tokens=1024, base_precision="bfloat16"),
    _language("full-8B", 8, 0.06, LLAMA_8B, trainer="finetune", window_tokens=1024),
)


@dataclass(frozen=True, slots=True)
class Composed:
    jobs: Mapping[int, SimJob]
    pairs: PairRates


def main(arguments: Sequence[str]) -> int:
    parser = report.parser(__doc__)
    report.data_option(parser, report.DEMAND)
    parser.add_argument("--series", choices=SERIES, default="philly", help="whose arrivals")
    parsed = parser.parse_args(arguments)
    asked = report.options(parsed)
    if not parsed.demand:
        report.say("scheduling_modern: no series (give --demand FOLDER or set BATON_BENCH_DEMAND)")
        return 1
    try:
        series = read_series(parsed.demand / SERIES[parsed.series])
    except (OSError, ValueError, KeyError) as error:
        report.say(f"scheduling_modern: {error}")
        return 1
    fleet = modern_fleet()
    ran: dict[str, list[Figures]] = {}
    seeds = SEEDS[:1] if asked.quick else SEEDS
    for seed in seeds:
        made = compose(series, seed, fleet)
        report.say(f"seed {seed}: {len(made.jobs)} jobs")
        for name, make in policies(made.pairs).items():
            ran.setdefault(name, []).append(run(made, fleet, name, make()))
    if not asked.json:
        _show(ran, parsed.series)
    report.show(f"A composed modern fleet, arrivals of {parsed.series}", rows(ran), asked)
    return 0


def modern_fleet() -> Fleet:
    known = {each.key: each.usd_per_hour or 0.0 for each in gpu_types.TYPES}
    return Fleet(dict(COUNTS), {name: known[name] for name in COUNTS})


def read_series(path: Path) -> list[float]:
    """GPUs that were asked for in each ten minutes."""
    with path.open(newline="") as lines:
        return [max(0.0, float(row["submitted"] or 0)) for row in csv.DictReader(lines)]


def compose(series: Sequence[float], seed: int, fleet: Fleet) -> Composed:
    """Jobs that come as in a part of the series which has any."""
    chance = random.Random(seed)
    first = chance.randrange(len(series) - BINS)
    while sum(series[first : first + BINS]) <= 0:
        first = chance.randrange(len(series) - BINS)
    weights = series[first : first + BINS]
    kind_rates = {kind.name: _rates(kind, fleet, chance) for kind in KINDS}
    jobs, asked_h = [], 0.0
    enough_h = LOAD_RATIO * sum(fleet.gpus.values()) * BINS * BIN_S / 3600
    while asked_h < enough_h:
        (kind,) = chance.choices(KINDS, [each.share for each in KINDS])
        rates = kind_rates[kind.name]
        hours = MEDIAN_H * math.exp(chance.gauss(0.0, SIGMA))
        mean = sum(fleet.gpus[n] * r for n, r in rates.items()) / sum(fleet.gpus[n] for n in rates)
        (place,) = chance.choices(range(BINS), weights)
        arrival_s = (place + chance.random()) * BIN_S
        asked_h += hours * kind.gpus
        jobs.append((arrival_s, kind, rates, hours * 3600 * mean))
    jobs.sort(key=lambda job: job[0])
    made = {
        number: SimJob(
            job_id=number, gpus=kind.gpus, steps=steps, rates=rates, model=kind.name,
            arrival_ms=round(arrival_s * 1000), restart_s=RESTART_S,
        )
        for number, (arrival_s, kind, rates, steps) in enumerate(jobs, start=1)
    }  # fmt: skip
    return Composed(made, _pairs(kind_rates))


def _rates(kind: Kind, fleet: Fleet, chance: random.Random) -> dict[str, float]:
    found = {}
    for name in fleet.gpus:
        off = math.exp(chance.gauss(0.0, math.hypot(TYPE_DEVIATION, math.sqrt(CELL_VARIANCE))))
        if kind.memory_bytes <= _memory_bytes(name):
            prior = place_prior(Place(name, kind.gpus), kind.work)
            found[name] = math.exp(prior.log_rate) * off
    return found


def _memory_bytes(name: str) -> int:
    known = next(each for each in gpu_types.TYPES if each.key == name)
    return round(0.97 * known.memory_gib * gpu_types.GIB)


def _busy_ratio(kind: Kind, name: str) -> float:
    """Which part of a step the GPU computes; the rest of it waits for the host."""
    work = Work(kind.work.flops, kind.work.traffic_bytes, kind.work.half)
    computes_s = math.exp(-place_prior(Place(name, 1), work).log_rate)
    return computes_s / max(computes_s, kind.work.launch_s)


def _pairs(kind_rates: Mapping[str, Mapping[str, float]]) -> PairRates:
    found = {}
    single = [kind for kind in KINDS if kind.gpus == 1]
    for one in single:
        for other in single:
            for name in kind_rates[one.name]:
                memory = one.memory_bytes + other.memory_bytes
                if name in kind_rates[other.name] and (
                    memory <= PAIR_MEMORY_RATIO * _memory_bytes(name)
                ):
                    busy = _busy_ratio(one, name) + _busy_ratio(other, name)
                    slower = INTERFERENCE_RATIO * max(1.0, busy)
                    found[name, one.name, other.name] = kind_rates[one.name][name] / slower
    return found


def policies(pairs: PairRates) -> dict[str, Callable[[], Policy]]:
    """Made anew for each run: some remember."""
    return {
        "FIFO, type-blind": Fifo,
        "FIFO, type-aware": lambda: Fifo(aware=True),
        "static partition": StaticPartition,
        "packing": lambda: Packing(pairs),
        "throughput per dollar": PerDollar,
        **{goal.value: partial(Rounds, goal) for goal in Goal},
        "Baton, greedy": Ours,
        "Baton": lambda: Ours(solve=solve),
        "Baton, earliest end": lambda: Ours(Aims(balance=1.0), solve),
    }


def run(
    made: Composed, fleet: Fleet, name: str, policy: Policy, chance: Chance | None = None
) -> Figures:
    """Judged."""
    outcome = simulate(made.jobs.values(), fleet, policy, chance, made.pairs)
    found = [
        *checks.check_capacity(outcome, fleet),
        *checks.check_work(outcome, made.jobs, made.pairs, chance),
        *checks.check_completions(outcome, made.jobs),
    ]
    if isinstance(policy, Ours):
        found += checks.check_classes(outcome, made.jobs, fleet)
    if found:
        raise SystemExit(f"{name}: {found[0]} (of {len(found)})")
    return figures(outcome, made.jobs, fleet)


def rows(ran: Mapping[str, Sequence[Figures]]) -> list[report.Row]:
    """Ours against the others, seed by seed."""
    found = []
    others = [name for name in ran if not name.startswith("Baton")]
    measured: list[tuple[str, str, Callable[[Figures], float]]] = [
        ("mean completion", "h", lambda each: each.completion_h.mean),
        ("provisioned cost", "$", lambda each: each.provisioned_cost),
        ("cost of what was used", "$", lambda each: each.used_cost),
    ]
    for label, unit, figure in measured:
        ours = [figure(each) for each in ran["Baton"]]
        medians = {name: statistics.median(figure(each) for each in ran[name]) for name in others}
        best = min(others, key=lambda name: medians[name])
        against = dict.fromkeys(("FIFO, type-blind", "static partition", "packing", best))
        for name in against:
            words = "best of the others" if name == best else "same run"
            source = f"{name}, {words}"
            row = report.row_of(
                f"modern, {label}", ours, unit, reference=medians[name], source=source
            )
            found.append(row)
    return found


def _show(ran: Mapping[str, Sequence[Figures]], series: str) -> None:
    count = len(next(iter(ran.values())))
    title = f"composed modern fleet, arrivals of {series}: median (lowest to highest of {count})"
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    columns: dict[str, Callable[[Figures], float]] = {
        "mean h": lambda each: each.completion_h.mean,
        "p99 h": lambda each: each.completion_h.p99,
        "makespan h": lambda each: each.makespan_h,
        "fairness worst": lambda each: each.fairness.worst,
        "busy*": lambda each: each.busy_waiting_ratio,
        "training*": lambda each: each.training_waiting_ratio,
        "provisioned $": lambda each: each.provisioned_cost,
        "used $": lambda each: each.used_cost,
        "restarts": lambda each: each.restarts,
    }
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, every in ran.items():
        cells = []
        for figure in columns.values():
            row = report.row_of("", [figure(each) for each in every], "")
            cells.append(f"{report.number(row.value)}{_spread(row)}")
        table.add_row(name, *cells)
    console = Console(width=WIDTH)
    console.print(table)
    console.print("* of GPU-seconds while a job waits; training: without restarts", highlight=False)


def _spread(row: report.Row) -> str:
    if row.low is None or row.high is None:
        return ""
    return f" ({report.number(row.low)} to {report.number(row.high)})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
