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
PRECISIONS = ("float32", "bfloat16", "float16")

PREFETCH_DEPTH_MAX = 8
"""Each batch of the depth takes memory on the host and on the GPU; more than 3 helps nobody."""


AUTOMATIC_S = -1.0
"""Of an interval: nobody has chosen it."""


class ConfigurationError(ValueError):
    """The user's configuration is wrong; the sentence says what to change."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """The keys of a job's configuration that concern the loop, whatever the trainer."""

    steps: int
    """Optimizer steps in all; a resumed job counts on from its checkpoint."""

    batch_size: int = 16
    """Samples whose gradients are computed at once; as many as the memory holds. Where they do not
    fit, they are halved, and the step keeps its samples."""

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

    checkpoint_every_s: float = AUTOMATIC_S
    """Seconds between checkpoints; 0 for none by time. At most this much work is repeated. Left
    out: by Young's rule, from what a checkpoint costs and how often things fail; once a minute at
    least for states under 1 GB."""

    mean_time_between_failures_s: float = 86_400.0
    """For that rule: seconds between failures of what this job runs on. A day is cautious for a box
    of one's own and hopeful for one that others may reclaim; a fleet of 16,384 GPUs had one every
    three hours, which is 9 months for each of its boxes (Llama 3, arXiv 2407.21783, 3.3.4)."""

    checkpoint_directory: str = ""
    """Outside Baton only: where checkpoints are kept, and resumed from. Empty for none."""

    seed: int = 1
    """Of the initial values, the data order and all random generators."""

    precision: str = "float32"
    """float32; bfloat16 or float16 for matrix products in 16 bits (parameters stay float32).
    bfloat16 where the GPU has it; float16, with a scaled loss, for those before Ampere."""

    compile: bool = False
    """Compile the steps with torch.compile: the first takes a minute or more, those after it less
    than before. Evaluations are not compiled. Needs a compiler on the node, and trains without
    where there is none."""

    early_stop_patience: int = 0
    """Evaluations in a row without a better figure after which training ends; 0 for never."""

    prefetch_depth: int = 2
    """Batches that are made ahead: 2, or 3 where making one takes very different times."""

    collective_timeout_s: float = 600.0
    """Of several ranks only: how long one waits for another in the middle of a step, or for all to
    come up. Baton ends a rank whose peers are gone long before; outside it, ten minutes are enough
    for the slowest node to load its model, and torch's own 30 are a waste of GPUs."""

    def problems(self) -> list[str]:
        """What is wrong, as sentences that say what to change."""
        found = []
        for name in ("steps", "batch_size", "accumulate", "evaluate_every", "log_every"):
            if getattr(self, name) < 1:
                found.append(f"'{name}' must be at least 1, not {getattr(self, name)}")
        for name in (
            "warmup_steps", "weight_decay", "clip_norm", "seed", "learning_rate",
            "checkpoint_every_steps", "checkpoint_every_s", "early_stop_patience",
            "mean_time_between_failures_s",
        ):  # fmt: skip
            chosen = name != "checkpoint_every_s" or self.checkpoint_every_s != AUTOMATIC_S
            if chosen and not getattr(self, name) >= 0:
                found.append(f"'{name}' must not be negative, and is {getattr(self, name)}")
        if not self.collective_timeout_s > 0:
            found.append(f"'collective_timeout_s' must be above 0, not {self.collective_timeout_s}")
        if self.schedule not in SCHEDULES:
            found.append(f"'schedule' must be one of {SCHEDULES}, not '{self.schedule}'")
        if self.precision not in PRECISIONS:
            found.append(f"'precision' must be one of {PRECISIONS}, not '{self.precision}'")
        if not 1 <= self.prefetch_depth <= PREFETCH_DEPTH_MAX:
            found.append(
                f"'prefetch_depth' must be 1 to {PREFETCH_DEPTH_MAX}, not {self.prefetch_depth}"
            )
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
            words = types[key] == tuple[str, ...]
            wanted = "a list of words" if words else f"of type {types[key].__name__}"
            found.append(f"'{key}' must be {wanted}, not {type(value).__name__} ({value!r})")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            found.append(f"'{name}' is missing")
    if not found:
        # A frozen dataclass holds what cannot be changed.
        fixed: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        configuration = kind(**fixed)
        found = configuration.problems()
        if not found:
            return configuration
    raise ConfigurationError(f"{source}: " + "; ".join(found))


def _has_type(value: object, wanted: Any) -> bool:
    if wanted == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(word, str) for word in value)
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    assert isinstance(wanted, type)
    return isinstance(value, wanted)


def resolve(path: str, base: Path) -> str:
    """A path of a configuration file, seen from where that file lies. What does not exist there
    is returned as it is: it may be the id of a model on a hub."""
    candidate = base / path
    return str(candidate) if path and candidate.exists() else path
