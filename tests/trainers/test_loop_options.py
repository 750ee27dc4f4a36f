"""What the options of the loop do: arithmetic in 16 bits, kept features, prefetching."""

import dataclasses
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import baton_sdk
from tests.trainers import tasks
from tests.trainers.fake_agent import FakeAgent
from tests.trainers.tasks import advance, started
from trainers import checkpoint, classify, features, loop, order
from trainers.transfer import TransferOptions

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("make_task", [tasks.finetune_task, tasks.lora_task, tasks.transfer_task])
def test_sixteen_bits_train_and_resume_exactly(
    precision: str, make_task: Any, tmp_path: Path
) -> None:
    options = replace(tasks.OPTIONS, precision=precision)
    straight = started(make_task(), options)
    losses = advance(straight, 8)
    plain = advance(started(make_task(), tasks.OPTIONS), 8)
    assert losses != plain
    assert losses == pytest.approx(plain, rel=0.05)
    assert all(p.dtype == torch.float32 for p in straight.task.model.parameters())
    first = started(make_task(), options)
    advance(first, 3)
    saved = tasks.as_read(tmp_path / "one", first.snapshot())
    second = started(make_task(), options)
    second.resume(saved)
    assert advance(second, 5) == losses[3:]
    assert tasks.differences(straight.snapshot(), second.snapshot()) == []


