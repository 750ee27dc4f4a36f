"""What the coordinator knows, and the only functions that change it.

Problem: when every handler edits dictionaries and remembers to persist what it edited, one forgets.
Here a change *is* a record: `put_job` and its like replace the value, keep the indices true and
append the record in one step. Handlers read freely and change only through these.

Durable values are frozen (`model.py`). What is compared with the monotonic clock, or said anew by
every hello, is volatile and lives in `live.py` and the plain dictionaries below; a restarted
coordinator begins without it.
"""

from dataclasses import dataclass, replace

from coordinator.core import traces
from coordinator.core.admission import Admission
from coordinator.core.demand import Demand
from coordinator.core.demand_history import DemandHistory
from coordinator.core.indices import Indices
from coordinator.core.keeps import Reservation
from coordinator.core.kept_rooms import KeptRooms
from coordinator.core.lease_messages import KeptNode, LeaseDays
from coordinator.core.ledger import Ledger
from coordinator.core.live import LiveGpu as LiveGpu  # parts of the state
from coordinator.core.live import LiveNode as LiveNode
from coordinator.core.live import StandbyWalk, Switching
from coordinator.core.live import StandbyWatch as StandbyWatch
from coordinator.core.messages import (
    AgentOrder,
    AppendEvent,
    Command,
    DropCheckpoint,
    DropJob,
    DropNode,
    DropPart,
    Effect,
    ForecastMade,
    Log,
    PutAttempt,
    PutCheckpoint,
    PutJob,
    PutNode,
    PutPart,
    Record,
    Send,
)
from coordinator.core.model import (
    SHARED,
    Attempt,
    Checkpoint,
    Job,
    JobEvent,
    Node,
    Part,
    Progress,
    Snapshot,
    WaitingPart,
    attempt_id,
)
from coordinator.core.node_power import DARK
from coordinator.core.numbering import Numbering
from coordinator.core.options import Options as Options  # a part of the state's making
from coordinator.core.pace import Pace
from coordinator.core.phases import (
    ATTEMPT_BEGINS,
    ATTEMPT_ENDED,
    GPU_TRANSITIONS,
    JOB_ENDED,
    JOB_TRANSITIONS,
    NODE_TRANSITIONS,
    GpuPhase,
    JobPhase,
    NodePhase,
    advance,
)
from coordinator.core.scaler import Scaler
from coordinator.core.standing import Standing
from coordinator.core.stretches import Watch


@dataclass(frozen=True, slots=True)
class Instant:
    """`now_ms` is monotonic and is what decisions compare; `unix_ms` is wall time and is only
    written down."""

    now_ms: int
    unix_ms: int


JOBS_OPEN_MAX = 100_000  # a queue longer than this is a runaway script; about 150 MB of state
# Per job, or the newest gang if that is larger; the store keeps as many tries.
ATTEMPTS_SHOWN_MAX = 100
REASON_CHARACTERS_MAX = 1_000  # a peer's sentence is cut here


