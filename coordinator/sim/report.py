"""What a simulation comes to: completion times, fairness, use and cost, all from its lines.

Problem: a mean hides whom it was paid by. So beside each mean stand the 99th percentile and the
worst; and beside what jobs took stands what they would have taken had the fleet been shared equally
among those present, each with its part of every type (the *fluid* fleet, which is the same for all
policies). The ratio of the two is finish-time fairness: above 1, a job paid for others.

*Busy* GPUs are held by a job; those of a job that is restarting are held, and not *training*. The
issue of idle GPUs arises while somebody waits, so both are also given for that time alone.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from coordinator.sim.checks import instants
from coordinator.sim.model import Fleet, Outcome, SimJob

MS_PER_S: Final = 1000.0
MS_PER_H: Final = 3_600_000.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one figure over all jobs."""

    mean: float
    p99: float
    worst: float


@dataclass(frozen=True, slots=True)
class Figures:
    """One policy on one trace. Ratios of use are over all GPU-seconds until the last job's end, and
    over those while a job waits. `late` jobs ended after their deadline, of `deadlines` that have
    one."""

    completion_h: Spread
    fairness: Spread
    makespan_h: float
    busy_ratio: float
    busy_waiting_ratio: float
    training_waiting_ratio: float
    provisioned_cost: float
    used_cost: float
    restarts: int
    trace_hash: str
    deadlines: int
    late: int


def figures(outcome: Outcome, jobs: Mapping[int, SimJob], fleet: Fleet) -> Figures:
    """All of them."""
    fluid_ms = fluid_completions_ms(list(jobs.values()), fleet)
    took_ms = {n: outcome.finished_ms[n] - job.arrival_ms for n, job in jobs.items()}
    begin_ms = min(job.arrival_ms for job in jobs.values())
    makespan_h = (max(outcome.finished_ms.values()) - begin_ms) / MS_PER_H
    use = _use(outcome, jobs, fleet)
    # A job of no steps would have taken no time: there is nothing to compare.
    fair = [took_ms[n] / max(1.0, fluid_ms[n]) for n, job in jobs.items() if job.steps > 0]
    gpus = sum(fleet.gpus.values())
    due_ms = {n: job.deadline_ms for n, job in jobs.items() if job.deadline_ms is not None}
    return Figures(
        completion_h=spread([ms / MS_PER_H for ms in took_ms.values()]),
        fairness=spread(fair or [1.0]),
        makespan_h=makespan_h,
        busy_ratio=use.held_ms / (makespan_h * MS_PER_H * gpus),
        busy_waiting_ratio=use.held_waiting_ms / use.waiting_ms if use.waiting_ms else 1.0,
        training_waiting_ratio=use.training_waiting_ms / use.waiting_ms if use.waiting_ms else 1.0,
        provisioned_cost=makespan_h * fleet.price_per_h,
        used_cost=use.cost,
        restarts=use.restarts,
        trace_hash=outcome.trace_hash,
        deadlines=len(due_ms),
        late=sum(outcome.finished_ms[n] > at_ms for n, at_ms in due_ms.items()),
    )


def spread(values: Sequence[float]) -> Spread:
    """The percentile is interpolated between neighbours, as numpy does it."""
    ordered = sorted(values)
    place = 0.99 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    p99 = ordered[low] + (ordered[high] - ordered[low]) * (place - low)
    return Spread(sum(ordered) / len(ordered), p99, ordered[-1])


@dataclass(slots=True)
class _Use:
    """GPU-milliseconds."""

    held_ms: float = 0.0
    held_waiting_ms: float = 0.0
    training_waiting_ms: float = 0.0
    waiting_ms: float = 0.0
    cost: float = 0.0
    restarts: int = 0


class _Held(NamedTuple):
    """What a job has, and from when on it trains there."""

    gpu_type: str
    gpus: float
    ready_ms: int


