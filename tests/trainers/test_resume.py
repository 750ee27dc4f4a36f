"""After a handoff the training does what it would have done, bit for bit on a CPU.

The uninterrupted run is the oracle. A second run is stopped on the way, its checkpoint goes through
files, a fresh model resumes from it, and at the end the whole states and the loss curves must be
equal. The last test takes one component after the other out of the checkpoint, and shows that the
comparison notices each: otherwise it would prove little.
"""

import copy
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import baton_sdk
from tests.trainers import tasks
from tests.trainers.fake_agent import FakeAgent, until
from trainers import checkpoint, exactness, loop, manifest, optimization, ranges

TASKS = pytest.mark.parametrize("make_task", [tasks.finetune_task, tasks.transfer_task])
STOP_AT = 5


def advance_to(trainer: loop.Trainer, step: int) -> list[float]:
    """Train to ``step`` as ``run`` does, evaluations included; the losses on the way."""
    losses = []
    while trainer.step < step:
        losses.append(trainer.advance())
        if trainer.step % tasks.OPTIONS.evaluate_every == 0:
            trainer.evaluate()
    return losses


def started(make_task: Callable[[], loop.Task]) -> loop.Trainer:
    trainer = tasks.trainer(make_task())
    trainer.prepare()
    return trainer


@TASKS
@pytest.mark.parametrize("stop_at", [1, STOP_AT, 7])
def test_a_resumed_run_equals_the_uninterrupted_one(
    make_task: Callable[[], loop.Task], stop_at: int, tmp_path: Path
) -> None:
    straight = started(make_task)
    expected = advance_to(straight, tasks.OPTIONS.steps)
    first = started(make_task)
    losses = advance_to(first, stop_at)
    saved = tasks.as_read(tmp_path / "checkpoint", first.snapshot())
    torch.rand(99)  # another process, another history
    second = started(make_task)
    second.resume(saved)
    losses += advance_to(second, tasks.OPTIONS.steps)
    assert losses == expected
    assert tasks.differences(straight.snapshot(), second.snapshot()) == []


def _forget(part: str, name: str, saved: checkpoint.Snapshot, fresh: checkpoint.Snapshot) -> None:
    """Replace one component by what a process that never resumed has."""
    if part == "state":
        saved.state["progress"][name] = fresh.state["progress"][name]
    elif part == "optimizer":
        for key in list(saved.optimizer):
            if key.endswith(f"|{name}"):
                saved.optimizer[key] = torch.zeros_like(saved.optimizer[key])
    else:
        source = getattr(fresh, part)
        for key in list(getattr(saved, part)):
            if key.startswith(name):
                getattr(saved, part)[key] = source[key]


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("model", "head.2"),
        ("model", "head.1.running_mean"),
        ("model", "head.1.num_batches_tracked"),
        ("frozen", "backbone"),
        ("optimizer", "exp_avg"),
        ("optimizer", "exp_avg_sq"),
        ("optimizer", "step"),
        ("random", "torch_cpu"),
        ("random", "numpy"),
        ("random", "python"),
        ("state", "step"),
        ("state", "samples"),
    ],
)
def test_no_component_can_be_left_out(part: str, name: str) -> None:
    straight = started(tasks.transfer_task)
    advance_to(straight, STOP_AT)
    saved = copy.deepcopy(straight.snapshot())
    advance_to(straight, tasks.OPTIONS.steps)
    second = started(tasks.transfer_task)
    if part == "frozen":
        with torch.no_grad():
            for parameter in second.task.model.parameters():
                parameter.add_(0.5)
    _forget(part, name, saved, second.snapshot())
    second.resume(saved)
    advance_to(second, tasks.OPTIONS.steps)
    assert tasks.differences(straight.snapshot(), second.snapshot()) != []


