"""What a node tells of its GPUs: at once where a verdict changes, seldom where a count does, again
in every hello, and after a restart no sooner than the driver was asked.
"""

from dataclasses import replace

import pytest

from agent.core import messages as m
from agent.core import state as s
from agent.core.gpu_messages import FollowRate, InspectGpus, Sampled
from agent.core.health import GpuHealthChanged, GpuVerdict, Verdict
from agent.core.values import (
    DriverLoaded,
    GpuCondition,
    GpuFacts,
    GpuSample,
    HostSample,
    Reading,
    Sample,
    XidSeen,
)
from agent.journal import decode_event, encode_event
from agent.telemetry.xid_table import load_table
from tests.core import agent_box

UNIX_MS = 1_790_000_000_000
FACTS = tuple(
    GpuFacts(f"GPU-{letter}", "NVIDIA H100", 80 << 30, f"0000:{number}b:00")
    for number, letter in ((3, "a"), (4, "b"))
)


class Node(agent_box.Node):
    """That knows what follows from each of the driver's errors."""

    options = replace(agent_box.OPTIONS, xids=load_table())
    unix_ms = UNIX_MS

    def __init__(self, facts: tuple[GpuFacts, ...] = FACTS) -> None:
        super().__init__(*facts, now_ms=1_000_000)

    def begin(self, adopted: tuple[str, ...] = (), *, boot_id: str = "boot") -> list[s.Effect]:
        self.host = replace(agent_box.HOST, boot_id=boot_id)
        return super().begin(adopted)

    def xid(self, code: int, **fields: object) -> list[s.Effect]:
        seen = XidSeen(code, "kernel", UNIX_MS + self.now_ms, pci_bus_id="0000:3b:00")
        return self.hear(replace(seen, **fields))  # type: ignore[arg-type]

    def read(self, condition: GpuCondition | None = GpuCondition()) -> list[s.Effect]:  # noqa: B008
        self.now_ms += 1_000
        error = "" if condition else f"no answer at {self.now_ms}"
        gpus = tuple(GpuSample(facts.uuid, error=error, condition=condition) for facts in FACTS)
        return self.hear(Sampled(Sample(HostSample(0.1, 1, 1, 0.1), gpus)))


def told(effects: list[s.Effect]) -> list[GpuVerdict]:
    """What goes to the coordinator as events that wait in the spool."""
    spooled = [effect.event for effect in effects if isinstance(effect, s.SpoolEvent)]
    sent = [e.message for e in effects if isinstance(e, m.Send)]
    assert all(event in sent for event in spooled), "at once"
    assert all(decode_event(encode_event(event)) == event for event in spooled)
    bodies = [event.body for event in spooled]
    return [gpu for body in bodies if isinstance(body, GpuHealthChanged) for gpu in body.gpus]


def logged(effects: list[s.Effect]) -> list[str]:
    return [effect.event for effect in effects if isinstance(effect, m.Log)]


@pytest.fixture
def node() -> Node:
    made = Node()
    assert [verdict.verdict for verdict in told(made.read())] == [Verdict.HEALTHY] * 2
    return made


def test_an_error_is_told_at_once_by_the_bus_that_the_kernel_names(node: Node) -> None:
    effects = node.xid(79, text="GPU has fallen off the bus.")
    (verdict,) = told(effects)
    assert (verdict.uuid, verdict.verdict) == ("GPU-a", Verdict.LOST)
    assert verdict.xids[0].text == "GPU has fallen off the bus."
    assert logged(effects) == ["gpu.xid", "gpu.lost", "gpu.verdict"]
    assert told(node.read()) == []


def test_the_second_witness_adds_nothing(node: Node) -> None:
    assert told(node.xid(95))
    assert told(node.xid(95, source="nvml", uuid="GPU-a", pci_bus_id="")) == []
    assert node.core.state.watched.histories["GPU-a"].cases[95].record.count == 1


