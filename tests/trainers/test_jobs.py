"""The two trainers on a user's own files: model folders, tables, texts, tokenizers."""

import csv
import dataclasses
import json
import math
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers

import baton_sdk
from tests.trainers import tasks
from trainers import causal, classify, configuration, data, events, loop, models, start
from trainers.finetune import FinetuneOptions, import_builder
from trainers.transfer import TransferOptions


def finetune(base: Path, **values: Any) -> causal.CausalTextTask:
    options = {"model": "model", "train_data": "text", "steps": 3, "window_tokens": 16, **values}
    return causal.build(configuration.build(FinetuneOptions, options, source="test"), base)


def transfer(base: Path, **values: Any) -> classify.ClassifyTask:
    files = {"train_data": "train.npz", "evaluation_data": "held_out.npz"}
    options = {"model": "model", **files, "steps": 3, **values}
    return classify.build(configuration.build(TransferOptions, options, source="test"), base)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    tasks.tiny_gpt2().save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "b.txt").write_text("beta " * 100)
    (tmp_path / "text" / "a.txt").write_text("alpha é" * 100, encoding="utf-8")
    (tmp_path / "text" / "copy.txt").symlink_to("a.txt")
    return tmp_path


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    tasks.tiny_vit().save_pretrained(tmp_path / "model")
    generator = numpy.random.default_rng(1)
    for name, count in (("train.npz", 12), ("held_out.npz", 9)):
        labels = numpy.arange(count) % 3
        images = generator.integers(0, 16, (count, 4, 4)).astype(numpy.uint8)
        numpy.savez(tmp_path / name, x=images, y=labels)
    return tmp_path


