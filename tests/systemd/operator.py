"""What a person does on a machine of the tests: install the package, set it up, submit jobs.

Coordinator and agent on the machine's loopback, under mutual TLS from files that only root can
read.
"""

import json
from pathlib import Path

from tests.e2e.certificates import Authority
from tests.systemd.machine import PACKAGES_AT, Machine, wait_until

AGENT = "baton-agent.service"
COORDINATOR = "baton-coordinator.service"
DRIVER = "baton-agent-driver.service"
LAUNCHER = "baton-launcher.service"
SOCKET = "baton-launcher.socket"
WARM = "baton-warm.service"
NODE = "n1"
MEMORY_BYTES = 256 * 1024**2
PROGRAMS_TLS = "".join(
    f'tls_{part} = "$CREDENTIALS_DIRECTORY/tls_{part}.pem"\n' for part in ("cert", "key", "ca")
)
CLIENT = "/etc/operator"


def install(machine: Machine, package: Path) -> None:
    machine.run("dpkg", "--install", f"{PACKAGES_AT}/{package.name}")


def configure(machine: Machine, authority: Authority) -> None:
    """Both programs, and the command line, with certificates; without enabling anything."""
    for program, name in (("agent", NODE), ("coordinator", "coordinator")):
        files = authority.issue(name)
        for part in ("cert", "key", "ca"):
            text = getattr(files, part).read_text()
            machine.write(f"/etc/baton/tls/{program}/{part}.pem", text, "0600")
    files = authority.issue("operator")
    for part in ("cert", "key", "ca"):
        machine.write(f"{CLIENT}/{part}.pem", getattr(files, part).read_text(), "0600")
    machine.write("/etc/baton/agent.toml", f'node = "{NODE}"\n{PROGRAMS_TLS}')
    machine.write("/etc/baton/coordinator.toml", PROGRAMS_TLS)


def baton(machine: Machine, *words: str) -> str:
    environment = [
        f"BATON_TLS_{part.upper()}={CLIENT}/{part}.pem" for part in ("cert", "key", "ca")
    ]
    return machine.run("env", *environment, "baton", *words)


def submit(machine: Machine, script: str, *options: str) -> str:
    """Returns the name of the unit of its first attempt."""
    memory = f"--memory={MEMORY_BYTES}"
    words = ("--json", memory, "--workdir", "", *options, "--", "/bin/sh", "-c", script)
    job = json.loads(baton(machine, "submit", *words))["job_id"]
    return f"baton-job-{job}.1.service"


def job_of(unit: str) -> str:
    return unit.removeprefix("baton-job-").partition(".")[0]


def running(machine: Machine, script: str = "exec sleep 1000") -> str:
    """A unit whose job goes on until it is told to end."""
    unit = submit(machine, script)
    event = ("BATON_EVENT=attempt.started", f"BATON_JOB={job_of(unit)}", f"_SYSTEMD_UNIT={AGENT}")
    wait_until(lambda: machine.journal(*event) != "", f"{unit} starts")
    return unit
