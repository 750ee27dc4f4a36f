"""How fast each job is on each type of GPU, kept at hand for decisions over all of them.

Problem: an estimate is milliseconds of arithmetic (`estimates.py`), and a decision needs one for
every job on every type. But it changes seldom: with the first minutes of a run, then with each
doubling of what has been measured. So what is known of other jobs is looked at once a minute and
learned from every ten; a job is estimated anew when it has been measured for twice as long; jobs of
one kind that have not run share an estimate; and of the dear ones a decision makes
`ESTIMATES_MAX`, the others go by facts until the next.

A job that was measured, itself or as the same training submitted before, is known in steps a
second. Of any other the ratios between types are known, by facts and by what the fleet has learned
of types. Of a type that nothing is known of nobody expects much: it is as the slowest of the
others, so that nobody is moved there; and where nothing is known of any, all are alike.

Types are learned from all jobs, also from the one that is asked for: in a fleet of hundreds that
counts it twice by next to nothing, since what it did itself outweighs what it says of types.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from coordinator.core import costs, estimates, fit, history, rates, workload
from coordinator.core.estimates import Estimate, Observation, Place
from coordinator.core.model import Job
from coordinator.core.phases import JobPhase
from coordinator.core.standing import FactsRequest, KnownRates, Rates, Speeds
from coordinator.core.state import Instant, State

SEEN_MS = 60_000
LEARNED_MS = 600_000
# Measurements that types are learned from here, the newest: half of the work of all of them, in
# between events, and the second digit is the same.
LEARNED_MAX = 128
# Of a job's own attempts, the newest, and of its family's measurements: a job is told apart by its
# own, and the work of an estimate grows with the cube of all.
OWN_MAX = 4
KIN_MAX = 8
# Between two estimates of a job that was not measured yet; then as long as it has run.
AGAIN_MS_MIN = 30_000
AGAIN_MS_WAITING = 600_000
# That condition on measurements, in one decision: some 50 ms.
ESTIMATES_MAX = 64
# Kinds of requests for which what facts say is remembered, some 500 bytes each.
BY_FACTS_MAX = 256
# Ended jobs that say what is typical of their project, the newest.
ENDED_MAX = 500


class Allowance:
    """How many dear estimates may still be made."""

    def __init__(self, count: int = ESTIMATES_MAX) -> None:
        self.left = count


def refresh(state: State, now: Instant) -> None:
    """Look at what the fleet has seen, if that was not done just now."""
    speeds = state.standing.speeds
    if speeds.seen_ms is not None and now.now_ms - speeds.seen_ms < SEEN_MS:
        return
    speeds.seen_ms = now.now_ms
    runs = history.seen(state, now).runs
    before, speeds.by_job, speeds.by_family = speeds.by_job, {}, {}
    observations = [fit.observation(run, None) for run in runs]
    for run, observation in zip(runs, observations, strict=True):
        speeds.by_job.setdefault(run.job, []).append(observation)
        if run.family:
            speeds.by_family.setdefault(run.family, []).append(observation)
    if speeds.learned_ms is None or now.now_ms - speeds.learned_ms >= LEARNED_MS:
        speeds.learned_ms = now.now_ms
        speeds.knowledge, speeds.by_facts = estimates.learn(observations[-LEARNED_MAX:]), {}
    speeds.typical_s = _typical(state, now)
    # Who waits may be known by now, as the same training that somebody else has begun.
    fresh = [name for name in speeds.by_job if name not in before]
    speeds.known = {
        key: kept
        for key, kept in speeds.known.items()
        if now.now_ms < kept.until_ms
        and (not key[0] or key[0] in state.jobs)
        and (kept.epoch or kept.name not in fresh)
    }


def _typical(state: State, now: Instant) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for job_id in list(state.ended)[-ENDED_MAX:]:
        job = state.jobs[job_id]
        gpus = job.spec.ranks * job.spec.gpus
        if job.phase is JobPhase.SUCCEEDED and gpus:
            had_gpu_s = costs.attained_gpu_s(state.attempts_of(job_id), now)
            found.setdefault(job.spec.project, []).append(had_gpu_s / gpus)
    return {project: median(seconds) for project, seconds in found.items()}


def of(
    state: State,
    now: Instant,
    job: Job,
    types: tuple[str, ...],
    allowance: Allowance,
    *,
    where: str = "",
) -> Rates:
    """Of a job, on each of these types. `where`: which types they are, to who asks; each keeps what
    it was told."""
    speeds = state.standing.speeds
    known = speeds.known
    kept = known.get((job.id, where))
    fresh = kept is not None and kept.epoch == job.epoch and kept.rates.types == types
    if kept is not None and fresh and now.now_ms < kept.until_ms:
        return kept.rates
    if job.epoch and allowance.left <= 0:
        if kept is None or not fresh:
            return _by_facts(speeds, _request(job, types))
        if kept.rates.absolute:
            return kept.rates
    family, name = history.names(job.spec)
    # The same training on the same GPUs, where nobody has begun with it.
    alike = None if job.epoch else (0, json.dumps([name, job.spec.ranks * job.spec.gpus, types]))
    found = None if alike is None else known.get(alike)
    if found is None or now.now_ms >= found.until_ms:
        kin, request = _kin(state, now, job, family, name), _request(job, types)
        if kin and allowance.left <= 0:
            return kept.rates if kept is not None and fresh else _by_facts(speeds, request)
        allowance.left -= bool(kin)
        by_kin = _estimated(speeds, request, name, kin) if kin else None
        rates_found = by_kin or _by_facts(speeds, request)
        again_ms = AGAIN_MS_WAITING
        current = state.current(job)
        if current is not None:
            ran_ms = now.unix_ms - current.assigned_unix_ms if rates_found.absolute else 0
            again_ms = max(AGAIN_MS_MIN, ran_ms)
        found = KnownRates(rates_found, job.epoch, now.now_ms + again_ms, name)
        if alike is not None:
            known[alike] = found
    known[job.id, where] = found
    return found.rates


def _kin(state: State, now: Instant, job: Job, family: str, name: str) -> list[Observation]:
    """What it did itself, what the same training did before it where it has done nothing yet, and
    then others of its family; the newest of each."""
    speeds = state.standing.speeds
    attempts = [one for one in state.attempts_of(job.id) if one.rank == 0][-OWN_MAX:]
    runs = [history.run_of(state, now, job, attempt) for attempt in attempts]
    own = [fit.observation(run, None) for run in runs if run is not None]
    kin = own or speeds.by_job.get(name, [])[-OWN_MAX:]
    others = [one for one in speeds.by_family.get(family, []) if one.job != name]
    room = KIN_MAX - len(kin)
    return [*kin, *(others[-room:] if room > 0 else [])]


def _by_facts(speeds: Speeds, request: FactsRequest) -> Rates:
    """Of one that nothing is measured of: the same for all that ask for as much, so it is estimated
    once until more is known of types."""
    if request not in speeds.by_facts:
        if len(speeds.by_facts) >= BY_FACTS_MAX:
            speeds.by_facts.clear()
        speeds.by_facts[request] = _estimated(speeds, request, "", ())
    return speeds.by_facts[request]


def _request(job: Job, types: tuple[str, ...]) -> FactsRequest:
    training = workload.read(job.spec)
    half = isinstance(training, workload.Training) and training.half
    return types, job.spec.ranks * job.spec.gpus, half


def _estimated(
    speeds: Speeds, request: FactsRequest, name: str, kin: Sequence[Observation]
) -> Rates:
    types, gpus, half = request
    absolute = any(one.job == name for one in kin)
    said: list[Estimate | None] = []
    for gpu_type in types:
        place = Place(gpu_type, gpus)
        prior = rates.place_prior(place, half=half)
        if not absolute:  # nobody knows the work, and ratios do not depend on it
            prior = replace(prior, work_known=True)
        said.append(estimates.estimate(speeds.knowledge, kin, name, place, prior))
    known = [one.steps_per_s for one in said if one is not None]
    least = min(known, default=1.0)
    return Rates(
        types,
        tuple(least if one is None else one.steps_per_s for one in said),
        tuple(0.0 if one is None else one.band[0] for one in said),
        absolute,
        told=bool(known),
    )
