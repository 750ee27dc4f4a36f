"""Weights leave and come back bit for bit, in each format; what is no such format is refused."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from tests.trainers import tasks
from trainers import causal, checkpoint, export, extra, loop, weights
from trainers.configuration import ConfigurationError
from trainers.finetune import FinetuneOptions

ABOUT = {"job": 12, "digest": "ab" * 32, "step": 2, "trainer": "finetune"}
TASKS = pytest.mark.parametrize("make_task", [tasks.finetune_task, tasks.transfer_task])


def written(make_task: Callable[[], loop.Task], place: Path) -> tuple[loop.Trainer, Path]:
    """A training after two steps, and its checkpoint."""
    live = tasks.trainer(make_task())
    live.prepare()
    for _ in range(2):
        live.advance()
    checkpoint.write(live.snapshot(), place / "checkpoint")
    return live, place / "checkpoint"


def model_folder(place: Path) -> Path:
    """What `model` names in the configuration: a folder with values of its own."""
    loop.seed_everything(99)
    tasks.tiny_gpt2().save_pretrained(place / "base")
    (place / "base" / "tokenizer.json").write_text("{}")
    return place / "base"


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint directory, by the library that others use."""
    found: dict[str, torch.Tensor] = {}
    for name in weights.CHECKPOINT_FILES:
        found |= load_file(directory / name)
    return found


def assert_same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        same = torch.equal(bits(tensor), bits(other))
        assert same, name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@TASKS
def test_safetensors_holds_every_weight_and_says_what_it_is(
    make_task: Callable[[], loop.Task], tmp_path: Path
) -> None:
    _, source = written(make_task, tmp_path)
    for name in ("one", "two"):
        export.export(source, "safetensors", tmp_path / name, about=ABOUT)
    file = tmp_path / "one" / "model.safetensors"
    assert_same(load_file(file), stored(source))
    assert file.read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", **{k: str(v) for k, v in ABOUT.items()}}
    about = json.loads((tmp_path / "one" / "checkpoint.json").read_text())
    assert about == {**ABOUT, "format": "safetensors", "tensors": len(stored(source))}


def test_huggingface_opens_with_the_same_values_and_answers(tmp_path: Path) -> None:
    live, source = written(tasks.finetune_task, tmp_path)
    base = model_folder(tmp_path)
    export.export(source, "huggingface", tmp_path / "made", model=str(base), about=ABOUT)
    opened: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert_same(dict(opened.named_parameters()), dict(live.task.model.named_parameters()))
    tokens = torch.arange(16).reshape(1, 16)
    live.task.model.eval()
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, live.task.model(tokens).logits)
    assert (tmp_path / "made" / "tokenizer.json").read_text() == "{}"
    assert not list((tmp_path / "made").glob("*.bin"))


def test_dcp_is_read_by_torch(tmp_path: Path) -> None:
    _, source = written(tasks.transfer_task, tmp_path)
    export.export(source, "dcp", tmp_path / "made", about=ABOUT)
    wanted = stored(source)
    read = {name: torch.full_like(tensor, 7) for name, tensor in wanted.items()}
    state_dict_loader.load(read, checkpoint_id=tmp_path / "made", no_dist=True)
    assert_same(read, wanted)


@pytest.mark.parametrize("kind", export.FORMATS)
def test_there_and_back_and_into_a_new_training(kind: str, tmp_path: Path) -> None:
    live, source = written(tasks.finetune_task, tmp_path)
    base = model_folder(tmp_path)
    export.export(source, kind, tmp_path / "out", model=str(base), about=ABOUT)
    export.import_weights(tmp_path / "out", kind, tmp_path / "back")
    assert_same(stored(tmp_path / "back"), stored(source))
    (tmp_path / "text.txt").write_text("a text that is long enough " * 40)
    options = FinetuneOptions(
        steps=1,
        model="base",
        train_data="text.txt",
        tokenizer="bytes",
        window_tokens=16,
        start_from="back",
    )
    begun = causal.build(options, tmp_path)
    parameters = dict(begun.model.named_parameters())
    assert_same(parameters, dict(live.task.model.named_parameters()))
    state = json.loads((tmp_path / "back" / "state.json").read_text())
    assert (state["weights_only"], state["progress"]["step"]) == (True, 0)


def test_of_a_nested_dcp_state_the_model_is_taken(tmp_path: Path) -> None:
    state = {
        "model": {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).bfloat16()},
        "optimizer": {"a.weight": torch.zeros(2, 3)},
        "step": 12,
    }
    state_dict_saver.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    export.import_weights(tmp_path / "dcp", "dcp", tmp_path / "made")
    assert_same(stored(tmp_path / "made"), state["model"])  # type: ignore[arg-type]