def test_a_storm_is_told_now_and_then(node: Node) -> None:
    events = 0
    node.now_ms += 10_000
    for _ in range(11_760):
        node.now_ms += 10
        events += len(told(node.xid(31)))
    assert 2 <= events <= 30
    node.now_ms += 10_000
    (last,) = told(node.read(GpuCondition(recovery_action=1)))[:1]
    assert last.xids == () or last.xids[0].count == 11_760


def test_a_hello_says_all_of_it_again(node: Node) -> None:
    node.xid(95)
    effects = node.hear(m.Connected(()))
    (hello,) = [e.message for e in effects if isinstance(e, m.Send)]
    assert isinstance(hello, m.Hello)
    assert [gpu.verdict for gpu in hello.health] == [Verdict.NEEDS_RESET, Verdict.HEALTHY]


def test_after_a_restart_an_old_error_waits_for_the_driver(node: Node) -> None:
    """It is in the kernel's log still; the GPU may have been reset since."""
    old = {"history": True, "age_ms": 3_600_000}
    node.begin()
    assert told(node.xid(95, **old)) == []
    mended = told(node.read(GpuCondition(recovery_action=0)))
    assert [gpu.verdict for gpu in mended] == [Verdict.HEALTHY] * 2
    node.begin()
    assert told(node.xid(95, **old)) == []
    assert told(node.read())[0].verdict is Verdict.NEEDS_RESET, "an older driver does not say"


def test_what_was_mended_does_not_come_back_from_the_kernels_log(node: Node) -> None:
    """On an older driver, which cannot say itself that nothing is needed."""
    node.xid(95, sequence=7)
    assert told(node.hear(DriverLoaded()))
    node.now_ms += 1_000
    node.xid(46, sequence=8)
    node.begin()
    assert told(node.xid(95, history=True, sequence=7)) == []
    assert told(node.read())[0].verdict is Verdict.HEALTHY
    node.begin()
    node.xid(95, history=True, sequence=7)
    node.xid(46, history=True, sequence=8)
    (verdict, _) = told(node.read())
    assert verdict.verdict is Verdict.NEEDS_RESET
    assert [record.code for record in verdict.xids] == [46]


@pytest.mark.parametrize("step_ms", [-86_400_000, 86_400_000])
def test_a_wall_clock_that_is_wrong_hides_no_new_error_and_raises_no_old_one(
    node: Node, step_ms: int
) -> None:
    """It was set while the agent was away, and times of the log are made with it."""
    node.xid(95, sequence=7)
    node.hear(DriverLoaded())
    wrong = {"history": True, "unix_ms": UNIX_MS + node.now_ms + step_ms, "age_ms": 1_000}
    node.begin()
    node.xid(95, sequence=7, **wrong)
    assert told(node.read())[0].verdict is Verdict.HEALTHY
    node.begin()
    node.xid(95, sequence=7, **wrong)
    node.xid(46, sequence=9, **wrong)
    (verdict, _) = told(node.read())
    assert [record.code for record in verdict.xids] == [46]


def test_another_boot_counts_its_log_anew(node: Node) -> None:
    node.xid(95, sequence=7_000)
    node.hear(DriverLoaded())
    node.begin(boot_id="boot2")
    node.xid(79, history=True, sequence=900)
    assert told(node.read())[0].verdict is Verdict.LOST


def test_a_silent_driver_is_told_once(node: Node) -> None:
    found = [told(node.read(None)) for _ in range(20)]
    assert [len(verdicts) for verdicts in found] == [0, 2, *[0] * 18]
    assert {gpu.verdict for gpu in found[1]} == {Verdict.UNKNOWN}


def test_a_driver_that_was_loaded_anew_has_mended_it(node: Node) -> None:
    node.xid(95)
    assert [gpu.verdict for gpu in told(node.hear(DriverLoaded()))] == [Verdict.HEALTHY]


