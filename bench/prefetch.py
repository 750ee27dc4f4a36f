"""What a step costs more than its computation: with the prefetch ring, and without.

A training step on one cached batch needs no loader at all, so it is the floor. Each figure is the
time of a step with a loader divided by the time of that step on the cached batch; 1.00 is a loader
that costs nothing. Blocks of steps take turns (cached, ring, naive, and around), so that whatever
else the machine does falls on all of them; every block has a ratio to the cached one of its round,
and the figure is their median. Steps at the beginning of a block, which live on what the ring had
ready, do not count. The naive loader makes each batch in the training thread, when it is needed.
Beside the time on the clock stands the training thread's own processor time, which says what it has
to do itself, and which other programs on the machine hardly touch.

Two batches: image-like (64 pictures of 224 x 224, 38.5 MB as float32; making it is picking,
converting and normalizing them) and tokens (32 texts of 1,024, 0.26 MB as int64; picking windows).
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import report
from trainers.prefetch import Prefetcher

ROUNDS, ROUNDS_QUICK = 9, 3
STEPS, STEPS_QUICK = 12, 4  # of a block that count
DEPTH = 2
WARM_STEPS = DEPTH + 2  # what a ring can have ready, and one more to find its pace

IMAGES, SIDE, PATCH, POOL = 64, 224, 16, 256
TEXTS, TEXT_TOKENS, VOCABULARY, CORPUS_TOKENS = 32, 1024, 4096, 4 << 20

CACHED, RING, NAIVE = "cached", "ring", "naive"
NOTES = (
    "What this says: on a CPU there is no copy engine and no second processor. The ring's thread"
    " makes batches on the core that the training (one thread) leaves free, and both share one"
    " memory bus. So the ratio is what the ring costs and hides where compute is scarcest;",
    "it is no forecast for a GPU, and the goal for one (<= 1.01) is not judged here:"
    " see bench/gpu/prefetch.py.",
    "Where more runs than there are cores (see the load average), times on the clock are chance;"
    " the rows of the training thread's own processor time are not.",
)

NextBatch = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Case:
    """``make`` gives a host batch by index; ``step`` is one training step on a device batch."""

    name: str
    make: Callable[[int], Any]
    step: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Spent:
    """On one step of a block: on the clock, and of the training thread's processor time."""

    wall_s: float
    thread_s: float


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    torch.set_num_threads(1)
    rounds, steps = (ROUNDS_QUICK, STEPS_QUICK) if asked.quick else (ROUNDS, STEPS)
    rows: list[report.Row] = []
    for case in (images(torch.device("cpu")), tokens(torch.device("cpu"))):
        report.say(f"prefetch: {case.name}, {rounds} rounds of {steps} steps with each loader")
        rows += measured(case, rounds, steps)
    report.show("A training step with its loader", rows, asked, NOTES)
    return 0


def measured(case: Case, rounds: int, steps: int) -> list[report.Row]:
    batch = case.make(0)
    indices = itertools.count()
    with Prefetcher(case.make, device=torch.device("cpu"), depth=DEPTH) as ring:
        loaders: dict[str, NextBatch] = {
            CACHED: lambda: batch,
            RING: lambda: ring.next().batch,
            NAIVE: lambda: case.make(next(indices)),
        }
        spent = alternate(loaders, case.step, rounds=rounds, steps=steps)
        waited_s = ring.input_wait_s_total / (rounds * (steps + WARM_STEPS))
    walls_s = {name: [block.wall_s for block in blocks] for name, blocks in spent.items()}
    threads_s = {name: [block.thread_s for block in blocks] for name, blocks in spent.items()}
    return [
        *ratio_rows(f"{case.name}: step", walls_s, reference=NAIVE),
        *ratio_rows(f"{case.name}: training thread", threads_s, reference=NAIVE),
        report.Row(name=f"{case.name}: wait for input, {RING}", value=waited_s * 1e3, unit="ms"),
        report.row_of(f"{case.name}: step, cached", [s * 1e3 for s in walls_s[CACHED]], "ms"),
    ]


