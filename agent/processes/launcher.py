"""Starts trainers as transient services of systemd, for an agent that may not.

Standard library only.

Problem: a limit on memory, a limit on tasks and a list of devices belong to a control group, and
control groups belong to systemd, that is to root. The agent runs as a user of its own; a right to
start units of its choice would be root by another name.

How: this small program is root and started by its socket (`baton-launcher.socket`). A request names
an attempt, its GPUs and its limits, and nothing else: which user, which program, which directory
and which properties stand here, or on the command line of its unit. So the worst that a request can
do is to run a program that the agent has laid out, the supervisor (`shim.py`) of an attempt or the
warm process, as the job's user, less privileged than it would be without.

    {"ask": "start", "attempt": "7.2", "gpus": ["GPU-..."], "memory_bytes": 0, "grace_ms": 120000}
        a MIG instance is its GPU and the numbers of its instances there: "GPU-.../1/0"
    {"ask": "kill", "attempt": "7.2"}      everything in its unit, at once
    {"ask": "forget", "attempt": "7.2"}    how its unit ended need not be kept any longer
    {"ask": "warm"}                        the process that trainers are forked from, anew
    {"ask": "move", "attempt": "7.2", "gpus": [], "memory_bytes": 0, "grace_ms": 120000, "pid": 12}
        what that one has forked gets a service of its own, before it starts anything

The answer is {"refused": "a sentence"}, empty where it was done. One message each
(`SOCK_SEQPACKET`).

Threats, and what is done about them.
- Another user asks: the socket has the agent's group, and the kernel names the peer (SO_PEERCRED).
- A trainer asks, which may be of the same user: its unit hides the socket (InaccessiblePaths), and
  the peer must be in the agent's unit by its control group (`--agent-unit`).
- A name that reaches elsewhere: an attempt's id is digits and dots, and each directory on the way
  to it is opened without following a link, and must be the agent's own.
- A link put there after the look: nothing of the attempt is opened here or by systemd, only by the
  unit's own program, as the job's user. Hence no `StandardOutput=file:`, which systemd opens as
  root.
- A device that is no GPU: UUIDs, and the numbers of instances, become minor numbers here, by what
  the driver says in /proc.
- A request that is large, endless or slow: one message of bounded size, within a second; unknown
  fields, and numbers out of bounds, are refused.
- A process that is no trainer's gets a unit: only what is in the warm process's own unit, by its
  control group, is moved out of it, and it is held by a descriptor, lest its number be another's.

Trainers run here as `--job-user`, who must be able to read and write what the agent lays out for
them; that is the agent's own user unless its directories are shared otherwise.

What is forked stays in the group, the mounts and under the filters of who forks it. So the process
that warm trainers are forked from is a service with the properties of theirs, and what it forks is
moved into the service of its attempt, whose first process only ends with it and passes SIGTERM on.
systemd moves processes only to units whose groups are delegated (org.freedesktop.systemd1(5),
AttachProcessesToUnit): a job may divide its group, and changes no limit of it.
"""

import argparse
import json
import os
import pwd
import re
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REQUEST_BYTES_MAX = 8192  # 64 UUIDs of 40 bytes, and the rest
RECEIVE_S = 1.0  # it is there when the connection is, or never
RUN_S = 30.0  # what systemd takes to start a unit is milliseconds; a manager that hangs is told of
GPUS_MAX = 64
MEMORY_BYTES_MIN = 64 * 1024**2  # less does not hold an interpreter
MEMORY_BYTES_MAX = 2**50  # a pebibyte: more than any node
PID_MAX = 2**22  # of Linux, on 64 bits (proc(5))
GRACE_MS_MAX = 2**31 - 1  # as the supervisor itself
TASKS_MAX = 65_536  # a trainer with hundreds of workers and their threads; far below a fork bomb
FIRST_DESCRIPTOR = 3  # of those that systemd hands over (sd_listen_fds(3))

