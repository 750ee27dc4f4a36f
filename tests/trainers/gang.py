"""Gangs of ranks that talk over loopback, each forked from one host (``forking``).

A rank runs what a user's rank runs, ``start.run``, with its configuration in a file, and a tiny
task that can be told to fail.
"""

import contextlib
import json
import math
import os
import signal
import unittest.mock
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import baton_sdk
from agent import slabs as agent_slabs
from tests.trainers import forking, tasks
from tests.trainers.forking import Ended
from tests.trainers.test_capture import PLENTY, DeskSession, files_of
from trainers import adapters, loop, models, ranks, sharding, start
from trainers.causal import CausalTextTask
from trainers.classify import Classifier, ClassifyTask, make_head
from trainers.configuration import LoopOptions
from trainers.lora import LoraOptions


@dataclass(frozen=True, kw_only=True)
class GangOptions(LoopOptions):
    """What a rank of a test trains, and what goes wrong."""

    task: str = "finetune"
    dropout: float = 0.0
    noisy: bool = False
    stop_rank: int = -1
    """Gets SIGTERM in the middle of step ``stop_step``."""

    stop_step: int = 0
    full_rank: int = -1
    """Has memory for the passes of ``fitting`` samples only, from its pass ``full_from`` on, and
    notices in the middle of one, of its backward half where ``full_backward``."""

    fitting: int = 2
    full_from: int = 2
    full_backward: bool = False
    full_evaluation: bool = False
    """In evaluations, instead."""

    overflow_rank: int = -1
    """Finds infinity in its rows of one gradient of step ``overflow_step``."""

    overflow_step: int = 0
    other_rank: int = -1
    """Has another model than the others."""

    newer_rank: int = -1
    """Has newer trainers than the others."""

    output_directory: str = ""


