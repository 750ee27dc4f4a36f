"""Make the two demonstration jobs, offline: ``python -m trainers.prepare --out DIRECTORY``.

A demonstration of transfer needs something pre-trained, and a fresh machine without a network has
nothing. So both models are pre-trained (``pretrained.py``), in seconds, on data that ordinary
packages bring:

- ``digits``: scikit-learn's bundled handwritten digits (8x8 pixels). A small ViT learns the ten
  classes on one part of them. The job then freezes it and trains a head that tells odd from even
  on 40 labelled images of another part, and is measured on a third that nothing has seen.
- ``text``: a byte-level GPT-2 of under a million parameters learns the sources of Python's standard
  library. The job then fine-tunes all its layers on licence texts.

Each part is made in a folder of a temporary name, which gets its own name last; what exists is not
made again, and where all of it does torch is not loaded. The configurations are written as
``transfer.json`` and ``finetune.json``, with the two baselines of the transfer job
(``transfer-untrained.json``, ``transfer-scratch.json``) beside it, and ``lora.json`` for the same
texts with adapters.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RECIPE_VERSION = 2
"""In the folder names: a new recipe makes new folders instead of trusting old ones."""

PIXEL_MAX = 16.0
"""The digits are counts of 0 to 16 in blocks of 4x4 pixels."""


def digits(directory: Path) -> None:
    """A ViT pre-trained on ten classes, and 40 + 757 labelled images for odd against even."""
    from trainers import pretrained  # torch takes seconds to load, and mostly all is there

    pretrained.digits(directory)


def text(directory: Path) -> None:
    """A byte-level GPT-2 pre-trained on Python sources, and a folder of licence texts."""
    from trainers import pretrained

    pretrained.text(directory)


def configurations() -> dict[str, dict[str, Any]]:
    """The jobs by file name. Paths are relative to the files."""
    transfer: dict[str, Any] = {
        "model": f"digits-{RECIPE_VERSION}/backbone",
        "train_data": f"digits-{RECIPE_VERSION}/train.npz",
        "evaluation_data": f"digits-{RECIPE_VERSION}/evaluation.npz",
        "pixel_scale": PIXEL_MAX,
        "steps": 3000,
        "batch_size": 40,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "evaluate_every": 500,
        "log_every": 100,
        "checkpoint_every_s": 2.0,
        "seed": 1,
    }
    finetune: dict[str, Any] = {
        "model": f"text-{RECIPE_VERSION}/model",
        "tokenizer": "bytes",
        "train_data": f"text-{RECIPE_VERSION}/licences",
        "steps": 600,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "warmup_steps": 20,
        "evaluate_every": 100,
        "log_every": 20,
        "checkpoint_every_s": 3.0,
        "seed": 1,
    }
    return {
        "lora.json": {**finetune, "learning_rate": 5e-3, "rank": 8, "alpha": 16},
        "transfer.json": transfer,
        "transfer-untrained.json": {**transfer, "backbone": "random"},
        "transfer-scratch.json": {
            **transfer, "backbone": "random", "freeze": False, "learning_rate": 1e-3
        },
        "finetune.json": finetune,
    }  # fmt: skip


def make_once(directory: Path, make: Callable[[Path], None]) -> None:
    """Run ``make`` on a temporary folder and give it its name, unless it is there already."""
    if directory.is_dir():
        say(f"{directory} is there already")
        return
    partial = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    say(f"making {directory}")
    began_s = time.monotonic()
    try:
        make(partial)
        partial.rename(directory)
    except OSError:
        if not directory.is_dir():  # else another process was first, with the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what has its name is no more there
    say(f"  done in {time.monotonic() - began_s:.1f} s")


def say(line: str) -> None:
    """To the person who waits."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the two demonstration jobs, offline.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make them in")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    try:
        make_once(out / f"digits-{RECIPE_VERSION}", digits)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        sys.stderr.write("the digits come with scikit-learn: pip install scikit-learn\n")
        return 1
    make_once(out / f"text-{RECIPE_VERSION}", text)
    for name, values in configurations().items():
        partial = out / f".{name}.{os.getpid()}"
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial.replace(out / name)
        say(f"{out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