DRIVER_DIRECTORY = Path("/proc/driver/nvidia/gpus")
CAPABILITIES = "capabilities"  # beside it: who may use which part of a GPU
ATTEMPT = re.compile(r"[1-9][0-9]{0,17}\.[1-9][0-9]{0,17}(\.(0|[1-9][0-9]{0,3}))?")
NUMBER = r"(0|[1-9][0-9]{0,2})"
GPU = re.compile(rf"(GPU-[0-9A-Za-z-]{{1,64}})(?:/{NUMBER}/{NUMBER})?")
CONTROL_DEVICES = (
    "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset",
)  # fmt: skip
# As the shim would have it from the agent: its handshake on 3, its complaints in a file. systemd
# makes one dollar of two (systemd.service(5), "Command lines").
START = 'exec "$$@" 3<>"$$0/status" 2>"$$0/shim.err"'

FIXED_PROPERTIES = (
    "Type=exec",
    "KillMode=mixed",  # the shim passes SIGTERM on and ends last; then all that is left is killed
    "OOMPolicy=stop",  # a job that lost a process for memory is over, and its unit says oom-kill
    f"TasksMax={TASKS_MAX}",
    "LimitNOFILE=1048576",
    "LimitMEMLOCK=infinity",
    "UMask=0077",
    "StandardOutput=null",
    "StandardError=journal",
    "DevicePolicy=closed",
    "InaccessiblePaths=-/run/baton-launcher",
    "NoNewPrivileges=yes",
    "CapabilityBoundingSet=",
    "ProtectSystem=full",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "RestrictSUIDSGID=yes",
    "RestrictRealtime=yes",
    "LockPersonality=yes",
    "SystemCallArchitectures=native",
)
SYSTEMD = "org.freedesktop.systemd1"
ATTACH = (
    *("--quiet", "call", SYSTEMD, "/org/freedesktop/systemd1", f"{SYSTEMD}.Manager"),
    *("AttachProcessesToUnit", "ssau"),
)
FORGET = ("reset-failed",)
WARM_UNIT = "baton-warm.service"
WARM_DIRECTORY = "warm"
# Who has no handshake of its own.
PLAIN_START = 'exec "$$@" 2>"$$0/shim.err"'
WARM_PROPERTIES = (
    # One that opens a device is not forked from, and has to show it: with none to open, a library
    # that looks for GPUs would keep it in mind that there are none.
    *(f"DeviceAllow=char-nvidia{kind} rw" for kind in ("", "-frontend", "-uvm", "-caps")),
    "KillSignal=SIGKILL",  # it has nothing to save
    "CollectMode=inactive-or-failed",
)
MOVED_PROPERTIES = (
    "Delegate=",  # without any controller
    # What is moved there has its sandbox already: it need not wait until the first process has one,
    # which takes twice as long as all else.
    "Type=simple",
)
FIELDS = {
    "start": {"ask", "attempt", "gpus", "memory_bytes", "grace_ms"},
    "warm": {"ask"},
    "move": {"ask", "attempt", "gpus", "memory_bytes", "grace_ms", "pid"},
    "kill": {"ask", "attempt"},
    "forget": {"ask", "attempt"},
}


class Refused(Exception):
    """The text says why, for the agent's log."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What no request can change. An empty `agent_unit`: no control group is looked at."""

    agent_uid: int
    agent_unit: str
    job_user: str
    state_directory: Path
    interpreter: str = os.path.realpath(sys.executable)
    systemd_run: str = "systemd-run"
    systemctl: str = "systemctl"
    busctl: str = "busctl"
    driver_directory: Path = DRIVER_DIRECTORY
    control_groups: Path = Path("/proc")


def unit_name(attempt: str) -> str:
    return f"baton-job-{attempt}.service"


