"""What systemd is told, over a real datagram socket, and the file that names the port.

One suite for both programs, whose `notify.py` is the same text.
"""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import agent.notify
import coordinator.notify


@pytest.fixture(params=[agent.notify, coordinator.notify], ids=["agent", "coordinator"])
def notify(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """What NOTIFY_SOCKET says, and the socket behind it."""
    name = f"baton-test-{os.getpid()}"
    address = str(tmp_path / "notify") if request.param == "path" else f"@{name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.bind(address if request.param == "path" else f"\0{name}")
        link.setblocking(False)
        yield address, link


def test_each_state_is_one_datagram(notify: ModuleType, manager: tuple[str, socket.socket]) -> None:
    address, link = manager
    notifier = notify.Notifier({"NOTIFY_SOCKET": address}, monotonic_usec=lambda: 1_234_567)
    assert notifier.ready("serving on 127.0.0.1:7070")
    assert notifier.reloading()
    assert notifier.ready("two jobs\nREADY=1 " + "é" * 500)
    assert notifier.watchdog()
    assert notifier.stopping()
    assert [link.recv(4096).decode() for _ in range(5)] == [
        "READY=1\nSTATUS=serving on 127.0.0.1:7070",
        "RELOADING=1\nMONOTONIC_USEC=1234567",
        "READY=1\nSTATUS=" + ("two jobs READY=1 " + "é" * 500)[:200],
        "WATCHDOG=1",
        "STOPPING=1",
    ]
    with pytest.raises(BlockingIOError):
        link.recv(4096)


def test_the_time_of_a_reload_is_the_monotonic_clocks(
    notify: ModuleType, manager: tuple[str, socket.socket]
) -> None:
    address, link = manager
    assert notify.Notifier({"NOTIFY_SOCKET": address}).reloading()
    _, _, usec = link.recv(4096).decode().partition("MONOTONIC_USEC=")
    assert int(usec) > 0


@pytest.mark.parametrize("address", ["", "relative", "/no/such/socket", "@baton-nobody-there"])
def test_nobody_listens(notify: ModuleType, address: str) -> None:
    environment = {"NOTIFY_SOCKET": address} if address else {}
    assert notify.Notifier(environment).ready() is False


def test_a_manager_that_hangs_does_not_stop_the_loop(
    notify: ModuleType, manager: tuple[str, socket.socket]
) -> None:
    address, _ = manager
    notifier = notify.Notifier({"NOTIFY_SOCKET": address})
    answers = {notifier.watchdog() for _ in range(10_000)}  # more than any receive queue holds
    assert answers == {True, False}


@pytest.mark.parametrize(
    ("environment", "interval_ms"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15_000),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 15_000),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "1"}, 1),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_period(
    notify: ModuleType, environment: dict[str, str], interval_ms: int | None
) -> None:
    assert notify.Notifier(environment, pid=7).watchdog_interval_ms() == interval_ms


def test_the_port_file_appears_whole(notify: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "port"
    for address in ("127.0.0.1:40001", "[::1]:9"):
        notify.write_port_file(str(path), address)
        assert path.read_text() == f"{address}\n"
    with pytest.raises(OSError, match="No such file"):
        notify.write_port_file(str(tmp_path / "missing" / "port"), "127.0.0.1:1")
    directory = tmp_path / "directory"
    directory.mkdir()
    with pytest.raises(IsADirectoryError):
        notify.write_port_file(str(directory), "127.0.0.1:1")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["directory", "port"]
