"""On a CUDA device: what a step costs more than its computation, with the ring and without.

The question and the blocks are those of ``bench.prefetch``; a step that needs no loader, on one
batch that lies on the device, is 1.00. Against the ring stand two loaders that work in the training
thread: ``.to()``, and ``pin_memory().to(non_blocking=True)``. Each is measured with batches that
are ready in ordinary memory, which is the cost of moving them, and with batches that are made when
they are asked for, which is what a training does. Steps are as long as a real one is, 30 ms with
pictures and 10 ms with tokens, found by trying on this device.

At the end the way out: how fast ``trainers.drain`` empties 1.5 GB, into pinned memory, into the
agent's (a mapped descriptor, page-locked) and into ordinary one, and what a step costs while it
does.
"""

import functools
import itertools
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from bench import prefetch, report
from bench.gpu import EXIT_NO_DEVICE, card
from bench.prefetch import CACHED, DEPTH, RING, Case, NextBatch
from trainers import pagelock
from trainers.drain import HostMemory, copy_out
from trainers.prefetch import Prefetcher, map_nested

ROUNDS, ROUNDS_QUICK = 7, 3
STEPS, STEPS_QUICK = 40, 15  # of a block that count
IMAGE_STEP_MS, TOKEN_STEP_MS = 30.0, 10.0
IMAGE_HIDDEN, TOKEN_WIDTH = 1024, 256
REPEATS_MAX = 2000  # of the computation in a step, on whatever device
TRIES = 3  # to find how many repetitions make a step
READY_BATCHES = 8  # enough that none is in a cache when its turn comes again
GOAL = 1.01
TO, PINNED = ".to()", "pin_memory + non_blocking"

DRAIN_TENSORS, DRAIN_TENSOR_BYTES = 24, 64 << 20
DRAIN_TIMES = 5

MakeCase = Callable[..., Case]


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    if reason := card.missing():
        report.say(reason)
        return EXIT_NO_DEVICE
    device = torch.device("cuda", torch.cuda.current_device())
    rounds, steps = (ROUNDS_QUICK, STEPS_QUICK) if asked.quick else (ROUNDS, STEPS)
    rows: list[report.Row] = []
    makers: list[tuple[MakeCase, int, float]] = [
        (prefetch.images, IMAGE_HIDDEN, IMAGE_STEP_MS),
        (prefetch.tokens, TOKEN_WIDTH, TOKEN_STEP_MS),
    ]
    for maker, width, step_ms in makers:
        case = long_enough(functools.partial(maker, device, width), device, step_ms)
        ready = [case.make(index) for index in range(READY_BATCHES)]
        kinds: dict[str, Callable[[int], Any]] = {
            "ready": functools.partial(picked, ready),
            "made when asked for": case.make,
        }
        for kind, make in kinds.items():
            named = replace(case, name=f"{case.name}, {kind}", make=make)
            report.say(f"prefetch: {named.name}, {rounds} rounds of {steps} steps")
            rows += measured(named, device, rounds, steps)
    report.say("drain: 1.5 GB, alone and beside a training")
    rows += drained(device)
    notes = [f"device: {card.described()}"]
    report.show("A training step with its loader, on a GPU", rows, asked, notes)
    return 0


def picked(batches: Sequence[Any], index: int) -> Any:
    return batches[index % len(batches)]


def measured(case: Case, device: torch.device, rounds: int, steps: int) -> list[report.Row]:
    cached = map_nested(case.make(0), lambda leaf: leaf.to(device))
    plain, pinned = itertools.count(), itertools.count()

    def pin(leaf: Any) -> Any:
        return leaf.pin_memory().to(device, non_blocking=True)

    with Prefetcher(case.make, device=device, depth=DEPTH) as ring:
        loaders: dict[str, NextBatch] = {
            CACHED: lambda: cached,
            RING: lambda: ring.next().batch,
            TO: lambda: map_nested(case.make(next(plain)), lambda leaf: leaf.to(device)),
            PINNED: lambda: map_nested(case.make(next(pinned)), pin),
        }
        spent = prefetch.alternate(
            loaders, case.step, rounds=rounds, steps=steps, settle=torch.cuda.synchronize
        )
    walls_s = {name: [block.wall_s for block in blocks] for name, blocks in spent.items()}
    return [
        *prefetch.ratio_rows(f"{case.name}: step", walls_s, reference=TO, goal=GOAL),
        report.row_of(f"{case.name}: step, cached", [s * 1e3 for s in walls_s[CACHED]], "ms"),
    ]


