"""Why a job waits, or why it runs where it runs: one sentence with numbers, and what would change
that.

The reason is made where the decision is made (`placement.py`, `gangs.py`); this module only chooses
which holds at present, so that log, CLI and page cannot tell different stories. Who waits is also
told when he is expected to fit (`foresight.py`) and what would let him start (`advice.py`), who
runs when he is expected to end and whom he gives way to.
"""

from coordinator.core import (
    advice,
    coming,
    coruns,
    deadlines,
    flexible,
    foresight,
    poison,
    projects,
    reserved,
    restored,
    standby,
    trials,
)
from coordinator.core import needs as queue_of
from coordinator.core.explanations import ExpectedStart, Explanation
from coordinator.core.model import CLASS_ORDER, CLASS_RANK, Job
from coordinator.core.offers import offers_of
from coordinator.core.phases import ATTEMPT_LIVE, AttemptPhase, JobPhase
from coordinator.core.placement import kept_from, rooms_of
from coordinator.core.state import Instant, State, cut

# Jobs that an explanation looks at: a round over more takes longer than a question may.
WAITING_MAX = 1_000


def explain(state: State, now: Instant, job: Job) -> Explanation:
    """The sentence, and the figures in it."""
    sentence = _reason(state, now, job)
    if job.id in state.queued:
        starting = coming.coming(state, now, job)
        # Who has to run now for a deadline is urgent, whatever he said before.
        patience = "" if job.id in deadlines.late(state) else flexible.describe(job, now.unix_ms)
        sentence += patience + (f"; {starting}" if starting else "")
    sentence += deadlines.describe(state, now, job)
    if job.id in state.queued and not queue_of.blocked(state, now, job):
        return _outlook(state, now, job, sentence)
    attempt = state.current(job)
    runs = job.phase is JobPhase.ACTIVE and attempt is not None
    if not runs or attempt is None or attempt.phase is not AttemptPhase.RUNNING:
        return Explanation(cut(sentence))
    end_ms = foresight.end_ms(state, now, attempt)
    if any(rank.phase is not AttemptPhase.RUNNING for rank in state.gang(job)):
        end_ms = None
    higher = [known.value for known in CLASS_ORDER[: CLASS_RANK[job.spec.job_class]]]
    if higher:
        sentence += f"; gives way to {' and '.join(higher)} jobs"
    if end_ms is None:
        return Explanation(cut(sentence))
    sentence += f"; expected to end {foresight.moment(now, end_ms)}"
    return Explanation(cut(sentence), expected_end_unix_ms=_unix_ms(now, end_ms))


def _outlook(state: State, now: Instant, job: Job, sentence: str) -> Explanation:
    """What is to come for a job that waits for room, and what would let it start."""
    tenancy = projects.standing_of(state, now)
    lent = tenancy.lent
    queue = queue_of.in_turn(state, state.queued, lent)
    if len(queue) > WAITING_MAX:
        return Explanation(cut(sentence))
    need = queue_of.need_of(state, now, job, lent)
    ahead = [queue_of.need_of(state, now, other, lent) for other in queue[: queue.index(job)]]
    rooms = rooms_of(offers_of(state))
    kept = kept_from(need, reserved.keeps(state, now))
    sentence += reserved.outlook(state, now, job)
    found = None
    ends_ms = {
        whole: at_ms
        for whole, at_ms in foresight.ends(state, now).items()
        if not trials.followed(state, whole, job)
    }
    back_ms = {
        whole: at_ms
        for whole, at_ms in projects.gives_back_ms(state, now, tenancy, job).items()
        if at_ms < ends_ms.get(whole, at_ms + 1)
    }
    if not kept:  # else others' room is in its way, and nobody knows for how long
        found = foresight.forecast(need, ahead, rooms, {**ends_ms, **back_ms})
    start = None
    if found is not None:
        where = foresight.where(job.spec, found.places, rooms)
        leaver = int(found.whole.partition(".")[0])
        nodes = tuple(dict.fromkeys(place.node for place in found.places))
        start = ExpectedStart(_unix_ms(now, found.at_ms), nodes, where, leaver)
        leaves = "gives back what is lent to it" if found.whole in back_ms else "leaves"
        sentence += (
            f"; fits {where} {foresight.moment(now, found.at_ms)}, when job {leaver} {leaves}"
        )
        leaving = state.current(state.jobs[leaver])
        if leaving is not None and leaving.phase is AttemptPhase.STOPPING:
            sentence += " at the latest"
    suggestions, comes = advice.suggest(state, now, job, queue)
    if not comes and suggestions:
        sentence += f"; {', or '.join(suggestion.words for suggestion in suggestions)}"
    return Explanation(cut(sentence), start, None, suggestions)


