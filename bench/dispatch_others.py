"""What Slurm and Ray take for the same jobs as ours, in the same run, where they are installed.

Each runs in a network of its own (`namespace.py`), alone on the machine while it is measured, with
one node. What is missing is left out, and said, with the command that installs it.

**Slurm** (Debian's slurm-wlm) as one tunes it for short jobs, the whole configuration stands below:
no delay before a submitted job is looked at (`batch_sched_delay=0`, default 3 s), a look for others
each second (`sched_interval=1`, default 60 s), no limit on how often (`sched_min_interval=0`),
no accounting, no cgroups, no plug-ins for tasks. It writes its state behind the
acknowledgement (a thread, within seconds), so its jobs are **not** durable when `sbatch` returns,
and what is authenticated (munge) is not encrypted. A burst is 16 clients that run `sbatch` again
and again. Preemption is by partition, with `PreemptMode=REQUEUE`, a grace time, and
`preempt_send_user_signal`, so that a job under bash hears of it at once.

**Ray** (PyPI's ray[default]), its jobs and not its tasks: a job is what has a command, a log and an
end of its own. Its client asks the dashboard by HTTP, without TLS. It knows no preemption.
"""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypedDict

import psutil

from bench import report

WAIT_S_MAX = 60.0
END_S_MAX = 10.0
POLL_S = 0.002
LOOK_S = 0.05
CLIENTS = 16
MIB = 1 << 20
SLOTS = 16  # of the node for jobs at a time

SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
SLURM_INSTALL = "apt-get install slurm-wlm munge"
RAY_INSTALL = "python3 -m venv FOLDER && FOLDER/bin/pip install 'ray[default]'"
RAY_PROGRAM = Path(__file__).parent / "programs" / "ray_jobs.py"

SLURM_CONF = """
ClusterName=bench
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs={slots} RealMemory=1000
PartitionName=normal Nodes=n1 Default=YES MaxTime=INFINITE State=UP PriorityTier=2
PartitionName=spare Nodes=n1 MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
"""


class Found(TypedDict, total=False):
    """What was measured; `cpu_percent` and `resident_mib` at rest, by program."""

    version: str
    first_s: list[float]
    burst_jobs: int
    burst_per_s: float
    told_s: list[float]
    next_s: list[float]
    cpu_percent: dict[str, float]
    resident_mib: dict[str, float]


# --- Slurm ----------------------------------------------------------------------------------------


def slurm_missing(path: str) -> str:
    """The first of its programs that is not on `path`; empty when all are."""
    return next((name for name in SLURM_PROGRAMS if shutil.which(name, path=path) is None), "")


def inside(arguments: Sequence[str]) -> Found:
    """`slurm` or `ray`, what to find it by, and how much to measure, as JSON."""
    which, where, text = arguments
    asked = json.loads(text)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        Path(name).chmod(0o755)  # munge's client wants to be let in
        try:
            return (slurm if which == "slurm" else ray)(where, Path(name), asked)
        except TimeoutError:
            for log in sorted(Path(name).glob("*.log")):
                report.say(f"{log.name}: {log.read_text('utf-8', 'replace')[-1500:]}")
            raise


def slurm(path: str, directory: Path, asked: dict[str, float]) -> Found:
    os.environ["PATH"] = path
    (directory / "state").mkdir()
    (directory / "spool").mkdir()
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = directory / "slurm.conf"
    values = {"host": socket.gethostname(), "directory": directory, "slots": SLOTS}
    conf.write_text(SLURM_CONF.format(**values), "utf-8")
    os.environ["SLURM_CONF"] = str(conf)
    with ExitStack() as running:
        munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
        munge += [f"--{name}={directory}/munge.{name[:4]}" for name in ("pid-file", "seed-file")]
        munge += [f"--socket={directory}/munge.socket", f"--log-file={directory}/munge.log"]
        running.enter_context(program(munge, directory))
        _wait(lambda: (directory / "munge.socket").exists(), "munged")
        daemons = {
            name: running.enter_context(program([name, "-D", *more], directory)).pid
            for name, more in (("slurmctld", []), ("slurmd", ["-N", "n1"]))
        }
        _wait(lambda: "idle" in _said("sinfo", "-h", "-o", "%t"), "its node")
        found = Found(version=_said("sinfo", "--version").strip())
        found["first_s"] = [_slurm_one(directory, n) for n in range(int(asked["jobs"]))]
        found["burst_jobs"] = int(asked["burst"])
        found["burst_per_s"] = _slurm_burst(found["burst_jobs"])
        pairs = [_slurm_preempts(directory, n) for n in range(int(asked["preemptions"]))]
        found["told_s"], found["next_s"] = [p[0] for p in pairs], [p[1] for p in pairs]
        _wait(lambda: not _said("squeue", "-h"), "an empty queue")
        found["cpu_percent"], found["resident_mib"] = at_rest(daemons, asked["rest_s"])
        return found