def test_text_is_read_in_order_once_and_its_ends_are_held_out(text_folder: Path) -> None:
    texts = data.read_texts(str(text_folder / "text"))
    assert texts == ["alpha é" * 100, "beta " * 100]
    begins, ends = data.split_ends(texts, 0.1)
    assert [a + b for a, b in zip(begins, ends, strict=True)] == texts
    assert [len(end) for end in ends] == [70, 50]
    assert data.read_texts(str(text_folder / "text" / "b*")) == ["beta " * 100]
    (text_folder / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert data.read_texts(str(text_folder / "rows.jsonl")) == ["one", "two"]
    with pytest.raises(configuration.ConfigurationError, match="there is no text"):
        data.read_texts(str(text_folder / "nothing*"))


def test_finetune_measures_bits_per_byte(text_folder: Path) -> None:
    task = finetune(text_folder, tokenizer="bytes")
    assert task.train.shape[1] == 16
    assert task.bytes_per_token == 1.0
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.zero_()
        figures = task.evaluate(torch.device("cpu"))
    # All logits equal: each of 256 bytes costs log2(256) bits.
    assert figures["bits_per_byte"] == pytest.approx(8.0)


def test_bits_per_byte_do_not_depend_on_the_tokenizer(text_folder: Path) -> None:
    """A tokenizer of whole words: fewer tokens, each worth more bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"alpha": 0, "beta": 1, "é": 2, "é" + "alpha": 3, "[UNK]": 4}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    kind: Any = transformers.PreTrainedTokenizerFast
    tokenizer = kind(tokenizer_object=inner)
    tokenizer.save_pretrained(text_folder / "model")
    task = finetune(text_folder, train_data="text/b.txt", held_out_ratio=0.5, window_tokens=8)
    assert 4.9 < task.bytes_per_token <= 5.1
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.zero_()
        figures = task.evaluate(torch.device("cpu"))
    assert figures["bits_per_byte"] == pytest.approx(math.log2(256) / task.bytes_per_token)


def test_finetune_refuses_what_does_not_fit(text_folder: Path) -> None:
    refused = configuration.ConfigurationError
    with pytest.raises(refused, match="'window_tokens' is 64; the model has 16 positions"):
        finetune(text_folder, tokenizer="bytes", window_tokens=64)
    with pytest.raises(refused, match="fewer than one window of 16"):
        finetune(text_folder, tokenizer="bytes", held_out_ratio=0.001)
    with pytest.raises(refused, match="cannot open model"):
        finetune(text_folder, model="text")
    with pytest.raises(refused, match="cannot open model '/none': there is no such folder here"):
        finetune(text_folder, model="/none")
    config = transformers.GPT2Config(vocab_size=100, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(text_folder / "small")
    with pytest.raises(refused, match="vocabulary of the model ends at 99"):
        finetune(text_folder, model="small", tokenizer="bytes")


@pytest.fixture
def ordinary_user() -> Iterator[Path]:
    """A new folder of somebody who, unlike root, may not read what he has no right to."""
    with tempfile.TemporaryDirectory() as folder:
        user = os.geteuid()
        if user == 0:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        yield Path(folder)
        os.seteuid(user)


def test_a_file_that_may_not_be_read_is_named(ordinary_user: Path) -> None:
    model = ordinary_user / "model"
    model.mkdir()
    (model / "config.json").touch()
    weights = model / "model.safetensors"
    weights.touch(0)
    sentence = f"cannot open model '{model}': user {os.geteuid()} may not read {weights}"
    with pytest.raises(configuration.ConfigurationError, match=re.escape(sentence)):
        models.open_causal(str(model), random=False)
    model.chmod(0)
    with pytest.raises(configuration.ConfigurationError, match="may not read"):
        models.open_causal(str(model), random=False)
    model.chmod(0o700)


def test_what_is_saved_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=10, n_positions=4, n_embd=8, n_layer=1, n_head=2)
    before = os.umask(0o027)
    try:
        models.save(transformers.GPT2LMHeadModel(config), tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_finetune_learns(text_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = finetune(text_folder, tokenizer="bytes")
    options = dataclasses.replace(tasks.OPTIONS, steps=30, learning_rate=0.05, batch_size=8)
    assert loop.Trainer(task, options, baton_sdk.Session({})).run() == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "finished"
    assert last["metric"] == "bits_per_byte"
    assert last["value"] < last["bits_per_byte_at_start"] - 1


def test_the_command_trains_what_its_file_says(
    text_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATON_SOCKET", raising=False)
    job = {"model": "model", "tokenizer": "bytes", "train_data": "text", "window_tokens": 16}
    (text_folder / "job.json").write_text(json.dumps({**job, "steps": 2, "log_every": 1}))
    arguments = ["--config", str(text_folder / "job.json")]
    assert start.run(FinetuneOptions, import_builder, arguments) == 0
    events = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert events == ["started", "evaluated", "step", "step", "evaluated", "finished"]
    said: list[tuple[int, str]] = []
    monkeypatch.setattr(baton_sdk.Session, "leaving", lambda _, *word: said.append(word))
    (text_folder / "job.json").write_text(json.dumps({**job, "steps": 2, "model": "text"}))
    assert start.run(FinetuneOptions, import_builder, arguments) == start.EXIT_USAGE
    sentence = capsys.readouterr().err.strip()
    assert "cannot open model" in sentence
    assert said == [(start.EXIT_USAGE, sentence)], "which stands in the job's history, too"


def test_the_command_says_why_it_cannot_resume(
    text_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATON_SOCKET", raising=False)
    monkeypatch.setenv("BATON_RESTORE_DIR", str(text_folder / "text"))
    said: list[tuple[int, str]] = []
    monkeypatch.setattr(baton_sdk.Session, "leaving", lambda _, *word: said.append(word))
    job = {"model": "model", "tokenizer": "bytes", "train_data": "text", "window_tokens": 16}
    (text_folder / "job.json").write_text(json.dumps({**job, "steps": 2}))
    arguments = ["--config", str(text_folder / "job.json")]
    assert start.run(FinetuneOptions, import_builder, arguments) == start.EXIT_FAILURE
    sentence = capsys.readouterr().err.strip()
    assert "cannot resume: frozen.safetensors is missing" in sentence
    assert said == [(start.EXIT_FAILURE, sentence)]


def test_the_command_says_when_nothing_fits(
    text_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.delenv("BATON_SOCKET", raising=False)
    monkeypatch.setattr(causal.CausalTextTask, "loss", full)
    job = {"model": "model", "tokenizer": "bytes", "train_data": "text", "window_tokens": 16}
    (text_folder / "job.json").write_text(json.dumps({**job, "steps": 2}))
    arguments = ["--config", str(text_folder / "job.json")]
    assert start.run(FinetuneOptions, import_builder, arguments) == start.EXIT_OUT_OF_MEMORY
    assert "out of memory in step 1 with a single sample: shorten" in capsys.readouterr().err


def test_a_stop_during_the_imports_is_said_to_the_agent(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come from outside and below a launcher, whose 1 without a checkpoint ends a job."""
    said: list[int] = []

    def slow_imports() -> Any:
        signal.raise_signal(signal.SIGTERM)
        return import_builder()

    monkeypatch.delenv("BATON_SOCKET", raising=False)
    monkeypatch.setattr(baton_sdk.Session, "leaving", lambda _, status: said.append(status))
    job = {"model": "model", "tokenizer": "bytes", "train_data": "text", "window_tokens": 16}
    (text_folder / "job.json").write_text(json.dumps({**job, "steps": 2}))
    arguments = ["--config", str(text_folder / "job.json")]
    assert start.run(FinetuneOptions, slow_imports, arguments) == baton_sdk.EXIT_RUN_AGAIN
    assert said == [baton_sdk.EXIT_RUN_AGAIN]


def test_the_trained_model_is_a_folder_that_opens(text_folder: Path) -> None:
    task = finetune(text_folder, tokenizer="bytes", output_directory="made/result")
    options = dataclasses.replace(tasks.OPTIONS, steps=2)
    assert loop.Trainer(task, options, baton_sdk.Session({})).run() == 0
    again = finetune(text_folder, tokenizer="bytes", model="made/result")
    ours, theirs = dict(task.model.named_parameters()), dict(again.model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_trained_is_float32_whatever_the_folder_says(text_folder: Path) -> None:
    half: Any = tasks.tiny_gpt2()
    half.to(torch.bfloat16).save_pretrained(text_folder / "half")
    for from_scratch in (False, True):
        task = finetune(text_folder, tokenizer="bytes", model="half", from_scratch=from_scratch)
        assert all(p.dtype == torch.float32 for p in task.model.parameters())


def test_a_convolutional_backbone_has_the_width_of_its_last_stage(image_folder: Path) -> None:
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic"
    )
    transformers.ResNetModel(config).save_pretrained(image_folder / "resnet")
    task = transfer(image_folder, model="resnet")
    with torch.no_grad():
        figures = task.evaluate(torch.device("cpu"))
    assert 0 <= figures["accuracy"] <= 1


def test_a_loss_that_is_no_number_is_still_json(capsys: pytest.CaptureFixture[str]) -> None:
    events.emit("step", loss=float("nan"), step=1)
    assert capsys.readouterr().out == '{"event": "step", "loss": "nan", "step": 1}\n'


def test_only_the_head_of_a_frozen_backbone_is_trained(image_folder: Path) -> None:
    task = transfer(image_folder, pixel_scale=16.0)
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("head.") for name in trained)
    assert task.train[0]["pixel_values"].shape == (12, 1, 4, 4)
    assert float(task.train[0]["pixel_values"].max()) <= 1.0
    stored = transformers.ViTModel.from_pretrained(image_folder / "model")
    name = "embeddings.patch_embeddings.projection.weight"
    assert torch.equal(task.model.get_parameter(f"backbone.{name}"), stored.get_parameter(name))
    task.model.train()
    backbone = task.model.get_submodule("backbone")
    assert task.model.training
    assert not backbone.training


