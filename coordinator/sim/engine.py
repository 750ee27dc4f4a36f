"""Discrete events: time jumps from one thing that happens to the next.

Problem: a simulation is believed only if it cannot favour a policy. So the engine knows nothing of
policies but their answers: it does the work of each running job exactly, charges every job the same
restart (the GPUs are held, no step is made) whenever it starts again or elsewhere, and refuses an
answer that promises a GPU twice. Everything that happens at one instant is taken together before
the policy is asked; a seed decides what fails and how wrong the believed rates are.
"""

import hashlib
import heapq
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from coordinator.sim import saving
from coordinator.sim.model import (
    PACE_S,
    Chance,
    Fleet,
    Incremental,
    Line,
    News,
    Outcome,
    PairRates,
    Placement,
    Policy,
    Resting,
    Seen,
    SimJob,
    View,
)

MS_PER_S: Final = 1000
MS_PER_H: Final = 3_600_000
# A policy that leaves a job waiting for ever would never end: this many empty ticks are a bug.
IDLE_TICKS_MAX: Final = 10_000
# What happens first at one instant.
_FINISH, _MEND, _FAIL, _ARRIVE, _TICK = range(5)


class BrokenPolicy(ValueError):
    """A policy's answer cannot be carried out; the text says why."""


@dataclass(slots=True)
class _Run:
    """A job on its way. `advanced_ms` is up to when `steps` counts; it had then trained `trained_s`
    since it was ready, which is at `ready_ms`: before, it makes no step. `marks` are seconds that
    it had trained since then, and its steps, whenever it began or its rate changed. At its `rate`
    it works since `paced_ms`. Partners have one `seat`."""

    job: SimJob
    believed: SimJob
    steps: float = 0.0
    attained_gpu_s: float = 0.0
    placement: Placement | None = None
    since_ms: int = 0
    ready_ms: int = 0
    advanced_ms: int = 0
    trained_s: float = 0.0
    rate: float = 0.0
    paced_ms: int = 0
    seat: int = 0
    started: bool = False
    version: int = 0
    marks: list[tuple[float, float]] = field(default_factory=list)


