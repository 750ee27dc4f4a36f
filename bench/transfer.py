"""Moving a checkpoint between two agents on one machine: gRPC streaming, HTTP, and both under TLS.

One process serves a chunk store through the agent's own `PeerServer`, this one fetches all of it
with the agent's own `PeerClient` and hashes every chunk, as a restore does before it keeps one. The
store lies in memory (tmpfs, where there is one), so no disk is measured. A round takes every way
once, in an order that turns, so that a busy minute hits all alike; the figures are medians over the
rounds with their spread.

GB/s is wall time. CPU is of both processes, user and system, per GB (10^9 bytes): that is what the
trainers on two nodes lose. "hashing alone" is the part of it that no way can save.
"""

import asyncio
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from agent.chunks.manifest import CHUNK_BYTES_MAX, ChunkRef, FileEntry, Manifest, digest_of, encode
from agent.chunks.peers import Errand, PeerClient
from agent.chunks.store import ChunkStore
from agent.core.values import ReplicaSource
from agent.peer import PeerServer
from agent.transport import Tls
from bench import report
from tests.agent.chunk_worlds import no_log
from tests.agent.test_transport import issue
from tests.e2e.certificates import Authority

SIZE_BYTES, SIZE_QUICK_BYTES = 1 << 30, 256 << 20
ROUNDS, ROUNDS_QUICK = 7, 3
MEMORY = Path("/dev/shm")
GB = 1e9
CLEAR, SECURE = "in the clear", "with TLS"
WAYS = (("gRPC", CLEAR), ("HTTP", CLEAR), ("gRPC", SECURE), ("HTTPS", SECURE))


@dataclass(frozen=True, slots=True)
class Cost:
    gb_per_s: float
    cpu_s_per_gb: float
    server_cpu_s_per_gb: float


@dataclass(frozen=True, slots=True)
class Side:
    """The serving process, and what gets a client in."""

    pid: int
    port: int
    tls: Tls | None


def main(arguments: Sequence[str]) -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--serve", metavar="SETTINGS", help="be the other process")
    given = parser.parse_args(arguments)
    if given.serve:
        asyncio.run(serve(Path(given.serve)))
        return 0
    asked = report.options(given)
    # What is moved is logged, and standard output is the table's.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    size_bytes = SIZE_QUICK_BYTES if asked.quick else SIZE_BYTES
    rounds_count = ROUNDS_QUICK if asked.quick else ROUNDS
    report.say(f"transfer: {size_bytes >> 20} MiB in {len(WAYS)} ways, {rounds_count} rounds")
    room = MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2 * size_bytes else None
    with tempfile.TemporaryDirectory(prefix="baton-bench-", dir=room) as scratch:
        costs, hashing_s = measure(Path(scratch), size_bytes, rounds_count)
    notes = [f"store in {room or 'the temporary directory'}, {size_bytes >> 20} MiB each time"]
    report.show("A checkpoint from one agent to another", rows(costs, hashing_s), asked, notes)
    return 0


def measure(
    scratch: Path, size_bytes: int, rounds_count: int
) -> tuple[dict[tuple[str, str], list[Cost]], list[float]]:
    """What each way cost, round by round; and CPU seconds per GB of hashing alone."""
    errand, wanted = fill(ChunkStore(scratch / "chunks"), size_bytes)
    authority = Authority(scratch / "fleet")
    server_tls, client_tls = issue(authority, "server"), issue(authority, "client")
    with (
        serving(scratch, "clear", None) as clear,
        serving(scratch, "secure", server_tls) as secure,
    ):
        sides = {CLEAR: Side(*clear, None), SECURE: Side(*secure, client_tls)}
        # One loop for all: gRPC's is bound to the first that it meets.
        costs = asyncio.run(take_turns(sides, errand, wanted, rounds_count))
    return costs, [hash_alone(size_bytes) for _ in range(rounds_count)]


async def take_turns(
    sides: Mapping[str, Side], errand: Errand, wanted: list[tuple[str, int]], rounds_count: int
) -> dict[tuple[str, str], list[Cost]]:
    costs: dict[tuple[str, str], list[Cost]] = {way: [] for way in WAYS}
    for turn in range(-1, rounds_count):  # the first warms up, and does not count
        for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
            name, safety = way
            cost = await fetch(name, sides[safety], errand, wanted)
            if turn >= 0:
                costs[way].append(cost)
    return costs


