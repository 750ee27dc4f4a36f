"""Processes that outlive a kill in state D are named once, with their GPUs."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from agent.core.values import Launch
from agent.processes import records, unkillable
from agent.processes.unkillable import UNINTERRUPTIBLE, look, stuck

GPU = "GPU-6f1c0000-0000-0000-0000-000000000000"


@pytest.fixture
def child() -> Iterator[int]:
    """Below this process, which stands for the shim."""
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


def test_only_uninterruptible_ones_are_stuck(child: int) -> None:
    assert child not in stuck(os.getpid())
    assert child in stuck(os.getpid(), lambda pid: [UNINTERRUPTIBLE, b"1"])
    assert child not in stuck(os.getpid(), lambda pid: [])


async def test_each_set_of_them_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "7.1"
    environment = (("CUDA_VISIBLE_DEVICES", GPU),)
    records.write_launch(directory, Launch("7.1", ("train",), environment, "/"))
    here: list[tuple[int, ...]] = [()]
    monkeypatch.setattr(unkillable, "stuck", lambda shim_pid: here[0])
    looks: list[tuple[object, ...]] = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda delay_s, call, *given: looks.append(given))
    over = False
    with capture_logs() as told:
        look(directory, 1, lambda: over, ())
        for pids in ((41, 42), (41, 42), (), (41, 42), (42,)):
            here[0] = pids
            look(*looks.pop())  # type: ignore[arg-type]
        over = True
        look(*looks.pop())  # type: ignore[arg-type]
    assert looks == [], "nobody looks after what is over"
    assert [entry["pids"] for entry in told] == [[41, 42], [42]]
    assert {entry["event"] for entry in told} == {"process.unkillable"}
    assert told[0]["gpus"] == [GPU]
    assert "cordon" in told[0]["reason"]
