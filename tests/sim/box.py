"""A GPU box without metal: a disk, trainers, and the ports of the agent that lives on it.

Problem: an agent's faults are only interesting because its box outlives it. So the box is the
lasting thing here. Its `Disk` survives power cuts; its trainers survive the agent and die with the
power; an agent's incarnation gets fresh fakes of its ports, which read and write the box and
nothing else.

A trainer's work is its history: which attempt took which steps, on top of which other's. A
checkpoint's content is that history, so whether progress was lost or forked can be read off any
checkpoint.
"""

import asyncio
import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from agent.core.attempt import AttemptRecord
from agent.core.messages import AgentEvent
from agent.core.state import (
    DropAttempt,
    DropFence,
    DropSpooled,
    Memory,
    PutAttempt,
    PutFence,
    PutLeaderEpoch,
    Record,
    SpoolEvent,
)
from agent.core.values import (
    GpuFacts,
    GpuSample,
    HostFacts,
    HostSample,
    Launch,
    ProcessExit,
    ReplicaSource,
    RestoreCandidate,
    Restored,
    Sample,
    StoredCheckpoint,
)
from agent.journal import decode_event, encode_event
from agent.ports import (
    CapturedFile,
    CaptureSource,
    ChunkError,
    FoundCapture,
    JournalUnavailable,
    StartError,
)
from tests.sim.checkers import Checkers, Content
from tests.sim.trainer import Slab, Trainer

COLLECT_GRACE_MS = 60_000  # as in the real store, younger checkpoints are never collected


@dataclass(slots=True)
class Copy:
    """A checkpoint on a disk; `intact` until somebody scratches it."""

    content: Content
    size_bytes: int
    stored_ms: int
    intact: bool = True


@dataclass(slots=True)
class Disk:
    """What survives a power cut."""

    journal_id: str
    attempts: dict[str, bytes] = field(default_factory=dict)
    spool: dict[int, str] = field(default_factory=dict)
    fences: dict[int, int] = field(default_factory=dict)
    next_sequence: int = 1
    leader_epoch: int = 0
    copies: dict[str, Copy] = field(default_factory=dict)
    staging: dict[str, Content] = field(default_factory=dict)
    # Directories of attempts: the exit that nobody has settled yet, `None` while it runs.
    unsettled: dict[str, ProcessExit | None] = field(default_factory=dict)
    settled: dict[str, None] = field(default_factory=dict)
    full: bool = False


class Surroundings(Protocol):
    """What a box asks of the world around it."""

    checkers: Checkers
    chance: random.Random

    def now_ms(self) -> int: ...
    async def pause_ms(self, low_ms: int, high_ms: int) -> None: ...
    def trace(self, line: str) -> None: ...
    def fired(self, kind: str) -> None: ...
    def peer(self, here: str, there: str) -> "Box | None":
        """That box, if its agent answers this one."""
        ...


class Box:
    def __init__(self, name: str, gpu_count: int, around: Surroundings) -> None:
        self.name = name
        self.around = around
        self.gpus = tuple(
            GpuFacts(f"GPU-{name}-{index}", "NVIDIA H100", 80_000_000_000)
            for index in range(gpu_count)
        )
        self.boots = 0
        self.powered = False
        self.gate = asyncio.Event()  # closed while the agent's process is suspended
        self.gate.set()
        self.disk = Disk(f"{name}-journal-1")
        self.trainers: dict[str, Trainer] = {}
        # The agent's ears while it is up.
        self.on_exit: Callable[[ProcessExit], None] | None = None
        self.socket: SimTrainers | None = None

    def power_on(self) -> None:
        self.boots += 1
        self.powered = True

    def power_off(self) -> None:
        """Everything that runs is gone; the disk stays."""
        self.powered = False
        self.on_exit = self.socket = None
        for trainer in list(self.trainers.values()):
            trainer.vanish("power")
        self.trainers.clear()
        for attempt_id, ended in self.disk.unsettled.items():
            if ended is None:
                self.disk.unsettled[attempt_id] = ProcessExit(
                    attempt_id, None, None, "ended unseen: the box rebooted"
                )

    def lose_disk(self) -> None:
        self.disk = Disk(f"{self.name}-journal-{self.boots + 1}")

    def trainer_ended(self, trainer: Trainer, ended: ProcessExit) -> None:
        """Its shim writes down how; the agent hears it if there is one."""
        self.trainers.pop(trainer.attempt_id, None)
        self.disk.unsettled[trainer.attempt_id] = ended
        if self.on_exit is not None:
            self.on_exit(ended)

    def host_facts(self) -> HostFacts:
        boot = f"{self.name}-boot-{self.boots}"
        return HostFacts(self.name, boot, 16, 256_000_000_000, "580.65", "0.1.0")


