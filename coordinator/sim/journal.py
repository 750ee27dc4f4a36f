"""This fleet's own past as a trace: jobs, rates and GPUs from its coordinator's records.

Problem: a public trace answers for somebody else's fleet. The coordinator's records hold what is
needed for one's own: when each job came, how many GPUs it asked for, how much it trained and where,
what its restarts took. What they do not hold is filled in, and counted, so that the answer says how
much of it was seen:

- *Rates* on a type where a job trained are measured: its steps over its productive time. A program
  that does not tell its steps makes one a second where it trained most. On other types they are
  guessed (`guesses.py`) with all that the fleet has seen (`history.py`).
- *Work* of a job that has ended is what it made, less what it made twice. One that still runs or
  waits needs the steps that its configuration says, or as long as jobs of its project typically
  do, and no less than it has had.
- *Trials* that the limit of their array held back come when they began: in a trace that knows no
  arrays, that is when their owner wanted them. Those that have not begun come when the records end.
- *Restarts* take a job's own median of restoring and starting, or the fleet's.

Left out are jobs that ask for no GPU, that ended or are held without having trained, and that no
GPU of the fleet could run. A job that shares its GPU is given all of it. GPUs are those of nodes
that are not drained, less those that are cordoned for their health.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from coordinator.core import accounting, arrays, estimates, gpu_types, history, rates, workload
from coordinator.core.estimates import Knowledge, Measurement, Observation, Place
from coordinator.core.model import CLASS_RANK, Attempt, GpuFacts, Job, JobSpec, Snapshot
from coordinator.core.options import Options
from coordinator.core.phases import JOB_ENDED, JobPhase, NodeIntent
from coordinator.core.state import Instant, State
from coordinator.core.validate import suits
from coordinator.core.workload import Training
from coordinator.sim.guesses import guess, halves, known_as, measurement, public
from coordinator.sim.model import Fleet, SimJob

LENGTH_S_DEFAULT: Final = 3600.0  # of a job, where none has ended yet
RESTART_S_DEFAULT: Final = 60.0
SECONDS_MIN: Final = 1.0  # of training, or it is none
NO_GPU, NEVER_RAN, NOWHERE = "ask for no GPU", "never trained", "fit no GPU of the fleet"
_CLOSED = (NodeIntent.DRAINED, NodeIntent.DRAINING)


@dataclass(frozen=True, slots=True)
class Recorded:
    """Jobs in the order in which they came, the first at 0; `facts` is one GPU of each type.
    `measured` and `guessed` count rates, `typical` jobs whose work is not known; `left_out` is by
    the reason."""

    jobs: Sequence[SimJob]
    fleet: Fleet
    facts: Mapping[str, GpuFacts]
    measured: int
    guessed: int
    typical: int
    left_out: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Story:
    """What one job did: seconds of training by type, what it measured there, and its steps; None:
    it told none. `total_steps` is what its trainer said that there are in all; 0: it did not."""

    job: Job
    gpus: int
    half: bool
    trained_s: Mapping[str, float]
    measured: Sequence[Measurement]
    steps: float | None
    restarts_s: Sequence[float]
    total_steps: int = 0
    came_unix_ms: int = 0

    @property
    def total_s(self) -> float:
        return sum(self.trained_s.values())


def recorded(snapshot: Snapshot, extra: Iterable[str] = ()) -> Recorded:
    """Trace and fleet of a coordinator's records, with rates on the types `extra` as well."""
    state = State(Options())
    state.load(snapshot, 0)
    now = Instant(0, _last_unix_ms(snapshot))
    facts, counts, type_of = _gpus(snapshot)
    for name in extra:
        facts.setdefault(name, _facts_of(name))
    stories = [_story(state, job, type_of, now.unix_ms) for job in snapshot.jobs]
    return _Recorder(stories, facts, counts, _knowledge(state, now)).recorded()


