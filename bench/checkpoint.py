"""Checkpoints of a training on the CPU: how long it stands still, and when they are durable.

Problem: "asynchronous" hides a copy, "fast" hides that nothing was synced, and a number for one
size says nothing of another. So each way of saving keeps the same state (half frozen parameters,
half of it trained with an optimizer's two moments) on the same disk, in turns, and three things
are measured: the *stall* (how long the call holds the training up), the time until it is *durable*
(synced to disk; those that do not sync are synced after, as a user would have to), and the
*inflation* of training steps while a checkpoint is being drained.

Ours is the real path: a slab of the agent's, `trainers.capture`, and the agent's chunk store in a
process of its own with its low priority. Its first capture, which copies the frozen part too, is a
row of its own. A bare copy of as many bytes into memory that was touched before stands beside
them: no capture by a CPU can be faster than that, and on a GPU the copy runs over the bus instead.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import baton_sdk
from agent.chunks.peers import PeerClient
from agent.chunks.service import ChunkService
from agent.chunks.store import ChunkStore
from agent.slabs import Slabs
from bench import report
from trainers import capture, checkpoint

SIZES_GB = (0.05, 0.5, 1.5)
QUICK_SIZES_GB = (0.05, 0.5)
ROUNDS, QUICK_ROUNDS = 5, 3
STALL_GOAL_MS = 5.0  # at 0.5 GB
INFLATION_GOAL_RATIO = 1.01
TENSOR_BYTES = 8_000_000  # a layer of a small model
STEPS_PER_BLOCK = 40  # of a matrix product each: long enough to meet the drain
ATTEMPT = "1.1"

State = dict[str, torch.Tensor]


class Pool:
    """The state, and the ways to keep it."""

    def __init__(self, size_gb: float, directory: Path, device: str = "cpu") -> None:
        self.directory = directory
        count = max(8, round(size_gb * 1e9 / TENSOR_BYTES))
        elements = int(size_gb * 1e9 / count / 4)
        tensors = [torch.randn(elements, device=device) for _ in range(count)]
        half = count // 2
        self.frozen = {f"frozen.{i:04d}": t for i, t in enumerate(tensors[:half])}
        rest = tensors[half:]
        third = max(1, len(rest) // 3)
        self.model = {f"layer.{i:04d}": t for i, t in enumerate(rest[:third])}
        self.optimizer = {f"layer.{i:04d}|moment": t for i, t in enumerate(rest[third:])}
        self.step = 0

    @property
    def whole(self) -> State:
        return {**self.frozen, **self.model, **self.optimizer}

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.whole.values())

    def live(self) -> checkpoint.Snapshot:
        state = {"format": 1, "step": self.step}
        random = {"torch_cpu": torch.get_rng_state()}
        return checkpoint.Snapshot(self.frozen, self.model, self.optimizer, random, state)

    def advance(self) -> None:
        """Everything but the frozen part is another one now."""
        self.step += 1
        for tensor in (*self.model.values(), *self.optimizer.values()):
            tensor.add_(1.0)


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

    def save(self) -> None:
        """Returns when the training may go on."""
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
                stored = await service.store_capture(
                    source, job_id=1, epoch=1, step=int(step), parent=parent
                )
            parent = stored.digest
            print(json.dumps({"digest": stored.digest}), flush=True)
            await service.collect(frozenset([parent]))
        await service.close()

    asyncio.run(serve())


def durable(path: Path) -> None:
    """Sync a file, or all files of a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in (*files, path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


Save = Callable[[Path], Callable[[], object] | None]
"""Begins to save below a path; returns what waits for the rest of it, if there is a rest."""


def others(pool: Pool) -> dict[str, Save]:
    """The well-known ways. Those that need a process group they cannot have here are left out."""

    def torch_save(path: Path) -> None:
        torch.save(pool.whole, path)

    def safetensors(path: Path) -> None:
        save_file(pool.whole, path)

    def dcp_save(path: Path) -> None:
        dcp.state_dict_saver.save(pool.whole, checkpoint_id=path, no_dist=True)

    def dcp_async(path: Path) -> Callable[[], object]:
        future: Any = dcp.state_dict_saver.async_save(
            pool.whole,
            checkpoint_id=path,
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
            no_dist=True,
        )
        return future.result  # type: ignore[no-any-return]

    stager = dcp.staging.DefaultStager(
        dcp.staging.StagingOptions(
            use_pinned_memory=torch.cuda.is_available(),
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=torch.cuda.is_available(),
        )
    )

    def dcp_cached(path: Path) -> Callable[[], object]:
        future: Any = dcp.state_dict_saver.async_save(
            pool.whole,
            checkpoint_id=path,
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
            async_stager=stager,
            no_dist=True,
        )
        return getattr(future, "upload_completion", future).result  # type: ignore[no-any-return]

    return {
        "torch.save": torch_save,
        "safetensors.save_file": safetensors,
        "dcp.save": dcp_save,
        "dcp.async_save (thread)": dcp_async,
        "dcp.async_save (cached stager)": dcp_cached,
    }


def measure(pool: Pool, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Stall and time to durable of each way, in milliseconds, in turns."""
    stalls: dict[str, list[float]] = {}
    durables: dict[str, list[float]] = {}
    ways = others(pool)
    failed: dict[str, str] = {}
    with contextlib.closing(Ours(pool)) as ours:
        source = torch.cat([t.flatten().cpu() for t in pool.whole.values()])
        target = torch.zeros_like(source)
        for number in range(-1, rounds):  # one round that does not count: both slots, caches
            for _ in range(2 if number < 0 else 1):
                pool.advance()
                began_s = time.perf_counter()
                ours.save()
                stall_ms = (time.perf_counter() - began_s) * 1000
                ours.drain()
                ours.wait()
                durable_ms = (time.perf_counter() - began_s) * 1000
                first = "ours, first capture of a slot" if number < 0 else "ours"
                stalls.setdefault(first, []).append(stall_ms)
                durables.setdefault(first, []).append(durable_ms)
            began_s = time.perf_counter()
            target.copy_(source)
            if number >= 0:
                stalls.setdefault("bare copy of all of it", []).append(
                    (time.perf_counter() - began_s) * 1000
                )
            for name, save in ways.items():
                if name in failed:
                    continue
                path = pool.directory / "other"
                pool.advance()
                began_s = time.perf_counter()
                try:
                    rest = save(path)
                except (RuntimeError, ValueError, AssertionError) as error:
                    failed[name] = str(error).splitlines()[0][:120]
                    report.say(f"{name} does not run here: {failed[name]}")
                    continue
                stall_ms = (time.perf_counter() - began_s) * 1000
                if rest is not None:
                    rest()
                durable(path)
                durable_ms = (time.perf_counter() - began_s) * 1000
                path.unlink() if path.is_file() else shutil.rmtree(path)
                if number >= 0:
                    stalls.setdefault(name, []).append(stall_ms)
                    durables.setdefault(name, []).append(durable_ms)
    return stalls, durables


def inflation(pool: Pool, rounds: int) -> list[float]:
    """How much longer a step is while a checkpoint is drained, as ratios of alternating blocks."""
    left, right = torch.randn(512, 512), torch.randn(512, 512)

    def block(until: Callable[[], bool]) -> float:
        """Seconds of the median step."""
        seconds = []
        for number in range(STEPS_PER_BLOCK * 50):
            began_s = time.perf_counter()
            torch.mm(left, right)
            torch.mm(right, left)
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


def rows(size_gb: float, rounds: int, device: str = "cpu") -> list[report.Row]:
    """All figures of one size."""
    report.say(f"{size_gb:g} GB on {device}: {rounds} rounds")
    made = []
    with scratch() as directory:
        pool = Pool(size_gb, directory, device)
        stalls, durables = measure(pool, rounds)
        ratios = inflation(pool, rounds)
    for what, found in (("stall", stalls), ("durable", durables)):
        reference = statistics.median(found["safetensors.save_file"])
        for name, samples in found.items():
            figure = f"{size_gb:g} GB, {what}: {name}"
            row = report.row_of(figure, samples, "ms")
            goal = STALL_GOAL_MS if (name, what, size_gb) == ("ours", "stall", 0.5) else None
            if (name, what) == ("ours", "durable"):
                goal = reference
            made.append(
                report.Row(
                    name=row.name,
                    value=row.value,
                    unit="ms",
                    low=row.low,
                    high=row.high,
                    reference=reference,
                    reference_source="safetensors",
                    goal=goal,
                )
            )
    row = report.row_of(f"{size_gb:g} GB, step while draining / alone", ratios, "ratio")
    made.append(
        report.Row(
            name=row.name,
            value=row.value,
            unit="ratio",
            low=row.low,
            high=row.high,
            goal=INFLATION_GOAL_RATIO,
        )
    )
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
    found = [row for size in sizes for row in rows(size, QUICK_ROUNDS if asked.quick else ROUNDS)]
    spare = (os.cpu_count() or 1) - torch.get_num_threads()
    notes = [
        f"training on {torch.get_num_threads()} threads, {spare} cores to spare for the drain",
        "half of the state is frozen; durable times of the others include the sync that they leave "
        "to the user",
        "dcp.async_save in a process of its own needs a process group, and is left out",
    ]
    report.show("Checkpoints on the CPU", found, asked, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
