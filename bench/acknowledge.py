"""Submissions that are acknowledged and durable, per second, and what group commit is worth.

A client counts a submission when its answer is there, and the answer comes after the fsync. One
client waits for each answer before it asks again; sixteen do so side by side. Each way is measured
against the real coordinator process, through gRPC, on a real SQLite file, and beside it the same
process without group commit (one commit, and so one fsync, for each submission).

Two machines in one run: this one's disk as it is, and a disk whose fsync takes 10 ms longer, which
is made by a sleep before each commit. Where an fsync takes a fraction of a millisecond the
interpreter is what is slow, and group commit can save little; where it takes ten, group commit is
nearly everything. The number of commits for each submission shows the same without any clock.
"""

import asyncio
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench import report
from coordinator.core.messages import AppendEvent, PutJob
from coordinator.core.model import Job, JobEvent, JobSpec
from coordinator.core.phases import JobPhase
from coordinator.store.sqlite import SqliteStore
from protos.baton.v1 import jobs_pb2, jobs_pb2_grpc, types_pb2

CLIENTS = 16
SLOW_DISK_MS = 10.0  # added to each fsync; network disks of the large clouds take 2 to 10 ms
GROUP_GAIN_GOAL = 10.0
START_S_MAX = 20.0
QUEUE_JOBS = 2_000
ROUNDS = 3
WARM_S = 0.3
POLL_S = 0.02
# Its own channel each, so that the clients do not share one connection.
CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the coordinator, and how many clients ask."""

    name: str
    clients: int
    one_each: bool = False
    slower_ms: float = 0.0
    waiting: int = 0  # jobs that are queued already; the clients' own are then queued as well


@dataclass(frozen=True, slots=True)
class Measured:
    """Of several rounds: rates per second, and commits for each submission over all of them."""

    rates: list[float]
    commits_each: float


WAYS = (
    Way("one client", 1),
    Way("16 clients", CLIENTS),
    Way("16 clients, one fsync each", CLIENTS, one_each=True),
    Way(f"16 clients, behind a queue of {QUEUE_JOBS:,} jobs", CLIENTS, waiting=QUEUE_JOBS),
    Way("slow disk, 16 clients", CLIENTS, slower_ms=SLOW_DISK_MS),
    Way("slow disk, 16 clients, one fsync each", CLIENTS, one_each=True, slower_ms=SLOW_DISK_MS),
)


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    round_s = 1.5 if asked.quick else 5.0
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        bare = asyncio.run(bare_store(Path(scratch) / "bare.sqlite3", round_s))
        found: dict[str, Measured] = {}
        for number, way in enumerate(WAYS):
            report.say(f"acknowledge: {way.name}")
            found[way.name] = measure(way, Path(scratch) / str(number), round_s)
    report.show("Submissions acknowledged and durable", rows(bare, found), asked, notes(found))
    return 0


def rows(bare: list[float], found: dict[str, Measured]) -> list[report.Row]:
    """What was measured, then what group commit gains."""
    made = [report.row_of("SQLite alone, one commit each, no gRPC", bare, "1/s")]
    made += [report.row_of(name, measured.rates, "1/s") for name, measured in found.items()]
    for disk in ("", "slow disk, "):
        grouped = found[f"{disk}16 clients"]
        each = found[f"{disk}16 clients, one fsync each"]
        gain = statistics.median(grouped.rates) / statistics.median(each.rates)
        name = f"{disk}group commit, 16 clients: gain"
        made.append(
            report.Row(name=name, value=gain, unit="x", goal=GROUP_GAIN_GOAL, more_is_better=True)
        )
        made.append(
            report.Row(
                name=f"{disk}16 clients: fsyncs for each submission",
                value=grouped.commits_each,
                unit="",
                reference=each.commits_each,
                reference_source="one fsync each, this run",
            )
        )
    return made


def notes(found: dict[str, Measured]) -> list[str]:
    alone = statistics.median(found["one client"].rates)
    many = statistics.median(found["16 clients"].rates)
    return [
        f"slow disk: {SLOW_DISK_MS:g} ms of sleep before each commit",
        f"sixteen clients get {many / alone:.1f} times the rate of one; where the disk is fast the "
        "interpreter is the limit: two processes of Python, gRPC and protobuf, on these cores",
    ]


async def bare_store(path: Path, duration_s: float) -> list[float]:
    """Commits per second of a submission's records, one after the other, in this process."""
    store = SqliteStore(path)
    await store.open()
    rates = []
    job_id = 0
    for _ in range(ROUNDS):
        began_s, before = time.monotonic(), job_id
        while time.monotonic() - began_s < duration_s / ROUNDS:
            job_id += 1
            job = Job(job_id, JobSpec("bench", command=("true",)), JobPhase.HELD, 0, str(job_id))
            event = JobEvent(job_id, 1, 0, "job.submitted", message="submitted on hold")
            await store.commit([PutJob(job), AppendEvent(event)])
        rates.append((job_id - before) / (time.monotonic() - began_s))
    await store.close()
    return rates


