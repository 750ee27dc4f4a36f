"""Was anything transferred? ``python -m trainers.compare --data DIRECTORY`` answers with a table.

A good figure of a frozen backbone with a new head proves little: the task may be easy, and random
features are surprisingly good. So the same head is trained on the same labels three times: on
the pre-trained backbone, on the same architecture with random values, and with all of it trained
from random values. ``DIRECTORY`` is what ``trainers.prepare`` made.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import baton_sdk
from trainers import configuration, loop
from trainers.classify import build
from trainers.transfer import TransferOptions

CASES = (
    ("pre-trained backbone, frozen", "transfer.json"),
    ("from scratch, all layers trained", "transfer-scratch.json"),
    ("untrained backbone, frozen", "transfer-untrained.json"),
)

STEPS = 400
"""For each: enough that none of the three still improves, and seconds in all."""


def accuracy(file: Path) -> tuple[float, float]:
    """Train what a configuration describes, without agent: (accuracy 0 to 1, seconds)."""
    began_s = time.monotonic()
    options = configuration.load(TransferOptions, file)
    quiet = dataclasses.replace(
        options, steps=STEPS, evaluate_every=STEPS, checkpoint_every_s=0.0, checkpoint_directory=""
    )
    loop.seed_everything(quiet.seed)
    trainer = loop.Trainer(build(quiet, file.parent), quiet, baton_sdk.Session({}))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.run()
    return trainer.metrics["accuracy"], time.monotonic() - began_s


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare transfer with its two baselines.")
    parser.add_argument("--data", type=Path, required=True, help="what trainers.prepare made")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    chosen = parser.parse_args(arguments)
    rows = [(title, *accuracy(chosen.data / file)) for title, file in CASES]
    if chosen.json:
        listed = [{"name": t, "accuracy": a, "seconds": round(s, 2)} for t, a, s in rows]
        sys.stdout.write(json.dumps(listed) + "\n")
        return 0
    sys.stdout.write(f"{'odd or even, from 40 labels':<36}{'accuracy':>9}{'seconds':>9}\n")
    for title, ratio, seconds in rows:
        sys.stdout.write(f"{title:<36}{ratio:>9.1%}{seconds:>9.1f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
