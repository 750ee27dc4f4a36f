"""The same Debian under a kernel of its own, emulated by QEMU, for what only a kernel enforces.

Problem: a container's controllers belong to its host, and a host may have the old ones, or none to
give. That memory, processor and devices are really withheld from a job is seen only under a kernel
that belongs to the machine; and few machines that run tests may use hardware for a virtual one.

How: the root gets Debian's kernel and QEMU's guest agent besides, and becomes a disk that QEMU
boots by software alone, also where there is a /dev/kvm: within virtual machines it may be one that
stops at instructions of the kernel. Nothing is written to the disk, so every boot starts from the
same. A second disk brings files along. Commands go to the guest agent, over a pair of sockets to a
port of virtio; the machine has no network but its loopback.
"""

import base64
import contextlib
import json
import os
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.systemd.machine import (
    BUILD,
    PACKAGES,
    PACKAGES_AT,
    Machine,
    built_root,
    missing_packages,
    wait_until,
)

TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "dpkg-deb": "dpkg",
}
KERNEL = "linux-image-cloud-amd64"
GUEST_AGENT = "qemu-guest-agent"
GUEST_AGENT_PORT = "org.qemu.guest_agent.0"
ROOT_MIB = 2048  # a third of it is used, and the file has no more than that
FILES_MIB = 256
MEMORY_MIB = 1536  # both programs, and the limits of two jobs
PROCESSORS = 2
FILES_OF_BOOT = ("vmlinuz", "initrd.img")
ASK_AGAIN_S = 0.3  # the guest agent logs each question, and an emulated journal is slow
BOOT_S_MAX = 300.0  # until it answers; 20 s on two cores that are otherwise idle


def why_not() -> str:
    """The sentence that says why no machine can be emulated here; empty when one can."""
    if platform.machine() != "x86_64":
        return "the emulated machine has the root of an x86-64 one, which this machine is not"
    missing = missing_packages(TOOLS)
    if missing:
        return f"no machine can be emulated here. Run: sudo apt-get install {missing}"
    return "" if os.geteuid() == 0 else "building its root needs root: sudo make vm-test"


def built_disk(directory: Path, into: Path, size_mib: int) -> Path:
    """A file system with those files."""
    into.unlink(missing_ok=True)
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(directory), str(into), f"{size_mib}M"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "LC_ALL": "C"})
    return into


@dataclass(frozen=True, slots=True)
class Emulated(Machine):
    """`guest_agent` is our end of the line to it."""

    guest_agent: socket.socket

    def ask(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        wanted: dict[str, object] = {"path": words[0], "arg": words[1:], "capture-output": True}
        if stdin:
            wanted["input-data"] = base64.b64encode(stdin.encode()).decode()
        started = self.tell("guest-exec", wanted)
        status: dict[str, Any] = {}

        def has_ended() -> bool:
            # said once: the guest agent then forgets it
            status.update(self.tell("guest-exec-status", started))
            return bool(status["exited"])

        wait_until(has_ended, f"{' '.join(words)} ends", pause_s=ASK_AGAIN_S)
        output, errors = (
            base64.b64decode(status.get(name, "")).decode(errors="replace")
            for name in ("out-data", "err-data")
        )
        code = status["exitcode"] if "exitcode" in status else -status["signal"]
        return subprocess.CompletedProcess(words, code, output, errors)

    def tell(self, command: str, arguments: Mapping[str, object]) -> dict[str, Any]:
        """What the guest agent returns (QEMU Guest Agent Protocol Reference)."""
        asked = {"execute": command, "arguments": arguments}
        self.guest_agent.sendall(json.dumps(asked).encode() + b"\n")
        received = b""
        while not received.endswith(b"\n"):
            piece = self.guest_agent.recv(1 << 16)
            assert piece, "the emulated machine has ended"
            received += piece
        answer = json.loads(received)
        assert "return" in answer, f"{asked}: {answer}"
        returned = answer["return"]
        return returned if isinstance(returned, dict) else {}


@contextlib.contextmanager
def emulated(name: str, files: Path) -> Iterator[Emulated]:
    """A machine from its boot to its end, which sees those files where packages are."""
    root = built_root("emulated-root", (*PACKAGES, KERNEL, GUEST_AGENT))
    disks = (
        built_disk(root, BUILD / f"{name}.root", ROOT_MIB),
        built_disk(files, BUILD / f"{name}.files", FILES_MIB),
    )
    console = BUILD / f"{name}.console"
    ours, theirs = socket.socketpair()
    with ours, theirs, open(BUILD / f"{name}.qemu", "wb") as output:
        process = subprocess.Popen(
            [*_command(root, console, theirs.fileno()), *_drives(disks)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        theirs.close()
        try:
            ours.settimeout(BOOT_S_MAX)
            machine = Emulated(ours)
            machine.tell("guest-ping", {})
            wait_until(machine.has_booted, "the machine boots")
            machine.run("mount", "-o", "ro", "/dev/vdb", PACKAGES_AT)
            yield machine
        finally:
            process.kill()
            process.wait()
            for disk in disks:
                disk.unlink()


def _command(root: Path, console: Path, guest_agent: int) -> list[str]:
    (kernel,), (initial,) = (list((root / "boot").glob(f"{file}-*")) for file in FILES_OF_BOOT)
    return [
        "qemu-system-x86_64",
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-smp", str(PROCESSORS), "-m", f"{MEMORY_MIB}M"),
        *("-kernel", str(kernel), "-initrd", str(initial)),
        *("-append", "root=/dev/vda rw console=ttyS0 panic=-1"),
        *("-serial", f"file:{console}"),
        *("-device", "virtio-serial", "-chardev", f"socket,id=line,fd={guest_agent}"),
        *("-device", f"virtserialport,chardev=line,name={GUEST_AGENT_PORT}"),
    ]


def _drives(disks: tuple[Path, ...]) -> list[str]:
    drives = (f"file={disk},format=raw,if=virtio,snapshot=on" for disk in disks)
    return [word for drive in drives for word in ("-drive", drive)]
