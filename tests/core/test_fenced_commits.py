"""Ten thousand commits by attempts that have lost their job: none is accepted.

Problem: after a partition an old attempt may know everything that a commit needs but one thing: the
right parent, a later step, enough copies, an open session. Only its epoch says that the job is no
longer its own. Here jobs are handed over again and again because their node is cut off, while the
old trainers go on; then nodes propose checkpoints under epochs that are over, or were never given
out, with all that they could know, and with much that they could not. The coordinator is restarted
now and then, so that the fence also holds from what is durable.

Safety: no record of a checkpoint, no change to a job's head, and no accepting answer follows from
any of them. That the test can fail is shown by the commits of the true attempts, which the same
road takes and which are all accepted.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from coordinator.core.messages import (
    AgentMessage,
    CheckpointProposed,
    CloseSession,
    CommitResult,
    Effect,
    Event,
    FromAgent,
    PutCheckpoint,
    Request,
    Send,
    SessionClosed,
    Submit,
    Tick,
)
from coordinator.core.model import JobSpec
from tests.core.coordinator_fleet import FakeNode, Run
from tests.core.coordinator_harness import GIGABYTE, Rig, gpus_of

pytestmark = pytest.mark.long

SEEDS = 10
FENCED_EACH = 1_000
NODES = ("n1", "n2", "n3")
JOBS = 2
TICK_MS = 500
# A closed connection is forgiven for 3 s; the rest is for starting elsewhere.
HANDOVER_TICKS_MAX = 100


@dataclass
class Fleet:
    """Nodes that answer at once, and a coordinator."""

    rig: Rig = field(default_factory=Rig)
    nodes: dict[str, FakeNode] = field(default_factory=dict)
    sessions: int = 0
    away: str = ""

    def apply(self, event: Event) -> list[Effect]:
        effects = self.rig.handle(event)
        for effect in effects:
            for node in self.nodes.values():
                if isinstance(effect, Send) and node.session == effect.session:
                    node.obey(effect.order, self.holds)
                elif isinstance(effect, CloseSession) and node.session == effect.session:
                    node.cut()
        return effects

    def holds(self, name: str, digest: str) -> bool:
        return digest in self.nodes[name].disk

    def dial(self, node: FakeNode) -> None:
        self.sessions += 1
        node.dial(self.sessions)
        self.flow()

    def flow(self) -> list[Effect]:
        """Everything that nodes have to say, until nobody has."""
        effects: list[Effect] = []
        while speaking := [node for node in self.nodes.values() if node.upward]:
            node = speaking[0]
            message: AgentMessage = node.upward.pop(0)
            assert node.session is not None
            effects += self.apply(FromAgent(node.session, message))
        return effects

    def tick(self) -> None:
        self.rig.now_ms += TICK_MS
        for node in self.nodes.values():
            node.beat()
        self.flow()
        self.apply(Tick())

    def holder(self, job_id: int) -> tuple[FakeNode, Run] | None:
        """The node that runs the job's newest attempt, if it is in touch."""
        name = f"{job_id}.{self.rig.core.state.jobs[job_id].epoch}"
        for node in self.nodes.values():
            run = node.runs.get(name)
            if run is not None and run.live and node.session is not None:
                return node, run
        return None

    def await_holders(self) -> None:
        for _ in range(HANDOVER_TICKS_MAX):
            if all(self.holder(job_id) for job_id in range(1, JOBS + 1)):
                return
            self.tick()
        raise AssertionError("a job did not start again")


def fleet_at_work() -> Fleet:
    fleet = Fleet()
    fleet.nodes = {name: FakeNode(name, gpus_of(name, "1xH100:80")) for name in NODES}
    for node in fleet.nodes.values():
        fleet.dial(node)
    for job_id in range(1, JOBS + 1):
        fleet.apply(Request(1, Submit(JobSpec(command=("train",), gpus=1), f"r{job_id}")))
    fleet.await_holders()
    return fleet


