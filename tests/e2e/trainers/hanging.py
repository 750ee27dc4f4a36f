"""A training that takes some steps, keeps a checkpoint, goes on, and hangs; resumed it finishes.

Problem: a hang must come after the agent has learned how long a step takes, and after there is a
checkpoint to go on from; so steps that are learned from come after the checkpoint's commit, which
also shows that the agent listens. It hangs as trainings do, in a read that nobody answers. And only
there: few steps come between what the agent has to see and the hang, or after the checkpoint, so
that a machine on which one of them takes seconds is not taken for a hang.

Every line on standard output is a JSON object with an `event`.
"""

import argparse
import json
import socket
import sys
import threading

import baton_sdk
from tests.e2e.trainers.counting import STATE_NAME, say

STEP_S = 0.02
COMMIT_POLL_S = 0.02


def waits_for_a_peer_that_never_speaks(session: baton_sdk.Session) -> None:
    """What it is to be found in, whenever it is looked for."""
    ours, theirs = socket.socketpair()
    say("hanging", peer=theirs.fileno())
    session.enter("step")
    ours.recv(1)


def train(session: baton_sdk.Session, steps: int, saved_step: int) -> None:
    """All steps; the first attempt does not get to the last one."""
    pause = threading.Event()  # never set: a step is nothing but time
    step = 0
    if session.restore_directory is not None:
        step = json.loads((session.restore_directory / STATE_NAME).read_text("ascii"))["step"]
    say("started", step=step)
    first = step == 0
    while step < steps:
        if first and step == steps - 1:
            waits_for_a_peer_that_never_speaks(session)
        session.enter("step")
        pause.wait(STEP_S)
        step += 1
        session.progress(step, steps)
        if step == saved_step:
            save(session, step, pause)
    say("finished", step=step)


def save(session: baton_sdk.Session, step: int, pause: threading.Event) -> None:
    """A checkpoint, and its commit."""
    assert session.staging_directory is not None
    with session.section("save"):
        directory = session.staging_directory / f"checkpoint-{step}"
        directory.mkdir()
        (directory / STATE_NAME).write_text(json.dumps({"step": step}), "ascii")
        ticket = session.checkpoint(directory, step)
        while ticket.state is not baton_sdk.TicketState.COMMITTED:
            pause.wait(COMMIT_POLL_S)
    say("committed", step=step)


def main() -> int:
    """Take `--steps` steps."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--saved", type=int, required=True, help="the step of the checkpoint")
    options = parser.parse_args()
    with baton_sdk.connect() as session:
        session.enter("init")
        train(session, options.steps, options.saved)
    return 0


if __name__ == "__main__":
    sys.exit(main())
