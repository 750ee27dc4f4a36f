"""Who is let in when: at a bounded rate, in order, each after at most one refusal; and that a node
is not lost because it was told to wait.
"""

from heapq import heapify, heappop, heappush

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.admission import BURST_MS, LATE_MS, WAIT_MS_MAX, Admission, ask
from coordinator.core.messages import (
    AttemptStarted,
    CloseSession,
    ComeLater,
    Effect,
    FromAgent,
    Goodbye,
    Heartbeat,
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
from tests.core.test_gpu_health import Fleet

TICK_MS = 250


def herd(count: int, rate: int, jitter_ms: int = 0) -> tuple[list[tuple[int, str]], int]:
    """All come at the first millisecond, and again when they were told to. Who was let in when, and
    how many hellos that took."""
    admission, hellos = Admission(), 0
    coming = [(1_000, f"n{number}") for number in range(count)]
    heapify(coming)
    entered = []
    while coming:
        now_ms, node = heappop(coming)
        hellos += 1
        wait_ms = ask(admission, now_ms, node, rate)
        if wait_ms:
            heappush(coming, (now_ms + wait_ms + hash_of(node) % (jitter_ms + 1), node))
        else:
            entered.append((now_ms, node))
    assert not admission.appointments
    return entered, hellos


def hash_of(node: str) -> int:
    return int(node[1:]) * 7_919


def test_ten_thousand_come_twice_each_and_a_bounded_number_in_any_second() -> None:
    entered, hellos = herd(10_000, 200, jitter_ms=100)
    assert len(entered) == 10_000
    assert hellos <= 2 * 10_000
    first_ms, last_ms = entered[0][0], entered[-1][0]
    assert abs(last_ms - first_ms - 1_000 * (10_000 / 200 - BURST_MS / 1_000)) < 200
    times = [at_ms for at_ms, _ in entered]
    for start in range(first_ms + 1, last_ms, 500):
        within = sum(start <= at_ms < start + 1_000 for at_ms in times)
        assert within <= 200 * 1.1 + 1, "a second's slots, and those of a jitter before"


def test_as_many_as_a_second_has_room_for_never_wait() -> None:
    entered, hellos = herd(200, 200)
    assert hellos == len(entered) == 200


STEP = st.tuples(st.integers(0, 3_000), st.integers(0, 30))


@settings(max_examples=200)
@given(st.integers(1, 50), st.lists(STEP, max_size=80))
def test_whoever_comes_when_no_more_slots_are_used_than_there_are(
    rate: int, steps: list[tuple[int, int]]
) -> None:
    """Agents that come too early, too late, or without having asked before."""
    admission, now_ms = Admission(), 0
    entered: list[int] = []
    for pause_ms, number in steps:
        now_ms += pause_ms
        if ask(admission, now_ms, f"n{number}", rate) == 0:
            entered.append(now_ms)
        assert len(admission.appointments) <= 31
    for at, start_ms in enumerate(entered):
        for later, end_ms in enumerate(entered[at:], at):
            span_ms = end_ms - start_ms + BURST_MS + LATE_MS
            assert later - at <= rate * span_ms / 1_000 + 1


@given(st.integers(1, 50), st.integers(0, 20_000))
def test_an_appointment_is_kept_for_a_while(rate: int, late_ms: int) -> None:
    admission = Admission()
    for number in range(4 * rate):
        wait_ms = ask(admission, 0, f"n{number}", rate)
    last = f"n{4 * rate - 1}"
    assert wait_ms > 0
    assert ask(admission, wait_ms - 1, last, rate) == 1, "too early: the same appointment"
    if late_ms <= LATE_MS - 1:
        assert ask(admission, wait_ms + late_ms, last, rate) == 0


def test_who_does_not_come_is_forgotten() -> None:
    admission = Admission()
    for number in range(100):
        ask(admission, 0, f"n{number}", 1)
    assert len(admission.appointments) == 98
    assert ask(admission, 100_000 + LATE_MS + BURST_MS, "late", 1) == 0
    assert not admission.appointments


def test_the_line_is_bounded() -> None:
    admission = Admission()
    waits_ms = [ask(admission, 0, f"n{number}", 1) for number in range(1_000)]
    assert max(waits_ms) == WAIT_MS_MAX
    assert len(admission.appointments) <= WAIT_MS_MAX / 1_000 + 1


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

    def wait(self, span_ms: int) -> None:
        for _ in range(span_ms // TICK_MS):
            self.rig.now_ms += TICK_MS
            self.rig.handle(Tick())

    def phase(self, name: str) -> NodePhase:
        return self.rig.core.state.nodes[name].phase


def told(effects: list[Effect]) -> int:
    """How long a hello has to wait; 0: it is welcome."""
    orders = [effect.order for effect in effects if isinstance(effect, Send)]
    later = [order.wait_ms for order in orders if isinstance(order, ComeLater)]
    closed = [effect for effect in effects if isinstance(effect, CloseSession)]
    welcome = any(isinstance(order, Welcome) for order in orders)
    assert welcome is not bool(later)
    if later:
        assert closed, "and the session ends"
        assert len(orders) == 1
    return later[0] if later else 0


def test_who_stands_in_line_is_not_lost_and_comes_in_when_it_was_told_to() -> None:
    fleet = Line()
    waits = fleet.cut()
    assert len(waits) == len(NODES) - 2
    assert sorted(waits.values()) == list(range(1_000, 1_000 * len(waits) + 1, 1_000))
    begun_ms = fleet.rig.now_ms
    for name, wait_ms in waits.items():
        fleet.wait(begun_ms + wait_ms - fleet.rig.now_ms)
        assert fleet.phase(name) is not NodePhase.LOST
        assert told(fleet.hello(name)) == 0
        assert fleet.phase(name) is NodePhase.UP


def test_who_does_not_come_when_it_was_told_to_is_lost_after_all() -> None:
    fleet = Line()
    waits = fleet.cut()
    last = max(waits, key=lambda name: waits[name])
    fleet.wait(waits[last] + LATE_MS - TICK_MS)
    assert fleet.phase(last) is not NodePhase.LOST
    fleet.wait(2 * TICK_MS)
    assert fleet.phase(last) is NodePhase.LOST


def test_a_goodbye_counts_more_than_an_appointment() -> None:
    fleet = Line()
    fleet.rig.now_ms += 2_000
    session = fleet.sessions["n9"]
    for name in ("n1", "n2", "n9"):
        fleet.hello(name)
    assert fleet.rig.core.state.nodes["n9"].expected_ms > 0
    fleet.rig.handle(FromAgent(session, Goodbye(None)))
    assert fleet.phase("n9") is NodePhase.LOST


def test_a_line_is_told_of_once() -> None:
    fleet = Line()
    fleet.rig.now_ms += 2_000
    effects = [effect for name in NODES for effect in fleet.hello(name)]
    lines = [e for e in effects if isinstance(e, Log) and e.event == "node.line"]
    assert len(lines) == 1


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
    end_ms = fleet.rig.now_ms + wait_ms
    beats = 0
    while fleet.rig.now_ms < end_ms:
        fleet.rig.now_ms += 500
        beats += 1
        beat = Heartbeat(beats, attempts=held["n1"])
        fleet.rig.handle(FromAgent(fleet.sessions["n1"], beat))
        fleet.rig.handle(Tick())
    assert hello("n2") == 0
    phases = {attempt.phase for attempt in fleet.rig.disk.attempts.values()}
    assert phases == {AttemptPhase.RUNNING}
