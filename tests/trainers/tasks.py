"""Two tiny jobs, one per trainer, that use every kind of state there is, in milliseconds.

Each draws from all three generators: torch through dropout, numpy and Python through the noise that
``Noisy`` puts on the loss. A state that nobody uses could be lost without anybody noticing.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

import baton_sdk
from trainers import adapters, checkpoint, loop, ranks
from trainers.causal import CausalTextTask
from trainers.classify import Classifier, ClassifyTask, make_head
from trainers.configuration import LoopOptions
from trainers.lora import LoraOptions

OPTIONS = LoopOptions(
    steps=12,
    batch_size=4,
    accumulate=2,
    learning_rate=0.01,
    warmup_steps=3,
    evaluate_every=5,
    log_every=1,
    checkpoint_every_steps=4,
    checkpoint_every_s=0,
)


class Around:
    """A task that is like another; tests change one thing of it."""

    def __init__(self, inner: loop.Task) -> None:
        self.inner = inner
        self.sample_count = inner.sample_count
        self.metric = inner.metric
        self.higher_is_better = inner.higher_is_better
        self.evaluation_batch = inner.evaluation_batch
        self.identity = inner.identity
        self.whole_modules = inner.whole_modules
        self.delivers = inner.delivers

    @property
    def model(self) -> torch.nn.Module:
        """The inner one's, also when it is exchanged."""
        return self.inner.model

    @model.setter
    def model(self, model: torch.nn.Module) -> None:
        self.inner.model = model

    def batch(self, samples: Sequence[int]) -> Any:
        return self.inner.batch(samples)

    def loss(self, batch: Any) -> torch.Tensor:
        return self.inner.loss(batch)

    def evaluate(self, device: torch.device, world: ranks.World = ranks.ALONE) -> dict[str, float]:
        return self.inner.evaluate(device, world)

    def deliver(self) -> None:
        self.inner.deliver()


class Noisy(Around):
    """A task whose loss also depends on numpy's and Python's generators."""

    def loss(self, batch: Any) -> torch.Tensor:
        noise = numpy.random.standard_normal() + random.gauss(0.0, 1.0)
        return self.inner.loss(batch) * (1.0 + 0.01 * noise)


def tiny_gpt2() -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=256,
            n_positions=16,
            n_embd=8,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def tiny_vit() -> transformers.ViTModel:
    return transformers.ViTModel(
        transformers.ViTConfig(
            image_size=4,
            patch_size=2,
            num_channels=1,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )


def finetune_task() -> loop.Task:
    loop.seed_everything(5)
    tokens = torch.randint(0, 256, (30, 16), dtype=torch.uint8)
    return Noisy(
        CausalTextTask(
            tiny_gpt2(), tokens[:23], tokens[23:], bytes_per_token=1.0, identity="tiny text"
        )
    )


def lora_task() -> loop.Task:
    loop.seed_everything(5)
    tokens = torch.randint(0, 256, (30, 16), dtype=torch.uint8)
    options = LoraOptions(model="", train_data="", steps=1, rank=2, alpha=4, dropout=0.2)
    return Noisy(
        CausalTextTask(
            adapters.with_adapters(tiny_gpt2(), options),
            tokens[:23],
            tokens[23:],
            bytes_per_token=1.0,
            identity="tiny adapters",
        )
    )


def transfer_task(*, keep_features: bool = False) -> loop.Task:
    """Dropout and batch normalisation, of which the one draws and the other has buffers."""
    loop.seed_everything(5)
    pixels, labels = torch.rand(30, 1, 4, 4), torch.arange(30) % 2
    head = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.BatchNorm1d(8), make_head(8, 4, 2))
    return Noisy(
        ClassifyTask(
            Classifier(tiny_vit(), head, frozen=True),
            ({"pixel_values": pixels[:23]}, labels[:23]),
            ({"pixel_values": pixels[23:]}, labels[23:]),
            identity="tiny images",
            keep_features=(keep_features, keep_features),
        )
    )


def trainer(task: loop.Task, environment: Mapping[str, str] | None = None) -> loop.Trainer:
    """As a new process would make it, before ``prepare``."""
    made = loop.Trainer(task, OPTIONS, baton_sdk.Session(environment or {}))
    loop.seed_everything(OPTIONS.seed)
    return made


def started(task: loop.Task, options: LoopOptions) -> loop.Trainer:
    """Alone, and ready for its first step."""
    made = loop.Trainer(task, options, baton_sdk.Session({}))
    loop.seed_everything(options.seed)
    made.prepare()
    return made


def advance(trainer: loop.Trainer, steps: int) -> list[float]:
    """The losses."""
    return [trainer.advance() for _ in range(steps)]


def differences(left: checkpoint.Snapshot, right: checkpoint.Snapshot) -> list[str]:
    """Every component in which two whole states differ, bit for bit; empty when none does."""
    found = []
    for part in checkpoint.TENSOR_FILES:
        ours, theirs = getattr(left, part), getattr(right, part)
        for name in sorted(ours.keys() | theirs.keys()):
            same = (
                name in ours
                and name in theirs
                and ours[name].dtype == theirs[name].dtype
                and torch.equal(
                    ours[name].reshape(-1).view(torch.uint8),
                    theirs[name].reshape(-1).view(torch.uint8),
                )
            )
            if not same:
                found.append(f"{part}/{name}")
    for part in ("optimizer", "extra"):
        if left.state[part] != right.state[part]:
            found.append(f"state/{part}")
    for key in sorted(left.state["progress"].keys() | right.state["progress"].keys()):
        if left.state["progress"].get(key) != right.state["progress"].get(key):
            found.append(f"state/{key}")
    return found


def as_read(directory: Path, snapshot: checkpoint.Snapshot) -> checkpoint.Snapshot:
    """Through files and back."""
    checkpoint.write(snapshot, directory)
    return checkpoint.read(directory)
