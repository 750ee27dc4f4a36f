"""A checkpoint in other people's formats, and back: ``python -m trainers.export``.

    --checkpoint DIR --format huggingface|safetensors|dcp --to DIR [--model FOLDER] [--about JSON]
    --weights DIR    --format huggingface|safetensors|dcp --to DIR

Problem: what was learned here must be usable elsewhere, bit for bit, and the other way round. The
weights of a checkpoint lie in safetensors files, so two of the three formats are a new header in
front of the same bytes (``weights``); nothing is unpickled and nothing cast.

- ``huggingface``: what ``AutoModelForCausalLM.from_pretrained`` opens. The configuration, and the
  tokenizer if there is one, come from the folder of the model that was trained, or its name on a
  hub. Buffers that transformers makes itself are left out; a tied weight is there once.
- ``safetensors``: ``model.safetensors`` with every weight and buffer.
- ``dcp``: ``torch.distributed.checkpoint``, as one process writes it. Its index is a pickle, which
  runs code of whoever wrote it: so is it read by everybody, and so here.

The first two put ``checkpoint.json`` beside it, which says what it is; ``dcp`` too.

Back, weights of either format become a checkpoint directory to start from: weights only. Step,
optimizer, random state and data order are not in them, so a job that starts from it is at step 0.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers import weights

FORMATS = ("huggingface", "safetensors", "dcp")
ABOUT_FILE = "checkpoint.json"
MODEL_FILE = "model.safetensors"
FILES_NAMED_MAX = 8  # of a checkpoint that is not ours; more is a list that nobody reads

COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
"""What transformers finds beside a model's configuration, copied where the model is a folder."""

NO_HUGGINGFACE = {
    "transfer": "a transfer job trains a head on a backbone, for which transformers has no class",
    "lora": "a lora job's checkpoint holds adapters beside its model, which peft writes together at"
    " its end ('output_directory' in its configuration)",
}
"""Trainers whose checkpoints are not a model of transformers, and why."""

EXIT_FAILURE = 1


class ExportError(ValueError):
    """It cannot be written in this format; the sentence says what to do."""


def export(
    checkpoint: Path, kind: str, target: Path, *, model: str = "", about: dict[str, Any]
) -> None:
    """Write the weights of a checkpoint directory to the new directory `target`. Raises
    ExportError, WeightsError and OSError."""
    whole = all((checkpoint / name).exists() for name in weights.CHECKPOINT_FILES)
    if not whole and not (checkpoint / weights.FIRST_PART).exists():
        there = sorted(path.name for path in checkpoint.iterdir())[:FILES_NAMED_MAX]
        raise ExportError(
            f"the checkpoint is not a built-in trainer's, and has {', '.join(there)};"
            " --format raw copies its files as they are"
        )
    found = weights.of_checkpoint(checkpoint)
    if not found:
        raise ExportError(f"{checkpoint} holds no weights")
    reason = NO_HUGGINGFACE.get(about.get("trainer", ""))
    if kind == "huggingface" and reason:
        raise ExportError(f"{reason}; use --format safetensors")
    target.mkdir()
    if kind == "dcp":
        _save_dcp(found, target)
    elif kind == "huggingface":
        _save_huggingface(found, target, model)
    else:
        weights.write(found, target / MODEL_FILE, {"format": "pt", **_texts(about)})
    document = {**about, "format": kind, "tensors": len(found)}
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    (target / ABOUT_FILE).write_text(text, encoding="utf-8")


def import_weights(source: Path, kind: str, target: Path) -> None:
    """Make the new directory `target` a checkpoint of the weights in `source`. Raises ExportError,
    WeightsError and OSError."""
    if kind == "dcp":
        tensors = _load_dcp(source)
        target.mkdir()
        _save_file(tensors, target / MODEL_FILE)
    else:
        found = weights.of_folder(source)
        target.mkdir()
        weights.write(found, target / MODEL_FILE, {})
    weights.write({}, target / weights.CHECKPOINT_FILES[0], {})
    state = {"weights_only": True, "origin": kind, "progress": {"step": 0, "samples": 0}}
    text = json.dumps(state, indent=1, sort_keys=True) + "\n"
    (target / "state.json").write_text(text, encoding="utf-8")


