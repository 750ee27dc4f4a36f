"""What counts already is copied to the standby where it lies on its attempt's node alone.

Problem: after a handoff the node that wrote the last checkpoint is dead, so its only copy is on the
node that goes on with it, up to the first commit, which may be an hour away; likewise when the
standby dies, or could not take its copy, up to the next one. Of the ranks of a gang
`test_agent_gangs.py` says the same.
"""

import pytest

from agent.core import messages as m
from agent.core import precopy
from agent.core import state as s
from agent.core import trainer_messages as t
from agent.core import values as v
from agent.core.node import NodeCore
from agent.core.pipeline import COPY_RETRY_MS_MAX, REPLICA_RETRY_MS, RESTORED_RETRY_MS
from coordinator.core import checkpoints
from coordinator.core.launch import PeerAddress
from coordinator.core.messages import (
    AttemptStarted,
    CheckpointProposed,
    CommitResult,
    FromAgent,
    Goodbye,
    Hello,
    LoneCheckpoint,
    Request,
    SetReplicaTarget,
)
from coordinator.core.model import HostFacts
from coordinator.core.node_requests import ForgetNode
from tests.core.agent_box import HOST, OPTIONS, PEER
from tests.core.agent_memory import MemoryJournal
from tests.core.test_agent_gangs import told
from tests.core.test_gangs import Box

DEAD = v.ReplicaSource("n9", "n9:1")
OTHER = v.ReplicaSource("n3", "n3:1")
COPIED = m.CheckpointProposed("aa", "aa", 5, 0, ("n1", "n2"), 1)


def copies(effects: list[s.Effect]) -> list[tuple[str, str]]:
    found = [one for one in effects if isinstance(one, m.ReplicateCheckpoint)]
    return [(one.digest, one.target.node) for one in found]


class Alone:
    """An attempt that has started from "aa", which `sources` had. Its standby is `PEER`."""

    def __init__(self, *sources: v.ReplicaSource, gang: v.Gang | None = None) -> None:
        self.core = NodeCore(OPTIONS, MemoryJournal().memory())
        self.now_ms = 0
        self.name = "7.2" if gang is None else f"7.2.{gang.rank}"
        candidate = v.RestoreCandidate("aa", 5, sources)
        spec = m.JobSpec(command=("x",))
        order = m.StartAttempt(self.name, spec, (), (candidate,), PEER, gang=gang)
        self.hear(m.Opened((), HOST, ()), m.Connected(()))
        self.order(m.Welcome(1, 1_000, 8_000, 0), order)
        self.hear(m.RestoreDone(self.name, v.Restored("aa", 5, "/restored")))
        self.began = self.hear(m.ProcessStarted(self.name, 100))

    def hear(self, *events: m.Event) -> list[s.Effect]:
        now = s.Instant(self.now_ms, self.now_ms)
        return [effect for event in events for effect in self.core.handle(now, event)]

    def order(self, *orders: m.Order) -> list[s.Effect]:
        return self.hear(*(m.FromCoordinator(order, "token") for order in orders))

    def aim(self, target: v.ReplicaSource, lone: str = "", *, lost: bool = False) -> list[s.Effect]:
        alone = v.LoneCheckpoint(lone, 6, 1) if lone else None
        return self.order(m.SetReplicaTarget(self.name, target, False, alone, lost))

    def save(self) -> list[s.Effect]:
        self.hear(m.FromTrainer(self.name, t.TrainerCheckpoint(1, "/staging/6", 6)))
        return self.hear(m.StoreDone(self.name, v.StoredCheckpoint("bb", 6, 10, 10)))