class State:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.leader_epoch = self.last_job_id = 0
        self.numbering = self.proven = Numbering()  # with what nodes have said since, and without
        self.demand = Demand()
        self.demand_history = DemandHistory()
        self.forecast: tuple[int, ForecastMade] | None = None  # the newest, and when it came
        self.lease_days = LeaseDays()
        self.standing = Standing()
        self.jobs: dict[int, Job] = {}
        self.attempts: dict[str, Attempt] = {}
        self.job_attempts: dict[int, list[str]] = {}
        self.checkpoints: dict[int, list[Checkpoint]] = {}
        self.parts: dict[int, list[WaitingPart]] = {}
        self.nodes: dict[str, LiveNode] = {}
        self.forgotten: dict[str, KeptNode] = {}  # in no list of nodes
        self.sessions: dict[int, str] = {}
        self.watched: list[tuple[int, str]] = []  # when to look at which node: a heap
        self.admission = Admission()
        self.indices = Indices()
        self.switching = Switching()
        self.scaler = Scaler()
        self.rooms = KeptRooms()
        self.ledger = Ledger()
        self.last_recall_ms = 0  # when it was last looked at who gives back what is lent
        self.requests: dict[str, int] = {}
        self.queued: dict[int, None] = {}
        self.ended: dict[int, None] = {}
        self.eligible_ms: dict[int, int] = {}
        self.avoid: dict[int, str] = {}
        self.waits: dict[int, str] = {}
        self.progress: dict[str, Progress] = {}
        self.paces: dict[str, Pace] = {}
        # Since when who waits is waiting; reservations by rank of class (`reservations.py`).
        self.waiting_ms: dict[int, int] = {}
        self.reservations: dict[int, Reservation] = {}
        self.reservations_looked_ms = 0
        self.reservation_retry_ms: dict[int, int] = {}
        self.ordered_ms: dict[str, int] = {}
        # Until when the rest of a gang may end by itself, of which some have.
        self.finish_ms: dict[int, int] = {}
        self.standby_watches: dict[str, StandbyWatch] = {}
        self.watches: dict[str, Watch] = {}
        # Cordons for health, (when, of how many GPUs); and GPUs that should have one and do not.
        self.cordons_ms: list[tuple[int, int]] = []
        self.held_back: dict[str, str] = {}
        self.reviewed = 0  # of the rounds of standbys (`standby.py`)
        self.walk: StandbyWalk | None = None
        self.last_tick_ms: int | None = None
        # What the next placement has to look at: everything, or else these new jobs alone.
        self.dirty = True
        self.fresh: dict[int, None] = {}
        self.changed_jobs: dict[int, None] = {}
        self.changed_attempts: dict[str, None] = {}
        self.changed_nodes: dict[str, None] = {}
        self.records: list[Record] = []
        self.commands: list[Command] = []

    # --- loading ----------------------------------------------------------------------------------

    def load(self, snapshot: Snapshot, now_ms: int) -> None:
        """Take over what the store holds. Nodes are suspect until they say hello, and lost if they
        do not in time."""
        self.leader_epoch, self.last_job_id = snapshot.leader_epoch, snapshot.last_job_id
        self.numbering = self.proven = snapshot.numbering
        self.demand_history.load(snapshot.demand)
        self.scaler.load(snapshot.scale_records)
        self.lease_days.made = snapshot.lease_days
        self.forgotten = {node.id: KeptNode(node) for node in snapshot.nodes if node.forgotten}
        for node in (node for node in snapshot.nodes if not node.forgotten):
            phase = NodePhase.LOST if node.power.phase in DARK else NodePhase.SUSPECT
            live = LiveNode(node, phase, now_ms + self.options.restart_grace_ms)
            live.note = "the coordinator has restarted and the node has not said hello yet"
            live.gpus = {gpu.uuid: LiveGpu(gpu, GpuPhase.ABSENT) for gpu in node.gpus}
            self.nodes[node.id] = live
            self.indices.put_node(node)
            self.rooms.touch(node.id)
        # In the order in which they ended, since the first to end is the first to be forgotten.
        for job in sorted(snapshot.jobs, key=lambda job: (job.ended_unix_ms or 0, job.id)):
            self.jobs[job.id] = job
            self._index_job(job)
        for attempt in sorted(snapshot.attempts, key=lambda a: (a.job_id, a.epoch, a.rank)):
            self._remember(attempt)
        for attempt in self.attempts.values():
            live_node = self.nodes.get(attempt.node)
            if attempt.phase not in ATTEMPT_ENDED and live_node is not None:
                live_node.attempts[attempt.id] = None
                self.indices.put_attempt(attempt)
        for checkpoint in snapshot.checkpoints:
            self.checkpoints.setdefault(checkpoint.job_id, []).append(checkpoint)
            self._index_checkpoint(checkpoint, 1)
        for job_id, kept in self.checkpoints.items():
            self.checkpoints[job_id] = _in_order(kept, self.jobs[job_id].head)
        for part in sorted(snapshot.parts, key=lambda part: (part.job_id, part.sequence)):
            self.parts.setdefault(part.job_id, []).append(part)
            self._index_piece(part.job_id, part, 1)

    # --- records ----------------------------------------------------------------------------------

    def put_job(self, job: Job) -> Job:
        old = self.jobs.get(job.id)
        if old is not None:
            advance(JOB_TRANSITIONS, old.phase, job.phase, f"job {job.id}")
            if job.event_count < old.event_count:
                job = replace(job, event_count=old.event_count)
            if old.phase is not job.phase or job.phase is JobPhase.QUEUED:
                self.dirty = True  # a commit alone lets nobody start
        if old is None and job.phase is JobPhase.QUEUED:
            self.fresh[job.id] = None
        self.jobs[job.id] = job
        self._index_job(job)
        self.changed_jobs[job.id] = None
        return job

    def _index_job(self, job: Job) -> None:
        if job.request_id:
            self.requests[job.request_id] = job.id
        if not self.indices.arrays.put(job) and job.phase is JobPhase.QUEUED:
            self.queued[job.id] = None
        else:
            self.queued.pop(job.id, None)
            self.waits.pop(job.id, None)
        if job.phase in JOB_ENDED:
            self.ended[job.id] = None
        else:
            self.ended.pop(job.id, None)

    def drop_job(self, job_id: int) -> None:
        """An ended job leaves memory and store; its id is never given out again."""
        job = self.jobs.pop(job_id)
        self.indices.arrays.drop(job)
        self.requests.pop(job.request_id, None)
        self.ended.pop(job_id, None)
        for known in (self.eligible_ms, self.finish_ms, self.avoid, self.standing.order):
            known.pop(job_id, None)
        for gone in self.job_attempts.pop(job_id, []):
            self._forget_attempt(gone)
            self.ordered_ms.pop(gone, None)
        for checkpoint in self.checkpoints.pop(job_id, []):
            self._index_checkpoint(checkpoint, -1)
        for part in self.parts.pop(job_id, []):
            self._index_piece(part.job_id, part, -1)
        self.records.append(DropJob(job_id))

    def put_attempt(self, attempt: Attempt) -> Attempt:
        """The phase has been checked by the caller through `advance`, since only it knows the old
        one's meaning."""
        old = self.attempts.get(attempt.id)
        before = None if old is None else old.phase
        begins = (before, attempt.phase) == ATTEMPT_BEGINS and not attempt.gpu_uuids
        self.dirty |= before is not attempt.phase and not begins
        self._remember(attempt)
        live = self.nodes.get(attempt.node)
        if live is not None:
            if attempt.phase in ATTEMPT_ENDED:
                live.attempts.pop(attempt.id, None)
                self.ordered_ms.pop(attempt.id, None)
                self.standby_watches.pop(attempt.id, None)
                self.watches.pop(attempt.id, None)
            else:
                live.attempts[attempt.id] = None
            self.indices.put_attempt(attempt)
            self.rooms.touch(attempt.node)
        self.changed_attempts[attempt.id] = None
        return attempt

    def _remember(self, attempt: Attempt) -> None:
        if attempt.id not in self.attempts:
            ids = self.job_attempts.setdefault(attempt.job_id, [])
            ids.append(attempt.id)
            # Of a gang those of the try before, too: they may end in the batch that starts this.
            kept = max(ATTEMPTS_SHOWN_MAX, 2 * attempt.ranks)
            for gone in ids[:-kept]:
                self._forget_attempt(gone)
            del ids[:-kept]
        known = self.attempts.get(attempt.id)
        self.indices.failures.note(known, attempt)
        if attempt.stretches and (known is None or known.stretches != attempt.stretches):
            self.indices.put_stretches(attempt.id)
        self.attempts[attempt.id] = attempt
        spec = self.jobs[attempt.job_id].spec
        there = self.nodes.get(attempt.node) or self.forgotten.get(attempt.node)
        self.ledger.attempt(attempt, spec, there.node.gpus if there is not None else ())

    def _forget_attempt(self, gone: str) -> None:
        self.attempts.pop(gone, None)
        self.progress.pop(gone, None)
        self.ledger.forget(gone)
        self.paces.pop(gone, None)
        self.indices.forget_attempt(gone)

    def put_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Insert, or replace the one with the same digest."""
        kept = self.checkpoints.setdefault(checkpoint.job_id, [])
        for index, old in enumerate(kept):
            if old.digest == checkpoint.digest:
                self._index_checkpoint(old, -1)
                kept[index] = checkpoint
                self.dirty = True  # it may be in reach now, or no longer used
                break
        else:
            kept.append(checkpoint)
        self._index_checkpoint(checkpoint, 1)
        self.records.append(PutCheckpoint(checkpoint))

    def drop_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.checkpoints[checkpoint.job_id].remove(checkpoint)
        self._index_checkpoint(checkpoint, -1)
        self.records.append(DropCheckpoint(checkpoint.job_id, checkpoint.digest))

    def put_part(self, part: WaitingPart) -> None:
        """Insert, or replace the one of the same rank and digest."""
        waiting = self.parts.setdefault(part.job_id, [])
        for index, old in enumerate(waiting):
            if (old.rank, old.digest) == (part.rank, part.digest):
                self._index_piece(old.job_id, old, -1)
                waiting[index] = part
                break
        else:
            waiting.append(part)
        self._index_piece(part.job_id, part, 1)
        self.records.append(PutPart(part))

    def drop_part(self, part: WaitingPart) -> None:
        self.parts[part.job_id].remove(part)
        if not self.parts[part.job_id]:
            del self.parts[part.job_id]
        self._index_piece(part.job_id, part, -1)
        self.records.append(DropPart(part.job_id, part.rank, part.digest))

    def _index_checkpoint(self, checkpoint: Checkpoint, change: int) -> None:
        for piece in checkpoint.pieces:
            self._index_piece(checkpoint.job_id, piece, change)

    def _index_piece(self, job_id: int, piece: Part | WaitingPart, change: int) -> None:
        self.indices.count_piece(piece.digest, job_id, change)
        for node_id in piece.replicas:
            live = self.nodes.get(node_id)
            if live is None:
                continue
            count = live.digests.get(piece.digest, 0) + change
            if count > 0:
                live.digests[piece.digest] = count
            else:
                live.digests.pop(piece.digest, None)
                self.indices.keep_changed[node_id] = None

    def put_node(self, node: Node) -> None:
        self.forgotten.pop(node.id, None)
        self.nodes[node.id].node = node
        self.indices.put_node(node)
        self.rooms.touch(node.id)
        self.changed_nodes[node.id] = None

    def take_out_node(self, node_id: str, *, keep: bool) -> None:
        """It is none of the fleet's any more; who calls this has seen to what it had. `keep`: as
        one that somebody ran on, or that was switched."""
        node = self.nodes.pop(node_id).node
        if keep:
            self.forgotten[node_id] = KeptNode(replace(node, forgotten=True))
        self.indices.drop_node(node_id)
        self.rooms.forget(node_id)
        self.changed_nodes[node_id] = None
        self.dirty = True

    def tell(self, unix_ms: int, job_id: int, name: str, message: str, **where: str) -> None:
        """Append a line to the job's history, and to the log. `where` is attempt and node."""
        job = replace(self.jobs[job_id], event_count=self.jobs[job_id].event_count + 1)
        self.jobs[job_id] = job
        self.changed_jobs[job_id] = None
        self.write_line(job, unix_ms, name, message, **where)

    def write_line(self, job: Job, unix_ms: int, name: str, message: str, **where: str) -> None:
        """The newest line that the job counts."""
        event = JobEvent(job.id, job.event_count, unix_ms, name, message=message, **where)
        self.records.append(AppendEvent(event))
        self.log("info", name, job=job.id, **where, reason=message)

    def take(self) -> list[Effect]:
        """Everything that has come up since the last call: records first, each changed value once,
        then commands."""
        effects: list[Effect] = [PutJob(self.jobs[i]) for i in self.changed_jobs if i in self.jobs]
        attempts = self.attempts
        effects += [PutAttempt(attempts[i]) for i in self.changed_attempts if i in attempts]
        for node_id in self.changed_nodes:
            there = self.nodes.get(node_id) or self.forgotten.get(node_id)
            effects.append(DropNode(node_id) if there is None else PutNode(there.node))
        effects += self.records
        effects += self.commands
        self.changed_jobs, self.changed_attempts, self.changed_nodes = {}, {}, {}
        self.records, self.commands = [], []
        return effects

    # --- commands ---------------------------------------------------------------------------------

    def log(self, level: str, event: str, **fields: object) -> None:
        attempt = self.attempts.get(str(fields.get("attempt")))
        if attempt is not None and attempt.job_id in self.jobs:
            fields["trace_id"] = traces.trace_id(self.jobs[attempt.job_id], attempt.epoch)
        self.commands.append(Log(level, event, tuple(fields.items())))

    def send(self, node_id: str, order: AgentOrder) -> None:
        """To the node's present session; without one the order is made again at its hello."""
        session = self.nodes[node_id].session
        if session is not None:
            self.commands.append(Send(session, order))

    # --- phases of nodes and GPUs -----------------------------------------------------------------

    def set_node_phase(self, live: LiveNode, phase: NodePhase, note: str) -> None:
        live.phase = advance(NODE_TRANSITIONS, live.phase, phase, f"node {live.node.id}")
        live.note = note
        self.rooms.touch(live.node.id)
        self.dirty = True

    def set_gpu(
        self, live: LiveNode, uuid: str, phase: GpuPhase, holders: tuple[str, ...] = ()
    ) -> None:
        gpu = live.gpus[uuid]
        gpu.phase = advance(GPU_TRANSITIONS, gpu.phase, phase, f"gpu {uuid}")
        gpu.holders = holders
        self.rooms.touch(live.node.id)
        self.dirty = True

    def hold_gpu(self, live: LiveNode, uuid: str, attempt_id: str) -> None:
        """Beside those that have it."""
        holders = live.gpus[uuid].holders
        if attempt_id not in holders:
            self.set_gpu(live, uuid, GpuPhase.HELD, (*holders, attempt_id))

    def release_gpus(self, live: LiveNode, attempt_id: str) -> None:
        for uuid, gpu in live.gpus.items():
            if attempt_id not in gpu.holders:
                continue
            rest = tuple(holder for holder in gpu.holders if holder != attempt_id)
            empty = gpu.phase is GpuPhase.HELD and not rest
            self.set_gpu(live, uuid, GpuPhase.FREE if empty else gpu.phase, rest)

    @property
    def undecided(self) -> bool:
        """Whether a placement pass may find something to do."""
        return self.dirty or bool(self.fresh)

    # --- reading ----------------------------------------------------------------------------------

    def current(self, job: Job) -> Attempt | None:
        """The attempt of the job's highest epoch, ended or not; of a gang, rank 0."""
        return self.attempts.get(attempt_id(job.id, job.epoch, 0, job.spec.ranks))

    def gang(self, job: Job) -> list[Attempt]:
        """All ranks of the highest epoch, in order; none before the first try."""
        ranks = job.spec.ranks
        ids = [attempt_id(job.id, job.epoch, rank, ranks) for rank in range(ranks)]
        return [self.attempts[known] for known in ids if known in self.attempts]

    def attempts_of(self, job_id: int) -> list[Attempt]:
        ids = self.job_attempts.get(job_id, [])
        return [self.attempts[attempt_id] for attempt_id in ids if attempt_id in self.attempts]

    def good_checkpoints(self, job: Job) -> list[Checkpoint]:
        """Newest first, from the head back; what does not verify is left out."""
        kept = [c for c in self.checkpoints.get(job.id, []) if not c.bad]
        return kept[::-1]

    def reachable(self, checkpoint: Checkpoint) -> bool:
        """Of each of its pieces some node within its lease, or the shared directory, holds all."""
        return all(self.piece_reachable(piece) for piece in checkpoint.pieces)

    def piece_reachable(self, piece: Part) -> bool:
        return any(
            node_id == SHARED
            or (node_id in self.nodes and self.nodes[node_id].phase is not NodePhase.LOST)
            for node_id in piece.replicas
        )

    def share_bytes(self, attempt_id: str) -> int:
        """The most that it may take of its GPU; 0: it has it alone, or is not known any more."""
        attempt = self.attempts.get(attempt_id)
        job = None if attempt is None else self.jobs.get(attempt.job_id)
        return 0 if job is None else job.spec.shared_gpu_memory_bytes

    def wait_reason(self, job: Job) -> str:
        if job.phase is not JobPhase.QUEUED:
            return job.reason
        behind = self.indices.arrays.why_behind(job)
        return behind or self.waits.get(job.id) or job.reason or "it is looked at in the next round"


def _in_order(kept: list[Checkpoint], head: str) -> list[Checkpoint]:
    """Oldest first, the head last: the chain of parents tells, since steps and clocks may tie. What
    is no part of the chain is not used any more and goes first."""
    rest = {checkpoint.digest: checkpoint for checkpoint in kept}
    chain: list[Checkpoint] = []
    while head in rest:
        chain.append(rest.pop(head))
        head = chain[-1].parent
    return [*rest.values(), *reversed(chain)]


def cut(sentence: str) -> str:
    """A peer's sentence at a bounded length."""
    if len(sentence) <= REASON_CHARACTERS_MAX:
        return sentence
    return sentence[: REASON_CHARACTERS_MAX - 1] + "…"
