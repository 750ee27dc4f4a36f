"""After an attempt its GPUs must be clean, or nobody gets them and the log says why, once."""

from dataclasses import replace

import pytest

from agent.core import messages as m
from agent.core import state as s
from agent.core import values as v
from agent.core.clean import (
    AGAIN_MS,
    CHECK_MS_MAX,
    LEAKING_AGAIN_MS,
    MEMORY_SLACK_BYTES,
    judge,
    next_check_ms,
)
from agent.core.gpu_messages import GpusInspected, InspectGpus, Sampled
from agent.core.health import Verdict
from agent.core.health import judge as judge_gpu
from tests.core import agent_box

UUID = "GPU-a"
GIB = 1024**3
FACTS = v.GpuFacts(UUID, "H100", 80 * GIB)
IDLE = v.GpuOccupancy(UUID, GIB, (7,))  # a display server has always been there
BUSY = v.GpuOccupancy(UUID, 70 * GIB, (7, 4242))


class Node(agent_box.Node):
    """With one GPU; what its commands are answered with, the test says."""

    def __init__(self) -> None:
        super().__init__(FACTS)

    def start(self, attempt: str) -> list[s.Effect]:
        spec = v.JobSpec(command=("train",))
        return self.order(m.StartAttempt(attempt, spec, (UUID,), (), None, 0))

    def restored(self, attempt: str) -> list[s.Effect]:
        return self.hear(m.RestoreDone(attempt, v.Restored("", 0, "")))

    def train(self, attempt: str) -> None:
        self.start(attempt)
        assert starts(self.restored(attempt)) == [attempt]
        self.hear(m.ProcessStarted(attempt, 4242))

    def end(self, attempt: str) -> list[s.Effect]:
        return self.hear(m.ProcessEnded(v.ProcessExit(attempt, 0, None)))

    def inspected(self, usage: v.GpuOccupancy) -> list[s.Effect]:
        return self.hear(GpusInspected((usage,)))

    def next_look(self) -> list[s.Effect]:
        """Let time pass until the GPU is asked for again."""
        effects: list[s.Effect] = []
        while not any(isinstance(effect, InspectGpus) for effect in effects):
            wake_ms = self.core.next_wake_ms()
            assert wake_ms is not None
            self.now_ms = max(self.now_ms, wake_ms)
            effects = self.hear(m.Tick())
        return effects


def starts(commands: list[s.Effect]) -> list[str]:
    return [c.launch.attempt_id for c in commands if isinstance(c, m.StartProcess)]


def logged(commands: list[s.Effect], event: str) -> list[dict[str, object]]:
    return [dict(c.fields) for c in commands if isinstance(c, m.Log) and c.event == event]


def refusals(commands: list[s.Effect]) -> list[str]:
    bodies = [
        command.message.body
        for command in commands
        if isinstance(command, m.Send) and isinstance(command.message, m.AgentEvent)
    ]
    return [body.reason for body in bodies if isinstance(body, m.AttemptRefused)]


@pytest.fixture
def node() -> Node:
    node = Node()
    node.inspected(IDLE)
    node.train("1.1")
    return node


def test_an_agent_that_starts_looks_at_idle_gpus_only() -> None:
    node = Node()
    assert InspectGpus((UUID,)) in node.begin()
    node.train("1.1")
    assert not any(isinstance(command, InspectGpus) for command in node.begin(("1.1",)))


def test_the_next_one_waits_until_the_gpu_is_clean(node: Node) -> None:
    assert InspectGpus((UUID,)) in node.end("1.1")
    node.start("2.1")
    assert starts(node.restored("2.1")) == []
    assert starts(node.inspected(BUSY)) == []
    node.next_look()
    assert node.now_ms == AGAIN_MS
    commands = node.inspected(IDLE)
    assert starts(commands) == ["2.1"]
    assert not logged(commands, "gpu.clean"), "nobody was told that it was not"


def test_a_leak_is_told_once_and_holds_the_gpu_until_it_is_clean(node: Node) -> None:
    node.end("1.1")
    node.start("2.1")
    node.restored("2.1")
    told: list[dict[str, object]] = []
    refused: list[str] = []
    while node.now_ms < CHECK_MS_MAX + 3 * LEAKING_AGAIN_MS:
        commands = node.inspected(BUSY)
        told += logged(commands, "gpu.memory_leak")
        refused += refusals(commands)
        node.next_look()
    assert [fields["pids"] for fields in told] == [[4242]]
    reason = told[0]["reason"]
    assert "15 s after attempt 1.1" in str(reason)
    assert "pid 4242" in str(reason)
    assert refused == [reason], "who waited is refused with the same sentence"
    assert refusals(node.start("3.1")) == [reason]
    assert len(logged(node.inspected(IDLE), "gpu.clean")) == 1
    node.train("4.1")


def test_memory_that_nobody_owns_is_a_leak(node: Node) -> None:
    node.end("1.1")
    node.now_ms = CHECK_MS_MAX
    lost = v.GpuOccupancy(UUID, GIB + MEMORY_SLACK_BYTES + 1, (7,))
    assert [f["pids"] for f in logged(node.inspected(lost), "gpu.memory_leak")] == [[]]


def test_what_the_driver_does_not_say_is_no_leak(node: Node) -> None:
    node.end("1.1")
    node.now_ms = CHECK_MS_MAX
    commands = node.inspected(v.GpuOccupancy(UUID))
    assert len(logged(commands, "gpu.not_checked")) == 1
    node.train("2.1")


def test_a_silent_driver_does_not_lift_a_leak(node: Node) -> None:
    node.end("1.1")
    node.now_ms = CHECK_MS_MAX
    node.inspected(BUSY)
    node.inspected(v.GpuOccupancy(UUID))
    assert refusals(node.start("2.1"))


