"""By when a job wants to have ended: who has to start now for that, and what people are told of it.

Problem: a job that has to be done by nine in the morning is in no hurry at midnight, and at six it
is more urgent than anybody; a queue that knows neither serves it too early or too late. How long it
still needs is known of a training that says its steps and was measured, here or before. So each
decision over all jobs (`decisions.py`) says by when each must run at the latest, on the GPUs that
are best for it and with the cost of a restart (`allocation.latest_start_ms`).

From then on it is *late* while its deadline can still be kept (`allocation.is_late`: speeds are
estimates, so a tenth of what it needs is allowed for), and goes first in its class, after those
that were promised what others have left for it; who runs may be stopped for it as for any better
allocation (`moves.py`). Of several that are late whoever became it last comes first: his deadline
can still be kept, that of the others less and less. When it is lost there is nothing left to keep,
and a job is as any other: it may be stopped for one that can be in time. A deadline that cannot be
kept is told where it is seen: to whoever submits it, and to whoever asks.

Who shares a GPU whatever comes of it (`--share-gpu SIZE`) is taken to be as fast as beside one of
whom nothing is known. Who shares it only where that pays has it alone when that has to be
(`apart.py`): he is taken to be as fast as alone, where he is or would be.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from coordinator.core import contenders, coruns, foresight
from coordinator.core.allocation import is_late, latest_start_ms
from coordinator.core.contenders import DEADLINE_MARGIN_MS
from coordinator.core.model import Attempt, Job, JobSpec
from coordinator.core.phases import ATTEMPT_LIVE, JobPhase
from coordinator.core.speeds import Allowance
from coordinator.core.standing import Entrant, Fleet
from coordinator.core.state import Instant, State

# Nobody is moved who would have to start so soon: a move takes minutes.
CLOSE_MS = 900_000
OPEN_PHASES = (JobPhase.QUEUED, JobPhase.ACTIVE, JobPhase.HELD)


def refuse(now: Instant, spec: JobSpec) -> str:
    """A deadline that has passed when its job comes is a mistake."""
    if not spec.deadline_unix_ms or spec.deadline_unix_ms > now.unix_ms:
        return ""
    ago = foresight.seconds((now.unix_ms - spec.deadline_unix_ms) / 1000)
    return f"the deadline has passed {ago} ago; give a time to come, or none"


def late(state: State) -> dict[int, float]:
    """Those whose latest start had come at the last decision, and when that was; not those whose
    deadline was lost."""
    return state.standing.late_ms


def first(state: State) -> dict[int, tuple[int, float]]:
    """Those that go first in their class, and in which order: before those that are late, and also
    before their latest start, those for whom a node was rented, or it would be somebody else's when
    it comes. Of these all are in time if whoever has to run soonest comes first."""
    found = {job_id: (1, -latest_ms) for job_id, latest_ms in late(state).items()}
    rented_for = state.scaler.rented_for
    return {**found, **{job_id: (0, each.latest_ms) for job_id, each in rented_for.items()}}


def is_close(state: State, now: Instant, job: Job, within_ms: float = CLOSE_MS) -> bool:
    """Whether it has to run now, or within that time, to keep a deadline."""
    latest_ms = state.standing.latest_ms.get(job.id, math.inf)
    return job.id in late(state) or now.now_ms < latest_ms <= now.now_ms + within_ms


def must_be_alone(state: State, now: Instant, job: Job) -> bool:
    """Whether nobody may come beside one who shares only where that pays."""
    alone_ms = state.standing.alone_ms.get(job.id, math.inf)
    return is_close(state, now, job) or alone_ms <= now.now_ms + CLOSE_MS


def alone_by(now: Instant, entrants: Iterable[Entrant]) -> dict[int, float]:
    """By when those of them who share only where that pays must run alone, where they are and no
    faster type, to keep a deadline that can still be kept there."""
    found = {}
    for entrant in entrants:
        here = entrant.contender
        if not entrant.job.spec.share_automatic or not here.deadline_ms:
            continue
        here = here if here.at is None else replace(here, options=(here.at,))
        latest_ms = latest_start_ms(here)
        if latest_ms > now.now_ms or is_late(here, now.now_ms):
            found[entrant.job.id] = latest_ms
    return found


def must_start(now: Instant, job: Job, *, alone: bool = False) -> str:
    """For who gives way to it."""
    at = foresight.moment(now, _deadline_ms(now, job))
    return f"which has to run {'alone ' if alone else ''}now to keep its deadline {at}"


def entrants(
    state: State, now: Instant, jobs: Sequence[Job], fleet: Fleet, lent: Mapping[int, None]
) -> list[Entrant]:
    """Of jobs that share their GPUs, or will, as fast as each could be there; of who shares his
    whatever comes of it nothing follows any more once he runs. `lent` are those beyond their
    projects' quotas."""
    allowance = Allowance()
    found = []
    for job in jobs:
        attempt = state.current(job) if job.phase is JobPhase.ACTIVE else None
        if attempt is not None and not job.spec.share_automatic:
            continue
        entrant = contenders.newcomer(state, now, job, fleet, allowance)
        if attempt is None:
            entrant = _slowed(state, entrant)
        else:
            entrant = _there(entrant, coruns.type_of(state, attempt))
        if entrant.contender.options:
            contender = replace(entrant.contender, lent=job.id in lent)
            found.append(replace(entrant, contender=contender))
    return found


