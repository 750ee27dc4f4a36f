"""Limits that really hold, under a kernel of their own: `make vm-test`.

One boot for all. The machine has two GPUs as NVML's stand-in shows them, with what the driver tells
in /proc and with device nodes; behind each node is a virtual terminal, a device that systemd allows
nobody unasked. So the launcher, systemd and the kernel decide as on a real node.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.certificates import Authority
from tests.fakenvml.build import SONAME, build, describe, h100
from tests.systemd import inside
from tests.systemd.emulated import emulated, why_not
from tests.systemd.machine import PACKAGES_AT, Machine, built_package, wait_until
from tests.systemd.operator import (
    AGENT,
    COORDINATOR,
    LAUNCHER,
    MEMORY_BYTES,
    NODE,
    baton,
    configure,
    install,
    job_of,
    running,
    submit,
)

VERSION = "0.1.0~test1"
GPUS = h100(2, node=NODE)
GPU_DEVICES = {gpu.uuid: f"/dev/nvidia{minor}" for minor, gpu in enumerate(GPUS)}
CONTROL_DEVICE = "/dev/nvidiactl"
DEVICES = (*GPU_DEVICES.values(), CONTROL_DEVICE)
TERMINALS_MAJOR, TERMINALS_MINOR = 4, 40  # as far from the console's own as a keyboard goes
GPUS_FILE = "gpus.txt"
INSIDE = f"/usr/bin/python3 -I {PACKAGES_AT}/{Path(inside.__file__).name} {' '.join(DEVICES)}"
OPENED, REFUSED = "opened", "EPERM"
QUOTA_PERCENT = 50
PERIOD_US = 100_000  # of the kernel, and systemd leaves it so
PERIODS_MIN = 50
TASKS_MAX = 40  # the supervisor's own, and some more
# A built-in trainer in place of ours, and what it is forked from: it becomes the job's script.
TRAINERS = {
    "__init__.py": "",
    "warm.py": "",
    "transfer.py": "import os\nos.execv('/bin/sh', ['sh', '-c', os.environ['SCRIPT']])\n",
}
CONFIGURATION = """steps = 1
model = "/srv/model"
train_data = "/srv/train"
evaluation_data = "/srv/evaluation"
"""
TRAINER_FILE = "transfer.toml"

Submit = Callable[..., str]

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


def give_gpus(machine: Machine) -> None:
    """The library, the driver's files and the devices."""
    library = f"/usr/lib/x86_64-linux-gnu/{SONAME}"
    machine.run("install", "-m", "0644", f"{PACKAGES_AT}/{SONAME}", library)
    machine.run("ldconfig")
    where = f"[Service]\nEnvironment=BATON_FAKENVML_FILE={PACKAGES_AT}/{GPUS_FILE}\n"
    machine.write(f"/etc/systemd/system/{AGENT}.d/50-gpus.conf", where)
    for minor, gpu in enumerate(GPUS):
        facts = f"GPU UUID: \t {gpu.uuid}\nDevice Minor: \t {minor}\n"
        machine.write(f"/run/driver/nvidia/gpus/0000:0{minor}:00.0/information", facts)
    told = "[Service]\nBindReadOnlyPaths=/run/driver:/proc/driver\n"
    machine.write(f"/etc/systemd/system/{LAUNCHER}.d/50-gpus.conf", told)
    for place, device in enumerate(DEVICES):
        numbers = (str(TERMINALS_MAJOR), str(TERMINALS_MINOR + place))
        machine.run("mknod", "--mode=0666", device, "c", *numbers)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """With coordinator and agent running."""
    package = built_package(VERSION)
    files = tmp_path_factory.mktemp("files")
    for file in (package, build() / SONAME, Path(inside.__file__)):
        shutil.copy(file, files)
    describe(GPUS, files / GPUS_FILE)
    (files / TRAINER_FILE).write_text(CONFIGURATION)
    (files / "trainers").mkdir()
    for name, text in TRAINERS.items():
        (files / "trainers" / name).write_text(text)
    (files / GPUS_FILE).chmod(0o644)  # the agent and jobs read them, and are not root there
    files.chmod(0o755)
    with emulated("baton-test-vm", files) as here:
        install(here, package)
        configure(here, Authority(tmp_path_factory.mktemp("tls") / "fleet"))
        give_gpus(here)
        settings = here.run("cat", "/etc/baton/agent.toml")
        path = f'trainer_environment = {{ PYTHONPATH = "{PACKAGES_AT}" }}\n'
        here.write("/etc/baton/agent.toml", settings + path)
        here.run("systemctl", "enable", "--now", COORDINATOR, AGENT)
        wait_until(lambda: " up " in baton(here, "nodes"), "the node comes up")
        ready = ("BATON_EVENT=fork_server.ready", "--output=cat")
        wait_until(lambda: here.journal(*ready) != "", "the warm process is ready")
        yield here


