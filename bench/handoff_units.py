"""A trainer that is a unit of systemd is killed: from there to its next step, warm and cold.

The package runs on the minimal Debian of `make systemd-test`, with coordinator and one agent, and
a built-in fine-tuning with this tree's own torch, shown to the machine where it lies. The trainer
gets SIGKILL, as from a kernel without memory, and its next attempt starts on the same node: *warm*
is forked from `baton-warm.service` and moved to a service of its own, *cold* imports torch and
transformers itself. Times are the coordinator's history's. Needs root and systemd-nspawn.
"""

import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from bench import handoff, report
from tests.e2e.cluster import ROOT
from tests.systemd.machine import Machine, booted, built_package, wait_until, why_not
from tests.systemd.operator import AGENT, COORDINATOR, install

VERSION = "0.1.0~bench"
CONFIGURATION = "/srv/finetune.json"
PROCESS = "trainers.finetune"
WARM, COLD = "warm", "cold"


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    if reason := why_not():
        report.say(f"handoff_units: {reason}")
        return 1
    handoff.prepare()
    package = built_package(VERSION)
    repetitions = handoff.REPETITIONS_QUICK if asked.quick else handoff.REPETITIONS
    rows: list[report.Row] = []
    for name, warm, goal_s in ((WARM, True, handoff.TRAINER_GOAL_S), (COLD, False, None)):
        started, stepped = measure(package, repetitions, warm=warm)
        rows.append(report.row_of(f"{name}: killed to its program running again", started, "s"))
        rows.append(report.row_of(f"{name}: killed to first new step", stepped, "s", goal=goal_s))
    report.show("A trainer that is a unit, killed", rows, asked)
    return 0


def measure(package: Path, repetitions: int, *, warm: bool) -> tuple[list[float], list[float]]:
    """Seconds from each kill to the start of the next attempt, and to its first step."""
    base = Path(sys.base_prefix)
    with booted("baton-bench", (ROOT, *([base] if base.parts[1] != "usr" else []))) as machine:
        install(machine, package)
        machine.run("chmod", "o+x", "/root")  # where an interpreter may lie; all of it is read-only
        settings = (
            f'trainer_python = "{sys.executable}"\nwarm_start = {str(warm).lower()}\n'
            'trainer_environment = { OMP_NUM_THREADS = "1" }\n'
        )
        machine.write("/etc/baton/agent.toml", settings)
        configuration = handoff.job_spec(1).trainer_config_json
        machine.write(CONFIGURATION, configuration)
        machine.run("systemctl", "start", COORDINATOR, AGENT)
        ready = ("BATON_EVENT=fork_server.ready", "--output=cat")
        wait_until(lambda: not warm or machine.journal(*ready) != "", "the warm process is ready")
        trainer = ("--trainer", "finetune", "--config", CONFIGURATION, "--workdir", "")
        machine.run("baton", "submit", *trainer, "--max-restarts", "1000")
        found = [killed(machine, number) for number in range(1, repetitions + 1)]
    return [started for started, _ in found], [stepped for _, stepped in found]


def killed(machine: Machine, epoch: int) -> tuple[float, float]:
    """Kill that attempt, once it has kept a checkpoint; how long until the next one starts and
    steps."""
    attempt = f"1.{epoch + 1}"

    def has_committed() -> bool:
        job = json.loads(machine.run("baton", "--json", "job", "1"))
        return int((job.get("checkpoint") or {}).get("epoch", 0)) == epoch

    wait_until(has_committed, f"attempt {epoch} keeps a checkpoint")
    (pid,) = machine.run("pgrep", "--full", PROCESS).split()
    killed_s = time.time()
    machine.run("kill", "-KILL", pid)
    wait_until(lambda: "first_step" in stamps(machine, attempt), f"{attempt} steps")
    at = stamps(machine, attempt)
    return at["attempt.started"] - killed_s, at["first_step"] - killed_s


def stamps(machine: Machine, attempt: str) -> dict[str, float]:
    """When what happened to an attempt, seconds since 1970."""
    events = map(json.loads, machine.run("baton", "--json", "events", "1").splitlines())
    return {
        event["message"] if event["name"] == "attempt.milestone" else event["name"]: (
            datetime.fromisoformat(event["time"]).timestamp()
        )
        for event in events
        if event["attempt"] == attempt
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