def test_the_schedule_rises_then_falls_to_nothing() -> None:
    options = replace(tasks.OPTIONS, steps=10, warmup_steps=2, learning_rate=1.0)
    rates = [optimization.learning_rate_at(step, options) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[-1] == pytest.approx(0.0)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    linear = replace(options, schedule="linear")
    assert optimization.learning_rate_at(6, linear) == pytest.approx(0.5)
    assert optimization.learning_rate_at(9, replace(options, schedule="constant")) == 1.0


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_stop_is_obeyed_with_a_checkpoint_and_the_next_attempt_finishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = FakeAgent(tmp_path / "agent.sock", stores=True)
    agent.start()
    environment = agent.environment(BATON_STAGING_DIR=str(tmp_path / "staging"))
    first = stopping_after(3, tasks.trainer(tasks.finetune_task(), environment), agent)
    with first.session:
        first.session.open()
        assert first.run() == baton_sdk.EXIT_RUN_AGAIN
    lines = events(capsys.readouterr().out)
    assert [line["event"] for line in lines[-3:]] == ["stopping", "checkpoint", "stopped"]
    assert lines[-3]["reason"] == "preempted"
    assert lines[-1] == {"event": "stopped", "step": 3, "checkpoint_step": 3, "stored": True}
    agent.stop()
    restored = {"BATON_RESTORE_DIR": str(tmp_path / "staging" / "checkpoint-000000003")}
    second = tasks.trainer(tasks.finetune_task(), {**restored, "BATON_RESTORE_STEP": "3"})
    assert second.run() == 0
    lines = events(capsys.readouterr().out)
    assert lines[0]["resumed"] is True
    assert lines[0]["step"] == 3
    assert (lines[1]["event"], lines[1]["level"]) == ("resumed", "E0")
    assert lines[2]["event"] == "step"
    assert lines[2]["step"] == 4
    assert lines[-1]["event"] == "finished"
    assert lines[-1]["step"] == tasks.OPTIONS.steps
    straight = started(tasks.finetune_task)
    advance_to(straight, tasks.OPTIONS.steps)
    straight.evaluate()
    assert tasks.differences(straight.snapshot(), second.snapshot()) == []


def stopping_after(
    step: int, trainer: loop.Trainer, agent: FakeAgent | None = None
) -> loop.Trainer:
    """The same, but asked to stop after ``step``: by the agent, or without one by a signal."""
    advance = trainer.advance

    def advance_then_stop() -> float:
        loss = advance()
        if trainer.step == step and agent is not None:
            agent.expect("hello")
            agent.send(type="stop", reason="preempted", grace_ms=60_000)
            until(lambda: trainer.session.stop_requested is not None, "no stop")
        elif trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    trainer.advance = advance_then_stop  # type: ignore[method-assign]
    return trainer


def test_outside_baton_a_run_resumes_from_its_own_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(tasks.OPTIONS, checkpoint_directory=str(tmp_path))
    first = loop.Trainer(tasks.transfer_task(), options, baton_sdk.Session({}))
    first.session.open()
    assert stopping_after(6, first).run() == baton_sdk.EXIT_RUN_AGAIN
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "checkpoint-000000004",
        "checkpoint-000000006",
    ]
    capsys.readouterr()
    second = loop.Trainer(tasks.transfer_task(), options, baton_sdk.Session({}))
    assert second.run() == 0
    lines = events(capsys.readouterr().out)
    assert lines[0]["resumed"] is True
    assert lines[0]["step"] == 6


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(tasks.OPTIONS, checkpoint_directory=str(tmp_path))
    first = loop.Trainer(tasks.transfer_task(), options, baton_sdk.Session({}))
    first.session.open()
    assert stopping_after(6, first).run() == baton_sdk.EXIT_RUN_AGAIN
    torn = tmp_path / "checkpoint-000000006" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-3])
    capsys.readouterr()
    second = loop.Trainer(tasks.transfer_task(), options, baton_sdk.Session({}))
    assert second.run() == 0
    lines = events(capsys.readouterr().out)
    assert lines[0]["event"] == "warning"
    assert "model.safetensors in" in lines[0]["message"]
    assert "checkpoint-000000006 is damaged" in lines[0]["message"]
    assert (lines[1]["event"], lines[1]["step"]) == ("started", 4)