def test_a_gpu_that_is_not_ours_is_said_once(node: Node) -> None:
    assert logged(node.xid(79, pci_bus_id="0000:99:00")) == ["gpu.xid_elsewhere"]
    assert logged(node.xid(79, pci_bus_id="0000:99:00")) == []


def late(facts: tuple[GpuFacts, ...]) -> Sampled:
    gpus = tuple(GpuSample(one.uuid, condition=GpuCondition()) for one in facts)
    read = Sample(HostSample(0.1, 1, 1, 0.1), gpus, facts=facts, driver_version="575.1")
    return Sampled(read)


def test_gpus_that_are_named_late_are_told_of_in_a_new_hello(node: Node) -> None:
    more = (*FACTS, GpuFacts("GPU-c", "NVIDIA H100", 80 << 30, "0000:5b:00"))
    effects = node.hear(late(more))
    assert "gpu.found_late" in logged(effects)
    assert [type(effect) for effect in effects].count(m.CloseLink) == 1
    assert InspectGpus(("GPU-c",)) in effects
    node.hear(m.Disconnected("a GPU more is to be told of"))
    (hello,) = [e.message for e in node.hear(m.Connected(())) if isinstance(e, m.Send)]
    assert isinstance(hello, m.Hello)
    assert hello.gpus == more
    assert hello.host.driver_version == "575.1"
    assert not [effect for effect in node.hear(late(more)) if isinstance(effect, m.CloseLink)]


def test_an_error_from_before_a_gpu_was_named_is_one_of_it() -> None:
    """A slow driver names it when the kernel's log has been read; and another driver forgets."""
    node = Node(())
    node.xid(95, history=True, age_ms=60_000)
    node.now_ms += 30_000
    assert [gpu.verdict for gpu in told(node.hear(late(FACTS)))] == [
        Verdict.NEEDS_RESET,
        Verdict.HEALTHY,
    ]
    node = Node(())
    node.xid(95, history=True)
    node.hear(DriverLoaded())
    assert [gpu.verdict for gpu in told(node.hear(late(FACTS)))] == [Verdict.HEALTHY] * 2


def gpus_of_hello(node: Node) -> tuple[GpuFacts, ...]:
    node.hear(m.Disconnected("which GPUs there are is to be told of"))
    (hello,) = [e.message for e in node.hear(m.Connected(())) if isinstance(e, m.Send)]
    assert isinstance(hello, m.Hello)
    assert {gpu.uuid for gpu in hello.health} <= {gpu.uuid for gpu in hello.gpus}
    node.hear(m.FromCoordinator(m.Welcome(1, 1_000, 8_000, 0), "c0ffee"))
    return hello.gpus


def test_gpus_that_are_no_more_are_left_out_of_a_new_hello(node: Node) -> None:
    """Down to none; who has not asked for the facts says nothing of them."""
    node.xid(31)
    assert m.CloseLink not in [type(effect) for effect in node.read()]
    for left in (FACTS[1:], ()):
        effects = node.hear(late(left))
        assert "gpu.removed" in logged(effects)
        assert [type(effect) for effect in effects].count(m.CloseLink) == 1
        assert gpus_of_hello(node) == left
        assert not [effect for effect in node.hear(late(left)) if isinstance(effect, m.CloseLink)]


def test_memory_that_is_said_late_is_told_of_in_a_new_hello() -> None:
    node = Node(tuple(replace(one, memory_bytes=0) for one in FACTS))
    effects = node.hear(late(FACTS))
    assert [type(effect) for effect in effects].count(m.CloseLink) == 1
    assert gpus_of_hello(node) == FACTS


def test_why_there_is_no_gpu_is_told_of_in_a_new_hello() -> None:
    node = Node(())
    read = Sample(HostSample(0.1, 1, 1, 0.1), (), gpu_absence="no GPUs: Driver Not Loaded")
    assert [type(effect) for effect in node.hear(Sampled(read))].count(m.CloseLink) == 1
    node.hear(m.Disconnected("that is to be told of"))
    (hello,) = [e.message for e in node.hear(m.Connected(())) if isinstance(e, m.Send)]
    assert isinstance(hello, m.Hello)
    assert hello.host.gpu_absence == "no GPUs: Driver Not Loaded"
    assert m.CloseLink not in [type(effect) for effect in node.hear(Sampled(read))]


