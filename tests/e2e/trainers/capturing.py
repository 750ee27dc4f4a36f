"""A counting job that captures into its slab instead of building directories.

Its state is the chain of `counting`, so the end shows whether a step was lost or done twice. Where
`--dies-after` says so it is killed between a capture and the word to the agent: the worst moment.

Every line on standard output is a JSON object with an `event`.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

import baton_sdk

STATE_NAME = "state.json"
SLOT_BYTES = 1 << 20
WAIT_S = 60.0  # for the slab, for a free slot, for an answer: only a hang takes so long
POLL_S = 0.02
UNSAID_SEQUENCE = 1 << 50  # above any that the session has given out


def following(value: str, step: int) -> str:
    """As in `counting`, which a job cannot import."""
    return hashlib.blake2b(f"{value}/{step}".encode(), digest_size=8).hexdigest()


def say(event: str, **values: object) -> None:
    """One line, at once."""
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


class Capturing:
    """The training, behind a gate as in `counting`."""

    def __init__(self, session: baton_sdk.Session, options: argparse.Namespace) -> None:
        self.session = session
        self.options = options
        self.step = 0
        self.value = ""
        self.pause = threading.Event()

    def run(self) -> int:
        """The exit status."""
        if self.session.restore_directory is not None:
            kept = json.loads((self.session.restore_directory / STATE_NAME).read_text("ascii"))
            self.step, self.value = kept["step"], kept["value"]
        say("started", pid=os.getpid(), step=self.step)
        slab = self.session.slab(SLOT_BYTES, WAIT_S)
        assert slab is not None, "no slab"
        ticket = None
        while self.step < self.options.steps:
            if self.step >= int(self.options.gate.read_text("ascii")):
                self.pause.wait(POLL_S)
                continue
            self.step += 1
            self.value = following(self.value, self.step)
            say("step", step=self.step, value=self.value)
            self.session.progress(self.step, self.options.steps)
            ticket = self.capture(slab)
        assert ticket is None or ticket.wait_stored(WAIT_S), ticket.reason
        say("finished", step=self.step, value=self.value)
        return 0

    def capture(self, slab: baton_sdk.Slab) -> baton_sdk.Ticket:
        """Copy the state and hand it over, or die before that."""
        slot = slab.wait_free_slot(WAIT_S)
        assert slot is not None, "no free slot"
        slab.begin(slot)
        state = json.dumps({"step": self.step, "value": self.value}).encode()
        begin = slab.offset_bytes(slot)
        slab.mapping[begin : begin + len(state)] = state
        files = [(STATE_NAME, 0, len(state))]
        if self.step == self.options.dies_after and os.environ["BATON_EPOCH"] == "1":
            slab.publish(slot, files, sequence=UNSAID_SEQUENCE, step=self.step)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.session.capture(slab, slot, files, self.step)


def main() -> int:
    """Count to `--steps`, with a capture after every one."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--gate", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--dies-after", type=int, default=0, help="in the first attempt")
    options = parser.parse_args()
    with baton_sdk.connect() as session:
        return Capturing(session, options).run()


if __name__ == "__main__":
    sys.exit(main())
