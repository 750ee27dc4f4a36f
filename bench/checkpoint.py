"""Checkpoints of a training on the CPU: how long it stands still, and when they are durable.

Problem: "asynchronous" hides a copy, "fast" hides that nothing was synced, and a number for one
size says nothing of another. So each way of saving keeps the same state (half frozen parameters,
the rest trained by AdamW) on the same disk, in turns. Four things are measured:

1. *stall*: what a step of the training loses, which is more than the time that a call takes. Steps
   are real ones, forward, backward and update of that state, with a save after the one before and
   without, in turns; what is said is the difference, and beside it, for ours, how long the training
   waited, and by how much the processor time of its thread has grown. A copy that takes cache and
   memory from the training makes that grow; what is only lost on the clock, the copy and other
   programs took by being on its core. A long step and a short one: a copy beside a step that is
   shorter than the copy holds the next update up, and no figure for long steps says so.
2. *durable*: from the beginning until it is synced to disk, while the training stands still; those
   that do not sync are synced after, as a user would have to.
3. *call*: how long the call itself takes then.
4. *inflation* of training steps while a checkpoint is being drained.

Ours is the real path: a slab of the agent's, `trainers.capture`, and the agent's chunk store in a
process of its own with its low priority. Its first capture, which copies the frozen part too, is a
row of its own. A bare copy of as many bytes into memory that was touched before stands beside
them.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed

import baton_sdk
from agent.chunks.peers import PeerClient
from agent.chunks.service import ChunkService
from agent.chunks.store import ChunkStore
from agent.core.values import Origin
from agent.slabs import Slabs
from bench import report
from bench.checkpoint_others import FAILURES, SAFETENSORS, Pool, Save, durable, others, remove
from trainers import capture

SIZES_GB = (0.05, 0.5, 1.5)
QUICK_SIZES_GB = (0.05, 0.5)
ROUNDS, QUICK_ROUNDS = 5, 3
STALL_GOAL_MS = 5.0  # at 0.5 GB
INFLATION_GOAL_RATIO = 1.01
LONG_BATCH, SHORT_BATCH = 64, 4  # samples of a step
STEPS_PER_BLOCK = 40  # of a matrix product each: long enough to meet the drain
NOTES = (
    "half of the state is frozen; durable times of the others include the sync that they leave to "
    "the user",
    f"a long step has {LONG_BATCH} samples, a short one {SHORT_BATCH}; "
    "lost: by so much is it longer than a step alone",
)
ATTEMPT = "1.1"


class Agent:
    """The part of an agent that drains, as a child process: `--drain` of this file. It gets the
    slab's descriptor by inheritance, and a line with a capture's name for each drain."""

    def __init__(self, descriptor: int, slab: baton_sdk.Slab, directory: Path) -> None:
        words = ["--drain", str(descriptor), str(slab.slot_bytes), str(slab.slots), str(directory)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.checkpoint", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(descriptor,),
            text=True,
        )
        self.answer()

    def order(self, name: str, step: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name} {step}\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Slabbed(baton_sdk.Session):
    """A session whose slab comes from a desk of this process."""

    def __init__(self, slab: baton_sdk.Slab) -> None:
        super().__init__({})
        self._held = slab

    def slab(self, slot_bytes: int, wait_s: float = 0.0) -> baton_sdk.Slab | None:
        return self._held


class Ours:
    """Capture here, drain there."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._desk = Slabs(0.9)
        granted = self._desk.grant(ATTEMPT, pool.bytes + (4 << 20))
        if isinstance(granted, str):
            raise SystemExit(granted)
        os.set_inheritable(granted.descriptor, True)
        slab = baton_sdk.Slab(os.dup(granted.descriptor), granted.slot_bytes, granted.slots)
        slab.open()
        self._agent = Agent(granted.descriptor, slab, pool.directory / "ours")
        self._capturer = capture.Capturer(Slabbed(slab))
        self._ticket: baton_sdk.Ticket | None = None

    def begin(self) -> None:
        """Returns when the training may go on, up to its update."""
        assert self._capturer.begin(self._pool.live(), self._pool.step), "no free slot"

    def settle(self) -> None:
        """Returns when the update may come."""
        self._ticket = self._capturer.settle()
        assert self._ticket is not None, "the capture was dropped"

    def save(self) -> None:
        """Both, as at the end of a process, but for the frozen part."""
        self._ticket = self._capturer.take(self._pool.live(), self._pool.step)
        assert self._ticket is not None, "no free slot"

    def drain(self) -> None:
        """As the trainer's line does: begins in the other process."""
        found = self._desk.newest(ATTEMPT)
        assert found is not None
        self._agent.order(found.name, found.step)

    def wait(self) -> None:
        """Until it is durable."""
        said = json.loads(self._agent.answer())
        assert self._ticket is not None
        self._ticket.settle(baton_sdk.TicketState.STORED, digest=said["digest"])

    def close(self) -> None:
        self._agent.close()
        self._desk.close()


