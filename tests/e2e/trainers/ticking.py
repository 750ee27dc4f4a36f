"""A training that runs by itself and writes down, with times, everything that it does.

Problem: when faults come at random instants, the only fair witness is the trainer itself: it knows
which attempt it is, which step it takes, and when it was told what. So every line goes to one file
that all attempts of a job share, in one `write` with O_APPEND, so that lines of two copies that run
at once (a partition) never mix. The file is outside every node's disk.

A line is a JSON object: `event`, `epoch`, `pid`, `step`, `unix_ns`. Events: began, tick (each
step), committed (with the step of that checkpoint), refused, told (a stop was asked for), left,
done.

    python ticking.py --file FILE --steps 100 --step-ms 20 --checkpoint-ms 200
"""

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

import baton_sdk

STORE_S_MAX = 30.0
STATE_NAME = "state.json"


class Ticking:
    """The loop and its witness."""

    def __init__(self, asked: argparse.Namespace, session: baton_sdk.Session) -> None:
        self.asked = asked
        self.session = session
        self.epoch = int(os.environ.get("BATON_EPOCH", "0"))
        self.witness_fd = -1
        self.step = 0
        self.tickets: list[baton_sdk.Ticket] = []
        self.saved_s = time.monotonic()
        self.work = threading.Event()  # never set: a step is nothing but time

    def say(self, event: str, step: int) -> None:
        """One line, at once."""
        words = {
            "event": event,
            "epoch": self.epoch,
            "pid": os.getpid(),
            "step": step,
            "unix_ns": time.time_ns(),
        }
        os.write(self.witness_fd, json.dumps(words).encode() + b"\n")

    def run(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self.witness_fd = os.open(self.asked.file, flags, 0o600)
        if self.session.restore_directory is not None:
            state = (self.session.restore_directory / STATE_NAME).read_text("utf-8")
            self.step = int(json.loads(state)["step"])
        self.say("began", self.step)
        while self.step < self.asked.steps:
            if self.session.stop_requested is not None:
                return self.leave()
            self.work.wait(self.asked.step_ms / 1000)
            self.step += 1
            self.say("tick", self.step)
            self.session.progress(self.step, self.asked.steps)
            if (time.monotonic() - self.saved_s) * 1000 >= self.asked.checkpoint_ms:
                self.save()
            self.look()
        self.save().wait_stored(STORE_S_MAX)
        self.say("done", self.step)
        return 0

    def leave(self) -> int:
        """A stop was asked for: save, wait until it is stored, go."""
        self.say("told", self.step)
        self.save().wait_stored(STORE_S_MAX)
        self.say("left", self.step)
        return baton_sdk.EXIT_RUN_AGAIN

    def save(self) -> baton_sdk.Ticket:
        staging = self.session.staging_directory
        if staging is None:
            raise SystemExit("ticking.py runs as a job only")
        directory = staging / f"{self.step}-{time.monotonic_ns()}"
        directory.mkdir()
        # The epoch too: two copies of a step must not be the same checkpoint.
        state = {"step": self.step, "epoch": self.epoch, "unix_ns": time.time_ns()}
        (directory / STATE_NAME).write_text(json.dumps(state), "utf-8")
        ticket = self.session.checkpoint(directory, self.step)
        self.tickets.append(ticket)
        self.saved_s = time.monotonic()
        return ticket

    def look(self) -> None:
        """Say what has become of the checkpoints."""
        waiting = []
        for ticket in self.tickets:
            if ticket.state is baton_sdk.TicketState.COMMITTED:
                self.say("committed", ticket.step)
            elif ticket.state is baton_sdk.TicketState.REFUSED:
                self.say("refused", ticket.step)
            else:
                waiting.append(ticket)
        self.tickets = waiting


def main() -> int:
    parser = argparse.ArgumentParser(description="A training that writes down what it does.")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--checkpoint-ms", type=float, default=200.0)
    with baton_sdk.connect() as session:
        return Ticking(parser.parse_args(), session).run()


if __name__ == "__main__":
    sys.exit(main())