def _sbatch(script: str, *more: str) -> None:
    words = ["sbatch", "--quiet", "--output=/dev/null", *more, f"--wrap={script}"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def _slurm_one(directory: Path, number: int) -> float:
    """Seconds from `sbatch` to the job's first instruction, its queue being empty."""
    stamp = directory / f"stamp-{number}"
    began_s = time.time()
    _sbatch(stamping(stamp))
    first_s = stamped_s(stamp) - began_s
    _wait(lambda: not _said("squeue", "-h"), "the end of a job")
    return first_s


def _slurm_burst(count: int) -> float:
    began_s = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(lambda _: _sbatch("true"), range(count)))
    _wait(lambda: not _said("squeue", "-h"), "the end of a burst")
    return count / (time.monotonic() - began_s)


def _slurm_preempts(directory: Path, number: int) -> tuple[float, float]:
    """From a submission to the spare job's being told, and from there to the first instruction of
    the one that it makes room for. It saves nothing: it leaves at once."""
    running, told, began = (directory / f"{name}-{number}" for name in ("runs", "told", "began"))
    leave = f"{stamping(told)}; exit 0"
    script = f"trap '{leave}' USR1; {stamping(running)}; while :; do sleep 0.02; done"
    _sbatch(
        script, "--partition=spare", f"--cpus-per-task={SLOTS}", "--signal=B:USR1@1", "--requeue"
    )
    stamped_s(running)
    asked_s = time.time()
    _sbatch(stamping(began), f"--cpus-per-task={SLOTS}")
    told_s = stamped_s(told)
    next_s = stamped_s(began) - told_s
    # It was requeued, since it ended by order.
    _wait(lambda: "normal" not in _said("squeue", "-h", "-o", "%P"), "the end of the job")
    subprocess.run(["scancel", "--partition=spare"], check=True)
    _wait(lambda: not _said("squeue", "-h"), "the spare job's end")
    return told_s - asked_s, next_s


# --- Ray ------------------------------------------------------------------------------------------


def ray(python: str, directory: Path, asked: dict[str, float]) -> Found:
    """All of it by its own interpreter; here only its processes are watched."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    start = [
        python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--num-cpus={SLOTS}",
        f"--temp-dir={directory}/ray",
    ]  # fmt: skip
    with program(start, directory) as head:
        words = [python, str(RAY_PROGRAM), str(directory), json.dumps(asked)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        found: Found = json.loads(done.stdout.splitlines()[-1])
        children = psutil.Process(head.pid).children(recursive=True)
        pids = {f"{child.name()} {child.pid}": child.pid for child in children}
        cpu_percent, resident_mib = at_rest(pids, asked["rest_s"])
        whole = "all its processes"
        found["cpu_percent"] = {whole: sum(cpu_percent.values())}
        found["resident_mib"] = {whole: sum(resident_mib.values())}
        return found


# --- both -----------------------------------------------------------------------------------------


def stamping(path: Path) -> str:
    """Shell that notes the time in a file, which is there once it is complete."""
    return f"date +%s.%N > {path}.part; mv {path}.part {path}"


def stamped_s(path: Path) -> float:
    _wait(path.exists, f"{path.name}", POLL_S)
    return float(path.read_text("ascii"))


def at_rest(pids: dict[str, int], window_s: float) -> tuple[dict[str, float], dict[str, float]]:
    """CPU in percent of a core over the window, and resident memory, each by name."""
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    before = {name: sum(one.cpu_times()[:2]) for name, one in processes.items()}
    began_s = time.monotonic()
    time.sleep(window_s)
    span_s = time.monotonic() - began_s
    percents = {
        name: 100 * (sum(one.cpu_times()[:2]) - before[name]) / span_s
        for name, one in processes.items()
    }
    return percents, {name: one.memory_info().rss / MIB for name, one in processes.items()}


@contextmanager
def program(command: Sequence[str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that is asked to end with the block, and then made to; and so are its children."""
    with (directory / f"{Path(command[0]).name}.log").open("ab") as log:
        started = subprocess.Popen(list(command), stdout=log, stderr=log)
    try:
        yield started
    finally:
        tree = [psutil.Process(started.pid)] if started.poll() is None else []
        tree += [child for one in tree for child in one.children(recursive=True)]
        for one in tree:
            with suppress(psutil.NoSuchProcess):
                one.terminate()
        _, left = psutil.wait_procs(tree, timeout=END_S_MAX)
        for one in left:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left, timeout=END_S_MAX)


def _said(*command: str) -> str:
    """An empty answer also where it could not be asked: it is asked again."""
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout


def _wait(done: Callable[[], bool], what: str, poll_s: float = LOOK_S) -> None:
    end_s = time.monotonic() + WAIT_S_MAX
    while not done():
        if time.monotonic() > end_s:
            report.say(f"dispatch: not within {WAIT_S_MAX:g} s: {what}")
            raise TimeoutError(what)
        time.sleep(poll_s)
