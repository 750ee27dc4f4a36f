"""What must never happen, watched from outside both shells.

Problem: a test that asks the code under test whether all is well learns what the code believes. So
the checkers see only what really happened: what became durable, which process ran where on which
GPU, which signal it got, what each checkpoint contains, which answer a user got. From that they
keep their own small picture and compare. Each `_fail` names one safety rule of DESIGN's invariants.

Safety is checked as things happen; what takes time (a stale copy that goes on, a job that waits
without a reason, a guaranteed job behind a spare one) is looked at once a second by `sweep`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.core.messages import AgentEvent, AttemptExited
from coordinator.core.messages import (
    DropCheckpoint,
    DropJob,
    DropNode,
    DropPart,
    PutAttempt,
    PutCheckpoint,
    PutJob,
    PutNode,
    PutPart,
    Record,
)
from coordinator.core.model import Attempt, Checkpoint, Job, Snapshot, attempt_id
from coordinator.core.phases import ATTEMPT_ENDED, JOB_ENDED, JobPhase
from coordinator.core.shares import SHARES_PERCENT_MAX
from coordinator.core.state import ATTEMPTS_SHOWN_MAX
from tests.sim.faults import GPU_MEMORY_BYTES

if TYPE_CHECKING:
    from tests.sim.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Content:
    """What a checkpoint holds: pieces of work as (attempt, first step, last step), oldest first."""

    job_id: int
    rank: int
    step: int
    history: tuple[tuple[str, int, int], ...]

    def continues(self, earlier: "Content") -> bool:
        """Whether no work of `earlier` is missing here."""
        old, new = earlier.history, self.history
        if self.job_id != earlier.job_id or len(new) < len(old):
            return False
        if not old:
            return True
        last, same = old[-1], new[len(old) - 1]
        grown = last[:2] == same[:2] and same[2] >= last[2]
        return new[: len(old) - 1] == old[:-1] and grown


def digests(checkpoint: Checkpoint) -> list[str]:
    """Of its parts, by rank."""
    return [checkpoint.digest, *(part.digest for part in checkpoint.parts)]


class Checkers:
    """`fail` ends the run with a sentence. `intact` says whether any disk holds a good copy."""

    def __init__(self, fail: Callable[[str], None], intact: Callable[[str], bool]) -> None:
        self._fail = fail
        self._intact = intact
        self.contents: dict[str, Content] = {}
        self.jobs: dict[int, Job] = {}
        self.attempts: dict[str, Attempt] = {}
        self.checkpoints: dict[str, Checkpoint] = {}
        self.kept: dict[tuple[int, str], Checkpoint] = {}
        self.heads: dict[int, str] = {}
        self.submitted_ids: dict[str, int] = {}
        self.started: dict[str, str] = {}
        self.exits: dict[str, str] = {}
        self.steps: dict[str, tuple[int, int]] = {}
        """The first and the last of each process that has ended."""
        self._live: dict[str, Attempt] = {}
        self.abandoned: dict[int, None] = {}
        self.requeued: dict[int, None] = {}
        self.doomed: dict[str, None] = {}
        self.cordons: dict[str, dict[str, None]] = {}

    def lost(self, node: str, expected_in_ms: int) -> None:
        """The coordinator gives a node up."""
        if expected_in_ms > 0:
            self._fail(f"{node} is declared lost and may come for {expected_in_ms} ms more")

    # --- answers to users -------------------------------------------------------------------------

    def submitted(self, request_id: str, job_id: int, jobs: int = 1) -> None:
        """The coordinator has promised this job to a user, or an array of so many."""
        known = self.submitted_ids.setdefault(request_id, job_id)
        if known != job_id:
            self._fail(f"request {request_id} was given job {known} and then job {job_id}")
        if list(self.submitted_ids.values()).count(job_id) > 1:
            self._fail(f"job id {job_id} was given out twice")
        job = self.jobs.get(job_id)
        if job is None or job.request_id != request_id:
            self._fail(f"job {job_id} was acknowledged before it was durable")
        there = [one for one in self.jobs.values() if job_id in (one.id, one.array_id)]
        if len(there) != jobs:
            self._fail(f"{jobs} jobs from {job_id} on were acknowledged, and {len(there)} are kept")

    # --- what became durable ----------------------------------------------------------------------

    def committed(self, records: Sequence[Record]) -> None:
        """A batch of the coordinator has reached its disk."""
        jobs: dict[int, None] = {}
        for record in records:
            match record:
                case PutJob(job=job):
                    self._job(job)
                    jobs[job.id] = None
                case PutAttempt(attempt=attempt):
                    self._placed(attempt)
                    self.attempts[attempt.id] = attempt
                    self._live.pop(attempt.id, None)
                    if attempt.phase not in ATTEMPT_ENDED:
                        self._live[attempt.id] = attempt
                    jobs[attempt.job_id] = None
                case PutCheckpoint(checkpoint=checkpoint):
                    self._checkpoint(checkpoint)
                case DropCheckpoint():
                    self.kept.pop((record.job_id, record.digest), None)
                case PutNode(node=node):
                    self.cordons[node.id] = {cordon.uuid: None for cordon in node.gpu_cordons}
                case DropNode():
                    self.cordons.pop(record.node, None)
                case PutPart() | DropPart():
                    pass  # what waits for other parts is no checkpoint yet
                case DropJob():
                    self._fail(f"job {record.job_id} was dropped in a small fleet")
        for job_id in jobs:
            self._settled(job_id)

    def _placed(self, attempt: Attempt) -> None:
        closed = self.cordons.get(attempt.node, {})
        for uuid in attempt.gpu_uuids if attempt.id not in self.attempts else ():
            if uuid in closed:
                self._fail(f"{attempt.id} was put on {uuid}, which is cordoned for its health")

    def _job(self, job: Job) -> None:
        old = self.jobs.get(job.id)
        self.jobs[job.id] = job
        if job.array_id:
            self._array(job)
        if old is None:
            return
        again = job.phase is JobPhase.QUEUED and job.id in self.requeued
        if old.phase in JOB_ENDED and job.phase is not old.phase and not again:
            self._fail(f"job {job.id} had {old.phase.value} and is {job.phase.value}")
        if job.epoch < old.epoch:
            self._fail(f"job {job.id} went from epoch {old.epoch} back to {job.epoch}")
        if job.phase is JobPhase.SUCCEEDED and old.phase is not job.phase:
            for attempt_id in self._newest(job):
                how = self.exits.get(attempt_id, "nothing")
                if how != "exit 0 signal None":
                    self._fail(f"job {job.id} succeeded though {attempt_id} ended with {how}")
        if job.phase is JobPhase.FAILED and job.spec.name not in self.doomed:
            self._fail(f"job {job.id} has failed and could have run: {job.reason}")

    def _array(self, job: Job) -> None:
        """Of its trials as many have an attempt as its owner wants, and no more."""
        limit = int(job.spec.array.partition("%")[2])
        runs = [
            one.id
            for one in self.jobs.values()
            if one.array_id == job.array_id and one.phase in (JobPhase.ACTIVE, JobPhase.CANCELLING)
        ]
        if len(runs) > limit:
            self._fail(f"{runs} of array {job.array_id} run, and {limit} may")

    @staticmethod
    def _newest(job: Job) -> list[str]:
        """The ids of the ranks of the job's newest try."""
        count = job.spec.ranks
        return [attempt_id(job.id, job.epoch, rank, count) for rank in range(count)]

    def _checkpoint(self, checkpoint: Checkpoint) -> None:
        self.kept[checkpoint.job_id, checkpoint.digest] = checkpoint
        known = self.checkpoints.get(checkpoint.digest)
        self.checkpoints[checkpoint.digest] = checkpoint
        name = f"checkpoint {checkpoint.digest[:12]} of job {checkpoint.job_id}"
        head = self.heads.get(checkpoint.job_id, "")
        if known is None:
            self._new_head(checkpoint, name, head)
        elif checkpoint.bad and not known.bad:
            given_up = checkpoint.job_id in self.abandoned
            if all(map(self._intact, digests(checkpoint))) and not given_up:
                self._fail(f"{name} was given up and is whole on some disk: {checkpoint.bad}")
            while head and self.checkpoints[head].bad:
                head = self.checkpoints[head].parent
            self.heads[checkpoint.job_id] = head

    def _new_head(self, checkpoint: Checkpoint, name: str, head: str) -> None:
        job = self.jobs[checkpoint.job_id]
        if checkpoint.epoch != job.epoch:
            self._fail(f"{name} was committed by epoch {checkpoint.epoch}, not by {job.epoch}")
        if checkpoint.parent != head:
            self._fail(f"{name} follows {checkpoint.parent[:12]}, but the head is {head[:12]}")
        contents = [self.contents[digest] for digest in digests(checkpoint)]
        if len(contents) not in (1, job.spec.ranks):
            self._fail(f"{name} has {len(contents)} parts, and the job {job.spec.ranks} ranks")
        before = digests(self.checkpoints[head]) if head else []
        for content, earlier in zip(contents, before, strict=bool(before)):
            if not content.continues(self.contents[earlier]):
                self._fail(f"{name} {content} does not continue {self.contents[earlier]}")
        for rank, content in enumerate(contents):
            if content.step != checkpoint.step:
                self._fail(f"{name} says step {checkpoint.step} and holds step {content.step}")
            if content.rank != rank:
                self._fail(f"{name} has the part of rank {content.rank} where {rank}'s belongs")
        self.heads[checkpoint.job_id] = checkpoint.digest

    def _settled(self, job_id: int) -> None:
        """After a batch: one live try with all of its ranks, the head where the chain ends, GPUs
        held once."""
        job = self.jobs[job_id]
        head = self.heads.get(job_id, "")
        forgotten = not job.head and all(
            kept.bad for (owner, _), kept in self.kept.items() if owner == job_id
        )
        if job.head != head and not forgotten:
            self._fail(f"job {job_id}'s head is {job.head[:12]}; its commits end at {head[:12]}")
        self.heads[job_id] = job.head
        live = list(self._live.values())
        mine = [attempt for attempt in live if attempt.job_id == job_id]
        newest = self._newest(job) if job.epoch else []
        if any(attempt.id not in newest for attempt in mine):
            self._fail(f"job {job_id} has attempts {[attempt.id for attempt in mine]} at once")
        if any(known not in self.attempts for known in newest):
            self._fail(f"not all of {newest} were put somewhere")
        for attempt in mine:
            for other in live:
                both = set(attempt.gpu_uuids) & set(other.gpu_uuids)
                if other.id != attempt.id and both and not self._share(attempt, other):
                    self._fail(f"{sorted(both)} promised to {attempt.id} and {other.id}")
            for uuid in attempt.gpu_uuids:
                here = [other for other in live if uuid in other.gpu_uuids]
                parts = [self._share_bytes(other.job_id) for other in here]
                if sum(parts) > GPU_MEMORY_BYTES * SHARES_PERCENT_MAX // 100:
                    self._fail(f"{uuid} is promised beyond its memory, to {here}")
                specs = [self.jobs[other.job_id].spec for other in here]
                pairs = len(specs) > 1 and any(spec.share_automatic for spec in specs)
                if pairs and (len(specs) > 2 or specs[0].job_class is not specs[1].job_class):
                    self._fail(f"{uuid} has more than a pair of one class: {here}")

    def _share_bytes(self, job_id: int) -> int:
        return self.jobs[job_id].spec.shared_gpu_memory_bytes

    def _share(self, one: Attempt, other: Attempt) -> bool:
        return bool(self._share_bytes(one.job_id) and self._share_bytes(other.job_id))

    def loaded(self, snapshot: Snapshot) -> None:
        """A coordinator reads its disk: it must be what was written."""
        for job in snapshot.jobs:
            if self.jobs.get(job.id) != job:
                self._fail(f"job {job.id} came back as {job}, and was {self.jobs.get(job.id)}")
        read = {attempt.id: attempt for attempt in snapshot.attempts}
        if read != self._kept():
            self._fail("the attempts that came back are not those that were written")
        for request_id, job_id in self.submitted_ids.items():
            found = [job for job in snapshot.jobs if job.id == job_id]
            if not found or found[0].request_id != request_id:
                self._fail(f"job {job_id} was acknowledged and is not on the disk")

    def _kept(self) -> dict[str, Attempt]:
        """Of each job the newest tries, which are all that a store keeps."""
        tries: dict[int, list[int]] = {}
        for attempt in self.attempts.values():
            if attempt.rank == 0:
                tries.setdefault(attempt.job_id, []).append(attempt.epoch)
        oldest = {job: sorted(epochs)[-ATTEMPTS_SHOWN_MAX:][0] for job, epochs in tries.items()}
        return {
            attempt.id: attempt
            for attempt in self.attempts.values()
            if attempt.epoch >= oldest[attempt.job_id]
        }

    # --- what happens on boxes --------------------------------------------------------------------

    def process_started(
        self, node: str, trainer: "Trainer", trainers: Mapping[str, "Trainer"]
    ) -> None:
        attempt_id = trainer.attempt_id
        if attempt_id in self.started:
            self._fail(f"{attempt_id} ran on {self.started[attempt_id]} and runs on {node} again")
        self.started[attempt_id] = node
        attempt = self.attempts.get(attempt_id)
        if attempt is None or attempt.node != node:
            self._fail(f"{attempt_id} runs on {node}, where nobody durably put it")
        for other in trainers.values():
            if other is trainer:
                continue
            if other.job_id == trainer.job_id and other.epoch != trainer.epoch:
                self._fail(f"{attempt_id} starts on {node} beside {other.attempt_id}")
            shares = self._share_bytes(other.job_id) and self._share_bytes(trainer.job_id)
            if set(other.gpu_uuids) & set(trainer.gpu_uuids) and not shares:
                self._fail(f"{attempt_id} starts on a GPU that {other.attempt_id} uses")

    def process_ended(self, trainer: "Trainer", why: str) -> None:
        self.exits[trainer.attempt_id] = why
        self.steps[trainer.attempt_id] = (trainer.first_step, trainer.step)

    def signalled(self, node: str, attempt_id: str, signal_name: str) -> None:
        """An agent signals a trainer; somebody must have wanted that, durably."""
        attempt = self.attempts.get(attempt_id)
        if attempt is not None and not attempt.stop_reason and attempt.phase not in ATTEMPT_ENDED:
            self._fail(f"{attempt_id} got {signal_name} on {node} though nobody asked for it")

    def spooled(self, node: str, event: AgentEvent, trainers: Mapping[str, "Trainer"]) -> None:
        if isinstance(event.body, AttemptExited) and event.attempt in trainers:
            self._fail(f"{node} reports the end of {event.attempt}, which runs")
