"""What a job is called whose owner gave it no name."""

import pytest

from coordinator.core.messages import Request, Submit
from coordinator.core.model import JobSpec
from tests.core.coordinator_harness import Rig


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("./train",), "train"),
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
    rig = Rig()
    rig.handle(Request(1, Submit(JobSpec(command=command))))
    assert rig.core.state.jobs[1].spec.name == name