class SimProbe:
    """GPUs that feel nothing."""

    def __init__(self, box: Box) -> None:
        self._box = box

    def host_facts(self) -> HostFacts:
        return self._box.host_facts()

    def gpu_facts(self) -> tuple[GpuFacts, ...]:
        return self._box.gpus

    def sample(self) -> Sample:
        gpus = tuple(GpuSample(gpu.uuid, 0.5, 1_000) for gpu in self._box.gpus)
        return Sample(HostSample(0.5, 1_000_000, 1_000_000_000, 1.0), gpus)


class SimWorkspace:
    def __init__(self, box: Box) -> None:
        self._box = box

    def prepare(self, attempt_id: str) -> None:
        """Nothing to make: paths are names here."""

    def restore_directory(self, attempt_id: str) -> str:
        return f"/attempts/{attempt_id}/restore"

    def staging_directory(self, attempt_id: str) -> str:
        return f"/attempts/{attempt_id}/staging"

    def write_trainer_config(self, attempt_id: str, config_json: str) -> None:
        raise AssertionError("every job of the simulation is a command")

    def clear(self, attempt_id: str) -> None:
        prefix = f"/attempts/{attempt_id}/"
        for path in [path for path in self._box.disk.staging if path.startswith(prefix)]:
            del self._box.disk.staging[path]


class SimJournal:
    """The disk's journal, written as documents, so that nothing survives that JSON would lose."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self.busy = False  # a batch is on its way

    def open(self) -> Memory:
        disk = self._box.disk
        return Memory(
            disk.journal_id,
            tuple(msgspec.json.decode(text, type=AttemptRecord) for text in disk.attempts.values()),
            tuple(decode_event(disk.spool[sequence]) for sequence in sorted(disk.spool)),
            disk.next_sequence,
            tuple(disk.fences.items()),
            disk.leader_epoch,
        )

    async def commit(self, records: Sequence[Record]) -> None:
        around = self._box.around
        self.busy = True
        await around.pause_ms(1, 8)
        await self._box.gate.wait()
        if self._box.disk.full:
            around.fired("journal_full")
            raise JournalUnavailable("no space left on device")
        for record in records:
            self._write(record)
        await around.pause_ms(0, 3)
        self.busy = False

    def _write(self, record: Record) -> None:
        disk = self._box.disk
        match record:
            case PutAttempt():
                disk.attempts[record.record.id] = msgspec.json.encode(record.record)
            case DropAttempt():
                disk.attempts.pop(record.attempt, None)
            case SpoolEvent(event=event):
                self._spool(event)
            case DropSpooled():
                for sequence in [known for known in disk.spool if known <= record.sequence]:
                    del disk.spool[sequence]
            case PutFence():
                disk.fences.pop(record.job_id, None)
                disk.fences[record.job_id] = record.epoch
            case DropFence():
                disk.fences.pop(record.job_id, None)
            case PutLeaderEpoch():
                disk.leader_epoch = record.epoch

    def _spool(self, event: AgentEvent) -> None:
        disk = self._box.disk
        disk.spool[event.sequence] = encode_event(event)
        disk.next_sequence = event.sequence + 1
        self._box.around.checkers.spooled(self._box.name, event, self._box.trainers)


class SimProcesses:
    """The box's trainers, as one incarnation of the agent handles them."""

    def __init__(self, box: Box) -> None:
        self._box = box

    async def open(self, on_exit: Callable[[ProcessExit], None]) -> tuple[str, ...]:
        box = self._box
        await box.around.pause_ms(5, 50)
        box.on_exit = on_exit
        for attempt_id, ended in box.disk.unsettled.items():
            if ended is not None:
                on_exit(ended)
            else:
                assert attempt_id in box.trainers, f"{attempt_id} neither runs nor has ended"
        return tuple(box.disk.unsettled)

    async def start(self, launch: Launch) -> int:
        box, disk = self._box, self._box.disk
        attempt_id = launch.attempt_id
        if attempt_id in disk.settled:
            raise StartError(f"attempt {attempt_id} has already run on this node")
        if attempt_id not in disk.unsettled:
            disk.unsettled[attempt_id] = None
            restored = disk.staging.get(f"/attempts/{attempt_id}/restore")
            trainer = Trainer(box, launch, restored)
            box.trainers[attempt_id] = trainer
            box.around.checkers.process_started(box.name, trainer, box.trainers)
            trainer.begin()
        await box.around.pause_ms(5, 200)
        return 1_000 + len(disk.unsettled) + len(disk.settled)

    def signal(self, attempt_id: str, signal_name: str) -> None:
        trainer = self._box.trainers.get(attempt_id)
        if trainer is not None:
            self._box.around.checkers.signalled(self._box.name, attempt_id, signal_name)
            trainer.ask_to_stop()

    def dump_stacks(self, attempt_id: str, nccl_pipes: str) -> None:
        raise AssertionError("no trainer here speaks of sections, so none is ever called hung")

    def kill(self, attempt_id: str) -> None:
        trainer = self._box.trainers.get(attempt_id)
        if trainer is not None:
            self._box.around.checkers.signalled(self._box.name, attempt_id, "KILL")
            trainer.end(None, 9)

    def forget(self, attempt_id: str) -> None:
        disk = self._box.disk
        if attempt_id not in disk.unsettled:
            return
        if attempt_id in self._box.trainers:
            raise ValueError(f"attempt {attempt_id} still runs")
        del disk.unsettled[attempt_id]
        disk.settled[attempt_id] = None

    async def close(self) -> None:
        """The trainers go on. What an older incarnation closes late is not the newer one's."""


