"""What reservations mean for others: which room they do not see, and what is said of it.

Problem: rounds, moves and explanations all have to see the same room, and who makes reservations
(`reservations.py`) asks placement, which asks for this. So what follows from one stands apart from
how it is made.
"""

from coordinator.core import deadlines, foresight, projects
from coordinator.core.keeps import Keep, Reservation
from coordinator.core.model import CLASS_RANK, Job
from coordinator.core.sentences import listed
from coordinator.core.state import Instant, State
from coordinator.core.validate import suits


def _rank(job: Job) -> int:
    return CLASS_RANK[job.spec.job_class]


def keeps(state: State, now: Instant) -> tuple[Keep, ...]:
    """What others do not see."""
    if not state.reservations:
        return ()
    ends_ms = foresight.ends(state, now)
    lent = projects.standing_of(state, now).lent
    late = deadlines.late(state)
    found = []
    for rank, kept in sorted(state.reservations.items()):
        spec = state.jobs[kept.job_id].spec
        by_node: dict[str, list[str]] = {}
        for place in kept.places:
            by_node.setdefault(place.node, []).extend(place.gpu_uuids)
        most = max(len([p for p in kept.places if p.node == node]) for node in by_node)
        last = _last(state, kept, ends_ms)
        free_in_ms = None if last is None else max(0, last[0] - now.now_ms)
        found.append(
            Keep(
                kept.job_id, rank, tuple((node, tuple(uuids)) for node, uuids in by_node.items()),
                spec.memory_bytes * most, free_in_ms, _until(now, kept), kept.job_id in lent,
                () if kept.job_id in late else tuple(late),
            )
        )  # fmt: skip
    return tuple(found)


def _until(now: Instant, kept: Reservation) -> str:
    return f"{foresight.clock(now.unix_ms + kept.until_ms - now.now_ms)} at the latest"


def _holders(state: State, kept: Reservation) -> dict[str, int]:
    """Who is still there, by what they have in common, and their job."""
    found: dict[str, int] = {}
    for place in kept.places:
        live = state.nodes.get(place.node)
        for uuid in place.gpu_uuids if live is not None else ():
            gpu = live.gpus.get(uuid) if live is not None else None
            for holder in gpu.holders if gpu is not None else ():
                attempt = state.attempts.get(holder)
                if attempt is None:
                    found[holder] = 0
                    continue
                found[f"{attempt.job_id}.{attempt.epoch}"] = attempt.job_id
    return found


def _last(state: State, kept: Reservation, ends_ms: dict[str, int]) -> tuple[int, int] | None:
    """When the last one leaves, and of which job; `None`: nobody knows. Lower classes give way."""
    rank = CLASS_RANK[state.jobs[kept.job_id].spec.job_class]
    latest = (0, 0)
    for whole, job_id in _holders(state, kept).items():
        job = state.jobs.get(job_id)
        if job is not None and _rank(job) > rank:
            continue
        if whole not in ends_ms:
            return None
        latest = max(latest, (ends_ms[whole], job_id))
    return latest


def describe(state: State, now: Instant, job: Job) -> str:
    """What a job has reserved, for its reason; empty for none."""
    kept = state.reservations.get(_rank(job))
    if kept is None or kept.job_id != job.id:
        return ""
    free = 0
    names: dict[str, None] = {}
    nodes = dict.fromkeys(place.node for place in kept.places)
    count = sum(len(place.gpu_uuids) for place in kept.places)
    for place in kept.places:
        live = state.nodes[place.node]
        for uuid in place.gpu_uuids:
            names[live.gpus[uuid].facts.name] = None
            free += not live.gpus[uuid].holders and suits(job.spec, live.gpus[uuid].facts)
    on = listed([*list(nodes)[:4], *([f"{len(nodes) - 4} more"] if len(nodes) > 4 else [])])
    what = f"{free} of {count} x {', '.join(sorted(names))} on {on}"
    return f"; has {what} reserved until {_until(now, kept)}"


def outlook(state: State, now: Instant, job: Job) -> str:
    """What it still waits for there; empty where nobody knows."""
    kept = state.reservations.get(_rank(job))
    if kept is None or kept.job_id != job.id:
        return ""
    last = _last(state, kept, foresight.ends(state, now))
    if last is None or not last[1]:
        return ""
    left_s = max(0, last[0] - now.now_ms) // 1_000
    away = f"{left_s} s" if left_s < 120 else f"{left_s // 60} min"
    return f", the last expected free in {away} when job {last[1]} ends"