def gang(rank: int, *nodes: str) -> v.Gang:
    return v.Gang(rank, 2, rank, 2 // len(nodes), 0, nodes, "n1", 20_000)


def test_what_lies_here_alone_is_copied_at_once_and_said() -> None:
    job = Alone(DEAD)
    assert copies(job.began) == [("aa", "n2")]
    assert told(job.hear(m.ReplicationDone("7.2", "aa", "n2"))) == [COPIED]
    assert copies(job.save()) == [("bb", "n2")]


@pytest.mark.parametrize(
    ("place", "copied"),
    [(gang(0, "n1"), True), (gang(1, "n1"), False), (gang(0, "n1", "n3"), False)],
)
def test_what_rank_0_keeps_for_all_is_copied_where_they_are_on_one_node(
    place: v.Gang, copied: bool
) -> None:
    assert copies(Alone(DEAD, gang=place).began) == [("aa", "n2")] * copied


def test_what_the_standby_has_is_not() -> None:
    assert not copies(Alone(DEAD, PEER).began)


def test_a_copy_that_failed_goes_to_the_next_standby() -> None:
    job = Alone(DEAD)
    failed = job.hear(m.ReplicationFailed("7.2", "aa", "no route"))
    assert (copies(failed), told(failed)) == ([], [])
    assert not [one for one in failed if isinstance(one, s.PutAttempt)], "nothing has changed"
    assert copies(job.aim(OTHER)) == [("aa", "n3")]


def test_a_copy_that_failed_is_tried_again_until_something_is_stored() -> None:
    job = Alone(DEAD)
    for wait_ms in (RESTORED_RETRY_MS, 2 * RESTORED_RETRY_MS, 4 * RESTORED_RETRY_MS):
        assert not copies(job.hear(m.ReplicationFailed("7.2", "aa", "64 transfers are open")))
        job.now_ms += wait_ms - 1
        assert not copies(job.hear(m.Tick()))
        job.now_ms += 1
        assert copies(job.hear(m.Tick())) == [("aa", "n2")]
    job.hear(m.ReplicationFailed("7.2", "aa", "64 transfers are open"))
    assert copies(job.save()) == [("bb", "n2")]
    job.hear(m.ReplicationDone("7.2", "bb", "n2"))
    job.now_ms += RESTORED_RETRY_MS
    assert not copies(job.hear(m.Tick()))


@pytest.mark.parametrize("required", [False, True])
def test_each_failure_in_a_row_doubles_the_wait_and_is_told(required: bool) -> None:
    """Or a full disk is asked every few seconds for as long as it is full, and nobody hears it."""
    job, waits_ms = Alone(DEAD), []
    job.order(m.SetReplicaTarget(job.name, PEER, required=required))
    for failures in range(1, 12):
        job.hear(m.ReplicationFailed("7.2", "aa", "the disk is full"))
        (held,) = precopy.held(job.core.state)
        assert held.copies_failed == failures
        retry_ms = job.core.state.attempts[job.name].replica_retry_ms
        assert retry_ms is not None
        waits_ms.append(retry_ms - job.now_ms)
        job.now_ms = retry_ms
        assert copies(job.hear(m.Tick())) == [("aa", "n2")]
    first_ms = REPLICA_RETRY_MS if required else RESTORED_RETRY_MS
    assert waits_ms[:3] == [first_ms, 2 * first_ms, 4 * first_ms]
    assert waits_ms[-1] == COPY_RETRY_MS_MAX
    job.aim(OTHER)
    job.hear(m.ReplicationFailed("7.2", "aa", "the disk is full"))
    assert precopy.held(job.core.state)[0].copies_failed == 0, "of the other there is none yet"


@pytest.mark.parametrize("stopped", [False, True])
def test_who_leaves_does_not_wait_minutes_for_the_copy_that_its_last_one_is_behind(
    stopped: bool,
) -> None:
    """The standby's disk was full for long, and there is no other. It has room again, and then the
    job leaves: its last checkpoint is copied well before it is given up."""
    job = Alone(DEAD, PEER)
    job.order(m.SetReplicaTarget(job.name, PEER, required=True))
    assert copies(job.save()) == [("bb", "n2")]
    for _ in range(10):
        job.hear(m.ReplicationFailed(job.name, "bb", "the disk is full"))
        job.now_ms += COPY_RETRY_MS_MAX
        assert copies(job.hear(m.Tick())) == [("bb", "n2")]
    job.hear(m.ReplicationFailed(job.name, "bb", "the disk is full"))
    job.now_ms += 1
    if stopped:
        leaves = job.order(m.StopAttempt(job.name, 120_000, "its node is drained"))
    else:
        leaves = job.hear(m.ProcessEnded(v.ProcessExit(job.name, 0, None)))
    assert copies(leaves) == [("bb", "n2")]
    job.hear(m.ReplicationFailed(job.name, "bb", "the disk is full"))
    job.now_ms += REPLICA_RETRY_MS
    assert copies(job.hear(m.Tick())) == [("bb", "n2")], "as often as it can be"


def test_a_standby_that_is_named_while_a_copy_is_on_its_way_gets_one_too() -> None:
    """The one before may have died just after it had got all."""
    job = Alone(DEAD)
    assert not copies(job.aim(OTHER)), "not two at once"
    assert copies(job.hear(m.ReplicationDone("7.2", "aa", "n2"))) == [("aa", "n3")]
    assert not copies(job.hear(m.ReplicationDone("7.2", "aa", "n3")))


@pytest.mark.parametrize("moved_first", [True, False])
@pytest.mark.parametrize("killed", [True, False])
def test_who_leaves_does_not_wait_for_a_node_that_is_its_standby_no_more(
    *, moved_first: bool, killed: bool
) -> None:
    """It may be the silent node for which all of its gang begins anew."""
    job = Alone(PEER)
    assert copies(job.save()) == [("bb", "n2")]
    if moved_first:
        assert not copies(job.aim(OTHER)), "in its own time, as long as it trains"
    leaves = job.order(m.StopAttempt(job.name, None if killed else 120_000, "n2 is lost"))
    if not moved_first:
        assert not copies(leaves)
        leaves = job.aim(OTHER)
    assert copies(leaves) == [("bb", "n3")], "at once"
    assert not copies(job.aim(OTHER)), "once"
    job.hear(m.ProcessEnded(v.ProcessExit(job.name, None, 9)))
    kept, ended = told(job.hear(m.ReplicationDone(job.name, "bb", "n3")))
    assert isinstance(kept, m.CheckpointProposed)
    assert kept.replicas == ("n1", "n3")
    assert isinstance(ended, m.AttemptExited)


@pytest.mark.parametrize("counts_already", [True, False])
def test_what_is_on_its_way_to_a_lost_node_begins_anew_elsewhere(*, counts_already: bool) -> None:
    """It would be tried for most of a minute, and all that is saved meanwhile lie here alone."""
    job = Alone(DEAD if counts_already else PEER)
    digest = "aa" if counts_already else "bb"
    sent = job.began if counts_already else job.save()
    assert copies(sent) == [(digest, "n2")]
    assert copies(job.aim(OTHER, lost=True)) == [(digest, "n3")], "while it trains"
    assert not copies(job.aim(OTHER, lost=True)), "once"
    (kept,) = told(job.hear(m.ReplicationDone(job.name, digest, "n3")))
    assert isinstance(kept, m.CheckpointProposed)
    assert kept.replicas == ("n1", "n3")


def test_without_another_node_what_was_on_its_way_to_a_lost_one_counts_here() -> None:
    job = Alone(PEER)
    job.save()
    nobody = m.SetReplicaTarget(job.name, None, required=False, lost=True)
    (kept,) = told(job.order(nobody))
    assert isinstance(kept, m.CheckpointProposed)
    assert kept.replicas == ("n1",)
    assert not told(job.hear(m.ReplicationFailed(job.name, "bb", "too late")))


def test_who_leaves_and_has_no_standby_any_more_says_at_once_how_it_ended() -> None:
    job = Alone(PEER)
    job.save()
    job.hear(m.ProcessEnded(v.ProcessExit(job.name, None, 9)))
    nobody = m.SetReplicaTarget(job.name, None, required=False, lone=None)
    kept, ended = told(job.order(nobody))
    assert isinstance(kept, m.CheckpointProposed)
    assert kept.replicas == ("n1",)
    assert isinstance(ended, m.AttemptExited)
    assert not told(job.hear(m.ReplicationFailed(job.name, "bb", "too late")))


def test_a_standby_that_is_named_anew_gets_it_as_long_as_nothing_is_stored() -> None:
    job = Alone(DEAD, PEER)
    assert not copies(job.aim(PEER))
    assert copies(job.aim(OTHER)) == [("aa", "n3")]
    job.hear(m.ReplicationDone("7.2", "aa", "n3"))
    job.save()
    job.hear(m.ReplicationDone("7.2", "bb", "n3"))
    assert not copies(job.aim(PEER)), "the next checkpoint goes there"


def test_the_last_commit_is_copied_at_once_where_its_other_copy_is_lost() -> None:
    job = Alone(DEAD, PEER)
    job.save()
    job.hear(m.ReplicationDone("7.2", "bb", "n2"))
    assert not copies(job.aim(OTHER, lone="aa")), "said before the last one was known"
    job.aim(PEER)
    assert copies(job.aim(OTHER, lone="bb")) == [("bb", "n3")]
    assert not copies(job.aim(OTHER, lone="bb")), "said twice"
    assert told(job.hear(m.ReplicationDone("7.2", "bb", "n3"))) == [
        m.CheckpointProposed("bb", "bb", 6, 0, ("n1", "n3"), 1)
    ]
    committed = job.order(m.CommitResult("7.2", "bb", accepted=True, head="bb"))
    words = [dict(one.message) for one in committed if isinstance(one, m.TellTrainer)]
    assert words == [{"type": "committed", "id": 1, "digest": "bb"}], "it waited for that"


def test_a_commit_that_could_not_be_copied_is_tried_again() -> None:
    job = Alone(DEAD, PEER)
    job.save()
    assert told(job.hear(m.ReplicationFailed("7.2", "bb", "64 transfers are open"))) == [
        m.CheckpointProposed("bb", "aa", 6, 10, ("n1",), 1)
    ]
    assert not copies(job.hear(m.Tick()))
    job.now_ms += RESTORED_RETRY_MS
    assert copies(job.hear(m.Tick())) == [("bb", "n2")]
    job.order(m.CommitResult("7.2", "bb", accepted=False, reason="no", head="aa"))
    assert not told(job.hear(m.ReplicationDone("7.2", "bb", "n2"))), "it counts no more"
    assert job.core.state.attempts["7.2"].record.head == "aa"


def test_an_answer_to_nothing_that_was_asked_is_looked_for_once() -> None:
    """The copy's proposal follows itself."""
    job = Alone(DEAD)
    job.hear(m.ReplicationDone("7.2", "aa", "n2"))
    job.order(m.CommitResult("7.2", "zz", accepted=False, reason="no", head="yy"))
    assert job.core.state.attempts["7.2"].record.head == "aa"


def test_the_coordinator_knows_of_a_copy_that_was_made_since() -> None:
    box = Box("n0:1", "n1:1")
    box.submit(1)
    box.say("1.1", AttemptStarted(1))
    box.say("1.1", CheckpointProposed("aa", "", 5, 10, ("n0",)))
    box.say("1.1", CheckpointProposed("aa", "aa", 5, 0, ("n0", "n1")))
    assert [order.accepted for order in box.sent if isinstance(order, CommitResult)] == [True]
    (kept,) = box.rig.core.state.checkpoints[1]
    assert (kept.replicas, kept.size_bytes) == (("n0", "n1"), 10)


@pytest.mark.parametrize("moved", [False, True])
def test_what_a_lost_node_leaves_alone_is_ordered_to_the_standby(moved: bool) -> None:
    """Also where that was another one already: it would get the next checkpoint only."""
    box = Box("n0:1", "n1:1", "n2:1")
    box.submit(1)
    state = box.rig.core.state
    attempt = state.attempts["1.1"]
    gone = attempt.replica_node
    (left,) = {"n0", "n1", "n2"} - {attempt.node, gone}
    box.say("1.1", AttemptStarted(1))
    box.say("1.1", CheckpointProposed("aa", "", 5, 10, (attempt.node, gone)))
    if moved:
        checkpoints.send_copies_to(state, state.attempts["1.1"], left)
    box.take(FromAgent(int(gone[1:]), Goodbye(None)))
    orders = [order for order in box.sent if isinstance(order, SetReplicaTarget)]
    where = PeerAddress(left, f"{left}:1")
    alone = LoneCheckpoint("aa", 5, 1)
    assert orders[moved:] == [SetReplicaTarget("1.1", where, False, alone, lost=not moved)]
    box.say("1.1", CheckpointProposed("aa", "aa", 5, 0, (attempt.node, left)))
    hello = Hello(gone, "j", f"{gone}:1", HostFacts(cpu_count=4), (), (), ("aa",))
    box.take(FromAgent(int(gone[1:]), hello))
    assert not [order for order in box.sent if isinstance(order, SetReplicaTarget)]


def test_a_commit_that_comes_after_its_copy_was_lost_is_ordered_to_the_standby() -> None:
    """The coordinator was away, say, when its standby got it and died."""
    box = Box("n0:1", "n1:1", "n2:1")
    box.submit(1)
    attempt = box.rig.core.state.attempts["1.1"]
    gone = attempt.replica_node
    (left,) = {"n0", "n1", "n2"} - {attempt.node, gone}
    box.say("1.1", AttemptStarted(1))
    box.take(FromAgent(int(gone[1:]), Goodbye(None)))
    box.say("1.1", CheckpointProposed("aa", "", 5, 10, (attempt.node, gone)))
    orders = [order for order in box.sent if isinstance(order, SetReplicaTarget)]
    where = PeerAddress(left, f"{left}:1")
    assert orders == [SetReplicaTarget("1.1", where, False, LoneCheckpoint("aa", 5, 1))]
    box.say("1.1", CheckpointProposed("bb", "aa", 6, 10, (attempt.node,)))
    later = [order for order in box.sent if isinstance(order, SetReplicaTarget)]
    assert not later, "its agent knows, and tries again by itself"


def test_a_part_whose_copy_was_lost_while_it_waited_is_ordered_to_the_standby() -> None:
    box = Box("n0:1", "n1:1", "n2:1", "n3:1")
    box.submit(2)
    first, second = (box.rig.core.state.attempts[name] for name in ("1.1.0", "1.1.1"))
    gone = second.replica_node
    for name in ("1.1.0", "1.1.1"):
        box.say(name, AttemptStarted(1))
    box.say("1.1.1", CheckpointProposed("bb", "", 5, 10, (second.node, gone), 2))
    box.take(FromAgent(int(gone[1:]), Goodbye(None)))
    box.say("1.1.0", CheckpointProposed("aa", "", 5, 10, (first.node,), 2))
    orders = [order for order in box.sent if isinstance(order, SetReplicaTarget)]
    assert [(order.attempt, order.lone) for order in orders] == [
        ("1.1.1", LoneCheckpoint("bb", 5, 2))
    ]


def test_a_copy_that_was_made_on_a_forgotten_node_is_kept_when_it_joins_again() -> None:
    box = Box("n0:1", "n1:1")
    box.submit(1)
    state = box.rig.core.state
    gone = "n1" if state.attempts["1.1"].node == "n0" else "n0"
    box.take(FromAgent(int(gone[1:]), Goodbye(None)))
    box.take(Request(1, ForgetNode(gone)))
    assert gone not in state.nodes
    box.say("1.1", AttemptStarted(1))
    box.say("1.1", CheckpointProposed("aa", "", 5, 10, (state.attempts["1.1"].node, gone)))
    box.take(FromAgent(7, Hello(gone, "j", f"{gone}:1", HostFacts(cpu_count=4), (), (), ("aa",))))
    assert state.nodes[gone].digests == {"aa": 1}, "it is told to keep it"