class SimTrainers:
    """The socket. Trainers reconnect to whichever agent listens."""

    def __init__(self, box: Box, slabs: "SimSlabs", said: Callable[[str, object], None]) -> None:
        self._box = box
        self.slabs = slabs
        self.said = said
        self.tokens: dict[str, str] = {}

    def register(self, attempt_id: str, token: str, staging_directory: str) -> None:
        self.tokens[attempt_id] = token
        trainer = self._box.trainers.get(attempt_id)
        if trainer is not None:
            trainer.reconnect()

    def unregister(self, attempt_id: str) -> None:
        self.tokens.pop(attempt_id, None)

    def tell(self, attempt_id: str, message: Mapping[str, object]) -> None:
        trainer = self._box.trainers.get(attempt_id)
        if trainer is not None and attempt_id in self.tokens:
            trainer.hear(message)


class SimSlabs:
    """Memory that trainers capture into. It lives as long as its trainer or this incarnation of the
    agent: whoever is left holds it."""

    def __init__(self) -> None:
        self._slabs: dict[str, Slab] = {}

    def adopt(self, attempt_id: str, slab: Slab) -> None:
        self._slabs[attempt_id] = slab

    def newest(self, attempt_id: str) -> FoundCapture | None:
        slab = self._slabs.get(attempt_id)
        if slab is None or not slab.captures:
            return None
        name, content = list(slab.captures.items())[-1]
        return FoundCapture(name, content.step)

    @contextlib.contextmanager
    def reading(self, attempt_id: str, name: str) -> Iterator["SimSource"]:
        slab = self._slabs.get(attempt_id)
        if slab is None or name not in slab.captures:
            raise ChunkError(f"capture {name} is not there")
        yield SimSource(slab, name)

    def release(self, attempt_id: str) -> None:
        self._slabs.pop(attempt_id, None)


class SimSource:
    """A capture that is being stored."""

    files: tuple[CapturedFile, ...] = ()

    def __init__(self, slab: Slab, name: str) -> None:
        self._slab = slab
        self._name = name
        self.content = slab.captures[name]

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        raise AssertionError("the simulation's captures have no bytes")

    def read_into(self, offset_bytes: int, target: memoryview) -> None:
        raise AssertionError("the simulation's captures have no bytes")

    def check(self) -> None:
        if self._name not in self._slab.captures:
            raise ChunkError(f"capture {self._name} was overwritten")