def test_a_model_in_several_files_is_imported(tmp_path: Path) -> None:
    parts = {"one.safetensors": {"a": torch.ones(2)}, "two.safetensors": {"b": torch.zeros(3)}}
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / weights.INDEX_FILE).write_text(json.dumps(index))
    export.import_weights(tmp_path, "huggingface", tmp_path / "made")
    assert_same(stored(tmp_path / "made"), {"a": torch.ones(2), "b": torch.zeros(3)})
    index["weight_map"]["b"] = "../two.safetensors"
    (tmp_path / weights.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(weights.WeightsError, match="outside of its folder"):
        weights.of_folder(tmp_path)


def test_what_is_no_weight_is_left_out(tmp_path: Path) -> None:
    assert weights.EXTRA_PREFIX == extra.PREFIX
    save_file({"a": torch.ones(2), "extra/x": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({}, tmp_path / "frozen.safetensors")
    export.export(tmp_path, "safetensors", tmp_path / "made", about={})
    assert_same(load_file(tmp_path / "made" / "model.safetensors"), {"a": torch.ones(2)})


def test_a_head_on_a_backbone_is_no_huggingface_model(tmp_path: Path) -> None:
    _, source = written(tasks.transfer_task, tmp_path)
    base = str(model_folder(tmp_path))
    about = {"trainer": "transfer"}
    with pytest.raises(export.ExportError, match="use --format safetensors"):
        export.export(source, "huggingface", tmp_path / "made", model=base, about=about)
    with pytest.raises(export.ExportError, match=r"the model has 'transformer\.wte\.weight', w"):
        export.export(source, "huggingface", tmp_path / "made", model=base, about={})
    with pytest.raises(export.ExportError, match="cannot open the configuration of 'nowhere'"):
        export.export(source, "huggingface", tmp_path / "other", model="nowhere", about={})


def header(tensors: dict[str, object]) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def described(first: int, last: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "a header of 0 bytes"),
        (b"\xff" * 8, "a header of"),
        ((50).to_bytes(8, "little") + b"{}" + b" " * 9, "is cut off"),
        (header({"a": described(0, 8)}) + bytes(7), "7 bytes of tensors, and 8 are described"),
        (header({"a": described(0, 8)}) + bytes(9), "9 bytes of tensors, and 8 are described"),
        (header({"a": described(4, 12)}) + bytes(12), "overlap or leave a hole at byte 0"),
        (
            header({"a": described(0, 8), "b": described(4, 12)}) + bytes(12),
            "overlap or leave a hole at byte 8",
        ),
        (header({"a": described(0, 4)}) + bytes(4), "'a' has 4 bytes, and its shape 8"),
        (header({"a": {"dtype": "F3"}}), "'a' has no usable header"),
        (header({"a": 3}), "'a' has no usable header"),
    ],
)
def test_a_file_that_is_not_as_it_must_be_is_refused(
    content: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(weights.WeightsError, match=sentence):
        weights.of_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda found: found.pop("transformer.wpe.weight"), "'transformer.wpe.weight' is missing"),
        (lambda found: found.update(more=torch.ones(1)), "'more' in .* has no place"),
        (
            lambda found: found.update({"transformer.wpe.weight": torch.ones(3, 4)}),
            r"is \[3, 4\]; the model has \[16, 8\]",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    change: Callable[[dict[str, torch.Tensor]], Any], sentence: str, tmp_path: Path
) -> None:
    _, source = written(tasks.finetune_task, tmp_path)
    found = stored(source)
    change(found)
    save_file(found, tmp_path / "model.safetensors")
    save_file({}, tmp_path / "frozen.safetensors")
    model = tasks.tiny_gpt2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(weights.WeightsError, match=sentence):
        weights.load_into(model, tmp_path)
    assert_same(before, dict(model.state_dict()))


def test_a_start_from_nothing_is_answered_with_a_sentence(tmp_path: Path) -> None:
    model_folder(tmp_path)
    (tmp_path / "text.txt").write_text("a text that is long enough " * 40)
    options = FinetuneOptions(
        steps=1, model="base", train_data="text.txt", tokenizer="bytes", window_tokens=16,
        start_from="absent",
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="cannot start from 'absent': cannot read"):
        causal.build(options, tmp_path)


def test_a_checkpoint_that_somebody_elses_script_wrote_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"a pickle")
    with pytest.raises(export.ExportError, match=r"has state\.pt; --format raw copies its files"):
        export.export(tmp_path, "safetensors", tmp_path / "made", about=ABOUT)
    (tmp_path / "model.safetensors").touch()  # Hugging Face's Trainer has a file of this name
    with pytest.raises(export.ExportError, match=r"has model\.safetensors, state\.pt; --format"):
        export.export(tmp_path, "safetensors", tmp_path / "made", about=ABOUT)


def test_the_program_ends_with_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "trainers.export", "--weights", str(tmp_path)]
    command += ["--format", "safetensors", "--to", str(tmp_path / "made")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"cannot read {tmp_path}/model.safetensors: No such file or directory"
    ]


def test_the_program_without_torch_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint", None)
    arguments = ["--weights", str(tmp_path), "--format", "dcp", "--to", str(tmp_path / "made")]
    assert export.main(arguments) == 1
    assert "install gpu-baton[trainers] there" in capsys.readouterr().err
