"""A job's configuration: JSON or TOML into a frozen dataclass, or a sentence that says why not.

Problem: a misspelt key that is silently ignored costs a night of training with a default. So
every key must be a field, an unknown one is answered with the nearest right one, a value must
have the type of its field, and lie in the range that stands beside it (`Allowed`). Relative
paths in a file are relative to the file, so that a folder with its configuration can be moved.

The coordinator refuses the same at submission. It cannot import this, so the keys with their types
and ranges stand there again (``coordinator/core/trainer_keys.py``), and a test holds them equal.
"""

import dataclasses
import difflib
import json
import reprlib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16", "float16")

PREFETCH_DEPTH_MAX = 8
"""Each batch of the depth takes memory on the host and on the GPU; more than 3 helps nobody."""


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    tuple[str, ...]: "a list of words",
}


class _AsWritten(reprlib.Repr):
    """A value as JSON and TOML have it, and no more of it than a sentence bears."""

    def repr_bool(self, value: bool, level: int) -> str:
        return json.dumps(value)

    def repr_NoneType(self, value: None, level: int) -> str:
        return json.dumps(value)


_AS_WRITTEN = _AsWritten()

AUTOMATIC_S = -1.0
"""Of an interval: nobody has chosen it."""


class ConfigurationError(ValueError):
    """The user's configuration is wrong; the sentence says what to change."""


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Which values of its type a key takes: numbers from `least` or above `above`, to `most` or
    below `below`, or `also`; of texts, `words`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: float | None = None
    words: tuple[str, ...] = ()

    def __contains__(self, value: Any) -> bool:
        if self.words or value == self.also:
            return not self.words or value in self.words
        # As it stands, so that what is no number ("nan") is within no range.
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Said after what kind of value it is; empty for any."""
        if self.words:
            return f"one of {', '.join(self.words)}"
        ends = {
            "of at least": self.least,
            "above": self.above,
            "at most": self.most,
            "below": self.below,
        }
        said = " and ".join(f"{word} {end:g}" for word, end in ends.items() if end is not None)
        return said + ("" if self.also is None else f", or {self.also:g}")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """The keys of a job's configuration that concern the loop, whatever the trainer."""

    steps: Annotated[int, Allowed(least=1)]
    """Optimizer steps in all; a resumed job counts on from its checkpoint."""

    batch_size: Annotated[int, Allowed(least=1)] = 16
    """Samples whose gradients are computed at once; as many as the memory holds. Where they do not
    fit, they are halved, and the step keeps its samples."""

    accumulate: Annotated[int, Allowed(least=1)] = 1
    """Batches in one step, for larger steps than the memory holds."""

    learning_rate: Annotated[float, Allowed(least=0)] = 1e-3
    """The highest one, reached after the warm-up."""

    schedule: Annotated[str, Allowed(words=SCHEDULES)] = "cosine"
    """cosine or linear (both to 0 at the last step), or constant."""

    warmup_steps: Annotated[int, Allowed(least=0)] = 0
    """Steps over which the learning rate rises from 0: AdamW's first estimates are noise."""

    weight_decay: Annotated[float, Allowed(least=0)] = 0.01
    """AdamW's, on weights of two and more dimensions. PyTorch's default."""

    clip_norm: Annotated[float, Allowed(least=0)] = 1.0
    """Largest norm of the gradient; 0 for no limit. 1 is customary for transformers."""

    evaluate_every: Annotated[int, Allowed(least=1)] = 100
    """Steps between evaluations; there is always one at the end."""

    log_every: Annotated[int, Allowed(least=1)] = 10
    """Steps between lines in the log."""

    checkpoint_every_steps: Annotated[int, Allowed(least=0)] = 0
    """Steps between checkpoints; 0 for none by count."""

    checkpoint_every_s: Annotated[float, Allowed(least=0, also=AUTOMATIC_S)] = AUTOMATIC_S
    """Seconds between checkpoints; 0 for none by time. At most this much work is repeated. Left
    out: by Young's rule, from what a checkpoint costs and how often things fail; once a minute at
    least for states under 1 GB."""

    mean_time_between_failures_s: Annotated[float, Allowed(least=0, also=AUTOMATIC_S)] = AUTOMATIC_S
    """For that rule: seconds between failures of what this job runs on. Left out: what the
    coordinator has seen in its fleet, and a day where it has seen next to nothing, or outside
    Baton. A day is cautious for a box of one's own and hopeful for one that others may reclaim; a
    fleet of 16,384 GPUs had one every three hours, which is 9 months for each of its boxes (Llama
    3, arXiv 2407.21783, 3.3.4)."""

    checkpoint_directory: str = ""
    """Outside Baton only: where checkpoints are kept, and resumed from. Empty for none."""

    seed: Annotated[int, Allowed(least=0)] = 1
    """Of the initial values, the data order and all random generators."""

    precision: Annotated[str, Allowed(words=PRECISIONS)] = "float32"
    """float32; bfloat16 or float16 for matrix products in 16 bits (parameters stay float32).
    bfloat16 where the GPU has it; float16, with a scaled loss, for those before Ampere."""

    deterministic: bool = False
    """Algorithms alone that give the same bits each time, for resumes at E0 on a GPU. Some are
    slower; where an operation has none, the job fails and names it."""

    compile: bool = False
    """Compile the steps with torch.compile: the first takes a minute or more, those after it less
    than before. Evaluations are not compiled. Needs a compiler on the node, and trains without
    where there is none."""

    early_stop_patience: Annotated[int, Allowed(least=0)] = 0
    """Evaluations in a row without a better figure after which training ends; 0 for never."""

    prefetch_depth: Annotated[int, Allowed(least=1, most=PREFETCH_DEPTH_MAX)] = 2
    """Batches that are made ahead: 2, or 3 where making one takes very different times."""

    collective_timeout_s: Annotated[float, Allowed(above=0)] = 600.0
    """Of several ranks only: how long one waits for another in the middle of a step, or for all to
    come up. Baton ends a rank whose peers are gone long before; outside it, ten minutes are enough
    for the slowest node to load its model, and torch's own 30 are a waste of GPUs."""

    def problems(self) -> list[str]:
        """What is wrong, as sentences that say what to change."""
        every = keys(type(self)).items()
        found = (wrong(name, getattr(self, name), *key) for name, key in every)
        return list(filter(None, found))


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
    known = keys(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    found: list[str] = []
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(fields)}"
            found.append(f"unknown key '{key}'; {hint}")
        elif sentence := wrong(key, value, *known[key]):
            found.append(sentence)
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


def keys(kind: type[LoopOptions]) -> dict[str, tuple[Any, Allowed]]:
    """Each with the type and the range of its values."""
    types, annotated = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    ranges = ((name, getattr(hint, "__metadata__", ())) for name, hint in annotated.items())
    return {name: (types[name], next(iter(allowed), Allowed())) for name, allowed in ranges}


def wrong(key: str, value: Any, kind: Any, allowed: Allowed) -> str:
    """What is expected in place of this value; empty where it is right."""
    if _has_type(value, kind) and value in allowed:
        return ""
    expected = " ".join(filter(None, ("" if allowed.words else _KINDS[kind], str(allowed))))
    return f"'{key}' must be {expected}, not {_AS_WRITTEN.repr(value)}"


def _has_type(value: object, kind: Any) -> bool:
    if kind == tuple[str, ...]:
        return isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def resolve(path: str, base: Path) -> str:
    """A path of a configuration file, seen from where that file lies. What does not exist there
    is returned as it is: it may be the id of a model on a hub."""
    candidate = base / path
    return str(candidate) if path and candidate.exists() else path
