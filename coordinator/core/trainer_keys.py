"""Which keys the configurations of the built-in trainers have, and what values they take.

Problem: `baton fit` that answers for `batchsize = 64` as if it stood there for nothing is believed,
and the trainer itself says that it knows no such key, or that `steps = "five"` is no number, only
after the queue. So both `baton fit` and `baton submit` refuse it, in the trainer's own words. A
coordinator cannot import `trainers/`, so what `trainers/configuration.py` reads off its fields
stands here again, and a test holds both equal.
"""

import difflib
import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from coordinator.core import arrays
from coordinator.core.model import JobSpec

_KINDS: Final[dict[type, str]] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    tuple: "a list of words",
}


class _AsWritten(reprlib.Repr):
    """A value as JSON and TOML have it, and no more of it than a sentence bears."""

    def repr_bool(self, value: bool, level: int) -> str:
        return json.dumps(value)

    def repr_NoneType(self, value: None, level: int) -> str:
        return json.dumps(value)


_AS_WRITTEN: Final = _AsWritten()


@dataclass(frozen=True, slots=True)
class Key:
    """Values of `kind` (`tuple`: a list of words): numbers from `least` or above `above`, to `most`
    or below `below`, or `also`; of texts, `words`."""

    kind: type
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: float | None = None
    words: tuple[str, ...] = ()
    required: bool = False

    def wrong(self, name: str, value: Any) -> str:
        """What is expected in place of this value; empty where it is right."""
        if self._is_of_kind(value) and self._is_in_range(value):
            return ""
        return f"'{name}' must be {self._expected()}, not {_AS_WRITTEN.repr(value)}"

    def _is_of_kind(self, value: Any) -> bool:
        if self.kind is tuple:
            return isinstance(value, list) and all(isinstance(word, str) for word in value)
        if isinstance(value, bool):
            return self.kind is bool
        return isinstance(value, int | float if self.kind is float else self.kind)

    def _is_in_range(self, value: Any) -> bool:
        if self.words or value == self.also:
            return not self.words or value in self.words
        # As it stands, so that what is no number ("nan") is within no range.
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def _expected(self) -> str:
        if self.words:
            return f"one of {', '.join(self.words)}"
        ends = {
            "of at least": self.least,
            "above": self.above,
            "at most": self.most,
            "below": self.below,
        }
        said = " and ".join(f"{word} {end:g}" for word, end in ends.items() if end is not None)
        said += "" if self.also is None else f", or {self.also:g}"
        return f"{_KINDS[self.kind]} {said}".rstrip()


_FLAG, _TEXT, _REQUIRED = Key(bool), Key(str), Key(str, required=True)
_NOT_NEGATIVE, _NUMBER_NOT_NEGATIVE, _ABOVE_0 = Key(int, 0), Key(float, 0), Key(float, above=0)

