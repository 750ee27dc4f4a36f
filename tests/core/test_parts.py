"""Checkpoints in parts: which belong together, what is refused, and that no stale rank commits.

Problem: parts come from several nodes in any order, and some never come. A checkpoint made of parts
of different steps, or of different tries, restores into no state that ever was; a part that nobody
refuses is kept for ever. Safety: what is committed is of one step of one epoch, whole, and follows
the last commit. Liveness: whatever is proposed is answered in the end.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

import pytest

from coordinator.core.checkpoints import AT_ODDS
from coordinator.core.messages import (
    AgentEvent,
    AgentEventBody,
    AttemptExited,
    AttemptStarted,
    CheckpointProposed,
    CommitResult,
    FromAgent,
    HeldAttempt,
    Hello,
    KeepCheckpoints,
    Request,
    Send,
    SessionClosed,
    StartAttempt,
    Submit,
    Tick,
)
from coordinator.core.model import Checkpoint, JobSpec, Replication
from coordinator.core.parts import WAITING_MAX
from coordinator.core.phases import AttemptPhase, JobPhase
from tests.core.coordinator_fleet import HOST
from tests.core.coordinator_harness import GIGABYTE, UNIX_MS_AT_START, Rig, gpus_of

RANKS = 3
SEEDS = 40


@dataclass
class Gang:
    """A coordinator, a node for each rank of job 1, and what each was answered."""

    rig: Rig = field(default_factory=Rig)
    sequences: list[int] = field(default_factory=lambda: [0] * RANKS)
    answers: dict[str, list[CommitResult]] = field(default_factory=dict)
    kept: dict[int, tuple[str, ...]] = field(default_factory=dict)
    starts: list[StartAttempt] = field(default_factory=list)
    sessions: int = 0

    def begin(self, **wishes: object) -> "Gang":
        self.dial()
        spec = JobSpec(command=("train",), gpus=1, ranks=RANKS)
        for name, value in wishes.items():
            object.__setattr__(spec, name, value)
        self.take(Request(1, Submit(spec)))
        self.started()
        return self

    def dial(self, *present: str) -> None:
        self.sessions += RANKS
        for rank in range(RANKS):
            node = f"n{rank}"
            held = tuple(
                HeldAttempt(attempt.id, attempt.gpu_uuids)
                for attempt in self.rig.disk.attempts.values()
                if attempt.node == node and attempt.ended_unix_ms is None
            )
            hello = Hello(node, "j", f"{node}:1", HOST, gpus_of(node, "1xH100"), held, present)
            self.take(FromAgent(self.sessions + rank, hello))

    def started(self, digest: str = "", step: int = 0) -> None:
        for rank in range(RANKS):
            self.say(rank, AttemptStarted(1, digest, step))

    def say(self, rank: int, body: AgentEventBody, epoch: int = 0) -> None:
        epoch = epoch or self.rig.core.state.jobs[1].epoch
        self.sequences[rank] += 1
        event = AgentEvent(self.sequences[rank], UNIX_MS_AT_START, f"1.{epoch}.{rank}", body)
        self.take(FromAgent(self.sessions + rank, event))

    def take(self, event: FromAgent | Request | Tick) -> None:
        for effect in self.rig.handle(event):
            if isinstance(effect, Send) and isinstance(effect.order, CommitResult):
                self.answers.setdefault(effect.order.digest, []).append(effect.order)
            elif isinstance(effect, Send) and isinstance(effect.order, KeepCheckpoints):
                self.kept[effect.session % RANKS] = effect.order.digests
            elif isinstance(effect, Send) and isinstance(effect.order, StartAttempt):
                self.starts.append(effect.order)

    def part(self, rank: int, step: int, parent: str = "", name: str = "") -> str:
        digest = name or f"r{rank}s{step}"
        node = f"n{rank}"
        replicas = (node, f"n{(rank + 1) % RANKS}")
        self.say(rank, CheckpointProposed(digest, parent, step, GIGABYTE, replicas, RANKS))
        return digest

    def answered(self, digest: str) -> str:
        """ "" for a commit, the reason of a refusal, "-" for none yet."""
        answers = self.answers.get(digest, [])
        assert len(answers) <= 1, "answered twice"
        return answers[0].reason if answers else "-"

    @property
    def waiting(self) -> list[str]:
        return [part.digest for part in self.rig.core.state.parts.get(1, [])]

    @property
    def head(self) -> Checkpoint | None:
        good = self.rig.core.state.good_checkpoints(self.rig.core.state.jobs[1])
        return good[0] if good else None

    def end(self) -> None:
        for rank in range(RANKS):
            self.say(rank, AttemptExited(75))

    def again(self) -> list[StartAttempt]:
        """All are killed, and after a while there is another try."""
        for rank in range(RANKS):
            self.say(rank, AttemptExited(None, 9))
        self.starts.clear()
        self.rig.now_ms += 120_000
        self.dial()
        self.take(Tick())
        return self.starts


def test_a_checkpoint_is_committed_when_the_last_part_is_there() -> None:
    gang = Gang().begin()
    for rank in (2, 0):
        gang.part(rank, 10)
    assert gang.head is None
    gang.part(1, 10)
    assert gang.head is not None
    assert (gang.head.digest, gang.head.size_bytes) == ("r0s10", 3 * GIGABYTE)
    assert [piece.digest for piece in gang.head.pieces] == ["r0s10", "r1s10", "r2s10"]
    assert [piece.size_bytes for piece in gang.head.pieces] == [GIGABYTE] * 3
    assert [gang.answered(f"r{rank}s10") for rank in range(RANKS)] == ["", "", ""]
    assert gang.waiting == []


def test_the_first_parts_of_a_step_belong_together() -> None:
    """A rank that saves on its way out saves twice at one step."""
    gang = Gang().begin()
    gang.part(0, 10, name="a")
    gang.part(0, 10, parent="a", name="b")
    gang.part(1, 10, name="c")
    gang.part(1, 10, name="d")
    gang.part(2, 10, name="e")
    assert gang.head is not None
    assert [piece.digest for piece in gang.head.pieces] == ["a", "c", "e"]
    gang.part(2, 10, name="f")
    assert [piece.digest for piece in gang.head.pieces] == ["b", "d", "f"]
    assert gang.head.parent == "a"


def test_what_was_handed_over_before_a_commit_is_refused() -> None:
    gang = Gang().begin()
    gang.part(0, 10)
    gang.part(1, 10)
    gang.part(0, 20, parent="r0s10")
    gang.part(2, 20)
    gang.part(1, 20)
    assert gang.head is not None
    assert (gang.head.digest, gang.head.parent) == ("r0s20", "")
    assert gang.answered("r0s10") == gang.answered("r1s10") == "superseded by step 20"
    assert gang.waiting == []
    gang.part(2, 10)
    assert "lies before step 20" in gang.answered("r2s10")


def test_what_is_whole_must_follow_the_last_commit_and_parts_need_not() -> None:
    """An agent that was refused one part of many is behind with the next ones, not elsewhere."""
    gang = Gang().begin()
    gang.say(0, CheckpointProposed("whole", "elsewhere", 10, GIGABYTE, ("n0",)))
    assert gang.answered("whole") == "it follows elsewhere, but the last commit is nothing"
    for rank in range(RANKS):
        gang.part(rank, 10, parent="elsewhere")
    assert gang.head is not None
    assert (gang.head.digest, gang.head.parent) == ("r0s10", "")


def test_a_whole_checkpoint_of_rank_0_passes_those_in_parts() -> None:
    gang = Gang().begin()
    gang.part(0, 10)
    gang.part(1, 10)
    gang.say(0, CheckpointProposed("whole", "r0s10", 20, GIGABYTE, ("n0",)))
    assert gang.head is not None
    assert (gang.head.digest, gang.head.parts, gang.head.parent) == ("whole", (), "")
    assert gang.answered("r0s10") == gang.answered("r1s10") == "superseded by step 20"


def test_a_copy_that_the_job_asks_for_is_asked_of_each_part() -> None:
    gang = Gang().begin(replication=Replication.REQUIRED)
    gang.say(1, CheckpointProposed("alone", "", 10, GIGABYTE, ("n1",), RANKS))
    assert gang.answered("alone") == "the job asks for a copy off the node and there is none"


def test_parts_of_ranks_that_are_at_odds_make_nothing() -> None:
    gang = Gang().begin()
    for rank in range(RANKS):
        gang.part(rank, 10)
    gang.end()
    gang.say(0, AttemptStarted(1, "r0s10", 10))
    gang.part(0, 20, parent="r0s10")
    gang.say(1, AttemptStarted(1, "", 0, (("r0s10", "rotten"),)))
    for rank in (1, 2):
        gang.part(rank, 20)
    assert gang.answered("r1s20") == gang.answered("r2s20") == AT_ODDS
    assert gang.head is not None
    assert gang.head.digest == "r0s10"


def moved(second: AttemptStarted, first: AttemptStarted, *, first_rank: int) -> Gang:
    """A gang with commits at 10 and 20 that goes on; two of its ranks say from where."""
    gang = Gang().begin()
    for step in (10, 20):
        for rank in range(RANKS):
            gang.part(rank, step)
    gang.end()
    gang.say(first_rank, first)
    gang.say(1 - first_rank, second)
    return gang


TORN = (("r0s20", "rank 1: rotten"),)


@pytest.mark.parametrize("first_rank", [0, 1])
def test_a_part_that_its_own_rank_finds_torn_is_nobodys_checkpoint(first_rank: int) -> None:
    """Others have looked at their own parts alone, before or after it, and say nothing of this
    one: without it the next try would be at odds again, and so for ever."""
    words = {0: AttemptStarted(1, "r0s20", 20, held_ranks=(0,)),
             1: AttemptStarted(1, "r0s10", 10, TORN, held_ranks=(1,))}  # fmt: skip
    gang = moved(words[1 - first_rank], words[first_rank], first_rank=first_rank)
    assert gang.head is not None
    assert gang.head.digest == "r0s10"
    again = gang.again()
    assert {order.candidates[0].digest for order in again} == {"r0s10"}


@pytest.mark.parametrize("held", [(), (1,)])
@pytest.mark.parametrize("first_rank", [0, 1])
def test_a_checkpoint_that_one_rank_has_verified_whole_stands(
    first_rank: int, held: tuple[int, ...]
) -> None:
    """As where all parts are laid out for all, be it by an older agent: somebody has a good copy of
    each of them."""
    words = {0: AttemptStarted(1, "r0s20", 20),
             1: AttemptStarted(1, "r0s10", 10, TORN, held_ranks=held)}  # fmt: skip
    gang = moved(words[1 - first_rank], words[first_rank], first_rank=first_rank)
    assert gang.head is not None
    assert gang.head.digest == "r0s20"


def test_who_holds_one_part_is_not_asked_for_the_others() -> None:
    gang = moved(
        AttemptStarted(1, "r0s20", 20, held_ranks=(1,)),
        AttemptStarted(1, "r0s20", 20),
        first_rank=0,
    )
    assert gang.head is not None
    held = [piece.replicas for piece in gang.head.pieces]
    assert ["n0" in replicas for replicas in held] == [True, True, True]
    assert ["n1" in replicas for replicas in held] == [True, True, False]  # 0 it held before


def test_a_part_that_has_been_copied_since_its_commit_has_a_copy_more() -> None:
    gang = moved(
        AttemptStarted(1, "r0s20", 20, held_ranks=(1,)),
        AttemptStarted(1, "r0s20", 20, held_ranks=(0,)),
        first_rank=0,
    )
    gang.answers.clear()
    gang.say(1, CheckpointProposed("r1s20", "r0s20", 20, 0, ("n1", "elsewhere"), RANKS))
    assert gang.answered("r1s20") == ""
    assert gang.head is not None
    assert ["elsewhere" in piece.replicas for piece in gang.head.pieces] == [False, True, False]


def test_ranks_that_skip_steps_neither_stop_nor_fill_the_store() -> None:
    """Rank 1 saves between the others' steps: nothing is ever complete, and each rank may always
    hand over another."""
    gang = Gang().begin()
    parent = ""
    for number in range(1, 5 * WAITING_MAX):
        gang.part(0, number * 10, parent=parent)
        refused = gang.answered(f"r0s{number * 10}") not in ("-", "")
        parent = "" if refused else f"r0s{number * 10}"
        gang.part(1, number * 10 + 5)
        gang.part(2, number * 10)
        for rank in range(RANKS):
            mine = [digest for digest in gang.waiting if digest.startswith(f"r{rank}s")]
            assert len(mine) < WAITING_MAX
    assert gang.head is None
    gang.part(1, 10 * 5 * WAITING_MAX)
    gang.part(2, 10 * 5 * WAITING_MAX)
    gang.part(0, 10 * 5 * WAITING_MAX, parent=parent)
    assert gang.head is not None


def test_a_rank_that_lags_is_waited_for() -> None:
    """Nothing that may yet be complete is refused while there is room for it."""
    gang = Gang().begin()
    parent = ""
    for step in range(10, 10 * WAITING_MAX + 1, 10):
        parent = gang.part(0, step, parent=parent)
        gang.part(2, step)
    for step in range(10, 10 * WAITING_MAX + 1, 10):
        gang.part(1, step)
        assert gang.head is not None
        assert gang.head.step == step


def test_parts_end_with_their_try() -> None:
    gang = Gang().begin()
    gang.part(0, 10)
    gang.part(1, 10)
    gang.end()
    assert gang.answered("r0s10") == "its gang has ended before all parts were there"
    assert gang.waiting == []
    assert gang.rig.disk.parts == {}


def test_parts_of_an_epoch_that_is_over_are_refused() -> None:
    gang = Gang().begin()
    gang.end()
    gang.rig.now_ms += 1_000
    gang.take(Tick())
    gang.started()
    for rank in range(RANKS):
        body = CheckpointProposed(f"old{rank}", "", 10, GIGABYTE, (f"n{rank}",), RANKS)
        gang.say(rank, body, epoch=1)
        assert gang.answered(f"old{rank}") == "epoch 1 is stale; epoch 2 holds job 1"
    assert gang.head is None


def test_nodes_keep_what_waits_there_and_parts_that_are_gone_wait_no_more() -> None:
    gang = Gang().begin()
    gang.part(0, 10)
    gang.rig.now_ms += 500
    gang.take(Tick())
    gang.rig.restart()
    gang.dial("r0s10")
    assert gang.waiting == ["r0s10"]
    gang.rig.now_ms += 500
    gang.take(Tick())
    assert [gang.kept[rank] for rank in range(RANKS)] == [("r0s10",)] * 3
    gang.rig.restart()
    gang.dial()
    assert gang.waiting == []


def test_each_part_must_be_within_reach() -> None:
    gang = Gang().begin()
    for rank in range(RANKS):
        gang.part(rank, 10)
    gang.end()
    state = gang.rig.core.state
    head = gang.head
    assert head is not None
    assert state.reachable(head)
    gang.rig.restart()
    gang.rig.now_ms += 20_000
    gang.take(Tick())
    state = gang.rig.core.state
    gang.sessions += RANKS
    present = ("r0s10", "r2s10")
    for node in ("n0", "n2"):  # rank 1's part lies on n1 and n2, and is not on n2 any more
        hello = Hello(node, "j", f"{node}:1", HOST, gpus_of(node, "2xH100"), (), present)
        gang.take(FromAgent(gang.sessions, hello))
        gang.sessions += 1
    assert not state.reachable(state.good_checkpoints(state.jobs[1])[0])
    said = state.wait_reason(state.jobs[1])
    assert said.startswith("rank 1's part of its last checkpoint (step 10) lies only on n1"), said


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_the_order_commits_are_common_steps_and_all_is_answered(seed: int) -> None:
    """Each rank goes through its steps in order, some of them left out or saved twice; how the
    ranks interleave, and when the coordinator restarts, is chance."""
    chance = random.Random(seed)
    gang = Gang().begin()
    queues: list[list[tuple[str, int]]] = []
    for rank in range(RANKS):
        steps = [step for step in range(10, 130, 10) for _ in range(chance.choice([0, 1, 1, 1, 2]))]
        queues.append([(f"r{rank}s{step}n{n}", step) for n, step in enumerate(steps)])
    where = {name: (rank, step) for rank, queue in enumerate(queues) for name, step in queue}
    parent, restarts = "", 0
    while any(queues):
        rank = chance.choice([rank for rank in range(RANKS) if queues[rank]])
        name, step = queues[rank].pop(0)
        gang.part(rank, step, parent if rank == 0 else "", name)
        if rank == 0:
            last = gang.answers.get(name, [])
            parent = last[0].head if last and not last[0].accepted else name
        if chance.random() < 0.05:
            restarts += 1
            gang.rig.restart()
            gang.dial(*where)
    gang.end()
    assert gang.waiting == []
    assert all(gang.answered(name) != "-" for name in where)
    commits = list(gang.rig.disk.checkpoints.values())
    for one in commits:
        pieces = [where[piece.digest] for piece in one.pieces]
        assert pieces == [(rank, one.step) for rank in range(RANKS)]
    assert gang.rig.disk.jobs[1].head_step == max((one.step for one in commits), default=0)


def test_the_death_of_a_node_is_not_the_failure_of_those_who_saw_it() -> None:
    """The others' connections break, and they fail, long before the dead node's lease ends."""
    gang = Gang().begin(max_restarts=0)
    for rank in range(RANKS):
        gang.part(rank, 10)
    gang.take(FromAgent(gang.sessions, SessionClosed()))
    for rank in (1, 2):
        gang.say(rank, AttemptExited(1))
    for _ in range(20):
        gang.rig.now_ms += 1_000
        gang.take(Tick())
    job = gang.rig.core.state.jobs[1]
    assert (job.phase, job.failures, job.trouble) == (JobPhase.QUEUED, 0, None)
    assert job.reason.startswith("n0 is lost")


def test_a_start_that_is_heard_after_a_commit_ends_no_gang() -> None:
    """Rank 0 has saved for all before the others' agents could say that they run."""
    gang = Gang()
    gang.dial()
    gang.take(Request(1, Submit(JobSpec(command=("train",), gpus=1, ranks=RANKS))))
    gang.say(0, AttemptStarted(1))
    gang.say(0, CheckpointProposed("whole", "", 10, GIGABYTE, ("n0",)))
    for rank in (1, 2):
        gang.say(rank, AttemptStarted(1))
    state = gang.rig.core.state
    phases = [attempt.phase for attempt in state.gang(state.jobs[1])]
    assert phases == [AttemptPhase.RUNNING] * RANKS


def calls_of(work: Callable[[], None]) -> int:
    """How many functions it calls, ours and Python's own: a figure that no busy machine changes."""
    count = 0

    def seen(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_the_work_for_a_step_grows_with_the_square_of_the_ranks_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each part is held against those that wait, and a rank that lags makes many wait. With twice
    the ranks that is four times the work; to ask of each part anew whether each rank has gone on
    without it was more than five times as much."""

    def lagging(ranks: int) -> int:
        monkeypatch.setitem(globals(), "RANKS", ranks)
        gang = Gang(sequences=[0] * ranks).begin()

        def work() -> None:
            for step in range(1, WAITING_MAX + 5):
                for rank in range(ranks - 1):
                    gang.part(rank, step)

        found = calls_of(work)
        assert len(gang.waiting) == WAITING_MAX * (ranks - 1)
        return found

    few, many = lagging(4), lagging(8)
    assert many < 4 * few