def _texts(about: dict[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file are texts."""
    return {key: str(value) for key, value in about.items()}


def _save_huggingface(found: weights.Entries, target: Path, model: str) -> None:
    import torch
    import transformers

    if not model:
        raise ExportError("give the model that was trained, which has the configuration: --model")
    try:
        configuration = transformers.AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            shape = transformers.AutoModelForCausalLM.from_config(configuration)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ExportError(f"cannot open the configuration of '{model}': {first}") from error
    kept = _persistent(shape, found)
    weights.write(kept, target / MODEL_FILE, {"format": "pt"})
    configuration.architectures = [type(shape).__name__]
    configuration.dtype = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(
        next(iter(kept.values())).dtype
    )
    configuration.save_pretrained(target)
    for name in COMPANIONS:
        if (Path(model) / name).is_file():
            shutil.copyfile(Path(model) / name, target / name)


def _persistent(shape: Any, found: weights.Entries) -> weights.Entries:
    """Of the stored tensors those that a saved model has. Raises ExportError for a parameter that
    is missing or of another shape: then it is not this model."""
    names: dict[int, list[str]] = {}
    for name, parameter in shape.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    live = dict(shape.named_parameters())
    for name, parameter in live.items():
        given = [alias for alias in names[id(parameter)] if alias in found]
        if not given:
            raise ExportError(f"the model has '{name}', which the checkpoint has not")
        if found[given[0]].shape != tuple(parameter.shape):
            raise ExportError(
                f"'{given[0]}' is {list(found[given[0]].shape)} in the checkpoint and"
                f" {list(parameter.shape)} in the model"
            )
    saved = shape.state_dict().keys()
    buffers = dict(shape.named_buffers())
    for name in found:
        if name not in saved and name not in buffers:
            raise ExportError(f"the checkpoint has '{name}', for which the model has no place")
    return {name: entry for name, entry in found.items() if name in saved}


def _save_dcp(found: weights.Entries, target: Path) -> None:
    from torch.distributed.checkpoint import state_dict_saver

    tensors: dict[str, Any] = {name: weights.tensor_of(entry) for name, entry in found.items()}
    state_dict_saver.save(tensors, checkpoint_id=target, no_dist=True)


def _load_dcp(source: Path) -> dict[str, Any]:
    """All tensors; of a nested state those under "model", since optimizers are no weights."""
    import torch
    from torch.distributed.checkpoint import filesystem, state_dict_loader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        metadata = filesystem.FileSystemReader(source).read_metadata()
    except OSError as error:
        raise ExportError(f"{source} is no dcp directory: {error.strerror}") from error
    described = {
        name: value
        for name, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }
    paths = metadata.planner_data or {}
    nested = {
        name: ".".join(str(part) for part in paths[name][1:])
        for name in described
        if len(paths.get(name, ())) > 1 and paths[name][0] == "model"
    }
    names = nested or {name: name for name in described}
    if not names:
        raise ExportError(f"{source} holds no tensors")
    tensors = {
        name: torch.empty(described[name].size, dtype=described[name].properties.dtype)
        for name in names
    }
    state_dict_loader.load(tensors, checkpoint_id=source, no_dist=True)
    return {names[name]: tensor for name, tensor in tensors.items()}


def _save_file(tensors: dict[str, Any], target: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)


def main(arguments: Sequence[str]) -> int:
    """The command line; one sentence on standard error and status 1 for what cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m trainers.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="a checkpoint's files, to be exported")
    source.add_argument("--weights", type=Path, help="a directory to be imported")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--to", required=True, type=Path, help="a directory that is made")
    parser.add_argument("--model", default="", help="huggingface: folder or hub id")
    parser.add_argument("--about", default="{}", type=json.loads, help="JSON to be put beside it")
    given = parser.parse_args(arguments)
    try:
        if given.checkpoint is not None:
            export(given.checkpoint, given.format, given.to, model=given.model, about=given.about)
        else:
            import_weights(given.weights, given.format, given.to)
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"{sys.executable} has no {error.name}: install gpu-baton[trainers] there, or name the"
            " trainers' interpreter\n"
        )
    except (ExportError, weights.WeightsError) as error:
        sys.stderr.write(f"{error}\n")
    except OSError as error:
        sys.stderr.write(f"cannot write {given.to}: {error}\n")
    else:
        return 0
    return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
