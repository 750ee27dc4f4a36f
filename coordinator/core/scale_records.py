"""What was decided of the fleet's size, kept for people; and what it turned out to cost.

Problem: "why is that node off" is asked a day later, of a coordinator that has been restarted. And
whoever lets a program switch machines wants to know how often it was wrong. So each decision of a
plan is a record with all that it went by: what was known, the quantiles, what else could have been
done at which expected cost, and the bound that held it back. When its time is over, what came is
put beside it: what each of the alternatives would have cost, and the regret, which is by how much
the chosen one cost more than the cheapest.

Names of bounds, modes and verbs are written down as words, and their sentences with them: a later
version may word them otherwise and still reads the old ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# The newest are kept: a fleet of a few types that changes every ten minutes fills a day with some
# hundreds. Two kilobytes each.
RECORDS_MAX = 1_000
MINUTES_PER_H = 60
# What came is known well enough to judge by when most of its minutes are.
KNOWN_RATIO_MIN = 0.8


@dataclass(frozen=True, slots=True)
class Choice:
    """What could be done, how many GPUs are there then, and what that was expected to cost;
    `fixed_usd` of it, cycles and rent, whatever comes."""

    name: str
    gpus: int
    usd: float
    fixed_usd: float = 0.0


@dataclass(frozen=True, slots=True)
class Deed:
    """A verb for some nodes; `state`: `done`, `proposed`, or `approved` by a person."""

    verb: str
    nodes: tuple[str, ...]
    state: str


@dataclass(frozen=True, slots=True)
class Hindsight:
    """Of what came: the mean demand, and what each alternative would have cost in waiting, idling,
    cycles and rent, in the order of the alternatives. `regret_usd`: the chosen one less the
    cheapest."""

    mean_gpus: float
    usd: tuple[float, ...]
    regret_usd: float


@dataclass(frozen=True, slots=True)
class ScaleRecord:
    """One decision of one GPU type; the last alternative is what was chosen. `minutes`: how long it
    was meant to hold. `hindsight` is `None` until that is over, or where too little is known of
    it.

    `soon_ms`: how far ahead `soon_gpus` are about, a start and one decision more. `frees_ms`: after
    which a node was expected to free; `None`: nobody knew, or nobody waited. `rent_usd`: of a GPU
    for an hour; `None`: none can be rented. `patient_gpus` waited, and were not counted yet;
    `ending_gpus` come free in time; `late_gpus` keep the deadlines of `late_jobs`."""

    number: int
    unix_ms: int
    gpu_type: str
    mode: str
    sentence: str
    level: float
    running_gpus: int
    queued_gpus: int
    guaranteed_gpus: int
    there_gpus: int
    need_gpus: int
    keep_gpus: int
    soon_gpus: tuple[float, ...] = ()
    later_gpus: tuple[float, ...] = ()
    coverage: float | None = None
    alternatives: tuple[Choice, ...] = ()
    rail: str = ""
    rail_words: str = ""
    deeds: tuple[Deed, ...] = ()
    minutes: int = 0
    hindsight: Hindsight | None = None
    soon_ms: int = 0
    frees_ms: int | None = None
    rent_usd: float | None = None
    patient_gpus: int = 0
    ending_gpus: int = 0
    late_gpus: int = 0
    late_jobs: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        return f"scale-{self.number}"


@dataclass(frozen=True, slots=True)
class PutScaleRecord:
    """Records beyond the newest `RECORDS_MAX` leave the store."""

    record: ScaleRecord


def hindsight(
    record: ScaleRecord,
    came_gpus: Sequence[float | None],
    wait_usd_per_gpu_h: float,
    idle_usd_per_gpu_h: float,
) -> Hindsight | None:
    """What came, minute by minute, after the decision; `None` where too little of it is known, or
    nothing was weighed."""
    known = [gpus for gpus in came_gpus if gpus is not None]
    if not record.alternatives or len(known) < max(1, KNOWN_RATIO_MIN * len(came_gpus)):
        return None
    hours = len(came_gpus) / MINUTES_PER_H
    usd = tuple(
        choice.fixed_usd
        + hours
        / len(known)
        * sum(
            max(0.0, gpus - choice.gpus) * wait_usd_per_gpu_h
            + max(0.0, choice.gpus - gpus) * idle_usd_per_gpu_h
            for gpus in known
        )
        for choice in record.alternatives
    )
    return Hindsight(sum(known) / len(known), usd, usd[-1] - min(usd))