def submit_warm(machine: Machine, script: str, *options: str) -> str:
    """As `submit`, of what is forked from a process that has been there before."""
    memory = f"--memory={MEMORY_BYTES}"
    trainer = ("--trainer=transfer", f"--config={PACKAGES_AT}/{TRAINER_FILE}", "--workdir", "")
    words = ("--json", memory, *trainer, f"--env=SCRIPT={script}", *options)
    return f"baton-job-{json.loads(baton(machine, 'submit', *words))['job_id']}.1.service"


either = pytest.mark.parametrize("submitted", [submit, submit_warm], ids=["cold", "warm"])


def ended(machine: Machine, unit: str) -> str:
    """What the command line says of its job, once it has ended."""
    said = ""

    def has_ended() -> bool:
        nonlocal said
        said = baton(machine, "--json", "job", job_of(unit))
        return json.loads(said)["phase"] in ("succeeded", "failed", "cancelled")

    wait_until(has_ended, f"the job of {unit} ends")
    return said


def found_inside(machine: Machine, submitted: Submit, *options: str) -> dict[str, object]:
    unit = submitted(machine, f"exec {INSIDE}", *options)
    ended(machine, unit)
    output = baton(machine, "logs", job_of(unit))
    return dict(json.loads(output))


def from_group(machine: Machine, unit: str, script: str) -> str:
    """What root finds, who may do everything, as a process of that unit's control group."""
    group = f"/sys/fs/cgroup{machine.property(unit, 'ControlGroup')}"
    return machine.run("/bin/sh", "-c", f"echo $$ > {group}/cgroup.procs; {script}")


def counters(machine: Machine, unit: str, file: str) -> dict[str, int]:
    text = machine.run("cat", f"/sys/fs/cgroup{machine.property(unit, 'ControlGroup')}/{file}")
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


@either
@pytest.mark.parametrize(
    "script",
    ["exec tail /dev/zero", "tail /dev/zero; exec sleep 1000"],
    ids=["itself", "a child of it"],
)
def test_a_job_over_its_memory_ends_as_out_of_memory(
    machine: Machine, script: str, submitted: Submit
) -> None:
    unit = submitted(machine, script, "--max-restarts=0")
    assert f"out of memory: the job's limit of {MEMORY_BYTES} bytes" in ended(machine, unit)
    entries = machine.journal(f"UNIT={unit}", "--output=json").splitlines()
    assert "oom-kill" in [json.loads(entry).get("UNIT_RESULT") for entry in entries]
    assert machine.property(AGENT, "NRestarts") == "0"


@either
def test_a_job_opens_its_own_gpu_and_no_other(machine: Machine, submitted: Submit) -> None:
    found = found_inside(machine, submitted, "--gpus=1")
    own = GPU_DEVICES[str(found["gpus"])]
    allowed = (own, CONTROL_DEVICE)
    wanted = {path: OPENED if path in allowed else REFUSED for path in DEVICES}
    assert found["devices"] == wanted


@either
def test_a_job_without_gpus_opens_none(machine: Machine, submitted: Submit) -> None:
    found = found_inside(machine, submitted)
    assert found["devices"] == dict.fromkeys(DEVICES, REFUSED)
    assert found["user"] == "baton"
    assert found["limits"] == {
        "memory.max": str(MEMORY_BYTES),
        "memory.swap.max": "0",
        "pids.max": "65536",
    }


def test_who_is_in_no_unit_of_ours_opens_all(machine: Machine) -> None:
    words = ("setpriv", "--reuid=baton", "--regid=baton", "--clear-groups", *INSIDE.split())
    assert json.loads(machine.run(*words))["devices"] == dict.fromkeys(DEVICES, OPENED)