def _use(outcome: Outcome, jobs: Mapping[int, SimJob], fleet: Fleet) -> _Use:
    """Sums of GPUs by type, and beside them who is not ready yet: a line costs the same whether ten
    jobs run or thousands. GPUs are whole or halves and times whole milliseconds, so nothing is
    rounded."""
    use = _Use()
    held: dict[int, _Held] = {}
    unready: dict[int, _Held] = {}
    gpus_held: dict[str, float] = {}
    held_ms: dict[str, float] = {}
    begun: dict[int, bool] = {}
    waiting: dict[int, bool] = {}
    there = dict(fleet.gpus)
    now_ms = 0
    for group in instants(outcome.lines):
        at_ms, passed_ms = group[0].at_ms, group[0].at_ms - now_ms
        for name, gpus in gpus_held.items():
            held_ms[name] = held_ms.get(name, 0.0) + gpus * passed_ms
        if waiting:
            all_ms = sum(gpus_held.values()) * passed_ms
            idle_ms = sum(
                one.gpus * (min(at_ms, one.ready_ms) - now_ms) for one in unready.values()
            )
            use.held_waiting_ms += all_ms
            use.training_waiting_ms += all_ms - idle_ms
            use.waiting_ms += sum(there.values()) * passed_ms
        now_ms = at_ms
        for job_id in [n for n, one in unready.items() if one.ready_ms <= now_ms]:
            del unready[job_id]
        for line in group:
            if line.what in ("fail", "mend"):
                there[line.gpu_type] += line.gpus if line.what == "mend" else -line.gpus
                continue
            before = held.pop(line.job_id, None)
            unready.pop(line.job_id, None)
            if before is not None:
                gpus_held[before.gpu_type] -= before.gpus
            if line.what not in ("start", "share"):
                if line.what != "finish":
                    waiting[line.job_id] = True
                continue
            ready_ms = before.ready_ms if before is not None and line.what == "share" else now_ms
            if line.what == "start" and begun.get(line.job_id):
                use.restarts += 1
                ready_ms += round(jobs[line.job_id].restart_s * MS_PER_S)
            begun[line.job_id] = True
            gpus = line.gpus / 2 if line.partner is not None else line.gpus
            held[line.job_id] = one = _Held(line.gpu_type, gpus, ready_ms)
            gpus_held[line.gpu_type] = gpus_held.get(line.gpu_type, 0.0) + gpus
            if ready_ms > now_ms:
                unready[line.job_id] = one
            waiting.pop(line.job_id, None)
    use.held_ms = sum(held_ms.values())
    use.cost = sum(n / MS_PER_H * fleet.prices_per_h.get(name, 0.0) for name, n in held_ms.items())
    return use


def fluid_completions_ms(jobs: Sequence[SimJob], fleet: Fleet) -> dict[int, float]:
    """How long each job takes, from its arrival, where at every moment each of those present has an
    equal part of each type, and none more than the GPUs it asks for. Jobs that ask for as many go
    equally fast beside what they would alone, so these have one clock: each ends when it shows what
    it showed on its arrival, and the time that the job would take alone."""
    total = sum(fleet.gpus.values())
    arrivals = sorted(jobs, key=lambda job: (job.arrival_ms, job.job_id))
    clocks_ms: dict[int, float] = {}  # by the GPUs that are asked for, as are those who end by it
    ends: dict[int, list[tuple[float, int]]] = {}
    came_ms = {job.job_id: job.arrival_ms for job in jobs}
    took: dict[int, float] = {}
    now_ms, place = 0.0, 0
    while len(took) < len(arrivals):
        present = place - len(took)
        speeds = {gpus: min(1.0, total / present / gpus) for gpus, line in ends.items() if line}
        next_ms, job_id, size = min(
            (
                ((ends[gpus][0][0] - clocks_ms[gpus]) / speed, ends[gpus][0][1], gpus)
                for gpus, speed in speeds.items()
            ),
            default=(float("inf"), 0, 0),
        )
        comes_ms = arrivals[place].arrival_ms if place < len(arrivals) else float("inf")
        step_ms = min(next_ms, comes_ms - now_ms)
        for gpus, speed in speeds.items():
            clocks_ms[gpus] += speed * step_ms
        now_ms += step_ms
        if next_ms <= step_ms:
            heapq.heappop(ends[size])
            took[job_id] = now_ms - came_ms[job_id]
        else:
            job = arrivals[place]
            mixed = sum(fleet.gpus.get(n, 0) * rate for n, rate in job.rates.items()) / total
            end_ms = clocks_ms.setdefault(job.gpus, 0.0) + job.steps / mixed * MS_PER_S
            heapq.heappush(ends.setdefault(job.gpus, []), (end_ms, job.job_id))
            place += 1
    return took
