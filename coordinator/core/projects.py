"""How projects stand by their quotas at one moment: who is within, who borrows, and the words for
it.

Problem: the same question is asked by a decision, by a job that waits, by one that has to give way
and by an operator, and the four answers must agree. So they are read from one `Standing`, which is
made of the state: what was used is in its ledger, who runs and who waits is counted here, and
`quotas.py` says what follows. Nothing is recorded for it, so a restart answers the same.

What is lent is recalled by the displacement that classes have: with a checkpoint, within the job's
grace, and only of one that has run for its minimum (`allocation.py`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from coordinator.core.allocation import RUN_PER_RESTART_MIN, Aims
from coordinator.core.ledger import gpu_parts
from coordinator.core.model import CLASS_RANK, Attempt, GpuFacts, Job, JobSpec
from coordinator.core.phases import AttemptPhase
from coordinator.core.project_requests import ProjectPage, ProjectView
from coordinator.core.quotas import (
    HALF_LIFE_H,
    MEAN_LIFE_H,
    NONE,
    PARTS,
    Claim,
    Quota,
    entitled_gpus,
    lending_weights,
    lent,
)
from coordinator.core.state import Instant, State
from coordinator.core.validate import suits

# Nothing happens when a job has run for its minimum or a day's use has faded: then it is looked.
RECALL_INTERVAL_MS: Final = 60_000
RUN_S_MIN: Final = Aims().run_s_min


@dataclass(frozen=True, slots=True)
class Standing:
    """`lent` are the jobs beyond their projects' quotas, running or not; `recallable` those of them
    that have run for their minimum; `minimum_s` is that of each that runs on what is lent."""

    quotas: Mapping[str, Quota] = field(default_factory=dict)
    used_h: Mapping[str, float] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    lent: Mapping[int, None] = field(default_factory=dict)
    recallable: Mapping[int, None] = field(default_factory=dict)
    minimum_s: Mapping[int, float] = field(default_factory=dict)

    def describe(self, project: str) -> str:
        quota = self.quotas.get(project, NONE)
        if not quota.gpu_hours:
            return f"project {project} has no quota"
        used, of = _number(self.used_h.get(project, 0.0)), f"{quota.gpu_hours:g}"
        return f"project {project} has used {used} of its {of} weighted GPU-hours a day"


def standing_of(state: State, now: Instant) -> Standing:
    """Empty where nobody has a quota."""
    quotas = state.options.projects
    if not quotas:
        return Standing()
    used_h = state.ledger.used_h(now.unix_ms)
    claims = (*_running(state), *_waiting(state, now))
    beyond = lent(claims, quotas, used_h)
    minimum_s: dict[int, float] = {}
    recallable: dict[int, None] = {}
    for claim in claims:
        first = state.current(state.jobs[claim.job_id])
        if claim.runs and claim.job_id in beyond and first is not None:
            minimum_s[claim.job_id] = _minimum_s(first)
            if now.unix_ms - first.assigned_unix_ms >= minimum_s[claim.job_id] * 1000:
                recallable[claim.job_id] = None
    return Standing(quotas, used_h, claims, beyond, recallable, minimum_s)


def tenants_of(state: State, now: Instant) -> Mapping[str, float]:
    """What the jobs of each project weigh beside others' of their class (`allocation.allocate`)."""
    return lending_weights(state.options.projects, state.ledger.used_h(now.unix_ms))


def tick(state: State, now: Instant) -> None:
    """Whoever waits may be entitled by now to what somebody has run on for long enough."""
    since_ms = now.now_ms - state.last_recall_ms
    if state.options.projects and state.queued and since_ms >= RECALL_INTERVAL_MS:
        state.last_recall_ms = now.now_ms
        state.dirty = True


def gives_back_ms(state: State, now: Instant, standing: Standing, job: Job) -> dict[str, int]:
    """When those of its class who run on what is lent, and not yet for their minimum, give it back
    to a job within its quota: by what their ranks have in common. Who is past it gives way in the
    next round, if that helps."""
    if job.id in standing.lent:
        return {}
    found = {}
    for job_id, minimum_s in standing.minimum_s.items():
        other = state.jobs[job_id]
        first = state.current(other)
        young = job_id not in standing.recallable
        if other.spec.job_class is job.spec.job_class and first is not None and young:
            left_ms = round(minimum_s * 1000) - (now.unix_ms - first.assigned_unix_ms)
            found[f"{job_id}.{other.epoch}"] = now.now_ms + max(0, left_ms)
    return found


# --- sentences ------------------------------------------------------------------------------------


def why_waits(state: State, standing: Standing, job: Job) -> str:
    """What quotas have to do with it, to be put after why it waits; empty for nothing."""
    project = job.spec.project
    if job.id in standing.lent:
        quota, used_h = standing.quotas.get(project, NONE), standing.used_h.get(project, 0.0)
        described = standing.describe(project)
        if used_h < quota.gpu_hours:
            has = _number(sum(c.gpus for c in standing.claims if c.runs and c.project == project))
            limit = _number(entitled_gpus(quota, used_h))
            described += f" and runs on {has} of the {limit} weighted GPUs that this leaves it now"
            described += _older(standing, job)
        return f"; {described}: jobs within their projects' quotas come before it"
    young = [
        (standing.minimum_s[job_id], job_id)
        for job_id in standing.minimum_s
        if job_id not in standing.recallable and _has_what_suits(state, job_id, job.spec)
    ]
    if not young:
        return ""
    minimum_s, job_id = min(young)
    has = f"job {job_id} has GPUs that are lent to {state.jobs[job_id].spec.project}"
    return f"; {has}, and gives them back when it has run for {minimum_s / 60:.0f} min"


