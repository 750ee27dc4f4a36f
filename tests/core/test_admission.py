"""Who is let in when: at a bounded rate, in order, each on the stream on which it came; and that a
node is not lost because it was told to wait.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import arrivals
from coordinator.core.admission import (
    BURST_MS,
    WAIT_MS_MAX,
    Admission,
    first,
    leave,
    stand,
    take_slot,
)
from coordinator.core.admission import wait_ms as wait_of
from coordinator.core.messages import (
    AttemptStarted,
    CloseSession,
    ComeLater,
    Effect,
    FromAgent,
    Goodbye,
    Heartbeat,
    Hello,
    Log,
    Send,
    SessionClosed,
    Submit,
    Tick,
    Welcome,
)
from coordinator.core.model import JobSpec
from coordinator.core.phases import AttemptPhase, NodePhase
from coordinator.core.state import Options
from tests.core.test_gpu_health import BOX, Fleet

TICK_MS = 250


RATES = st.integers(1, 50)


def hello(name: str) -> Hello:
    return Hello(name, "j1", f"{name}:1", BOX, (), (), (), 0)


class Door:
    """Slots and a line, as `arrivals.py` uses them."""

    def __init__(self, rate: int) -> None:
        self.admission = Admission()
        self.rate = rate
        self.entered: list[tuple[int, str]] = []

    def come(self, now_ms: int, session: int, name: str) -> int:
        """For how long it is told to wait; 0: it is in."""
        admission = self.admission
        if not admission.line and take_slot(admission, now_ms, self.rate):
            self.entered.append((now_ms, name))
            return 0
        told = wait_of(admission, now_ms, len(admission.line), self.rate)
        stand(admission, session, hello(name), now_ms + told)
        return told

    def let_in(self, now_ms: int) -> None:
        while self.admission.line and take_slot(self.admission, now_ms, self.rate):
            self.entered.append((now_ms, first(self.admission).hello.node))


def test_ten_thousand_come_once_each_and_a_bounded_number_in_any_second() -> None:
    door = Door(200)
    told = {f"n{number}": door.come(1_000, number, f"n{number}") for number in range(10_000)}
    for now_ms in range(1_000, 60_000, 10):
        door.let_in(now_ms)
    assert [name for _, name in door.entered] == list(told), "in the order in which they came"
    for at_ms, name in door.entered:
        assert 0 <= at_ms - (1_000 + told[name]) <= 10, "when they were told"
    times = [at_ms for at_ms, _ in door.entered if at_ms > 1_000]
    for start_ms in range(1_000, times[-1], 500):
        within = sum(start_ms <= at_ms < start_ms + 1_000 for at_ms in times)
        assert within <= 200 + 1


def test_as_many_as_a_second_has_room_for_never_wait() -> None:
    door = Door(200)
    assert not any(door.come(1_000, number, f"n{number}") for number in range(200))
    assert not door.admission.line


STEP = st.tuples(st.integers(0, 3_000), st.integers(0, 30), st.sampled_from(["come", "go", "in"]))


@settings(max_examples=200)
@given(RATES, st.lists(STEP, max_size=80))
def test_no_more_are_let_in_than_there_are_slots_and_the_line_knows_whose_place_is_whose(
    rate: int, steps: list[tuple[int, int, str]]
) -> None:
    """Agents that come, come again in another session or the same, and leave."""
    door, now_ms = Door(rate), 0
    for session, (pause_ms, number, what) in enumerate(steps):
        now_ms += pause_ms
        if what == "in":
            door.let_in(now_ms)
        elif what == "go" and door.admission.sessions:
            leave(
                door.admission, list(door.admission.sessions)[number % len(door.admission.sessions)]
            )
        else:
            door.come(now_ms, session - number % 2, f"n{number}")
        line = {node: waiting.session for node, waiting in door.admission.line.items()}
        assert {node: session for session, node in door.admission.sessions.items()} == line
        assert all(waiting.hello.node == node for node, waiting in door.admission.line.items())
    for at, (start_ms, _) in enumerate(door.entered):
        for later, (end_ms, _) in enumerate(door.entered[at:], at):
            assert later - at <= rate * (end_ms - start_ms + BURST_MS) / 1_000 + 1


def test_a_new_session_takes_the_place_of_the_one_before() -> None:
    door = Door(1)
    for number in range(5):
        door.come(0, number, f"n{number}")
    assert stand(door.admission, 9, hello("n2"), 0) == 2
    assert stand(door.admission, 9, hello("n2"), 0) is None, "it says its hello again"
    assert list(door.admission.line) == ["n2", "n3", "n4"]
    assert leave(door.admission, 2) is None
    assert first(door.admission).session == 9


def test_nobody_is_told_to_wait_for_ever_in_one_piece() -> None:
    door = Door(1)
    told = [door.come(0, number, f"n{number}") for number in range(1_000)]
    assert max(told) == WAIT_MS_MAX


# --- in the coordinator ---------------------------------------------------------------------------

NODES = {f"n{number}": 1 for number in range(1, 21)}
OPTIONS = Options(hellos_per_s=1)


class Line(Fleet):
    """A fleet that has joined, and from now on is let in one by one."""

    def __init__(self) -> None:
        super().__init__(NODES)
        self.rig.core.state.options = OPTIONS

    def cut(self) -> dict[str, int]:
        """All connections break, and all come again at once; who has to wait, and for how long. Of
        those who do the coordinator hears last that the old connection is gone."""
        self.rig.now_ms += 2_000
        waits, old = {}, dict(self.sessions)
        for name in NODES:
            wait_ms = told(self.hello(name))
            if wait_ms:
                waits[name] = wait_ms
        for name, session in old.items():
            assert session < self.sessions[name]
            self.rig.handle(FromAgent(session, SessionClosed()))
        return waits

    def wait(self, span_ms: int) -> list[Effect]:
        effects = []
        for _ in range(span_ms // TICK_MS):
            self.rig.now_ms += TICK_MS
            effects += self.rig.handle(Tick())
        return effects

    def phase(self, name: str) -> NodePhase:
        return self.rig.core.state.nodes[name].phase


def told(effects: list[Effect]) -> int:
    """How long a hello has to wait; 0: it is welcome."""
    orders = [effect.order for effect in effects if isinstance(effect, Send)]
    later = [order.wait_ms for order in orders if isinstance(order, ComeLater)]
    welcome = any(isinstance(order, Welcome) for order in orders)
    assert welcome is not bool(later)
    if later:
        assert len(orders) == 1
        assert not [effect for effect in effects if isinstance(effect, CloseSession)]
    return later[0] if later else 0


def welcomed(effects: list[Effect]) -> list[int]:
    """The sessions."""
    return [
        effect.session
        for effect in effects
        if isinstance(effect, Send) and isinstance(effect.order, Welcome)
    ]


def test_who_stands_in_line_is_not_lost_and_is_let_in_on_its_stream_when_it_was_told() -> None:
    fleet = Line()
    waits = fleet.cut()
    assert len(waits) == len(NODES) - 2
    assert sorted(waits.values()) == list(range(1_000, 1_000 * len(waits) + 1, 1_000))
    begun_ms = fleet.rig.now_ms
    for name, wait_ms in waits.items():
        assert fleet.phase(name) is NodePhase.SUSPECT
        effects = fleet.wait(begun_ms + wait_ms - fleet.rig.now_ms)
        assert welcomed(effects) == [fleet.sessions[name]]
        assert fleet.phase(name) is NodePhase.UP
    assert not fleet.rig.core.state.admission.sessions


def test_who_leaves_the_line_is_as_one_whose_connection_has_closed() -> None:
    fleet = Line()
    waits = fleet.cut()
    name = max(waits, key=lambda name: waits[name])
    fleet.rig.handle(FromAgent(fleet.sessions[name], SessionClosed()))
    fleet.wait(OPTIONS.closed_grace_ms - TICK_MS)
    assert fleet.phase(name) is not NodePhase.LOST
    effects = fleet.wait(2 * TICK_MS)
    assert fleet.phase(name) is NodePhase.LOST
    effects += fleet.wait(30_000)
    assert fleet.sessions[name] not in welcomed(effects)
    assert told(fleet.hello(name)) == 0


def test_who_comes_again_keeps_its_place_and_the_session_before_is_closed() -> None:
    fleet = Line()
    waits = fleet.cut()
    name, behind = list(waits)[3:5]
    old = fleet.sessions[name]
    effects = fleet.hello(name)
    closes = [effect for effect in effects if isinstance(effect, CloseSession)]
    assert [effect.session for effect in closes] == [old]
    sent = [effect.order for effect in effects if isinstance(effect, Send)]
    assert sent == [ComeLater(waits[name])], "as before"
    fleet.rig.handle(FromAgent(old, SessionClosed()))
    order = welcomed(fleet.wait(30_000))
    assert order.index(fleet.sessions[behind]) - order.index(fleet.sessions[name]) == 1
    assert old not in order


def test_an_older_session_that_is_heard_late_takes_nobodys_place() -> None:
    fleet = Line()
    fleet.cut()
    line = fleet.rig.core.state.admission.line
    present = line["n9"].session
    effects = fleet.rig.handle(FromAgent(present - 1, hello("n9")))
    assert [e.session for e in effects if isinstance(e, CloseSession)] == [present - 1]
    assert line["n9"].session == present


def test_who_waits_longer_than_it_was_told_is_told_again_and_not_lost() -> None:
    """The machine does not keep up: no batch is finished for as long as it takes."""
    fleet = Line()
    waits = fleet.cut()
    state = fleet.rig.core.state
    last = max(waits, key=lambda name: waits[name])
    again: list[Effect] = []
    for _ in range(40_000 // TICK_MS):
        fleet.rig.now_ms += TICK_MS
        again += fleet.rig.handle(Tick(), decide=False)
    times = [e.order for e in again if isinstance(e, Send) and e.session == fleet.sessions[last]]
    assert 1 <= len(times) <= 3, "seldom"
    assert all(isinstance(order, ComeLater) for order in times)
    assert fleet.phase(last) is not NodePhase.LOST
    assert len(state.admission.line) == len(waits)


def test_a_batch_lets_in_no_more_than_come_free_in_a_tick() -> None:
    fleet = Line()
    state = fleet.rig.core.state
    state.options = Options(hellos_per_s=8)
    fleet.rig.now_ms += 2_000
    for name in NODES:
        fleet.hello(name)
    assert len(state.admission.line) > 8
    fleet.rig.now_ms += 1_000
    assert len(welcomed(fleet.rig.handle(Tick()))) == 2


def test_a_goodbye_counts_more_than_a_place_in_line() -> None:
    for in_line in (False, True):
        fleet = Line()
        fleet.rig.now_ms += 2_000
        session = fleet.sessions["n9"]
        for name in ("n1", "n2", "n9"):
            fleet.hello(name)
        assert fleet.rig.core.state.nodes["n9"].expected_ms > 0
        if in_line:
            fleet.rig.handle(FromAgent(session, SessionClosed()))
            session = fleet.sessions["n9"]
        fleet.rig.handle(FromAgent(session, Goodbye(None)))
        assert fleet.phase("n9") is NodePhase.LOST


def test_a_line_is_told_of_once() -> None:
    fleet = Line()
    fleet.rig.now_ms += 2_000
    effects = [effect for name in NODES for effect in fleet.hello(name)]
    lines = [e for e in effects if isinstance(e, Log) and e.event == "node.line"]
    assert len(lines) == 1


def test_the_line_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "NODES_MAX", len(NODES))
    fleet = Line()
    fleet.rig.now_ms += 2_000
    for name in NODES:
        fleet.hello(name)
    fleet.counts = {**NODES, "n21": 1}
    fleet.sequences["n21"] = 0
    effects = fleet.hello("n21")
    assert [effect.session for effect in effects if isinstance(effect, CloseSession)]
    assert "n21" not in fleet.rig.core.state.admission.line


def test_a_hello_that_is_said_twice_in_its_session_takes_one_slot() -> None:
    fleet = Line()
    fleet.rig.now_ms += 2_000
    for _ in range(5):
        fleet.sessions = {"n1": 99}
        assert told(fleet.hello("n1")) == 0, "in session 100, each time"
    assert told(fleet.hello("n2")) == 0, "the second slot of the last second"
    assert told(fleet.hello("n3")) > 0


def test_a_gang_is_kept_while_a_rank_of_it_stands_in_line() -> None:
    """Both nodes were lost in a cut; one is back, the other has said hello and is to come later."""
    fleet = Fleet({"n1": 2, "n2": 2}, Options(hellos_per_s=40))
    fleet.ask(Submit(JobSpec(command=("train",), gpus=2, ranks=2)))
    for attempt in list(fleet.rig.disk.attempts.values()):
        fleet.event(attempt.node, attempt.id, AttemptStarted(7))
    held = {name: fleet.held(name) for name in ("n1", "n2")}
    fleet.held = lambda name: held.get(name, ())  # type: ignore[method-assign]
    for _ in range(120):
        fleet.rig.now_ms += 500
        fleet.rig.handle(Tick())

    def hello(name: str) -> int:
        fleet.counts.setdefault(name, 1)
        fleet.sequences.setdefault(name, 0)
        sent = [effect.order for effect in fleet.hello(name) if isinstance(effect, Send)]
        return next((order.wait_ms for order in sent if isinstance(order, ComeLater)), 0)

    assert hello("n1") == 0
    for number in range(800):
        hello(f"other{number}")
    wait_ms = hello("n2")
    assert wait_ms > Options().restart_grace_ms
    end_ms = fleet.rig.now_ms + wait_ms + TICK_MS
    beats = 0
    while fleet.rig.now_ms < end_ms:
        fleet.rig.now_ms += 500
        beats += 1
        beat = Heartbeat(beats, attempts=held["n1"])
        fleet.rig.handle(FromAgent(fleet.sessions["n1"], beat))
        fleet.rig.handle(Tick())
    assert fleet.rig.core.state.nodes["n2"].phase is NodePhase.UP
    phases = {attempt.phase for attempt in fleet.rig.disk.attempts.values()}
    assert phases == {AttemptPhase.RUNNING}