def test_a_gradient_that_overflows_costs_a_step_and_lowers_the_scale(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Exploding(tasks.Around):
        factor = 1.0

        def loss(self, batch: Any) -> torch.Tensor:
            return self.inner.loss(batch) * self.factor

    task = Exploding(tasks.finetune_task())
    trainer = started(task, replace(tasks.OPTIONS, precision="float16"))
    advance(trainer, 1)
    before = trainer.snapshot()
    task.factor = 1e38
    advance(trainer, 1)
    after = trainer.snapshot()
    assert before.model.keys() == after.model.keys()
    assert all(torch.equal(before.model[name], after.model[name]) for name in before.model)
    assert after.state["progress"]["step"] == 2
    assert trainer.scaler.get_scale() == 2.0**15
    second = started(tasks.finetune_task(), trainer.options)
    second.resume(after)
    assert second.scaler.get_scale() == 2.0**15
    capsys.readouterr()
    trainer.log(1.0)
    assert json.loads(capsys.readouterr().out)["loss_scale"] == 2.0**15


def test_a_lost_scale_is_missed() -> None:
    options = replace(tasks.OPTIONS, precision="float16")
    trainer = started(tasks.finetune_task(), options)
    saved = trainer.snapshot()
    del saved.state["extra"]["scaler"]
    with pytest.raises(checkpoint.CheckpointError, match="scaler"):
        started(tasks.finetune_task(), options).resume(saved)


def test_the_wait_for_input_is_told_to_people_and_to_the_agent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = FakeAgent(tmp_path / "agent.sock", stores=True)
    agent.start()
    environment = agent.environment(BATON_STAGING_DIR=str(tmp_path / "staging"))
    trainer = tasks.trainer(tasks.finetune_task(), environment)
    with trainer.session:
        trainer.session.open()
        assert trainer.run() == 0
    agent.stop()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    waits = [line["input_wait_ms"] for line in lines if line["event"] == "step"]
    assert len(waits) == tasks.OPTIONS.steps
    assert all(wait >= 0 for wait in waits)
    progress = [message for message in agent.rest() if message["type"] == "progress"]
    assert progress
    assert all(message["metrics"]["input_wait_ms"] >= 0 for message in progress)
    assert "input_wait_ms" not in trainer.metrics, "a time is no part of the state"


class Recording(tasks.Around):
    """Which samples are asked for, in the order of the requests."""

    def __init__(self, inner: loop.Task) -> None:
        super().__init__(inner)
        self.seen: list[list[int]] = []

    def batch(self, samples: Any) -> Any:
        self.seen.append(list(samples))
        return super().batch(samples)


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def positions(trainer: loop.Trainer, first: int, last: int) -> list[int]:
    count = trainer.task.sample_count
    return [order.sample_at(place, count, trainer.options.seed) for place in range(first, last)]


def test_every_batch_is_made_from_its_place_and_none_beyond_the_last_step() -> None:
    task = Recording(tasks.finetune_task())
    trainer = started(task, tasks.OPTIONS)
    advance(trainer, tasks.OPTIONS.steps)
    trainer.close()
    assert {len(batch) for batch in task.seen} == {4}
    assert flat(task.seen) == positions(trainer, 0, 8 * tasks.OPTIONS.steps)


def test_after_a_resume_and_with_smaller_pieces_batches_begin_at_the_right_place() -> None:
    first = started(tasks.finetune_task(), tasks.OPTIONS)
    advance(first, 3)
    task = Recording(tasks.finetune_task())
    second = started(task, tasks.OPTIONS)
    advance(second, 1)
    second.resume(first.snapshot())
    task.seen.clear()
    advance(second, 2)
    second.close()
    assert flat(task.seen[:4]) == positions(second, 24, 40)
    second.micro_batch = 2
    task.seen.clear()
    advance(second, 7)
    second.close()
    assert {len(batch) for batch in task.seen} == {2}
    assert flat(task.seen) == positions(second, 40, 96)


def test_a_batch_that_cannot_be_made_ends_the_run_and_the_prefetching() -> None:
    class Broken(tasks.Around):
        def batch(self, samples: Any) -> Any:
            raise ValueError("sample 3 is damaged")

    trainer = loop.Trainer(Broken(tasks.finetune_task()), tasks.OPTIONS, baton_sdk.Session({}))
    with pytest.raises(ValueError, match="sample 3 is damaged"):
        trainer.run()
    assert trainer._feed is None


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples went through a backbone, call by call."""
    calls: list[int] = []
    compute = classify.Classifier.features

    def counting(self: classify.Classifier, inputs: Any) -> torch.Tensor:
        calls.append(len(inputs["pixel_values"]))
        return compute(self, inputs)

    monkeypatch.setattr(classify.Classifier, "features", counting)
    return calls


def image_task(*, kept: bool) -> classify.ClassifyTask:
    loop.seed_everything(5)
    pixels, labels = torch.rand(60, 1, 4, 4), torch.arange(60) % 2
    head = torch.nn.Sequential(torch.nn.Dropout(0.2), classify.make_head(8, 4, 2))
    return classify.ClassifyTask(
        classify.Classifier(tasks.tiny_vit(), head, frozen=True),
        ({"pixel_values": pixels[:40]}, labels[:40]),
        ({"pixel_values": pixels[40:]}, labels[40:]),
        identity="tiny images",
        keep_features=(kept, kept),
    )


def test_kept_features_train_the_same_head_and_are_computed_once(counted: list[int]) -> None:
    plain = started(image_task(kept=False), tasks.OPTIONS)
    expected = advance(plain, 12)
    plain.evaluate()
    assert sum(counted) == 12 * 8 + 2 * 20
    counted.clear()
    kept = started(image_task(kept=True), tasks.OPTIONS)
    losses = advance(kept, 12)
    kept.evaluate()
    assert sum(counted) == 40 + 20
    assert losses == pytest.approx(expected, rel=1e-5)
    assert kept.metrics["accuracy"] == plain.metrics["accuracy"]


def test_kept_features_resume_exactly_and_are_not_stored(tmp_path: Path) -> None:
    straight = started(image_task(kept=True), tasks.OPTIONS)
    losses = advance(straight, 9)
    first = started(image_task(kept=True), tasks.OPTIONS)
    advance(first, 4)
    saved = tasks.as_read(tmp_path / "one", first.snapshot())
    plain = started(image_task(kept=False), tasks.OPTIONS).snapshot()
    assert saved.model.keys() == plain.model.keys()
    assert saved.frozen.keys() == plain.frozen.keys()
    second = started(image_task(kept=True), tasks.OPTIONS)
    with torch.no_grad():
        for parameter in second.task.model.parameters():
            parameter.add_(0.5)  # the checkpoint's values are another backbone's
    second.resume(saved)
    assert advance(second, 5) == losses[4:]
    assert tasks.differences(straight.snapshot(), second.snapshot()) == []


def test_features_do_not_depend_on_when_and_with_whom_they_are_wanted() -> None:
    task = image_task(kept=True)
    model = task.model.eval()
    assert isinstance(model, classify.Classifier)
    tables = [
        features.FeatureTable(lambda: model.backbone, task.train[0], model.features)
        for _ in range(2)
    ]
    tables[0].take(range(40), CPU)
    wanted = [39, 3, 3, 17]
    assert torch.equal(tables[0].take(wanted, CPU), tables[1].take(wanted, CPU))


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({}, (True, True)),
        ({"freeze": False}, (False, False)),
        ({"feature_cache_bytes": 0}, (False, False)),
        ({"steps": 2}, (False, True)),  # 96 of 100 samples: none is seen twice
        ({"feature_cache_bytes": 100 * 8 * 4}, (True, False)),
        ({"feature_cache_bytes": 100 * 8 * 4 - 1}, (False, True)),
        ({"feature_cache_bytes": 150 * 8 * 4}, (True, True)),
    ],
)
def test_features_are_kept_where_they_are_wanted_again_and_have_room(
    values: dict[str, Any], kept: tuple[bool, bool]
) -> None:
    options = TransferOptions(
        model="", train_data="", evaluation_data="", steps=20, batch_size=24, accumulate=2
    )
    assert classify.kept_features(dataclasses.replace(options, **values), 8, (100, 50)) == kept


class Listening(baton_sdk.Session):
    """Remembers the sections that it was told of."""

    def __init__(self) -> None:
        super().__init__({})
        self.told: list[str] = []

    def enter(self, name: str) -> None:
        self.told.append(name)


def test_the_loop_says_where_it_is(tmp_path: Path) -> None:
    session = Listening()
    options = replace(
        tasks.OPTIONS,
        steps=4,
        evaluate_every=2,
        checkpoint_every_steps=3,
        checkpoint_directory=str(tmp_path),
    )
    loop.seed_everything(options.seed)
    assert loop.Trainer(tasks.finetune_task(), options, session).run() == 0
    steps = ["step", "step", "eval", "step", "save", "step", "eval"]
    assert session.told == ["eval", *steps, "finish", "finish"]