def test_a_driver_that_was_slow_at_the_start_is_not_told_of_for_ever(node: Node) -> None:
    """Those of before are the node's then, so no GPU comes late; its hello says it all the same."""
    host = HostSample(0.1, 1, 1, 0.1)
    slow = Sample(host, (), facts=FACTS, gpu_absence="the driver did not answer within 2000 ms")
    assert m.CloseLink not in [type(effect) for effect in node.hear(Sampled(slow))]
    well = Sampled(Sample(host, (), facts=FACTS))
    assert [type(effect) for effect in node.hear(well)].count(m.CloseLink) == 1
    assert m.CloseLink not in [type(effect) for effect in node.hear(well)]


def test_an_error_of_a_cut_gpu_is_one_of_all_its_instances(node: Node) -> None:
    instances = tuple(GpuFacts(f"MIG-{index}", "1g", 10 << 30, "0000:7b:00") for index in (0, 1))
    node.hear(late((*FACTS, *instances)))
    node.hear(late((*FACTS, *instances)))
    changed = told(node.xid(79, pci_bus_id="0000:7b:00"))
    assert [(gpu.uuid, gpu.verdict) for gpu in changed] == [
        ("MIG-0", Verdict.LOST),
        ("MIG-1", Verdict.LOST),
    ]


def test_a_verdict_for_which_the_spool_has_no_room_is_told_later(node: Node) -> None:
    node.read()
    event = m.AgentEvent(0, 0, "1.1", m.AttemptMilestone("first"))
    spool = node.core.state.spool
    node.core.state.spool = dict.fromkeys(range(s.SPOOL_MAX), event)
    assert told(node.xid(95)) == []
    node.core.state.spool = spool
    assert [gpu.verdict for gpu in told(node.read())] == [Verdict.NEEDS_RESET]


def rates(effects: list[s.Effect]) -> list[str]:
    return [effect.rate for effect in effects if isinstance(effect, FollowRate)]


def test_the_coordinators_rate_counts_while_the_session_says_so(node: Node) -> None:
    def welcome(rate: str) -> list[s.Effect]:
        order = m.Welcome(1, 1_000, 8_000, 0, rate)
        return node.hear(m.FromCoordinator(order, "c0ffee"))

    effects = welcome("watch")
    assert rates(effects) == ["watch"]
    assert "link.up" not in logged(effects), "the session has not begun anew"
    assert rates(welcome("watch")) == []
    assert rates(welcome("own")) == ["own"]
    welcome("off")
    assert rates(node.hear(m.Disconnected("cut"))) == ["own"]
    node.hear(m.Connected(()))
    effects = welcome("off")
    assert (rates(effects), "link.up" in logged(effects)) == (["off"], True)


def test_what_is_not_read_by_order_is_unknown_and_says_why(node: Node) -> None:
    gpus = tuple(GpuSample(facts.uuid) for facts in FACTS)
    read = Sample(HostSample(0.1, 1, 1, 0.1), gpus, Reading("off"))
    changed = [verdict for _ in range(2) for verdict in told(node.hear(Sampled(read)))]
    assert {(gpu.verdict, gpu.reason) for gpu in changed} == {
        (Verdict.UNKNOWN, "is unknown: it is not read, by order")
    }


def test_an_applications_error_does_not_come_back_for_the_next_application(node: Node) -> None:
    """After a restart the kernel's log tells of it again, while another trainer is on the GPU."""
    node.xid(31, sequence=7)
    node.now_ms += 10_000
    assert told(node.read())[0].verdict is Verdict.HEALTHY
    node.begin()
    node.xid(31, history=True, sequence=7)
    assert not node.core.state.watched.histories["GPU-a"].cases