def test_the_agent_opens_only_what_its_unit_names(machine: Machine) -> None:
    found = json.loads(from_group(machine, AGENT, INSIDE))
    assert found["devices"] == dict.fromkeys(DEVICES, REFUSED)
    assert from_group(machine, AGENT, "dd if=/dev/kmsg bs=8K count=1 status=none") != ""
    with pytest.raises(AssertionError, match="not permitted"):
        from_group(machine, AGENT, "exec sh -c 'echo > /dev/kmsg'")


def test_a_driver_that_is_loaded_later_is_allowed_to_the_agent(machine: Machine) -> None:
    """Two modules with classes of devices of their own stand for it, one under our rule."""
    told = "[Service]\nDeviceAllow=char-cpu/cpuid r\nDeviceAllow=char-cpu/msr r\n"
    machine.write(f"/etc/systemd/system/{AGENT}.d/50-late.conf", told)
    rule = machine.run("cat", "/usr/lib/udev/rules.d/60-baton.rules")
    assert 'KERNEL=="nvidia"' in rule
    rule = rule.replace('KERNEL=="nvidia"', 'KERNEL=="cpuid"')
    machine.write("/etc/udev/rules.d/60-late.rules", rule)
    machine.run("udevadm", "control", "--reload")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", AGENT)
    unit = running(machine)
    job_pid, agent_pid = machine.main_pid(unit), machine.main_pid(AGENT)
    machine.run("modprobe", "msr")
    with pytest.raises(AssertionError, match="not permitted"):
        from_group(machine, AGENT, "exec < /dev/cpu/0/msr")
    machine.run("modprobe", "cpuid")
    wait_until(lambda: machine.main_pid(AGENT) not in (0, agent_pid), "the agent starts anew")
    wait_until(lambda: " up " in baton(machine, "nodes"), "the node comes up")
    from_group(machine, AGENT, "exec < /dev/cpu/0/cpuid")
    assert machine.main_pid(unit) == job_pid
    baton(machine, "cancel", job_of(unit))


@pytest.mark.parametrize(("unit", "weight", "quota"), [(AGENT, 12, 600), (COORDINATOR, 1000, 300)])
def test_the_programs_have_their_part_of_the_processors(
    machine: Machine, unit: str, weight: int, quota: int
) -> None:
    group = f"/sys/fs/cgroup{machine.property(unit, 'ControlGroup')}"
    assert machine.run("cat", f"{group}/cpu.weight").strip() == str(weight)
    most = f"{quota * PERIOD_US // 100} {PERIOD_US}"
    assert machine.run("cat", f"{group}/cpu.max").strip() == most


def test_jobs_take_no_more_of_the_processors_than_a_quota(machine: Machine) -> None:
    drop_in = "/etc/systemd/system/baton-job-.service.d/50-quota.conf"
    machine.write(drop_in, f"[Service]\nCPUQuota={QUOTA_PERCENT}%\n")
    machine.run("systemctl", "daemon-reload")
    unit = running(machine, "while :; do :; done & while :; do :; done")
    before = counters(machine, unit, "cpu.stat")

    def periods() -> int:
        return counters(machine, unit, "cpu.stat")["nr_periods"] - before["nr_periods"]

    wait_until(lambda: periods() >= PERIODS_MIN, "some periods pass")
    after = counters(machine, unit, "cpu.stat")
    used_us = after["usage_usec"] - before["usage_usec"]
    elapsed_us = (after["nr_periods"] - before["nr_periods"] + 1) * PERIOD_US
    assert after["nr_throttled"] > before["nr_throttled"]
    assert 0 < used_us * 100 <= elapsed_us * QUOTA_PERCENT
    machine.run("rm", drop_in)
    machine.run("systemctl", "daemon-reload")
    baton(machine, "cancel", job_of(unit))


def test_a_job_forks_no_more_than_its_tasks(machine: Machine) -> None:
    """With a limit that is reached sooner than the one that all jobs have."""
    unit = running(machine)
    machine.run("systemctl", "set-property", "--runtime", unit, f"TasksMax={TASKS_MAX}")
    forks = (
        f"i=0; while [ $i -lt {TASKS_MAX} ]; do sleep 1000 >/dev/null 2>&1 & i=$((i+1)); done; wait"
    )
    with pytest.raises(AssertionError, match="Cannot fork"):
        from_group(machine, unit, forks)
    assert counters(machine, unit, "pids.events")["max"] > 0
    baton(machine, "cancel", job_of(unit))
