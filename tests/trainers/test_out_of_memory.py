"""Too little memory makes a run slower and changes nothing else: the same samples, the same losses.

The oracle is a run that was configured with the smaller batch. The task that runs out of memory
does so after its forward pass, when random numbers are drawn and running statistics have moved.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.trainers import tasks
from tests.trainers.tasks import advance, started
from trainers import guard, loop, microbatch, ranks

ACCUMULATE_1 = replace(tasks.OPTIONS, batch_size=8, accumulate=1)
STEPS = 6


class Greedy(tasks.Around):
    """Fits ``samples_max`` at once, from call number ``from_call`` of ``loss`` on."""

    def __init__(self, inner: loop.Task, samples_max: int, from_call: int = 0) -> None:
        super().__init__(inner)
        self.samples_max = samples_max
        self.from_call = from_call
        self.calls = 0
        self.error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory. Tried to ...")

    def loss(self, batch: Any) -> torch.Tensor:
        loss = super().loss(batch)
        self.calls += 1
        size = len(batch["labels"] if isinstance(batch, dict) else batch)
        if size > self.samples_max and self.calls > self.from_call:
            raise self.error
        return loss

    def evaluate(self, device: torch.device, world: ranks.World = ranks.ALONE) -> dict[str, float]:
        if self.evaluation_batch > self.samples_max:
            raise self.error
        return super().evaluate(device, world)


def warnings(text: str) -> list[str]:
    lines = [json.loads(line) for line in text.splitlines()]
    return [line["message"] for line in lines if line["event"] == "warning"]


@pytest.mark.parametrize(
    ("make_task", "samples_max"),
    [
        *((tasks.finetune_task, samples) for samples in (4, 2, 1)),
        *((tasks.lora_task, samples) for samples in (4, 2, 1)),
        *(
            (tasks.transfer_task, samples) for samples in (4, 2)
        ),  # it normalises batches: 2 at least
    ],
)
def test_the_run_equals_the_one_configured_with_the_smaller_batch(
    make_task: Callable[[], loop.Task], samples_max: int, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(tasks.OPTIONS, batch_size=samples_max, accumulate=8 // samples_max)
    expected = started(make_task(), small)
    losses = advance(expected, STEPS)
    capsys.readouterr()
    trainer = started(Greedy(make_task(), samples_max), ACCUMULATE_1)
    assert advance(trainer, STEPS) == losses
    assert trainer.micro_batch == samples_max
    assert tasks.differences(expected.snapshot(), trainer.snapshot()) == []
    said = [text for text in warnings(capsys.readouterr().out) if "step 1" in text]
    assert said[0] == (
        "out of memory in step 1 with 8 samples at once: going on with 4 at once, and 8 samples a "
        "step as before"
    )
    assert len(said) == {4: 1, 2: 2, 1: 3}[samples_max]


def test_a_step_is_taken_again_from_its_beginning() -> None:
    """Out of memory in the second half of the third step, when gradients have been added up."""
    options = replace(tasks.OPTIONS, batch_size=4, accumulate=2)
    expected = started(tasks.transfer_task(), options)
    losses = advance(expected, 2)
    expected.close()
    expected.micro_batch = 2
    losses += advance(expected, 4)
    trainer = started(Greedy(tasks.transfer_task(), 2, from_call=5), options)
    trainer.task.evaluation_batch = 2
    assert advance(trainer, 6) == losses
    assert tasks.differences(expected.snapshot(), trainer.snapshot()) == []


def test_a_resumed_run_begins_with_the_size_that_fitted() -> None:
    straight = started(Greedy(tasks.finetune_task(), 2), ACCUMULATE_1)
    losses = advance(straight, 2)
    saved = straight.snapshot()
    losses += advance(straight, 4)
    task = Greedy(tasks.finetune_task(), 2)
    second = started(task, ACCUMULATE_1)
    second.resume(saved)
    assert second.micro_batch == 2
    assert advance(second, 4) == losses[2:]
    assert task.calls == 4 * 4, "nothing was tried twice"
    assert tasks.differences(straight.snapshot(), second.snapshot()) == []


def test_an_odd_batch_keeps_its_samples_and_their_weight() -> None:
    """7 samples in pieces of 4 and 3: the same mean, as far as sums in another order are."""
    assert microbatch.pieces(7, 7) == [7]
    assert microbatch.pieces(7, 4) == [4, 3]
    assert microbatch.pieces(14, 4) == [4, 4, 4, 2]
    assert [microbatch.halved(size, "") for size in (7, 4, 3, 2)] == [4, 2, 2, 1]
    odd = replace(tasks.OPTIONS, batch_size=7, accumulate=1)
    seen: list[int] = []

    class Recording(Greedy):
        def batch(self, samples: Any) -> Any:
            seen.extend(samples)
            return super().batch(samples)

    task = Recording(plain_text_task(), 4)
    trainer = started(task, odd)
    whole = started(plain_text_task(), odd)
    assert advance(trainer, 3) == pytest.approx(advance(whole, 3), rel=1e-5)
    assert trainer.samples == whole.samples == 21


def plain_text_task() -> loop.Task:
    """Without the noise, which is drawn once a piece, and without dropout."""
    task = tasks.finetune_task()
    assert isinstance(task, tasks.Noisy)
    for module in task.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return task.inner


def test_a_single_sample_that_does_not_fit_ends_the_run_with_a_sentence() -> None:
    trainer = started(Greedy(tasks.finetune_task(), 1), ACCUMULATE_1)
    assert isinstance(trainer.task, Greedy)
    trainer.task.samples_max = 0
    with pytest.raises(microbatch.TooLargeError, match="in step 1 with a single sample: shorten"):
        trainer.advance()
    with pytest.raises(microbatch.TooLargeError, match="in an evaluation with a single sample"):
        trainer.evaluate()


def test_an_evaluation_takes_fewer_samples_too(capsys: pytest.CaptureFixture[str]) -> None:
    task = Greedy(tasks.finetune_task(), 4)
    started(task, ACCUMULATE_1)
    assert task.evaluation_batch == 4
    assert warnings(capsys.readouterr().out)[-1] == (
        "out of memory in an evaluation with 8 samples at once: going on with 4"
    )


def test_the_allocator_of_the_host_is_understood_and_nothing_else() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert guard.is_out_of_memory(error.value)
    task = Greedy(tasks.finetune_task(), 4)
    task.error = error.value
    trainer = started(task, ACCUMULATE_1)
    trainer.advance()
    assert trainer.micro_batch == 4
    other = Greedy(tasks.finetune_task(), 4, from_call=1)
    other.evaluation_batch = 4
    trainer = started(other, ACCUMULATE_1)
    trainer.advance()
    other.error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trainer.advance()
    assert trainer.micro_batch == 8


def test_buffers_that_stay_are_not_copied() -> None:
    """After the first step only those that a pass changes are, so it costs nothing to be ready."""
    trainer = started(tasks.transfer_task(), tasks.OPTIONS)
    advance(trainer, 2)
    kept = trainer._retry._undo._buffers
    assert kept is not None
    live = dict(trainer.task.model.named_buffers())
    names = {"running_mean", "running_var", "num_batches_tracked"}
    assert {name.rpartition(".")[2] for name in kept} == names
    assert not any(torch.equal(kept[name], live[name]) for name in kept)
    text = started(tasks.finetune_task(), tasks.OPTIONS)
    advance(text, 2)
    assert text._retry._undo._buffers == {}
