"""A minimal Debian that systemd boots in a container, for what no process of ours can show.

Problem: a unit that `systemd-analyze verify` likes may still not start, and what systemd does to a
service (credentials, watchdog, control groups, an upgrade under it) is seen only where systemd is
the first process. The machine that runs the tests must not change for it.

How: mmdebstrap builds the root once and keeps it in build/; systemd-nspawn boots it with a writable
layer in memory, so every boot starts from the same files and leaves none. It is not registered, has
no network but its loopback, and gets the unified hierarchy of control groups, which the units and
the agent expect, also where the host boots with the old one. Commands enter its namespaces.
`emulated.py` boots the same root with a kernel of its own; `Machine` is what is asked of either.
"""

import abc
import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.tidy.source import ROOT

BUILD = ROOT / "build" / "deb"
SUITE = "bookworm"
PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "procps")
# What a boot needs, and the Debian package that has it.
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "systemd-nspawn": "systemd-container",
    "nsenter": "util-linux",
    "dpkg-deb": "dpkg",
}
PACKAGES_AT = "/mnt"  # where the machine sees the built packages
WAIT_S_MAX = 300.0  # for whatever is waited for; a boot takes 6 s on two cores, emulated 20 s
COMMAND_S_MAX = 90.0
POLL_S = 0.1


def why_not() -> str:
    """The sentence that says why no machine can be booted here; empty when one can."""
    missing = missing_packages(TOOLS)
    if missing:
        return f"no machine can be booted here. Run: sudo apt-get install {missing}"
    return "" if os.geteuid() == 0 else "booting a machine needs root: sudo make systemd-test"


def missing_packages(tools: Mapping[str, str]) -> str:
    """The Debian packages of those tools that are not here."""
    return " ".join(package for tool, package in tools.items() if shutil.which(tool) is None)


def built_root(name: str = "root", packages: Sequence[str] = PACKAGES) -> Path:
    """The root directory of a machine, built if it is not there. It is never written to."""
    root = BUILD / name
    if not root.exists():
        unfinished = BUILD / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        BUILD.mkdir(parents=True, exist_ok=True)
        wanted = f"--include={','.join(packages)}"
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase", wanted, SUITE, str(unfinished)],
            check=True,
        )
        unfinished.rename(root)
    return root


def built_package(version: str) -> Path:
    """The package of this tree under that version."""
    script = ROOT / "systemd" / "debian" / "build.sh"
    command = [str(script), str(BUILD), version]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.split()[-1])


def wait_until(holds: Callable[[], bool], what: str, *, pause_s: float = POLL_S) -> None:
    """Look again and again. Fails when it has not become so in good time."""
    deadline_s, pause = time.monotonic() + WAIT_S_MAX, threading.Event()
    while not holds():
        assert time.monotonic() < deadline_s, f"{what}: not within {WAIT_S_MAX:.0f} s"
        pause.wait(pause_s)


class Machine(abc.ABC):
    """One that runs."""

    __slots__ = ()

    @abc.abstractmethod
    def ask(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in it, as root."""

    def run(self, *words: str, stdin: str = "") -> str:
        """What the command prints. Fails when it fails."""
        done = self.ask(*words, stdin=stdin)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def write(self, path: str, text: str, mode: str = "0644") -> None:
        self.run("install", "-D", "-m", mode, "/dev/stdin", path, stdin=text)

    def property(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def main_pid(self, unit: str) -> int:
        return int(self.property(unit, "MainPID"))

    def journal(self, *matches: str) -> str:
        return self.run("journalctl", "--no-pager", "--quiet", *matches)

    def has_booted(self) -> bool:
        return self.ask("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")


@dataclass(frozen=True, slots=True)
class Container(Machine):
    """`leader_pid` is its first process, as this machine counts."""

    leader_pid: int

    def ask(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        entered = ["nsenter", f"--target={self.leader_pid}", "--all", "--wdns=/", *words]
        return subprocess.run(
            entered, input=stdin, capture_output=True, text=True, timeout=COMMAND_S_MAX, check=False
        )


@contextlib.contextmanager
def booted(name: str, shown: Sequence[Path] = ()) -> Iterator[Machine]:
    """A machine from its boot to its end, by its own process id. It sees the directories `shown`
    where they are here, and cannot write to them."""
    environment = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
    command = [
        "systemd-nspawn",
        f"--directory={built_root()}",
        f"--machine={name}",
        f"--bind-ro={BUILD}:{PACKAGES_AT}",
        *(f"--bind-ro={path}" for path in shown),
        *("--volatile=overlay", "--register=no", "--keep-unit", "--private-network", "--boot"),
        *("--console=pipe", "--quiet"),
    ]
    console = BUILD / f"{name}.console"
    with open(console, "wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        machine = Container(_leader_pid(process, console))
        wait_until(machine.has_booted, "the machine boots")
        yield machine
    finally:
        # With its first process all others end, and nspawn takes the mounts away. An orderly end
        # would wait for jobs, as long as their grace.
        for pid in _children(process.pid):
            os.kill(pid, signal.SIGKILL)
        try:
            process.wait(timeout=COMMAND_S_MAX)
        finally:
            process.kill()
            process.wait()


def _leader_pid(process: subprocess.Popen[bytes], console: Path) -> int:
    def has_child() -> bool:
        assert process.poll() is None, console.read_text(errors="replace")
        return bool(_children(process.pid))

    wait_until(has_child, "systemd-nspawn starts the machine")
    return _children(process.pid)[0]


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
