"""A state directory that was copied to another machine is not started from; new hardware in the
same machine is no reason."""

import asyncio
import errno
import json
from pathlib import Path

import pytest

from agent import main
from agent.config import Config
from agent.host_identity import FILE_NAME, HostChanged, check

BOARD = {"eth0": "3c:ec:ef:00:00:01", "eth1": "3c:ec:ef:00:00:02"}


def machine(root: Path, gpus: tuple[str, ...], interfaces: dict[str, str]) -> Path:
    """What /proc and /sys of a machine say of its hardware."""
    for number, uuid in enumerate(gpus):
        file = root / f"proc/driver/nvidia/gpus/0000:{number:02x}:00.0/information"
        file.parent.mkdir(parents=True)
        file.write_text(f"Model: \t\t NVIDIA H100\nIRQ:   \t\t 11\nGPU UUID: \t {uuid}\n")
    for name, address in interfaces.items():
        (root / f"sys/class/net/{name}/device").mkdir(parents=True)
        (root / f"sys/class/net/{name}/address").write_text(f"{address}\n")
    return root


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Of a machine with two GPUs and two interfaces."""
    directory = tmp_path / "state"
    directory.mkdir()
    check(directory, machine(tmp_path / "first", ("GPU-a", "GPU-b"), BOARD))
    return directory


def test_a_copied_state_directory_is_refused_until_a_person_says_so(
    state: Path, tmp_path: Path
) -> None:
    other = machine(tmp_path / "other", ("GPU-c",), {"eth0": "3c:ec:ef:00:00:09"})
    for _ in range(2):
        with pytest.raises(HostChanged, match=f"none of the gpus or interfaces.*rm {state}"):
            check(state, other)
    (state / FILE_NAME).unlink()
    check(state, other)
    check(state, other)
    with pytest.raises(HostChanged):
        check(state, tmp_path / "first")


@pytest.mark.parametrize(
    ("gpus", "interfaces"),
    [
        (("GPU-b", "GPU-x"), {"eth0": "3c:ec:ef:00:00:09"}),
        (("GPU-x", "GPU-y"), {"eth1": BOARD["eth1"]}),
        ((), BOARD),
        ((), {}),
        (("GPU-x",), {}),
        (("GPU-????????-????",), BOARD),
    ],
    ids=[
        "new mainboard",
        "new gpus",
        "no driver",
        "a container",
        "with a GPU",
        "a driver that has not asked",
    ],
)
def test_new_hardware_in_the_same_machine_is_no_reason(
    state: Path, tmp_path: Path, gpus: tuple[str, ...], interfaces: dict[str, str]
) -> None:
    check(state, machine(tmp_path / "later", gpus, interfaces))
    check(state, tmp_path / "first")  # what could not be seen for a while is not forgotten


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str, encoding: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("agent.host_identity._interfaces", lambda root: [BOARD["eth0"]])
    with pytest.raises(OSError, match=f"cannot write {tmp_path / FILE_NAME}: No space left"):
        check(tmp_path)


def test_what_many_machines_share_or_each_boot_makes_is_no_witness(tmp_path: Path) -> None:
    """A management controller on USB, a virtual function, an interface without hardware, and one
    with a random address or one that was set. What a bond has set, it remembers the other of."""
    names = ("usb0", "vf0", "random", "set", "bonded")
    addresses = {name: f"aa:00:00:00:00:{number:02x}" for number, name in enumerate(names, start=1)}
    root = machine(tmp_path / "root", (), addresses)
    for name, kind in (("random", "1"), ("set", "3"), ("bonded", "3")):
        (root / f"sys/class/net/{name}/addr_assign_type").write_text(f"{kind}\n")
    (tmp_path / "bus/usb").mkdir(parents=True)
    (root / "sys/class/net/usb0/device/subsystem").symlink_to(tmp_path / "bus/usb")
    (root / "sys/class/net/vf0/device/physfn").mkdir()
    (root / "sys/class/net/docker0").mkdir()
    (root / "sys/class/net/docker0/address").write_text("aa:00:00:00:00:03\n")
    check(tmp_path, root)
    assert not (tmp_path / FILE_NAME).exists()
    (root / "sys/class/net/bonded/bonding_slave").mkdir()
    (root / "sys/class/net/bonded/bonding_slave/perm_hwaddr").write_text("3c:ec:ef:00:00:07\n")
    check(tmp_path, root)
    assert json.loads((tmp_path / FILE_NAME).read_text())["interfaces"] == ["3c:ec:ef:00:00:07"]


def test_a_torn_note_is_written_anew(state: Path, tmp_path: Path) -> None:
    (state / FILE_NAME).write_text('{"gpus": ["GP')
    check(state, tmp_path / "first")
    assert "GPU-a" in (state / FILE_NAME).read_text()
    assert (state / FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_an_agent_touches_nothing_of_another_machine(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.host_identity._interfaces", lambda root: ["3c:ec:ef:00:00:09"])
    config = Config(state_directory=str(state), runtime_directory=str(tmp_path / "run"))
    with pytest.raises(HostChanged):
        asyncio.run(main._serve(config, []))
    assert [path.name for path in state.iterdir()] == [FILE_NAME]