def drain_child(words: list[str]) -> None:
    """What `Agent` starts."""
    descriptor, slot_bytes, slots, directory = int(words[0]), *map(int, words[1:3]), words[3]
    desk = Slabs(0.9)
    refusal = desk.adopt(ATTEMPT, descriptor, slot_bytes, slots)
    assert not refusal, refusal

    async def serve() -> None:
        root = Path(directory)
        service = ChunkService(ChunkStore(root), PeerClient(None), staging_root=root)
        await service.open()
        print(json.dumps({"ready": True}), flush=True)
        parent = ""
        for line in iter(sys.stdin.readline, ""):
            name, step = line.split()
            with desk.reading(ATTEMPT, name) as source:
                stored = await service.store_capture(source, Origin(1, 1, int(step), parent))
            parent = stored.digest
            print(json.dumps({"digest": stored.digest}), flush=True)
            await service.collect(frozenset([parent]))
        await service.close()

    asyncio.run(serve())


def measure(pool: Pool, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The call and the time to durable of each way, in milliseconds, in turns."""
    calls: dict[str, list[float]] = {}
    durables: dict[str, list[float]] = {}
    ways = others(pool)
    failed: dict[str, str] = {}
    with contextlib.closing(Ours(pool)) as ours:
        source = torch.cat([t.flatten().cpu() for t in pool.whole.values()])
        target = torch.zeros_like(source)
        for number in range(-1, rounds):  # one round that does not count: both slots, caches
            for _ in range(2 if number < 0 else 1):
                pool.advance()
                pool.synchronize()
                began_s = time.perf_counter()
                ours.save()
                call_ms = (time.perf_counter() - began_s) * 1000
                ours.drain()
                ours.wait()
                durable_ms = (time.perf_counter() - began_s) * 1000
                first = "ours, first capture of a slot" if number < 0 else "ours"
                calls.setdefault(first, []).append(call_ms)
                durables.setdefault(first, []).append(durable_ms)
            began_s = time.perf_counter()
            target.copy_(source)
            if number >= 0:
                calls.setdefault("bare copy of all of it", []).append(
                    (time.perf_counter() - began_s) * 1000
                )
            for name, save in ways.items():
                if name in failed:
                    continue
                path = pool.directory / "other"
                pool.advance()
                pool.synchronize()
                began_s = time.perf_counter()
                try:
                    rest = save(path)
                    call_ms = (time.perf_counter() - began_s) * 1000
                    if rest is not None:
                        rest()
                except FAILURES as error:
                    failed[name] = (str(error).splitlines() or [type(error).__name__])[0][:120]
                    pool.recover()
                    remove(path)
                    report.say(f"{name} does not run here: {failed[name]}")
                    continue
                durable(path)
                durable_ms = (time.perf_counter() - began_s) * 1000
                remove(path)
                if number >= 0:
                    calls.setdefault(name, []).append(call_ms)
                    durables.setdefault(name, []).append(durable_ms)
    return calls, durables


def stalls(pool: Pool, rounds: int, batch: int, ways: dict[str, Save]) -> dict[str, list[float]]:
    """What a step loses to a save before it, in milliseconds, of ours and of these ways; and what
    it is without. Each save is over before the next step is timed."""
    found: dict[str, list[float]] = {}

    def step(before: Callable[[], object], between: Callable[[], object]) -> tuple[float, float]:
        """In milliseconds, on the clock and of this thread on a processor."""
        pool.synchronize()
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        before()
        pool.compute(batch)
        between()
        pool.advance()
        pool.synchronize()
        cpu_ms = (time.thread_time() - began_cpu_s) * 1000
        return (time.perf_counter() - began_s) * 1000, cpu_ms

    with contextlib.closing(Ours(pool)) as ours:
        for number in range(-2, rounds):  # two that do not count: both slots
            quiet_ms, quiet_cpu_ms = step(_nothing, _nothing)
            waits_s: list[float] = []
            with_ms, with_cpu_ms = step(_timed(ours.begin, waits_s), _timed(ours.settle, waits_s))
            ours.drain()
            ours.wait()
            if number >= 0:
                found.setdefault("a step alone", []).append(quiet_ms)
                found.setdefault("ours, lost", []).append(with_ms - quiet_ms)
                found.setdefault("ours, lost by the thread", []).append(with_cpu_ms - quiet_cpu_ms)
                found.setdefault("ours, waited", []).append(sum(waits_s) * 1000)
    for name, save in ways.items():
        saving = Saving(save, pool.directory / "other")
        for number in range(-1, rounds):
            quiet_ms, _ = step(_nothing, _nothing)
            try:
                with_ms, _ = step(saving.begin, _nothing)
                saving.end()
            except FAILURES:
                pool.recover()
                remove(pool.directory / "other")
                break  # said by `measure`
            if number >= 0:
                found.setdefault(f"{name}, lost", []).append(with_ms - quiet_ms)
    return found


class Saving:
    """One of the well-known ways, one time after the other."""

    def __init__(self, save: Save, path: Path) -> None:
        self._save = save
        self._path = path
        self._rest: Callable[[], object] | None = None

    def begin(self) -> None:
        """The call."""
        self._rest = self._save(self._path)

    def end(self) -> None:
        """Until it is done; what it wrote goes away."""
        if self._rest is not None:
            self._rest()
        remove(self._path)


def _timed(work: Callable[[], object], seconds: list[float]) -> Callable[[], object]:
    def call() -> None:
        began_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began_s)

    return call


def _nothing() -> None:
    """Before or between the parts of a step that saves nothing."""


def inflation(pool: Pool, rounds: int) -> list[float]:
    """How much longer a step is while a checkpoint is drained, as ratios of alternating blocks: of
    small products on a CPU, so that many meet the drain, and of the training itself on a device."""
    left, right = torch.randn(512, 512), torch.randn(512, 512)

    def step() -> None:
        if pool.device == "cpu":
            torch.mm(left, right)
            torch.mm(right, left)
        else:
            pool.compute(SHORT_BATCH)
            pool.synchronize()

    def block(until: Callable[[], bool]) -> float:
        """Seconds of the median step."""
        seconds = []
        for number in range(STEPS_PER_BLOCK * 50):
            began_s = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began_s)
            if number >= STEPS_PER_BLOCK and until():
                break
        return statistics.median(seconds)

    ratios = []
    with contextlib.closing(Ours(pool)) as ours:
        for _ in range(rounds):
            quiet_s = block(lambda: True)
            pool.advance()
            ours.save()
            ours.drain()
            busy_s = block(lambda: True)
            ours.wait()
            ratios.append(busy_s / quiet_s)
    return ratios


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """On a disk, not in memory: below the working directory."""
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=".") as made:
        yield Path(made).absolute()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Of one rank: what a checkpoint by another process asks for."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ.setdefault("MASTER_PORT", str(free.getsockname()[1]))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def rows(size_gb: float, asked: report.Options, device: str = "cpu") -> list[report.Row]:
    """All figures of one size."""
    rounds = QUICK_ROUNDS if asked.quick else ROUNDS
    report.say(f"{size_gb:g} GB on {device}: {rounds} rounds")
    made = []
    with scratch() as directory, process_group():
        pool = Pool(size_gb, directory, device)
        calls, durables = measure(pool, rounds)
        every = others(pool)
        reference_only = {SAFETENSORS: every[SAFETENSORS]}
        long = stalls(pool, rounds, LONG_BATCH, reference_only if asked.quick else every)
        short = stalls(pool, rounds, SHORT_BATCH, reference_only)
        ratios = inflation(pool, rounds)
    for what, found in (("call", calls), ("durable", durables)):
        reference = statistics.median(found[SAFETENSORS])
        for name, samples in found.items():
            row = report.row_of(f"{size_gb:g} GB, {what}: {name}", samples, "ms")
            row = replace(row, reference=reference, reference_source="safetensors")
            goal = reference if (name, what) == ("ours", "durable") else None
            made.append(replace(row, goal=goal))
    for what, found in (("long", long), ("short", short)):
        reference = statistics.median(found[f"{SAFETENSORS}, lost"])
        for name, samples in found.items():
            row = report.row_of(f"{size_gb:g} GB, {what} step: {name}", samples, "ms")
            if name != "a step alone":
                row = replace(row, reference=reference, reference_source="safetensors")
            goal = STALL_GOAL_MS if (name, size_gb) == ("ours, lost", 0.5) else None
            made.append(replace(row, goal=goal))
    row = report.row_of(f"{size_gb:g} GB, step while draining / alone", ratios, "ratio")
    made.append(replace(row, goal=INFLATION_GOAL_RATIO))
    return made


def main() -> int:
    """Print the table."""
    parser = report.parser(__doc__)
    parser.add_argument("--drain", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drain:
        drain_child(arguments.drain)
        return 0
    asked = report.options(arguments)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # the others are the drain's
    sizes = QUICK_SIZES_GB if asked.quick else SIZES_GB
    found = [row for size in sizes for row in rows(size, asked)]
    spare = (os.cpu_count() or 1) - torch.get_num_threads()
    notes = [
        f"training on {torch.get_num_threads()} threads, {spare} cores to spare for the drain",
        *NOTES,
    ]
    report.show("Checkpoints on the CPU", found, asked, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
