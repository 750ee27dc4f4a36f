"""Job arrays: the trials of one request, of which only so many may run at once.

Problem: who looks for the best of a hundred settings submits a hundred jobs that differ in one
number, and wants eight of them at a time: for a licence, a disk, or the others' sake. Submitted one
by one, half of them are there when the link breaks. And a job that waits because its owner wants it
to is none that waits for room: counted as one, GPUs are reserved for it, nodes started, others
stopped.

How: every trial is a job like any other. It has a *place* of its array while it runs and while it
waits for room; in an array with a limit so many have one at most, and the others are *behind*: they
are queued by their phase, and not among those who wait (`State.queued`), which is all that rounds,
reservations, quotas and plans look at. Who has a place keeps it until he has ended or is held, so
nobody begins in the stead of one that is handed off or gives way. Who is next: `trials.py`.

The notation, its bounds and the variables are those of Slurm's `sbatch --array` (sbatch(1)).
"""

import re
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

from coordinator.core.model import Job, JobSpec, Tally
from coordinator.core.phases import JobPhase
from coordinator.core.sentences import quantity

# What Slurm takes unless it is told otherwise (MaxArraySize, slurm.conf(5)). So many are made
# within one event, while nobody else is heard: some 50 ms of a core, and one commit.
TRIALS_MAX: Final = 1_001
INDEX_MAX: Final = 4_000_000  # Slurm's own bound
TEXT_CHARACTERS_MAX: Final = 1_024
ENDED_MAX: Final = 16  # trials that say how long one takes
INDEX: Final = "{index}"  # in a command or a trainer's configuration: the trial's own
_PART = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?::([0-9]{1,9}))?)?")
# A value of its own in JSON, and not the end of a longer one.
_VALUE = re.compile(r'(?<!\\)"\{index\}"')
_RUNS = (JobPhase.ACTIVE, JobPhase.CANCELLING)


@dataclass(frozen=True, slots=True)
class Plan:
    """Indices in order, each once, and how many trials may run at once; 0: all."""

    indices: tuple[int, ...]
    limit: int


@lru_cache(maxsize=256)
def parse(text: str) -> Plan:
    """`0-99%8`, `1,3,8-16:4`. Raises `ValueError` with a sentence."""
    if len(text) > TEXT_CHARACTERS_MAX:
        raise ValueError(f"the array is longer than {TEXT_CHARACTERS_MAX} characters")
    listed, percent, limit = text.partition("%")
    if percent and not (re.fullmatch("[0-9]{1,9}", limit) and int(limit)):
        raise ValueError(f"array {text!r}: after % stands how many may run at once, 1 or more")
    found: dict[int, None] = {}
    for part in listed.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"array {text!r} is not like 0-99, 0-99%8 or 1,3,8-16:4")
        first, last, step = (int(each or default) for each, default in zip(
            match.groups(), (0, match[1], 1), strict=True
        ))  # fmt: skip
        if last < first or not step:
            raise ValueError(f"array {text!r}: {part} has no index in it")
        if last > INDEX_MAX:
            raise ValueError(f"array {text!r}: an index is {INDEX_MAX} at most")
        span = range(first, last + 1, step)
        found.update(dict.fromkeys(span[: TRIALS_MAX + 1]))
        if len(found) > TRIALS_MAX:
            raise ValueError(
                f"array {text!r} has more than {TRIALS_MAX} trials, which is the limit: submit it"
                " in parts"
            )
    return Plan(tuple(sorted(found)), int(limit or 0))


