"""What a tick, a hello and a submission look at, kept up to date by what changes it.

Problem: of ten thousand nodes a handful drain, and of their attempts a handful is out of reach, but
who asks all of them four times a second to find these pays for ten thousand. So the few are known
by name; in the order in which they came to be. Likewise the few checkpoints that a hello speaks of,
and the few kinds of nodes that there are.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from coordinator.core.arrays import Arrays
from coordinator.core.capacity_model import Power
from coordinator.core.failure_rate import FailureRate
from coordinator.core.keeps import Keep
from coordinator.core.model import Attempt, GpuFacts, HostFacts, Node
from coordinator.core.pairs import Lessons, Sharers
from coordinator.core.phases import ATTEMPT_ENDED, AttemptPhase, NodeIntent
from coordinator.core.standby_order import StandbyOrder

# Memory and cores of the host, and of each GPU name and memory.
Kind = tuple[int, int, tuple[tuple[str, int], ...]]


def kind(host: HostFacts, gpus: tuple[GpuFacts, ...]) -> Kind:
    """Nodes of one kind can hold the same jobs."""
    return host.memory_bytes, host.cpu_count, tuple((gpu.name, gpu.memory_bytes) for gpu in gpus)


@dataclass(slots=True)
class Indices:
    """`draining` nodes, those whose power is not simply on (`switched`), and those whose list of
    checkpoints to keep has changed; attempts that have not ended, and those of them that are out of
    reach. `pieces`: by digest the jobs with a checkpoint or a waiting part of which it is a piece,
    and how many. `kinds`: the nodes that are alike for `validate.refuse_fleet`. `stretched`:
    attempts of which it is known what sharing a GPU cost them (`coruns.py`), and `lessons` and
    `alone` are what follows from them; None until it is asked for. `seen`: likewise of all other
    attempts, and when that was. `sharers` are those that share a GPU; `shunned` are beside whom a
    training goes last, `known_alone` whether it is known of one how fast he is without company, and
    `refusals` who is no company for whom (`company.py`), as long as nothing of that has changed.
    `arrays`: their trials, and who of them is behind. `standbys`: how many open attempts send their
    copies to a node; `few_copies`, by what jobs ask for, that number of the standby found last;
    `standby_order`: in which jobs ask nodes for that. `failures`: of what has ended.
    `asked_again_ms`: when somebody is first asked again who lacked something (`outcomes.py`)."""

    draining: dict[str, None] = field(default_factory=dict)
    switched: dict[str, None] = field(default_factory=dict)
    keep_changed: dict[str, None] = field(default_factory=dict)
    open_attempts: dict[str, None] = field(default_factory=dict)
    unreachable: dict[str, None] = field(default_factory=dict)
    stretched: dict[str, None] = field(default_factory=dict)
    lessons: Lessons | None = None
    alone: dict[tuple[str, str], tuple[float, float]] | None = None
    seen: tuple[int, dict[tuple[str, str], tuple[float, float]]] | None = None
    sharers: Sharers | None = None
    shunned: dict[object, frozenset[str]] = field(default_factory=dict)
    refusals: dict[object, tuple[Keep, ...]] = field(default_factory=dict)
    known_alone: dict[str, bool] = field(default_factory=dict)
    refused_ms: int = 0
    asked_again_ms: int | None = None
    pieces: dict[str, dict[int, int]] = field(default_factory=dict)
    kinds: dict[Kind, dict[str, None]] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=Arrays)
    standbys: Counter[str] = field(default_factory=Counter)
    few_copies: dict[object, int] = field(default_factory=dict)
    standby_order: StandbyOrder = field(default_factory=StandbyOrder)
    failures: FailureRate = field(default_factory=FailureRate)
    _standby_of: dict[str, str] = field(default_factory=dict)
    _facts: dict[str, tuple[HostFacts, tuple[GpuFacts, ...]]] = field(default_factory=dict)

    def put_node(self, node: Node) -> None:
        """After its intent or what it consists of may have changed."""
        _put(self.draining, node.id, member=node.intent is NodeIntent.DRAINING)
        _put(self.switched, node.id, member=node.power.phase is not Power.ON)
        self.standby_order.touch(node.id)
        known = self._facts.get(node.id)
        if known is not None and known[0] is node.host and known[1] is node.gpus:
            return  # as after each of its events
        self._forget_company()
        self._drop_kind(node.id)
        self._facts[node.id] = node.host, node.gpus
        self.kinds.setdefault(kind(node.host, node.gpus), {})[node.id] = None

    def drop_node(self, node_id: str) -> None:
        for index in (self.draining, self.switched, self.keep_changed):
            index.pop(node_id, None)
        self.standby_order.touch(node_id)
        self._forget_company()
        self._drop_kind(node_id)

    def _drop_kind(self, node_id: str) -> None:
        known = self._facts.pop(node_id, None)
        if known is not None:
            alike = self.kinds[kind(*known)]
            del alike[node_id]
            if not alike:
                del self.kinds[kind(*known)]

    def put_attempt(self, attempt: Attempt) -> None:
        """After its phase may have changed."""
        self._forget_company()
        self.standby_order.touch(attempt.node)
        _put(self.open_attempts, attempt.id, member=attempt.phase not in ATTEMPT_ENDED)
        _put(self.unreachable, attempt.id, member=attempt.phase is AttemptPhase.UNREACHABLE)
        self._count_standby(attempt.id, attempt.replica_node * (attempt.phase not in ATTEMPT_ENDED))

    def _count_standby(self, attempt_id: str, node_id: str) -> None:
        before = self._standby_of.pop(attempt_id, "")
        for node in (before, node_id) if before != node_id else ():
            self.standby_order.touch(node)
        if before:
            self.standbys[before] -= 1
            if not self.standbys[before]:
                del self.standbys[before]
        if node_id:
            self._standby_of[attempt_id] = node_id
            self.standbys[node_id] += 1

    def put_stretches(self, attempt_id: str) -> None:
        self.stretched[attempt_id] = None
        self.lessons = self.alone = None
        self._forget_company()

    def _forget_company(self) -> None:
        self.sharers = None
        self.shunned.clear()
        self.refusals.clear()
        self.known_alone.clear()

    def forget_attempt(self, attempt_id: str) -> None:
        self._forget_company()
        self.open_attempts.pop(attempt_id, None)
        self.unreachable.pop(attempt_id, None)
        self._count_standby(attempt_id, "")
        if attempt_id in self.stretched:
            del self.stretched[attempt_id]
            self.lessons = self.alone = None

    def count_piece(self, digest: str, job_id: int, change: int) -> None:
        jobs = self.pieces.setdefault(digest, {})
        jobs[job_id] = jobs.get(job_id, 0) + change
        if not jobs[job_id]:
            del jobs[job_id]
        if not jobs:
            del self.pieces[digest]

    def jobs_of(self, digests: Iterable[str]) -> list[int]:
        """The jobs with any of these pieces, in the order of their numbers."""
        found = (job_id for digest in digests for job_id in self.pieces.get(digest, ()))
        return sorted(dict.fromkeys(found))


def _put(index: dict[str, None], name: str, *, member: bool) -> None:
    if member:
        index[name] = None
    else:
        index.pop(name, None)
