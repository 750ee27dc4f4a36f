"""MPS for jobs that share a GPU, with a stand-in for NVIDIA's control program.

The stand-in keeps its daemon as a file in the directory of its pipes, so that a test can see it,
and let it die.
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from agent.core.values import Launch, ProcessesStuck, ProcessExit
from agent.ports import StartError
from agent.processes import mps
from agent.processes.mps import CONTROL, MpsProcesses, limit_of
from tests.agent.waiting import until

pytestmark = pytest.mark.anyio

STAND_IN = """#!/bin/sh
daemon="$CUDA_MPS_PIPE_DIRECTORY/daemon"
asked="$*"
[ "$asked" = "-d" ] || read -r asked
echo "$asked $CUDA_VISIBLE_DEVICES" >> "{calls}"
if [ "$asked" = "-d" ]; then
    [ ! -e "{broken}" ] && echo "$CUDA_VISIBLE_DEVICES" > "$daemon"
    exit
fi
[ -e "$daemon" ] || exit 1
[ "$asked" != quit ] || rm "$daemon"
"""


class Supervised:
    """The port below: whom it was told to start, and with what."""

    def __init__(self, running: tuple[str, ...] = ()) -> None:
        self.running = running
        self.started: dict[str, dict[str, str]] = {}
        self.fails = False
        self.tell: Callable[[ProcessExit], None] = lambda _: None

    async def open(
        self,
        on_exit: Callable[[ProcessExit], None],
        on_stuck: Callable[[ProcessesStuck], None],
    ) -> tuple[str, ...]:
        self.tell = on_exit
        return self.running

    async def start(self, launch: Launch) -> int:
        if self.fails:
            raise StartError("no such program")
        self.started[launch.attempt_id] = dict(launch.environment)
        return 100

    def age_ms(self, attempt_id: str) -> int:
        return 0

    def signal(self, attempt_id: str, signal_name: str) -> None: ...

    def dump_stacks(self, attempt_id: str, nccl_pipes: str) -> None: ...

    def kill(self, attempt_id: str) -> None: ...

    def forget(self, attempt_id: str) -> None: ...

    async def close(self) -> None: ...


class Box:
    """A node with the stand-in, and agents that follow one another on it."""

    def __init__(self, directory: Path) -> None:
        self.home = directory / "mps"
        self.broken = directory / "broken"
        self.log = directory / "calls"
        self.control = directory / CONTROL
        self.control.write_text(STAND_IN.format(calls=self.log, broken=self.broken))
        self.control.chmod(0o755)
        self.ended: list[str] = []
        self.looks: asyncio.Queue[None] = asyncio.Queue()
        self.waits = 0

    async def sleep(self, _: float) -> None:
        """Of who watches: until the test lets it look."""
        self.waits += 1
        await self.looks.get()

    async def look(self) -> None:
        waits = self.waits + bool(not self.waits)
        self.looks.put_nowait(None)
        await until(lambda: self.waits > waits)

    async def agent(self, running: tuple[str, ...] = (), control: str | None = None) -> None:
        self.below = Supervised(running)
        program = str(self.control) if control is None else control
        self.processes = MpsProcesses(self.below, self.home, program, sleep=self.sleep)
        adopted = await self.processes.open(
            lambda ended: self.ended.append(ended.attempt_id), lambda stuck: None
        )
        assert adopted == running

    async def start(self, attempt: str, gpu: str = "GPU-a", share_bytes: int = 8 << 30) -> None:
        environment = (("CUDA_VISIBLE_DEVICES", gpu),)
        await self.processes.start(
            Launch(attempt, ("x",), environment, "/", shared_gpu_memory_bytes=share_bytes)
        )

    async def end(self, attempt: str) -> None:
        self.below.tell(ProcessExit(attempt, 0, None))
        await self.processes.close()  # waits for what follows

    def daemon(self, gpu: str = "GPU-a") -> Path:
        return self.home / gpu / "pipe/daemon"

    def calls(self, word: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split()[1] for line in lines if line.split()[0] == word]


@pytest.fixture
async def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    monkeypatch.setattr(mps, "ANSWER_S_MAX", 60.0)  # a program that is slow does not hang
    box = Box(tmp_path)
    await box.agent()
    return box


async def test_sharers_are_clients_of_one_daemon_of_their_gpu(box: Box) -> None:
    await box.start("1.1")
    await box.start("2.1", share_bytes=4 << 30)
    assert box.calls("-d") == ["GPU-a"]
    assert box.daemon().read_text() == "GPU-a\n"
    first, second = box.below.started.values()
    assert first["CUDA_MPS_PIPE_DIRECTORY"] == str(box.home / "GPU-a/pipe")
    assert second["CUDA_MPS_PIPE_DIRECTORY"] == first["CUDA_MPS_PIPE_DIRECTORY"]
    assert first["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=8192M"
    assert second["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=4096M"
    assert first["CUDA_VISIBLE_DEVICES"] == "GPU-a"
    await box.start("3.1", gpu="GPU-b")
    assert box.calls("-d") == ["GPU-a", "GPU-b"]


async def test_it_ends_with_its_last_client(box: Box) -> None:
    await box.start("1.1")
    await box.start("2.1")
    await box.end("1.1")
    assert box.calls("quit") == []
    assert box.daemon().exists()
    await box.end("2.1")
    assert box.calls("quit") == ["GPU-a"]
    assert not (box.home / "GPU-a").exists()
    assert box.ended == ["1.1", "2.1"]


async def test_a_job_that_has_its_gpu_alone_is_no_client(box: Box) -> None:
    await box.start("1.1", share_bytes=0)
    assert box.below.started["1.1"] == {"CUDA_VISIBLE_DEVICES": "GPU-a"}
    await box.end("1.1")
    assert not box.log.exists()


async def test_a_daemon_that_has_died_is_replaced(box: Box) -> None:
    await box.start("1.1")
    box.daemon().unlink()
    await box.start("2.1")
    assert box.calls("-d") == ["GPU-a", "GPU-a"]
    assert box.daemon().exists()


async def test_a_daemon_that_dies_while_it_has_clients_is_told_of_once(box: Box) -> None:
    with structlog.testing.capture_logs() as said:
        await box.look()
        assert not box.log.exists(), "nobody has clients, so nobody is asked"
        await box.start("1.1")
        await box.start("2.1")
        await box.look()
        box.daemon().unlink()
        for _ in range(2):
            await box.look()
        died = [line for line in said if line["event"] == "mps.died"]
        assert [(line["gpu"], line["attempts"]) for line in died] == [("GPU-a", 2)]
        assert box.ended == [], "the server that they compute through may live"
        await box.start("3.1")
        assert box.calls("-d") == ["GPU-a", "GPU-a"]
        await box.look()
        box.daemon().unlink()
        await box.look()
    assert [line["event"] for line in said].count("mps.died") == 2, "this is another daemon"
    await box.processes.close()


async def test_where_it_cannot_be_started_jobs_go_without_it(box: Box) -> None:
    box.broken.touch()
    await box.start("1.1")
    assert box.below.started["1.1"] == {"CUDA_VISIBLE_DEVICES": "GPU-a"}
    await box.end("1.1")
    assert box.calls("quit") == []


@pytest.mark.parametrize("control", ["", "/nowhere/nvidia-cuda-mps-control"])
async def test_without_a_control_program_jobs_go_without_it(box: Box, control: str) -> None:
    await box.agent(control=control)
    await box.start("1.1")
    assert box.below.started["1.1"] == {"CUDA_VISIBLE_DEVICES": "GPU-a"}


async def test_a_job_that_does_not_start_leaves_no_daemon(box: Box) -> None:
    box.below.fails = True
    with pytest.raises(StartError):
        await box.start("1.1")
    await box.processes.close()
    assert box.calls("quit") == ["GPU-a"]
    assert not (box.home / "GPU-a").exists()


async def test_an_agent_that_comes_back_knows_whose_daemon_it_is(box: Box) -> None:
    await box.start("1.1")
    await box.start("2.1")
    await box.start("3.1", gpu="GPU-b")
    await box.agent(running=("1.1",))
    await box.processes.close()  # waits for what follows
    assert box.calls("quit") == ["GPU-b"], "its client has ended meanwhile"
    await box.start("4.1")
    assert box.calls("-d") == ["GPU-a", "GPU-b"]
    await box.end("1.1")
    assert box.daemon().exists()
    await box.end("4.1")
    assert box.calls("quit") == ["GPU-b", "GPU-a"]


async def test_a_control_program_that_hangs_holds_up_no_agent_that_begins(box: Box) -> None:
    await box.start("1.1")
    gate = box.home.parent / "gate"
    os.mkfifo(gate)
    box.control.write_text(f"#!/bin/sh\nread -r word < {gate}\n")
    await box.agent()
    assert box.daemon().exists(), "it is still asked to end"
    await asyncio.to_thread(gate.write_text, "go")
    await box.processes.close()
    assert not box.daemon().exists()


@pytest.mark.parametrize(
    ("share_bytes", "limit"), [(8 << 30, "0=8192M"), ((1 << 20) * 3 - 1, "0=2M"), (1, "0=1M")]
)
async def test_a_limit_is_never_above_the_share_nor_nothing(share_bytes: int, limit: str) -> None:
    assert limit_of(share_bytes) == limit
