"""What the last decision over all jobs has left, for those who decide before the next one.

Problem: a decision over all jobs is dear and seldom, placement is cheap and after every batch. What
the first has found out (which type is worth most for whom, in which turn, what a GPU costs) has to
hold until it is made again, for jobs that it knows and for those that have come since. All of it is
volatile: a coordinator that restarts knows nothing of it, and decides anew.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from coordinator.core.allocation import Contender
from coordinator.core.estimates import NOTHING, Knowledge, Observation
from coordinator.core.horizon import Horizon
from coordinator.core.model import GpuFacts, Job


@dataclass(frozen=True, slots=True)
class Fleet:
    """GPUs that take work, by type: what they are, and how many nodes there are that have so many.
    `types_on` is by node and uuid. `kinds`: how many kinds of node there were when it was looked
    at."""

    facts: Mapping[str, tuple[GpuFacts, ...]] = field(default_factory=dict)
    counts: Mapping[str, Counter[int]] = field(default_factory=dict)
    types_on: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    kinds: int = 0

    def type_of(self, node: str, uuid: str) -> str:
        """Empty where it takes no work."""
        return self.types_on.get(node, {}).get(uuid, "")


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a job is on each type, in the order of `types`, and how fast it is nine times of ten
    at least. `absolute`: in steps a second, else only relative to one another. Not `told`: nothing
    is known, and all are alike."""

    types: tuple[str, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    absolute: bool = False
    told: bool = False


@dataclass(frozen=True, slots=True)
class Entrant:
    """A contender with what is not the decision's matter. `known`: how much is left of it is."""

    job: Job
    contender: Contender
    rates: Rates
    known: bool


@dataclass(frozen=True, slots=True)
class Field:
    """All of them, and what there is to have of each type. `aside` are those that are not weighed,
    since they share a GPU, and have a deadline."""

    entrants: tuple[Entrant, ...]
    capacity: Mapping[str, int]
    aside: tuple[Job, ...] = ()


# Of an order for a decision: the leader's epoch, and when it was given by the monotonic clock.
Asking = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Asked:
    """A decision that was ordered and is not there yet: over whom, in which fleet. Of who is aside
    this has what each could be."""

    asking: Asking
    at_ms: int
    field: Field
    aside: tuple[Entrant, ...]
    fleet: Fleet


@dataclass(frozen=True, slots=True)
class KnownRates:
    """Rates of a job in its `epoch`, good until then. `name`: what the job is (`history.py`)."""

    rates: Rates
    epoch: int
    until_ms: int
    name: str


# Types, how many GPUs, and whether it computes in half precision.
FactsRequest = tuple[tuple[str, ...], int, bool]


@dataclass(slots=True)
class Speeds:
    """What the fleet has seen, as it was looked at last (`speeds.py`). `typical_s` is for how long
    jobs of a project have run, on the GPUs that they asked for; `by_facts` what facts and
    `knowledge` say of whom nothing is measured."""

    seen_ms: int | None = None
    learned_ms: int | None = None
    knowledge: Knowledge = NOTHING
    by_job: dict[str, list[Observation]] = field(default_factory=dict)
    by_family: dict[str, list[Observation]] = field(default_factory=dict)
    typical_s: dict[str, float] = field(default_factory=dict)
    known: dict[tuple[int, str], KnownRates] = field(default_factory=dict)
    by_facts: dict[FactsRequest, Rates] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Promise:
    """A type of GPU that is kept for a job, since others or itself have been stopped for that; with
    `nodes` it is there. `note` is what a job that waits for it is told. `claim`: it is for another
    try of a job that ended badly (`claims.py`), which lifts nobody over a quota."""

    gpu_type: str
    until_ms: int
    since_ms: int
    nodes: tuple[str, ...] = ()
    note: str = ""
    claim: bool = False

    @property
    def is_on_its_way(self) -> bool:
        """Whether whoever has it waits for no node, but for the room that he was stopped for."""
        return bool(self.nodes) and not self.claim


@dataclass(slots=True)
class Standing:
    """`decided_ms`: when the last decision was ordered, `asked` while its answer is not there;
    `made_ms`: when the last answer came. `stale_ms`: since when something has happened that the
    decision does not know. `order`: for each job the types that are worth most for it first, with
    its speed there. `turn`: of those who wait and say how much they have left, whether they were
    granted GPUs, and what they are worth a GPU. `notes`: what the price says of a wait. `moves_ms`:
    when somebody was stopped for a better allocation; `made_room_ms`: when for whom, and in which
    of its epochs (`claims.py`). `tenants`: what each project counted. `since_ms`: when jobs were
    submitted and attempts assigned, by the monotonic clock. `latest_ms`: by then those that have a
    deadline must run to keep it (`deadlines.py`); infinite where nobody knows. `late_ms` is that of
    those whose time has come, and is not over; `alone_ms` by when who may have company must have
    none, where he is; `timed_ms`: when all three were looked at. `entrants` are those of the last
    look. `hangs`: how many decisions nobody has answered, and `unsolved_until_ms`: before that none
    is asked of the solver."""

    decided_ms: int | None = None
    asked: Asked | None = None
    made_ms: int | None = None
    stale_ms: int | None = None
    fleet: Fleet | None = None
    prices: Mapping[str, float] = field(default_factory=dict)
    ahead: Mapping[int, Horizon] = field(default_factory=dict)
    tenants: Mapping[str, float] = field(default_factory=dict)
    order: dict[int, tuple[tuple[str, float], ...]] = field(default_factory=dict)
    turn: Mapping[int, tuple[bool, float]] = field(default_factory=dict)
    notes: Mapping[int, str] = field(default_factory=dict)
    promises: dict[int, Promise] = field(default_factory=dict)
    moves_ms: list[int] = field(default_factory=list)
    made_room_ms: dict[int, tuple[int, int]] = field(default_factory=dict)
    since_ms: dict[int | str, int] = field(default_factory=dict)
    latest_ms: dict[int, float] = field(default_factory=dict)
    late_ms: dict[int, float] = field(default_factory=dict)
    alone_ms: dict[int, float] = field(default_factory=dict)
    timed_ms: int = 0
    speeds: Speeds = field(default_factory=Speeds)
    entrants: Mapping[int, Entrant] = field(default_factory=dict)
    hangs: int = 0
    unsolved_until_ms: float = 0

    def put_off(self, gap_ms: int) -> None:
        """For so long nobody was there to hear an answer."""
        if self.asked is not None:
            self.asked = replace(self.asked, at_ms=self.asked.at_ms + gap_ms)