def test_checkpoints_name_their_writer_and_their_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_JOB_ID", "12")
    monkeypatch.setenv("BATON_EPOCH", "3")
    options = replace(tasks.OPTIONS, checkpoint_directory=str(tmp_path))
    assert loop.Trainer(tasks.transfer_task(), options, baton_sdk.Session({})).run() == 0
    older, newest = (ranges.verify(path) for path in sorted(tmp_path.iterdir()))
    _, document = manifest.load(sorted(tmp_path.iterdir())[0])
    assert newest.parent == document["hash"] != older.parent
    assert (newest.job, newest.epoch, newest.step) == (12, 3, tasks.OPTIONS.steps)
    assert newest.samples == newest.step * 8
    assert newest.level is None, "it began at the beginning"
    parameters = dict(tasks.transfer_task().model.named_parameters())
    stored = {name.partition("/")[2]: t for name, t in newest.tensors.items()}
    assert parameters.keys() <= stored.keys()
    name = "head.2.3.weight"
    with ranges.Reader(tmp_path / "checkpoint-000000012", newest) as reader:
        rows = reader.range(f"model/{name}", 1, 2)
    assert rows.shape == (1, *parameters[name].shape[1:])


@pytest.mark.parametrize(
    ("change", "level", "why"),
    [
        ({}, "E0", "the same software on the same"),
        ({"accumulate": 4, "batch_size": 2}, "E1", "the number of samples at once was 4 and is 2"),
        ({"accumulate": 3}, "E2", "the global batch was 8 and is 12"),
        ({"precision": "bfloat16"}, "E2", "the precision was float32 and is bfloat16"),
    ],
)
def test_a_restart_reports_how_exact_it_is(
    change: dict[str, Any], level: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = started(tasks.transfer_task)
    first.advance()
    checkpoint.write(first.snapshot(), tmp_path / "one")
    first.close()
    capsys.readouterr()
    session = baton_sdk.Session({"BATON_RESTORE_DIR": str(tmp_path / "one")})
    second = loop.Trainer(tasks.transfer_task(), replace(tasks.OPTIONS, **change), session)
    second.prepare()
    (line,) = [line for line in events(capsys.readouterr().out) if line["event"] == "resumed"]
    assert (line["level"], line["step"]) == (level, 1)
    assert why in line["why"]
    described = manifest.parse(second.snapshot().state)
    assert described.level is exactness.Level[level]


def test_a_restart_with_another_transformers_is_not_bitwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = started(tasks.finetune_task)
    checkpoint.write(first.snapshot(), tmp_path / "one")
    first.close()
    # What is imported by that name need not be the lazy module that takes its place.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "9.9")
    session = baton_sdk.Session({"BATON_RESTORE_DIR": str(tmp_path / "one")})
    second = loop.Trainer(tasks.finetune_task(), tasks.OPTIONS, session)
    capsys.readouterr()
    second.prepare()
    (line,) = [line for line in events(capsys.readouterr().out) if line["event"] == "resumed"]
    assert line["level"] == "E1"
    assert re.fullmatch(r"transformers was \S+ and is 9\.9", line["why"])


def test_what_a_user_adds_is_kept(tmp_path: Path) -> None:
    noise, restored = torch.Generator().manual_seed(8), torch.Generator()
    first = tasks.trainer(tasks.finetune_task())
    first.objects["noise"] = noise
    first.prepare()
    first.advance()
    torch.rand(3, generator=noise)
    saved = tasks.as_read(tmp_path / "one", first.snapshot())
    expected = torch.rand(3, generator=noise)
    first.close()
    second = tasks.trainer(tasks.finetune_task())
    second.objects["noise"] = restored
    second.prepare()
    second.resume(saved)
    assert torch.equal(torch.rand(3, generator=restored), expected)
    third = started(tasks.finetune_task)
    with pytest.raises(checkpoint.CheckpointError, match="'noise' is stored but not given"):
        third.resume(saved)


def test_a_full_disk_costs_a_warning_and_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(tasks.OPTIONS, checkpoint_directory=str(tmp_path))
    trainer = loop.Trainer(tasks.transfer_task(), options, baton_sdk.Session({}))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write", refuse)
        with pytest.raises(OSError, match="No space left"):
            trainer.run()
    lines = events(capsys.readouterr().out)
    warnings = [line for line in lines if line["event"] == "warning"]
    assert len(warnings) == 3
    assert "No space left" in warnings[0]["message"]
    assert trainer.step == tasks.OPTIONS.steps, "only the result itself could not be written"
