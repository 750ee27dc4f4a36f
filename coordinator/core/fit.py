"""What a job would do on each type of GPU of the fleet: `baton fit`, before anything is submitted.

Problem: people choose a GPU by its name, find out after an hour of queue that the job does not fit,
and after a day what it costs. All that can be said beforehand is said here, in one pure answer:
speed with a band, memory, dollars for a million tokens, and time. What cannot be said is "unknown"
with the reason, since a guess that looks like an answer is worse than none.

Speed is `estimates.py` on what the fleet has seen (`history.py`) and on facts (`rates.py`). Memory
is counted (`workload.py`) and corrected by what has run: a training that made steps on a GPU did
fit there, with one sample at once at least, and one that ended for want of memory did not.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coordinator.core import (
    estimates,
    gpu_types,
    history,
    rates,
    readings,
    trainer_keys,
    workload,
)
from coordinator.core.estimates import Knowledge, Measurement, Observation, Place, Prior
from coordinator.core.fit_requests import Fit, FitJob, FitPage, Fitting, Speed
from coordinator.core.history import History, Run, TooLarge, names
from coordinator.core.messages import Refusal, RefusalKind
from coordinator.core.model import GpuFacts, JobSpec
from coordinator.core.phases import GpuPhase, NodeIntent, NodePhase
from coordinator.core.sentences import quantity
from coordinator.core.state import Instant, State
from coordinator.core.validate import refuse_spec, suits
from coordinator.core.workload import ModelFacts, Training

# What a driver and a display leave of a GPU's memory.
USABLE_RATIO = 0.97
# By how much a prediction may be wrong; within that of the limit, the answer says so.
MEMORY_UNSURE_RATIO = 0.15
# What did not fit would have needed more than there was, and nobody knows how much.
OUTGROWN_RATIO = 1.05
GIGABYTE = 10**9
HOUR_S = 3600
MILLION = 1e6


@dataclass(frozen=True, slots=True)
class Kind:
    """GPUs of the fleet with one name and size, and how many of them take work."""

    facts: GpuFacts
    count: int


@dataclass(frozen=True, slots=True)
class MemoryEvidence:
    """A training that was predicted to need `predicted_bytes` where there were `usable_bytes`."""

    predicted_bytes: int
    usable_bytes: int
    fitted: bool


def answer(state: State, now: Instant, asked: FitJob) -> FitPage | Refusal:
    """For the fleet as it is. Only what is wrong with the job as such is refused, and more GPUs
    than there are: what it would wait for is part of the answer."""
    sentence = refuse_spec(asked.spec) or trainer_keys.wrong(asked.spec)
    if not sentence and not asked.spec.gpus:
        sentence = "the job asks for no GPU (gpus = 0), and this compares types of GPU"
    sentence = sentence or _too_many(state, asked.spec)
    if sentence:
        return Refusal(RefusalKind.INVALID, sentence)
    return fit(asked, _kinds(state), history.seen(state, now))


def _too_many(state: State, spec: JobSpec) -> str:
    """Whatever their type: of which it could have enough is what the answer says."""
    counts = [len(live.node.gpus) for live in state.nodes.values()]
    most = max(counts, default=0)
    if most and spec.gpus > most:
        return (
            f"the job asks for {spec.gpus} GPUs on one node (gpus = {spec.gpus}), and the most that"
            f" any node has is {most}: ask for fewer, or for several ranks"
        )
    places = sum(count // spec.gpus for count in counts)
    if most and spec.ranks > places:
        return (
            f"the job asks for {spec.ranks} ranks of {quantity(spec.gpus, 'GPU')} each, and the"
            f" whole fleet has places for {places}: ask for fewer"
        )
    return ""


def fit(asked: FitJob, kinds: Iterable[Kind], seen: History) -> FitPage:
    """One answer for each kind, by name and size."""
    judge = _Judge(asked, seen)
    ordered = sorted(kinds, key=lambda kind: (kind.facts.name, kind.facts.memory_bytes))
    return FitPage(tuple(judge.fit(kind) for kind in ordered), gpu_types.PRICES_SOURCE)


def corrected_ratio(evidence: Iterable[MemoryEvidence]) -> float:
    """By what a prediction is multiplied: the number nearest to one that agrees with what was seen.
    Where it contradicts itself, what did not fit counts: a job that waits for a larger GPU has lost
    less than one that fails."""
    seen = [one for one in evidence if one.predicted_bytes > 0]
    most = [one.usable_bytes / one.predicted_bytes for one in seen if one.fitted]
    least = [
        OUTGROWN_RATIO * one.usable_bytes / one.predicted_bytes for one in seen if not one.fitted
    ]
    ratio = min([1.0, *most])
    return max([ratio, *least])


def _kinds(state: State) -> list[Kind]:
    """All kinds of GPU that the fleet has, also those that take no work at present."""
    takes: Counter[tuple[str, int]] = Counter()
    for _, live in sorted(state.nodes.items()):
        open_node = live.phase is NodePhase.UP and live.node.intent is NodeIntent.OPEN
        closed = readings.closed(live)
        for uuid, gpu in live.gpus.items():
            able = open_node and uuid not in closed and gpu.phase is not GpuPhase.ABSENT
            takes[gpu.facts.name, gpu.facts.memory_bytes] += 1 if able else 0
    return [Kind(GpuFacts("", name, size), count) for (name, size), count in takes.items()]


class _Judge:
    """One job against kind after kind."""

    def __init__(self, asked: FitJob, seen: History) -> None:
        self.asked = asked
        self.spec = asked.spec
        training = workload.read(asked.spec)
        self.training = training if isinstance(training, Training) else None
        self.why = training if isinstance(training, str) else asked.model_why
        self.family, self.job = names(asked.spec)
        kin = [run for run in seen.runs if self._is_kin(run)]
        self.knowledge = _knowledge([run for run in seen.runs if not self._is_kin(run)])
        self.kin = [observation(run, self._model_of(run)) for run in kin]
        too_large = [one for one in seen.too_large if one.family == self.family]
        self.ratio = corrected_ratio(_evidence([*kin, *too_large], asked.model))
        self.gpus = asked.spec.ranks * max(1, asked.spec.gpus)

    def fit(self, kind: Kind) -> Fit:
        place = Place(gpu_types.key_of(kind.facts.name, kind.facts.memory_bytes), self.gpus)
        speed, speed_why = self._speed(place, kind)
        fitting, memory_why, needed_bytes, at_once = self._memory(kind)
        tokens = self.training.tokens if self.training is not None else None
        price = self._price(kind)
        usd_per_hour = None if price is None else price * self.gpus
        runs_there = speed is not None and fitting is not Fitting.DOES_NOT_FIT
        seconds = dollars = None
        if speed is not None and runs_there:
            if self.training is not None:
                seconds = self.training.steps / speed.steps_per_s
            if tokens is not None and usd_per_hour is not None:
                million_s = MILLION / (tokens * speed.steps_per_s)
                dollars = usd_per_hour * million_s / HOUR_S
        return Fit(
            gpu_type=kind.facts.name,
            memory_bytes=kind.facts.memory_bytes,
            gpus=kind.count,
            gpus_job=self.gpus,
            speed=speed if runs_there else None,
            speed_why=speed_why if runs_there or speed is None else memory_why,
            fitting=fitting,
            memory_why=memory_why,
            memory_needed_bytes=needed_bytes,
            at_once=at_once,
            tokens_per_step=tokens,
            usd_per_hour=usd_per_hour,
            usd_per_million_tokens=dollars,
            seconds=seconds,
            unsuited=_unsuited(self.spec, kind),
        )

    def _is_kin(self, run: Run) -> bool:
        return run.job == self.job or (bool(self.family) and run.family == self.family)

    def _model_of(self, run: Run) -> ModelFacts | None:
        """Kin train the model that was asked about."""
        return self.asked.model if self.family and run.family == self.family else None

    def _speed(self, place: Place, kind: Kind) -> tuple[Speed | None, str]:
        """With what it is from, or why it is not known."""
        if self.spec.shared_gpu_memory_bytes:
            return None, "unknown: how fast a shared GPU is depends on who else is on it"
        prior = _prior(place, self.training, self.asked.model)
        said = estimates.estimate(self.knowledge, self.kin, self.job, place, prior)
        if said is not None:
            low, high = said.band
            return Speed(said.steps_per_s, low, high), self._from(place)
        if self.kin or not self.why:
            return None, f"unknown: no facts about {kind.facts.name}, and nothing has run on it"
        nothing = "and no job like it has run in this project yet"
        return None, f"unknown: {self.why}, {nothing}"

    def _from(self, place: Place) -> str:
        own = [one for one in self.kin if one.job == self.job]
        here = sum(1 for one in own if one.measurement.place == place)
        if here:
            return f"measured: {quantity(here, 'run')} of this job there"
        parts = []
        if own:
            parts.append(f"{quantity(len(own), 'run')} of this job elsewhere")
        if len(self.kin) > len(own):
            parts.append(f"{quantity(len(self.kin) - len(own), 'run')} of its kind")
        if place.gpu_type in self.knowledge.types:
            parts.append("other jobs on this type")
        if any(known.key == place.gpu_type for known in gpu_types.TYPES):
            parts.append("facts")
        return "estimated from " + " and ".join(parts)

    def _memory(self, kind: Kind) -> tuple[Fitting, str, int | None, int | None]:
        """What it comes to, the sentence, the need, and samples at once."""
        training, model = self.training, self.asked.model
        if training is None or model is None:
            return (
                Fitting.UNKNOWN,
                f"unknown: {self.why or 'nothing is known of the model'}",
                None,
                None,
            )
        room = self.spec.shared_gpu_memory_bytes or kind.facts.memory_bytes
        usable = usable_bytes(room)
        wanted = training.at_once(self.spec.ranks)
        at_once = wanted
        needed = self._needed_bytes(training, model, at_once)
        first = needed
        while needed > usable and at_once > 1:
            at_once = (at_once + 1) // 2
            needed = self._needed_bytes(training, model, at_once)
        of = f"of {room / GIGABYTE:.0f} GB"
        unsure = abs(needed - usable) < MEMORY_UNSURE_RATIO * needed
        close = ", too close to be sure" if unsure else ""
        if needed > usable:
            sentence = f"does not fit: {_gb(needed)} {of} with a single sample{close}"
            return Fitting.DOES_NOT_FIT, sentence, needed, None
        if at_once == wanted:
            return Fitting.FITS, f"fits: {_gb(needed)} {of}{close}", needed, at_once
        sentence = (
            f"fits with gradient accumulation: {at_once} of {wanted} samples at once, "
            f"{_gb(needed)} {of} where all need {_gb(first)}{close}"
        )
        return Fitting.ACCUMULATES, sentence, needed, at_once

    def _needed_bytes(self, training: Training, model: ModelFacts, at_once: int) -> int:
        predicted = workload.memory_bytes(training, model, self.spec.ranks, at_once)
        return round(predicted * self.ratio)

    def _price(self, kind: Kind) -> float | None:
        """Of one GPU and hour: the caller's, the longest name first, or the table's."""
        name = kind.facts.name.lower()
        given = [(len(part), usd) for part, usd in self.asked.prices if part.lower() in name]
        if given:
            return max(given)[1]
        known = gpu_types.find(kind.facts.name, kind.facts.memory_bytes)
        return known.usd_per_hour if known is not None else None


def usable_bytes(memory_bytes: int) -> int:
    """What a training can have of a GPU's memory."""
    return round(memory_bytes * USABLE_RATIO)