@dataclass(slots=True)
class Array:
    """The trials that are known, by phase; those behind; the last that have succeeded."""

    text: str
    phases: dict[int, JobPhase] = field(default_factory=dict)
    counts: Counter[JobPhase] = field(default_factory=Counter)
    behind: dict[int, None] = field(default_factory=dict)
    ended: deque[int] = field(default_factory=lambda: deque(maxlen=ENDED_MAX))

    @property
    def plan(self) -> Plan:
        return parse(self.text)

    @property
    def free(self) -> int:
        """Places that nobody has."""
        placed = sum(self.counts[phase] for phase in (*_RUNS, JobPhase.QUEUED)) - len(self.behind)
        return max(0, self.plan.limit - placed)

    @property
    def is_open(self) -> bool:
        return any(self.counts[phase] for phase in (*_RUNS, JobPhase.QUEUED, JobPhase.HELD))

    def tally(self) -> Tally:
        """Who is over may be forgotten, and counts."""
        known = self.counts
        runs, waits = sum(known[phase] for phase in _RUNS), known[JobPhase.QUEUED]
        held, trials = known[JobPhase.HELD], len(self.plan.indices)
        return Tally(trials, runs, waits, held, trials - runs - waits - held)

    def why_behind(self) -> str:
        """For who is."""
        trials, runs, waits, held, over = self.tally()
        room = waits - len(self.behind)
        return (
            f"{runs} of its array's {trials} trials {'runs' if runs == 1 else 'run'}"
            + (f" and {quantity(room, 'waits', 'wait')} to start" if room else "")
            + f", as --array {self.text} allows; {quantity(len(self.behind), 'waits', 'wait')}"
            + (f", {quantity(held, 'is held', 'are held')}" if held else "")
            + (f", {quantity(over, 'is over', 'are over')}" if over else "")
        )


class Arrays:
    """All of which a trial is known. `wanting`: in these somebody is behind, and a place may be
    free."""

    def __init__(self) -> None:
        self.by_id: dict[int, Array] = {}
        self.wanting: dict[int, None] = {}

    def of(self, job: Job) -> Array | None:
        return self.by_id.get(job.array_id)

    def stands_for_others(self, job: Job) -> bool:
        """It is the first of an array that is not over: by it the array is known, in requests that
        are repeated and for whoever means another trial."""
        array = self.of(job) if job.id == job.array_id else None
        return array is not None and array.is_open

    def why_behind(self, job: Job) -> str:
        """Empty: it is not, or a place is free and its turn comes when it can start."""
        array = self.of(job)
        full = array is not None and job.id in array.behind and not array.free
        return array.why_behind() if array is not None and full else ""

    def put(self, job: Job) -> bool:
        """Its phase is new, or the same. Returns whether it is behind: who comes to wait without a
        place."""
        if not job.array_id:
            return False
        array = self.of(job)
        if array is None:
            array = self.by_id[job.array_id] = Array(job.spec.array)
        old = array.phases.get(job.id)
        if old is not None:
            array.counts[old] -= 1
        array.phases[job.id] = job.phase
        array.counts[job.phase] += 1
        if job.phase is not JobPhase.QUEUED:
            array.behind.pop(job.id, None)
        elif array.plan.limit and old not in (*_RUNS, JobPhase.QUEUED):
            array.behind[job.id] = None
        if job.phase is JobPhase.SUCCEEDED and old is not job.phase:
            array.ended.append(job.id)
        if array.behind:
            self.wanting[job.array_id] = None
        return job.id in array.behind

    def drop(self, job: Job) -> None:
        """Of one that has ended."""
        array = self.of(job)
        if array is not None:
            array.counts[array.phases.pop(job.id)] -= 1
            if not array.phases:
                del self.by_id[job.array_id]
                self.wanting.pop(job.array_id, None)


def launched(job: Job) -> JobSpec:
    """What a trial is started with: its own index where `INDEX` stands, and in its environment."""
    if not job.array_id:
        return job.spec
    spec, index, plan = job.spec, str(job.array_index), parse(job.spec.array)
    first_id, count = str(job.array_id), str(len(plan.indices))
    variables = {
        "BATON_ARRAY_INDEX": index,
        "BATON_ARRAY_COUNT": count,
        "BATON_ARRAY_JOB_ID": first_id,
    }
    if spec.slurm_environment:
        variables |= {
            "SLURM_ARRAY_TASK_ID": index,
            "SLURM_ARRAY_JOB_ID": first_id,
            "SLURM_ARRAY_TASK_COUNT": count,
            "SLURM_ARRAY_TASK_MIN": str(plan.indices[0]),
            "SLURM_ARRAY_TASK_MAX": str(plan.indices[-1]),
        }
    return replace(
        spec,
        command=tuple(word.replace(INDEX, index) for word in spec.command),
        trainer_config_json=filled(spec.trainer_config_json, job.array_index),
        environment=(*spec.environment, *variables.items()),
    )


def filled(config_json: str, index: int) -> str:
    """A trainer's configuration as the trial of this index has it: alone in quotes, a number."""
    return _VALUE.sub(str(index), config_json).replace(INDEX, str(index))
