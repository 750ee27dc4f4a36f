"""The one training loop: the same for every trainer, and exactly resumable.

Problem: after a handoff a training must do what it would have done. A data loader that shuffles
with a generator and hands work to processes has a position nobody can write down. Here the order
of the data is a function (``order``), and the place in the data one integer, whatever the size of
the data. The learning rate is a function of the step. What is left, parameters, optimizer and
random generators, ``checkpoint`` captures; checkpoints and evaluations draw nothing from the
generators, so when they happen changes nothing either.

Samples come prefetched, in pieces that fit into memory (``microbatch``).

Several ranks run the same loop over one model that is spread over them (``sharding``); what they do
after each step, they decide together (``ranks``), and each keeps its part of the state (``parts``).

Between two steps the loop looks whether it should stop: then it checkpoints, waits until the agent
has the checkpoint on disk, as long as the grace allows, and leaves with status 75.
"""

import os
import random
import time
from dataclasses import replace
from typing import Any

import numpy
import torch

import baton_sdk
from trainers import (
    accord,
    checkpoint,
    compiling,
    evaluation,
    exactness,
    extra,
    manifest,
    microbatch,
    optimization,
    parts,
    ranks,
    restoring,
    saving,
    sharing,
    timing,
)
from trainers.best import Best
from trainers.configuration import LoopOptions
from trainers.events import emit
from trainers.guard import Guard, is_tight
from trainers.retry import Retry
from trainers.task import Task as Task

GRACE_MARGIN_S = 2.0
"""Kept of the grace for leaving: the interpreter with torch takes about a second to go."""

STORE_TIMEOUT_S = 60.0
"""At the end of a job: how long to wait for the last checkpoint to be stored."""


