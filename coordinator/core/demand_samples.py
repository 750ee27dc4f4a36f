"""What is wanted now: the GPUs of jobs that run and of jobs that wait, each job once.

Problem: a job that may run on several types of GPU waits for all of them and will take one. Counted
to each, demand is twice what comes; counted to none, nobody plans for it. And ten thousand jobs are
to be counted each minute, in the loop that everybody waits for.

How:
1. A job that waits counts as waiting, even while its last attempt is out of reach somewhere: that
   is the same work. Any other attempt that has not ended counts where it is. A share of a GPU
   counts as the part of it.
2. A job that waits counts where it would most likely go: the type that the last decision over all
   jobs puts first for it (`standing.py`), for that is where the next round looks first; else, of
   the types that it may have, the one of which the fleet has most, for most of what comes free is
   of it. Where the fleet has none, the type that it names first: that is a wish to be seen.
3. The fleet is all nodes that are known, those as well that are switched off or drained: a plan
   that closes a node must not move demand elsewhere by it.
4. What an attempt counts as is remembered as long as it is open, so that a sample looks at those
   that have come and gone; equal requests are looked at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from coordinator.core import gpu_types, shares
from coordinator.core.demand_history import OTHER, Series
from coordinator.core.model import Attempt, GpuFacts, JobClass, JobSpec
from coordinator.core.state import Instant, State
from coordinator.core.validate import suits

GROUPS_MAX: Final = 4_096  # of equal requests; then they are found anew
DIGITS: Final = 6  # of a GPU: what sums of shares lose is beyond


def due(state: State, now: Instant) -> int | None:
    """The minute of which a sample is to be taken: one has begun, and the clock is believed."""
    history = state.demand_history
    minute_ms, newest = state.options.demand_minute_ms, history.newest_minute
    newest_unix_ms = None if newest is None else newest * minute_ms
    doubted = history.clock.doubts
    if not history.clock.believes(now.now_ms, now.unix_ms, newest_unix_ms):
        if not doubted:
            sentence = (
                "wall time has jumped, or is more than a day before the newest sample of demand;"
                " none is taken until it has stayed as it is for a while"
            )
            state.log("warning", "demand.clock_doubted", reason=sentence)
        return None
    minute = now.unix_ms // minute_ms
    if newest is not None and newest - minute >= 1_440:
        state.records.append(history.rewind(minute - 1))
    elif newest is not None and minute <= newest:
        return None
    return minute


@dataclass(frozen=True, slots=True)
class Present:
    """Of a GPU type, now. `guaranteed_gpus` are those of both that are of that class."""

    running_gpus: float = 0.0
    queued_gpus: float = 0.0
    guaranteed_gpus: float = 0.0


def present(state: State) -> dict[str, Present]:
    """By GPU type: what runs, what waits, and what of it is guaranteed."""
    all_gpus: dict[str, float] = {}
    guaranteed: dict[str, float] = {}
    for series, gpus in wanted(state).items():
        all_gpus[series.gpu_type] = all_gpus.get(series.gpu_type, 0.0) + gpus
        if series.job_class == JobClass.GUARANTEED.value:
            guaranteed[series.gpu_type] = guaranteed.get(series.gpu_type, 0.0) + gpus
    running: dict[str, float] = {}
    for job_id, counts in state.demand_history.counted.held.values():
        if job_id not in state.queued:
            for series, gpus in counts:
                running[series.gpu_type] = running.get(series.gpu_type, 0.0) + gpus
    return {
        gpu_type: Present(
            round(running.get(gpu_type, 0.0), DIGITS),
            round(gpus - running.get(gpu_type, 0.0), DIGITS),
            round(guaranteed.get(gpu_type, 0.0), DIGITS),
        )
        for gpu_type, gpus in all_gpus.items()
    }


def homes(state: State, job_ids: Iterable[int]) -> dict[int, str]:
    """The GPU type that each of these, which wait, counts to."""
    fleet, found = _Fleet(state), {}
    for job_id in job_ids:
        preferred = state.standing.order.get(job_id)
        first = preferred[0][0] if preferred else ""
        found[job_id] = fleet.waits_for(state.jobs[job_id].spec, first)[0].gpu_type
    return found


def resume(state: State) -> None:
    """Before the first tick: what runs is looked at while nobody waits yet."""
    _count_held(state)
    state.demand_history.counted.left.update(state.ended)


def wanted(state: State) -> dict[Series, float]:
    """GPUs by series. What is of no series any more may be there with 0."""
    _count_held(state)
    found = dict(state.demand_history.counted.sums)
    for job_id, counts in state.demand_history.counted.held.values():
        if job_id in state.queued:
            for series, gpus in counts:
                found[series] -= gpus
    fleet = _Fleet(state)
    for (group, first), jobs in _count_waiting(state).items():
        series, gpus = fleet.waits_for(group, first)
        found[series] = found.get(series, 0.0) + jobs * gpus
    return {series: round(gpus, DIGITS) for series, gpus in found.items()}


def _count_held(state: State) -> None:
    counted, still_open = state.demand_history.counted, state.indices.open_attempts
    held, sums = counted.held, counted.sums
    for attempt_id in [known for known in held if known not in still_open]:
        job_id, counts = held.pop(attempt_id)
        counted.left[job_id] = None
        for series, gpus in counts:
            sums[series] -= gpus
    for attempt_id in [known for known in still_open if known not in held]:
        attempt = state.attempts[attempt_id]
        counts = counts_as(state, attempt)
        held[attempt_id] = attempt.job_id, counts
        for series, gpus in counts:
            sums[series] = sums.get(series, 0.0) + gpus
    if not held:
        sums.clear()


def _count_waiting(state: State) -> dict[tuple[JobSpec, str], int]:
    """How many jobs, by what they ask for and the type that is first for them; one of each group
    stands for it."""
    counted, order = state.demand_history.counted, state.standing.order
    if len(counted.groups) > GROUPS_MAX:
        counted.groups, counted.group_of = {}, {}
    group_of = counted.group_of
    sizes: dict[tuple[int, str], int] = {}
    one_of: dict[int, int] = {}
    for job_id in state.queued:
        group = group_of.get(job_id)
        if group is None:
            group = group_of[job_id] = _group(state, job_id)
        preferred = order.get(job_id)
        key = (group, preferred[0][0] if preferred else "")
        if key in sizes:
            sizes[key] += 1
        else:
            sizes[key], one_of[group] = 1, job_id
    if len(group_of) > 2 * len(state.queued) + GROUPS_MAX:
        counted.group_of = {job_id: group_of[job_id] for job_id in state.queued}
    specs = {group: state.jobs[job_id].spec for group, job_id in one_of.items()}
    return {
        (specs[group], first): size for (group, first), size in sizes.items() if specs[group].gpus
    }


def _group(state: State, job_id: int) -> int:
    spec = state.jobs[job_id].spec
    asks = (spec.gpus, spec.ranks, spec.gpu_types, spec.gpu_memory_bytes_min)
    whose = (spec.project, spec.job_class, spec.shared_gpu_memory_bytes)
    groups = state.demand_history.counted.groups
    return groups.setdefault((*asks, *whose), len(groups))


def counts_as(state: State, attempt: Attempt) -> tuple[tuple[Series, float], ...]:
    """By the facts of its node; where they are not known, by what its job asked for."""
    spec = state.jobs[attempt.job_id].spec
    live, gone = state.nodes.get(attempt.node), state.forgotten.get(attempt.node)
    facts = {gpu.uuid: gpu for gpu in gone.node.gpus} if gone is not None else {}
    parts: dict[str, float] = {}
    for uuid in attempt.gpu_uuids:
        known = None if live is None else live.gpus.get(uuid)
        gpu = facts.get(uuid) if known is None else known.facts
        gpu_type = _named(spec) if gpu is None else gpu_types.key_of(gpu.name, gpu.memory_bytes)
        parts[gpu_type] = parts.get(gpu_type, 0.0) + _part(spec, gpu)
    return tuple((_series(spec, gpu_type), part) for gpu_type, part in parts.items())


def _series(spec: JobSpec, gpu_type: str) -> Series:
    return Series(gpu_type, spec.project, spec.job_class.value)


def _named(spec: JobSpec) -> str:
    """The type that it names first."""
    return gpu_types.key_of(spec.gpu_types[0]) if spec.gpu_types else OTHER


def _part(spec: JobSpec, gpu: GpuFacts | None) -> float:
    return 1.0 if gpu is None else shares.ratio(spec, gpu)


class _Fleet:
    """What all nodes have, by kind of node (`indices.py`), and what was found out for this
    sample."""

    def __init__(self, state: State) -> None:
        self._kinds: list[tuple[int, list[GpuFacts]]] = [
            (len(nodes), [GpuFacts("", name, memory_bytes) for name, memory_bytes in gpus])
            for (_, _, gpus), nodes in state.indices.kinds.items()
        ]
        self._found: dict[tuple[object, ...], tuple[str, float]] = {}

    def waits_for(self, spec: JobSpec, first: str) -> tuple[Series, float]:
        """Where it counts, and as how much."""
        asks = (spec.gpus, spec.ranks, spec.gpu_types, spec.gpu_memory_bytes_min)
        key = (*asks, spec.shared_gpu_memory_bytes, first)
        if key not in self._found:
            self._found[key] = self._look(spec, first)
        gpu_type, part = self._found[key]
        return _series(spec, gpu_type), spec.ranks * spec.gpus * part

    def _look(self, spec: JobSpec, first: str) -> tuple[str, float]:
        counts: dict[str, int] = {}
        fitting: dict[str, int] = {}
        facts: dict[str, GpuFacts] = {}
        for nodes, gpus in self._kinds:
            here: dict[str, int] = {}
            for gpu in gpus:
                if suits(spec, gpu):
                    gpu_type = gpu_types.key_of(gpu.name, gpu.memory_bytes)
                    here[gpu_type] = here.get(gpu_type, 0) + 1
                    facts.setdefault(gpu_type, gpu)
            for gpu_type, count in here.items():
                counts[gpu_type] = counts.get(gpu_type, 0) + nodes * count
                fitting[gpu_type] = fitting.get(gpu_type, 0) + nodes * (count // spec.gpus)
        able = [gpu_type for gpu_type in counts if fitting[gpu_type] >= spec.ranks]
        if first in facts:
            chosen = first
        elif able or counts:
            chosen = min(able or counts, key=lambda gpu_type: (-counts[gpu_type], gpu_type))
        else:
            return _named(spec), 1.0
        return chosen, _part(spec, facts[chosen])
