"""What goes to the coordinator in which order: events at once, of reports the newest, and no report
while anything else waits."""

from hypothesis import given
from hypothesis import strategies as st

from agent.core.gpu_messages import Report
from agent.core.messages import AgentEvent, AttemptMilestone, Heartbeat
from agent.core.values import GpuSample, HostSample
from agent.outbox import OUTBOX_MAX, Outbox

HOST = HostSample(0.1, 1, 1, 0.1)


def beat(sequence: int) -> Heartbeat:
    return Heartbeat(sequence, None, (), (), ())


def event(sequence: int) -> AgentEvent:
    return AgentEvent(sequence, 0, "1.1", AttemptMilestone("load"))


def report(number: int, sampled_ms: int = 0) -> Report:
    return Report(HOST, (GpuSample("GPU-a", power_mw=number),), sampled_ms)


def test_a_report_rides_on_the_next_heartbeat_and_says_how_old_it_is() -> None:
    outbox = Outbox()
    outbox.lay(report(1, sampled_ms=1_000))
    assert outbox.take(1_500) is None, "nothing to ride on"
    outbox.push(beat(1))
    sent = outbox.take(3_500)
    assert isinstance(sent, Heartbeat)
    assert (sent.host, sent.gpus[0].power_mw, sent.telemetry_age_ms) == (HOST, 1, 2_500)
    outbox.push(beat(2))
    assert outbox.take(4_000) == beat(2), "once"


def test_a_newer_report_takes_the_place_of_one_that_was_not_sent() -> None:
    outbox = Outbox()
    for number in range(1_000):
        outbox.lay(report(number))
    outbox.push(beat(1))
    sent = outbox.take(0)
    assert isinstance(sent, Heartbeat)
    assert sent.gpus[0].power_mw == 999
    assert len(outbox) == 0


def test_no_event_waits_for_a_report() -> None:
    outbox = Outbox()
    outbox.lay(report(1))
    outbox.push(beat(1))
    outbox.push(event(1))
    assert [outbox.take(0), outbox.take(0), outbox.take(0)] == [beat(1), event(1), None]
    outbox.push(beat(2))
    sent = outbox.take(0)
    assert isinstance(sent, Heartbeat)
    assert sent.gpus, "behind the event, when nothing waits"


def test_a_new_session_begins_with_nothing() -> None:
    outbox = Outbox()
    outbox.lay(report(1))
    outbox.push(event(1))
    outbox.clear()
    outbox.push(beat(1))
    assert outbox.take(0) == beat(1)


def test_it_is_bounded() -> None:
    outbox = Outbox()
    assert all(outbox.push(event(number)) for number in range(OUTBOX_MAX))
    assert not outbox.push(event(0))
    assert len(outbox) == OUTBOX_MAX


@given(st.lists(st.sampled_from(("beat", "event", "report", "take")), max_size=60))
def test_whatever_comes_the_queue_keeps_its_order_and_reports_are_new(steps: list[str]) -> None:
    outbox = Outbox()
    queued: list[Heartbeat | AgentEvent] = []
    laid, last_taken = 0, 0
    for number, step in enumerate(steps, 1):
        if step == "report":
            laid = number
            outbox.lay(report(number))
        elif step == "take":
            taken = outbox.take(0)
            if not queued:
                assert taken is None
                continue
            wanted = queued.pop(0)
            if isinstance(taken, Heartbeat):
                assert isinstance(wanted, Heartbeat)
                assert taken.sequence == wanted.sequence
                if taken.gpus:
                    assert not queued, "something waited"
                    assert taken.gpus[0].power_mw == laid > last_taken
                    last_taken = laid
                else:
                    assert queued or laid == last_taken
            else:
                assert taken == wanted
        else:
            message = beat(number) if step == "beat" else event(number)
            queued.append(message)
            outbox.push(message)