def _older(standing: Standing, job: Job) -> str:
    """Those of its project that wait and come before it, which count as well; empty for none."""
    before = [
        claim
        for claim in standing.claims
        if not claim.runs and claim.project == job.spec.project and claim.job_id != job.id
        if claim.job_id not in standing.lent
    ]
    if not before:
        return ""
    gpus = _number(sum(claim.gpus for claim in before))
    who = "an older job of it that waits" if len(before) == 1 else f"{len(before)} older that wait"
    return f", of which {gpus} are for {who}"


def why_recalled(standing: Standing, victim: Job, job: Job) -> str:
    """To be put after to whom it gives way; empty where it does so for its class alone."""
    if victim.spec.job_class is not job.spec.job_class:
        return ""
    due, beyond = standing.describe(job.spec.project), standing.describe(victim.spec.project)
    return f": {due}; what this one runs on is lent, since {beyond}"


def why_runs(state: State, now: Instant, job: Job) -> str:
    """Of one that runs, where it may have to give way for it."""
    standing = standing_of(state, now)
    if job.id not in standing.lent:
        return ""
    described, kind = standing.describe(job.spec.project), job.spec.job_class.value
    return f"what it runs on is lent, since {described}; it gives way to {kind} jobs within theirs"


def _has_what_suits(state: State, job_id: int, spec: JobSpec) -> bool:
    """A job of the same class, and of its GPUs one would do."""
    other = state.jobs[job_id]
    if other.spec.job_class is not spec.job_class:
        return False
    return any(
        suits(spec, gpu.facts)
        for rank in state.gang(other)
        for uuid, gpu in state.nodes[rank.node].gpus.items()
        if uuid in rank.gpu_uuids
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


# --- who runs and who waits -----------------------------------------------------------------------


def _running(state: State) -> Iterable[Claim]:
    parts: dict[int, int] = {}
    for attempt_id in state.indices.open_attempts:
        attempt = state.attempts[attempt_id]
        if attempt.phase is not AttemptPhase.UNREACHABLE:
            more = state.ledger.parts(attempt_id)
            parts[attempt.job_id] = parts.get(attempt.job_id, 0) + more
    return [_claim(state.jobs[job_id], parts[job_id], runs=True) for job_id in parts]


def _waiting(state: State, now: Instant) -> Iterable[Claim]:
    """Whoever may start: one in back-off wants nothing yet."""
    known: dict[tuple[object, ...], int] = {}
    kinds = [GpuFacts("", *gpu) for kind in state.indices.kinds for gpu in kind[2]]
    found = []
    for job_id in state.queued:
        spec = state.jobs[job_id].spec
        if not spec.gpus or state.eligible_ms.get(job_id, 0) > now.now_ms:
            continue
        share = (spec.shared_gpu_memory_bytes, spec.share_automatic)
        key = (spec.gpu_types, spec.gpu_memory_bytes_min, *share)
        if key not in known:
            suited = [gpu_parts(spec, gpu) for gpu in kinds if suits(spec, gpu)]
            known[key] = max(suited, default=PARTS)  # it shall not start to be recalled at once
        claim = _claim(state.jobs[job_id], known[key] * spec.gpus * spec.ranks, runs=False)
        found.append(claim)
    return found


def _claim(job: Job, parts: int, *, runs: bool) -> Claim:
    """Ids are in the order of submission."""
    rank = CLASS_RANK[job.spec.job_class]
    return Claim(job.id, job.spec.project, rank, job.id, parts / PARTS, runs)


def _minimum_s(attempt: Attempt) -> float:
    """For how long it runs before its class may displace it, by what its start took."""
    times = attempt.times
    start_ms = (times.restore_ms or 0) + (times.start_ms or 0) + (times.ready_ms or 0)
    return max(RUN_S_MIN, RUN_PER_RESTART_MIN * start_ms / 1000)


# --- the answer to an operator --------------------------------------------------------------------


def list_projects(state: State, now: Instant) -> ProjectPage:
    """Those with a quota, and whoever has used something or has jobs."""
    quotas = state.options.projects
    used_h = state.ledger.used_h(now.unix_ms)
    claims = (*_running(state), *_waiting(state, now))
    beyond = lent(claims, quotas, used_h)
    names = sorted(dict.fromkeys([*quotas, *used_h, *(claim.project for claim in claims)]))
    idle = {name: _idle_gpus(quotas.get(name, NONE), name, claims, beyond) for name in names}
    borrowed = sum(claim.gpus for claim in claims if claim.runs and claim.job_id in beyond)
    idle_gpus = sum(idle.values())
    lent_ratio = min(1.0, borrowed / idle_gpus) if idle_gpus else 0.0
    views = []
    for name in names:
        mine = [claim for claim in claims if claim.project == name]
        runs, waits = [c for c in mine if c.runs], [c for c in mine if not c.runs]
        quota, used = quotas.get(name), used_h.get(name, 0.0)
        views.append(
            ProjectView(
                name,
                quota.gpu_hours if quota is not None else None,
                quota.weight if quota is not None else NONE.weight,
                used,
                entitled_gpus(quota, used) if quota is not None else 0.0,
                sum(claim.gpus for claim in runs),
                sum(claim.gpus for claim in runs if claim.job_id in beyond),
                idle[name] * lent_ratio,
                len(runs),
                len(waits),
                sum(claim.gpus for claim in waits),
            )
        )
    return ProjectPage(tuple(views), HALF_LIFE_H)


def _idle_gpus(
    quota: Quota, name: str, claims: Iterable[Claim], beyond: Mapping[int, None]
) -> float:
    """Of its part of the fleet, what it does not run on itself."""
    own = sum(c.gpus for c in claims if c.project == name and c.runs and c.job_id not in beyond)
    return max(0.0, quota.gpu_hours / MEAN_LIFE_H - own)
