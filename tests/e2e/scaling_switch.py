"""What switches a node of `make demo-scaling` on and off: a site's program, by Slurm's contract.

Problem: a fleet on one machine has no power supplies. So a node's power is its processes: *on*
starts its agent as a machine does that has booted, *off* asks the agent to leave, and then takes
away all that is left of the node but its disk. `written` makes the two scripts that the driver
`programs` calls with the nodes as `n[1-3]`; what they do stands here.

    python -m tests.e2e.scaling_switch resume|suspend DIRECTORY RUNTIME_DIRECTORY NODES
"""

import json
import os
import shlex
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from coordinator.capacity import hostlist
from tests.e2e import guardian
from tests.e2e.cluster import ROOT, Cluster, Launch

POLL_S = 0.05
LEAVE_POLLS_MAX = 100


def describe(cluster: Cluster, node: str, launch: Launch) -> None:
    """How a node is started; before it is."""
    path = cluster.directory / f"{node}.launch"
    path.write_text(json.dumps(asdict(launch)), "utf-8")


def written(cluster: Cluster) -> dict[str, str]:
    """Write both scripts; returns fields of a `[capacity]` table."""
    found = {}
    # Whoever ends the cluster ends a script that is about to start one of its agents as well.
    mark = f"export {guardian.MARK}={shlex.quote(f'{cluster.runtime_directory}/')}"
    for verb in ("resume", "suspend"):
        script = cluster.directory / verb
        words = [sys.executable, "-m", "tests.e2e.scaling_switch", verb]
        words += [str(cluster.directory), str(cluster.runtime_directory)]
        script.write_text(
            f'#!/bin/sh\n{mark}\ncd {shlex.quote(str(ROOT))} && exec {shlex.join(words)} "$1"\n',
            "utf-8",
        )
        script.chmod(0o700)
        found[f"{verb}_program"] = str(script)
    return found


def resume(directory: Path, node: str) -> None:
    """Whoever is on stays as it is."""
    pid_path = directory / f"{node}.pid"
    if _lives(pid_path):
        return
    launch = Launch(**json.loads((directory / f"{node}.launch").read_text("utf-8")))
    pid_path.write_text(str(launch.start().pid), "ascii")


def suspend(directory: Path, runtime_directory: Path, node: str) -> None:
    """Whoever is off stays as it is."""
    pid_path = directory / f"{node}.pid"
    pause = threading.Event()
    if _lives(pid_path):
        os.kill(int(pid_path.read_text("ascii")), signal.SIGTERM)
    for _ in range(LEAVE_POLLS_MAX):
        if not _lives(pid_path):
            break
        pause.wait(POLL_S)
    guardian.end(runtime_directory / node, directory / node)
    pid_path.unlink(missing_ok=True)


def _lives(pid_path: Path) -> bool:
    """By its number and its command line, so that nobody else's process is meant."""
    try:
        pid = pid_path.read_text("ascii")
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return os.fsencode(f"/{pid_path.stem}.toml") in words


def main() -> int:
    verb, directory, runtime_directory, nodes = sys.argv[1:]
    for node in hostlist.read(nodes):
        if verb == "resume":
            resume(Path(directory), node)
        else:
            suspend(Path(directory), Path(runtime_directory), node)
    return 0


if __name__ == "__main__":
    sys.exit(main())
