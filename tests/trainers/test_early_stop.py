"""Training ends when evaluations no longer get better, after a handoff as without one."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import baton_sdk
from tests.trainers import tasks
from trainers import loop, ranks
from trainers.best import Best

OPTIONS = replace(tasks.OPTIONS, steps=12, evaluate_every=2, early_stop_patience=2)


class Told(tasks.Around):
    """Its evaluations are given; the training is real."""

    def __init__(self, inner: loop.Task, figures: Iterable[float], *, higher: bool) -> None:
        super().__init__(inner)
        self.higher_is_better = higher
        self.figures = iter(figures)

    def evaluate(self, device: torch.device, world: ranks.World = ranks.ALONE) -> dict[str, float]:
        return {self.metric: next(self.figures)}


def run(task: loop.Task, directory: Path) -> loop.Trainer:
    options = replace(OPTIONS, checkpoint_directory=str(directory), checkpoint_every_steps=2)
    trainer = loop.Trainer(task, options, baton_sdk.Session({}))
    loop.seed_everything(options.seed)
    assert trainer.run() == 0
    return trainer


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("higher", "figures", "last_step", "best_step", "best"),
    [
        (True, [0.1, 0.5, 0.4, 0.5], 6, 2, 0.5),
        (False, [3.0, 2.0, 1.0, 1.5, 1.0], 8, 4, 1.0),
        (False, [3.0, math.nan, math.inf], 4, 0, 3.0),
        (True, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 12, 12, 0.7),
        (True, [0.1, 0.0, 0.3, 0.0, 0.5, 0.0, 0.0], 12, 8, 0.5),
    ],
)
def test_patience_counts_evaluations_without_a_better_figure(
    *,
    higher: bool,
    figures: list[float],
    last_step: int,
    best_step: int,
    best: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = run(Told(tasks.finetune_task(), figures, higher=higher), tmp_path)
    lines = events(capsys.readouterr().out)
    assert trainer.step == lines[-1]["step"] == last_step
    assert lines[-1]["event"] == "finished"
    assert lines[-1]["bits_per_byte_best"] == best
    assert lines[-1]["bits_per_byte_best_step"] == best_step
    ended = [line for line in lines if line["event"] == "early_stop"]
    early = {"event": "early_stop", "step": last_step, "best_step": best_step, "best": best}
    assert ended == ([early] if figures[-1] != 0.7 else [])
    marked = [line["step"] for line in lines if line["event"] == "evaluated" and line["best"]]
    assert marked[-1] == best_step


def test_a_resumed_run_has_no_new_patience(tmp_path: Path) -> None:
    """Two evaluations were no better; one before and one after the handoff."""
    first = loop.Trainer(
        Told(tasks.finetune_task(), [3.0, 2.0, 2.5], higher=False), OPTIONS, baton_sdk.Session({})
    )
    first.prepare()
    for _ in range(4):
        first.advance()
        if first.step % OPTIONS.evaluate_every == 0:
            first.evaluate()
    first.close()
    assert not first.best.exhausted
    saved = tasks.as_read(tmp_path / "one", first.snapshot())
    second = loop.Trainer(
        Told(tasks.finetune_task(), [9.0, 2.1], higher=False), OPTIONS, baton_sdk.Session({})
    )
    second.prepare()
    second.resume(saved)
    assert second.best.state() == {"value": 2.0, "step": 2, "evaluations_since": 1}
    second.advance()
    second.advance()
    second.evaluate()
    second.close()
    assert second.best.exhausted
    assert second.best.step == 2


def test_a_run_that_had_ended_early_does_not_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Told(tasks.finetune_task(), [1.0, 2.0, 3.0], higher=False), tmp_path)
    capsys.readouterr()
    again = run(Told(tasks.finetune_task(), [3.0], higher=False), tmp_path)
    assert again.step == 4
    lines = events(capsys.readouterr().out)
    assert not any(line["event"] == "step" for line in lines)
    assert lines[-1]["bits_per_byte_best_step"] == 0


def test_without_patience_nothing_ends() -> None:
    best = Best(higher_is_better=True, patience=0)
    assert best.state()["value"] is None
    assert [best.take(step, 0.5) for step in range(100)] == [True] + [False] * 99
    assert not best.exhausted
