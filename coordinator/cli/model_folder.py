"""The dimensions of a language model from its folder, without torch and without loading a weight.

Problem: memory and speed of a training follow from the model's dimensions, and the coordinator
cannot read the user's folders. The CLI stands where the user stands, and a folder that transformers
opens says it all: `config.json` names the dimensions, under one of two spellings, and the head of
each `.safetensors` file has the shape of every tensor, so parameters are counted and not computed.
Without such a file they follow from the dimensions. What cannot be read is answered with a part of
a sentence that says why.

"""

import json
import math
import struct
from pathlib import Path
from typing import Any

from coordinator.cli.values import JobSpec, ModelFacts

# A config.json has some kilobytes, the head of a file with ten thousand tensors a megabyte.
CONFIG_BYTES_MAX = 4 * 1024**2
HEAD_BYTES_MAX = 64 * 1024**2
FILES_MAX = 1_000
_LENGTH = struct.Struct("<Q")

_SPELLINGS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim"),
    "vocabulary": ("vocab_size",),
}
# Activations of MLPs with a gate, in the configurations of the models that have one.
_GATED_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")

Shapes = dict[str, tuple[int, ...]]


def of_job(spec: JobSpec) -> ModelFacts | str:
    """The model that a job's trainer opens, or why it is not known."""
    try:
        given = json.loads(spec.trainer_config_json or "{}")
    except ValueError:
        return "the trainer's configuration is no JSON"
    name = given.get("model") if isinstance(given, dict) else None
    if not isinstance(name, str) or not name:
        return "the trainer's configuration names no model"
    folder = Path(spec.working_directory or ".") / name
    if not folder.is_dir():
        return f"model {name!r} is no folder here, so its size is not known"
    try:
        return read(folder)
    except (OSError, ValueError) as error:
        return f"the size of model {name!r} is not known: {error}"


def read(folder: Path) -> ModelFacts:
    """Raises OSError or ValueError with why it cannot be known."""
    with (folder / "config.json").open("rb") as file:
        config = json.loads(file.read(CONFIG_BYTES_MAX))
    if not isinstance(config, dict):
        raise ValueError("its config.json is no table")
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    found = {name: _dimension(config, names) for name, names in _SPELLINGS.items()}
    found["intermediate"] = found["intermediate"] or 4 * (found["hidden"] or 0)
    missing = [name for name, value in found.items() if not value]
    if missing:
        raise ValueError(f"its config.json does not say {' and '.join(missing)}")
    dimensions = {name: value for name, value in found.items() if value}
    shapes = _shapes(folder)
    activation = config.get("hidden_act", config.get("hidden_activation"))
    gated, tied = activation in _GATED_ACTIVATIONS, config.get("tie_word_embeddings")
    if shapes:
        gated = any("gate" in name for name in shapes)
        tied = not any(name.endswith("lm_head.weight") for name in shapes)
        parameters = sum(math.prod(shape) for shape in shapes.values())
    else:
        tied = not gated if tied is None else bool(tied)
        parameters = _computed(config, dimensions, gated=gated, tied=tied)
    return ModelFacts(parameters=parameters, gated=gated, tied=tied, **dimensions)


def _dimension(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _shapes(folder: Path) -> Shapes:
    """Of every tensor in the folder's files; empty where there are none. Raises ValueError for a
    file that is none of this format."""
    shapes: Shapes = {}
    for path in sorted(folder.glob("*.safetensors"))[:FILES_MAX]:
        with path.open("rb") as file:
            length = file.read(_LENGTH.size)
            size_bytes = _LENGTH.unpack(length)[0] if len(length) == _LENGTH.size else 0
            if not 0 < size_bytes <= HEAD_BYTES_MAX:
                raise ValueError(f"{path.name} is no safetensors file")
            head = json.loads(file.read(size_bytes))
        for name, told in head.items():
            if name != "__metadata__":
                shapes[name] = tuple(told["shape"])
    return shapes


def _computed(
    config: dict[str, Any], dimensions: dict[str, int], *, gated: bool, tied: bool
) -> int:
    """Parameters by the dimensions of a decoder; norms and biases are left out."""
    hidden, vocabulary = dimensions["hidden"], dimensions["vocabulary"]
    heads = _dimension(config, ("num_attention_heads", "n_head"))
    keys = _dimension(config, ("num_key_value_heads",)) or heads
    shared = keys / heads if heads and keys else 1.0
    attention = round((2 + 2 * shared) * hidden * hidden)
    mlp = (3 if gated else 2) * hidden * dimensions["intermediate"]
    positions = _dimension(config, ("n_positions",)) or 0
    tables = vocabulary * hidden * (1 if tied else 2) + positions * hidden
    return tables + dimensions["layers"] * (attention + mlp)
