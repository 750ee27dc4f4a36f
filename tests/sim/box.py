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
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec

from agent.core.attempt import AttemptRecord
from agent.core.gpu_messages import GpuLeft, PutGpusLeft
from agent.core.messages import AgentEvent
from agent.core.state import (
    NOTHING_MENDED,
    DropAttempt,
    DropFence,
    DropSpooled,
    Memory,
    PutAttempt,
    PutFence,
    PutGpusMended,
    PutJournalId,
    PutLeaderEpoch,
    Record,
    SpoolEvent,
)
from agent.core.values import (
    DriverLoaded,
    GpuCondition,
    GpuFacts,
    GpuOccupancy,
    GpuSample,
    HostFacts,
    HostSample,
    Launch,
    Origin,
    ProcessesStuck,
    ProcessExit,
    Sample,
    XidSeen,
)
from agent.journal import decode_event, encode_event
from agent.ports import (
    CapturedFile,
    ChunkError,
    FoundCapture,
    JournalUnavailable,
    StartError,
)
from agent.processes import unkillable
from tests.sim.checkers import Checkers, Content
from tests.sim.faults import GPU_MEMORY_BYTES
from tests.sim.gang import Gang
from tests.sim.trainer import Slab, Trainer

STUCK_PID = 4_242  # of a process that a kill does not end; a box has one at a time


@dataclass(slots=True)
class Copy:
    """A checkpoint on a disk; `intact` until somebody scratches it."""

    content: Content
    origin: Origin
    stored_ms: int
    intact: bool = True


@dataclass(slots=True)
class Disk:
    """What survives a power cut."""

    journal_id: str
    attempts: dict[str, bytes] = field(default_factory=dict)
    spool: dict[int, str] = field(default_factory=dict)
    fences: dict[int, PutFence] = field(default_factory=dict)
    next_sequence: int = 1
    leader_epoch: int = 0
    gpus_mended: PutGpusMended = NOTHING_MENDED
    gpus_left: tuple[GpuLeft, ...] = ()
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
    def gang(self, job_id: int, epoch: int, world_size: int) -> Gang:
        """Where the ranks of this try meet."""
        ...

    def peer(self, here: str, there: str) -> "Box | None":
        """That box, if its agent answers this one."""
        ...