class SimChunks:
    """The checkpoint store: a dictionary of contents, some of them scratched."""

    def __init__(self, box: Box) -> None:
        self._box = box

    async def store(
        self, directory: str, *, job_id: int, epoch: int, step: int, parent: str
    ) -> StoredCheckpoint:
        around = self._box.around
        await around.pause_ms(10, 400)
        content = self._box.disk.staging.get(directory)
        if content is None:
            raise ChunkError(f"{directory} is not there")
        return await self._keep(content, f"{job_id} {epoch} {step} {parent} {content}")

    async def store_capture(
        self, source: CaptureSource, *, job_id: int, epoch: int, step: int, parent: str
    ) -> StoredCheckpoint:
        assert isinstance(source, SimSource)
        await self._box.around.pause_ms(10, 400)
        source.check()
        text = f"{job_id} {epoch} {step} {parent} {source.content}"
        return await self._keep(source.content, text)

    async def _keep(self, content: Content, text: str) -> StoredCheckpoint:
        around, disk = self._box.around, self._box.disk
        if disk.full:
            raise ChunkError("no space left on device")
        digest = hashlib.sha256(text.encode()).hexdigest()
        around.checkers.contents[digest] = content
        disk.copies.setdefault(digest, Copy(content, 1_000_000, around.now_ms()))
        await around.pause_ms(0, 20)
        return StoredCheckpoint(digest, content.step, 1_000_000, 1_000_000)

    async def discard(self, directory: str) -> None:
        self._box.disk.staging.pop(directory, None)

    async def replicate(self, digest: str, target: ReplicaSource) -> None:
        around = self._box.around
        copy = self._box.disk.copies.get(digest)
        if copy is None or not copy.intact:
            raise ChunkError(f"checkpoint {digest[:12]} cannot be read here")
        await around.pause_ms(20, 800)
        peer = around.peer(self._box.name, target.node)
        if peer is None:
            raise ChunkError(f"{target.node} at {target.address} does not answer")
        if peer.disk.full:
            raise ChunkError(f"{target.node}: no space left on device")
        known = peer.disk.copies.get(digest)
        if known is None or not known.intact:
            peer.disk.copies[digest] = Copy(copy.content, copy.size_bytes, around.now_ms())

    async def restore(self, candidates: Sequence[RestoreCandidate], directory: str) -> Restored:
        """As the real one: skipped only where everybody answered."""
        disk = self._box.disk
        skipped: list[tuple[str, str]] = []
        await self._box.around.pause_ms(10, 600)
        for candidate in candidates:
            content = self._find(candidate)
            if content is not None:
                known = disk.copies.get(candidate.digest)
                if known is None or not known.intact:
                    now_ms = self._box.around.now_ms()
                    disk.copies[candidate.digest] = Copy(content, 1_000_000, now_ms)
                disk.staging[directory] = content
                return Restored(candidate.digest, candidate.step, directory, tuple(skipped))
            skipped.append((candidate.digest, "nobody has a good copy"))
        return Restored("", 0, "", tuple(skipped))

    def _find(self, candidate: RestoreCandidate) -> Content | None:
        """Raises `ChunkError` when somebody who may have it did not answer."""
        around = self._box.around
        silent = []
        here = self._box.disk.copies.get(candidate.digest)
        if here is not None and here.intact:
            return here.content
        for source in candidate.sources:
            if source.node == self._box.name:
                continue
            peer = around.peer(self._box.name, source.node)
            if peer is None:
                silent.append(source.node)
                continue
            copy = peer.disk.copies.get(candidate.digest)
            if copy is not None and copy.intact:
                return copy.content
        if silent:
            raise ChunkError(f"{candidate.digest[:12]}: no answer from {', '.join(silent)}")
        return None

    async def checkpoints(self) -> tuple[str, ...]:
        copies = self._box.disk.copies
        return tuple(sorted(copies, key=lambda digest: -copies[digest].stored_ms))

    async def collect(self, keep: frozenset[str]) -> int:
        copies, now_ms = self._box.disk.copies, self._box.around.now_ms()
        await self._box.around.pause_ms(1, 20)
        freed_bytes = 0
        for digest, copy in list(copies.items()):
            if digest not in keep and now_ms - copy.stored_ms > COLLECT_GRACE_MS:
                freed_bytes += copy.size_bytes
                del copies[digest]
        return freed_bytes
