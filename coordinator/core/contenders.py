"""The jobs and the fleet as a decision over all of them sees them (`allocation.py`).

Problem: the decision knows types, rates and hours, and the state knows nodes, attempts and reports.
What one is in terms of the other is said here, and nowhere else:

- A type is what `gpu_types.key_of` calls it; it counts what takes work, less what those hold that
  are no contenders: jobs that share a GPU, jobs on GPUs of several types, strays.
- An option of a job is each type of which the open nodes have enough for all of its ranks.
- How much is left of a job is known where its trainer says how many steps there are in all, or its
  configuration does, and it or the same training has been measured. Of a job where it is not known
  nothing is guessed from how long it has run, and it stays where it is: to its class it is as one
  that has just begun. Who would not gain by it for certain is not moved.
- A job that shares a GPU only where that pays is as any other of one GPU while it has one to
  itself, and while it waits. Once it has company the two are no contenders: whether they stay
  together is decided where they are (`coruns.py`).
- Jobs without GPUs and others that share one are no contenders: placement alone decides over them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from coordinator.core import costs, gpu_types, speeds, workload
from coordinator.core.allocation import Contender, Option
from coordinator.core.model import CLASS_RANK, Attempt, GpuFacts, Job, JobIntent, JobSpec
from coordinator.core.offers import open_rooms
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.rooms import Room
from coordinator.core.speeds import Allowance
from coordinator.core.standing import Entrant, Field, Fleet, Rates
from coordinator.core.state import Instant, State
from coordinator.core.validate import suits

# Of a job whose project has ended none yet: short enough to be tried, too long to go before those
# that say that they are short.
TYPICAL_S_DEFAULT = 3_600.0
# By so much before its deadline a job is to have ended: between two decisions nobody looks.
DEADLINE_MARGIN_MS = 60_000
RUNS = (AttemptPhase.ASSIGNED, AttemptPhase.RUNNING)


def competes(spec: JobSpec) -> bool:
    return spec.gpus > 0 and (spec.share_automatic or not spec.shared_gpu_memory_bytes)


def fleet_of(state: State) -> Fleet:
    """GPUs of open nodes that may get work, whoever has them; looked through again only when nodes
    have come, gone or changed (`kept_rooms.py`)."""
    rooms, kinds = open_rooms(state), len(state.indices.kinds)
    known = state.rooms.fleet
    if known is None or known.kinds != kinds:
        known = state.rooms.fleet = _fleet(rooms, kinds)
    return known


def _fleet(rooms: Sequence[Room], kinds: int) -> Fleet:
    facts: dict[str, dict[tuple[str, int], GpuFacts]] = {}
    counts: dict[str, Counter[int]] = {}
    types_on: dict[str, Mapping[str, str]] = {}
    for room in rooms:
        stock = room.by_type()
        types_on[room.offer.node] = stock.type_of
        for kind, gpu in stock.kinds.items():
            facts.setdefault(gpu_types.key_of(*kind), {}).setdefault(kind, gpu)
        for gpu_type, count in stock.counts.items():
            counts.setdefault(gpu_type, Counter())[count] += 1
    kinds_of = {gpu_type: tuple(some.values()) for gpu_type, some in sorted(facts.items())}
    return Fleet(kinds_of, dict(sorted(counts.items())), types_on, kinds)


def types_for(spec: JobSpec, fleet: Fleet) -> tuple[str, ...]:
    """Those of which the fleet, with nothing else on it, has enough for the job."""
    return tuple(
        gpu_type
        for gpu_type, counts in fleet.counts.items()
        if any(suits(spec, gpu) for gpu in fleet.facts[gpu_type])
        and sum(count // spec.gpus * nodes for count, nodes in counts.items()) >= spec.ranks
    )


def field_of(
    state: State, now: Instant, fleet: Fleet, jobs: Iterable[Job], lent: Mapping[int, None]
) -> Field:
    """Of these, who contend: everybody who waits for GPUs or has some. `lent` are those beyond
    their projects' quotas."""
    speeds.refresh(state, now)
    allowance = Allowance()
    suited: dict[tuple[object, ...], tuple[str, ...]] = {}
    entrants: list[Entrant] = []
    aside: list[Job] = []
    held: dict[str, None] = {}
    for job in jobs:
        spec = job.spec
        size = spec.gpu_memory_bytes_min, spec.shared_gpu_memory_bytes
        request = (spec.gpus, spec.ranks, spec.gpu_types, *size)
        if request not in suited:
            suited[request] = types_for(spec, fleet)
        at = place_of(state, job, fleet)
        if not competes(spec) or (at == "" and job.phase is JobPhase.ACTIVE):
            aside += [job] if spec.shared_gpu_memory_bytes and spec.deadline_unix_ms else []
            continue  # where it is nobody else could be, or nobody can say what that is worth
        rates = speeds.of(state, now, job, suited[request], allowance)
        before = state.standing.entrants.get(job.id)
        if before is None or not _is_as_before(state, before, job, rates, job.id in lent):
            before = _entrant(state, now, job, rates, at or "", before=before, lent=job.id in lent)
        entrants.append(before)
        if at:
            held.update(dict.fromkeys(u for rank in state.gang(job) for u in rank.gpu_uuids))
    state.standing.entrants = {entrant.job.id: entrant for entrant in entrants}
    capacity = {gpu_type: sum(counts.elements()) for gpu_type, counts in fleet.counts.items()}
    for live in state.nodes.values():
        # Whoever holds a GPU is an attempt of the node, or a stray.
        for uuid, gpu in live.gpus.items() if live.attempts or live.strays else ():
            gpu_type = fleet.type_of(live.node.id, uuid)
            if gpu_type and gpu.holders and uuid not in held and not _leaves(state, gpu.holders):
                capacity[gpu_type] -= 1
    return Field(tuple(entrants), capacity, tuple(aside))