def commit(fleet: Fleet, job_id: int) -> None:
    """The true attempt saves, and is accepted."""
    held = fleet.holder(job_id)
    assert held is not None
    node, run = held
    copied_to = fleet.nodes.get(run.target)
    in_touch = copied_to is not None and copied_to.session is not None
    node.save(run, copied_to if in_touch else None)
    digest = run.head
    effects = fleet.flow()
    assert any(isinstance(e, PutCheckpoint) and e.checkpoint.digest == digest for e in effects)
    assert fleet.rig.disk.jobs[job_id].head == digest
    assert run.committed == digest, "and told so"


def partition(fleet: Fleet, job_id: int, chance: random.Random) -> None:
    """The job's node is cut off, its trainer goes on, and another node gets the job."""
    held = fleet.holder(job_id)
    assert held is not None
    node, run = held
    session = node.session
    assert session is not None
    node.cut()
    fleet.away = node.name
    fleet.apply(FromAgent(session, SessionClosed()))
    for _ in range(chance.randint(0, 3)):
        node.save(run, None)
    fleet.await_holders()
    assert fleet.rig.core.state.jobs[job_id].epoch > int(run.attempt.split(".")[1])


def restart(fleet: Fleet) -> None:
    """A new coordinator; whoever was in touch is again."""
    fleet.rig.restart()
    for node in fleet.nodes.values():
        if node.name != fleet.away:
            fleet.dial(node)
    fleet.await_holders()


def propose_fenced(fleet: Fleet, job_id: int, chance: random.Random) -> FakeNode:
    """A commit under an epoch that does not hold the job; returns the node that proposes it."""
    job = fleet.rig.core.state.jobs[job_id]
    known = sorted(c.digest for c in fleet.rig.disk.checkpoints.values() if c.job_id == job_id)
    epoch = chance.choice([*range(job.epoch), *range(job.epoch), job.epoch + 1, job.epoch + 9])
    body = CheckpointProposed(
        digest=chance.choice([f"forged-{chance.getrandbits(64):x}", *known]),
        parent=chance.choice([job.head, job.head, job.head, "", *known]),
        step=job.head_step + chance.choice([0, 0, 10, 10, 1_000, -job.head_step]),
        size_bytes=GIGABYTE,
        replicas=chance.choice([NODES[:1], NODES[:2], NODES, ()]),
    )
    node = fleet.nodes[chance.choice(NODES)]
    node.report(f"{job_id}.{epoch}", body)
    return node


def history(fleet: Fleet) -> tuple[dict[int, str], dict[tuple[int, str], tuple[str, int, int]]]:
    """Every job's head, and what was committed; where its copies lie is another matter."""
    disk = fleet.rig.disk
    heads = {job_id: job.head for job_id, job in disk.jobs.items()}
    return heads, {key: (c.parent, c.epoch, c.step) for key, c in disk.checkpoints.items()}


def answers(effects: Sequence[Effect]) -> list[CommitResult]:
    return [e.order for e in effects if isinstance(e, Send) and isinstance(e.order, CommitResult)]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_fenced_commit_is_accepted(seed: int) -> None:
    chance = random.Random(seed)
    fleet = fleet_at_work()
    proposed = refused = 0
    while proposed < FENCED_EACH:
        job_id = chance.randint(1, JOBS)
        for _ in range(chance.randint(0, 2)):
            commit(fleet, job_id)
        partition(fleet, job_id, chance)
        if chance.random() < 0.2:
            restart(fleet)
        for _ in range(chance.randint(0, 2)):
            commit(fleet, job_id)
        before = history(fleet)
        fleet.dial(fleet.nodes[fleet.away])  # what it saved while it was away comes with it
        fleet.away = ""
        assert history(fleet) == before
        for _ in range(50):
            before = history(fleet)
            node = propose_fenced(fleet, job_id, chance)
            told = answers(fleet.flow())
            assert [answer for answer in told if answer.accepted] == []
            assert history(fleet) == before
            assert node.upward == [], "it was heard"
            proposed += 1
            refused += len(told)
        fleet.await_holders()
    assert refused > FENCED_EACH // 4, "refusals are told to those who can hear them"