def measure(way: Way, directory: Path, round_s: float) -> Measured:
    """Rounds against a fresh coordinator, `round_s` seconds in all."""
    directory.mkdir()
    with coordinator(way, directory) as address:
        rates, total = asyncio.run(submit_rounds(address, way, round_s / ROUNDS))
    commits = int((directory / "commits").read_text(encoding="utf-8"))
    return Measured(rates, commits / total)


async def submit_rounds(address: str, way: Way, round_s: float) -> tuple[list[float], int]:
    """The rate of each round, and how many submissions there were in all."""
    rates: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        stubs = []
        for _ in range(way.clients):
            channel = grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
            stubs.append(jobs_pb2_grpc.JobServiceStub(await stack.enter_async_context(channel)))
        # On hold: what is measured is the promise, not what follows from it.
        spec = types_pb2.JobSpec(command=["true"], hold=not way.waiting)
        left = iter(range(way.waiting))

        async def fill(stub: "jobs_pb2_grpc.JobServiceAsyncStub") -> None:
            for _ in left:
                await stub.Submit(jobs_pb2.SubmitRequest(spec=spec))

        await asyncio.gather(*(fill(stub) for stub in stubs))
        total = way.waiting + await submit_all(stubs, spec, WARM_S, "warm")
        for number in range(ROUNDS):
            began_s = time.monotonic()
            count = await submit_all(stubs, spec, round_s, f"round-{number}")
            rates.append(count / (time.monotonic() - began_s))
            total += count
    return rates, total


async def submit_all(
    stubs: Sequence["jobs_pb2_grpc.JobServiceAsyncStub"],
    spec: types_pb2.JobSpec,
    duration_s: float,
    prefix: str,
) -> int:
    """Submissions that were acknowledged within `duration_s`, by all clients together."""
    end_s = time.monotonic() + duration_s

    async def client(index: int, stub: "jobs_pb2_grpc.JobServiceAsyncStub") -> int:
        count = 0
        while time.monotonic() < end_s:
            request_id = f"{prefix}-{index}-{count}"
            await stub.Submit(jobs_pb2.SubmitRequest(request_id=request_id, spec=spec))
            count += 1
        return count

    return sum(await asyncio.gather(*(client(i, stub) for i, stub in enumerate(stubs))))


@contextlib.contextmanager
def coordinator(way: Way, directory: Path) -> Iterator[str]:
    """A coordinator process of its own; yields its address, and ends it politely."""
    port_file = directory / "port"
    command = [
        sys.executable, "-c", "from bench.counted_coordinator import main; main()",
        "--count-file", str(directory / "commits"), "--slower-ms", str(way.slower_ms),
        *(["--one-each"] if way.one_each else []), "--",
        "--listen", "127.0.0.1:0", "--state-directory", str(directory / "state"),
        "--port-file", str(port_file), "--log-level", "error", "--log-format", "json",
    ]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    try:
        yield _address(process, port_file)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(START_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _address(process: "subprocess.Popen[bytes]", port_file: Path) -> str:
    end_s = time.monotonic() + START_S_MAX
    while not port_file.exists():
        if process.poll() is not None or time.monotonic() > end_s:
            raise RuntimeError(f"the coordinator did not start (exit status {process.poll()})")
        time.sleep(POLL_S)
    return port_file.read_text(encoding="utf-8").strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
