"""Jobs that share a GPU of a node: what they are told, and when one more is refused."""

from dataclasses import replace

import pytest

from agent.core import messages as m
from agent.core import shares
from agent.core import values as v
from agent.core.state import Effect
from tests.core import agent_box

GIB = 1024**3
UUID = "GPU-a"
SHARING = v.JobSpec(command=("x",), shared_gpu_memory_bytes=8 * GIB)
ALONE = v.JobSpec(command=("x",))


class Node(agent_box.Node):
    """With one GPU of 40 GiB; its restores succeed at once."""

    def __init__(self) -> None:
        self.launched: dict[str, v.Launch] = {}
        self.refused: dict[str, str] = {}
        super().__init__(v.GpuFacts(UUID, "H100", 40 * GIB))

    def hear(self, event: m.Event) -> list[Effect]:
        effects = super().hear(event)
        for effect in effects:
            match effect:
                case m.RestoreCheckpoint():
                    self.hear(m.RestoreDone(effect.attempt, v.Restored("", 0, "")))
                case m.StartProcess():
                    self.launched[effect.launch.attempt_id] = effect.launch
                    self.hear(m.ProcessStarted(effect.launch.attempt_id, 100))
                case m.Send(m.AgentEvent(attempt=name, body=m.AttemptRefused() as refused)):
                    self.refused[name] = refused.reason
        return effects

    def asked(self, attempt: str, spec: v.JobSpec) -> None:
        self.order(m.StartAttempt(attempt, spec, (UUID,), (), None, 0))


def test_those_that_share_stand_beside_one_another_until_it_is_full() -> None:
    node = Node()
    for job_id in range(1, 6):
        node.asked(f"{job_id}.1", SHARING)
    assert list(node.launched) == [f"{job_id}.1" for job_id in range(1, 6)]
    node.asked("6.1", SHARING)
    assert node.refused["6.1"] == (
        f"GPU {UUID} has {40 * GIB} bytes of memory, {40 * GIB} of them are shared out already,"
        f" and {8 * GIB} more are too much"
    )


@pytest.mark.parametrize("specs", [(SHARING, ALONE), (ALONE, SHARING), (ALONE, ALONE)])
def test_who_wants_it_alone_stands_beside_nobody(specs: tuple[v.JobSpec, v.JobSpec]) -> None:
    node = Node()
    node.asked("1.1", specs[0])
    node.asked("2.1", specs[1])
    assert node.refused == {"2.1": f"GPU {UUID} is still held by attempt 1.1"}


def test_its_trainer_is_told_how_much_of_the_gpu_it_may_take() -> None:
    node = Node()
    mine = replace(SHARING, environment=(("XLA_PYTHON_CLIENT_MEM_FRACTION", ".75"),))
    node.asked("1.1", mine)
    launch = node.launched["1.1"]
    environment = dict(launch.environment)
    assert environment["BATON_GPU_MEMORY_RATIO"] == "0.2000"
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.2000"
    assert launch.shared_gpu_memory_bytes == 8 * GIB


def test_who_has_it_alone_is_told_nothing_of_it() -> None:
    node = Node()
    node.asked("1.1", ALONE)
    told = dict(node.launched["1.1"].environment)
    assert not {"BATON_GPU_MEMORY_RATIO", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(told)
    assert node.launched["1.1"].shared_gpu_memory_bytes == 0


@pytest.mark.parametrize(
    ("share_bytes", "ratio"), [(0, 1.0), (1, 0.0001), (3333, 0.3333), (9_999_999, 1.0)]
)
def test_the_share_is_rounded_down_and_never_nothing(share_bytes: int, ratio: float) -> None:
    spec = replace(ALONE, shared_gpu_memory_bytes=share_bytes)
    assert shares.ratio((v.GpuFacts(UUID, "H100", 9_999),), (UUID,), spec) == ratio