def _unix_ms(now: Instant, at_ms: int) -> int:
    return now.unix_ms + at_ms - now.now_ms


def _reason(state: State, now: Instant, job: Job) -> str:
    reason = state.wait_reason(job)
    aside = poison.describe(state, job)
    tail = f"; {aside}" if aside and "set aside" not in reason else ""
    if job.phase is JobPhase.QUEUED:
        if job.id not in state.queued:  # of its array; and then it may not be able to, either
            reason = queue_of.blocked(state, now, job) or reason
        return f"job {job.id} waits: {reason}{tail}"
    if job.phase is JobPhase.HELD:
        if restored.is_unsure(job) or (job.trouble is not None and job.trouble.quarantined):
            return f"job {job.id} is held: {reason}"
        return f"job {job.id} is held: `baton release {job.id}` lets it start"
    attempt = state.current(job)
    if job.phase in (JobPhase.ACTIVE, JobPhase.CANCELLING) and job.spec.ranks > 1:
        return _explain_gang(state, now, job) + tail + _lent(state, now, job)
    if job.phase is JobPhase.ACTIVE and attempt is not None:
        age = foresight.seconds((now.unix_ms - attempt.assigned_unix_ms) / 1000)
        if attempt.phase is AttemptPhase.STOPPING:
            return f"job {job.id} is saving and leaving {attempt.node}: {attempt.stop_reason}"
        after = standby.describe(state, job, attempt.node, attempt.replica_node)
        tail += (f"; {after}" if after else "") + _lent(state, now, job)
        beside = coruns.describe(state, job)
        tail += f"; {beside}" if beside else ""
        return f"job {job.id} {reason}; attempt {attempt.id}, for {age}{tail}"
    if job.phase is JobPhase.CANCELLING and attempt is not None:
        return f"job {job.id} is being cancelled: attempt {attempt.id} is leaving {attempt.node}"
    if job.phase is JobPhase.FAILED:
        ran = any(known.started_unix_ms is not None for known in state.attempts_of(job.id))
        tail = f"; `baton logs {job.id}` shows what it wrote" if ran else ""
        return f"job {job.id} has failed: {reason}{tail}"
    verb = "is" if job.phase is JobPhase.CANCELLED else "has"
    return f"job {job.id} {verb} {job.phase.value}: {reason}"


def _lent(state: State, now: Instant, job: Job) -> str:
    why = projects.why_runs(state, now, job)
    return f"; {why}" if why else ""


def _explain_gang(state: State, now: Instant, job: Job) -> str:
    """All of its ranks, and those that are not as they should be."""
    gang = state.gang(job)
    left = [rank for rank in gang if rank.phase in ATTEMPT_LIVE]
    nodes = " and ".join(dict.fromkeys(rank.node for rank in left))
    what = f"{len(left)} of {len(gang)} ranks"
    if job.phase is JobPhase.CANCELLING:
        return f"job {job.id} is being cancelled: {what} are leaving {nodes}"
    stopped = next((rank for rank in left if rank.stop_reason), None)
    if stopped is not None:
        return f"job {job.id} is ending: {what} are leaving {nodes}: {stopped.stop_reason}"
    away = next((rank for rank in gang if rank.phase is AttemptPhase.UNREACHABLE), None)
    if away is not None:
        on = f"rank {away.rank} on {away.node} is out of reach"
        return f"job {job.id} runs with {what}, on {nodes}, and ends if {on} for longer"
    running = sum(1 for rank in gang if rank.phase is AttemptPhase.RUNNING)
    age = foresight.seconds((now.unix_ms - gang[0].assigned_unix_ms) / 1000)
    reason = state.wait_reason(job)
    return f"job {job.id} {reason}; try {job.epoch}, {running} of {len(gang)} running, for {age}"