def fill(store: ChunkStore, size_bytes: int) -> tuple[Errand, list[tuple[str, int]]]:
    """A checkpoint of chunks that all differ."""
    store.open()
    refs = []
    with store.writing() as writing:
        for _ in range(size_bytes // CHUNK_BYTES_MAX):
            data = os.urandom(CHUNK_BYTES_MAX)
            refs.append(ChunkRef(digest_of(data), len(data)))
            writing.put_chunk(refs[-1].digest, data)
        encoded = encode(Manifest(1, 1, 1, "", (FileEntry("model", 0o600, tuple(refs)),)))
        writing.publish(digest_of(encoded), encoded)
    return Errand(1, 1, digest_of(encoded)), [(ref.digest, ref.size_bytes) for ref in refs]


async def fetch(name: str, side: Side, errand: Errand, wanted: list[tuple[str, int]]) -> Cost:
    """Everything once, verified and thrown away. gRPC's connection is made before."""
    size_bytes = sum(size for _, size in wanted)
    peer = ReplicaSource("n2", f"127.0.0.1:{side.port}")
    client = PeerClient(side.tls, http_from_bytes=None if name == "gRPC" else 0)
    try:
        if await client.find_missing(peer, [wanted[0][0]]):
            raise AssertionError("the other process serves another store")
        began_s, own_s, other_s = time.perf_counter(), time.process_time(), used_s(side.pid)
        async with client.routed(peer, errand, size_bytes) as route:
            async for digest, data in client.get_chunks(peer, wanted, route):
                if await asyncio.to_thread(digest_of, data) != digest:
                    raise AssertionError(f"{name} gave other bytes")
            way = " then ".join(route.moved_bytes)
        if way != name.lower():
            raise AssertionError(f"{name} was meant, {way} it was: {route.reason}")
        wall_s = time.perf_counter() - began_s
        server_s = used_s(side.pid) - other_s
        cpu_s = time.process_time() - own_s + server_s
    finally:
        await client.close()
    size_gb = size_bytes / GB
    return Cost(size_gb / wall_s, cpu_s / size_gb, server_s / size_gb)


def hash_alone(size_bytes: int) -> float:
    data = bytes(CHUNK_BYTES_MAX)
    began_s = time.process_time()
    for _ in range(size_bytes // CHUNK_BYTES_MAX):
        digest_of(data)
    return (time.process_time() - began_s) / (size_bytes / GB)


def used_s(pid: int) -> float:
    """CPU seconds of all threads, living and gone (proc_pid_stat(5), utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(scratch: Path, name: str, tls: Tls | None) -> Iterator[tuple[int, int]]:
    """The other process: its pid and port."""
    settings = scratch / f"{name}.json"
    files = [tls.cert_path, tls.key_path, tls.ca_path] if tls else []
    settings.write_text(json.dumps({"store": str(scratch / "chunks"), "tls": files}))
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.transfer", "--serve", str(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.pid, int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=30)


async def serve(settings: Path) -> None:
    """Until standard input ends."""
    given = json.loads(await asyncio.to_thread(settings.read_text))
    store = ChunkStore(Path(given["store"]))
    tls = Tls(*given["tls"]) if given["tls"] else None
    server = PeerServer(store, no_log, address="127.0.0.1:0", tls=tls)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.close)
        print(await server.open(), flush=True)
        await asyncio.to_thread(sys.stdin.read)


def rows(costs: dict[tuple[str, str], list[Cost]], hashing_s: list[float]) -> list[report.Row]:
    made = []
    for (name, safety), found in costs.items():
        label = f"{name} {safety}"
        rate = report.row_of(f"{label}: rate", [cost.gb_per_s for cost in found], "GB/s")
        used = report.row_of(
            f"{label}: CPU of both", [cost.cpu_s_per_gb for cost in found], "CPU s/GB"
        )
        served = report.row_of(
            f"{label}: of it the sender's",
            [cost.server_cpu_s_per_gb for cost in found],
            "CPU s/GB",
        )
        rate = replace(rate, more_is_better=True)
        if name != "gRPC":
            beside = costs["gRPC", safety]
            source = f"gRPC {safety}, this run"
            rate = replace(
                rate,
                reference=statistics.median([c.gb_per_s for c in beside]),
                reference_source=source,
            )
            used = replace(
                used,
                reference=statistics.median([c.cpu_s_per_gb for c in beside]),
                reference_source=source,
            )
        made += [rate, used, served]
    made.append(report.row_of("hashing alone", hashing_s, "CPU s/GB"))
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
