"""What simulating a large fleet costs: 15,000 jobs on 5,000 GPUs of four types, under our policy.

No public trace of this size says how fast its jobs are on several types, so this one is composed by
a seed: jobs come evenly over a day and ask for one and a half times the GPU-hours of that day, each
on an average GPU of the fleet; how long they run is log-normal, as on clusters of researchers (a
median of some two hours, a mean of six). All are of one class. Measured is the simulation alone, in
seconds of one core; the judges go over it afterwards.
"""

import math
import random
import time

from bench import report
from coordinator.sim import checks
from coordinator.sim.engine import simulate
from coordinator.sim.model import Fleet, SimJob
from coordinator.sim.ours import Ours
from coordinator.solver import solve

JOBS = 15_000
GPUS = 5_000
# Of the fleet, and about how fast a job is on it.
TYPES = {"H100": (0.2, 4.0), "A100": (0.3, 2.0), "L40S": (0.2, 1.2), "V100": (0.3, 0.7)}
LOAD_RATIO = 1.5
DAY_MS = 24 * 3_600_000
SIGMA = 1.4
RESTART_S = 60.0
SEED = 1
GOAL_S = 300.0


def rows(job_count: int = JOBS, gpu_count: int = GPUS) -> list[report.Row]:
    """The seconds it takes, and how many events a second that is."""
    fleet = Fleet({name: round(gpu_count * part) for name, (part, _) in TYPES.items()})
    jobs = {job.job_id: job for job in trace(job_count, gpu_count, SEED)}
    begin_s = time.process_time()
    outcome = simulate(jobs.values(), fleet, Ours(solve=solve))
    cpu_s = time.process_time() - begin_s
    found = [
        *checks.check_capacity(outcome, fleet),
        *checks.check_work(outcome, jobs),
        *checks.check_completions(outcome, jobs),
        *checks.check_classes(outcome, jobs, fleet),
    ]
    if found:
        raise SystemExit(f"{job_count:,} jobs: {found[0]} (of {len(found)})")
    name = f"simulation, {job_count:,} jobs on {gpu_count:,} GPUs"
    hours = max(outcome.finished_ms.values()) / 3_600_000
    return [
        report.Row(name=name, value=cpu_s, unit="s of a core", goal=GOAL_S),
        report.Row(
            name=f"{name}, events", value=outcome.events / cpu_s, unit="a second of a core",
            more_is_better=True,
        ),
        report.Row(name=f"{name}, simulated", value=hours, unit="h", more_is_better=True),
    ]  # fmt: skip


def trace(job_count: int, gpu_count: int, seed: int) -> list[SimJob]:
    """Jobs that come over a day; the mean of their lengths follows from the load."""
    chance = random.Random(seed)
    sizes = chance.choices((1, 2, 4, 8), (0.6, 0.2, 0.12, 0.08), k=job_count)
    spread = [math.exp(chance.gauss(0.0, SIGMA)) for _ in range(job_count)]
    asked = sum(gpus * each for gpus, each in zip(sizes, spread, strict=True))
    unit_s = LOAD_RATIO * gpu_count * DAY_MS / 1000 / asked
    found = []
    for number, (gpus, each) in enumerate(zip(sizes, spread, strict=True), start=1):
        rates = {name: gpus * rate * chance.uniform(0.5, 1.5) for name, (_, rate) in TYPES.items()}
        mean_rate = sum(part * rates[name] for name, (part, _) in TYPES.items())
        found.append(
            SimJob(
                job_id=number,
                gpus=gpus,
                steps=each * unit_s * mean_rate,
                rates=rates,
                arrival_ms=chance.randrange(DAY_MS),
                restart_s=RESTART_S,
            )
        )
    return found