def parse(message: bytes) -> dict[str, object]:
    """A request whose every field is there, known and within bounds. Raises `Refused`."""
    try:
        request = json.loads(message)
    except (ValueError, RecursionError):
        raise Refused("the request is no JSON") from None
    ask = request.get("ask") if isinstance(request, dict) else None
    if not isinstance(ask, str) or ask not in FIELDS:
        raise Refused("the request asks for nothing that is known here")
    if set(request) != FIELDS[ask]:
        raise Refused(f"a request to {ask} has the fields {', '.join(sorted(FIELDS[ask]))}")
    attempt = request.get("attempt", "1.1")
    if not isinstance(attempt, str) or not ATTEMPT.fullmatch(attempt):
        raise Refused("'attempt' is no attempt id")
    if "pid" in request:
        check_number(request, "pid", 2, PID_MAX)
    if "gpus" in request:
        gpus = request["gpus"]
        if not isinstance(gpus, list) or len(gpus) > GPUS_MAX:
            raise Refused(f"'gpus' must be a list of at most {GPUS_MAX}")
        if not all(isinstance(gpu, str) and GPU.fullmatch(gpu) for gpu in gpus):
            raise Refused("'gpus' has what is no UUID of a GPU")
        if request["memory_bytes"] != 0:
            check_number(request, "memory_bytes", MEMORY_BYTES_MIN, MEMORY_BYTES_MAX)
        check_number(request, "memory_bytes", 0, MEMORY_BYTES_MAX)
        check_number(request, "grace_ms", 0, GRACE_MS_MAX)
    return dict(request)


def check_number(request: dict[str, object], name: str, least: int, most: int) -> None:
    """Raises `Refused`. A truth value is no number."""
    value = request[name]
    if type(value) is not int or not least <= value <= most:
        raise Refused(f"'{name}' must be an integer from {least} to {most}")


def check_directory(settings: Settings, *steps: str) -> Path:
    """A directory of the agent's below its state directory, reached without a link. Raises
    `Refused`."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    path = settings.state_directory
    descriptors: list[int] = []
    try:
        for step in (os.fspath(path), *steps):
            parent = descriptors[-1] if descriptors else None
            descriptors.append(os.open(step, flags, dir_fd=parent))
            status = os.fstat(descriptors[-1])
            if status.st_uid != settings.agent_uid or status.st_mode & 0o022:
                raise Refused(f"{step} is not a directory that the agent alone can write to")
    except OSError as error:
        raise Refused(f"{steps[-1]} has no directory: {error.strerror}") from None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return path.joinpath(*steps)


def gpu_devices(settings: Settings, gpus: Sequence[str]) -> list[str]:
    """Their devices, as the driver has them; each once. Raises `Refused`."""
    known: dict[str, int] = {}
    for path in settings.driver_directory.glob("*/information"):
        lines = [line.partition(":") for line in path.read_text(errors="replace").splitlines()]
        facts = {name.strip(): value.strip() for name, _, value in lines}
        if facts.get("Device Minor", "").isdigit():
            known[facts.get("GPU UUID", "")] = int(facts["Device Minor"])
    devices: dict[str, None] = {}
    for gpu in gpus:
        named = GPU.fullmatch(gpu)
        if named is None or named[1] not in known:
            raise Refused(f"the driver knows no {gpu}")
        minor = known[named[1]]
        devices[f"/dev/nvidia{minor}"] = None
        if named[2] is not None:
            devices.update(dict.fromkeys(capability_devices(settings, minor, named[2], named[3])))
    return list(devices)


def capability_devices(settings: Settings, minor: int, instance: str, compute: str) -> list[str]:
    """Of a MIG instance and of the compute instance in it: without both it cannot be used. Raises
    `Refused`."""
    beside = settings.driver_directory.parent / CAPABILITIES
    whole = beside / f"gpu{minor}" / "mig" / f"gi{instance}"
    devices = []
    for path in (whole / "access", whole / f"ci{compute}" / "access"):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError as error:
            raise Refused(f"the driver has no such instance: {path}: {error.strerror}") from None
        numbers = [line.partition(":")[2].strip() for line in lines if "DeviceFileMinor" in line]
        if len(numbers) != 1 or not (numbers[0].isascii() and numbers[0].isdigit()):
            raise Refused(f"the driver does not say which device it is: {path}")
        devices.append(f"/dev/nvidia-caps/nvidia-cap{numbers[0]}")
    return devices


def command(settings: Settings, request: dict[str, object]) -> list[str]:
    """What is executed for a request that was parsed. Raises `Refused`."""
    if request["ask"] == "warm":
        directory = check_directory(settings, WARM_DIRECTORY)
        words = service(settings, WARM_UNIT, "Baton warm process", WARM_PROPERTIES)
        return [*words, *program(settings, PLAIN_START, directory, "--execute", str(directory))]
    attempt = str(request["attempt"])
    unit = unit_name(attempt)
    if request["ask"] == "kill":
        return [settings.systemctl, "kill", "--kill-whom=all", "--signal=KILL", "--", unit]
    if request["ask"] == "forget":
        return [settings.systemctl, *FORGET, "--", unit]
    directory = check_directory(settings, "attempts", attempt)
    moved = request["ask"] == "move"
    properties = [
        f"TimeoutStopSec={grace_ms(request)}ms",
        f"MemoryMax={request['memory_bytes'] or 'infinity'}",
        # else the limit would only move the job's memory to the disk
        *(["MemorySwapMax=0"] if request["memory_bytes"] else []),
        *(f"DeviceAllow={device} rw" for device in devices(settings, request)),
        *(MOVED_PROPERTIES if moved else []),
    ]
    words = service(settings, unit, f"Baton attempt {attempt}", properties)
    if moved:
        return [*words, *program(settings, PLAIN_START, directory, "--hold", str(request["pid"]))]
    return [*words, *program(settings, START, directory, str(directory))]


def grace_ms(request: dict[str, object]) -> int:
    """Zero is no limit at all to systemd (systemd.service(5))."""
    asked = request["grace_ms"]
    assert isinstance(asked, int)
    return max(1, asked)


def devices(settings: Settings, request: dict[str, object]) -> list[str]:
    """What the attempt may open, beside what everybody may. Raises `Refused`."""
    gpus = request["gpus"]
    assert isinstance(gpus, list)
    return [*CONTROL_DEVICES, *gpu_devices(settings, gpus)] if gpus else []


def service(
    settings: Settings, unit: str, description: str, properties: Sequence[str]
) -> list[str]:
    """The beginning of a command that starts a service of the job's user."""
    values = (*FIXED_PROPERTIES, f"User={settings.job_user}", *properties)
    return [
        settings.systemd_run,
        "--quiet",
        f"--unit={unit}",
        f"--description={description}",
        *(f"--property={value}" for value in values),
        "--",
    ]


