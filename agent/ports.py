"""What the agent's shell needs from the world, as Protocols.

Problem: a shell that names concrete classes can only run on a real box. Every adapter stands behind
one of these, `main.py` alone picks which, and `tests/sim` picks others. A port speaks in
`agent.core.values`; no library type crosses it.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from agent.core.messages import Order, Upward
from agent.core.state import Record
from agent.core.values import (
    DriverLoaded,
    Gang,
    GpuFacts,
    GpuOccupancy,
    HostFacts,
    Launch,
    Origin,
    ProcessesStuck,
    ProcessExit,
    ReplicaSource,
    RestoreCandidate,
    Restored,
    Sample,
    StoredCheckpoint,
    XidSeen,
)


class Chance(Protocol):
    """Randomness, so that a simulation can seed it."""

    def token(self) -> str: ...
    def draw(self) -> float: ...


class Clock(Protocol):
    """`now_ms` is monotonic and only ever compared; `unix_ms` is wall time, for people."""

    def now_ms(self) -> int: ...
    def unix_ms(self) -> int: ...
    async def sleep_ms(self, duration_ms: int) -> None: ...


class GpuProbe(Protocol):
    """Reads GPUs and host. Methods run in a worker thread: they may block, they never raise for a
    sick GPU."""

    def host_facts(self) -> HostFacts: ...
    def gpu_facts(self) -> tuple[GpuFacts, ...]: ...
    def sample(self) -> Sample: ...

    def occupancy(self, gpu_uuids: Sequence[str]) -> tuple[GpuOccupancy, ...]:
        """Who uses these now, in any order, as far as the driver says. It costs the driver more
        than a sample."""
        ...

    def follow_rate(self, rate: str) -> None:
        """Read as often as this says; `OWN_RATE`: as configured. Does not block."""
        ...


class Xids(Protocol):
    """The driver's errors, as they come."""

    async def open(self, told: Callable[[XidSeen | DriverLoaded], None]) -> None:
        """Tell what this boot has seen of them, and from then on each, at once."""
        ...

    def close(self) -> None: ...


class Processes(Protocol):
    """Starts, signals, adopts and reaps trainers; exits are told to `on_exit`, once each, also
    those that happened while the agent was away."""

    async def open(
        self,
        on_exit: Callable[[ProcessExit], None],
        on_stuck: Callable[[ProcessesStuck], None],
    ) -> tuple[str, ...]:
        """Adopt what still runs (or ended unseen) here; returns those attempt ids. `on_stuck` is
        told what outlives a kill, as often as that changes."""
        ...

    async def start(self, launch: Launch) -> int:
        """Start a trainer; returns its pid. Starting an attempt twice is starting it once. Raises
        `StartError`."""
        ...

    def age_ms(self, attempt_id: str) -> int:
        """How long ago the program of an attempt that was started began, at least."""
        ...

    def signal(self, attempt_id: str, signal_name: str) -> None:
        """Send TERM, USR1 or USR2 to the trainer's whole process group; a process that has gone is
        no error."""
        ...

    def dump_stacks(self, attempt_id: str, nccl_pipes: str) -> None:
        """Have those of its processes that can write the stacks of their threads into the attempt's
        log, and torch's flight recorder its collectives, where pipes with names that begin with
        `nccl_pipes` wait for that (empty: there are none). No other process notices."""
        ...

    def kill(self, attempt_id: str) -> None:
        """SIGKILL everything that the attempt ever started; its exit is told as any other."""
        ...

    def forget(self, attempt_id: str) -> None:
        """The exit is settled: bookkeeping may go (the log stays until the cap pushes it out)."""
        ...

    async def close(self) -> None:
        """Let go of every trainer without touching it."""
        ...


class StartError(Exception):
    """A trainer could not be started; the text is a sentence that says what to change.

    `permanent`: another node would fail as well. A full disk here is not full everywhere.
    """

    def __init__(self, sentence: str, *, permanent: bool = True) -> None:
        super().__init__(sentence)
        self.permanent = permanent


class ChunkError(Exception):
    """A checkpoint could not be stored, copied or read; the text is a sentence naming the file,
    digest or peer."""


@dataclass(frozen=True, slots=True)
class CapturedFile:
    """The image of one file of a checkpoint, within the slot of a capture. Two with the same
    `identity`, path and place have the same bytes, by the word of their trainer; empty: it gives
    none."""

    path: str
    offset_bytes: int
    size_bytes: int
    identity: str = ""


