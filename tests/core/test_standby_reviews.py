"""What looking for better standbys may cost a tick."""

from dataclasses import replace

import pytest

from coordinator.core import standby
from coordinator.core.launch import PeerAddress
from coordinator.core.messages import (
    Effect,
    FromAgent,
    Heartbeat,
    Log,
    Send,
    SessionClosed,
    SetReplicaTarget,
    Tick,
)
from coordinator.core.model import Checkpoint, Job
from coordinator.core.node_requests import CordonNode
from coordinator.core.state import LiveNode, Options, State
from tests.core.test_gpu_health import Fleet

NODES = ("n1", "n2", "n3", "n4")


def test_a_review_looks_at_no_more_nodes_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """All attempts in turn; of a fleet that is too large for one tick each tick looks at a part."""
    fleet = Fleet(dict.fromkeys(NODES, 1), Options(suspect_ms=60_000, lease_ms=60_000))
    for _ in NODES:
        fleet.submit()
    looked: list[tuple[int, str]] = []
    ask = standby.candidate

    def counted(state: State, job: Job, live: LiveNode, rank: int = 0) -> standby.Candidate:
        looked.append((job.id, live.node.id))
        return ask(state, job, live, rank)

    monkeypatch.setattr(standby, "LOOKS_PER_TICK_MAX", 3)
    monkeypatch.setattr(standby, "candidate", counted)
    seen: set[tuple[int, str]] = set()
    for _ in range(40):
        fleet.rig.now_ms += 250
        looked.clear()
        fleet.rig.handle(Tick())
        # Of an attempt its present standby as well, where a look goes on and where it ends.
        assert len(looked) <= 3 + 2
        seen.update(looked)
    where = {
        job.id: fleet.rig.core.state.current(job) for job in fleet.rig.core.state.jobs.values()
    }
    for job_id, attempt in where.items():
        assert attempt is not None
        assert {node for job, node in seen if job == job_id} == set(NODES) - {attempt.node}


def test_a_better_standby_is_found_over_several_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one as in a look at all of them at once, as long after."""
    found = []
    for looks in (400, 2):
        monkeypatch.setattr(standby, "LOOKS_PER_TICK_MAX", looks)
        fleet = Fleet(dict.fromkeys(NODES, 1), Options(suspect_ms=60_000, lease_ms=60_000))
        first = fleet.submit()
        for _ in range(2):
            fleet.submit()
        state = fleet.rig.core.state
        taken = {attempt.node for attempt in state.attempts.values()}
        free = (set(NODES) - taken).pop()
        attempt = state.attempts[f"{first}.1"]
        state.put_attempt(replace(attempt, replica_node=(taken - {attempt.node}).pop()))
        for _ in range(2 * standby.SETTLED_MS // 250):
            fleet.rig.now_ms += 250
            fleet.rig.handle(Tick())
        found.append(state.attempts[f"{first}.1"].replica_node == free)
    assert found == [True, True]


def test_a_walk_goes_on_when_somebody_earlier_in_the_line_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or where work ends all the time, no walk would ever come to its end."""
    monkeypatch.setattr(standby, "LOOKS_PER_TICK_MAX", 2)
    fleet = Fleet(dict.fromkeys(NODES, 1), Options(suspect_ms=60_000, lease_ms=60_000))
    for _ in NODES:
        fleet.submit()
    state = fleet.rig.core.state
    open_attempts = list(state.indices.open_attempts)
    state.reviewed = len(open_attempts) - 1
    standby.review(state, fleet.rig.now)
    begun = state.walk
    assert begun is not None
    assert begun.attempt == open_attempts[-1]
    place = begun.place
    state.indices.open_attempts.pop(open_attempts[0])
    standby.review(state, fleet.rig.now)
    assert state.walk is begun
    assert begun.place > place


