"""Which keys the configurations of the built-in trainers have, and the nearest right one of a wrong
one.

Problem: `baton fit` that answers for `batchsize = 64` as if it stood there for nothing is believed,
and the trainer itself says that it knows no such key only after the queue. So both `baton fit` and
`baton submit` refuse it. A coordinator cannot import `trainers/`, so the keys stand here again, and
a test holds them equal.
"""

import difflib
import json

from coordinator.core.model import JobSpec

_LOOP = (
    "steps",
    "batch_size",
    "accumulate",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "weight_decay",
    "clip_norm",
    "evaluate_every",
    "log_every",
    "checkpoint_every_steps",
    "checkpoint_every_s",
    "mean_time_between_failures_s",
    "checkpoint_directory",
    "seed",
    "precision",
    "compile",
    "early_stop_patience",
    "prefetch_depth",
    "collective_timeout_s",
)
_TRANSFER = (
    "model",
    "train_data",
    "evaluation_data",
    "sample_column",
    "label_column",
    "backbone",
    "freeze",
    "head_hidden",
    "pixel_mean",
    "pixel_deviation",
    "pixel_scale",
    "feature_cache_bytes",
    "text_tokens_max",
)
_FINETUNE = (
    "model",
    "train_data",
    "evaluation_data",
    "held_out_ratio",
    "tokenizer",
    "window_tokens",
    "evaluation_windows_max",
    "from_scratch",
    "start_from",
    "output_directory",
)
_LORA = (
    "rank",
    "alpha",
    "dropout",
    "target_modules",
    "base_precision",
    "merge",
)
KEYS = {
    "transfer": (*_LOOP, *_TRANSFER),
    "finetune": (*_LOOP, *_FINETUNE),
    "lora": (*_LOOP, *_FINETUNE, *_LORA),
}
# What has no default.
_ALWAYS = ("steps", "model", "train_data")
REQUIRED = {"transfer": (*_ALWAYS, "evaluation_data"), "finetune": _ALWAYS, "lora": _ALWAYS}


def refuse(spec: JobSpec) -> str:
    """What keeps its trainer from starting, as far as keys tell; empty where nothing does."""
    return (misspelt(spec) or _missing(spec)) if spec.trainer else ""


def _missing(spec: JobSpec) -> str:
    given = _given(spec)
    if given is None:
        return ""
    lacks = [f"'{key}'" for key in REQUIRED[spec.trainer] if key not in given]
    return f"the trainer's configuration lacks {', '.join(lacks)}" if lacks else ""


def misspelt(spec: JobSpec) -> str:
    """What is wrong with the keys of a trainer's configuration, as its trainer would say it; empty
    where nothing is, or where it is not a table of keys at all (`workload.read` says that)."""
    known = KEYS.get(spec.trainer, ())
    found = []
    for key in _given(spec) or ():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            found.append(f"unknown key '{key[:64]}'; {hint}")
    return f"the trainer's configuration: {'; '.join(found[:4])}" if found else ""


def _given(spec: JobSpec) -> dict[str, object] | None:
    """Nothing where there is no trainer of ours, or no table of keys."""
    try:
        given = json.loads(spec.trainer_config_json or "{}")
    except (ValueError, RecursionError):
        return None
    return given if spec.trainer in KEYS and isinstance(given, dict) else None
