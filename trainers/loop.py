"""The one training loop: the same for every trainer, and exactly resumable.

Problem: after a handoff a training must do what it would have done. A data loader that shuffles
with a generator and hands work to processes has a position nobody can write down. Here the order
of the data is a function: position ``i`` is in epoch ``i // n``, and a permutation keyed by seed
and epoch says which sample stands there. So the place in the data is one integer, whatever the
size of the data. The learning rate is a function of the step. What is left, parameters, optimizer
and random generators, ``checkpoint`` captures; checkpoints and evaluations draw nothing from the
generators, so when they happen changes nothing either.

The permutation is a Feistel network over the next even power of two, walked until it lands within
range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): no table, O(1) memory.

Between two steps the loop looks whether it should stop: then it checkpoints, waits until the agent
has the checkpoint on disk, as long as the grace allows, and leaves with status 75.

Each line on standard output is a JSON object with an ``event``.
"""

import json
import math
import random
import shutil
import sys
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch

import baton_sdk
from trainers import checkpoint
from trainers.configuration import LoopOptions

FEISTEL_ROUNDS = 4
"""Four rounds of a good function are a strong permutation (Luby and Rackoff, 1988)."""

GRACE_MARGIN_S = 2.0
"""Kept of the grace for leaving: the interpreter with torch takes about a second to go."""

STORE_TIMEOUT_S = 60.0
"""At the end of a job: how long to wait for the last checkpoint to be stored."""

STANDALONE_CHECKPOINTS_MAX = 2
"""Kept outside Baton: the last one, and one more in case a disk error spoils it."""


class Task(Protocol):
    """A model and its data."""

    model: torch.nn.Module
    sample_count: int
    metric: str
    """The name, in what ``evaluate`` returns, of the figure that counts."""

    identity: str
    """Describes data and model; a checkpoint of another identity is refused."""

    def loss(self, samples: Sequence[int], device: torch.device) -> torch.Tensor:
        """The mean loss over these samples, ready for ``backward``."""
        ...

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Figures on held-out data. Draws nothing from any random generator."""
        ...


def sample_at(position: int, count: int, seed: int) -> int:
    """Which of ``count`` samples stands at ``position`` (0 or more) of the endless data order."""
    epoch, place = divmod(position, count)
    half_bits = max(1, (max(1, (count - 1).bit_length()) + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = place >> half_bits, place & mask
        for round_number in range(FEISTEL_ROUNDS):
            text = b"%d/%d/%d/%d" % (seed, epoch, round_number, right)
            digest = blake2b(text, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        place = left << half_bits | right
        if place < count:
            return place


def learning_rate_at(step: int, options: LoopOptions) -> float:
    """The rate for the step that makes ``step`` steps complete (1 to ``options.steps``)."""
    if step <= options.warmup_steps:
        return options.learning_rate * step / options.warmup_steps
    if options.schedule == "constant":
        return options.learning_rate
    done_ratio = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    if options.schedule == "linear":
        return options.learning_rate * (1 - done_ratio)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * done_ratio))


def seed_everything(seed: int) -> None:
    """Before a model is built, so that a first start is repeatable too."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_optimizer(model: torch.nn.Module, options: LoopOptions) -> torch.optim.Optimizer:
    """AdamW; weights decay, biases and norms (fewer than two dimensions) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=options.learning_rate)


def emit(event: str, **values: Any) -> None:
    """One line for people and programs. JSON has no word for nan and infinity: they are quoted."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[name] = str(value)
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