def test_what_it_was_like_before_outlives_the_agent(node: Node) -> None:
    node.begin(("1.1",))
    node.end("1.1")
    node.now_ms = CHECK_MS_MAX
    assert not logged(node.inspected(IDLE), "gpu.memory_leak")
    node.train("2.1")


def test_what_an_idle_gpu_is_like_is_asked_until_the_driver_says() -> None:
    node = Node()
    node.inspected(v.GpuOccupancy(UUID))
    assert InspectGpus((UUID,)) in node.next_look()
    node.inspected(IDLE)
    assert next_check_ms(node.core.state) is None
    node.train("1.1")
    node.end("1.1")
    node.now_ms += CHECK_MS_MAX
    assert [f["pids"] for f in logged(node.inspected(BUSY), "gpu.memory_leak")] == [[4242]]


def test_a_gpu_that_nothing_is_known_of_is_not_taken_for_leaking() -> None:
    node = Node()
    node.inspected(v.GpuOccupancy(UUID))
    node.train("1.1")
    node.end("1.1")
    node.inspected(IDLE)
    node.train("2.1")


def test_a_monitor_that_began_anew_is_no_leak(node: Node) -> None:
    node.end("1.1")
    node.inspected(v.GpuOccupancy(UUID, GIB, (9,)))
    node.train("2.1")


def test_a_restart_does_not_take_a_leftover_for_what_was_there(node: Node) -> None:
    node.end("1.1")
    node.inspected(BUSY)
    node.start("2.1")
    assert InspectGpus((UUID,)) in node.begin()
    assert starts(node.restored("2.1")) == []
    node.inspected(BUSY)
    node.now_ms += CHECK_MS_MAX
    assert len(logged(node.inspected(BUSY), "gpu.memory_leak")) == 1
    assert refusals(node.start("3.1"))
    node.begin()
    node.inspected(IDLE)
    node.train("4.1")
    assert node.journal.gpus_left == ()


def test_a_boot_forgets_what_was_left(node: Node) -> None:
    node.end("1.1")
    node.inspected(BUSY)
    node.host = replace(node.host, boot_id="another")
    node.begin()
    node.inspected(BUSY)
    node.train("2.1")


def test_a_gpu_that_is_found_late_is_still_not_clean(node: Node) -> None:
    node.end("1.1")
    node.inspected(BUSY)
    node.gpus = ()
    node.begin()
    assert [left.uuid for left in node.journal.gpus_left] == [UUID]
    node.hear(Sampled(v.Sample(v.HostSample(0.0, 0, 0, 0.0), (), facts=(FACTS,))))
    assert UUID in node.core.state.checks


def test_a_gpu_that_is_no_more_is_not_looked_at(node: Node) -> None:
    """While its job is there, it stays, and nobody says that it is well."""

    def verdicts() -> list[Verdict]:
        node.hear(Sampled(v.Sample(v.HostSample(0.1, 1, 1, 0.1), (), facts=())))
        return [judge_gpu(uuid, one).verdict for uuid, one in histories.items()]

    histories = node.core.state.watched.histories
    well = v.GpuSample(UUID, condition=v.GpuCondition())
    node.hear(Sampled(v.Sample(v.HostSample(0.1, 1, 1, 0.1), (well,), facts=(FACTS,))))
    assert [verdicts() for _ in range(2)] == [[Verdict.HEALTHY], [Verdict.UNKNOWN]]
    node.end("1.1")
    assert verdicts() == []
    assert node.core.state.gpus == ()
    assert next_check_ms(node.core.state) is None


def test_a_driver_that_never_answers_holds_nobody_up(node: Node) -> None:
    node.end("1.1")
    node.start("2.1")
    node.restored("2.1")
    commands: list[s.Effect] = []
    while node.now_ms < 2 * CHECK_MS_MAX and not starts(commands):
        wake_ms = node.core.next_wake_ms()
        assert wake_ms is not None
        node.now_ms = max(node.now_ms, wake_ms)
        commands = node.hear(m.Tick())
        node.hear(m.FromCoordinator(m.LeaseRenewal(1), ""))
    assert starts(commands) == ["2.1"]
    assert len(logged(commands, "gpu.not_checked")) == 1
    node.inspected(BUSY)  # too late to say anything of before
    assert node.core.state.idle_occupancies[UUID] == IDLE


@pytest.mark.parametrize(
    ("before", "now", "clean"),
    [
        (IDLE, IDLE, True),
        (IDLE, v.GpuOccupancy(UUID, GIB + MEMORY_SLACK_BYTES, (7,)), True),
        (IDLE, v.GpuOccupancy(UUID, 0, ()), True),
        (IDLE, v.GpuOccupancy(UUID, None, (7,)), True),
        (IDLE, v.GpuOccupancy(UUID, GIB, None), True),
        (IDLE, v.GpuOccupancy(UUID, None, (8,)), False),
        (IDLE, v.GpuOccupancy(UUID, GIB, (8,)), True),
        (IDLE, v.GpuOccupancy(UUID, 2 * GIB, (7,)), False),
        (IDLE, v.GpuOccupancy(UUID, 2 * GIB, None), False),
        (None, v.GpuOccupancy(UUID, 70 * GIB, ()), True),
        (None, v.GpuOccupancy(UUID, 0, (8,)), True),
    ],
)
def test_verdicts(before: v.GpuOccupancy | None, now: v.GpuOccupancy, clean: bool) -> None:
    verdict = judge(before, now)
    assert verdict.known
    assert (verdict.reason == "") == clean
