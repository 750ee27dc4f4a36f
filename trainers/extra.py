"""What a user's training depends on beyond model and optimizer, as tensors and JSON, and back.

Problem: a learning rate scheduler, a gradient scaler, an average of the weights or a generator of
one's own also decide how a training goes on. Their ``state_dict`` may hold anything, and the usual
answer, pickle, runs code from whoever wrote it.

So: an object's state is walked once. Tensors go to the checkpoint's tensor files under a name made
of their path; everything else becomes JSON, in which what JSON has no word for is spelled out as an
object with one key that begins with ``$``:

    {"$tensor": "extra/scaler/_scale"}    the tensor of that name
    {"$tuple": [...]}                     a tuple
    {"$pairs": [[key, value], ...]}       a dict whose keys are not strings in sorted order
    {"$counter": [[key, count], ...]}     a Counter (milestones of a scheduler)
    {"$number": "nan"}                    nan, inf, -inf

Anything else is refused by its path: a function is code, which the user must make again. Random
generators (of torch, numpy and Python) have no ``state_dict`` and are taken as they are.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy
import torch

PREFIX = "extra/"
"""Of tensor names. No parameter has it: their names are attributes joined by dots."""

DEPTH_MAX = 32
"""Levels of one state; a deeper one contains itself. Schedulers within schedulers have 6."""

Tensors = dict[str, torch.Tensor]


@runtime_checkable
class Stateful(Protocol):
    """A scheduler, scaler, average, or any object of the user's."""

    def state_dict(self) -> dict[str, Any]:
        """The state: tensors, numbers, strings, None, in dicts, lists and tuples."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take the state back."""
        ...


Object = Stateful | torch.Generator | numpy.random.Generator | random.Random


class ExtraError(ValueError):
    """A state cannot be kept, or does not fit; the sentence names the object and the place."""


def describe(objects: Mapping[str, Object]) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of all objects by name (not copied), and the JSON that says where they belong.
    Raises ExtraError for a value that is neither."""
    tensors: Tensors = {}
    described = {}
    for name, kept in objects.items():
        if not name or "/" in name:
            raise ExtraError(f"'{name}' cannot name an object: it must have no '/'")
        described[name] = _encode(_state_of(kept), f"{PREFIX}{name}", tensors, 0)
    return tensors, described


def apply(objects: Mapping[str, Object], tensors: Tensors, described: Mapping[str, Any]) -> None:
    """Give every object its state. Tensors are copied: what an object keeps is its own. Call
    ``check`` first: it assigns nothing."""
    for name, kept in objects.items():
        _give(kept, _decode(described[name], tensors))


def check(objects: Mapping[str, Object], tensors: Tensors, described: Mapping[str, Any]) -> None:
    """Raises ExtraError unless the stored objects are just these, with all of their tensors."""
    for name in sorted(objects.keys() ^ described.keys()):
        where = "is missing in the checkpoint" if name in objects else "is stored but not given"
        raise ExtraError(f"the state of '{name}' {where}")
    named: list[str] = []
    for value in described.values():
        _names(value, named)
    stored = [name for name in tensors if name.startswith(PREFIX)]
    for name in sorted(set(named) ^ set(stored)):
        where = "is missing" if name in named else "belongs to no object"
        raise ExtraError(f"tensor '{name}' {where} in the checkpoint")


def _state_of(kept: Object) -> Any:
    if isinstance(kept, torch.Generator):
        return kept.get_state()
    if isinstance(kept, numpy.random.Generator):
        return kept.bit_generator.state
    if isinstance(kept, random.Random):
        return kept.getstate()
    return kept.state_dict()


def _give(kept: Object, state: Any) -> None:
    if isinstance(kept, torch.Generator):
        kept.set_state(state)
    elif isinstance(kept, numpy.random.Generator):
        kept.bit_generator.state = state
    elif isinstance(kept, random.Random):
        kept.setstate(state)
    else:
        kept.load_state_dict(state)


def _encode(value: Any, path: str, tensors: Tensors, depth: int) -> Any:
    if depth > DEPTH_MAX:
        raise ExtraError(f"{path[:200]} is nested deeper than {DEPTH_MAX} levels")
    if isinstance(value, torch.Tensor | numpy.ndarray):
        if path in tensors:
            raise ExtraError(f"{path} is the path of two tensors: a key there contains '/'")
        if isinstance(value, torch.Tensor):
            tensors[path] = value
            return {"$tensor": path}
        tensors[path] = torch.from_numpy(value.copy())
        return {"$array": path}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$number": str(value)}
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, tensors, depth)
    if isinstance(value, list | tuple):
        items = [_encode(v, f"{path}/{i}", tensors, depth + 1) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise ExtraError(f"{path} is a {type(value).__name__}; only tensors and plain values are kept")


def _encode_mapping(value: Mapping[Any, Any], path: str, tensors: Tensors, depth: int) -> Any:
    """The file sorts the keys of its objects, and the order of a dict may matter to its owner."""
    pairs = []
    for key, item in value.items():
        if not isinstance(key, str | int | float | bool):
            raise ExtraError(f"{path} has a key of type {type(key).__name__}")
        pairs.append([key, _encode(item, f"{path}/{key}", tensors, depth + 1)])
    plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
    if plain and not isinstance(value, Counter) and list(value) == sorted(value):
        return dict(pairs)
    return {"$counter" if isinstance(value, Counter) else "$pairs": pairs}


def _decode(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next(iter(value), "")
    if not mark.startswith("$"):
        return {key: _decode(item, tensors) for key, item in value.items()}
    body = value[mark]
    if mark == "$tensor":
        return tensors[body].clone()
    if mark == "$array":
        return tensors[body].numpy().copy()
    if mark == "$number":
        return float(body)
    if mark == "$tuple":
        return tuple(_decode(item, tensors) for item in body)
    pairs = {key: _decode(item, tensors) for key, item in body}
    return Counter(pairs) if mark == "$counter" else pairs


def _names(value: Any, found: list[str]) -> None:
    """Every tensor that a described state names."""
    if isinstance(value, list):
        for item in value:
            _names(item, found)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("$tensor", "$array"):
                found.append(item)
            else:
                _names(item, found)