def program(settings: Settings, script: str, directory: Path, *arguments: str) -> list[str]:
    """Its end: the supervisor's program, with its complaints in that directory."""
    path = settings.state_directory / f"shim.{sys.implementation.cache_tag}.pyc"
    return [
        *("/bin/sh", "-c", script, os.fspath(directory)),
        *(settings.interpreter, "-I", "-S", os.fspath(path), *arguments),
    ]


def in_unit(settings: Settings, pid: int, unit: str) -> bool:
    """Whether the process is in the control group of that unit."""
    if not settings.agent_unit:
        return True
    try:
        groups = (settings.control_groups / str(pid) / "cgroup").read_text()
    except OSError:
        return False
    return any(line.endswith(f"/{unit}") for line in groups.splitlines())


def move(settings: Settings, request: dict[str, object]) -> None:
    """Give a process of the warm one's a unit of its own, of which nothing is left where that
    fails. Raises `Refused`, OSError, `subprocess.TimeoutExpired`."""
    pid, unit = request["pid"], unit_name(str(request["attempt"]))
    assert isinstance(pid, int)
    held = os.pidfd_open(pid)
    try:
        if not in_unit(settings, pid, WARM_UNIT):
            raise Refused(f"process {pid} is not of {WARM_UNIT}")
        run(command(settings, request))
        try:
            run([settings.busctl, *ATTACH, unit, "/", "1", str(pid)])
            if not in_unit(settings, pid, unit) or select.select([held], [], [], 0)[0]:
                raise Refused(f"process {pid} was not moved to {unit}")
        except (Refused, OSError, subprocess.TimeoutExpired):
            for words in (("kill", "--kill-whom=all", "--signal=KILL"), ("stop",), FORGET):
                undone = [settings.systemctl, *words, "--", unit]
                subprocess.run(undone, capture_output=True, timeout=RUN_S, check=False)
            raise
    finally:
        os.close(held)