class Faulty(tasks.Around):
    """Counts the passes through the model that this rank makes with gradients."""

    def __init__(self, inner: loop.Task, options: GangOptions) -> None:
        super().__init__(inner)
        self.options = options
        self.rank = int(os.environ["RANK"])
        self.calls = 0

    def loss(self, batch: Any) -> torch.Tensor:
        self.calls += 1
        if self.rank == self.options.stop_rank and self.calls == self.options.stop_step:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.rank == self.options.overflow_rank and self.calls == self.options.overflow_step:
            self._overflow()
        full = not self.options.full_evaluation and self.calls >= self.options.full_from
        samples = len(batch["labels"] if isinstance(batch, dict) else batch)
        with self._memory(samples, full=full):
            return super().loss(batch)

    def evaluate(self, device: torch.device, world: ranks.World = ranks.ALONE) -> dict[str, float]:
        with self._memory(self.evaluation_batch, full=self.options.full_evaluation):
            return super().evaluate(device, world)

    def _overflow(self) -> None:
        """Once the gradients of all are added up and dealt out: nobody else has these rows."""

        def fill(spread: torch.Tensor) -> None:
            sharding.local(spread.grad).fill_(math.inf)
            handle.remove()

        parameter: Any = next(self.model.parameters())
        handle = parameter.register_post_accumulate_grad_hook(fill)

    @contextlib.contextmanager
    def _memory(self, samples: int, *, full: bool) -> Iterator[None]:
        """The last layer does not fit any more; the ranks have exchanged rows of the others."""
        if not full or self.rank != self.options.full_rank or samples <= self.options.fitting:
            yield
            return
        layer = list(sharding.layers(self.model))[-1]

        def fail(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to ...")

        def fail_later(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            given[0].register_hook(fail)  # type: ignore[no-untyped-call]

        handle = layer.register_forward_pre_hook(fail_later if self.options.full_backward else fail)
        try:
            yield
        finally:
            handle.remove()


def build_transfer(options: GangOptions) -> loop.Task:
    """`transfer`, whose features are kept; `whole`, of which all layers are trained; `frozen`, of
    which they are made anew; `statistics`, with batch normalisation in the head."""
    pixels, labels = torch.rand(53, 1, 4, 4), torch.arange(53) % 3
    layers: list[torch.nn.Module] = [torch.nn.Dropout(options.dropout), make_head(8, 6, 3)]
    if options.task == "statistics":
        layers.insert(0, torch.nn.BatchNorm1d(8))
    frozen = options.task != "whole"
    kept = options.task == "transfer"
    task: loop.Task = ClassifyTask(
        Classifier(tasks.tiny_vit(), torch.nn.Sequential(*layers), frozen=frozen),
        ({"pixel_values": pixels[:40]}, labels[:40]),
        ({"pixel_values": pixels[40:]}, labels[40:]),
        identity=f"tiny {options.task}",
        keep_features=(kept, kept),
    )
    task.evaluation_batch = 4
    return Faulty(tasks.Noisy(task) if options.noisy else task, options)


def build(options: GangOptions, folder: Path) -> loop.Task:
    """The task; one step is one pass in the configurations that count passes."""
    if int(os.environ["RANK"]) == options.newer_rank:
        ranks.PROTOCOL += 1
    if options.task not in ("finetune", "lora"):
        return build_transfer(options)
    tokens = torch.randint(0, 256, (30, 16), dtype=torch.uint8)
    if int(os.environ["RANK"]) == options.other_rank:
        loop.seed_everything(options.seed + 1)
    described = transformers.GPT2Config(
        vocab_size=256,
        n_positions=16,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=options.dropout,
        embd_pdrop=options.dropout,
        attn_pdrop=options.dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = transformers.GPT2LMHeadModel(described)
    if options.task == "lora":
        if options.precision == "bfloat16":
            model = model.to(torch.bfloat16)
        chosen = LoraOptions(model="", train_data="", steps=1, rank=2, alpha=4)
        model = adapters.with_adapters(model, chosen)
    target = folder / options.output_directory
    task: loop.Task = CausalTextTask(
        model,
        tokens[:23],
        tokens[23:],
        bytes_per_token=1.0,
        identity=f"tiny {options.task}",
        deliver=(lambda whole: models.save(whole, target)) if options.output_directory else None,
    )
    return Faulty(tasks.Noisy(task) if options.noisy else task, options)


class Host(forking.Host):
    """Starts gangs, one after another."""

    def __init__(self, folder: Path, ranks_s_max: int = forking.RANKS_S_MAX) -> None:
        super().__init__(folder, "tests.trainers.gang", ranks_s_max)

    def run(
        self, size: int, environments: Sequence[Mapping[str, str]] = (), **options: Any
    ) -> list[Ended]:
        """Run a gang of so many ranks to its end; what became of each."""
        place = self.place()
        (place / "config.json").write_text(json.dumps(options))
        return self.run_in(place, environments or [{}] * size)


def run_rank(place: Path) -> int:
    """In a forked process."""
    arguments = ["--config", str(place / "config.json")]
    if not os.environ.get("GANG_DESK"):
        return start.run(GangOptions, lambda: build, arguments)
    return run_with_desk(Path(os.environ["GANG_DESK"]), arguments)


class Answering(DeskSession):
    """An agent in the same process, which stores what is captured at once."""

    def capture(self, *arguments: Any, **named: Any) -> baton_sdk.Ticket:
        ticket = super().capture(*arguments, **named)
        self.answer(ticket)
        assert ticket.parts == int(os.environ["WORLD_SIZE"])
        return ticket


def run_with_desk(target: Path, arguments: Sequence[str]) -> int:
    """With memory for captures from the first step on; the files of the last one, as an agent reads
    them, become the directory ``target``."""
    desk = agent_slabs.Slabs(1.0, lambda: PLENTY)
    session = Answering(desk, target)
    with unittest.mock.patch.object(baton_sdk, "connect", return_value=session):
        status = start.run(GangOptions, lambda: build, arguments)
    target.mkdir(parents=True)
    for name, data in files_of(desk).items():
        (target / name).write_bytes(data)
    return status


def serve_ranks() -> None:
    """In the host."""
    forking.serve(run_rank, start.leave)
