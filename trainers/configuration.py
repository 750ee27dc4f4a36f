"""A job's configuration: JSON or TOML into a frozen dataclass, or a sentence that says why not.

Problem: a misspelt key that is silently ignored costs a night of training with a default. So
every key must be a field, an unknown one is answered with the nearest right one, a value must
have the type of its field, and the dataclass itself checks ranges in ``problems``. Relative paths
in a file are relative to the file, so that a folder with its configuration can be moved.
"""

import dataclasses
import difflib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16")


class ConfigurationError(ValueError):
    """The user's configuration is wrong; the sentence says what to change."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """The keys of a job's configuration that concern the loop, whatever the trainer."""

    steps: int
    """Optimizer steps in all; a resumed job counts on from its checkpoint."""

    batch_size: int = 16
    """Samples whose gradients are computed at once; as many as the memory holds."""

    accumulate: int = 1
    """Batches in one step, for larger steps than the memory holds."""

    learning_rate: float = 1e-3
    """The highest one, reached after the warm-up."""

    schedule: str = "cosine"
    """cosine or linear (both to 0 at the last step), or constant."""

    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0: AdamW's first estimates are noise."""

    weight_decay: float = 0.01
    """AdamW's, on weights of two and more dimensions. PyTorch's default."""

    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 for no limit. 1 is customary for transformers."""

    evaluate_every: int = 100
    """Steps between evaluations; there is always one at the end."""

    log_every: int = 10
    """Steps between lines in the log."""

    checkpoint_every_steps: int = 0
    """Steps between checkpoints; 0 for none by count."""

    checkpoint_every_s: float = 60.0
    """Seconds between checkpoints; 0 for none by time. At most this much work is repeated."""

    checkpoint_directory: str = ""
    """Outside Baton only: where checkpoints are kept, and resumed from. Empty for none."""

    seed: int = 1
    """Of the initial values, the data order and all random generators."""

    precision: str = "float32"
    """float32, or bfloat16 for matrix products in 16 bits (parameters stay float32)."""

    def problems(self) -> list[str]:
        """What is wrong, as sentences that say what to change."""
        found = []
        for name in ("steps", "batch_size", "accumulate", "evaluate_every", "log_every"):
            if getattr(self, name) < 1:
                found.append(f"'{name}' must be at least 1, not {getattr(self, name)}")
        for name in (
            "warmup_steps", "weight_decay", "clip_norm", "seed", "learning_rate",
            "checkpoint_every_steps", "checkpoint_every_s",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                found.append(f"'{name}' must not be negative, and is {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            found.append(f"'schedule' must be one of {SCHEDULES}, not '{self.schedule}'")
        if self.precision not in PRECISIONS:
            found.append(f"'precision' must be one of {PRECISIONS}, not '{self.precision}'")
        return found


Options = TypeVar("Options", bound=LoopOptions)


def load(kind: type[Options], file: Path) -> Options:
    """Read ``file`` as a ``kind``. Raises ConfigurationError."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error.strerror}") from error
    try:
        values = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        language = "TOML" if file.suffix == ".toml" else "JSON"
        raise ConfigurationError(f"{file} is not {language}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{file} must hold one object of keys and values")
    return build(kind, values, source=str(file))


def build(kind: type[Options], values: dict[str, Any], *, source: str) -> Options:
    """Make a ``kind`` from plain values. Raises ConfigurationError."""
    types = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    found: list[str] = []
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(fields)}"
            found.append(f"unknown key '{key}'; {hint}")
        elif not _has_type(value, types[key]):
            found.append(
                f"'{key}' must be of type {types[key].__name__}, "
                f"not {type(value).__name__} ({value!r})"
            )
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            found.append(f"'{name}' is missing")
    if not found:
        configuration = kind(**values)
        found = configuration.problems()
        if not found:
            return configuration
    raise ConfigurationError(f"{source}: " + "; ".join(found))


def _has_type(value: object, wanted: type) -> bool:
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)


def resolve(path: str, base: Path) -> str:
    """A path of a configuration file, seen from where that file lies. What does not exist there
    is returned as it is: it may be the id of a model on a hub."""
    candidate = base / path
    return str(candidate) if path and candidate.exists() else path