def alternate(
    loaders: Mapping[str, NextBatch],
    step: Callable[[Any], None],
    *,
    rounds: int,
    steps: int,
    settle: Callable[[], None] = lambda: None,
) -> dict[str, list[Spent]]:
    """A block for each loader and round. ``settle`` returns when queued work is done."""
    spent: dict[str, list[Spent]] = {name: [] for name in loaders}
    names = list(loaders)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            next_batch = loaders[name]
            for _ in range(WARM_STEPS):
                step(next_batch())
            settle()
            began_s, began_thread_s = time.perf_counter(), time.thread_time()
            for _ in range(steps):
                step(next_batch())
            settle()
            wall_s, thread_s = time.perf_counter() - began_s, time.thread_time() - began_thread_s
            spent[name].append(Spent(wall_s / steps, thread_s / steps))
    return spent


def ratio_rows(
    what: str, times_s: Mapping[str, Sequence[float]], *, reference: str, goal: float | None = None
) -> list[report.Row]:
    """A row for each loader; the ring's has the reference, and the goal if there is one."""
    rows = []
    ratios = {
        name: [mine / floor for mine, floor in zip(times, times_s[CACHED], strict=True)]
        for name, times in times_s.items()
        if name != CACHED
    }
    for name, samples in ratios.items():
        row = report.row_of(f"{what}, {name} / cached", samples, "times")
        if name == RING:
            row = replace(
                row,
                reference=statistics.median(ratios[reference]),
                reference_source=f"{reference}, this run",
                goal=goal,
            )
        rows.append(row)
    return rows


def images(device: torch.device, hidden: int = 128, repeats: int = 1) -> Case:
    """Pictures through a patch embedding; ``repeats`` makes the step longer."""
    draw = torch.Generator().manual_seed(1)
    pool = torch.randint(0, 256, (POOL, 3, SIDE, SIDE), dtype=torch.uint8, generator=draw)
    weight = torch.randn(3 * PATCH * PATCH, hidden, generator=draw).to(device).requires_grad_()

    def make(index: int) -> dict[str, torch.Tensor]:
        chosen = torch.arange(index * IMAGES, (index + 1) * IMAGES).mul_(7919) % POOL
        pictures = pool.index_select(0, chosen).to(torch.float32)
        return {"pictures": pictures.mul_(1 / 255).sub_(0.45), "labels": chosen % 10}

    def step(batch: dict[str, torch.Tensor]) -> None:
        across = SIDE // PATCH
        cut = batch["pictures"].view(IMAGES, 3, across, PATCH, across, PATCH)
        patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * PATCH * PATCH)
        loss = sum(
            torch.nn.functional.gelu(patches @ weight).square().mean() for _ in range(repeats)
        )
        assert isinstance(loss, torch.Tensor)
        _descend(loss + 0 * batch["labels"].sum(), [weight])

    return Case("image-like batch (38.5 MB)", make, step)


def tokens(device: torch.device, width: int = 64, repeats: int = 1) -> Case:
    """Texts through an embedding and a projection; ``repeats`` makes the step longer."""
    draw = torch.Generator().manual_seed(2)
    corpus = torch.randint(0, VOCABULARY, (CORPUS_TOKENS,), generator=draw)
    embedding = torch.randn(VOCABULARY, width, generator=draw).to(device).requires_grad_()
    weight = torch.randn(width, 4 * width, generator=draw).to(device).requires_grad_()

    def make(index: int) -> dict[str, torch.Tensor]:
        starts = torch.arange(index * TEXTS, (index + 1) * TEXTS).mul_(104_729)
        starts %= CORPUS_TOKENS - TEXT_TOKENS
        return {"ids": corpus[starts[:, None] + torch.arange(TEXT_TOKENS)]}

    def step(batch: dict[str, torch.Tensor]) -> None:
        found = torch.nn.functional.embedding(batch["ids"], embedding).view(-1, width)
        loss = sum(torch.nn.functional.gelu(found @ weight).square().mean() for _ in range(repeats))
        assert isinstance(loss, torch.Tensor)
        _descend(loss, [embedding, weight])

    return Case("token batch (0.26 MB)", make, step)


def _descend(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=1e-4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
