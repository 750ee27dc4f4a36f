"""Beside whom a job may not stand on a GPU that it shares, where one of the two shares only as far
as that pays (`share_automatic`).

Problem: who says "share, if it pays" has said nothing of with whom, and of two light trainings on a
GPU every fifth pair does less together than one alone. Nobody shall be put beside another one on
trust. So such a job has a GPU of its own wherever one is free, and else one company is tried, and
judged after two minutes (`coruns.py`):

1. Two at most, of one class: nobody who is guaranteed is slowed down by a spare job.
2. Only where a forecast gives it a chance (`pairs.py`): together 1.15 times what one does alone,
   and each 0.7 of its speed with a likelihood of a quarter. What was measured decides for itself.
3. Only beside one of whom it is known how fast he is alone: what cannot be judged is not tried.
4. Two that were parted are not put together again.

For placement whoever is refused has his GPU alone, until he leaves (`keeps.py`). Who waits is told
why, of those who have a GPU that he could share.
"""

from collections.abc import Mapping

from coordinator.core import coruns
from coordinator.core.keeps import Keep
from coordinator.core.model import CLASS_RANK, Attempt, Job
from coordinator.core.pairs import COMBINED_RATIO_MIN, KEPT_RATIO_MIN, TRIAL_CHANCE_MIN
from coordinator.core.state import Instant, State

# Of those who were refused, in a sentence.
NAMED_MAX = 2


def refused(state: State, now: Instant, job: Job) -> tuple[Keep, ...]:
    """Those who share a GPU, and with whom this one does not. Of many who wait most are alike, and
    between two events nothing changes."""
    spec, indices = job.spec, state.indices
    if not spec.shared_gpu_memory_bytes:
        return ()
    if indices.refused_ms != now.now_ms:
        indices.refused_ms = now.now_ms
        indices.refusals.clear()
    parted = coruns.too_slow_beside(state, job)
    key = spec.job_class, spec.share_automatic, coruns.member(spec), tuple(parted)
    if key not in indices.refusals:
        indices.refusals[key] = _refused(state, now, job, parted)
    return indices.refusals[key]


def _refused(state: State, now: Instant, job: Job, parted: Mapping[int, None]) -> tuple[Keep, ...]:
    spec = job.spec
    places: dict[tuple[str, str], None] = {}
    alone: list[str] = []
    reasons: list[str] = []
    for attempt_id in state.indices.open_attempts:
        attempt = state.attempts[attempt_id]
        its = state.jobs[attempt.job_id].spec
        pays = spec.share_automatic or its.share_automatic
        if not its.shared_gpu_memory_bytes or not pays:
            continue
        why = _why_not(state, now, job, attempt, parted)
        if not why:
            continue
        alone.append(attempt_id)
        node, uuid = attempt.node, attempt.gpu_uuids[0]
        places[node, uuid] = None
        live = state.nodes[node].gpus.get(uuid)
        if live is not None and live.holders == (attempt_id,):  # beside two nobody would be put
            reasons.append(f"not beside job {attempt.job_id} on {node}: {why}")
    if not alone:
        return ()
    rest = len(reasons) - NAMED_MAX
    said = "; ".join([*reasons[:NAMED_MAX], *([f"nor beside {rest} more"] if rest > 0 else [])])
    by_gpu = tuple((node, (uuid,)) for node, uuid in places)
    rank = CLASS_RANK[spec.job_class]
    return (Keep(0, rank, by_gpu, 0, None, "", alone=tuple(alone), why=said),)


def _why_not(
    state: State, now: Instant, job: Job, attempt: Attempt, parted: Mapping[int, None]
) -> str:
    """Why the two are not put together; empty where they may be."""
    other = state.jobs[attempt.job_id]
    if other.spec.job_class is not job.spec.job_class:
        return f"that one is {other.spec.job_class.value}"
    if other.id in parted:
        return "they were too slow together"
    said = coruns.forecast(state, job, attempt)
    if said.measured is not None and not said.worth_trying:
        one, its = said.measured
        return (
            f"two of their kinds kept {one:.2f} and {its:.2f} of their speeds, and"
            f" {KEPT_RATIO_MIN} is the least"
        )
    if not said.worth_trying and said.combined_ratio < COMBINED_RATIO_MIN:
        return (
            f"together they are expected to do {said.combined_ratio:.2f} times what one does alone,"
            f" and {COMBINED_RATIO_MIN} is the least"
        )
    if not said.worth_trying:
        return (
            f"that each keeps {KEPT_RATIO_MIN} of its speed is {100 * said.chance:.0f}% likely, and"
            f" {100 * TRIAL_CHANCE_MIN:.0f}% is the least"
        )
    if not coruns.is_known_alone(state, now, attempt):
        return "how fast that one is alone is not known yet"
    return ""
