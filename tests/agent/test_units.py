"""Trainers as services of systemd, without systemd: the launcher with a stand-in for `systemd-run`.

What is tested here is the whole way of an attempt: request, checks, handshake over the FIFO, exit,
and what its unit's end adds.
"""

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.values import Launch, ProcessExit
from agent.ports import StartError
from agent.processes import launcher, units
from agent.processes.launcher import Refused, command, parse
from agent.processes.supervisor import Supervisor
from agent.processes.units import request, why_ended
from tests.agent.unit_worlds import GPU, World, launching
from tests.agent.waiting import DEADLINE_S, until


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def serving(world: World) -> Iterator[World]:
    with launching(world):
        yield world


def bash(script: str, attempt_id: str = "1.1", memory_bytes: int = 0, gpus: str = GPU) -> Launch:
    environment = (
        ("BATON_GRACE_MS", "7000"),
        ("CUDA_VISIBLE_DEVICES", gpus),
        ("PATH", "/usr/bin:/bin"),
    )
    return Launch(attempt_id, ("bash", "-c", script), environment, "/", memory_bytes)


async def opened(world: World) -> tuple[Supervisor, list[ProcessExit], tuple[str, ...]]:
    exits: list[ProcessExit] = []
    supervisor = Supervisor(world.state, units=world.units)
    return supervisor, exits, await supervisor.open(exits.append)


async def test_a_trainer_is_a_unit_with_its_gpus_and_limits(serving: World) -> None:
    supervisor, exits, _ = await opened(serving)
    pid = await supervisor.start(bash("exit 3", memory_bytes=1 << 30))
    assert pid > 0
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", 3, None)]
    words = serving.run_words()
    assert "--unit=baton-job-1.1.service" in words
    expected = {
        "KillMode=mixed",
        "TimeoutStopSec=7000ms",
        f"MemoryMax={1 << 30}",
        "DevicePolicy=closed",
        "DeviceAllow=/dev/nvidia3 rw",
        "DeviceAllow=/dev/nvidiactl rw",
    }
    assert expected <= {word.removeprefix("--property=") for word in words}
    users = [word for word in words if word.startswith("--property=User=")]
    assert users == ["--property=User=nobody"] or os.getuid() != 0
    assert serving.asked()[-1].startswith("show "), "what has not failed is forgotten by itself"
    await supervisor.close()


async def test_a_mig_instance_is_its_gpu_s_device_and_its_own_capabilities(serving: World) -> None:
    supervisor, exits, _ = await opened(serving)
    places = (("MIG-6f1c", f"{GPU}/1/0"),)
    await supervisor.start(replace(bash("exit 0", gpus="MIG-6f1c"), places=places))
    await until(lambda: exits)
    allowed = [word for word in serving.run_words() if "DeviceAllow" in word]
    assert [word.split("=")[2] for word in allowed[-3:]] == [
        "/dev/nvidia3 rw",
        "/dev/nvidia-caps/nvidia-cap30 rw",
        "/dev/nvidia-caps/nvidia-cap31 rw",
    ]
    await supervisor.close()


def test_an_instance_that_the_driver_does_not_have_is_refused(world: World) -> None:
    for numbers in ("2/0", "1/1"):
        with pytest.raises(Refused, match="no such instance"):
            launcher.gpu_devices(world.settings, [f"{GPU}/{numbers}"])
    access = world.root / "capabilities/gpu3/mig/gi1/access"
    access.write_text("DeviceFileMinor: ../sda\n")
    with pytest.raises(Refused, match="does not say which device"):
        launcher.gpu_devices(world.settings, [f"{GPU}/1/0"])


def test_a_limit_that_holds_no_interpreter_is_raised_to_one_that_does() -> None:
    for memory_bytes, limit in ((0, 0), (1, 64 << 20), (1 << 30, 1 << 30)):
        asked = request(bash("exit 0", memory_bytes=memory_bytes))
        assert launcher.parse(json.dumps(asked).encode())["memory_bytes"] == limit