def test_the_baselines_are_what_they_say(image_folder: Path) -> None:
    stored = transformers.ViTModel.from_pretrained(image_folder / "model")
    name = "embeddings.patch_embeddings.projection.weight"
    scratch = transfer(image_folder, backbone="random", freeze=False)
    assert not torch.equal(
        scratch.model.get_parameter(f"backbone.{name}"), stored.get_parameter(name)
    )
    assert all(parameter.requires_grad for parameter in scratch.model.parameters())
    untrained = transfer(image_folder, backbone="random", head_hidden=5)
    frozen = [p for p in untrained.model.parameters() if not p.requires_grad]
    assert len(frozen) == len(list(stored.parameters()))


def test_labels_of_every_kind_are_numbered_in_order(tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["text", "label"], ["x", "10"], ["y", "9"], ["z", "10"]])
    read = data.read_labelled(tmp_path / "rows.csv", ("text", "label"))
    assert read.classes == ("9", "10")
    assert read.y.tolist() == [1, 0, 1]
    assert read.x == ["x", "y", "z"]
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "x", "label": "no"}\n{"text": "y", "label": "ay"}'
    )
    read = data.read_labelled(tmp_path / "rows.jsonl", ("text", "label"))
    assert read.classes == ("ay", "no")
    assert read.y.tolist() == [1, 0]
    refused = configuration.ConfigurationError
    with pytest.raises(refused, match="has label 'ay', unknown to the training data"):
        data.read_labelled(tmp_path / "rows.jsonl", ("text", "label"), classes=("no",))
    with pytest.raises(refused, match="has no 'colour'"):
        data.read_labelled(tmp_path / "rows.csv", ("text", "colour"))
    with pytest.raises(refused, match=r"must be one of \.npz, \.csv, \.jsonl"):
        data.read_labelled(tmp_path / "rows.xlsx", ("text", "label"))


def test_arrays_of_python_objects_are_refused(tmp_path: Path) -> None:
    """They are pickle inside, and pickle runs code."""
    samples = numpy.array([{"a": 1}, {"b": 2}], dtype=object)
    numpy.savez(tmp_path / "rows.npz", x=samples, y=numpy.array([0, 1]))
    with pytest.raises(configuration.ConfigurationError, match="allow_pickle"):
        data.read_labelled(tmp_path / "rows.npz", ("x", "y"))


def test_a_text_backbone_sees_real_tokens_only(tmp_path: Path) -> None:
    """Padding is masked: a text has the same logits alone and beside a longer one."""
    from transformers import BertConfig, BertModel

    loop.seed_everything(1)
    model = BertModel(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    classifier = classify.Classifier(model, classify.make_head(8, 0, 2), frozen=True).eval()
    short = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])}
    padded = {
        "input_ids": torch.tensor([[5, 6, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0]]),
    }
    assert torch.allclose(classifier(**short), classifier(**padded), atol=1e-6)