def run(words: Sequence[str]) -> None:
    """Raises `Refused` with the last line that a command that fails has said, OSError, and
    `subprocess.TimeoutExpired`."""
    done = subprocess.run(words, capture_output=True, timeout=RUN_S, check=False)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise Refused(said[-1] if said else f"{words[0]} ended with status {done.returncode}")


def check_peer(settings: Settings, channel: socket.socket) -> None:
    """Raises `Refused` unless the agent itself is at the other end."""
    size = struct.calcsize("3i")
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, _ = struct.unpack("3i", credentials)
    if uid != settings.agent_uid:
        raise Refused(f"user {uid} is not the agent's")
    if not in_unit(settings, pid, settings.agent_unit):
        raise Refused(f"process {pid} is not of {settings.agent_unit}")


def answer(settings: Settings, channel: socket.socket) -> str:
    """Do what one connection asks for; returns why it was refused, or nothing."""
    channel.settimeout(RECEIVE_S)
    try:
        check_peer(settings, channel)
        message = channel.recv(REQUEST_BYTES_MAX + 1)
        if not 0 < len(message) <= REQUEST_BYTES_MAX:
            raise Refused(f"a request has 1 to {REQUEST_BYTES_MAX} bytes")
        perform(settings, parse(message))
    except (Refused, OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ""


def perform(settings: Settings, request: dict[str, object]) -> None:
    """Raises `Refused`, OSError and `subprocess.TimeoutExpired`."""
    ask = request["ask"]
    if ask == "move":
        move(settings, request)
        return
    words = command(settings, request)
    if ask == "warm":  # the one of before, which may hang
        before = [settings.systemctl, "stop", "--", WARM_UNIT]
        subprocess.run(before, capture_output=True, timeout=RUN_S, check=False)
    try:
        run(words)
    except Refused:
        if ask not in ("kill", "forget"):  # a unit that has gone needs no end
            raise


def serve(settings: Settings, listener: socket.socket) -> None:
    """One connection after the other, for ever: a start takes milliseconds."""
    while True:
        channel, _ = listener.accept()
        with channel:
            refused = answer(settings, channel)
            if refused:
                sys.stderr.write(f"refused: {refused}\n")
            try:
                channel.send(json.dumps({"refused": refused}).encode())
            except OSError:
                continue  # it has gone; the unit tells the next agent


def main(arguments: Sequence[str]) -> None:
    """Serve the socket that systemd has handed over."""
    parser = argparse.ArgumentParser(prog="baton-launcher", allow_abbrev=False)
    parser.add_argument("--agent-user", required=True)
    parser.add_argument("--agent-unit", default="")
    parser.add_argument("--job-user", required=True)
    parser.add_argument("--state-directory", type=Path, required=True)
    parser.add_argument("--systemd-run", default="systemd-run")
    parser.add_argument("--systemctl", default="systemctl")
    parser.add_argument("--busctl", default="busctl")
    parser.add_argument("--driver-directory", type=Path, default=DRIVER_DIRECTORY)
    given = parser.parse_args(arguments)
    if pwd.getpwnam(given.job_user).pw_uid == 0:
        parser.error("jobs do not run as root")
    settings = Settings(
        agent_uid=pwd.getpwnam(given.agent_user).pw_uid,
        agent_unit=given.agent_unit,
        job_user=given.job_user,
        state_directory=given.state_directory,
        systemd_run=given.systemd_run,
        systemctl=given.systemctl,
        busctl=given.busctl,
        driver_directory=given.driver_directory,
    )
    with socket.socket(fileno=FIRST_DESCRIPTOR) as listener:
        serve(settings, listener)


if __name__ == "__main__":
    main(sys.argv[1:])
