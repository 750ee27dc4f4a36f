"""Judges of a simulation that believe only its lines.

Problem: the engine that does the work would hide its mistakes if it also vouched for it. So each
checker goes through the lines alone, with the jobs and the fleet as they were given, and computes
anew what must follow from them. A checker returns sentences; none means that it found nothing.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from coordinator.core.pairs import confirms
from coordinator.core.quotas import AHEAD_H, MEAN_LIFE_H, NONE, Quota
from coordinator.sim.model import Chance, Fleet, Line, Outcome, PairRates, SimJob

MS_PER_S: Final = 1000.0
# Ends are whole milliseconds, and sums of floating-point numbers have a last digit.
STEPS_ERROR_RATIO: Final = 1e-6
MS_PER_H: Final = 3_600_000.0
# Use is counted by the hour there and exactly here; only what is clear by both is judged.
CLEAR_RATIO: Final = 0.05
# What time alone changes is looked at so often.
LOOK_MS: Final = 600_000
RUN_S_MIN: Final = 600.0


@dataclass(slots=True)
class _Book:
    """Who runs on what after each line; `free` is what is left of the GPUs that work."""

    free: dict[str, float]
    running: dict[int, Line] = field(default_factory=dict)
    waiting: dict[int, int] = field(default_factory=dict)
    ranks: Mapping[int, int] = field(default_factory=dict)
    held: dict[tuple[str, int], float] = field(default_factory=dict)

    def enter(self, line: Line) -> None:
        if line.what == "arrive":
            self.waiting[line.job_id] = line.at_ms
        elif line.what in ("fail", "mend"):
            self.free[line.gpu_type] += line.gpus if line.what == "mend" else -line.gpus
        elif line.what in ("start", "share"):
            if line.what == "share":
                self._give(self.running[line.job_id], 1)
            self._give(line, -1)
            self.running[line.job_id] = line
            self.waiting.pop(line.job_id, None)
        else:
            self._give(self.running.pop(line.job_id), 1)
            if line.what != "finish":
                self.waiting[line.job_id] = line.at_ms

    def _give(self, line: Line, sign: int) -> None:
        gpus = sign * (line.gpus if line.partner is None else line.gpus / 2)
        self.free[line.gpu_type] += gpus
        key = (line.gpu_type, self.ranks.get(line.job_id, 0))
        self.held[key] = self.held.get(key, 0) - gpus

    def later(self, name: str, rank: int) -> float:
        """GPUs of a type that later classes have."""
        held = (n for (at, other), n in self.held.items() if at == name and other > rank)
        return sum(held, 0.0)


def instants(lines: Sequence[Line]) -> Iterator[list[Line]]:
    """Lines of one instant together: only what is true after all of them was ever the case."""
    group: list[Line] = []
    for line in lines:
        if group and line.at_ms != group[0].at_ms:
            yield group
            group = []
        group.append(line)
    if group:
        yield group


def check_capacity(outcome: Outcome, fleet: Fleet) -> list[str]:
    """No GPU is promised twice."""
    book = _Book({name: float(count) for name, count in fleet.gpus.items()})
    found = []
    for group in instants(outcome.lines):
        for line in group:
            book.enter(line)
        found += [
            f"at {group[0].at_ms} ms {-free:g} x {name} too many are promised"
            for name, free in book.free.items()
            if free < 0
        ]
    return found


def check_work(
    outcome: Outcome,
    jobs: Mapping[int, SimJob],
    pairs: PairRates | None = None,
    chance: Chance | None = None,
) -> list[str]:
    """Each job has done its steps, all of them in time that it had GPUs and was neither restarting
    nor saving; what a failure cost is taken from the line that tells of it, and is no more than
    what came after a checkpoint."""
    chance = chance or Chance()
    done = dict.fromkeys(jobs, 0.0)
    since: dict[int, float] = {}  # its steps when it last started, all of them saved
    fastest: dict[int, float] = {}
    runs: dict[int, _Stretch] = {}
    begun: dict[int, bool] = {}
    found = []
    for line in outcome.lines:
        if line.what in ("arrive", "fail", "mend"):
            continue
        job = jobs[line.job_id]
        stretch = runs.pop(line.job_id, None)
        if stretch is not None:
            done[line.job_id] += stretch.steps(line.at_ms)
        if line.what in ("start", "share"):
            rate = job.rates[line.gpu_type]
            if line.partner is not None:
                rate = (pairs or {})[line.gpu_type, job.model, jobs[line.partner].model]
            ready_ms = line.at_ms if stretch is None else stretch.ready_ms
            if stretch is None and begun.get(line.job_id):
                ready_ms += round(job.restart_s * MS_PER_S)
            begun[line.job_id] = True
            if line.what == "start":
                since[line.job_id], fastest[line.job_id] = done[line.job_id], 0.0
            fastest[line.job_id] = max(rate, fastest[line.job_id])
            runs[line.job_id] = _Stretch(line.at_ms, ready_ms, rate, chance)
        elif line.what == "kill":
            if line.steps > done[line.job_id] * (1 + STEPS_ERROR_RATIO):
                found.append(f"job {line.job_id} gained steps by a failure")
            most = fastest[line.job_id] * (chance.checkpoint_s or math.inf)
            kept = max(since[line.job_id], done[line.job_id] - most)
            if line.steps < kept * (1 - STEPS_ERROR_RATIO):
                lost = f"{done[line.job_id] - line.steps:.6g} steps to a failure"
                found.append(f"job {line.job_id} lost {lost}, and had saved {kept:.6g}")
            done[line.job_id] = line.steps
        elif stretch is not None:
            want = job.steps if line.what == "finish" else line.steps
            # A job ends with the millisecond in which its last step is made.
            slack = job.steps * STEPS_ERROR_RATIO + stretch.rate / MS_PER_S
            if abs(done[line.job_id] - want) > slack:
                made = f"{done[line.job_id]:.6g} of {job.steps:.6g} steps"
                found.append(f"job {line.job_id} says {want:.6g} at its {line.what}, made {made}")
    return found


@dataclass(frozen=True, slots=True)
class _Stretch:
    begin_ms: int
    ready_ms: int
    rate: float
    chance: Chance

    def steps(self, end_ms: int) -> float:
        return self.rate * (self._trained_s(end_ms) - self._trained_s(self.begin_ms))

    def _trained_s(self, at_ms: int) -> float:
        """Since it was ready: all of the time but the saves, those that are over and this one."""
        elapsed_s = max(0, at_ms - self.ready_ms) / MS_PER_S
        save_s, every_s = self.chance.save_s, self.chance.checkpoint_s
        if not save_s or not every_s:
            return elapsed_s
        over = int(elapsed_s / (every_s + save_s))
        saving_s = max(0.0, elapsed_s - over * (every_s + save_s) - every_s)
        return elapsed_s - over * save_s - saving_s


def check_pairs(
    outcome: Outcome, jobs: Mapping[int, SimJob], pairs: PairRates, trial_s: float
) -> list[str]:
    """Two share a GPU, each with the other; and two that are too slow by the rule of the core train
    beside one another for no longer than `trial_s`."""
    runs: dict[int, tuple[Line, int]] = {}  # how each runs, and when it was ready
    begun: dict[int, bool] = {}
    found = []
    for group in instants(outcome.lines):
        before = dict(runs)
        for line in group:
            old = runs.pop(line.job_id, None)
            if old is not None and old[0].partner is not None:
                other = before.get(old[0].partner, old)
                together_s = (line.at_ms - max(old[1], other[1], old[0].at_ms)) / MS_PER_S
                if together_s > trial_s and not _confirmed(old[0], jobs, pairs):
                    names = f"jobs {line.job_id} and {old[0].partner}"
                    found.append(f"{names} are too slow together and were so for {together_s:g} s")
            if line.what in ("start", "share"):
                ready_ms = old[1] if line.what == "share" and old is not None else line.at_ms
                if line.what == "start" and begun.get(line.job_id):
                    ready_ms += round(jobs[line.job_id].restart_s * MS_PER_S)
                begun[line.job_id] = True
                runs[line.job_id] = line, ready_ms
        for job_id, (line, _) in runs.items():
            partner = runs.get(line.partner or 0)
            if line.partner is not None and (partner is None or partner[0].partner != job_id):
                found.append(f"at {group[0].at_ms} ms job {job_id} shares with nobody")
    return found


def _confirmed(line: Line, jobs: Mapping[int, SimJob], pairs: PairRates) -> bool:
    """By the true speeds of the two."""
    one, other = jobs[line.job_id], jobs[line.partner or 0]
    kept = [
        pairs[line.gpu_type, job.model, beside.model] / job.rates[line.gpu_type]
        for job, beside in ((one, other), (other, one))
    ]
    return confirms(kept[0], kept[1])


def check_completions(outcome: Outcome, jobs: Mapping[int, SimJob]) -> list[str]:
    """What is reported is what the lines say, for every job, and none before it came."""
    said = {line.job_id: line.at_ms for line in outcome.lines if line.what == "finish"}
    found = [
        f"job {job_id} is reported done at {outcome.finished_ms.get(job_id)} ms, and was at {at_ms}"
        for job_id, at_ms in said.items()
        if outcome.finished_ms.get(job_id) != at_ms or at_ms < jobs[job_id].arrival_ms
    ]
    return found + [f"job {job_id} never ends" for job_id in jobs if job_id not in said]


def check_classes(outcome: Outcome, jobs: Mapping[int, SimJob], fleet: Fleet) -> list[str]:
    """Nobody waits for what a later class has, or for what is free."""
    ranks = {job_id: job.rank for job_id, job in jobs.items()}
    book = _Book({name: float(count) for name, count in fleet.gpus.items()}, ranks=ranks)
    fewest = min((job.gpus for job in jobs.values()), default=1)
    found = []
    for group in instants(outcome.lines):
        for line in group:
            book.enter(line)
        later_of = {
            (name, rank): book.later(name, rank)
            for name in book.free
            for rank in {jobs[job_id].rank: None for job_id in book.waiting}
        }
        if all(book.free[name] + later < fewest for (name, _), later in later_of.items()):
            continue
        for job_id in book.waiting:
            job = jobs[job_id]
            for name, rate in job.rates.items():
                later = later_of.get((name, job.rank), 0.0)
                if rate > 0 and book.free.get(name, 0) + later >= job.gpus:
                    found.append(
                        f"at {group[0].at_ms} ms job {job_id} waits for {job.gpus} x {name} with"
                        f" {book.free[name]:g} free and {later:g} of later classes"
                    )
    return found


def check_quotas(
    outcome: Outcome,
    jobs: Mapping[int, SimJob],
    fleet: Fleet,
    quotas: Mapping[str, Quota],
    weights: Mapping[str, float],
    *,
    patience_ms: int = 61_000,
) -> list[str]:
    """Nobody who is clearly within a quota waits for longer than `patience_ms`, in which a policy
    is asked anew, beside what is clearly lent within its class and has run for its minimum.
    `weights` are of GPU types."""
    book = _Book({name: float(count) for name, count in fleet.gpus.items()})
    judge = _QuotaJudge(jobs, quotas, weights, patience_ms, book)
    found = []
    for group in instants(outcome.lines):
        while book.waiting and judge.at_ms + LOOK_MS < group[0].at_ms:
            judge.advance(judge.at_ms + LOOK_MS)
            found += judge.look()
        judge.advance(group[0].at_ms)
        for line in group:
            book.enter(line)
        found += judge.look()
    return found


@dataclass(slots=True)
class _QuotaJudge:
    """Goes through time; `used_h` is up to `at_ms`, `wronged_ms` since when somebody waits beside
    what is lent."""

    jobs: Mapping[int, SimJob]
    quotas: Mapping[str, Quota]
    weights: Mapping[str, float]
    patience_ms: int
    book: _Book
    at_ms: int = 0
    used_h: dict[str, float] = field(default_factory=dict)
    wronged_ms: dict[int, int] = field(default_factory=dict)

    def advance(self, at_ms: int) -> None:
        left = math.exp(-(at_ms - self.at_ms) / MS_PER_H / MEAN_LIFE_H)
        rates: dict[str, float] = {}
        for job_id, line in self.book.running.items():
            project = self.jobs[job_id].project
            rates[project] = rates.get(project, 0.0) + line.gpus * self.weights[line.gpu_type]
        for project in {**self.used_h, **rates}:
            more_h = rates.get(project, 0.0) * MEAN_LIFE_H * (1 - left)
            self.used_h[project] = self.used_h.get(project, 0.0) * left + more_h
        self.at_ms = at_ms

    def look(self) -> list[str]:
        """Whoever has waited beside it for too long, once."""
        found: list[str] = []
        wronged: dict[int, int] = {}
        for job_id in self._first_in_line():
            job = self.jobs[job_id]
            for name, rate in job.rates.items():
                lent = self._recallable(job.rank, name)
                free = self.book.free.get(name, 0.0)
                if rate <= 0 or free + sum(gpus for _, gpus in lent) < job.gpus:
                    continue
                since_ms = self.wronged_ms.get(job_id, self.at_ms)
                wronged[job_id] = since_ms
                if self.at_ms - since_ms > self.patience_ms:
                    others = ", ".join(str(other) for other, _ in lent)
                    found.append(
                        f"at {self.at_ms} ms job {job_id} of {job.project} waits within its quota"
                        f" for {job.gpus} x {name}, which are lent to {others or 'nobody'}"
                    )
                    wronged[job_id] = self.at_ms
                break
        self.wronged_ms = wronged
        return found

    def _entitled_gpus(self, project: str, error_ratio: float) -> float:
        """As many as lead to the quota in the time ahead, with so much more used."""
        left = math.exp(-AHEAD_H / MEAN_LIFE_H)
        used_h = self.used_h.get(project, 0.0) * (1 + error_ratio)
        spare_h = self.quotas.get(project, NONE).gpu_hours * (1 - error_ratio) - used_h * left
        return max(0.0, spare_h / (1 - left) / MEAN_LIFE_H)

    def _first_in_line(self) -> list[int]:
        """Of each project the job that is its next, where it is clearly within the quota."""
        first: dict[str, tuple[int, int, int]] = {}
        for job_id in self.book.waiting:
            job = self.jobs[job_id]
            turn = (job.rank, job.arrival_ms, job_id)
            first[job.project] = min(first.get(job.project, turn), turn)
        found = []
        for project, (rank, _, job_id) in sorted(first.items()):
            job = self.jobs[job_id]
            best = max(job.rates, key=lambda name: job.rates[name])
            ahead = sum(
                line.gpus * self.weights[line.gpu_type]
                for other, line in self.book.running.items()
                if self.jobs[other].project == project and self.jobs[other].rank <= rank
            )
            wants = ahead + job.gpus * self.weights[best]
            if wants <= self._entitled_gpus(project, CLEAR_RATIO):
                found.append(job_id)
        return found

    def _recallable(self, rank: int, name: str) -> list[tuple[int, int]]:
        """Jobs of a class, with their GPUs of a type, that are clearly beyond their quotas and have
        run for their minimum."""
        found = []
        ahead: dict[str, float] = {}
        turns = sorted(
            (self.jobs[n].rank, self.jobs[n].arrival_ms, n, line)
            for n, line in self.book.running.items()
        )
        for own_rank, _, job_id, line in turns:
            job = self.jobs[job_id]
            before = ahead.get(job.project, 0.0)
            ahead[job.project] = before + line.gpus * self.weights[line.gpu_type]
            minimum_s = max(RUN_S_MIN, 10 * job.restart_s)
            old = self.at_ms - line.at_ms >= minimum_s * MS_PER_S
            beyond = before > self._entitled_gpus(job.project, -CLEAR_RATIO) or (
                self._entitled_gpus(job.project, -CLEAR_RATIO) <= 0
            )
            if own_rank == rank and line.gpu_type == name and old and beyond:
                found.append((job_id, line.gpus))
        return found
