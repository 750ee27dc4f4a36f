"""When a node reports its telemetry: seldom, in its own phase, and nothing twice; its heartbeats go
on at their own pace, and what matters goes at once.
"""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core import messages as m
from agent.core import state as s
from agent.core.gpu_messages import InspectGpus, Report, Sampled
from agent.core.link import phase_ms
from agent.core.trainer_messages import TrainerProgress
from agent.core.values import (
    GpuCondition,
    GpuFacts,
    GpuSample,
    GpuWindow,
    HostSample,
    Reading,
    Sample,
    Spread,
    XidSeen,
)
from agent.core.window import FIGURES, Window
from agent.telemetry.xid_table import load_table
from agent.wire import encode
from coordinator.core.messages import Heartbeat
from coordinator.wire import decode
from tests.core import agent_box
from tests.core.agent_memory import inspected

BEAT_MS, REPORT_MS = 1_000, 5_000
HOST = HostSample(0.1, 1, 1, 0.1)
GREETING = m.Welcome(1, BEAT_MS, 3_600_000, 0)


def sample(power_mw: int | None = 300_000, error: str = "", age_ms: int = 0) -> Sample:
    return Sample(HOST, (GpuSample("GPU-a", power_mw=power_mw, error=error, age_ms=age_ms),))


class Node(agent_box.Node):
    """With a trainer; `sent` is (when, what)."""

    def __init__(self, name: str = "n1", report_ms: int = REPORT_MS) -> None:
        launch = replace(agent_box.LAUNCH, node=name)
        self.options = replace(agent_box.OPTIONS, launch=launch, xids=load_table())
        self.sent: list[tuple[int, m.Upward]] = []
        self.reports: list[tuple[int, Report]] = []
        self.greeting = replace(GREETING, report_interval_ms=report_ms)
        super().__init__(GpuFacts("GPU-a", "NVIDIA H100", 80 << 30, "0000:3b:00"))
        self.run(m.StartAttempt("1.1", m.JobSpec(command=("t",)), ()))
        self.sent, self.reports = [], []

    def welcome(self, report_ms: int) -> None:
        self.order(replace(GREETING, report_interval_ms=report_ms))

    def hear(self, event: m.Event) -> list[s.Effect]:
        effects = super().hear(event)
        for effect in effects:
            if isinstance(effect, InspectGpus):
                self.hear(inspected(effect))
            elif isinstance(effect, m.Send):
                self.sent.append((self.now_ms, effect.message))
            elif isinstance(effect, Report):
                self.reports.append((self.now_ms, effect))
        return effects

    def wait(self, span_ms: int, read: bool = True) -> None:
        """Readings on each full second, ticks when the core asks for them."""
        until_ms = self.now_ms + span_ms
        while True:
            wake_ms = self.core.next_wake_ms()
            second_ms = (self.now_ms // 1_000 + 1) * 1_000 if read else until_ms + 1
            due_ms = max(self.now_ms, min(second_ms, until_ms + 1 if wake_ms is None else wake_ms))
            if due_ms > until_ms:
                self.now_ms = until_ms
                return
            self.now_ms = due_ms
            if due_ms == second_ms:
                self.hear(Sampled(sample(100_000 + due_ms)))
            else:
                self.hear(m.Tick())

    def beats(self) -> list[tuple[int, m.Heartbeat]]:
        return [(at, one) for at, one in self.sent if isinstance(one, m.Heartbeat)]


def test_heartbeats_and_reports_each_have_their_pace() -> None:
    node = Node()
    node.wait(60_000)
    beats = [at for at, _ in node.beats()]
    assert len(beats) == 60
    assert {later - at for at, later in itertools.pairwise(beats)} == {BEAT_MS}
    assert all(beat.host is None and beat.gpus == () for _, beat in node.beats()), "bare"
    reports = [at for at, _ in node.reports]
    assert len(reports) == 12
    assert {later - at for at, later in itertools.pairwise(reports)} == {REPORT_MS}


def test_a_report_is_the_last_reading_and_what_the_others_were() -> None:
    node = Node()
    node.wait(2 * REPORT_MS)
    at_ms, report = node.reports[-1]
    last_ms = at_ms // 1_000 * 1_000
    (gpu,) = report.gpus
    assert (report.host, report.sampled_ms, gpu.power_mw) == (HOST, last_ms, 100_000 + last_ms)
    power_mw = Spread(100_000 + last_ms - 4_000, 100_000 + last_ms - 2_000, 100_000 + last_ms)
    assert gpu.window == GpuWindow(5, power_mw=power_mw)


def test_what_was_reported_is_not_reported_again() -> None:
    """Readings stall: the lease lives on, and the telemetry grows old."""
    node = Node()
    node.wait(30_000)
    node.reports, node.sent = [], []
    node.wait(REPORT_MS)
    assert len(node.reports) == 1, "what was read before"
    node.reports = []
    node.wait(60_000, read=False)
    assert len(node.reports) <= 1
    assert len(node.beats()) == 65
    before = len(node.reports)
    node.wait(1_500)
    assert len(node.reports) == before + 1, "at once when there is something to tell"


def test_who_is_late_keeps_its_phase() -> None:
    node = Node()
    node.wait(20_000)
    state = node.core.state
    assert state.heartbeat_due_ms is not None
    before = (state.heartbeat_due_ms % BEAT_MS, state.report_due_ms % REPORT_MS)
    node.now_ms += 12_345
    node.sent = []
    node.hear(m.Tick())
    assert len(node.beats()) == 1, "what was missed is not made up for"
    assert (state.heartbeat_due_ms % BEAT_MS, state.report_due_ms % REPORT_MS) == before
    assert 0 < state.heartbeat_due_ms - node.now_ms <= BEAT_MS
    assert 0 < state.report_due_ms - node.now_ms <= REPORT_MS


def test_an_older_coordinator_gets_telemetry_with_every_heartbeat() -> None:
    node = Node(report_ms=0)
    node.wait(10_000)
    assert len(node.beats()) == 10
    assert len(node.reports) == 9, "each but the first, before which nothing was read"


def test_events_and_verdicts_wait_for_no_report() -> None:
    node = Node()
    node.wait(1_234)
    node.sent = []
    node.hear(XidSeen(95, "kernel", node.now_ms, pci_bus_id="0000:3b:00"))
    assert [type(one) for _, one in node.sent] == [m.AgentEvent]


def test_progress_is_told_when_it_is_new_and_whole_with_a_report() -> None:
    node = Node()
    node.wait(REPORT_MS)
    node.sent = []
    node.hear(m.FromTrainer("1.1", TrainerProgress(6, None, ())))
    node.wait(2 * REPORT_MS)
    steps = [[one.step for _, one in beat.progress] for _, beat in node.beats()]
    assert steps[0] == [6], "with the next heartbeat"
    assert steps.count([6]) == 3, "once, and with each of two reports"
    node.sent = []
    node.hear(m.Disconnected("cut"))
    node.hear(m.Connected(()))
    node.welcome(REPORT_MS)
    node.wait(BEAT_MS)
    assert [[one.step for _, one in beat.progress] for _, beat in node.beats()] == [[6]], "anew"


def test_ten_thousand_nodes_do_not_speak_at_once() -> None:
    slots = Counter(phase_ms(f"n{number:05}", REPORT_MS) // 100 for number in range(10_000))
    assert len(slots) >= REPORT_MS // 100
    assert max(slots.values()) < 2 * 10_000 // (REPORT_MS // 100)
    assert phase_ms("n1", REPORT_MS) == phase_ms("n1", REPORT_MS), "and each always at its own time"


@given(st.text(max_size=64), st.integers(1, 600_000))
def test_a_phase_lies_within_its_interval(name: str, interval_ms: int) -> None:
    assert 0 < phase_ms(name, interval_ms) <= interval_ms


VALUE = st.none() | st.integers(0, 1_000_000)


@given(st.lists(st.tuples(VALUE, st.booleans(), st.integers(0, 1)), max_size=12))
def test_a_window_is_what_all_its_readings_say(
    readings: list[tuple[int | None, bool, int]],
) -> None:
    """A failed reading and a repeated one count for nothing."""
    window = Window()
    counted = []
    for power_mw, failed, age_ms in readings:
        window.add(sample(None if failed else power_mw, "no answer" * failed, age_ms))
        if not failed and age_ms == 0:
            counted.append(power_mw)
    taken = window.take()
    assert window.take() is None
    if taken is None:
        assert not readings
        return
    found = taken[1][0].window
    if not counted:
        assert found is None
        return
    assert found is not None
    assert found.readings == len(counted)
    known = [power_mw for power_mw in counted if power_mw is not None]
    if not known:
        assert found.power_mw is None
        return
    assert found.power_mw is not None
    assert (found.power_mw.min, found.power_mw.max) == (min(known), max(known))
    assert found.power_mw.mean == pytest.approx(sum(known) / len(known))


def test_what_is_not_read_by_order_has_no_window() -> None:
    window = Window()
    window.add(replace(sample(), reading=Reading(rate="off")))
    taken = window.take()
    assert taken is not None
    assert taken[1][0].window is None


def test_a_gpu_whose_memory_is_not_read_was_not_read() -> None:
    """So that the coordinator, which closes who is unread for long, puts no work there."""
    condition = GpuCondition(unread="its memory cannot be read: Unknown Error")
    read = replace(sample().gpus[0], condition=condition)
    window = Window()
    window.add(replace(sample(), gpus=(read,)))
    taken = window.take()
    assert taken is not None
    assert taken[1][0].window is None
    heard = decode(encode(m.Heartbeat(1, None, (read,), (), ())))
    assert isinstance(heard, Heartbeat)
    assert heard.gpus[0].error == condition.unread


def test_every_figure_of_a_window_is_one_of_a_reading() -> None:
    for name in FIGURES:
        assert name in GpuSample.__slots__
        assert name in GpuWindow.__slots__
