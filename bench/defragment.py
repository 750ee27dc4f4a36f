"""What it brings to move small jobs so that a large one fits (`coordinator/core/defragment.py`).

Hours of a fleet of four nodes of eight GPUs in virtual time: the production core, and nodes that do
what they are told. Small jobs of one GPU come in sweeps and end one by one, which leaves what is
free scattered; by chance one of four or eight comes. All say how many steps they have and save
every ten seconds. The same arrivals are run twice, with moves for room and without (moves to a
better place stay allowed in both; reservations too). Whoever is moved pays: it makes `RESTART_S`
seconds of steps anew. Figures are of jobs that came in the first part of the time; each is the
median over the seeds.
"""

import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

from bench import report
from coordinator.core import defragment
from coordinator.core.model import JobSpec
from coordinator.core.phases import AttemptPhase, JobPhase
from tests.core.training_fleet import Fleet

SEEDS, SEEDS_QUICK = (1, 2, 3), (1,)
HOURS, HOURS_QUICK = 10, 6
TAIL_H = 2.0  # before the end: who comes then may not end in time
NODES = ("8xA100:80",) * 4
TICK_MS, ROUND_S = 5_000, 10  # a checkpoint each round
RESTART_S = 60.0
SMALL_S, LARGE_S = 3_600.0, 1_200.0
SWEEP_EVERY_S, LARGE_EVERY_S = 5_400.0, 1_500.0
SWEEP_JOBS = 28


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run, in minutes; `moved` is how many were stopped to make room."""

    wait_large_min: float
    wait_small_min: float
    completion_min: float
    moved: float


class Charged(Fleet):
    """A fleet in which a restart costs what it costs elsewhere."""

    def __init__(self) -> None:
        super().__init__(*NODES, slow=1.0)
        self.tick_ms = TICK_MS
        self.seen: dict[str, None] = {}

    def obey(self) -> None:
        super().obey()
        for attempt in self.state.attempts.values():
            if attempt.id not in self.seen and attempt.phase is AttemptPhase.RUNNING:
                self.seen[attempt.id] = None
                if attempt.epoch > 1:
                    self.steps[attempt.id] -= RESTART_S


def arrivals(seed: int, hours: float) -> list[tuple[float, int, int]]:
    """When who comes: seconds, GPUs, steps (one a second)."""
    chance = random.Random(seed)
    found = []
    for every_s, lasts_s, count in (
        (SWEEP_EVERY_S, SMALL_S, SWEEP_JOBS),
        (LARGE_EVERY_S, LARGE_S, 1),
    ):
        at_s = chance.expovariate(1 / every_s)
        while at_s < hours * 3_600:
            for _ in range(count):
                steps = max(60, round(chance.expovariate(1 / lasts_s)))
                found.append((at_s, 1 if count > 1 else chance.choice((4, 8)), steps))
            at_s += chance.expovariate(1 / every_s)
    return sorted(found)


def run(seed: int, hours: float) -> Outcome:
    fleet = Charged()
    coming = arrivals(seed, hours)
    came: dict[int, float] = {}
    started: dict[int, float] = {}
    ended: dict[int, float] = {}
    for round_ in range(int(hours * 3_600 / ROUND_S)):
        now_s = round_ * ROUND_S
        while coming and coming[0][0] <= now_s:
            _, gpus, steps = coming.pop(0)
            came[fleet.submit(JobSpec(command=("train",), gpus=gpus), steps)] = now_s
        fleet.run(ROUND_S)
        for job_id in [one for one in came if one not in ended]:
            job = fleet.job(job_id)
            if job.phase is not JobPhase.ACTIVE:
                continue
            started.setdefault(job_id, now_s)
            if fleet.steps.get(f"{job_id}.{job.epoch}", 0) >= fleet.totals[job_id]:
                fleet.end(job_id)
                ended[job_id] = now_s
    first = [one for one, at_s in came.items() if at_s < (hours - TAIL_H) * 3_600]
    small = [one for one in first if fleet.job(one).spec.gpus == 1]
    # Who has not started waits at least until now.
    waits = {one: (started.get(one, hours * 3_600) - came[one]) / 60 for one in first}
    return Outcome(
        statistics.fmean(waits[one] for one in first if one not in small),
        statistics.fmean(waits[one] for one in small),
        statistics.fmean((ended.get(one, hours * 3_600) - came[one]) / 60 for one in first),
        float(sum("to make room on" in reason for reason in fleet.stops())),
    )


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    hours = HOURS_QUICK if asked.quick else HOURS
    with_moves, without = [], []
    for seed in SEEDS_QUICK if asked.quick else SEEDS:
        report.say(f"defragment: seed {seed}, {hours} h, with and without")
        with_moves.append(run(seed, hours))
        with patch.object(defragment, "tick", lambda *_: None):
            without.append(run(seed, hours))
    rows = []
    for name, field in (
        ("mean wait of jobs of 4 and 8 GPUs", "wait_large_min"),
        ("mean wait of jobs of one GPU", "wait_small_min"),
        ("mean completion of all", "completion_min"),
    ):
        waits = [getattr(one, field) for one in with_moves]
        reference = statistics.median(getattr(one, field) for one in without)
        source = "without moves for room"
        rows.append(report.row_of(name, waits, "min", reference=reference, source=source))
    rows.append(report.row_of("stopped to make room", [one.moved for one in with_moves], "jobs"))
    report.show("Room for large jobs by moving small ones", rows, asked)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
