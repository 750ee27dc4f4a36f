"""Model nodes: agents and their trainers, as simple as honest ones can be.

Problem: a fake that answers what the test wants to hear proves nothing. These keep the promises of
`agent/core` and no others: attempts and the spool of events outlive a restart, every event has its
sequence until it is acknowledged, what was stopped never starts, a GPU in use is refused, a stop
for something never seen is answered. Messages lie in two queues between node and coordinator, where
a test may lose, repeat and reorder them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from coordinator.core.messages import (
    AgentEvent,
    AgentEventBody,
    AgentMessage,
    AgentOrder,
    AttemptExited,
    AttemptRefused,
    AttemptStarted,
    CheckpointProposed,
    CommitResult,
    EventAck,
    Heartbeat,
    HeldAttempt,
    Hello,
    KeepCheckpoints,
    SetReplicaTarget,
    StartAttempt,
    StopAttempt,
    Welcome,
)
from coordinator.core.model import GpuFacts, HostFacts, JobSpec, Progress
from tests.core.coordinator_harness import GIGABYTE, UNIX_MS_AT_START

HOST = HostFacts("box", "", 1, 64 * GIGABYTE)
STEPS = 5_000  # of a job, so far as it says so; most end before
QUEUED_MAX = 40  # messages under way on one link; more are as good as a cut


def numbers(attempt: str) -> tuple[int, int, int]:
    """Job, epoch and rank of an attempt's id."""
    job_id, epoch, *rank = (int(part) for part in attempt.split("."))
    return job_id, epoch, rank[0] if rank else 0