@dataclass(slots=True)
class _Engine:
    fleet: Fleet
    policy: Policy
    chance: Chance
    pairs: PairRates
    capacity: dict[str, int]
    failures: random.Random
    passed: Callable[[int], None]
    resting: Resting | None
    incremental: Incremental | None
    heap: list[tuple[int, int, int, int]] = field(default_factory=list)
    runs: dict[int, _Run] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    finished_ms: dict[int, int] = field(default_factory=dict)
    broken: list[tuple[str, int]] = field(default_factory=list)
    events: int = 0
    used: dict[str, float] = field(default_factory=dict)
    seats: int = 0
    came: list[SimJob] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    # Something that news of jobs does not tell, or nothing has been decided yet.
    decide_all: bool = True
    ticked: bool = False

    def run(self, jobs: Mapping[int, SimJob]) -> None:
        arrivals = _believed(list(jobs.values()), self.fleet, self.chance)
        begin_ms = min((job.arrival_ms for job in jobs.values()), default=0)
        self._boot(begin_ms)
        for job in jobs.values():
            heapq.heappush(self.heap, (job.arrival_ms, _ARRIVE, job.job_id, 0))
        if self.chance.node_mtbf_h:
            self._plan_failure(begin_ms)
        idle_ticks, tick_ms = 0, -1
        while self.heap and len(self.finished_ms) < len(jobs):
            now_ms = self.heap[0][0]
            happened = False
            while self.heap and self.heap[0][0] == now_ms:
                _, kind, number, version = heapq.heappop(self.heap)
                happened |= self._happen(now_ms, kind, number, version, arrivals)
            if not happened:
                continue
            self._ask(now_ms)
            running = any(run.placement for run in self.runs.values())
            whole = self.capacity == dict(self.fleet.gpus)
            idle_ticks = 0 if running or not whole else idle_ticks + 1
            if idle_ticks > IDLE_TICKS_MAX:
                raise BrokenPolicy(f"{self.policy.name} leaves {len(self.runs)} jobs waiting")
            if self.policy.tick_ms and self.runs and tick_ms <= now_ms:
                tick_ms = (now_ms // self.policy.tick_ms + 1) * self.policy.tick_ms
                heapq.heappush(self.heap, (tick_ms, _TICK, 0, 0))
        if len(self.finished_ms) < len(jobs):
            raise BrokenPolicy(f"{self.policy.name} never runs {len(jobs) - len(self.finished_ms)}")

    def _happen(
        self, now_ms: int, kind: int, number: int, version: int, arrivals: Mapping[int, _Run]
    ) -> bool:
        """Whether it is worth a decision."""
        if kind == _FINISH:
            run = self.runs.get(number)
            if run is None or run.version != version:
                return False
            self._advance(run, now_ms)
            run.steps = run.job.steps
            self._leave(run, now_ms, "finish")
            del self.runs[number]
            self.ended.append(number)
            self.finished_ms[number] = now_ms
            self.passed(1)
        elif kind == _ARRIVE:
            self.runs[number] = arrivals[number]
            self.came.append(arrivals[number].believed)
            self.lines.append(Line(now_ms, "arrive", number))
        elif kind == _FAIL:
            self.decide_all = True
            self._fail(now_ms)
        elif kind == _TICK:
            self.ticked = True
        elif kind == _MEND:
            self.decide_all = True
            name, gpus = self.broken[number]
            self.capacity[name] += gpus
            self.lines.append(Line(now_ms, "mend", 0, name, gpus))
        self.events += 1
        return True

    def _advance(self, run: _Run, now_ms: int) -> None:
        if run.placement is not None:
            trained_s = self._trained_s(run, now_ms)
            run.steps += run.rate * (trained_s - run.trained_s)
            run.trained_s = trained_s
            held_s = (now_ms - run.advanced_ms) / MS_PER_S
            run.attained_gpu_s += held_s * _gpus_of(run.placement)
        run.advanced_ms = now_ms

    def _trained_s(self, run: _Run, at_ms: int) -> float:
        return saving.trained_s(max(0, at_ms - run.ready_ms) / MS_PER_S, self.chance)

    def _ask(self, now_ms: int) -> None:
        """Not at all where time alone changes nothing, and by the news alone where the policy can
        do with that."""
        quiet = not (self.came or self.ended or self.decide_all)
        if quiet and self.resting is not None and self.resting.at_rest:
            self.ticked = False
            for each in self.runs.values():
                self._advance(each, now_ms)
            return
        started = None
        if self.incremental is not None and not (self.decide_all or self.ticked):
            started = self.incremental.hear(News(now_ms, self.ended, self.came, self.chance.blind))
        self.came, self.ended, self.decide_all, self.ticked = [], [], False, False
        if started is None:
            self._decide(now_ms)
            return
        for job_id, place in started.items():
            run = self.runs.get(job_id)
            if run is None or run.placement is not None or place.partner is not None:
                raise BrokenPolicy(f"{self.policy.name}: job {job_id} cannot start on {place}")
            self._check_place(job_id, place)
            self._advance(run, now_ms)
            self.seats += 1
            run.seat = self.seats
            self._enter(run, place, now_ms)
        self._check_room(self.used)

    def _decide(self, now_ms: int) -> None:
        for run in self.runs.values():
            self._advance(run, now_ms)
        seen = [
            Seen(
                run.believed,
                None if self.chance.blind else max(0.0, run.job.steps - run.steps),
                run.attained_gpu_s,
                run.placement,
                run.since_ms,
                self._pace(run, now_ms),
            )
            for run in self.runs.values()
        ]
        wanted = self.policy.decide(View(now_ms, self.fleet, dict(self.capacity), seen))
        self._check(wanted)
        seats = self._seats(wanted)
        for job_id, run in self.runs.items():
            if run.placement is not None and seats.get(job_id) != run.seat:
                self._leave(run, now_ms, "stop")
            run.seat = seats.get(job_id, 0)
        for job_id, run in self.runs.items():
            place = wanted.get(job_id)
            if place is not None and place != run.placement:
                self._enter(run, place, now_ms)

    def _pace(self, run: _Run, now_ms: int) -> float | None:
        """Both of a pair must have worked for so long."""
        place = run.placement
        if place is None or (place.partner is not None and place.partner not in self.runs):
            return None
        begun_ms = run.paced_ms
        if place.partner is not None:
            begun_ms = max(begun_ms, self.runs[place.partner].paced_ms)
        return run.rate if now_ms - begun_ms >= PACE_S * MS_PER_S else None

    def _seats(self, wanted: Mapping[int, Placement]) -> dict[int, int]:
        """Whoever keeps its GPUs does not restart. Of a pair that is made or ends, or that changes
        partners, the one that has been there longest keeps them."""
        seats: dict[int, int] = {}
        taken: dict[int, None] = {}
        order = sorted(wanted, key=lambda job_id: (self.runs[job_id].since_ms, job_id))
        for job_id in order:
            run, place = self.runs[job_id], wanted[job_id]
            stays = run.placement is not None and run.placement[:2] == place[:2]
            if job_id in seats or not stays or run.seat in taken:
                continue
            for member in (job_id, place.partner):
                if member is not None:
                    seats[member] = run.seat
            taken[run.seat] = None
        for job_id in order:
            if job_id not in seats:
                self.seats += 1
                for member in (job_id, wanted[job_id].partner):
                    if member is not None:
                        seats[member] = self.seats
        return seats

    def _check(self, wanted: Mapping[int, Placement]) -> None:
        used = dict.fromkeys(self.capacity, 0.0)
        for job_id, place in wanted.items():
            self._check_place(job_id, place)
            if place.gpu_type not in used:
                raise BrokenPolicy(f"{self.policy.name}: the fleet has no {place.gpu_type}")
            if place.partner is not None:
                other = wanted.get(place.partner)
                if other != (place.gpu_type, place.gpus, job_id):
                    raise BrokenPolicy(f"{self.policy.name}: job {job_id} shares with nobody")
            used[place.gpu_type] += _gpus_of(place)
        self._check_room(used)

    def _check_place(self, job_id: int, place: Placement) -> None:
        run = self.runs.get(job_id)
        able = run is not None and run.job.rates.get(place.gpu_type, 0.0) > 0
        if run is None or not able or place.gpus != run.job.gpus:
            raise BrokenPolicy(f"{self.policy.name}: job {job_id} cannot run on {place}")

    def _check_room(self, used: Mapping[str, float]) -> None:
        for name, gpus in used.items():
            if gpus > self.capacity[name]:
                raise BrokenPolicy(
                    f"{self.policy.name}: {gpus:g} x {name} promised, {self.capacity[name]} there"
                )

    def _enter(self, run: _Run, place: Placement, now_ms: int) -> None:
        moved = run.placement is None
        self._use(run.placement, -1)
        self._use(place, 1)
        run.placement = place
        if moved:
            run.since_ms = now_ms
            run.ready_ms = now_ms + (round(run.job.restart_s * MS_PER_S) if run.started else 0)
            run.started = True
            run.marks = []
        run.trained_s = trained_s = self._trained_s(run, now_ms)
        run.marks.append((trained_s, run.steps))
        run.rate = self._rate(run, place)
        run.paced_ms = max(now_ms, run.ready_ms)
        self._note(run, now_ms, "start" if moved else "share")
        run.version += 1
        left_s = max(0.0, run.job.steps - run.steps) / run.rate
        ends_s = saving.elapsed_s(trained_s + left_s, self.chance)
        end_ms = max(now_ms, run.ready_ms + math.ceil(ends_s * MS_PER_S))
        heapq.heappush(self.heap, (end_ms, _FINISH, run.job.job_id, run.version))

    def _rate(self, run: _Run, place: Placement) -> float:
        if place.partner is None:
            return run.job.rates[place.gpu_type]
        other = self.runs[place.partner].job
        rate = self.pairs.get((place.gpu_type, run.job.model, other.model), 0.0)
        if rate <= 0:
            raise BrokenPolicy(f"{run.job.model} beside {other.model} makes no step")
        return rate

    def _leave(self, run: _Run, now_ms: int, what: str) -> None:
        self._note(run, now_ms, what)
        self._use(run.placement, -1)
        run.placement = None
        run.version += 1

    def _use(self, place: Placement | None, sign: int) -> None:
        if place is not None:
            before = self.used.get(place.gpu_type, 0.0)
            self.used[place.gpu_type] = before + sign * _gpus_of(place)

    def _note(self, run: _Run, now_ms: int, what: str) -> None:
        place = run.placement
        assert place is not None
        job_id = run.job.job_id
        self.lines.append(Line(now_ms, what, job_id, *place, run.steps))

    def _plan_failure(self, now_ms: int) -> None:
        nodes = sum(math.ceil(n / self.chance.node_gpus) for n in self.fleet.gpus.values())
        wait_h = self.failures.expovariate(nodes / self.chance.node_mtbf_h)
        heapq.heappush(self.heap, (now_ms + 1 + round(wait_h * MS_PER_H), _FAIL, 0, 0))

    def _fail(self, now_ms: int) -> None:
        """A node is gone; so are its jobs, chosen by the seed, with what they had not saved."""
        self._plan_failure(now_ms)
        whole = [name for name in sorted(self.capacity) if self.capacity[name] > 0]
        if not whole:
            return
        name = self.failures.choices(whole, [self.capacity[each] for each in whole])[0]
        nodes = math.ceil(self.capacity[name] / self.chance.node_gpus)
        first = self.failures.randrange(nodes) * self.chance.node_gpus
        last = min(first + self.chance.node_gpus, self.capacity[name])
        mend_h = self.chance.mend_h + self.chance.boot_s * MS_PER_S / MS_PER_H
        self._lose(name, last - first, now_ms, now_ms + round(mend_h * MS_PER_H))
        begin = 0.0
        hit = []
        for run in self.runs.values():
            place = run.placement
            if place is None or place.gpu_type != name:
                continue
            # Jobs lie side by side on the type's GPUs, in the order in which they came.
            end = begin + _gpus_of(place)
            if end > first and begin < last:
                hit.append(run)
            begin = end
        for run in hit:
            self._kill(run, now_ms)
        self._make_room(name, now_ms)

    def _boot(self, begin_ms: int) -> None:
        if self.chance.boot_s:
            for name, gpus in self.fleet.booting.items():
                ready_ms = begin_ms + round(self.chance.boot_s * MS_PER_S)
                self._lose(name, min(gpus, self.capacity[name]), begin_ms, ready_ms)

    def _lose(self, name: str, gpus: int, now_ms: int, back_ms: int) -> None:
        self.capacity[name] -= gpus
        self.broken.append((name, gpus))
        heapq.heappush(self.heap, (back_ms, _MEND, len(self.broken) - 1, 0))
        self.lines.append(Line(now_ms, "fail", 0, name, gpus))

    def _make_room(self, name: str, now_ms: int) -> None:
        """Whoever came last goes where the rest does not fit on what is left."""
        used = 0.0
        for run in list(self.runs.values()):
            place = run.placement
            if place is not None and place.gpu_type == name:
                used += _gpus_of(place)
                if used > self.capacity[name]:
                    self._kill(run, now_ms)

    def _kill(self, run: _Run, now_ms: int) -> None:
        if run.placement is None:
            return
        self._advance(run, now_ms)
        partner = run.placement.partner
        elapsed_s = max(0, now_ms - run.ready_ms) / MS_PER_S
        trained_s = self._trained_s(run, now_ms)
        run.marks.append((trained_s, run.steps))
        saved_s = trained_s - saving.unsaved_s(elapsed_s, self.chance)
        run.steps = _steps_at(run.marks, saved_s)
        self._leave(run, now_ms, "kill")
        if partner is not None:
            self._kill(self.runs[partner], now_ms)


def _gpus_of(place: Placement) -> float:
    """Half of them where it shares them."""
    return place.gpus if place.partner is None else place.gpus / 2


def _steps_at(marks: Sequence[tuple[float, float]], trained_s: float) -> float:
    """How far a job was when it had trained so long: between two marks its rate was one."""
    for (begin_s, steps), (end_s, more) in zip(reversed(marks[:-1]), reversed(marks), strict=False):
        if begin_s <= trained_s < end_s:
            return steps + (more - steps) * (trained_s - begin_s) / (end_s - begin_s)
    return marks[-1][1] if trained_s >= marks[-1][0] else marks[0][1]


def _believed(jobs: Sequence[SimJob], fleet: Fleet, chance: Chance) -> dict[int, _Run]:
    """Each with what policies are told of it: of types with enough GPUs, as production does."""
    chooser = random.Random(chance.seed)
    lengths_s = [job.steps / max(job.rates.values()) for job in jobs] if chance.blind else []
    typical_s = statistics.median(lengths_s) if lengths_s else 0.0
    runs = {}
    for job in jobs:
        rates = job.rates
        if chance.rate_error:
            rates = {
                name: rate * math.exp(chooser.gauss(0.0, chance.rate_error))
                for name, rate in sorted(job.rates.items())
            }
        able = {name: rate for name, rate in rates.items() if fleet.gpus.get(name, 0) >= job.gpus}
        told = job if able == job.rates else replace(job, rates=able)
        if chance.blind:
            told = replace(told, steps=typical_s * max(told.rates.values()))
        runs[job.job_id] = _Run(job, told)
    return runs


def simulate(
    jobs: Iterable[SimJob],
    fleet: Fleet,
    policy: Policy,
    chance: Chance | None = None,
    pairs: PairRates | None = None,
    *,
    passed: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Run all jobs to their end; `passed` is told of each that has ended. Raises `BrokenPolicy` for
    an answer that cannot be carried out, and `ValueError` for a job that no GPU of the fleet could
    ever run."""
    known = {job.job_id: job for job in jobs}
    for job in known.values():
        able = [t for t, rate in job.rates.items() if rate > 0 and fleet.gpus.get(t, 0) >= job.gpus]
        if not able:
            raise ValueError(f"job {job.job_id}: no GPU type of the fleet can run it on {job.gpus}")
    chance = chance or Chance()
    failures = random.Random(f"failures {chance.seed}")
    # Asked once: of a protocol that is a question of some microseconds.
    resting = policy if isinstance(policy, Resting) else None
    incremental = policy if isinstance(policy, Incremental) else None
    capacity = dict(fleet.gpus)
    engine = _Engine(
        fleet, policy, chance, pairs or {}, capacity, failures, passed, resting, incremental
    )
    engine.run(known)
    digest = hashlib.sha256()
    for line in engine.lines:
        digest.update(repr(tuple(line)).encode())
    return Outcome(engine.lines, engine.finished_ms, digest.hexdigest()[:16], engine.events)
