"""What this node knows, and the only functions that change it.

As on the coordinator, a change *is* a record: nothing durable is edited without being journalled in
the same step, and nothing is commanded that the journal does not know of yet.
"""

from dataclasses import dataclass, replace
from itertools import islice

from agent.core.attempt import AttemptRecord, LiveAttempt, Phase, Proposal, advance
from agent.core.clean import Check
from agent.core.gpu_messages import OWN_RATE, GpuLeft, PutGpusLeft
from agent.core.health import NO_TABLE, Watched, XidTable
from agent.core.ids import AttemptId, parse_attempt_id
from agent.core.launch import LaunchOptions
from agent.core.messages import (
    AgentEvent,
    CheckpointProposed,
    Command,
    Goodbye,
    Log,
    Send,
    SpooledBody,
    TellTrainer,
    Upward,
)
from agent.core.values import GpuFacts, GpuOccupancy, HostFacts, Sample
from agent.core.window import Window

# Events wait on disk while the coordinator is away. A node that reaches this bound has had tens of
# thousands of attempts end unseen; from then on milestones are dropped, and starts are refused.
SPOOL_MAX = 20_000
# A stop may come for an attempt that never arrived; that is remembered so that it never starts. By
# job: of a gang the ranks of its last epoch are remembered one by one, `RANKS_MAX` at most.
FENCES_MAX = 10_000
SPOOL_SENT_MAX = 256  # events on their way; the next follow as these are acknowledged
RESEND_MS = 2_000  # an event not acknowledged for this long is sent again
MILESTONES_MAX = 32  # per attempt; a trainer that reports more has mistaken them for progress
# Reasons come from the system, from libraries and from file names; a person reads one sentence.
REASON_CHARACTERS_MAX = 1_024


def sentence(reason: str) -> str:
    """A reason as the journal and the wire can carry it: bounded, and Unicode, which a file name
    that is not UTF-8 is not (PEP 383)."""
    return reason[:REASON_CHARACTERS_MAX].encode("utf-8", "replace").decode()


@dataclass(frozen=True, slots=True)
class Instant:
    """`now_ms` is monotonic and is what decisions compare; `unix_ms` is only written down."""

    now_ms: int
    unix_ms: int


@dataclass(frozen=True, slots=True)
class Options:
    """What stands in the configuration and matters to decisions."""

    peer_address: str
    launch: LaunchOptions
    shared_directory: str = ""
    hang_floor_ms: int = 120_000
    """No section is called hung before it has taken this long."""
    xids: XidTable = NO_TABLE

    @property
    def node(self) -> str:
        return self.launch.node


# --- records --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutAttempt:
    record: AttemptRecord


@dataclass(frozen=True, slots=True)
class DropAttempt:
    attempt: str


@dataclass(frozen=True, slots=True)
class SpoolEvent:
    event: AgentEvent


@dataclass(frozen=True, slots=True)
class DropSpooled:
    """Events up to this sequence are acknowledged."""

    sequence: int


@dataclass(frozen=True, slots=True)
class PutFence:
    """Nothing of the job's earlier epochs starts here any more, and of this one none of `ranks`;
    without ranks, nothing of it. Replaces the job's fence of before."""

    job_id: int
    epoch: int
    ranks: tuple[int, ...] = ()

    def holds(self, attempt: AttemptId) -> bool:
        """Whether this attempt of the job must not start."""
        fenced = not self.ranks or attempt.rank in self.ranks
        return attempt.epoch < self.epoch or (attempt.epoch == self.epoch and fenced)


@dataclass(frozen=True, slots=True)
class DropFence:
    job_id: int


@dataclass(frozen=True, slots=True)
class PutLeaderEpoch:
    epoch: int


@dataclass(frozen=True, slots=True)
class PutJournalId:
    """It is another journal from here on (`link.py`)."""

    journal_id: str


@dataclass(frozen=True, slots=True)
class PutGpusMended:
    """By UUID, up to which record of the kernel's log all that was wrong with a GPU is over: the
    log tells of it again after our restart. It counts records anew in each boot. Replaces what was
    put before."""

    boot_id: str
    mended: tuple[tuple[str, int], ...]