def newcomer(
    state: State, now: Instant, job: Job, fleet: Fleet, allowance: Allowance | None = None
) -> Entrant:
    """One that has come since the last decision, by facts if its estimate is dear."""
    rates = speeds.of(state, now, job, types_for(job.spec, fleet), allowance or Allowance(1))
    return _entrant(state, now, job, rates, "")


def imagined(
    state: State, now: Instant, job: Job, types: tuple[str, ...], allowance: Allowance
) -> Contender:
    """One that waits, on types that the fleet may not have, or not switched on."""
    rates = speeds.of(state, now, job, types, allowance, where="imagined")
    return _entrant(state, now, job, rates, "").contender


def stands(state: State, entrant: Entrant, lent: Mapping[int, None]) -> bool:
    """Whether it is in the phase in which it was looked at, of the same attempt, and nobody wants
    anything else of it by now; a trial that waits still has its place. `lent` are those that are
    beyond their projects' quotas now."""
    was, job = entrant.job, state.jobs.get(entrant.job.id)
    return (
        job is not None
        and job.intent is JobIntent.RUN
        and (job.phase, job.epoch) == (was.phase, was.epoch)
        and (job.phase is not JobPhase.QUEUED or job.id in state.queued)
        and (job.id in lent) is entrant.contender.lent
        and job.id not in state.standing.promises
    )


def stays(state: State, entrant: Entrant, fleet: Fleet, lent: Mapping[int, None]) -> bool:
    """And whether it still waits, or still has GPUs of the same type to itself, which take work."""
    at = entrant.contender.at
    here = None if at is None else at.gpu_type
    return (
        stands(state, entrant, lent) and place_of(state, state.jobs[entrant.job.id], fleet) == here
    )


def place_of(state: State, job: Job, fleet: Fleet) -> str | None:
    """The type that all of a job's ranks are on; empty where it is on several, or on what takes no
    work, or beside somebody; `None` where it is on none, or about to leave."""
    if job.phase is not JobPhase.ACTIVE:
        return None
    gang = state.gang(job)
    if any(rank.phase not in RUNS for rank in gang):
        return None
    if job.spec.shared_gpu_memory_bytes and beside(state, gang[0]):
        return ""
    held = ((rank.node, uuid) for rank in gang for uuid in rank.gpu_uuids)
    types = list(dict.fromkeys(fleet.type_of(node, uuid) for node, uuid in held))
    return types[0] if len(types) == 1 else ""


def beside(state: State, attempt: Attempt) -> tuple[str, ...]:
    """The attempts that have its GPU with it."""
    live = state.nodes.get(attempt.node)
    gpu = None if live is None else live.gpus.get(attempt.gpu_uuids[0])
    return () if gpu is None else tuple(one for one in gpu.holders if one != attempt.id)