def _prior(place: Place, training: Training | None, model: ModelFacts | None) -> Prior:
    half = training.half if training is not None else False
    work = workload.work(training, model) if training is not None and model is not None else None
    return rates.place_prior(place, work, half=half)


def observation(run: Run, model: ModelFacts | None) -> Observation:
    training = workload.read(run.spec)
    known = training if isinstance(training, Training) else None
    prior = _prior(run.place, known, model)
    return Observation(run.job, Measurement(run.place, prior, run.steps_per_s, run.seconds))


def _knowledge(others: Sequence[Run]) -> Knowledge:
    return estimates.learn([observation(run, None) for run in others])


def _evidence(kin: Iterable[Run | TooLarge], model: ModelFacts | None) -> Iterable[MemoryEvidence]:
    """What has run did fit, with one sample at once: how many there were, its trainer knows."""
    if model is None:
        return
    for one in kin:
        training = workload.read(one.spec)
        if isinstance(training, Training):
            predicted = workload.memory_bytes(training, model, one.spec.ranks, 1)
            usable = usable_bytes(one.gpu_memory_bytes)
            yield MemoryEvidence(predicted, usable, fitted=isinstance(one, Run))


def _unsuited(spec: JobSpec, kind: Kind) -> str:
    gpu = kind.facts
    if suits(spec, gpu):
        return "" if kind.count else "none of them takes work at present"
    if spec.gpu_types and not any(name.lower() in gpu.name.lower() for name in spec.gpu_types):
        return f"the job asks for {' or '.join(spec.gpu_types)}"
    return f"the job asks for {_gb(spec.gpu_memory_bytes_min)} of memory"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / GIGABYTE:.1f} GB"
