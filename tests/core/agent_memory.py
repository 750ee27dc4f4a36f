"""The agent's journal as a fold: what a fresh core is made of after its predecessor was killed.

Problem: whether an agent that comes back does the right thing depends on what its journal holds at
that very moment. This is the smallest thing that a journal can be, a function from records to what
they leave behind. `SqliteJournal` and the simulation's have to agree with it
(`tests/agent/test_journal.py`), so whatever holds for a core made from this fold holds for one made
from the file.
"""

from collections.abc import Iterable

from agent.core.attempt import AttemptRecord
from agent.core.gpu_messages import GpuLeft, GpusInspected, InspectGpus, PutGpusLeft
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
from agent.core.values import GpuOccupancy


def inspected(command: InspectGpus) -> GpusInspected:
    """The answer of a driver whose every GPU is clean; `test_clean.py` has others."""
    return GpusInspected(tuple(GpuOccupancy(uuid, 0, ()) for uuid in command.gpu_uuids))


class MemoryJournal:
    """`commit` records, read them back as `memory()`."""

    def __init__(self, journal_id: str = "j1") -> None:
        self.journal_id = journal_id
        self.attempts: dict[str, AttemptRecord] = {}
        self.spool: dict[int, AgentEvent] = {}
        self.next_sequence = 1
        self.fences: dict[int, PutFence] = {}
        self.leader_epoch = 0
        self.gpus_mended = NOTHING_MENDED
        self.gpus_left: tuple[GpuLeft, ...] = ()

    def commit(self, records: Iterable[Record]) -> None:
        for record in records:
            self._write(record)

    def memory(self) -> Memory:
        return Memory(
            self.journal_id,
            tuple(self.attempts.values()),
            tuple(self.spool.values()),
            self.next_sequence,
            tuple(self.fences.values()),
            self.leader_epoch,
            self.gpus_mended,
            self.gpus_left,
        )

    def _write(self, record: Record) -> None:
        match record:
            case PutAttempt():
                self.attempts[record.record.id] = record.record
            case DropAttempt():
                self.attempts.pop(record.attempt, None)
            case SpoolEvent():
                self.spool[record.event.sequence] = record.event
                self.next_sequence = record.event.sequence + 1
            case DropSpooled():
                for sequence in [known for known in self.spool if known <= record.sequence]:
                    del self.spool[sequence]
            case PutFence():
                self.fences.pop(record.job_id, None)  # the one raised last stands last
                self.fences[record.job_id] = record
            case DropFence():
                self.fences.pop(record.job_id, None)
            case PutLeaderEpoch():
                self.leader_epoch = record.epoch
            case PutJournalId():
                self.journal_id = record.journal_id
            case PutGpusMended():
                self.gpus_mended = record
            case PutGpusLeft():
                self.gpus_left = record.left