_LOOP: Final = {
    "steps": Key(int, 1, required=True),
    "batch_size": Key(int, 1),
    "accumulate": Key(int, 1),
    "learning_rate": _NUMBER_NOT_NEGATIVE,
    "schedule": Key(str, words=("cosine", "linear", "constant")),
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NUMBER_NOT_NEGATIVE,
    "clip_norm": _NUMBER_NOT_NEGATIVE,
    "evaluate_every": Key(int, 1),
    "log_every": Key(int, 1),
    "checkpoint_every_steps": _NOT_NEGATIVE,
    "checkpoint_every_s": Key(float, 0, also=-1),
    "mean_time_between_failures_s": Key(float, 0, also=-1),
    "checkpoint_directory": _TEXT,
    "seed": _NOT_NEGATIVE,
    "precision": Key(str, words=("float32", "bfloat16", "float16")),
    "deterministic": _FLAG,
    "compile": _FLAG,
    "early_stop_patience": _NOT_NEGATIVE,
    "prefetch_depth": Key(int, 1, most=8),
    "collective_timeout_s": _ABOVE_0,
}
_TRANSFER: Final = {
    "model": _REQUIRED,
    "train_data": _REQUIRED,
    "evaluation_data": _REQUIRED,
    "sample_column": _TEXT,
    "label_column": _TEXT,
    "backbone": Key(str, words=("pretrained", "random")),
    "freeze": _FLAG,
    "head_hidden": _NOT_NEGATIVE,
    "pixel_mean": Key(float),
    "pixel_deviation": _ABOVE_0,
    "pixel_scale": _ABOVE_0,
    "feature_cache_bytes": _NOT_NEGATIVE,
    "text_tokens_max": Key(int, 1),
}
_FINETUNE: Final = {
    "model": _REQUIRED,
    "train_data": _REQUIRED,
    "evaluation_data": _TEXT,
    "held_out_ratio": Key(float, above=0, below=1),
    "tokenizer": _TEXT,
    "window_tokens": Key(int, 2),
    "evaluation_windows_max": Key(int, 2),
    "from_scratch": _FLAG,
    "start_from": _TEXT,
    "output_directory": _TEXT,
}
_LORA: Final = {
    "rank": Key(int, 1),
    "alpha": Key(int, 1),
    "dropout": Key(float, 0, below=1),
    "target_modules": Key(tuple),
    "base_precision": Key(str, words=("float32", "bfloat16")),
    "merge": _FLAG,
}
KEYS: Final = {
    "transfer": _LOOP | _TRANSFER,
    "finetune": _LOOP | _FINETUNE,
    "lora": _LOOP | _FINETUNE | _LORA,
}
_NAMED_MAX = 4  # of what is wrong, in one sentence


def refuse(spec: JobSpec) -> str:
    """What keeps its trainer from starting, as far as its configuration tells; empty where nothing
    does."""
    return wrong(spec) or _missing(spec)


def wrong(spec: JobSpec) -> str:
    """What is wrong with what a trainer's configuration says; empty where nothing is."""
    for given in _given(spec):
        if given is None:
            return "the trainer's configuration is no table of keys and values in JSON"
        found = [*_each(spec.trainer, given)] or [*_together(spec.trainer, given)]
        if found:
            if arrays.INDEX in spec.trainer_config_json and not spec.array:
                found.insert(0, f"{arrays.INDEX} stands for a trial's number, with --array alone")
            return f"the trainer's configuration: {'; '.join(found[:_NAMED_MAX])}"
    return ""


def _missing(spec: JobSpec) -> str:
    for given in _given(spec):
        every = KEYS[spec.trainer].items()
        lacks = [f"'{name}'" for name, key in every if key.required and name not in (given or ())]
        if lacks:
            return f"the trainer's configuration lacks {', '.join(lacks)}"
    return ""


def _each(trainer: str, given: dict[str, Any]) -> Iterator[str]:
    known = KEYS[trainer]
    for name, value in given.items():
        if name in known:
            if sentence := known[name].wrong(name, value):
                yield sentence
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        yield f"unknown key '{name[:64]}'; {hint}"


def _together(trainer: str, given: dict[str, Any]) -> Iterator[str]:
    if trainer == "lora" and given.get("from_scratch"):
        yield "'from_scratch' leaves the adapters nothing to add to: use finetune"
    if trainer == "lora" and given.get("merge") and not given.get("output_directory"):
        yield "'merge' needs an 'output_directory' to write the model to"


def _given(spec: JobSpec) -> Iterator[dict[str, Any] | None]:
    """What the trainer is started with; `None` where that is no table of keys. Nothing where there
    is no trainer of ours. Of an array by the first index and the last: each key takes an interval,
    so what both are right for, all are."""
    if spec.trainer not in KEYS:
        return
    indices = arrays.parse(spec.array).indices if spec.array else ()
    config = spec.trainer_config_json
    for text in [arrays.filled(config, index) for index in indices[:1] + indices[-1:]] or [config]:
        try:
            given = json.loads(text or "{}")
        except (ValueError, RecursionError):
            given = None
        yield given if isinstance(given, dict) else None