class _Recorder:
    """All stories against one fleet."""

    def __init__(
        self,
        stories: Sequence[_Story],
        facts: Mapping[str, GpuFacts],
        counts: Mapping[str, int],
        knowledge: Knowledge,
    ) -> None:
        self.stories = stories
        self.facts = facts
        self.counts = counts
        self.knowledge = knowledge
        self.lengths_s: dict[str, list[float]] = {}
        self.restarts_s = [each for story in stories for each in story.restarts_s]
        for story in stories:
            if story.job.phase in JOB_ENDED and story.total_s >= SECONDS_MIN:
                self.lengths_s.setdefault(story.job.spec.project, []).append(story.total_s)
        self.measured = self.guessed = self.typical = 0
        self.left_out: Counter[str] = Counter()

    def recorded(self) -> Recorded:
        begin_ms = min((story.job.submitted_unix_ms for story in self.stories), default=0)
        made = [self._job(story, begin_ms) for story in self.stories]
        jobs = sorted((j for j in made if j is not None), key=lambda j: (j.arrival_ms, j.job_id))
        first_ms = min((job.arrival_ms for job in jobs), default=0)
        jobs = [replace(job, arrival_ms=job.arrival_ms - first_ms) for job in jobs]
        prices = {name: self._price(name) for name in self.counts}
        fleet = Fleet(dict(self.counts), prices)
        return Recorded(
            jobs, fleet, self.facts, self.measured, self.guessed, self.typical, self.left_out
        )

    def _job(self, story: _Story, begin_ms: int) -> SimJob | None:
        job, spec = story.job, story.job.spec
        why = self._why_not(story)
        found = {} if why else self._rates(story)
        able = any(self.counts.get(name, 0) >= story.gpus for name in found)
        if why or not able:
            self.left_out[why or NOWHERE] += 1
            return None
        own = statistics.median(story.restarts_s) if story.restarts_s else None
        fleets = statistics.median(self.restarts_s) if self.restarts_s else RESTART_S_DEFAULT
        return SimJob(
            job_id=job.id,
            gpus=story.gpus,
            steps=self._steps(story, found),
            rates=found,
            model=_model(spec),
            project=spec.project,
            rank=CLASS_RANK[spec.job_class],
            arrival_ms=max(0, story.came_unix_ms - begin_ms),
            restart_s=fleets if own is None else own,
            deadline_ms=spec.deadline_unix_ms - begin_ms if spec.deadline_unix_ms else None,
        )

    def _why_not(self, story: _Story) -> str:
        if story.job.spec.gpus == 0:
            return NO_GPU
        waits = story.job.phase in (JobPhase.QUEUED, JobPhase.ACTIVE)
        return "" if waits or story.total_s >= SECONDS_MIN else NEVER_RAN

    def _rates(self, story: _Story) -> dict[str, float]:
        found = {}
        for name, facts in self.facts.items():
            if not suits(story.job.spec, facts):
                continue
            place = Place(known_as(name), story.gpus)
            own = [one for one in story.measured if one.place.gpu_type == place.gpu_type]
            if own:
                seconds = sum(one.seconds for one in own)
                rate: float | None = sum(o.steps_per_s * o.seconds for o in own) / seconds
                self.measured += 1
            elif story.measured:
                rate = guess(story.measured, place, self.knowledge, half=story.half)
                self.guessed += rate is not None
            else:
                prior = rates.place_prior(place, half=story.half)
                rate = math.exp(prior.log_rate) if prior.known else None
                self.guessed += rate is not None
            if rate is not None:
                found[name] = rate
        return found

    def _steps(self, story: _Story, found: Mapping[str, float]) -> float:
        done = story.steps
        if done is None:
            # It made one a second where it trained most; elsewhere it is as fast as was guessed.
            done = sum(s * found.get(name, 1.0) for name, s in story.trained_s.items())
        if story.job.phase in JOB_ENDED:
            return done
        training = workload.read(story.job.spec)
        total = story.total_steps
        if not total and isinstance(training, Training):
            total = training.steps
        if story.steps is not None and total:
            return max(done, float(total))
        self.typical += 1
        lengths_s = self.lengths_s.get(story.job.spec.project)
        lengths_s = lengths_s or [each for group in self.lengths_s.values() for each in group]
        typical_s = statistics.median(lengths_s) if lengths_s else LENGTH_S_DEFAULT
        there = {name: self.counts.get(name, 0) for name in found}
        all_gpus = sum(there.values()) or len(there)
        mean = sum(found[name] * (count or 1) for name, count in there.items()) / all_gpus
        return max(done, typical_s * mean)

    def _price(self, name: str) -> float:
        known = public(name)
        return (known.usd_per_hour if known is not None else None) or 0.0


