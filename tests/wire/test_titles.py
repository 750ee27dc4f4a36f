"""What a job is called whose owner gave it no name."""

import pytest

from coordinator.core.titles import title
from coordinator.wire import decode_spec
from protos.baton.v1 import types_pb2


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("./train",), "train"),
        (("./two\nlines",), "twolines"),
        (("/usr/bin/python3.11", "-u", "work/train.py", "--epochs", "3"), "train.py"),
        (("python", "-m", "trainers.finetune", "--config", "a.py"), "trainers.finetune"),
        (("torchrun", "--nproc-per-node=8", "train.py", "other.py"), "train.py"),
        (("bash", "run.sh"), "run.sh"),
        (("bash", "-c", "echo"), "bash"),
        (("bash", "-c", "set -e\npython train.py"), "bash"),
        (("python",), "python"),
        (("sleep", "x.py"), "sleep"),
    ],
)
def test_it_is_called_by_its_script(command: tuple[str, ...], name: str) -> None:
    assert title("", command) == name
    assert decode_spec(types_pb2.JobSpec(command=command)).name == name


def test_it_is_called_by_its_trainer_and_by_nothing_that_is_too_long() -> None:
    assert decode_spec(types_pb2.JobSpec(trainer="lora")).name == "lora"
    assert decode_spec(types_pb2.JobSpec(name="mine", trainer="lora")).name == "mine"
    assert title("", ("x" * 200,)) == "x" * 128
