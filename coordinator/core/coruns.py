"""Jobs that share a GPU are judged by what they do there, and parted when that is too little.

Problem: who asks for a share of a GPU gets it beside whoever is there, and two that are slower
together than one of them alone go on like that for days, unseen. How fast they are is known: each
agent tells the steps of its trainers once a second. What is missing is somebody who compares.

1. An attempt's time is cut into *stretches* of one company (`stretches.py`). One that has lasted
   for `TRIAL_S` of training is written into the attempt, and again each time that it is twice as
   long.
2. What it keeps of its speed is measured against itself alone: against an earlier stretch without
   company, or against what the same training did alone on such a GPU, also in another job. Where
   neither is known it is not judged, and `baton explain` says so.
3. Two whose speeds are known are confirmed or not by the rule of `pairs.py`. If not, the later one
   leaves by checkpoint as soon as a GPU is free that nobody waits for, else the earlier one, within
   the bounds of `stop_bounds.py`. Who has never saved is left alone: it might lose more than it
   gains.
4. Whoever has been bad beside another, or is expected to be by what their like did, goes beside it
   last: only where there is nothing else. It has asked to share a GPU, so it does not wait. What
   the two did themselves is not outweighed by others of their names: these may have been better
   together, and two that were parted would be put together again and again.
4. A job that shares only where it pays (`company.py`) leaves in any case when it does not, free GPU
   or not; and when it does, once a GPU is free that nobody waits for, it has run for its minimum,
   and is faster there alone by more than its restart costs.

What the fleet has seen of pairs is a function of the attempts that it keeps, as all its history.
Three and more on a GPU are not judged: whose fault it is, nobody can tell.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from coordinator.core import (
    attempts,
    contenders,
    costs,
    foresight,
    gpu_types,
    history,
    pairs,
    speeds,
    stop_bounds,
)
from coordinator.core.model import Attempt, GpuFacts, Job, JobIntent, JobSpec, Progress
from coordinator.core.offers import open_rooms
from coordinator.core.pairs import (
    KEPT_RATIO_MIN,
    TRIAL_S,
    Forecast,
    Lessons,
    Member,
    Sharer,
    Sharers,
    Sight,
)
from coordinator.core.phases import AttemptPhase
from coordinator.core.state import Instant, State
from coordinator.core.stretches import Stretch, Watch
from coordinator.core.validate import suits

# Fewer are no speed, however long they took.
STEPS_MIN = 5
# Of an attempt; who comes and leaves more often than that leaves the newest behind.
STRETCHES_MAX = 8
# A place elsewhere is looked for so often, and what others did alone: either takes a look at the
# whole fleet.
LOOK_MS = 10_000
# Where there are more attempts than that, less often: it is two milliseconds in the largest fleet.
LOOKERS_MAX = 1_000
# What a job is called takes its configuration apart; it is asked of all that share a GPU, and again
# for each that waits.
MEMBERS_KEPT = 4096
# Of how much a GPU is used, as drivers say it: with more, no two trainings would be alike.
UTILIZATION_DIGITS = 2
STRANGER = Member("")

# --- what is measured -----------------------------------------------------------------------------


def heard(state: State, now: Instant, attempt_id: str, progress: Progress) -> None:
    """What the trainer of an attempt that shares its GPU has just said."""
    attempt = state.attempts[attempt_id]
    if not state.share_bytes(attempt_id):
        return
    beside = _company(state, attempt)
    if beside is None:
        state.watches.pop(attempt_id, None)
        return
    watch = state.watches.get(attempt_id)
    timed = progress.time is not None
    spent_s = _spent_s(now, progress)
    same = watch is not None and (watch.beside, watch.timed) == (beside, timed)
    if watch is None or not same or progress.step < watch.step:
        state.watches[attempt_id] = Watch(beside, progress.step, spent_s, timed)
        state.paces.pop(attempt_id, None)  # with this company it may have another
        return
    steps, seconds = progress.step - watch.step, spent_s - watch.spent_s
    if steps >= STEPS_MIN and seconds >= max(TRIAL_S, 2 * watch.written_s):
        state.watches[attempt_id] = replace(watch, written_s=seconds)
        _write(state, now, attempt, Stretch(beside, steps, seconds))
    elif watch.written_s and len(beside) == 1 and now.now_ms - watch.looked_ms >= _look_ms(state):
        state.watches[attempt_id] = replace(watch, looked_ms=now.now_ms)
        _part(state, now, attempt, state.attempts[beside[0]])


def _look_ms(state: State) -> int:
    return LOOK_MS * (1 + len(state.indices.open_attempts) // LOOKERS_MAX)


def _spent_s(now: Instant, progress: Progress) -> float:
    """Seconds of training so far, or on the clock where a trainer does not say."""
    told = progress.time
    if told is None:
        return now.now_ms / 1000
    return told.step_s + told.evaluate_s + told.input_wait_s


def _company(state: State, attempt: Attempt) -> tuple[str, ...] | None:
    """Who has its GPU beside it; `None` while one of them does not train, or not any more."""
    live = state.nodes[attempt.node]
    there = live.gpus.get(attempt.gpu_uuids[0])
    if there is None or attempt.id not in there.holders:
        return None
    for holder in there.holders:
        known = state.attempts.get(holder)
        running = known is not None and known.phase is AttemptPhase.RUNNING
        if not running or holder not in state.progress:
            return None
    return tuple(sorted(holder for holder in there.holders if holder != attempt.id))


def _write(state: State, now: Instant, attempt: Attempt, stretch: Stretch) -> None:
    """Write a stretch into its attempt, and say what two are worth together once both have one."""
    gpu = _gpu(state, attempt)
    if gpu is None:
        return
    fresh = all(one.beside != stretch.beside for one in attempt.stretches)
    if stretch.beside:
        alone = _alone_per_s(state, now, attempt, gpu)
        kept = None if alone is None else stretch.steps / stretch.seconds / alone
        stretch = replace(stretch, kept_ratio=kept)
    else:
        stretch = replace(stretch, utilization_ratio=_utilization(state, attempt))
        # Now it is known how fast it is alone, which somebody may wait for.
        state.dirty = state.dirty or (fresh and bool(state.queued))
    others = [one for one in attempt.stretches if one.beside != stretch.beside]
    newest = (*others, stretch)[-STRETCHES_MAX:]
    attempt = state.put_attempt(replace(attempt, stretches=newest))
    if len(stretch.beside) == 1:
        other = state.attempts[stretch.beside[0]]
        if fresh and _beside(other, attempt) is not None:
            state.tell(
                now.unix_ms, attempt.job_id, "attempt.measured", _judgement(state, attempt, other),
                attempt=attempt.id, node=attempt.node,
            )  # fmt: skip
        _part(state, now, attempt, other)


def _gpu(state: State, attempt: Attempt) -> GpuFacts | None:
    live, gone = state.nodes.get(attempt.node), state.forgotten.get(attempt.node)
    there = None if live is None else live.gpus.get(attempt.gpu_uuids[0])
    if there is not None or gone is None:
        return None if there is None else there.facts
    return next((gpu for gpu in gone.node.gpus if gpu.uuid == attempt.gpu_uuids[0]), None)


def _utilization(state: State, attempt: Attempt) -> float | None:
    """By how much of the time its GPU was in use between the last two reports."""
    return state.nodes[attempt.node].gpus[attempt.gpu_uuids[0]].used_ratio


def _alone_per_s(state: State, now: Instant, attempt: Attempt, gpu: GpuFacts) -> float | None:
    """Steps a second of this training without company: its own, else those of its like on a GPU of
    this type, the longest."""
    own = [one for one in attempt.stretches if not one.beside]
    if own:
        return own[-1].steps / own[-1].seconds
    name = member(state.jobs[attempt.job_id].spec).name
    kind = name, gpu_types.key_of(gpu.name, gpu.memory_bytes)
    found = _of_stretches(state).get(kind) or _of_history(state, now).get(kind)
    return None if found is None else found[1]


def _of_stretches(state: State) -> dict[tuple[str, str], tuple[float, float]]:
    """What was measured without company, the longest: seconds and steps a second by training and
    type of GPU."""
    indices = state.indices
    if indices.alone is None:
        indices.alone = {}
        for attempt, job in _measured(state):
            kind = member(job.spec).name, type_of(state, attempt)
            for one in attempt.stretches if kind[1] else ():
                if not one.beside:
                    told = one.seconds, one.steps / one.seconds
                    indices.alone[kind] = max(told, indices.alone.get(kind, told))
    return indices.alone


def _of_history(state: State, now: Instant) -> dict[tuple[str, str], tuple[float, float]]:
    """The same of those who have asked for a GPU of their own, as it was at the last look."""
    indices = state.indices
    if indices.seen is None or now.now_ms - indices.seen[0] >= LOOK_MS:
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for run in history.seen(state, now).runs:
            if run.place.gpus == 1:
                told, kind = (run.seconds, run.steps_per_s), (run.job, run.place.gpu_type)
                found[kind] = max(told, found.get(kind, told))
        indices.seen = now.now_ms, found
    return indices.seen[1]


def type_of(state: State, attempt: Attempt) -> str:
    gpu = _gpu(state, attempt)
    return "" if gpu is None else gpu_types.key_of(gpu.name, gpu.memory_bytes)


def _measured(state: State) -> Iterator[tuple[Attempt, Job]]:
    """Attempts with stretches, the oldest job first."""
    known = [state.attempts[attempt_id] for attempt_id in state.indices.stretched]
    for attempt in sorted(known, key=lambda one: (one.job_id, one.epoch)):
        yield attempt, state.jobs[attempt.job_id]


# --- what follows ---------------------------------------------------------------------------------


def _beside(attempt: Attempt, other: Attempt) -> Stretch | None:
    """What it did while it had the GPU with just this one."""
    found = [one for one in attempt.stretches if one.beside == (other.id,)]
    return found[-1] if found else None


def _kept(attempt: Attempt, other: Attempt) -> tuple[float | None, float | None] | None:
    """What each kept of its speed, as far as that is known; `None` before both are measured."""
    one, its = _beside(attempt, other), _beside(other, attempt)
    return None if one is None or its is None else (one.kept_ratio, its.kept_ratio)


def _too_slow(attempt: Attempt, other: Attempt) -> bool:
    """Whether that is known of two."""
    known = [kept for kept in _kept(attempt, other) or () if kept is not None]
    if len(known) == 2:
        return not pairs.confirms(*known)
    # Of one that is that much slower it does not matter how fast the other is.
    return any(kept < KEPT_RATIO_MIN for kept in known)


def _part(state: State, now: Instant, attempt: Attempt, other: Attempt) -> None:
    """Of two that lose by one another one leaves, the later one if it may."""
    slow = _too_slow(attempt, other)
    may = slow or all(stop_bounds.has_run(state, now, one) for one in (attempt, other))
    may = may and (slow or stop_bounds.left(state) > 0)
    for leaving, staying in _later_first(attempt, other):
        job = state.jobs[leaving.job_id]
        automatic = job.spec.share_automatic
        if not job.head or not (slow or (automatic and may)):
            continue
        why = ""
        if free_elsewhere(state, job, leaving) and (
            slow or free_elsewhere(state, job, leaving, _no_gain(state, now, leaving, staying))
        ):
            why = "another GPU is free"
        elif slow and automatic:
            why = "it shares only where that pays"
        if why and slow and not stop_bounds.may_part(state, now, leaving):
            return  # it will, and the other one is not to leave in its place
        if why:
            why = f"{_verdict(leaving, staying)}; {why}"
            stop_bounds.note(state, now)
            attempts.stop(state, now, leaving, why, attempts.PRECOPY_PREEMPTION_MS)
            return


def _later_first(one: Attempt, other: Attempt) -> list[tuple[Attempt, Attempt]]:
    both = sorted((one, other), key=lambda a: (-a.assigned_unix_ms, -a.job_id))
    return [(both[0], both[1]), (both[1], both[0])]


def _no_gain(state: State, now: Instant, attempt: Attempt, other: Attempt) -> Sequence[str]:
    """The types of GPU on which it would do less alone than here beside the other, or not so much
    more that its restart is made up for until one of them ends, as far as that is known."""
    job = state.jobs[attempt.job_id]
    fleet = state.standing.fleet or contenders.fleet_of(state)
    rates = speeds.of(state, now, job, contenders.types_for(job.spec, fleet), speeds.Allowance(1))
    by_type = dict(zip(rates.types, rates.mean, strict=True))
    here = kept_ratio(state, attempt, other) * by_type.get(type_of(state, attempt), 0.0)
    ends_ms = [foresight.end_ms(state, now, one) for one in (attempt, other)]
    left_ms = min((end - now.now_ms for end in ends_ms if end is not None), default=math.inf)
    trains_ratio = 1 - costs.restart_s(state, now, job) * 1000 / max(1, left_ms)
    return [name for name, rate in by_type.items() if rate * trains_ratio < here]


def free_elsewhere(state: State, job: Job, attempt: Attempt, but: Collection[str] = ()) -> str:
    """The type of a GPU for it that nobody has, and that would do for nobody who waits; `but` of
    these types. Who saves to go on elsewhere has his first. Empty where there is none."""
    waiting = [state.jobs[job_id].spec for job_id in state.queued]
    leaving = _leaving(state)
    ahead = sum(one.gpus for one in leaving)
    for room in open_rooms(state):
        given_back = job.spec.memory_bytes if room.offer.node == attempt.node else 0
        if not room.offer.shares or room.memory_bytes + given_back < job.spec.memory_bytes:
            continue
        for gpu in room.free.values():
            gpu_type = gpu_types.key_of(gpu.name, gpu.memory_bytes)
            able = gpu.uuid not in room.holds and suits(job.spec, gpu) and gpu_type not in but
            if not able or any(one.gpus and suits(one, gpu) for one in waiting):
                continue
            if not ahead or not any(suits(one, gpu) for one in leaving):
                return gpu_type
            ahead -= 1
    return ""


def _leaving(state: State) -> list[JobSpec]:
    """What those ask for, by attempt, who were told to stop and are to run on."""
    found = [state.attempts[each] for each in state.indices.open_attempts]
    stopping = [each for each in found if each.phase is AttemptPhase.STOPPING]
    jobs = [state.jobs[each.job_id] for each in stopping]
    return [job.spec for job in jobs if job.intent is JobIntent.RUN and job.spec.gpus]


# --- what is said ---------------------------------------------------------------------------------


def describe(state: State, job: Job) -> str:
    """What its company costs a job that shares its GPU; empty for one that has none."""
    attempt = state.current(job)
    if attempt is None or not job.spec.shared_gpu_memory_bytes:
        return ""
    live = state.nodes.get(attempt.node)
    there = None if live is None else live.gpus.get(attempt.gpu_uuids[0])
    others = () if there is None else [one for one in there.holders if one != attempt.id]
    if job.spec.share_automatic and not others:
        return "it has its GPU to itself, and shares it with one other where that pays"
    if len(others) != 1 or others[0] not in state.attempts:
        return f"beside {len(others)} jobs, and of more than two none is judged" if others else ""
    other = state.attempts[others[0]]
    if _kept(attempt, other) is None:
        what = f"it takes {TRIAL_S:.0f} s of both to say what that costs"
        return f"beside job {other.job_id}; {_hope(state, job, other)}{what}"
    return _judgement(state, attempt, other)


def _judgement(state: State, attempt: Attempt, other: Attempt) -> str:
    """The verdict, and what follows from it."""
    verdict = _verdict(attempt, other)
    if not _too_slow(attempt, other):
        return verdict
    both = [state.jobs[one.job_id] for one in (attempt, other)]
    at_once = any(job.spec.share_automatic for job in both)
    return f"{verdict}; one of the two leaves when {'it has saved' if at_once else 'a GPU is free'}"


def _hope(state: State, job: Job, attempt: Attempt) -> str:
    """Why the two are tried; empty for those who asked to share whatever comes of it."""
    pays = job.spec.share_automatic or state.jobs[attempt.job_id].spec.share_automatic
    if not pays:
        return ""
    beside = member(state.jobs[attempt.job_id].spec)
    ratio = _lessons(state).about(member(job.spec), beside, type_of(state, attempt)).combined_ratio
    return f"together {ratio:.2f} times one alone are expected; "


def _verdict(attempt: Attempt, other: Attempt) -> str:
    """Of two that have both been measured."""
    one, its = _kept(attempt, other) or (None, None)
    with_whom = f"beside job {other.job_id}"
    unknown = [
        f"job {each.job_id}" for each, kept in ((attempt, one), (other, its)) if kept is None
    ]
    if one is None or its is None:
        verb = "is" if len(unknown) == 1 else "are"
        who = " and ".join(unknown)
        alone = f"how fast {who} {verb} alone is not known"
        if _too_slow(attempt, other):
            slow = one if one is not None else its
            which = "it" if one is not None else f"job {other.job_id}"
            return f"{with_whom}: {which} keeps {slow:.2f} of its speed; {alone}"
        return f"{with_whom}; {alone}, so it is not judged"
    told = f"together {one + its:.2g} times one alone"
    return f"{with_whom}, {told}: it keeps {one:.2f} of its speed, job {other.job_id} {its:.2f}"


# --- what is expected -----------------------------------------------------------------------------


def shunned(state: State, job: Job) -> frozenset[str]:
    """The attempts beside which a job goes last: what it did beside these jobs, or its like beside
    theirs, was too little. Of many who wait most are alike. (Who shares only where that pays goes
    beside all of them last: `shares.shuns`.)"""
    spec, indices = job.spec, state.indices
    if not spec.shared_gpu_memory_bytes or spec.share_automatic or not indices.stretched:
        return frozenset()
    was_beside = too_slow_beside(state, job)
    key = kind(state, spec), tuple(was_beside)
    if key not in indices.shunned:
        who, lessons = member(spec), _lessons(state)
        indices.shunned[key] = frozenset(
            each.attempt
            for each in sharers(state).every
            if each.job_id in was_beside or lessons.poor(who, each.who, each.gpu_type)
        )
    return indices.shunned[key]


def sharers(state: State) -> Sharers:
    """Who shares a GPU, the earliest first."""
    if state.indices.sharers is None:
        found = []
        for attempt_id in state.indices.open_attempts:
            if state.share_bytes(attempt_id):
                attempt = state.attempts[attempt_id]
                who = member(state.jobs[attempt.job_id].spec)
                found.append(Sharer(attempt_id, attempt.job_id, who, type_of(state, attempt)))
        names = dict.fromkeys(each.who.name for each in found)
        families = dict.fromkeys(each.who.family for each in found if each.who.family)
        state.indices.sharers = Sharers(tuple(found), names, families)
    return state.indices.sharers


def kind(state: State, spec: JobSpec) -> tuple[object, ...]:
    """Equal for jobs of which the same is forecast beside everybody who shares a GPU now."""
    who, there = member(spec), sharers(state)
    name = who.name if who.name in there.names else ""
    family = who.family if who.family in there.families else ""
    return name, family, _lessons(state).alike(who)


def forecast(state: State, job: Job, other: Sharer) -> Forecast:
    """Of a job beside one that runs."""
    return _lessons(state).about(member(job.spec), other.who, other.gpu_type)


def kept_ratio(state: State, attempt: Attempt, other: Attempt) -> float:
    """Of its speed beside this one: measured, or as it is expected."""
    kept, _ = _kept(attempt, other) or (None, None)
    if kept is not None:
        return kept
    one, its = (member(state.jobs[each.job_id].spec) for each in (attempt, other))
    return _lessons(state).about(one, its, type_of(state, attempt)).one.expected_ratio


def kept_ratio_expected(state: State, job: Job) -> float:
    """Of its speed beside one of whom nothing is known."""
    return _lessons(state).about(member(job.spec), STRANGER, "").one.expected_ratio


def is_known_alone(state: State, now: Instant, attempt: Attempt) -> bool:
    """Whether it is known how fast it is without company: else nobody can say what one costs."""
    gpu = _gpu(state, attempt)
    return gpu is not None and _alone_per_s(state, now, attempt, gpu) is not None


def too_slow_beside(state: State, job: Job) -> dict[int, None]:
    """The jobs beside which one of its attempts was that."""
    found: dict[int, None] = {}
    for attempt in state.attempts_of(job.id):
        for stretch in attempt.stretches:
            other = state.attempts.get(stretch.beside[0]) if len(stretch.beside) == 1 else None
            if other is not None and _too_slow(attempt, other):
                found[other.job_id] = None
    return found


@lru_cache(maxsize=MEMBERS_KEPT)
def member(spec: JobSpec) -> Member:
    family, name = history.names(spec)
    return Member(name, family)


def _lessons(state: State) -> Lessons:
    """Learned anew when something was written down since."""
    if state.indices.lessons is None:
        used = {
            member(job.spec).name: round(one.utilization_ratio, UTILIZATION_DIGITS)
            for attempt, job in _measured(state)
            for one in attempt.stretches
            if one.utilization_ratio is not None
        }
        state.indices.lessons = pairs.learn(_sights(state), used)
    return state.indices.lessons


def _sights(state: State) -> Iterator[Sight]:
    for attempt, job in _measured(state):
        gpu_type = type_of(state, attempt)
        for one in attempt.stretches:
            other = state.attempts.get(one.beside[0]) if len(one.beside) == 1 else None
            if other is not None and one.kept_ratio and gpu_type:
                beside = member(state.jobs[other.job_id].spec)
                yield Sight(member(job.spec), beside, gpu_type, one.kept_ratio, one.seconds)