@pytest.mark.parametrize("held", [False, True])
def test_a_walk_ends_with_the_first_that_nobody_could_surpass(
    monkeypatch: pytest.MonkeyPatch, *, held: bool
) -> None:
    """The other idle nodes of a large fleet need not be asked, unless one has the checkpoint."""
    names = [f"n{number:02}" for number in range(50)]
    fleet = Fleet(dict.fromkeys(names, 1), Options(suspect_ms=60_000, lease_ms=60_000))
    job_id, other = fleet.submit(), fleet.submit()
    state = fleet.rig.core.state
    attempt, taken = state.attempts[f"{job_id}.1"], state.attempts[f"{other}.1"].node
    state.put_attempt(replace(attempt, replica_node=taken))
    state.put_attempt(replace(state.attempts[f"{other}.1"], replica_node=attempt.node))
    if held:
        holders = (attempt.node, taken, names[-1])
        state.checkpoints[job_id] = [Checkpoint(job_id, "d", "", 1, 1, 1, holders, 1)]
    looked: dict[str, None] = {}
    ask = standby.candidate

    def counted(state: State, job: Job, live: LiveNode, rank: int = 0) -> standby.Candidate:
        if job.id == job_id:
            looked[live.node.id] = None
        return ask(state, job, live, rank)

    monkeypatch.setattr(standby, "candidate", counted)
    for _ in range(2 * standby.SETTLED_MS // 250):
        fleet.rig.now_ms += 250
        fleet.rig.handle(Tick())
    idle = [name for name in names if name not in (attempt.node, taken)]
    assert state.attempts[attempt.id].replica_node == idle[-1 if held else 0]
    assert len(looked) == (len(names) - 1 if held else 2)


def test_where_copies_do_not_arrive_another_takes_over_and_each_in_turn() -> None:
    """Safety: one at a time, and none of them again before all others. Liveness: where all have
    failed they are tried anew, since one may have been mended."""
    fleet = Fleet(dict.fromkeys(NODES, 1), Options(suspect_ms=60_000, lease_ms=60_000))
    fleet.submit()
    state, beats, told = fleet.rig.core.state, 0, []

    def beat(copies_failed: int, node: str = "n1") -> list[Effect]:
        nonlocal beats
        beats += 1
        (held,) = fleet.held("n1")
        body = Heartbeat(beats, attempts=(replace(held, copies_failed=copies_failed),))
        return fleet.rig.handle(FromAgent(fleet.sessions[node], body))

    standbys = [state.attempts["1.1"].replica_node]
    assert not logged(beat(standby.COPIES_FAILED_MAX, "n2"), "standby.failed"), "not n2's to say"
    for move in range(5):
        assert not logged(beat(standby.COPIES_FAILED_MAX - 1), "standby.failed")
        told += logged(beat(standby.COPIES_FAILED_MAX), "standby.failed")
        standbys.append(state.attempts["1.1"].replica_node)
        assert not logged(beat(standby.COPIES_FAILED_MAX + 1), "standby.failed"), "it has moved"
        for turn in range(min(2, 1 + move)):  # two of three have failed from the second one on
            assert not turn or not logged(beat(standby.COPIES_FAILED_MAX), "standby.failed")
            for name in NODES:
                fleet.rig.now_ms += standby.INTERVAL_MS // len(NODES)
                fleet.rig.handle(Tick())
                fleet.hello(name) if name != "n1" else beat(0)
    assert len(told) == len(standbys) - 1
    for three in zip(standbys, standbys[1:], standbys[2:], strict=False):
        assert set(three) == {"n2", "n3", "n4"}
    assert state.standby_watches["1.1"].failed


def test_when_a_standby_dies_none_takes_over_at_which_copies_failed() -> None:
    """While there is another; else one of those, for it may have been mended."""
    fleet = Fleet(dict.fromkeys(NODES, 1), Options(suspect_ms=60_000, lease_ms=60_000))
    fleet.submit()
    state, seen = fleet.rig.core.state, []
    seen.append(state.attempts["1.1"].replica_node)
    (held,) = fleet.held("n1")
    beat = Heartbeat(1, attempts=(replace(held, copies_failed=standby.COPIES_FAILED_MAX),))
    fleet.rig.handle(FromAgent(fleet.sessions["n1"], beat))
    for _ in range(2):
        seen.append(state.attempts["1.1"].replica_node)
        fleet.rig.handle(FromAgent(fleet.sessions[seen[-1]], SessionClosed()))
        for _ in range(20):
            fleet.rig.now_ms += state.options.closed_grace_ms // 10
            fleet.rig.handle(Tick())
    seen.append(state.attempts["1.1"].replica_node)
    assert sorted(seen[:3]) == ["n2", "n3", "n4"]
    assert seen[3] == seen[0]


@pytest.mark.parametrize("how", ["away", "in time"])
def test_a_standby_that_was_mended_is_looked_at_again(how: str) -> None:
    """It could go on with the job, and the node that took over takes no work."""
    fleet = Fleet(dict.fromkeys(NODES[:3], 1), Options(suspect_ms=60_000, lease_ms=60_000))
    fleet.submit()
    state = fleet.rig.core.state
    failed = state.attempts["1.1"].replica_node
    (held,) = fleet.held("n1")
    beat = Heartbeat(1, attempts=(replace(held, copies_failed=standby.COPIES_FAILED_MAX),))
    fleet.rig.handle(FromAgent(fleet.sessions["n1"], beat))
    other = state.attempts["1.1"].replica_node
    assert {failed, other} == {"n2", "n3"}
    fleet.ask(CordonNode(other))
    for turn in range(standby.FORGOTTEN_MS // 10_000 + 30):
        fleet.pass_ms(10_000)
        if turn == 29:
            assert state.attempts["1.1"].replica_node == other, "it is not forgotten"
            if how == "away":
                fleet.rig.handle(FromAgent(fleet.sessions[failed], SessionClosed()))
                fleet.hello(failed)
        if state.attempts["1.1"].replica_node == failed:
            break
    assert state.attempts["1.1"].replica_node == failed
    assert (turn < 60) is (how == "away")


def test_a_standby_that_comes_and_goes_is_tried_again_once() -> None:
    """Each try costs three copies, and two minutes in which nobody has the newest. n2 could go on
    with the job and the other could not, and it is away and back all the time."""
    fleet = Fleet(dict.fromkeys(NODES[:3], 1), Options(suspect_ms=60_000, lease_ms=60_000))
    fleet.submit()
    state = fleet.rig.core.state
    fleet.ask(CordonNode("n3"))
    tried: list[str] = []
    for _ in range(20):
        for _ in range(12):
            fleet.pass_ms(10_000)
        present = state.attempts["1.1"].replica_node
        tried += [present] if present not in tried[-1:] else []
        (held,) = fleet.held("n1")
        failed = standby.COPIES_FAILED_MAX if present == "n2" else 0
        beat = Heartbeat(fleet.rig.now_ms + 5, attempts=(replace(held, copies_failed=failed),))
        fleet.rig.handle(FromAgent(fleet.sessions["n1"], beat))
        tried += [state.attempts["1.1"].replica_node] if present == "n2" else []
        fleet.rig.handle(FromAgent(fleet.sessions["n2"], SessionClosed()))
        fleet.hello("n2")
    assert tried == ["n2", "n3"] * 2


def test_a_standby_that_comes_back_gets_its_copy_at_once() -> None:
    """The agent tries again ever more seldom, up to five minutes."""
    fleet = Fleet(dict.fromkeys(NODES[:2], 1), Options(suspect_ms=60_000, lease_ms=60_000))
    fleet.submit()
    fleet.rig.handle(FromAgent(fleet.sessions["n2"], SessionClosed()))
    sent = [one for one in fleet.hello("n2") if isinstance(one, Send)]
    told = [one.order for one in sent if one.session == fleet.sessions["n1"]]
    assert told == [SetReplicaTarget("1.1", PeerAddress("n2", "n2:1"), False)]
    again = [one for one in fleet.hello("n2") if isinstance(one, Send)]
    assert all(one.session == fleet.sessions["n2"] for one in again), "it was not away"


def logged(effects: list[Effect], name: str) -> list[Log]:
    return [one for one in effects if isinstance(one, Log) and one.event == name]
