"""A training that goes exactly as far as a test lets it, and whose result shows every step.

Problem: a test that kills things "in the middle" of a training that runs at its own speed is a
race. So this one waits before each step until the number in the gate file allows it. And a result
that anybody could reach tells nothing of what was repeated or left out, so the state is a chain of
hashes: step n's value is made of step n-1's, and the last one is right only if every step was done
once, in order, from the state that the checkpoint held.

Where it has several ranks each does the same, and hands over its part of each checkpoint.

Every line on standard output is a JSON object with an `event`.
"""

import argparse
import hashlib
import json
import os
import sys
import threading
from pathlib import Path

import baton_sdk

POLL_S = 0.02
STATE_NAME = "state.json"


def chain(step: int) -> str:
    """The value after `step` steps of a training that nothing disturbed."""
    value = ""
    for number in range(1, step + 1):
        value = following(value, number)
    return value


def following(value: str, step: int) -> str:
    """The value after `step`, given the one before it."""
    return hashlib.blake2b(f"{value}/{step}".encode(), digest_size=8).hexdigest()


def ballast(step: int, size_bytes: int) -> bytes:
    """Bytes that no other step's checkpoint has, the same in every attempt."""
    return hashlib.shake_128(b"%d" % step).digest(size_bytes)


def say(event: str, **values: object) -> None:
    """One line, at once."""
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


class Counting:
    """The training: a step, a value, and the tickets of the checkpoints on their way."""

    def __init__(self, session: baton_sdk.Session, options: argparse.Namespace) -> None:
        self.session = session
        self.options = options
        self.step = 0
        self.value = ""
        self.saved_step = -1
        self.tickets: list[baton_sdk.Ticket] = []
        self.pause = threading.Event()

    def run(self) -> int:
        """The exit status: 0, or 75 after a stop request."""
        if self.session.restore_directory is not None:
            part = f"rank-{self.session.rank:05d}" if self.session.world_size > 1 else ""
            place = self.session.restore_directory / part
            kept = json.loads((place / STATE_NAME).read_text("ascii"))
            self.step, self.value = kept["step"], kept["value"]
            self.saved_step = self.step
        say("started", pid=os.getpid(), step=self.step, epoch=os.environ.get("BATON_EPOCH", ""))
        while self.step < self.options.steps:
            if self.session.stop_requested is not None:
                return self.leave(self.session.stop_requested)
            self.report()
            if self.step >= self.allowed():
                self.pause.wait(POLL_S)
                continue
            self.step += 1
            self.value = following(self.value, self.step)
            say("step", step=self.step, value=self.value)
            self.session.progress(self.step, self.options.steps, {"half": self.step / 2})
            if self.step % self.options.every == 0:
                self.save()
        if self.saved_step != self.step:
            self.save()
        if self.tickets:
            self.tickets[-1].wait_stored(self.options.patience_s)
        self.report()
        say("finished", step=self.step, value=self.value)
        return 0

    def allowed(self) -> int:
        """The step up to which the gate is open."""
        if self.options.gate is None:
            return int(self.options.steps)
        return int(self.options.gate.read_text("ascii"))

    def save(self) -> None:
        """Build a checkpoint and hand it over."""
        assert self.session.staging_directory is not None
        directory = self.session.staging_directory / f"checkpoint-{self.step}"
        directory.mkdir()
        state = json.dumps({"step": self.step, "value": self.value})
        (directory / STATE_NAME).write_text(state, "ascii")
        (directory / "ballast").write_bytes(ballast(self.step, self.options.ballast_bytes))
        parts = self.session.world_size
        self.tickets.append(self.session.checkpoint(directory, self.step, parts=parts))
        self.saved_step = self.step
        say("checkpoint", step=self.step)

    def report(self) -> None:
        """Say what became of each checkpoint, once."""
        ended = (baton_sdk.TicketState.COMMITTED, baton_sdk.TicketState.REFUSED)
        for ticket in [ticket for ticket in self.tickets if ticket.state in ended]:
            say(ticket.state.value, step=ticket.step, reason=ticket.reason)
            self.tickets.remove(ticket)

    def leave(self, stop: baton_sdk.StopRequest) -> int:
        """Save what is not saved yet, and go."""
        say("stopping", step=self.step, reason=stop.reason)
        if self.saved_step != self.step:
            self.save()
        if self.tickets:
            self.tickets[-1].wait_stored(stop.remaining_s)
        return int(self.options.leave_with)


def main() -> int:
    """Count to `--steps`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--gate", type=Path, help="a file with the step that may be reached")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, default=1, help="steps between checkpoints")
    parser.add_argument("--ballast-bytes", type=int, default=1000)
    parser.add_argument("--leave-with", type=int, default=baton_sdk.EXIT_RUN_AGAIN)
    parser.add_argument("--patience-s", type=float, default=30.0)
    options = parser.parse_args()
    with baton_sdk.connect() as session:
        return Counting(session, options).run()


if __name__ == "__main__":
    sys.exit(main())