NOTHING_MENDED = PutGpusMended("", ())

Record = (
    PutAttempt
    | DropAttempt
    | SpoolEvent
    | DropSpooled
    | PutFence
    | DropFence
    | PutLeaderEpoch
    | PutJournalId
    | PutGpusMended
    | PutGpusLeft
)
Effect = Record | Command


@dataclass(frozen=True, slots=True)
class Memory:
    """Everything that the journal holds, as it hands it over at start."""

    journal_id: str
    attempts: tuple[AttemptRecord, ...] = ()
    spool: tuple[AgentEvent, ...] = ()
    next_sequence: int = 1
    fences: tuple[PutFence, ...] = ()
    leader_epoch: int = 0
    gpus_mended: PutGpusMended = NOTHING_MENDED
    gpus_left: tuple[GpuLeft, ...] = ()


class State:
    def __init__(self, options: Options, memory: Memory) -> None:
        self.options = options
        self.journal_id = memory.journal_id
        self.attempts = {record.id: LiveAttempt(record) for record in memory.attempts}
        self.spool: dict[int, AgentEvent] = {event.sequence: event for event in memory.spool}
        self.spooled_ms: dict[int, int] = {}  # when, for what this process has spooled
        self.next_sequence = memory.next_sequence
        # Until the first welcome: the newest event that anybody may have heard.
        self.sent_before: int | None = memory.next_sequence - 1
        self.fences = {fence.job_id: fence for fence in memory.fences}
        self.leader_epoch = memory.leader_epoch
        self.host: HostFacts | None = None
        self.gpus: tuple[GpuFacts, ...] = ()
        self.gpus_mended = memory.gpus_mended  # until it is known which boot this is
        self.watched = Watched()
        self.sample: Sample | None = None
        self.sample_ms = 0
        self.window = Window()  # since the last report
        # GPUs that were left and not seen clean since; what each was like when nothing ran on it
        self.checks: dict[str, Check] = {}
        self.gpus_left = {left.uuid: left for left in memory.gpus_left}  # until its GPU is there
        self.idle_due_ms: int | None = None  # when GPUs are looked at again that are not known yet
        self.ordered_rate = OWN_RATE  # of readings
        self.idle_occupancies: dict[str, GpuOccupancy] = {}
        self.connected = False
        self.welcomed = False
        self.heard_ms = 0
        self.heartbeat_interval_ms = self.report_interval_ms = 1_000
        self.lease_ms = 8_000
        self.heartbeat_sequence = 0
        self.heartbeat_due_ms: int | None = None
        self.report_due_ms = 0
        self.resend_due_ms: int | None = None
        self.section_check_ms: int | None = None  # while some trainer is in a section
        self.sent_sequence = 0  # the newest event that was sent in this session
        self.records: list[Record] = []
        # With the next record: what is said again until then is known, and nobody waits for it.
        self.dropped: DropSpooled | None = None
        self.commands: list[Command] = []
        for event in self.spool.values():
            self._await_answer(event)

    def _await_answer(self, event: AgentEvent) -> None:
        """A proposal that was spooled before the agent came back is answered after it."""
        live = self.attempts.get(event.attempt)
        if live is None or not isinstance(event.body, CheckpointProposed):
            return
        digest = event.body.digest
        trainer_id = live.record.stored_id if digest == live.record.stored_digest else None
        live.unanswered[digest] = Proposal(trainer_id, event.body.parent)

    def take(self) -> list[Effect]:
        """Everything that has come up since the last call, records first."""
        if self.records and self.dropped is not None:
            self.records.append(self.dropped)
            self.dropped = None
        effects: list[Effect] = [*self.records, *self.commands]
        self.records, self.commands = [], []
        return effects

    # --- records ----------------------------------------------------------------------------------

    def put(self, live: LiveAttempt, phase: Phase | None = None, **fields: object) -> None:
        """Change an attempt's record; the only way from one phase to the next."""
        present = live.record.phase
        fields["phase"] = advance(present, phase or present, live.record.id)
        live.record = replace(live.record, **fields)  # type: ignore[arg-type]
        self.records.append(PutAttempt(live.record))

    def add(self, record: AttemptRecord) -> LiveAttempt:
        live = LiveAttempt(record)
        self.attempts[record.id] = live
        self.records.append(PutAttempt(record))
        return live

    def drop(self, live: LiveAttempt) -> None:
        """The attempt is settled everywhere; it is fenced, so that it cannot begin again."""
        del self.attempts[live.record.id]
        self.records.append(DropAttempt(live.record.id))
        self.fence(parse_attempt_id(live.record.id))

    def is_fenced(self, attempt: AttemptId) -> bool:
        known = self.fences.get(attempt.job_id)
        return known is not None and known.holds(attempt)

    def fence(self, attempt: AttemptId) -> None:
        """Never let this attempt start, nor any of an earlier epoch; other ranks of its own may."""
        if self.is_fenced(attempt):
            return
        job_id = attempt.job_id
        known = self.fences.pop(job_id, None)
        ranks: tuple[int, ...] = ()
        if attempt.rank is not None:
            before = known.ranks if known is not None and known.epoch == attempt.epoch else ()
            ranks = (*before, attempt.rank)
        fence = PutFence(job_id, attempt.epoch, ranks)
        self.fences[job_id] = fence
        self.records.append(fence)
        while len(self.fences) > FENCES_MAX:
            oldest = next(iter(self.fences))
            del self.fences[oldest]
            self.records.append(DropFence(oldest))

    def spool_event(self, now: Instant, attempt_id: str, body: SpooledBody) -> int:
        """Keep a fact until the coordinator has it; send it at once if it can be heard."""
        event = AgentEvent(self.next_sequence, now.unix_ms, attempt_id, body)
        self.next_sequence += 1
        self.spool[event.sequence] = event
        self.spooled_ms[event.sequence] = now.now_ms
        self.records.append(SpoolEvent(event))
        self.flow(now)
        return event.sequence

    @property
    def acknowledged_sequence(self) -> int:
        """Of events up to this one there is nothing left to say: some coordinator had them."""
        return next(iter(self.spool), self.next_sequence) - 1

    def acknowledge(self, now: Instant, sequence: int) -> None:
        sequence = min(sequence, self.next_sequence - 1)
        if sequence <= self.acknowledged_sequence:
            return
        acknowledged = [known for known in self.spool if known <= sequence]
        gone = [self.spool.pop(known).body for known in acknowledged]
        for known in acknowledged:
            self.spooled_ms.pop(known, None)
        self.dropped = DropSpooled(sequence)
        if any(isinstance(body, CheckpointProposed) for body in gone):
            self.records.append(self.dropped)  # else we would wait for its answer after a restart
            self.dropped = None
        self.resend_due_ms = None
        self.flow(now)

    def flow(self, now: Instant) -> None:
        """Send, oldest first, what was not sent yet, as far as the window reaches."""
        if not self.welcomed or not self.spool:
            return
        for event in islice(self.spool.values(), SPOOL_SENT_MAX):
            if event.sequence > self.sent_sequence:
                self.send(replace(event, age_ms=self._age_ms(now, event)))
                self.sent_sequence = event.sequence
        if self.resend_due_ms is None:
            self.resend_due_ms = now.now_ms + RESEND_MS

    def _age_ms(self, now: Instant, event: AgentEvent) -> int:
        """Of what is from before our restart the wall clock alone tells, if it was not set."""
        spooled_ms = self.spooled_ms.get(event.sequence)
        if spooled_ms is None:
            return max(0, now.unix_ms - event.unix_ms)
        return now.now_ms - spooled_ms

    # --- commands ---------------------------------------------------------------------------------

    def send(self, message: Upward) -> None:
        if self.connected or isinstance(message, Goodbye):
            self.commands.append(Send(message))

    def tell(self, attempt_id: str, **message: str | int) -> None:
        self.commands.append(TellTrainer(attempt_id, tuple(message.items())))

    def log(self, level: str, event: str, **fields: object) -> None:
        live = self.attempts.get(str(fields.get("attempt")))
        if live is not None and live.record.traceparent:
            fields["trace_id"] = live.record.trace_id
        self.commands.append(Log(level, event, tuple(fields.items())))
