"""Adapters are trained, the rest is not; resumed exactly; and the result is for others to use."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.trainers import tasks
from tests.trainers.test_resume import advance_to, started
from trainers import adapters, causal, checkpoint, configuration, start
from trainers.lora import LoraOptions, import_builder

JOB = {"model": "model", "tokenizer": "bytes", "train_data": "text", "window_tokens": 16}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tasks.tiny_gpt2().save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("alpha beta " * 100)
    return tmp_path


def options(**values: Any) -> LoraOptions:
    return configuration.build(LoraOptions, {**JOB, "steps": 3, **values}, source="test")


def trained_names(task: causal.CausalTextTask) -> set[str]:
    return {name for name, p in task.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stop_at", [1, 5, 7])
def test_a_resumed_run_equals_the_uninterrupted_one(stop_at: int, tmp_path: Path) -> None:
    straight = started(tasks.lora_task)
    expected = advance_to(straight, tasks.OPTIONS.steps)
    first = started(tasks.lora_task)
    losses = advance_to(first, stop_at)
    saved = tasks.as_read(tmp_path / "checkpoint", first.snapshot())
    torch.rand(99)  # another process, another history
    second = started(tasks.lora_task)
    second.resume(saved)
    losses += advance_to(second, tasks.OPTIONS.steps)
    assert losses == expected
    assert tasks.differences(straight.snapshot(), second.snapshot()) == []


def test_the_base_is_the_same_file_in_every_checkpoint(tmp_path: Path) -> None:
    trainer = started(tasks.lora_task)
    names = ("one", "two")
    for name in names:
        advance_to(trainer, trainer.step + 2)
        checkpoint.write(trainer.snapshot(), tmp_path / name)
    frozen, model = (
        [(tmp_path / name / f"{part}.safetensors").read_bytes() for name in names]
        for part in ("frozen", "model")
    )
    assert frozen[0] == frozen[1]
    assert model[0] != model[1]
    snapshot = checkpoint.read(tmp_path / "one")
    assert all(".lora_" in name for name in snapshot.model)
    base = tasks.tiny_gpt2()
    assert sum(t.numel() for t in snapshot.frozen.values()) == base.num_parameters()


def test_by_default_all_linear_layers_but_the_last_get_adapters(folder: Path) -> None:
    task = adapters.build(options(), folder)
    layers = {name.partition(".lora_")[0].rpartition(".h.0.")[2] for name in trained_names(task)}
    assert layers == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2,
        )
    )  # fmt: skip
    ends = {name.rpartition(".")[2] for name in adapters.linear_names(llama)}
    assert ends == set("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())


def test_layers_can_be_chosen_by_their_names(folder: Path) -> None:
    task = adapters.build(options(target_modules=["attn.c_attn"]), folder)
    assert len(trained_names(task)) == 2
    assert all(".attn.c_attn.lora_" in name for name in trained_names(task))
    with pytest.raises(configuration.ConfigurationError) as error:
        adapters.build(options(target_modules=["q_proj"]), folder)
    assert str(error.value) == (
        "'target_modules' has 'q_proj'; the linear layers of the model are c_attn, c_fc, c_proj"
    )


def test_the_untrained_adapters_change_nothing_and_the_frozen_model_may_be_smaller(
    folder: Path,
) -> None:
    device = torch.device("cpu")
    plain = causal.build(options(), folder)
    with torch.no_grad():
        figure = plain.evaluate(device)["bits_per_byte"]
        assert adapters.build(options(), folder).evaluate(device)["bits_per_byte"] == figure
        small = adapters.build(options(base_precision="bfloat16"), folder)
        assert small.evaluate(device)["bits_per_byte"] == pytest.approx(figure, rel=0.02)
    for name, parameter in small.model.named_parameters():
        trained = ".lora_" in name
        assert parameter.requires_grad is trained
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16)


@pytest.mark.parametrize("merge", [False, True])
def test_the_command_trains_and_writes_what_others_can_open(
    merge: bool, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATON_SOCKET", raising=False)
    lines = [f"{key} = {json.dumps(value)}" for key, value in JOB.items()]
    lines += ["steps = 20", "batch_size = 8", "learning_rate = 0.05", "rank = 4"]
    lines += ['target_modules = ["c_attn", "c_fc"]', f"merge = {str(merge).lower()}"]
    lines += ['output_directory = "result"', "evaluate_every = 10"]
    (folder / "job.toml").write_text("\n".join(lines))
    (folder / "result").mkdir()
    (folder / "result" / "mine.txt").write_text("stays")
    assert start.run(LoraOptions, import_builder, ["--config", str(folder / "job.toml")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "finished"
    assert last["value"] < last["bits_per_byte_at_start"] - 0.05, "it learned"
    written = {file.name for file in (folder / "result").iterdir()}
    assert written >= {"mine.txt", "model.safetensors" if merge else "adapter_model.safetensors"}
    assert not any(name.startswith(".partial") for name in written)
    if merge:
        opened: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "result")
    else:
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
        opened = peft.PeftModel.from_pretrained(base, str(folder / "result"))
    task = causal.build(options(), folder)
    task.model = opened.eval()
    with torch.no_grad():
        figure = task.evaluate(torch.device("cpu"))["bits_per_byte"]
    assert figure == pytest.approx(last["value"], rel=1e-5)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rank": 0}, "'rank' must be a whole number of at least 1, not 0"),
        ({"alpha": 0}, "'alpha' must be a whole number of at least 1, not 0"),
        ({"dropout": 1.0}, "'dropout' must be a number of at least 0 and below 1, not 1.0"),
        ({"base_precision": "int4"}, "'base_precision' must be one of float32, bfloat16"),
        ({"from_scratch": True}, "use finetune"),
        ({"merge": True}, "'merge' needs an 'output_directory'"),
        ({"target_modules": "c_attn"}, "must be a list of words, not 'c_attn'"),
        ({"target_modules": [1]}, "must be a list of words, not [1]"),
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(configuration.ConfigurationError) as error:
        options(**values)
    assert sentence in str(error.value)
