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
5. Not beside one who has to run alone, now or soon, to keep a deadline (`apart.py`).

For placement whoever is refused has his GPU alone, until he leaves (`keeps.py`). Who waits is told
why, of those who have a GPU that he could share.
"""

from collections.abc import Mapping

from coordinator.core import coruns, deadlines
from coordinator.core.keeps import Keep
from coordinator.core.model import CLASS_RANK, Job
from coordinator.core.pairs import COMBINED_RATIO_MIN, KEPT_RATIO_MIN, TRIAL_CHANCE_MIN, Sharer
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
        indices.known_alone.clear()
    parted = coruns.too_slow_beside(state, job)
    key = spec.job_class, spec.share_automatic, coruns.kind(state, spec), tuple(parted)
    if key not in indices.refusals:
        indices.refusals[key] = _refused(state, now, job, parted)
    return indices.refusals[key]


def _refused(state: State, now: Instant, job: Job, parted: Mapping[int, None]) -> tuple[Keep, ...]:
    alone: dict[str, list[str]] = {}
    named: list[str] = []
    rest = 0
    for other in coruns.sharers(state).every:
        its = state.jobs[other.job_id].spec
        pays = job.spec.share_automatic or its.share_automatic
        if not pays or _may_be(state, now, job, other, parted):
            continue
        attempt = state.attempts[other.attempt]
        alone.setdefault(attempt.node, []).append(attempt.id)
        live = state.nodes[attempt.node].gpus.get(attempt.gpu_uuids[0])
        if live is None or live.holders != (attempt.id,):  # beside two nobody would be put
            continue
        if len(named) < NAMED_MAX:
            why = _why_not(state, now, job, other, parted)
            named.append(f"not beside job {attempt.job_id} on {attempt.node}: {why}")
        else:
            rest += 1
    if not alone:
        return ()
    said = "; ".join([*named, *([f"nor beside {rest} more"] if rest else [])])
    by_node = tuple((node, frozenset(some)) for node, some in alone.items())
    return (Keep(0, CLASS_RANK[job.spec.job_class], (), 0, None, "", apart=by_node, why=said),)


def _may_be(
    state: State, now: Instant, job: Job, other: Sharer, parted: Mapping[int, None]
) -> bool:
    """Whether the two may be put together."""
    if state.jobs[other.job_id].spec.job_class is not job.spec.job_class:
        return False
    if _hurries(state, now, other):
        return False
    if other.job_id in parted or not coruns.forecast(state, job, other).worth_trying:
        return False
    known = state.indices.known_alone
    if other.attempt not in known:
        known[other.attempt] = coruns.is_known_alone(state, now, state.attempts[other.attempt])
    return known[other.attempt]


def _hurries(state: State, now: Instant, other: Sharer) -> bool:
    its = state.jobs[other.job_id]
    return its.spec.share_automatic and deadlines.must_be_alone(state, now, its)


def _why_not(
    state: State, now: Instant, job: Job, other: Sharer, parted: Mapping[int, None]
) -> str:
    """Of two that may not."""
    its = state.jobs[other.job_id].spec
    if its.job_class is not job.spec.job_class:
        return f"that one is {its.job_class.value}"
    if _hurries(state, now, other):
        return "that one has to run alone to keep its deadline"
    if other.job_id in parted:
        return "they were too slow together"
    said = coruns.forecast(state, job, other)
    if said.worth_trying:
        return "how fast that one is alone is not known yet"
    if said.measured is not None:
        one, kept = said.measured
        return (
            f"two of their kinds kept {one:.2f} and {kept:.2f} of their speeds, and"
            f" {KEPT_RATIO_MIN} is the least"
        )
    if said.combined_ratio < COMBINED_RATIO_MIN:
        return (
            f"together they are expected to do {said.combined_ratio:.2f} times what one does alone,"
            f" and {COMBINED_RATIO_MIN} is the least"
        )
    return (
        f"that each keeps {KEPT_RATIO_MIN} of its speed is {100 * said.chance:.0f}% likely, and"
        f" {100 * TRIAL_CHANCE_MIN:.0f}% is the least"
    )
