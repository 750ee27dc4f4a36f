"""What a simulation is made of: jobs, a fleet, what a policy sees and says, and what happened.

Problem: a policy that could see the engine's state could also change it, or know what no scheduler
knows. So it gets frozen values: the rates are those that are believed, which may be wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol, runtime_checkable

PACE_S: Final = 120.0  # of work, before a speed is taken for measured


@dataclass(frozen=True, slots=True, kw_only=True)
class SimJob:
    """`rates` are steps a second of the whole job on `gpus` GPUs of a type; a type that is not
    there cannot run it. `rank` is that of its class, 0 the first."""

    job_id: int
    gpus: int
    steps: float
    rates: Mapping[str, float]
    model: str = ""
    project: str = ""
    rank: int = 0
    arrival_ms: int = 0
    restart_s: float = 0.0
    deadline_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Fleet:
    """GPUs of each type, and what an hour of one costs. Those that are `booting` when the first job
    comes take work from `Chance.boot_s` on."""

    gpus: Mapping[str, int]
    prices_per_h: Mapping[str, float] = field(default_factory=dict)
    booting: Mapping[str, int] = field(default_factory=dict)

    @property
    def price_per_h(self) -> float:
        """Of all of it."""
        return sum(count * self.prices_per_h.get(name, 0.0) for name, count in self.gpus.items())


class Placement(NamedTuple):
    """Where a job runs; with a `partner` the two have the same GPUs together."""

    gpu_type: str
    gpus: int
    partner: int | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """A job that has arrived and not ended, as a policy sees it. `steps_left` is None where jobs do
    not say how long they are; then `job.steps` are those of a typical one. `pace` is the steps a
    second that it has made where it is, beside whom it is, once it has done so for `PACE_S`."""

    job: SimJob
    steps_left: float | None
    attained_gpu_s: float
    placement: Placement | None
    since_ms: int
    pace: float | None = None


@dataclass(frozen=True, slots=True)
class View:
    """What there is to decide about: jobs in the order in which they came, GPUs that work."""

    now_ms: int
    fleet: Fleet
    capacity: Mapping[str, int]
    jobs: Sequence[Seen]


class Policy(Protocol):
    """Who runs where. It is asked at every event and every `tick_ms` (0: at events only), and
    answers with all that shall run from now on."""

    @property
    def name(self) -> str: ...

    @property
    def tick_ms(self) -> int: ...

    def decide(self, view: View) -> Mapping[int, Placement]: ...


@dataclass(frozen=True, slots=True)
class News:
    """What has happened since the policy was last asked: who has ended, and who has come. `blind`:
    these do not say how long they are."""

    now_ms: int
    ended: Sequence[int]
    came: Sequence[SimJob]
    blind: bool = False


@runtime_checkable
class Incremental(Protocol):
    """A policy that can answer news alone. It says who starts, while all others stay as they are;
    None: it has to see all jobs. It is asked only after a decision over all jobs of that run, and
    never about what failed."""

    def hear(self, news: News) -> Mapping[int, Placement] | None: ...


@runtime_checkable
class Resting(Protocol):
    """A policy that knows when time alone changes nothing. While it is `at_rest` its last answer
    stays until something happens, and on its ticks it is not asked."""

    @property
    def at_rest(self) -> bool: ...


class Line(NamedTuple):
    """One thing that happened. `what` is arrive, start, share (the partner has changed), stop, kill
    (its GPU failed), finish, fail (GPUs are not there from now on) or mend; `steps` are those that
    the job has done by then."""

    at_ms: int
    what: str
    job_id: int
    gpu_type: str = ""
    gpus: int = 0
    partner: int | None = None
    steps: float = 0.0


@dataclass(frozen=True, slots=True)
class Chance:
    """What goes wrong, and what it costs to be prepared. A node of `node_gpus` fails every
    `node_mtbf_h` hours on average, is mended after `mend_h`, and then takes `boot_s` to boot. A job
    on it loses what came after its last checkpoint; one is made every `checkpoint_s` of training
    and stops the training for `save_s` (`saving.py`). Believed rates are off by a factor whose
    logarithm has the deviation `rate_error`. `blind`: nobody says how long jobs are. What fails and
    who is wrong are drawn apart, so each stays as it is when the other changes."""

    seed: int = 0
    node_mtbf_h: float = 0.0
    node_gpus: int = 4
    mend_h: float = 4.0
    checkpoint_s: float = 600.0
    save_s: float = 0.0
    boot_s: float = 0.0
    rate_error: float = 0.0
    blind: bool = False


PairRates = Mapping[tuple[str, str, str], float]  # type, model, partner's model -> steps a second


class Outcome(NamedTuple):
    """All that happened, and when each job was done."""

    lines: Sequence[Line]
    finished_ms: Mapping[int, int]
    trace_hash: str
    events: int
