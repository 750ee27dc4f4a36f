"""What simulations looked like: GPUs in use by type, the queue, completions, cost, fairness.

Problem: two policies with the same mean may be very different fleets to live with: one has a queue
all morning, the other a tail of one job all night. So the lines of each run are turned into curves
again (`svg.py` draws them): averages over equal parts of the time for what goes up and down, and
distributions for what each job got.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.sim.checks import instants
from coordinator.sim.model import Fleet, Line, Outcome, SimJob
from coordinator.sim.report import MS_PER_H, fluid_completions_ms
from coordinator.sim.svg import Chart, Curve, draw

BINS: Final = 240  # of the time until the last end: two or three pixels each
POINTS_MAX: Final = 600  # of a distribution


@dataclass(frozen=True, slots=True)
class Shown:
    """A run, as its legend calls it."""

    name: str
    outcome: Outcome
    jobs: Mapping[int, SimJob]
    fleet: Fleet


@dataclass(slots=True)
class _Bins:
    """Amounts over time, each bin the integral over its part of it, in milliseconds."""

    begin_ms: int
    width_ms: float
    sums: list[float]

    def add(self, from_ms: int, to_ms: int, amount: float) -> None:
        """So much of something from one moment to the other."""
        first = int((from_ms - self.begin_ms) / self.width_ms)
        last = min(len(self.sums) - 1, int((to_ms - self.begin_ms) / self.width_ms))
        for place in range(first, last + 1):
            low = self.begin_ms + place * self.width_ms
            overlap_ms = min(to_ms, low + self.width_ms) - max(from_ms, low)
            self.sums[place] += amount * max(0.0, overlap_ms)


@dataclass(frozen=True, slots=True)
class _Course:
    """What went on in a run, by bins. `hours` is the middle of each."""

    hours: Sequence[float]
    width_ms: float
    held: Mapping[str, Sequence[float]]
    there: Mapping[str, Sequence[float]]
    waiting: Sequence[float]


def files(runs: Sequence[Shown]) -> dict[str, str]:
    """SVG texts by the names that their files should have."""
    courses = [_course(run) for run in runs]
    pairs = list(zip(runs, courses, strict=True))
    found = {f"utilisation-{_slug(run.name)}.svg": _utilisation(run, at) for run, at in pairs}
    queues = [Curve(run.name, list(zip(at.hours, _queue(at), strict=True))) for run, at in pairs]
    found["queue.svg"] = draw(
        Chart("Jobs that wait", "time since the first job came, h", "jobs", queues)
    )
    found["cost.svg"] = draw(
        Chart(
            "Cost of GPUs in use (in the legend: of the fleet, used or not)",
            "time since the first job came, h", "US dollars so far",
            [Curve(_with_cost(run), _cost(run, at)) for run, at in pairs],
        )
    )  # fmt: skip
    found["completion.svg"] = draw(
        Chart(
            "Completion times", "from its arrival to a job's end, h (logarithmic)",
            "of all jobs, %", [_distribution(run.name, _took_h(run)) for run in runs],
            log_x=True, y_max=100,
        )
    )  # fmt: skip
    found["fairness.svg"] = draw(
        Chart(
            "Finish-time fairness (right of the line: a job paid for others)",
            "time taken / time on a fleet shared equally (logarithmic)", "of all jobs, %",
            [_distribution(run.name, _fairness(run)) for run in runs],
            log_x=True, y_max=100, mark_x=1.0,
        )
    )  # fmt: skip
    return found


def _utilisation(run: Shown, at: _Course) -> str:
    curves = []
    for name in sorted(at.held):
        parts = zip(at.held[name], at.there[name], strict=True)
        percents = [100 * held / there if there else 0.0 for held, there in parts]
        curves.append(Curve(name, list(zip(at.hours, percents, strict=True))))
    return draw(
        Chart(
            f"GPUs in use by type: {run.name}", "time since the first job came, h",
            "of the GPUs that work, %", curves, y_max=100,
        )
    )  # fmt: skip


def _queue(at: _Course) -> list[float]:
    return [each / at.width_ms for each in at.waiting]


def _cost(run: Shown, at: _Course) -> list[tuple[float, float]]:
    """At the end of each bin."""
    spent, points = 0.0, [(0.0, 0.0)]
    for place, middle_h in enumerate(at.hours):
        for name, held in at.held.items():
            spent += held[place] / MS_PER_H * run.fleet.prices_per_h.get(name, 0.0)
        points.append((middle_h + at.width_ms / 2 / MS_PER_H, spent))
    return points


def _with_cost(run: Shown) -> str:
    begin_ms, end_ms = _span(run)
    dollars = (end_ms - begin_ms) / MS_PER_H * run.fleet.price_per_h
    return f"{run.name} (${dollars:,.0f})"


def _took_h(run: Shown) -> list[float]:
    ends = run.outcome.finished_ms
    return [(ends[n] - job.arrival_ms) / MS_PER_H for n, job in run.jobs.items()]


def _fairness(run: Shown) -> list[float]:
    fluid_ms = fluid_completions_ms(list(run.jobs.values()), run.fleet)
    ends = run.outcome.finished_ms
    return [(ends[n] - job.arrival_ms) / max(1.0, fluid_ms[n]) for n, job in run.jobs.items()]


def _distribution(name: str, values: Sequence[float]) -> Curve:
    """Which part of them is no more than each."""
    ordered = sorted(values)
    every = max(1, len(ordered) // POINTS_MAX)
    kept = [*range(0, len(ordered) - 1, every), len(ordered) - 1]
    points = [(ordered[place], 100 * (place + 1) / len(ordered)) for place in kept]
    return Curve(name, [(points[0][0], 0.0), *points], steps=True)


def _span(run: Shown) -> tuple[int, int]:
    begin_ms = min(job.arrival_ms for job in run.jobs.values())
    return begin_ms, max(run.outcome.finished_ms.values())


def _course(run: Shown) -> _Course:
    begin_ms, end_ms = _span(run)
    width_ms = max(1.0, (end_ms - begin_ms) / BINS)

    def bins() -> _Bins:
        return _Bins(begin_ms, width_ms, [0.0] * BINS)

    held = {name: bins() for name in run.fleet.gpus}
    there = {name: bins() for name in run.fleet.gpus}
    waiting = bins()
    working = dict(run.fleet.gpus)
    used = dict.fromkeys(working, 0.0)
    places: dict[int, Line] = {}
    waits: dict[int, None] = {}
    now_ms = begin_ms
    for group in instants(run.outcome.lines):
        to_ms = min(group[0].at_ms, end_ms)
        for name in working:
            held[name].add(now_ms, to_ms, used[name])
            there[name].add(now_ms, to_ms, working[name])
        waiting.add(now_ms, to_ms, len(waits))
        now_ms = max(now_ms, to_ms)
        for line in group:
            _enter(line, working, used, places, waits)
    return _Course(
        [(place + 0.5) * width_ms / MS_PER_H for place in range(BINS)],
        width_ms,
        {name: each.sums for name, each in held.items()},
        {name: each.sums for name, each in there.items()},
        waiting.sums,
    )


def _enter(
    line: Line,
    working: dict[str, int],
    used: dict[str, float],
    places: dict[int, Line],
    waits: dict[int, None],
) -> None:
    if line.what in ("fail", "mend"):
        working[line.gpu_type] += line.gpus if line.what == "mend" else -line.gpus
        return
    before = places.pop(line.job_id, None)
    if before is not None:
        used[before.gpu_type] -= _gpus_of(before)
    waits.pop(line.job_id, None)
    if line.what in ("start", "share"):
        places[line.job_id] = line
        used[line.gpu_type] += _gpus_of(line)
    elif line.what != "finish":
        waits[line.job_id] = None


def _gpus_of(line: Line) -> float:
    return line.gpus if line.partner is None else line.gpus / 2


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
