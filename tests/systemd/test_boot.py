"""The Debian package in a machine that systemd boots: `make systemd-test`.

Coordinator and agent on the machine's loopback, under mutual TLS from files that only root can
read. Jobs ask for no GPU, since the machine has none. Limits are seen as systemd was told them; the
controllers that enforce them may belong to the host.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.certificates import Authority
from tests.systemd.machine import Machine, booted, built_package, wait_until, why_not
from tests.systemd.operator import (
    AGENT,
    COORDINATOR,
    DRIVER,
    MEMORY_BYTES,
    NODE,
    SOCKET,
    WARM,
    baton,
    configure,
    install,
    job_of,
    running,
    submit,
)

VERSION, LATER_VERSION = "0.1.0~test1", "0.1.0~test2"

pytestmark = [
    pytest.mark.boot,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


def adoptions(machine: Machine, unit: str) -> int:
    event = ("BATON_EVENT=attempt.adopted", f"BATON_JOB={job_of(unit)}")
    return len(machine.journal(*event, "--output=json").splitlines())


@pytest.fixture(scope="module")
def packages() -> tuple[Path, Path]:
    return built_package(VERSION), built_package(LATER_VERSION)


@pytest.fixture(scope="module")
def machine(
    packages: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """With coordinator and agent, both enabled and running."""
    with booted("baton-test") as here:
        install(here, packages[0])
        configure(here, Authority(tmp_path_factory.mktemp("tls") / "fleet"))
        here.run("systemctl", "enable", "--now", COORDINATOR, AGENT)
        wait_until(lambda: " up " in baton(here, "nodes"), "the node comes up")
        yield here


def test_nothing_starts_before_it_is_enabled(packages: tuple[Path, Path]) -> None:
    with booted("baton-test-fresh") as fresh:
        install(fresh, packages[0])
        for unit in (COORDINATOR, AGENT, SOCKET):
            assert fresh.property(unit, "UnitFileState") == "disabled"
            assert fresh.property(unit, "ActiveState") == "inactive"
        # without a certificate, from the files as they come
        fresh.run("systemctl", "start", DRIVER)
        assert fresh.property(AGENT, "ActiveState") == "inactive"
        fresh.run("systemctl", "start", COORDINATOR, AGENT)
        wait_until(lambda: " up " in fresh.run("baton", "nodes"), "the node comes up")
        # of ours alone: one of Debian's own may fail in a container, which boots all the same
        assert fresh.run("systemctl", "list-units", "--failed", "--no-legend", "baton-*") == ""
        install(fresh, packages[0])  # twice is once


def test_lines_have_the_boot_id_although_the_kernels_is_hidden(packages: tuple[Path, Path]) -> None:
    with booted("baton-test-lines") as here:
        install(here, packages[0])
        here.run("systemctl", "start", COORDINATOR)
        event = ("BATON_EVENT=coordinator.started", "--output=json")
        wait_until(lambda: here.journal(*event) != "", "the journal has the line")
        entry = json.loads(here.journal(*event))
        said = json.loads(entry["BATON_LINE"])["boot_id"]
        assert said.replace("-", "") == entry["_BOOT_ID"]


def test_trainers_inside_outlive_their_agent_too(packages: tuple[Path, Path]) -> None:
    with booted("baton-test-inside") as inside:
        install(inside, packages[0])
        inside.write("/etc/baton/agent.toml", "job_units = false\n")
        drop_in = f"/etc/systemd/system/{AGENT}.d/50-trainers-inside.conf"
        inside.run("install", "-D", "/usr/share/baton/trainers-inside.conf", drop_in)
        inside.run("systemctl", "daemon-reload")
        inside.run("systemctl", "start", COORDINATOR, AGENT)
        assert inside.property(AGENT, "MemoryDenyWriteExecute") == "no"
        inside.run("baton", "submit", "--workdir", "", "--", "/bin/sleep", "1000")
        wait_until(lambda: inside.ask("pgrep", "--exact", "sleep").returncode == 0, "the job runs")
        pid = inside.run("pgrep", "--exact", "sleep")
        assert AGENT in inside.run("cat", f"/proc/{pid.strip()}/cgroup")
        inside.run("systemctl", "restart", AGENT)
        wait_until(lambda: adoptions(inside, "baton-job-1.1.service") == 1, "it is adopted")
        assert inside.run("pgrep", "--exact", "sleep") == pid


def test_a_built_in_trainer_starts_warm_in_a_unit_of_its_own(packages: tuple[Path, Path]) -> None:
    with booted("baton-test-warm") as here:
        install(here, packages[0])
        # In place of torch: modules that say where they were loaded.
        here.write("/srv/warm/trainers/__init__.py", "")
        here.write("/srv/warm/trainers/warm.py", "import os\nPID = os.getpid()\n")
        program = (
            "import time, trainers.warm as w\nprint('from', w.PID, flush=True)\ntime.sleep(999)"
        )
        here.write("/srv/warm/trainers/transfer.py", program)
        names = ("model", "train_data", "evaluation_data")
        settings = "".join(f'{name} = "/srv/{name}"\n' for name in names)
        here.write("/srv/warm/transfer.toml", f"steps = 1\n{settings}")
        path = 'trainer_environment = { PYTHONPATH = "/srv/warm" }\n'
        here.write("/etc/baton/agent.toml", path)
        here.run("systemctl", "start", COORDINATOR, AGENT)
        ready = ("BATON_EVENT=fork_server.ready", "--output=cat")
        wait_until(lambda: here.journal(*ready) != "", "the warm process is ready")
        server = here.main_pid(WARM)
        assert server > 0

        words = ("--trainer", "transfer", "--config", "/srv/warm/transfer.toml", "--workdir", "")
        here.run("baton", "submit", *words, f"--memory={MEMORY_BYTES}")
        said = f"from {server}"
        wait_until(lambda: said in here.ask("baton", "logs", "1").stdout, "the trainer runs")
        unit = "baton-job-1.1.service"
        (pid,) = here.run("pgrep", "--full", "trainers.transfer").split()
        assert here.run("cat", f"/proc/{pid}/cgroup").splitlines()[-1].endswith(f"/{unit}")
        assert here.property(unit, "MemoryMax") == str(MEMORY_BYTES)
        assert here.property(unit, "TasksMax") == "65536"
        assert here.property(unit, "DevicePolicy") == "closed"
        assert here.property(unit, "DeviceAllow") == ""
        assert here.property(unit, "TimeoutStopUSec") == "2min"
        status = here.run("cat", f"/proc/{pid}/status")
        assert "NoNewPrivs:\t1" in status
        assert "CapBnd:\t0000000000000000" in status
        assert here.run("ps", "-o", "user=", "-p", pid).strip() == "baton"
        entered = ("nsenter", f"--target={pid}", "--mount")
        assert here.ask(*entered, "test", "-S", "/run/baton-launcher/launcher.sock").returncode == 1

        # It outlives the agent and the process that it came from.
        here.run("systemctl", "restart", AGENT)
        wait_until(lambda: adoptions(here, unit) == 1, "the restarted agent adopts the job")
        wait_until(lambda: len(here.journal(*ready).splitlines()) == 2, "another one is ready")
        assert here.main_pid(WARM) not in (0, server)
        assert here.run("pgrep", "--full", "trainers.transfer").split() == [pid]
        here.run("systemctl", "stop", unit)  # as at a shutdown

        def ended_by() -> object:
            return json.loads(here.run("baton", "--json", "job", "1"))["attempts"][0]["signal"]

        wait_until(lambda: ended_by() == signal.SIGTERM, "the trainer gets SIGTERM")

        here.run("baton", "submit", *words)
        other = "baton-job-2.1.service"
        wait_until(lambda: here.property(other, "ActiveState") == "active", "the next one runs")
        here.run("dpkg", "--remove", "gpu-baton")
        for name in (AGENT, WARM, unit, other):
            assert here.property(name, "ActiveState") == "inactive"
        assert here.ask("pgrep", "--uid", "baton").stdout == ""


def test_both_tell_systemd_that_they_are_ready(machine: Machine) -> None:
    for unit in (COORDINATOR, AGENT):
        assert machine.property(unit, "ActiveState") == "active"
        assert machine.property(unit, "UnitFileState") == "enabled"
        assert machine.property(unit, "User") == "baton"
        assert machine.property(unit, "NRestarts") == "0"
    assert machine.property(SOCKET, "ActiveState") == "active"


def test_keys_are_credentials_and_nobody_elses(machine: Machine) -> None:
    entered = ("systemd-run", "--quiet", "--pipe", "--wait", "--uid=baton", "--")
    refused = machine.ask(*entered, "cat", "/etc/baton/tls/agent/key.pem")
    assert "Permission denied" in refused.stderr
    where = f"/proc/{machine.main_pid(AGENT)}/environ"
    variables = machine.run("cat", where).split("\0")
    assert f"CREDENTIALS_DIRECTORY=/run/credentials/{AGENT}" in variables
    # and without a certificate of the fleet nothing is answered
    assert machine.ask("baton", "nodes").returncode == 3


def test_a_job_is_a_unit_of_its_own(machine: Machine) -> None:
    unit = running(machine)
    assert machine.property(unit, "MemoryMax") == str(MEMORY_BYTES)
    assert machine.property(unit, "TasksMax") == "65536"
    assert machine.property(unit, "DevicePolicy") == "closed"
    assert machine.property(unit, "User") == "baton"
    assert machine.property(unit, "ControlGroup") == f"/system.slice/{unit}"
    baton(machine, "cancel", job_of(unit))
    wait_until(lambda: machine.property(unit, "ActiveState") == "inactive", f"{unit} ends")


def test_the_exit_of_a_job_is_kept(machine: Machine) -> None:
    unit = submit(machine, "exit 3")
    words = ("--json", "job", job_of(unit))
    wait_until(lambda: '"exit status 3' in baton(machine, *words), "the job fails")


def test_a_job_does_not_see_the_launcher(machine: Machine) -> None:
    machine.run("test", "-S", "/run/baton-launcher/launcher.sock")
    unit = submit(machine, "test -e /run/baton-launcher/launcher.sock && exit 5; exit 4")
    words = ("--json", "job", job_of(unit))
    wait_until(lambda: '"exit status ' in baton(machine, *words), "the job fails")
    assert '"exit status 4' in baton(machine, *words)


def test_the_journal_has_fields(machine: Machine) -> None:
    unit = running(machine)
    event = ("BATON_EVENT=attempt.started", f"BATON_JOB={job_of(unit)}", f"_SYSTEMD_UNIT={AGENT}")
    (line,) = machine.journal(*event, "--output=json").splitlines()
    entry = json.loads(line)
    assert entry["BATON_NODE"] == NODE
    assert entry["BATON_ATTEMPT"] == f"{job_of(unit)}.1"
    assert entry["SYSLOG_IDENTIFIER"] == "baton-agent"
    assert json.loads(entry["BATON_LINE"])["pid"] > 0
    baton(machine, "cancel", job_of(unit))


def test_an_agent_that_stands_still_is_killed_and_adopts_its_jobs(machine: Machine) -> None:
    unit = running(machine)
    job_pid, agent_pid = machine.main_pid(unit), machine.main_pid(AGENT)
    machine.run("kill", "-STOP", str(agent_pid))
    wait_until(lambda: adoptions(machine, unit) == 1, "the next agent adopts the job")
    assert "Watchdog timeout" in machine.journal(f"--unit={AGENT}")
    assert machine.property(AGENT, "NRestarts") == "1"
    assert machine.main_pid(AGENT) not in (0, agent_pid)
    assert machine.main_pid(unit) == job_pid
    baton(machine, "cancel", job_of(unit))


def test_a_restart_and_an_upgrade_leave_trainers_alone(
    machine: Machine, packages: tuple[Path, Path]
) -> None:
    unit = running(machine)
    job_pid = machine.main_pid(unit)
    machine.run("systemctl", "restart", AGENT)
    wait_until(lambda: adoptions(machine, unit) == 1, "the restarted agent adopts the job")
    before = machine.main_pid(AGENT)
    install(machine, packages[1])
    wait_until(lambda: adoptions(machine, unit) == 2, "the upgraded agent adopts the job")
    assert machine.main_pid(AGENT) != before
    assert LATER_VERSION in machine.run("dpkg-query", "--show", "gpu-baton")
    assert machine.main_pid(unit) == job_pid
    assert f'node = "{NODE}"' in machine.run("cat", "/etc/baton/agent.toml")
    baton(machine, "cancel", job_of(unit))
    wait_until(lambda: machine.property(unit, "ActiveState") == "inactive", f"{unit} ends")


def test_a_driver_that_is_loaded_later_starts_the_agent_anew(machine: Machine) -> None:
    unit = running(machine)
    job_pid, agent_pid = machine.main_pid(unit), machine.main_pid(AGENT)
    machine.run("systemctl", "start", DRIVER)
    wait_until(lambda: adoptions(machine, unit) == 1, "the next agent adopts the job")
    assert machine.main_pid(AGENT) not in (0, agent_pid)
    assert machine.main_pid(unit) == job_pid
    baton(machine, "cancel", job_of(unit))


def test_removal_keeps_state_and_purge_takes_it(machine: Machine) -> None:
    unit = running(machine)
    machine.run("dpkg", "--remove", "gpu-baton")
    for name in (AGENT, COORDINATOR, SOCKET, unit):
        assert machine.property(name, "ActiveState") == "inactive"
    assert machine.ask("pgrep", "--uid", "baton").stdout == ""
    machine.run("test", "-s", "/var/lib/baton/coordinator/baton.sqlite3")
    machine.run("test", "-s", "/etc/baton/tls/agent/key.pem")
    machine.run("dpkg", "--purge", "gpu-baton")
    left = machine.run("find", "/", "/run", "-xdev", "-path", "*baton*")
    assert left.splitlines() == []