class Box:
    def __init__(
        self, name: str, gpu_count: int, around: Surroundings, gpu_name: str = "NVIDIA H100"
    ) -> None:
        self.name = name
        self.around = around
        self.gpus = tuple(
            GpuFacts(f"GPU-{name}-{index}", gpu_name, GPU_MEMORY_BYTES)
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
        self.on_xid: Callable[[XidSeen | DriverLoaded], None] | None = None
        self.kernel_log: list[XidSeen] = []
        self.broken = False  # once
        self.needs_reset: dict[str, None] = {}  # these GPUs, until the next boot

    def power_on(self) -> None:
        self.boots += 1
        self.powered = True

    def power_off(self) -> None:
        """Everything that runs is gone; the disk stays."""
        self.powered = False
        self.on_exit = self.socket = self.on_xid = None
        self.kernel_log.clear()
        self.needs_reset.clear()
        for trainer in list(self.trainers.values()):
            trainer.vanish("power")
        self.trainers.clear()
        for attempt_id, ended in self.disk.unsettled.items():
            if ended is None:
                self.disk.unsettled[attempt_id] = ProcessExit(
                    attempt_id, None, None, "ended unseen: the box rebooted"
                )

    def break_gpu(self, uuid: str, unix_ms: int) -> None:
        """An error that only a reset mends; both witnesses speak of it."""
        self.broken = True
        self.needs_reset[uuid] = None
        seen = XidSeen(95, "kernel", unix_ms, uuid=uuid, text="Uncontained ECC error")
        self.kernel_log.append(seen)
        if self.on_xid is not None:
            self.on_xid(seen)
            self.on_xid(replace(seen, source="nvml", text=""))

    def mend_gpu(self, uuid: str) -> None:
        """Somebody has reset it; the driver says so from the next reading on."""
        self.needs_reset.pop(uuid, None)

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


def _found(pid: int) -> tuple[int, ...]:
    """Whatever a kill leaves here waits in the kernel."""
    return (pid,)


def _restored_part(disk: Disk, launch: Launch) -> Content | None:
    """Of what lies in the attempt's restore directory, the rank's own part, or else the whole."""
    directory = f"/attempts/{launch.attempt_id}/restore"
    rank = dict(launch.environment).get("RANK", "0")
    return disk.staging.get(f"{directory}/{rank}", disk.staging.get(f"{directory}/0"))


class SimProbe:
    """GPUs that feel nothing."""

    def __init__(self, box: Box) -> None:
        self._box = box

    def host_facts(self) -> HostFacts:
        return self._box.host_facts()

    def gpu_facts(self) -> tuple[GpuFacts, ...]:
        return self._box.gpus

    def sample(self) -> Sample:
        gpus = tuple(
            GpuSample(gpu.uuid, 0.5, 1_000, condition=self._condition(gpu.uuid))
            for gpu in self._box.gpus
        )
        return Sample(HostSample(0.5, 1_000_000, 1_000_000_000, 1.0), gpus)

    def follow_rate(self, rate: str) -> None:
        """There is nothing that costs anything."""

    def occupancy(self, gpu_uuids: Sequence[str]) -> tuple[GpuOccupancy, ...]:
        return tuple(GpuOccupancy(uuid, 0, ()) for uuid in gpu_uuids)

    def _condition(self, uuid: str) -> GpuCondition | None:
        """An older driver, which says nothing of it, on boxes that no fault is about."""
        if not self._box.broken:
            return None
        return GpuCondition(recovery_action=1 if uuid in self._box.needs_reset else 0)


class SimXids:
    """Errors of the box's GPUs; each boot has its own, and the kernel keeps them for who asks."""

    def __init__(self, box: Box) -> None:
        self._box = box

    async def open(self, told: Callable[[XidSeen | DriverLoaded], None]) -> None:
        self._box.on_xid = told
        for seen in self._box.kernel_log:
            told(replace(seen, history=True))

    def close(self) -> None:
        """What an older incarnation closes late is not the newer one's."""


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
            tuple(disk.fences.values()),
            disk.leader_epoch,
            disk.gpus_mended,
            disk.gpus_left,
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
                disk.fences[record.job_id] = record
            case DropFence():
                disk.fences.pop(record.job_id, None)
            case PutLeaderEpoch():
                disk.leader_epoch = record.epoch
            case PutJournalId():
                disk.journal_id = record.journal_id
            case PutGpusMended():
                disk.gpus_mended = record
            case PutGpusLeft():
                disk.gpus_left = record.left

    def _spool(self, event: AgentEvent) -> None:
        disk = self._box.disk
        disk.spool[event.sequence] = encode_event(event)
        disk.next_sequence = event.sequence + 1
        self._box.around.checkers.spooled(self._box.name, event, self._box.trainers)


class SimProcesses:
    """The box's trainers, as one incarnation of the agent handles them."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._on_exit: Callable[[ProcessExit], None] = lambda _: None
        self._on_stuck: Callable[[ProcessesStuck], None] = lambda _: None

    async def open(
        self,
        on_exit: Callable[[ProcessExit], None],
        on_stuck: Callable[[ProcessesStuck], None],
    ) -> tuple[str, ...]:
        box = self._box
        await box.around.pause_ms(5, 50)
        box.on_exit = self._on_exit = on_exit
        self._on_stuck = on_stuck
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
            restored = _restored_part(disk, launch)
            trainer = Trainer(box, launch, restored)
            box.trainers[attempt_id] = trainer
            box.around.checkers.process_started(box.name, trainer, box.trainers)
            trainer.begin()
        await box.around.pause_ms(5, 200)
        return 1_000 + len(disk.unsettled) + len(disk.settled)

    def age_ms(self, attempt_id: str) -> int:
        trainer = self._box.trainers.get(attempt_id)
        now_s = asyncio.get_running_loop().time()
        return int((now_s - trainer.began_s) * 1_000) if trainer is not None else 0

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
            unkillable.watch(
                attempt_id, STUCK_PID, lambda: self._is_over(trainer), self._on_stuck, find=_found
            )

    def _is_over(self, trainer: Trainer) -> bool:
        """It has ended, or another incarnation of the agent looks after it."""
        return not trainer.alive or self._box.on_exit is not self._on_exit

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
        return FoundCapture(name, content.step, slab.parts)

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
