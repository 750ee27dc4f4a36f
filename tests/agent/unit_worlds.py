"""A launcher at its socket, with stand-ins for what it tells systemd by.

`systemd-run` writes its arguments down and executes the program, `busctl` and `systemctl` write
theirs down. What systemd makes of them, only systemd can show (`tests/systemd`).
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.processes import launcher
from agent.processes.forks import Warmth
from agent.processes.launcher import Settings
from agent.processes.units import Units

GPU = "GPU-6f1c0000-0000-0000-0000-000000000000"

# Keeps what it was given, one word a line, and is the unit: a process in a session of its own.
# systemd makes one dollar of two.
SYSTEMD_RUN = """#!{python}
import os, sys
directory = os.path.dirname(os.path.abspath(__file__))
with open(directory + "/run.txt", "a") as file:
    file.write("\\n".join(sys.argv[1:]) + "\\n")
words = [word.replace("$$", "$") for word in sys.argv[sys.argv.index("--") + 1:]]
if os.fork() == 0:
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.execv(words[0], words)
"""
# Says what the file beside it holds of a unit, and notes what it was asked.
SYSTEMCTL = """#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/asked.txt"
case "$1" in
  show) cat "$here/show.txt" ;;
  list-units) cat "$here/units.txt" ;;
esac
"""


# Notes what it was asked; fails, with a sentence, while the file beside it is there.
BUSCTL = """#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/bus.txt"
if test -e "$here/bus-fails"; then cat "$here/bus-fails" >&2; exit 1; fi
"""


class World:
    """A launcher at a socket, an agent's state directory, and what systemd was told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "state"
        for name, text in (
            ("systemd-run", SYSTEMD_RUN.format(python=sys.executable)),
            ("systemctl", SYSTEMCTL),
            ("busctl", BUSCTL),
        ):
            (root / name).write_text(text)
            (root / name).chmod(0o755)
        (root / "units.txt").touch()
        self.says("success")
        driver = root / "driver/0000:07:00.0"
        driver.mkdir(parents=True)
        (driver / "information").write_text(
            f"Model: \t\t NVIDIA H100\nGPU UUID: \t {GPU}\nDevice Minor: \t 3\n"
        )
        for path, minor in (("gi1/access", 30), ("gi1/ci0/access", 31)):
            access = root / "capabilities/gpu3/mig" / path
            access.parent.mkdir(parents=True, exist_ok=True)
            access.write_text(f"DeviceFileMinor: {minor}\nDeviceFileMode: 292\n")
        self.settings = Settings(
            agent_uid=os.getuid(),
            agent_unit="",
            job_user="baton-job",
            state_directory=self.state,
            systemd_run=str(root / "systemd-run"),
            systemctl=str(root / "systemctl"),
            busctl=str(root / "busctl"),
            driver_directory=root / "driver",
        )
        self.units = self.units_of(None)

    def units_of(self, warmth: Warmth | None) -> Units:
        path = self.root / "launcher.sock"
        return Units(path, systemctl=self.settings.systemctl, warmth=warmth)

    def says(self, result: str, memory: str = "infinity") -> None:
        text = f"Result={result}\nMemoryMax={memory}\nActiveState=inactive\n"
        (self.root / "show.txt").write_text(text)

    def run_words(self) -> list[str]:
        return (self.root / "run.txt").read_text().splitlines()

    def asked(self) -> list[str]:
        return self._lines("asked.txt")

    def bus(self) -> list[str]:
        return self._lines("bus.txt")

    def _lines(self, name: str) -> list[str]:
        path = self.root / name
        return path.read_text().splitlines() if path.exists() else []


@contextmanager
def launching(world: World) -> Iterator[World]:
    """With the launcher as a process of its own, its socket on descriptor 3, as systemd does it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(world.root / "launcher.sock"))
        listener.listen()
        program = (
            "import os, runpy, sys; os.dup2(int(sys.argv[1]), 3); sys.argv = sys.argv[2:];"
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        user = "nobody" if os.getuid() == 0 else os.environ["USER"]
        process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", "-c", program, str(listener.fileno())),
                launcher.__file__,
                *("--agent-user", "root" if os.getuid() == 0 else user, "--job-user", user),
                *("--state-directory", str(world.state)),
                *("--systemd-run", world.settings.systemd_run),
                *("--systemctl", world.settings.systemctl),
                *("--busctl", world.settings.busctl),
                *("--driver-directory", str(world.settings.driver_directory)),
            ],
            pass_fds=[listener.fileno()],
        )
    yield world
    process.kill()
    process.wait()
