"""A training whose state goes bad at one step, and which dies of it whenever it stands on that.

    poisoned.py --marker FILE --steps N --bad S [--always]

Problem: a checkpoint that kills whoever resumes from it is rare and random in life. Here it is made
on purpose, once: the first process to come to step `--bad` leaves a mark in its state, saves that,
and every process whose state has the mark ends with status 1 two steps later. `--marker` is the
file that says that it has happened. With `--always` each process fails there, whatever its state.
"""

import argparse
import json
import sys
from pathlib import Path

import baton_sdk

STATE_NAME = "state.json"
FATAL_STEPS = 2
STORE_TIMEOUT_S = 30.0
EXIT_STATUS = 1


def main() -> int:
    """One step after another, with a checkpoint after each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--marker", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--bad", type=int, required=True)
    parser.add_argument("--always", action="store_true")
    options = parser.parse_args()
    step, marked = 0, False
    with baton_sdk.connect() as session:
        if session.restore_directory is not None:
            kept = json.loads((session.restore_directory / STATE_NAME).read_text("ascii"))
            step, marked = kept["step"], kept["marked"]
        while step < options.steps:
            step += 1
            session.progress(step, options.steps)
            if step == options.bad and not options.marker.exists():
                options.marker.touch()
                marked = True
            if step >= options.bad + FATAL_STEPS and (marked or options.always):
                print(f"the state of step {step} is bad", flush=True)
                return EXIT_STATUS
            if step <= options.bad or not (marked or options.always):
                save(session, step, marked)
    return 0


def save(session: baton_sdk.Session, step: int, marked: bool) -> None:
    """A checkpoint, and wait until it is kept: each must count."""
    assert session.staging_directory is not None
    directory = session.staging_directory / f"checkpoint-{step}"
    directory.mkdir()
    state = json.dumps({"step": step, "marked": marked})
    (directory / STATE_NAME).write_text(state, "ascii")
    session.checkpoint(directory, step).wait_stored(STORE_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main())