async def test_a_launcher_that_hangs_does_not_hold_an_agent_up_that_begins(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "OTHERS_S_MAX", 0.01)
    (world.root / "units.txt").write_text("baton-job-8.1.service loaded active\n")
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(world.root / "launcher.sock"))
        listener.listen()
        listener.setblocking(False)
        async with asyncio.timeout(DEADLINE_S):
            supervisor, _, adopted = await opened(world)
            assert adopted == ()
            for ask in ("kill", "forget"):  # it answers after all
                channel, _ = await loop.sock_accept(listener)
                with channel:
                    asked = json.loads(await loop.sock_recv(channel, 8192))
                    assert asked == {"ask": ask, "attempt": "8.1"}
                    await loop.sock_sendall(channel, b'{"refused": ""}')
    await supervisor.close()


async def test_out_of_memory_is_told_as_such(serving: World) -> None:
    serving.says("oom-kill", str(1 << 30))
    supervisor, exits, _ = await opened(serving)
    await supervisor.start(bash("kill -KILL $$", memory_bytes=1 << 30))
    await until(lambda: exits)
    reason = "out of memory: the job's limit of 1073741824 bytes"
    assert exits == [ProcessExit("1.1", None, 9, reason)]
    assert serving.asked()[-1] == "reset-failed -- baton-job-1.1.service"
    await supervisor.close()


async def test_a_unit_outlives_the_agent_and_is_adopted(serving: World) -> None:
    supervisor, _, _ = await opened(serving)
    pid = await supervisor.start(bash("exec sleep 600"))
    await until(lambda: (serving.state / "attempts/1.1/started.json").exists())
    await supervisor.close()
    later, exits, adopted = await opened(serving)
    assert adopted == ("1.1",)
    assert await later.start(bash("exec sleep 600")) == pid
    serving.says("oom-kill", "infinity")
    later.kill("1.1")
    await until(lambda: exits)
    assert exits[0].signal == 9
    assert exits[0].reason.startswith("out of memory: the node")
    await later.close()


async def test_a_unit_without_records_is_killed(serving: World) -> None:
    line = "baton-job-9.2.service loaded active running Baton attempt 9.2\n"
    (serving.root / "units.txt").write_text(line)
    supervisor, _, adopted = await opened(serving)
    assert adopted == ()
    assert "kill --kill-whom=all --signal=KILL -- baton-job-9.2.service" in serving.asked()
    await supervisor.close()


async def test_refusals_are_told_as_failures_to_start(serving: World) -> None:
    supervisor, exits, _ = await opened(serving)
    with pytest.raises(StartError, match="the driver knows no GPU-none") as refused:
        await supervisor.start(bash("exit 0", gpus="GPU-none"))
    assert not refused.value.permanent
    with pytest.raises(StartError, match="no such file: /no/such"):
        await supervisor.start(Launch("1.2", ("/no/such",), (), "/"))
    assert exits == []
    await supervisor.close()


async def test_no_launcher_is_no_start_without_limits(world: World) -> None:
    supervisor, _, _ = await opened(world)
    with pytest.raises(StartError, match="the launcher cannot be asked"):
        await supervisor.start(bash("exit 0"))
    await supervisor.close()


GOOD = {"ask": "start", "attempt": "1.1", "gpus": [GPU], "memory_bytes": 0, "grace_ms": 1}