@dataclass
class Run:
    """A process on a model node, or what is left to report of it. `unanswered` are proposals, with
    the parent of each."""

    attempt: str
    spec: JobSpec
    gpu_uuids: tuple[str, ...]
    head: str
    committed: str
    step: int
    target: str
    live: bool = True
    stopping: bool = False
    last_sequence: int = 0
    saves: int = 0
    told: int = 0
    unanswered: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeNode:
    """An agent and its trainers, as simple as an honest one can be."""

    name: str
    gpus: tuple[GpuFacts, ...]
    generation: int = 1
    session: int | None = None
    welcomed: bool = False
    runs: dict[str, Run] = field(default_factory=dict)
    fences: dict[tuple[int, int], int] = field(default_factory=dict)
    disk: dict[str, bool] = field(default_factory=dict)  # digest -> arrived since the last sweep
    spool: list[AgentEvent] = field(default_factory=list)
    sequence: int = 0
    beats: int = 0
    upward: list[AgentMessage] = field(default_factory=list)
    downward: list[AgentOrder] = field(default_factory=list)

    def held(self) -> tuple[HeldAttempt, ...]:
        return tuple(
            HeldAttempt(run.attempt, run.gpu_uuids, run.live) for run in self.runs.values()
        )

    def living(self) -> list[Run]:
        return [run for run in self.runs.values() if run.live]

    def say(self, message: AgentMessage) -> None:
        if self.session is not None and len(self.upward) < QUEUED_MAX:
            self.upward.append(message)

    def report(self, run: str, body: AgentEventBody) -> int:
        self.sequence += 1
        event = AgentEvent(self.sequence, UNIX_MS_AT_START, run, body)
        self.spool.append(event)
        if self.welcomed:
            self.say(event)
        return self.sequence

    def dial(self, session: int) -> None:
        self.cut()
        self.session = session
        gone = self.spool[0].sequence - 1 if self.spool else self.sequence
        journal_id, address = f"{self.name}-{self.generation}", f"{self.name}:1"
        hello = Hello(
            self.name, journal_id, address, HOST, self.gpus, self.held(), tuple(self.disk)
        )
        self.say(replace(hello, acknowledged=gone))

    def cut(self) -> None:
        self.session, self.welcomed, self.beats = None, False, 0
        self.upward.clear()
        self.downward.clear()

    def die(self) -> None:
        """The box loses power and comes back: its journal is there, its processes are not."""
        self.cut()
        for run in self.living():
            self.end(run, AttemptExited(reason="its process was gone"))

    def wipe(self) -> None:
        self.cut()
        self.runs, self.fences, self.disk, self.spool, self.sequence = {}, {}, {}, [], 0
        self.generation += 1

    def end(self, run: Run, body: AgentEventBody) -> None:
        run.live = False
        run.last_sequence = self.report(run.attempt, body)

    def beat(self) -> None:
        """Every other job says how many steps it makes in all; all go on between two saves."""
        if self.welcomed:
            self.beats += 1
            told = []
            for run in self.living():
                run.told = min(STEPS - 1, max(run.told + 5, run.step))
                total = STEPS if numbers(run.attempt)[0] % 2 else 0
                told.append((run.attempt, Progress(run.told, total)))
            self.say(Heartbeat(self.beats, attempts=self.held(), progress=tuple(told)))
            for event in self.spool[:4]:
                self.say(event)

    def save(self, run: Run, copied_to: "FakeNode | None") -> None:
        run.saves += 1
        run.step += 10
        digest = f"{run.attempt}-{self.generation}-{run.saves}"
        parent, run.head = run.head, digest
        self.disk[digest] = True
        replicas: tuple[str, ...] = (self.name,)
        if copied_to is not None:
            copied_to.disk[digest] = True
            replicas = (self.name, copied_to.name)
        several = run.spec.ranks if run.spec.ranks > 1 else 0
        run.unanswered[digest] = parent
        body = CheckpointProposed(digest, parent, run.step, GIGABYTE, replicas, several)
        self.report(run.attempt, body)

    # --- orders -----------------------------------------------------------------------------------

    def obey(self, order: AgentOrder, holds: Callable[[str, str], bool]) -> None:
        match order:
            case Welcome():
                self.welcomed = True
                self._acknowledged(order.acknowledged_sequence)
                for event in self.spool:
                    self.say(event)
            case EventAck():
                self._acknowledged(order.sequence)
            case StartAttempt():
                self._start(order, holds)
            case StopAttempt():
                self._stop(order)
            case SetReplicaTarget() if order.attempt in self.runs:
                self.runs[order.attempt].target = order.target.node if order.target else ""
            case CommitResult() if order.attempt in self.runs:
                self._answered(self.runs[order.attempt], order)
            case KeepCheckpoints():
                self._keep(order)

    def _acknowledged(self, sequence: int) -> None:
        self.spool = [event for event in self.spool if event.sequence > sequence]
        for run in list(self.runs.values()):
            if not run.live and run.last_sequence <= sequence:
                del self.runs[run.attempt]

    def _answered(self, run: Run, result: CommitResult) -> None:
        """After a refusal the next one follows the last commit, unless a new beginning was made
        since."""
        rests = run.head
        while rests != result.digest and rests in run.unanswered:
            rests = run.unanswered[rests]
        run.unanswered.pop(result.digest, None)
        if result.accepted:
            run.committed = result.digest
        elif rests == result.digest:
            run.head = run.committed = result.head

    def _start(self, order: StartAttempt, holds: Callable[[str, str], bool]) -> None:
        job_id, epoch, rank = numbers(order.attempt)
        newest = max((e for (job, _), e in self.fences.items() if job == job_id), default=0)
        stopped = self.fences.get((job_id, rank), 0) >= epoch
        if order.attempt in self.runs or stopped or newest > epoch:
            return
        self.fences[job_id, rank] = epoch
        target = order.replica_target.node if order.replica_target else ""
        run = Run(order.attempt, order.spec, order.gpu_uuids, "", "", 0, target)
        twin = any(
            numbers(other.attempt)[0] == job_id and numbers(other.attempt)[1] != epoch
            for other in self.living()
        )
        self.runs[order.attempt] = run
        if twin or not all(self._has_room(run, uuid) for uuid in order.gpu_uuids):
            self.end(run, AttemptRefused("still in use"))
            return
        self._restore(run, order, holds)

    def _has_room(self, run: Run, uuid: str) -> bool:
        holds = [run, *(one for one in self.living() if uuid in one.gpu_uuids and one is not run)]
        held_shares = [one.spec.shared_gpu_memory_bytes for one in holds]
        facts = next(gpu for gpu in self.gpus if gpu.uuid == uuid)
        return len(holds) == 1 or (all(held_shares) and sum(held_shares) <= facts.memory_bytes)

    def _restore(self, run: Run, order: StartAttempt, holds: Callable[[str, str], bool]) -> None:
        """Of every other job each rank has files that no other rank reads."""
        job_id, _, rank = numbers(order.attempt)
        held: tuple[int, ...] = ()
        skipped: list[tuple[str, str]] = []
        for candidate in order.candidates:
            pieces = [(candidate.digest, candidate.sources)]
            pieces += [(part.digest, part.sources) for part in candidate.parts]
            held = (rank,) if candidate.parts and job_id % 2 else ()
            pieces = pieces[rank : rank + 1] if held else pieces
            if all(any(holds(s.node, digest) for s in sources) for digest, sources in pieces):
                self.disk.update(dict.fromkeys([digest for digest, _ in pieces], True))
                run.head = run.committed = candidate.digest
                run.step = candidate.step
                break
            skipped.append((candidate.digest, "it does not verify"))
        started = AttemptStarted(1, run.head, run.step, tuple(skipped))
        self.report(run.attempt, replace(started, held_ranks=held if run.head else ()))

    def _stop(self, order: StopAttempt) -> None:
        job_id, epoch, rank = numbers(order.attempt)
        run = self.runs.get(order.attempt)
        if run is None:
            if self.fences.get((job_id, rank), 0) < epoch:
                self.fences[job_id, rank] = epoch
                self.report(order.attempt, AttemptExited(reason="it never started here"))
        elif run.live and order.grace_ms is None:
            self.end(run, AttemptExited(signal=9))
        else:
            run.stopping = True

    def _keep(self, order: KeepCheckpoints) -> None:
        kept = dict.fromkeys(order.digests)
        for run in self.runs.values():
            kept.update(dict.fromkeys((run.head, run.committed)))
        for event in self.spool:
            if isinstance(event.body, CheckpointProposed):
                kept[event.body.digest] = None
        # What a peer has just copied here is spared once: the real store leaves it a grace.
        staying = [digest for digest, young in self.disk.items() if young or digest in kept]
        self.disk = dict.fromkeys(staying, False)