def _story(state: State, job: Job, type_of: Mapping[str, str], now_unix_ms: int) -> _Story:
    gpus = job.spec.ranks * max(1, job.spec.gpus)
    training = workload.read(job.spec)
    trained_s: dict[str, float] = {}
    told: list[tuple[Place, float, float]] = []
    reached = total_steps = 0
    restarts_s = []
    for attempt in state.attempts_of(job.id):
        if attempt.rank:
            continue  # rank 0 speaks for its gang
        spent = accounting.account(attempt, None, now_unix_ms)
        seconds = spent.productive_s + spent.input_wait_s
        name = _type_of(attempt, type_of)
        if attempt.restored_digest and attempt.started_unix_ms is not None:
            restarts_s.append(spent.start_s + spent.restore_s)
        if name is None or seconds < SECONDS_MIN:
            continue
        trained_s[name] = trained_s.get(name, 0.0) + seconds
        total_steps = attempt.times.total_steps or total_steps
        step = attempt.times.step
        if step is not None:
            made = step - max(attempt.restored_step, min(step, attempt.times.reached_step))
            reached = max(reached, step)
            if made > 0:
                told.append((Place(name, gpus), made / seconds, seconds))
    if not told and trained_s:
        most = max(trained_s, key=lambda each: (trained_s[each], each))
        told, reached = [(Place(most, gpus), 1.0, trained_s[most])], 0
    half = training.half if isinstance(training, Training) else halves(trained_s)
    measured = [measurement(place, rate, s, half=half) for place, rate, s in told]
    steps = float(reached) if reached else None
    came = _came_unix_ms(state, job, now_unix_ms)
    return _Story(job, gpus, half, trained_s, measured, steps, restarts_s, total_steps, came)


def _came_unix_ms(state: State, job: Job, now_unix_ms: int) -> int:
    limit = arrays.parse(job.spec.array).limit if job.array_id else 0
    if not limit or job.id < job.array_id + limit:
        return job.submitted_unix_ms
    tries = state.attempts_of(job.id)
    return tries[0].assigned_unix_ms if tries else now_unix_ms


def _type_of(attempt: Attempt, type_of: Mapping[str, str]) -> str | None:
    """Nothing where its GPUs are of several types, or not known any more."""
    names = {type_of.get(uuid): None for uuid in attempt.gpu_uuids}
    return next(iter(names)) if len(names) == 1 else None


def _gpus(
    snapshot: Snapshot,
) -> tuple[dict[str, GpuFacts], dict[str, int], dict[str, str]]:
    """One GPU of each type that takes work, how many there are, and the type of every GPU."""
    facts: dict[str, GpuFacts] = {}
    counts: Counter[str] = Counter()
    type_of = {}
    for node in snapshot.nodes:
        closed = {cordon.uuid: None for cordon in node.gpu_cordons}
        for gpu in node.gpus:
            name = gpu_types.key_of(gpu.name, gpu.memory_bytes)
            type_of[gpu.uuid] = name
            if not node.forgotten and node.intent not in _CLOSED and gpu.uuid not in closed:
                facts.setdefault(name, gpu)
                counts[name] += 1
    return dict(sorted(facts.items())), dict(sorted(counts.items())), type_of


def _facts_of(name: str) -> GpuFacts:
    known = public(name)
    memory_gib = known.memory_gib if known is not None else 0
    return GpuFacts("", name, memory_gib * gpu_types.GIB)


def _knowledge(state: State, now: Instant) -> Knowledge:
    """Of types, from all that was seen. A job's own runs are among it and count a little more than
    once, which narrows what is said of it and hardly moves it."""
    found = []
    for run in history.seen(state, now).runs:
        training = workload.read(run.spec)
        place = run.place.gpu_type
        half = training.half if isinstance(training, Training) else halves([place])
        one = measurement(run.place, run.steps_per_s, run.seconds, half=half)
        found.append(Observation(run.job, one))
    return estimates.learn(found)


def _model(spec: JobSpec) -> str:
    training = workload.read(spec)
    return training.model if isinstance(training, Training) else spec.name


def _last_unix_ms(snapshot: Snapshot) -> int:
    """The newest time that is written down: the same records are the same trace at any time."""
    times = [job.ended_unix_ms or job.submitted_unix_ms for job in snapshot.jobs]
    for attempt in snapshot.attempts:
        times.append(attempt.ended_unix_ms or attempt.assigned_unix_ms)
        times.append(attempt.times.silent_unix_ms or 0)
    times += [checkpoint.committed_unix_ms for checkpoint in snapshot.checkpoints]
    return max(times, default=0)