class CaptureSource(Protocol):
    """A capture that is being read. Methods run in a worker thread."""

    @property
    def files(self) -> tuple[CapturedFile, ...]: ...

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Bytes of the slot. Raises `ChunkError`."""
        ...

    def read_into(self, offset_bytes: int, target: memoryview) -> None:
        """As many as the target holds. Raises `ChunkError`."""
        ...

    def check(self) -> None:
        """After all was read: raises `ChunkError` when the slot was overwritten meanwhile."""
        ...


@dataclass(frozen=True, slots=True)
class FoundCapture:
    """A whole capture in a slab, by its `capture_name`. `parts` as in `TrainerCheckpoint`."""

    name: str
    step: int
    parts: int = 1


class Slabs(Protocol):
    """Memory that trainers write captures into, and that outlives them."""

    def newest(self, attempt_id: str) -> FoundCapture | None: ...

    def reading(self, attempt_id: str, name: str) -> AbstractContextManager[CaptureSource]:
        """Raises `ChunkError` on entry, when it is not there any more."""
        ...

    def release(self, attempt_id: str) -> None: ...


class Chunks(Protocol):
    """The content-addressed checkpoint store of this node, and its traffic with peers and the
    shared directory."""

    async def store(self, directory: str, origin: Origin) -> StoredCheckpoint:
        """Hash and keep every file under `directory`, durably; the directory stays as it is. Doing
        it again with the same arguments gives the same digest and writes nothing new. Raises
        `ChunkError`, e.g. when the disk is full."""
        ...

    async def store_capture(self, source: CaptureSource, origin: Origin) -> StoredCheckpoint:
        """The same for the files of a capture, from memory. Raises `ChunkError`."""
        ...

    async def discard(self, directory: str) -> None:
        """Remove a directory that a trainer built a checkpoint in. One that has gone is no error.
        Never raises: what lies elsewhere is not touched, and that, as any failure to remove, is
        logged."""
        ...

    async def replicate(self, digest: str, target: ReplicaSource) -> None:
        """Send what the target lacks, and its manifest last. Raises `ChunkError`."""
        ...

    async def restore(
        self, candidates: Sequence[RestoreCandidate], directory: str, gang: Gang | None = None
    ) -> Restored:
        """Fetch what is missing, verify it, lay the files out under `directory`: everything, but
        for what is for another rank alone where as many ranks as wrote it read it again. A
        candidate is skipped only when this node and each of its sources answered that they have no
        good copy. Raises `ChunkError` when a source did not answer, or when this node could not do
        it (the disk is full): progress does not go back for that; try again later or elsewhere."""
        ...

    async def checkpoints(self) -> tuple[str, ...]:
        """Digests of the whole checkpoints on this disk, newest first, at most 4096."""
        ...

    async def collect(self, keep: frozenset[str]) -> int:
        """Drop manifests that are not in `keep`, and chunks that no manifest names; returns the
        bytes freed. A manifest goes at once when one in `keep` lies here that is newer and of the
        same job (by epoch, then step). Any other is spared for days after it was written or last
        published: it may be the newest progress of a job whose writer waits for the coordinator.
        Chunks are spared for a minute after they were written or asked about. Raises
        `ChunkError`."""
        ...


class JournalUnavailable(Exception):
    """Nothing of the batch is durable; the same batch may be tried again (the disk is full)."""


class Journal(Protocol):
    """What this node runs, crash-safe."""

    async def commit(self, records: Sequence[Record]) -> None:
        """All of it durable, or none. Raises `JournalUnavailable`."""
        ...


class Workspace(Protocol):
    """The directories of attempts. Methods run in a worker thread."""

    def prepare(self, attempt_id: str) -> None:
        """Make staging and work directories. Raises `StartError`, e.g. when the disk is full."""
        ...

    def restore_directory(self, attempt_id: str) -> str: ...
    def staging_directory(self, attempt_id: str) -> str: ...

    def write_trainer_config(self, attempt_id: str, config_json: str) -> None:
        """Raises `StartError`."""
        ...

    def clear(self, attempt_id: str) -> None:
        """Everything but the log may go."""
        ...


class Trainers(Protocol):
    """The socket to trainers; what they say is told to a callback given at construction."""

    def register(self, attempt_id: str, token: str, staging_directory: str) -> None: ...
    def unregister(self, attempt_id: str) -> None: ...
    def tell(self, attempt_id: str, message: Mapping[str, object]) -> None: ...


class Session(Protocol):
    """One connection to the coordinator. `receive` raises `LinkClosed` when it is over."""

    async def send(self, message: Upward) -> None: ...
    async def receive(self) -> Order: ...
    async def close(self) -> None: ...


class LinkClosed(Exception):
    """The connection to the coordinator ended; the text says how."""


class Uplink(Protocol):
    """Dials the coordinator."""

    async def dial(self) -> Session:
        """Raises `LinkClosed` when the coordinator cannot be reached."""
        ...


@dataclass(frozen=True, slots=True)
class Ports:
    """The world, as the shell is given it."""

    clock: Clock
    chance: Chance
    probe: GpuProbe
    processes: Processes
    workspace: Workspace
    trainers: Trainers
    slabs: Slabs
    chunks: Chunks
    journal: Journal
    uplink: Uplink
    log: Callable[[str, str, tuple[tuple[str, object], ...]], None]
    in_thread: Callable[..., Awaitable[object]]
    xids: Xids
    sample_interval_ms: int = 1_000