class Trainer:
    """A task on its way through its steps."""

    def __init__(self, task: Task, options: LoopOptions, session: baton_sdk.Session) -> None:
        self.task = task
        self.options = options
        self.session = session
        self.device = torch.device("cpu")
        self.step = 0
        self.samples = 0
        self.metrics: dict[str, float] = {}
        self.optimizer: torch.optim.Optimizer
        self._ticket: baton_sdk.Ticket | None = None
        self._saved_step = 0
        self._saved_at_s = 0.0
        self._evaluated_step = -1

    def run(self) -> int:
        """Train until done or asked to stop. Returns the exit status: 0 or 75."""
        self.prepare()
        while self.step < self.options.steps:
            if self.session.stop_requested is not None:
                return self.leave(self.session.stop_requested)
            loss = self.advance()
            if self.step % self.options.log_every == 0:
                rate = learning_rate_at(self.step, self.options)
                emit("step", step=self.step, loss=loss, learning_rate=rate)
            if self.step % self.options.evaluate_every == 0:
                self.evaluate()
            if self.checkpoint_due():
                self._try_save()
        return self.finish()

    def prepare(self) -> None:
        """Move to the device and resume, if there is something to resume from; else evaluate
        what there is, for a figure to compare the result with."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.task.model.to(self.device)
        self.optimizer = make_optimizer(self.task.model, self.options)
        source = self.session.restore_directory or self._newest_standalone()
        if source is not None:
            self.resume(checkpoint.read(source))
        self._saved_at_s = time.monotonic()
        parameters = list(self.task.model.parameters())
        emit(
            "started",
            resumed=source is not None,
            step=self.step,
            steps=self.options.steps,
            device=str(self.device),
            threads=torch.get_num_threads(),
            samples=self.task.sample_count,
            trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            frozen_parameters=sum(p.numel() for p in parameters if not p.requires_grad),
        )
        self.session.milestone("load")
        if source is None:
            self.evaluate()
            before = {f"{self.task.metric}_at_start": self.metrics[self.task.metric]}
            self.metrics = {**self.metrics, **before}
        self._report_progress()

    def resume(self, snapshot: checkpoint.Snapshot) -> None:
        """Continue from a snapshot. Raises CheckpointError if it belongs to something else."""
        found = snapshot.state["progress"].get("identity")
        if found != self.task.identity:
            raise checkpoint.CheckpointError(
                f"the checkpoint belongs to '{found}', this job is '{self.task.identity}'"
            )
        progress = checkpoint.restore(snapshot, self.task.model, self.optimizer)
        self.step = progress["step"]
        self.samples = progress["samples"]
        self.metrics = progress["metrics"]
        self._saved_step = self.step

    def snapshot(self) -> checkpoint.Snapshot:
        """The whole state, now."""
        count = self.task.sample_count
        epoch, position = divmod(self.samples, count)
        progress = {
            "identity": self.task.identity,
            "step": self.step,
            "samples": self.samples,
            "epoch": epoch,
            "position": position,
            "data_seed": self.options.seed,
            "schedule": {
                "name": self.options.schedule,
                "learning_rate": learning_rate_at(max(1, self.step), self.options),
            },
            "metrics": self.metrics,
        }
        return checkpoint.capture(self.task.model, self.optimizer, progress)

    def advance(self) -> float:
        """One optimizer step over ``batch_size * accumulate`` samples. Returns the mean loss."""
        options, count = self.options, self.task.sample_count
        rate = learning_rate_at(self.step + 1, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.task.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        half = options.precision == "bfloat16"
        for _ in range(options.accumulate):
            positions = range(self.samples, self.samples + options.batch_size)
            chosen = [sample_at(position, count, options.seed) for position in positions]
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
                loss = self.task.loss(chosen, self.device) / options.accumulate
            loss.backward()
            total += loss.detach()
            self.samples += options.batch_size
        if options.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), options.clip_norm)
        self.optimizer.step()
        self.step += 1
        mean_loss = float(total)
        self.session.milestone("first_step")
        self.metrics = {**self.metrics, "loss": mean_loss}
        self._report_progress()
        return mean_loss

    def evaluate(self) -> None:
        """Figures on held-out data, to the log and to the agent."""
        self.task.model.eval()
        with torch.no_grad():
            figures = self.task.evaluate(self.device)
        self._evaluated_step = self.step
        self.metrics = {**self.metrics, **figures}
        emit("evaluated", step=self.step, **figures)
        self.session.milestone("evaluated")
        self._report_progress()

    def checkpoint_due(self) -> bool:
        """Every so many steps, and every so many seconds; 0 switches either off."""
        options = self.options
        if options.checkpoint_every_steps and self.step % options.checkpoint_every_steps == 0:
            return True
        waited_s = time.monotonic() - self._saved_at_s
        return options.checkpoint_every_s > 0 and waited_s >= options.checkpoint_every_s

    def save(self) -> None:
        """Write a checkpoint and hand it over, if there is somewhere to write it. Raises OSError
        when it cannot be written; the training is unharmed."""
        parent = self._checkpoint_parent()
        if parent is None:
            return
        began_s = time.monotonic()
        directory = parent / f"checkpoint-{self.step:09d}"
        checkpoint.write(self.snapshot(), directory)
        self._ticket = self.session.checkpoint(directory, self.step)
        self._saved_step, self._saved_at_s = self.step, time.monotonic()
        emit("checkpoint", step=self.step, seconds=round(self._saved_at_s - began_s, 3))
        if not self.session.under_baton:
            for old in _standalone_checkpoints(parent)[:-STANDALONE_CHECKPOINTS_MAX]:
                shutil.rmtree(old)

    def leave(self, stop: baton_sdk.StopRequest) -> int:
        """Checkpoint, unless this step already is one, and go."""
        emit("stopping", step=self.step, reason=stop.reason, grace_ms=stop.grace_ms)
        if self._saved_step != self.step:
            self._try_save()
        stored = self._ticket is not None and self._ticket.wait_stored(
            stop.remaining_s - GRACE_MARGIN_S
        )
        emit("stopped", step=self.step, checkpoint_step=self._saved_step, stored=stored)
        return baton_sdk.EXIT_RUN_AGAIN

    def finish(self) -> int:
        """The last evaluation, the last checkpoint, the last line. Raises OSError when the
        result cannot be written: then the job has failed."""
        if self._evaluated_step != self.step:
            self.evaluate()
        if self._saved_step != self.step:
            self.save()
        if self._ticket is not None and not self._ticket.wait_stored(STORE_TIMEOUT_S):
            reason = self._ticket.reason or f"no answer in {STORE_TIMEOUT_S:.0f} s"
            emit("warning", message=f"the last checkpoint is not stored: {reason}")
        value = self.metrics[self.task.metric]
        emit("finished", step=self.step, metric=self.task.metric, value=value, **self.metrics)
        return 0

    def _try_save(self) -> None:
        try:
            self.save()
        except OSError as error:
            # A later checkpoint may find room again; until then the last one still counts.
            self._saved_at_s = time.monotonic()
            emit("warning", message=f"no checkpoint at step {self.step}: {error}")

    def _report_progress(self) -> None:
        self.session.progress(self.step, self.options.steps, self.metrics)

    def _checkpoint_parent(self) -> Path | None:
        if self.session.staging_directory is not None:
            return self.session.staging_directory
        chosen = self.options.checkpoint_directory
        return Path(chosen) if chosen else None

    def _newest_standalone(self) -> Path | None:
        if self.session.under_baton or not self.options.checkpoint_directory:
            return None
        kept = _standalone_checkpoints(Path(self.options.checkpoint_directory))
        return kept[-1] if kept else None


def _standalone_checkpoints(parent: Path) -> list[Path]:
    """Oldest first: the names hold the step in nine digits."""
    return sorted(parent.glob("checkpoint-?????????"))
