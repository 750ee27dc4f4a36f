"""What is known of a node and its GPUs only while the coordinator runs, and is in no record.

Problem: who holds which GPU, when a node was heard last and what it said of itself is true for as
long as somebody says it again. A restarted coordinator begins without it, and every hello brings
it anew; so it lies apart from what is durable (`model.py`).
"""

from dataclasses import dataclass, field

from coordinator.core.boot_times import BootTimes
from coordinator.core.checkpoint_requests import Manifest
from coordinator.core.link_messages import HeldAttempt
from coordinator.core.model import GpuFacts, HostTelemetry, Node
from coordinator.core.phases import GpuPhase, NodePhase

# So often in a session the log says that a node speaks of what is another one's: it is told enough,
# and one that errs with each heartbeat would fill a disk.
FOREIGN_SAID_MAX = 16


@dataclass(frozen=True, slots=True)
class StandbyWatch:
    """Of one attempt (`standby.py`): when its standby moved last, since when a node fits better,
    and at which nodes no copies of it arrived, when that was seen, and how often."""

    moved_ms: int | None = None
    better_since_ms: int | None = None
    failed: tuple[tuple[str, int, int], ...] = ()


# How well a node fits as a standby, the least first; its name is the last of it (`standby.py`).
Rank = tuple[bool, bool, bool, int, int, int, str]


@dataclass(slots=True)
class StandbyWalk:
    """A look through all nodes for a standby of one attempt, and how far it has come: to the node
    at `place`, the best of those before it is `found`."""

    attempt: str
    place: int = 0
    found: Rank | None = None


@dataclass(frozen=True, slots=True)
class Rival:
    """Another agent that says it is a node which is connected: its host and journal, when it came
    last, and when the log said so."""

    hostname: str
    journal_id: str
    at_ms: int
    said_ms: int


@dataclass(slots=True)
class LiveGpu:
    """`holders` are the attempts that have it: one, or several that share it, and strays. `unread`:
    why it gets no work, where it was not read since `unread_since_ms`. `figures` are what was
    said of it last, `used_ratio` is how much it was in use before, and `read_ms` when that was
    read, or at least told."""

    facts: GpuFacts
    phase: GpuPhase
    holders: tuple[str, ...] = ()
    figures: bytes = b""
    used_ratio: float | None = None
    read_ms: int = 0
    unread_since_ms: int | None = None
    unread: str = ""


@dataclass(slots=True)
class LiveNode:
    """A node and what its sessions said. `attempts` are the ids of attempts not ended; `strays`
    those that it runs but should not, with the time of the last stop order, or as in `restored.py`.
    `back_ms`: when it came back from being lost, or first to a coordinator that had restarted;
    `None` if it never did.
    `gangs`: its agent knows ranks of a job of several; `shares`: it knows jobs that share a GPU. No
    record has it, since who takes work has said hello, and may be another version than before.
    `expected_ms`: it stands in line, and is not lost before then. `joined_ms`: when it came after a
    time without a session.
    `clock_wrong`: `clocks.py`; `unlisted`, `parts_found`: `found.py`; `unknown`: `taken_back.py`;
    `behind`: `restored.py`; `foreign`: how often it has spoken of another's attempts.
    `suspect_ms` and `deadline_ms`: when silence makes it suspect, and when lost; `watched_ms`: when
    it is looked at for that (`leases.py`). `used_ms`: when something was last there; 0: unknown.
    `stuck` are pids by attempt (`stuck.py`), and `precopy_gains` of ranks (`precopy.py`)."""

    node: Node
    phase: NodePhase
    deadline_ms: int
    suspect_ms: int = 0
    expected_ms: int = 0
    watched_ms: int | None = None
    session: int | None = None
    newest_session: int = -1
    heard_ms: int = 0
    back_ms: int | None = None
    joined_ms: int = 0
    heartbeat_sequence: int = 0
    note: str = ""
    gpus: dict[str, LiveGpu] = field(default_factory=dict)
    attempts: dict[str, None] = field(default_factory=dict)
    strays: dict[str, int] = field(default_factory=dict)
    stuck: dict[str, tuple[int, ...]] = field(default_factory=dict)
    precopy_gains: dict[str, int] = field(default_factory=dict)
    telemetry: HostTelemetry | None = None
    digests: dict[str, int] = field(default_factory=dict)
    used_ms: int = 0
    gangs: bool = True
    shares: bool = True
    rival: Rival | None = None
    clock_wrong: bool = False
    unlisted: tuple[str, ...] = ()
    parts_found: dict[str, Manifest] = field(default_factory=dict)
    behind: bool = False
    foreign: int = 0
    unknown: dict[str, HeldAttempt] = field(default_factory=dict)


@dataclass(slots=True)
class Given:
    """The order that a node's phase has led to, in this process. `again`: it is the repetition of
    an order of whom came before us. `done`: what the driver said; `None` until it does.
    `postponed`: it was not asked, and that says nothing of the node."""

    key: str
    at_ms: int
    again: bool
    done: bool | None = None
    answered_ms: int = 0
    reason: str = ""
    postponed: bool = False


@dataclass(slots=True)
class Switching:
    """Orders under way by node; boot times as they are until one more has been seen. `refused`: by
    node when its last order off came to nothing, and for how long of the plan's time it is left
    alone for that. `postponed`: by node how often in a row its last order was not begun. `at_ms`:
    when changes were by the monotonic clock, by node and wall time. Of rented nodes: when by GPU
    type one did not come last, and of whom it was said that nobody here can give it back."""

    given: dict[str, Given] = field(default_factory=dict)
    boots: BootTimes | None = None
    refused: dict[str, tuple[int, int]] = field(default_factory=dict)
    postponed: dict[str, int] = field(default_factory=dict)
    at_ms: dict[str, dict[int, int]] = field(default_factory=dict)
    unrented_ms: dict[str, int] = field(default_factory=dict)
    unmanaged: dict[str, None] = field(default_factory=dict)

    def forget(self, node_id: str) -> None:
        self.given.pop(node_id, None)
        self.refused.pop(node_id, None)
        self.at_ms.pop(node_id, None)
        self.unmanaged.pop(node_id, None)
        self.boots = None