def since_ms(state: State, now: Instant, key: int | str, unix_ms: int) -> int:
    """When that was by the monotonic clock, which nobody sets: wall time is looked at once."""
    known = state.standing.since_ms
    if key not in known:
        known[key] = now.now_ms - max(0, now.unix_ms - unix_ms)
    return known[key]


def contending(state: State) -> list[Job]:
    """In the order of submission, also those that are not weighed and have a deadline."""
    ids = dict(state.queued)
    for attempt_id in state.indices.open_attempts:
        ids[state.attempts[attempt_id].job_id] = None
    jobs = [state.jobs[job_id] for job_id in sorted(ids)]
    return [
        job
        for job in jobs
        if (competes(job.spec) or job.spec.deadline_unix_ms)
        and job.intent is JobIntent.RUN
        and job.phase in (JobPhase.QUEUED, JobPhase.ACTIVE)
    ]


def _leaves(state: State, holders: Iterable[str]) -> bool:
    """Whether all who have it are about to give it back."""
    attempts = [state.attempts.get(holder) for holder in holders]
    return all(one is not None and one.phase is AttemptPhase.STOPPING for one in attempts)


def _is_as_before(state: State, before: Entrant, job: Job, rates: Rates, lent: bool) -> bool:
    """Of one that has never run, and so stays what it was: most of a long queue. A deadline is
    compared with a clock that may be set."""
    contender = before.contender
    return (
        not job.epoch
        and before.job is job
        and before.rates is rates
        and contender.lent is lent
        and contender.typical_gpu_s == _typical_gpu_s(state, job.spec)
        and not job.spec.deadline_unix_ms
        and contender.at is None
        and job.id not in state.standing.promises
    )


def _typical_gpu_s(state: State, spec: JobSpec) -> float:
    typical_s = state.standing.speeds.typical_s.get(spec.project, TYPICAL_S_DEFAULT)
    return spec.ranks * spec.gpus * typical_s


def _entrant(
    state: State,
    now: Instant,
    job: Job,
    rates: Rates,
    at: str,
    *,
    before: Entrant | None = None,
    lent: bool = False,
) -> Entrant:
    spec, current = job.spec, state.current(job)
    if before is not None and before.rates is rates:
        options = before.contender.options
    else:
        gpus, pairs = spec.ranks * spec.gpus, zip(rates.types, rates.mean, strict=True)
        options = tuple(Option(gpu_type, gpus, rate) for gpu_type, rate in pairs)
    steps_left = _steps_left(state, job, current) if rates.absolute else None
    known = steps_left is not None
    typical_gpu_s = _typical_gpu_s(state, spec)
    attained_gpu_s = costs.attained_gpu_s(state.attempts_of(job.id), now)
    began_ms = now.now_ms
    promise = state.standing.promises.get(job.id)
    if promise is not None:
        at, began_ms = promise.gpu_type, promise.since_ms
    elif at and known and current is not None:
        began_ms = since_ms(state, now, current.id, current.assigned_unix_ms)
    contender = Contender(
        job_id=job.id,
        options=options,
        rank=CLASS_RANK[spec.job_class],
        project=spec.project,
        submitted_ms=since_ms(state, now, job.id, job.submitted_unix_ms),
        steps_left=steps_left,
        attained_gpu_s=attained_gpu_s if known else min(attained_gpu_s, typical_gpu_s),
        typical_gpu_s=typical_gpu_s,
        at=next((option for option in options if option.gpu_type == at), None),
        since_ms=began_ms,
        restart_s=costs.restart_s(state, now, job),
        deadline_ms=_deadline_ms(now, spec),
        lent=lent,
    )
    return Entrant(job, contender, rates, known)


def _deadline_ms(now: Instant, spec: JobSpec) -> int | None:
    """By the clock that decisions compare; who sets the other one moves it."""
    if not spec.deadline_unix_ms:
        return None
    return now.now_ms + spec.deadline_unix_ms - now.unix_ms - DEADLINE_MARGIN_MS


def _steps_left(state: State, job: Job, current: Attempt | None) -> float | None:
    """Until its end, from where it is, or where it would go on; `None` where nobody has said how
    many there are."""
    said = None if current is None else state.progress.get(current.id)
    total = said.total_steps if said is not None else 0
    if not total:
        training = workload.read(job.spec)
        total = training.steps if isinstance(training, workload.Training) else 0
    if not total:
        return None
    done = job.head_step
    if said is not None and job.phase is JobPhase.ACTIVE:
        done = max(done, said.step)
    return float(max(0, total - done))