def long_enough(maker: Callable[[int], Case], device: torch.device, step_ms: float) -> Case:
    """The case with as many repetitions as make a step of about ``step_ms``."""
    repeats = 1
    for _ in range(TRIES):
        case = maker(repeats)
        batch = map_nested(case.make(0), lambda leaf: leaf.to(device))
        took_ms = timed_ms(case, batch)
        repeats = min(REPEATS_MAX, max(1, round(repeats * step_ms / took_ms)))
    return maker(repeats)


def timed_ms(case: Case, batch: Any, steps: int = 5) -> float:
    for _ in range(2):  # the first ones load kernels
        case.step(batch)
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(steps):
        case.step(batch)
    torch.cuda.synchronize()
    return (time.perf_counter() - began_s) / steps * 1e3


def drained(device: torch.device) -> list[report.Row]:
    """Rates of the way out, and the step beside it over the step alone."""
    sources = [
        torch.ones(DRAIN_TENSOR_BYTES, dtype=torch.uint8, device=device)
        for _ in range(DRAIN_TENSORS)
    ]
    total_bytes = DRAIN_TENSORS * DRAIN_TENSOR_BYTES
    case = long_enough(
        functools.partial(prefetch.tokens, device, TOKEN_WIDTH), device, TOKEN_STEP_MS
    )
    batch = map_nested(case.make(0), lambda leaf: leaf.to(device))
    step_s = timed_ms(case, batch) / 1e3
    rows = []
    kinds = {
        "pinned": torch.zeros(total_bytes, dtype=torch.uint8, pin_memory=True),
        "the agent's": mapped(total_bytes),
        "ordinary": torch.zeros(total_bytes, dtype=torch.uint8),
    }
    lock = pagelock.lock(kinds["the agent's"])
    if lock is None:
        report.say("drain: the driver does not lock the pages of the agent's memory")
    for kind, memory in kinds.items():
        targets = torch.split(memory, DRAIN_TENSOR_BYTES)
        pairs: list[tuple[torch.Tensor, HostMemory]] = list(zip(sources, targets, strict=True))
        rates, ratios = [], []
        for _ in range(DRAIN_TIMES):
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            copy_out(pairs).wait()
            took_s = time.perf_counter() - began_s
            rates.append(total_bytes / 1e9 / took_s)
            ratios.append(beside(case, batch, pairs, max(1, round(took_s / step_s))))
        rows.append(
            replace(report.row_of(f"drain, {kind} memory", rates, "GB/s"), more_is_better=True)
        )
        rows.append(report.row_of(f"drain, {kind} memory: step beside it / alone", ratios, "times"))
    return rows


def mapped(size_bytes: int) -> torch.Tensor:
    """As a slab is made, and touched."""
    descriptor = os.memfd_create("bench-drain")
    os.ftruncate(descriptor, size_bytes)
    memory = torch.frombuffer(mmap.mmap(descriptor, size_bytes), dtype=torch.uint8)
    os.close(descriptor)
    return memory.zero_()


def beside(
    case: Case, batch: Any, pairs: Sequence[tuple[torch.Tensor, HostMemory]], steps: int
) -> float:
    """The time of some steps that begin with the drain, over that of as many steps alone."""
    stream = torch.cuda.current_stream()

    def timed_s() -> float:
        began_s = time.perf_counter()
        for _ in range(steps):
            case.step(batch)
        stream.synchronize()  # not the device: the drain may go on
        return time.perf_counter() - began_s

    alone_s = timed_s()
    drain = copy_out(pairs)
    waiting = threading.Thread(target=drain.wait)
    waiting.start()
    together_s = timed_s()
    waiting.join()
    return together_s / alone_s


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