@pytest.mark.parametrize(
    "changed",
    [
        {"ask": "stop"},
        {"ask": ["start"]},
        {"user": "root"},
        {"attempt": "../1.1"},
        {"attempt": "1.1/"},
        {"attempt": "01.1"},
        {"attempt": "1.1\n"},
        {"attempt": "-1.1"},
        {"attempt": 1.1},
        {"gpus": GPU},
        {"gpus": ["/dev/sda"]},
        {"gpus": ["GPU-../../sda"]},
        {"gpus": [GPU] * 65},
        {"gpus": ["MIG-6f1c0000"]},
        {"gpus": [f"{GPU}/1"]},
        {"gpus": [f"{GPU}/1/"]},
        {"gpus": [f"{GPU}/01/0"]},
        {"gpus": [f"{GPU}/-1/0"]},
        {"gpus": [f"{GPU}/1/0\n"]},
        {"gpus": [f"{GPU}/../0"]},
        {"gpus": [3]},
        {"memory_bytes": 1},
        {"memory_bytes": -1},
        {"memory_bytes": 2**51},
        {"memory_bytes": False},
        {"memory_bytes": "infinity"},
        {"grace_ms": -1},
        {"grace_ms": 2**31},
        {"grace_ms": True},
    ],
)
def test_a_bad_field_is_refused(changed: dict[str, object]) -> None:
    launcher.parse(json.dumps(GOOD).encode())
    with pytest.raises(Refused):
        launcher.parse(json.dumps(GOOD | changed).encode())


@pytest.mark.parametrize("message", [b"{", b"[]", b"null", b"\xff", b'{"ask": "start"}'])
def test_what_is_no_request_is_refused(message: bytes) -> None:
    with pytest.raises(Refused):
        launcher.parse(message)


def test_a_directory_is_the_agents_and_no_link(world: World) -> None:
    attempts = world.state / "attempts"
    attempts.mkdir(parents=True, mode=0o700)
    world.state.chmod(0o700)
    with pytest.raises(Refused):
        launcher.check_directory(world.settings, "attempts", "1.1")
    (attempts / "1.1").mkdir(mode=0o700)
    assert launcher.check_directory(world.settings, "attempts", "1.1") == attempts / "1.1"
    (attempts / "1.2").symlink_to(attempts / "1.1")
    with pytest.raises(Refused):
        launcher.check_directory(world.settings, "attempts", "1.2")
    stranger = replace(world.settings, agent_uid=os.getuid() + 1)
    with pytest.raises(Refused):
        launcher.check_directory(stranger, "attempts", "1.1")
    (attempts / "1.1").chmod(0o770)
    with pytest.raises(Refused):
        launcher.check_directory(world.settings, "attempts", "1.1")


@pytest.fixture
def channel() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield theirs


def test_only_the_agent_itself_is_heard(
    world: World, channel: socket.socket, tmp_path: Path
) -> None:
    launcher.check_peer(world.settings, channel)
    stranger = replace(world.settings, agent_uid=os.getuid() + 1)
    with pytest.raises(Refused, match="is not the agent's"):
        launcher.check_peer(stranger, channel)
    group = tmp_path / str(os.getpid())
    group.mkdir()
    unit = replace(world.settings, agent_unit="baton-agent.service", control_groups=tmp_path)
    (group / "cgroup").write_text("0::/system.slice/baton-job-1.1.service\n")
    with pytest.raises(Refused, match=r"is not of baton-agent.service"):
        launcher.check_peer(unit, channel)
    (group / "cgroup").write_text("0::/system.slice/baton-agent.service\n")
    launcher.check_peer(unit, channel)


def test_only_oom_adds_a_reason() -> None:
    assert why_ended({"Result": "success", "MemoryMax": "5"}) == ""
    assert why_ended({"Result": "exit-code"}) == ""
    assert why_ended({}) == ""
    assert "limit of 5 bytes" in why_ended({"Result": "oom-kill", "MemoryMax": "5"})


def test_a_request_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(Refused, match="no JSON"):
        parse(b"[" * 8_000)


def test_no_grace_is_no_endless_stop(world: World) -> None:
    """systemd takes TimeoutStopSec=0 for no limit at all."""
    for directory in (world.state, world.state / "attempts", world.state / "attempts/1.1"):
        directory.mkdir(mode=0o700)
    asked = {"ask": "start", "attempt": "1.1", "gpus": [], "memory_bytes": 0, "grace_ms": 0}
    assert "--property=TimeoutStopSec=1ms" in command(world.settings, asked)