def _slowed(state: State, entrant: Entrant) -> Entrant:
    ratio = coruns.kept_ratio_expected(state, entrant.job)
    options = [replace(each, rate=ratio * each.rate) for each in entrant.contender.options]
    return replace(entrant, contender=replace(entrant.contender, options=tuple(options)))


def _there(entrant: Entrant, gpu_type: str) -> Entrant:
    options = tuple(each for each in entrant.contender.options if each.gpu_type == gpu_type)
    return replace(entrant, contender=replace(entrant.contender, options=options))


def warning(state: State, now: Instant, job: Job) -> str:
    """For who submits a job whose deadline cannot be kept on any GPU of the fleet; empty where it
    can, and where nobody knows."""
    if not job.spec.deadline_unix_ms:
        return ""
    at = foresight.moment(now, _deadline_ms(now, job))
    alone = contenders.newcomer(state, now, job, contenders.fleet_of(state))
    needs = _needs_too_long(now, alone)
    if needs:
        return f"its deadline {at} cannot be kept: it needs {needs}, the best"
    if not job.spec.shared_gpu_memory_bytes or job.spec.share_automatic:
        return ""
    needs = _needs_too_long(now, _slowed(state, alone))
    return (
        needs and f"its deadline {at} may be missed: beside others it is expected to need {needs}"
    )


def _needs_too_long(now: Instant, entrant: Entrant) -> str:
    """For how long it would run on the best GPUs, if that is until after its deadline."""
    contender = entrant.contender
    if not contender.options or latest_start_ms(contender) + DEADLINE_MARGIN_MS >= now.now_ms:
        return ""
    best = max(contender.options, key=lambda option: option.rate)
    need = foresight.seconds((contender.steps_left or 0.0) / best.rate)
    return f"about {need} on {best.gpu_type}"


def describe(state: State, now: Instant, job: Job) -> str:
    """For the sentence why it waits or runs; empty without a deadline, and when it is over."""
    if not job.spec.deadline_unix_ms or job.phase not in OPEN_PHASES:
        return ""
    deadline_ms = _deadline_ms(now, job)
    if deadline_ms <= now.now_ms:
        ago = foresight.seconds((now.now_ms - deadline_ms) / 1000)
        return f"; its deadline has passed {ago} ago, and it goes on as any other"
    at = foresight.moment(now, deadline_ms)
    attempt = state.current(job)
    if job.phase is JobPhase.ACTIVE and attempt is not None and attempt.phase in ATTEMPT_LIVE:
        end_ms = foresight.end_ms(state, now, attempt)
        if end_ms is None:
            return f"; its deadline is {at}"
        early = foresight.seconds(abs(deadline_ms - end_ms) / 1000)
        if end_ms <= deadline_ms:
            return f"; it is expected to end {early} before its deadline {at}"
        because = _of_company(state, now, job, attempt)
        return f"; it is expected to end {early} after its deadline {at}{because}"
    rented = state.scaler.rented_for.get(job.id)
    if rented is not None:
        nodes = "a node was" if rented.nodes < 2 else f"{rented.nodes} nodes were"
        return f"; {nodes} rented by the hour for its deadline {at}, and it goes first in its class"
    latest_ms = state.standing.latest_ms.get(job.id)
    if latest_ms is None:
        return f"; its deadline is {at}"
    if latest_ms == math.inf:
        return (
            f"; nobody knows when it has to start for its deadline {at}: it does not say how many"
            " steps it has, or no such training was measured"
        )
    told = _of_waiting(now, latest_ms, at, is_late=job.id in late(state))
    if job.spec.shared_gpu_memory_bytes and not job.spec.share_automatic:
        told += f", at {coruns.kept_ratio_expected(state, job):.2f} of its speed, since it shares"
    return told


def _of_company(state: State, now: Instant, job: Job, attempt: Attempt) -> str:
    """What comes of it for who shares a GPU and is too slow there; empty for any other."""
    if not job.spec.shared_gpu_memory_bytes or not contenders.beside(state, attempt):
        return ""
    if not job.spec.share_automatic:
        return ", beside others: nobody leaves for it, since it does not share by `auto`"
    latest_ms = state.standing.latest_ms.get(job.id, math.inf)
    if latest_ms == math.inf:
        return ""
    if latest_ms <= (state.standing.decided_ms or 0) and job.id not in late(state):
        return ", also alone"
    when = foresight.moment(now, round(latest_ms)) if latest_ms > now.now_ms else "now"
    return f" with company, and in time if it begins to run alone {when}"


def _of_waiting(now: Instant, latest_ms: float, at: str, *, is_late: bool) -> str:
    if latest_ms > now.now_ms:
        start = foresight.moment(now, round(latest_ms))
        when = f"from {start.removeprefix('at ')}" if start.startswith("at ") else start
        return f"; it goes first in its class {when}, for its deadline {at}"
    behind_ms = now.now_ms - latest_ms - DEADLINE_MARGIN_MS
    if behind_ms > 0:
        behind = foresight.seconds(behind_ms / 1000)
        if not is_late:
            return (
                f"; its deadline {at} cannot be kept: it would end about {behind} after it if it"
                " started now, and goes on as any other"
            )
        return (
            f"; it goes first in its class, and would end about {behind} after its deadline {at} if"
            " it started now"
        )
    return f"; it goes first in its class, to keep its deadline {at}"


def _deadline_ms(now: Instant, job: Job) -> int:
    return now.now_ms + job.spec.deadline_unix_ms - now.unix_ms
