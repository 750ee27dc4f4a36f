"""When silence means something: for every node as if it had been asked at every tick.

The oracle looks at all nodes at every tick, which is what the heap is there to spare.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import leases
from coordinator.core.messages import FromAgent, Heartbeat, SessionClosed, Tick
from coordinator.core.nodes import TICK_GAP_MS
from coordinator.core.phases import NodePhase
from coordinator.core.state import Options
from tests.core.test_gpu_health import Fleet

OPTIONS = Options(suspect_ms=3_000, lease_ms=8_000)
NODES = {"n1": 1, "n2": 1, "n3": 1}
TICK_MS = 250
STEP = st.tuples(st.integers(1, 40), st.lists(st.sampled_from(sorted(NODES)), max_size=3))


class Watched(Fleet):
    def __init__(self) -> None:
        super().__init__(NODES, OPTIONS)
        self.beats = 0
        self.heard = dict.fromkeys(NODES, 0)

    def phase(self, name: str) -> NodePhase:
        return self.rig.core.state.nodes[name].phase

    def beat(self, name: str) -> None:
        self.beats += 1
        self.heard[name] = self.rig.now_ms
        body = Heartbeat(self.beats, attempts=self.held(name))
        self.rig.handle(FromAgent(self.sessions[name], body))

    def wait(self, ticks: int) -> None:
        for _ in range(ticks):
            self.rig.now_ms += TICK_MS
            self.rig.handle(Tick())

    def wanted(self, name: str) -> NodePhase:
        silent_ms = self.rig.now_ms - self.heard[name]
        if silent_ms >= OPTIONS.lease_ms:
            return NodePhase.LOST
        return NodePhase.SUSPECT if silent_ms >= OPTIONS.suspect_ms else NodePhase.UP


@settings(max_examples=150)
@given(st.lists(STEP, max_size=15))
def test_every_node_is_what_a_look_at_all_of_them_would_find(
    steps: list[tuple[int, list[str]]],
) -> None:
    fleet = Watched()
    for ticks, speakers in steps:
        fleet.wait(ticks)
        assert [fleet.phase(name) for name in NODES] == [fleet.wanted(name) for name in NODES]
        for name in speakers:
            if fleet.phase(name) is NodePhase.LOST:
                fleet.hello(name)
                fleet.heard[name] = fleet.rig.now_ms
            else:
                fleet.beat(name)
            assert fleet.phase(name) is NodePhase.UP
    watched = fleet.rig.core.state.watched
    assert len(watched) <= 4 * len(NODES), "heartbeats leave no entries behind"


def test_a_suspect_node_keeps_its_work_and_gets_none() -> None:
    fleet = Watched()
    first = fleet.submit()
    node = fleet.rig.disk.attempts[f"{first}.1"].node
    for name in NODES:
        if name != node:
            fleet.rig.handle(FromAgent(fleet.sessions[name], SessionClosed()))
    fleet.wait(OPTIONS.suspect_ms // TICK_MS)
    assert fleet.phase(node) is NodePhase.SUSPECT
    assert fleet.rig.disk.attempts[f"{first}.1"].ended_unix_ms is None
    second = fleet.submit()
    assert f"{second}.1" not in fleet.rig.disk.attempts


def test_nobody_is_blamed_for_the_time_that_we_were_away() -> None:
    fleet = Watched()
    fleet.wait(4)
    fleet.rig.now_ms += TICK_GAP_MS + OPTIONS.lease_ms
    fleet.rig.handle(Tick())
    assert {fleet.phase(name) for name in NODES} == {NodePhase.UP}
    fleet.wait(OPTIONS.suspect_ms // TICK_MS - 4)
    assert {fleet.phase(name) for name in NODES} == {NodePhase.SUSPECT}
    fleet.wait((OPTIONS.lease_ms - OPTIONS.suspect_ms) // TICK_MS)
    assert {fleet.phase(name) for name in NODES} == {NodePhase.LOST}


def test_after_a_restart_silence_counts_from_then() -> None:
    fleet = Watched()
    fleet.rig.now_ms += 1_000
    fleet.rig.restart()
    fleet.wait(OPTIONS.restart_grace_ms // TICK_MS - 1)
    assert NodePhase.LOST not in {fleet.phase(name) for name in NODES}
    fleet.wait(2)
    assert {fleet.phase(name) for name in NODES} == {NodePhase.LOST}


def test_nobody_is_blamed_for_the_time_that_reading_the_store_took() -> None:
    """A store of a hundred thousand jobs takes longer than the grace, and nobody is answered
    meanwhile."""
    fleet = Watched()
    fleet.rig.restart()
    fleet.rig.now_ms += OPTIONS.restart_grace_ms + TICK_GAP_MS
    fleet.rig.core.begin(fleet.rig.now_ms)
    fleet.wait(OPTIONS.restart_grace_ms // TICK_MS - 1)
    assert {fleet.phase(name) for name in NODES} == {NodePhase.SUSPECT}
    fleet.wait(1)
    assert {fleet.phase(name) for name in NODES} == {NodePhase.LOST}


def test_a_heartbeat_costs_no_entry() -> None:
    fleet = Watched()
    fleet.wait(1)
    before = list(fleet.rig.core.state.watched)
    for _ in range(5):
        fleet.beat("n1")
    assert fleet.rig.core.state.watched == before
    assert leases.due(fleet.rig.core.state, fleet.rig.now) == []


def test_a_large_fleet_may_stand_in_line_after_a_restart() -> None:
    fleet = Fleet({f"n{number}": 0 for number in range(2 * leases.HELLOS_PER_S)}, OPTIONS)
    fleet.rig.restart()
    state = fleet.rig.core.state
    waits_ms = {live.deadline_ms - fleet.rig.now_ms for live in state.nodes.values()}
    assert waits_ms == {OPTIONS.restart_grace_ms + 2_000}
