"""One attempt on this node: its phases as a table, and what of it must survive the agent.

The agent may be killed between any two lines. What it needs to go on is in `AttemptRecord`, which
is journalled before anything is done about it; what it can ask again (the trainer resends, the
coordinator repeats) stays in `LiveAttempt` and is lost with the process.
"""

from dataclasses import dataclass, field
from enum import Enum

from agent.core.messages import Progress
from agent.core.sections import Sections
from agent.core.values import (
    Gang,
    GpuOccupancy,
    JobSpec,
    ReplicaSource,
    RestoreCandidate,
    Restored,
)


class Phase(Enum):
    # Journalled; its checkpoint is being fetched and verified.
    ACCEPTED = "accepted"
    # The process has been ordered; after an agent restart it is ordered again, which is harmless.
    STARTING = "starting"
    RUNNING = "running"
    # The process is gone, its last checkpoint is still on its way.
    SETTLING = "settling"
    # Its last event is spooled; forgotten when that is acknowledged.
    ENDED = "ended"


TRANSITIONS: dict[Phase, tuple[Phase, ...]] = {
    Phase.ACCEPTED: (Phase.STARTING, Phase.ENDED),
    Phase.STARTING: (Phase.RUNNING, Phase.SETTLING, Phase.ENDED),
    Phase.RUNNING: (Phase.SETTLING,),
    Phase.SETTLING: (Phase.ENDED,),
    Phase.ENDED: (),
}


class IllegalTransition(AssertionError):
    """The core tried a step that the table does not have."""


def advance(present: Phase, following: Phase, attempt_id: str) -> Phase:
    """The next phase, if the table has that step. Raises `IllegalTransition`."""
    if following is not present and following not in TRANSITIONS[present]:
        raise IllegalTransition(f"{attempt_id}: {present.value} to {following.value}")
    return following


@dataclass(frozen=True, slots=True)
class Pending:
    """A checkpoint that is durable here and not yet proposed. `trainer_id` is the trainer's number
    for it. `restored`: what counts already, since it began with it or has proposed it, or its
    rank's part of that, on its way to another node."""

    digest: str
    step: int
    size_bytes: int
    parent: str
    trainer_id: int
    parts: int = 1
    restored: bool = False


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """What the journal keeps. `head` is the checkpoint proposed last, or the one resumed from;
    `committed` the last one that the coordinator accepted. `last_sequence` is the spooled end.
    `stored_id` and `stored_path` are the trainer's words for the checkpoint stored last, and
    `stored_digest` what was made of it, for a trainer that did not hear the answer. `past_capture`
    is the newest capture that is stored, or was handed over before what is. `said_exit_code` and
    `said_reason` are the trainer's last word (`endings.py`). `gang` is its place
    among the ranks of its job, if it has others; `traceparent` is its trace, or empty;
    `gpus_before` is what its GPUs were like while nothing ran on them; and `gpu_memory_ratio` is
    how much of its GPU it may take, where it shares it."""

    id: str
    job_id: int
    epoch: int
    spec: JobSpec
    gpu_uuids: tuple[str, ...]
    candidates: tuple[RestoreCandidate, ...]
    replica_target: ReplicaSource | None
    replica_required: bool
    restart_count: int
    token: str
    phase: Phase = Phase.ACCEPTED
    restored_digest: str = ""
    restored_step: int = 0
    restored_directory: str = ""
    skipped: tuple[tuple[str, str], ...] = ()
    held_ranks: tuple[int, ...] = ()
    head: str = ""
    committed: str = ""
    pending: Pending | None = None
    stored_id: int = 0
    stored_path: str = ""
    stored_digest: str = ""
    past_capture: str = ""
    stop_reason: str = ""
    stop_grace_ms: int | None = None
    exit_code: int | None = None
    exit_signal: int | None = None
    exit_reason: str = ""
    said_exit_code: int | None = None
    said_reason: str = ""
    milestones: int = 0
    last_sequence: int = 0
    gang: Gang | None = None
    traceparent: str = ""
    gpus_before: tuple[GpuOccupancy, ...] = ()
    gpu_memory_ratio: float = 1.0

    @property
    def trace_id(self) -> str:
        """Empty where it has none."""
        return self.traceparent.split("-")[1] if self.traceparent else ""


@dataclass(frozen=True, slots=True)
class Offered:
    """A checkpoint that the trainer has handed over and nobody has read yet: a directory, or a
    capture by its name. `trainer_id` of 0: the trainer died before it said so. `capture` is the
    newest capture handed over by then, itself included; "" for none. `parts` as in
    `TrainerCheckpoint`."""

    trainer_id: int
    path: str
    step: int
    parts: int = 1
    capture: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A checkpoint that the coordinator has not answered for. `trainer_id` of `None`: nobody waits
    for the answer."""

    trainer_id: int | None
    parent: str


@dataclass(slots=True)
class LiveAttempt:
    """The record, and what is lost with the process. `storing` is being hashed now; `offered` waits
    for its turn, and a newer one takes its place. `replicating` is where a copy is going.
    `unanswered` is by digest. `again`: its process was ordered before the agent came back.
    `slab`: it has memory that it writes captures into; `searching`: its process is gone, and we
    look there for one that nobody handed over. `handed_capture` is the newest that somebody did.
    `accepted_ms` is when it was ordered, `restore_ms` how long restoring took. `sections` is where
    its trainers are, and how long that takes. `restored`: it could start, and waits for its GPUs to
    be clean of the one before it. `told` is the progress that the last heartbeat had, in this
    session. `stuck` are its processes that a kill did not end; `None` before somebody has looked.

    Of the pre-copy: `heeds_saves`: its trainer looks for requests to save; `precopy_until_ms`: the
    stop waits for a copy, and no longer than until then. `slab_bytes` is a slot's. `stored_bytes`
    is the size of the checkpoint stored last, `change_bytes` what of it was new. `copied_to` is
    who got the last copy; `copy_since_ms` when the present copy began, `copy_bytes_per_ms` how fast
    the last one was that was large enough to tell. `copies_failed` are the tries in a row in which
    nothing arrived there where copies go now."""

    record: AttemptRecord
    storing: Offered | None = None
    offered: Offered | None = None
    replicating: ReplicaSource | None = None
    replica_retry_ms: int | None = None
    kill_ms: int | None = None
    settle_ms: int | None = None
    again: bool = False
    slab: bool = False
    searching: bool = False
    handed_capture: str = ""
    accepted_ms: int | None = None
    restore_ms: int | None = None
    restored: Restored | None = None
    stuck: tuple[int, ...] | None = None
    unanswered: dict[str, Proposal] = field(default_factory=dict)
    progress: Progress | None = None
    told: Progress | None = None
    sections: Sections = field(default_factory=Sections)
    heeds_saves: bool = False
    precopy_until_ms: int | None = None
    slab_bytes: int = 0
    stored_bytes: int = 0
    change_bytes: int = 0
    copied_to: str = ""
    copy_since_ms: int = 0
    copy_bytes_per_ms: int = 0
    copies_failed: int = 0

    @property
    def live(self) -> bool:
        """Its process may be running or is about to."""
        return self.record.phase in (Phase.ACCEPTED, Phase.STARTING, Phase.RUNNING)