def seed_everything(seed: int) -> None:
    """Before a model is built, so that a first start is repeatable too."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Trainer:
    """A task on its way through its steps."""

    def __init__(
        self,
        task: Task,
        options: LoopOptions,
        session: baton_sdk.Session,
        world: ranks.World = ranks.ALONE,
    ) -> None:
        self.task = task
        self.options = options
        self.session = session
        self.world = world
        self.device = torch.device("cpu")
        self.step = 0
        self.samples = 0
        self.metrics: dict[str, float] = {}
        self.micro_batch = options.batch_size
        self.best = Best(
            higher_is_better=task.higher_is_better, patience=options.early_stop_patience
        )
        self.objects: dict[str, extra.Object] = {}
        """What else the training depends on; whoever adds to it does so before ``run``."""
        self.resumed: exactness.Verdict | None = None
        self.optimizer: torch.optim.Optimizer
        self.scaler: torch.amp.GradScaler
        self.input_wait_ms = 0.0
        self.timing = timing.Timing()
        self._retry = Retry(task, Guard(world), emit)
        self._feed: microbatch.Feed | None = None
        self._saver = saving.Saver(session, options, world)
        self._accord = accord.Accord(world, session, self._saver)
        self._compiling = compiling.Compiling(task.model, wanted=options.compile)
        self._libraries = exactness.libraries_of(task.model)
        self._parent = ""
        self._ticket: baton_sdk.Ticket | None = None
        self._saved_step = 0
        self._saved_at_s = 0.0
        self._evaluated_step = -1

    def run(self) -> int:
        """Train until done or asked to stop. Returns the exit status: 0 or 75. Raises
        TooLargeError when not even one sample fits into memory."""
        try:
            self.prepare()
            while self.step < self.options.steps and not self.best.exhausted:
                stop = self._accord.stop()
                if stop is not None:
                    return self.leave(stop)
                self.log(self.advance())
                if not self._saver.prepared:
                    self._saver.prepare(self._live())
                if self.step % self.options.evaluate_every == 0:
                    self.evaluate()
                if self.checkpoint_due():
                    self._try_save()
        finally:
            self.close()
        status = self.finish()
        self.session.enter("finish")
        self.deliver()
        return status

    @property
    def _whole(self) -> int:
        """Samples of one step, over all ranks."""
        return self.options.batch_size * self.options.accumulate

    def close(self) -> None:
        """End the prefetching, which ``advance`` begins again, and a capture under way."""
        self.settle()
        if self._feed is not None:
            self._feed.close()
            self._feed = None

    def prepare(self) -> None:
        """Move to the device and resume, if there is something to resume from; else evaluate
        what there is, for a figure to compare the result with."""
        if self.options.deterministic:
            exactness.insist_on_bits()
        sharing.keep_to(self.session.gpu_memory_ratio)
        self.device = self.world.device()
        if unseen := ranks.unseen(os.environ):
            emit("warning", message=unseen)
        self.world.open(self.device, self.options.collective_timeout_s)
        self._retry.open(self.device)
        self._compiling.open(self.device, emit)
        if not self.world.alone:
            seed_everything(self.world.seed_of(self.options.seed, 0))
        self.optimizer = optimization.make_optimizer(self.task.model, self.options)
        self._retry.follow(self.optimizer)
        self.scaler = optimization.make_scaler(self.device, self.options)
        if self.scaler.is_enabled():
            self.objects["scaler"] = self.scaler
        with self.timing.measure(timing.RESTORE_S):
            source = restoring.find(self.session, self.options, self.task.model, self.world, emit)
            if source is not None:
                self.resume(source)
        self._saved_at_s = time.monotonic()
        parameters = list(self.task.model.parameters())
        self._tell(
            "started",
            resumed=source is not None,
            step=self.step,
            steps=self.options.steps,
            device=str(self.device),
            ranks=self.world.size,
            threads=torch.get_num_threads(),
            samples=self.task.sample_count,
            micro_batch=self.micro_batch,
            trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            frozen_parameters=sum(p.numel() for p in parameters if not p.requires_grad),
        )
        if self.resumed is not None:
            level, why = self.resumed.level, self.resumed.why
            self._tell("resumed", level=level.name, meaning=level.value, why=why, step=self.step)
        self.session.milestone("load")
        if source is None:
            self.evaluate()
            before = {f"{self.task.metric}_at_start": self.metrics[self.task.metric]}
            self.metrics = {**self.metrics, **before}
        self._accord.begin()
        self._report_progress()

    def resume(self, snapshot: checkpoint.Snapshot) -> None:
        """Continue from a snapshot. Raises CheckpointError if it belongs to something else."""
        found = snapshot.state["progress"].get("identity")
        if found != self.task.identity:
            raise checkpoint.CheckpointError(
                f"the checkpoint belongs to '{found}', this job is '{self.task.identity}'"
            )
        try:
            described = manifest.parse(snapshot.state)
        except manifest.ManifestError as error:
            raise checkpoint.CheckpointError(str(error)) from error
        progress = checkpoint.restore(snapshot, self.task.model, self.optimizer, self.objects)
        self.step = progress["step"]
        self.samples = progress["samples"]
        self.metrics = progress["metrics"]
        self.best.restore(progress["best"])
        # Never more than is configured, but less where less fitted.
        self.micro_batch = min(progress["micro_batch"], self.options.batch_size)
        self.close()  # what was prefetched belongs to another place in the data
        self._saved_step = self.step
        self._parent = snapshot.state[manifest.HASH_KEY]
        if described.world_size != self.world.size:
            seed_everything(self.world.seed_of(self.options.seed, self.samples))
        place = f"step {self.step}, {self.samples} samples, {self.task.identity}"
        verdict = exactness.level(described.fingerprint, self._fingerprint())
        self.resumed = restoring.agreed(verdict, place, self.world)

    def snapshot(self) -> checkpoint.Snapshot:
        """A copy of the whole state."""
        return checkpoint.copied(self._live())

    def _live(self) -> checkpoint.Snapshot:
        """The whole state, now; its tensors change with the next step."""
        count = self.task.sample_count
        epoch, position = divmod(self.samples, count)
        progress = {
            "identity": self.task.identity,
            "step": self.step,
            "samples": self.samples,
            "epoch": epoch,
            "position": position,
            "data_seed": self.options.seed,
            "micro_batch": self.micro_batch,
            "best": self.best.state(),
            "schedule": {
                "name": self.options.schedule,
                "learning_rate": optimization.learning_rate_at(max(1, self.step), self.options),
            },
            "metrics": self.metrics,
        }
        live = checkpoint.live(self.task.model, self.optimizer, progress, self.objects)
        own, layout = parts.part_of(live, self.world)
        return replace(own, state=manifest.seal(self._manifest(layout), own.state))

    def _manifest(self, layout: manifest.Layout) -> manifest.Manifest:
        attempt = manifest.attempt_of(os.environ)
        return manifest.Manifest(
            job=attempt.job,
            epoch=attempt.epoch,
            step=self.step,
            samples=self.samples,
            parent=self._parent,
            world_size=self.world.size,
            rank=None if self.world.alone else self.world.rank,
            fingerprint=self._fingerprint(),
            level=self.resumed.level if self.resumed else None,
            tensors=layout,
            files={},
        )

    def _fingerprint(self) -> exactness.Fingerprint:
        return exactness.current(
            self.device,
            world_size=self.world.size,
            precision=self.options.precision,
            global_batch=self._whole,
            micro_batch=self.micro_batch,
            data_seed=self.options.seed,
            compiler=self._compiling.compiler,
            libraries=self._libraries,
        )

    def advance(self) -> float:
        """One optimizer step over ``batch_size * accumulate`` samples. Returns the mean loss."""
        self.session.enter(self._compiling.section())
        with self.timing.measure(timing.STEP_S):
            share = self._take_step()
            tight = is_tight(self.device)
            mean_loss = self._accord.after_step(share, self.step, self._unsaved_s(), tight=tight)
        self.session.milestone("first_step")
        self.metrics = {**self.metrics, "loss": mean_loss}
        self._report_progress()
        return mean_loss

    def _take_step(self) -> float:
        rate = optimization.learning_rate_at(self.step + 1, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.task.model.train()
        self.input_wait_ms = 0.0
        self._retry.begin_step(tight=self._accord.tight)
        loss = self._retry.guard.attempt(self._gradients)
        while loss is None:
            self._take_smaller_pieces()
            loss = self._retry.guard.attempt(self._gradients)
        self.settle()  # what is being captured may not change yet
        optimization.update(self.task.model, self.optimizer, self.scaler, self.options, self.world)
        self.samples += self.options.batch_size * self.options.accumulate
        self.step += 1
        return float(loss)

    def _gradients(self) -> torch.Tensor:
        """Add up the gradients of one step. Returns the mean loss."""
        options, whole = self.options, self._whole
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        feed = self._opened_feed()
        for count in feed.sizes:
            fetched = feed.next()
            self.input_wait_ms += fetched.input_wait_s * 1000
            self.timing.add(timing.INPUT_WAIT_S, fetched.input_wait_s)
            self.settle(wait=False)
            with optimization.autocast(self.device, options):
                loss = self.task.loss(fetched.batch)
                loss = loss / (whole / count) if count else loss * 0.0
            # Ranks' gradients are averaged, and the shares of the loss add up.
            self.scaler.scale(loss * self.world.size).backward()
            total += loss.detach()
        return total

    def _opened_feed(self) -> microbatch.Feed:
        if self._feed is None:
            feed = microbatch.Feed(
                self.task,
                self.options,
                size=self.micro_batch,
                samples=self.samples,
                steps=self.options.steps - self.step,
                world=self.world,
            )
            feed.open(self.device, on_grow=lambda text: emit("warning", message=text))
            self._feed = feed
        return self._feed

    def _take_smaller_pieces(self) -> None:
        """Out of memory: back to the beginning of the step, with half as many samples at once."""
        self.close()
        self.optimizer.zero_grad(set_to_none=True)
        place = f"in step {self.step + 1}"
        self.micro_batch = self._retry.smaller(self.micro_batch, self._whole, place)
        if self._compiling.again(self.task.model):
            self.session.enter("compile")

    def log(self, loss: float) -> None:
        """A line, every so many steps."""
        if self.step % self.options.log_every == 0:
            scale = {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
            self._tell(
                "step",
                step=self.step,
                loss=loss,
                learning_rate=optimization.learning_rate_at(self.step, self.options),
                input_wait_ms=round(self.input_wait_ms, 3),
                **scale,
            )

    def evaluate(self) -> None:
        """Figures on held-out data, to the log and to the agent."""
        self.session.enter("eval")
        with self.timing.measure(timing.EVALUATE_S), self._compiling.paused():
            figures = evaluation.figures(
                self.task,
                self.options,
                self.device,
                self._retry,
                micro_batch=self.micro_batch,
            )
        self._compiling.follow(self.task.model)
        self._retry.spread.settle()
        self._evaluated_step = self.step
        best = self.best.take(self.step, figures[self.task.metric])
        self.metrics = {**self.metrics, **figures}
        if self.best.step >= 0:
            name = f"{self.task.metric}_best"
            self.metrics |= {name: self.best.value, f"{name}_step": self.best.step}
        self._tell("evaluated", step=self.step, **figures, best=best)
        if self.best.exhausted:
            self._tell("early_stop", step=self.step, best_step=self.best.step, best=self.best.value)
        self.session.milestone("evaluated")
        self._report_progress()

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is to be taken after this step."""
        return self._accord.save(self.step, self._unsaved_s())

    def _unsaved_s(self) -> float:
        return time.monotonic() - self._saved_at_s

    def save(self, *, wait_s: float = 0.0, last: bool = False) -> None:
        """Keep a checkpoint, if there is somewhere to; `saving` says how. Raises OSError when it
        cannot be written; the training is unharmed."""
        self.settle()
        if self._saver.parent is None:
            return
        self.session.enter("finish" if last else "save")  # the last may go a slower way
        with self.timing.measure(timing.CAPTURE_S):
            kept = self._saver.save(self._live(), self.step, wait_s=wait_s, last=last)
        self._keep(kept)

    def settle(self, *, wait: bool = True) -> None:
        """End the capture that was begun, if there is one; without `wait`, if it is copied."""
        overlaps = self._saver.overlaps
        with self.timing.measure(timing.CAPTURE_S):
            kept = self._saver.settle(wait=wait)
        self._keep(kept)
        if overlaps and not self._saver.overlaps:
            emit("warning", message=saving.CHANGED_WHILE_CAPTURED)

    def _keep(self, kept: saving.Kept | None) -> None:
        """A checkpoint was handed over; None: it is put off, or not copied yet."""
        if kept is None:
            return
        self._ticket = kept.ticket
        self._parent = kept.state[manifest.HASH_KEY]
        self._saved_step, self._saved_at_s = kept.ticket.step, time.monotonic()
        stall_s = round(kept.stall_s, 4)
        self._tell("checkpoint", step=kept.ticket.step, seconds=stall_s, captured=kept.captured)

    def leave(self, stop: baton_sdk.StopRequest) -> int:
        """Checkpoint, unless this step already is one, and go."""
        emit("stopping", step=self.step, reason=stop.reason, grace_ms=stop.grace_ms)
        self.settle()
        if self._saved_step != self.step:
            self._try_save(wait_s=(stop.remaining_s - GRACE_MARGIN_S) / 2, last=True)
        with self.timing.measure(timing.CAPTURE_S):
            stored = self._saver.wait_stored(stop.remaining_s - GRACE_MARGIN_S)
        self._report_progress()
        emit("stopped", step=self.step, checkpoint_step=self._saved_step, stored=stored)
        self.session.leaving(baton_sdk.EXIT_RUN_AGAIN)
        return baton_sdk.EXIT_RUN_AGAIN

    def finish(self) -> int:
        """The last evaluation, the last checkpoint, the last line. Raises OSError when the
        result cannot be written: then the job has failed."""
        self.settle()
        if self._evaluated_step != self.step:
            self.evaluate()
        if self._saved_step != self.step:
            self.save(wait_s=STORE_TIMEOUT_S, last=True)
        with self.timing.measure(timing.CAPTURE_S):
            stored = self._ticket is None or self._saver.wait_stored(STORE_TIMEOUT_S)
        self._report_progress()
        if not stored and self._ticket is not None:
            reason = self._ticket.reason or f"no answer in {STORE_TIMEOUT_S:.0f} s"
            emit("warning", message=f"the last checkpoint is not stored: {reason}")
        value = self.metrics[self.task.metric]
        self._tell("finished", step=self.step, metric=self.task.metric, value=value, **self.metrics)
        return 0

    def deliver(self) -> None:
        """Have the result written, by rank 0; the others wait for it, and fail with it. Raises
        OSError, or RankError."""
        if not self.task.delivers:
            return
        whole = self._retry.spread.gather()
        failure = ""
        if whole is not None:
            self.task.model = whole
            try:
                self.task.deliver()
            except OSError as error:
                if self.world.alone:
                    raise
                failure = f"cannot write the result: {error}"
        self.world.check_none_failed(failure)

    def _try_save(self, *, wait_s: float = 0.0, last: bool = False) -> None:
        try:
            self.save(wait_s=wait_s, last=last)
        except OSError as error:
            # A later checkpoint may find room again; until then the last one still counts.
            self._saved_at_s = time.monotonic()
            emit("warning", message=f"no checkpoint at step {self.step}: {error}")

    def _report_progress(self) -> None:
        # A time is no part of the state, which is the same in every run: so it is not in metrics.
        figures = {**self.metrics, "input_wait_ms": round(self.input_wait_ms, 3)}
        shown = figures if self.world.first else {}
        self.session.progress(self.step, self.options.steps, shown, self.timing.totals())

    def _tell(self, event: str, **values: Any) -> None:
        """A line about the training: several ranks know the same, and the first says it."""
        if self.world.first:
            emit(event, **values)
