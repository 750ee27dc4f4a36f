"""A training with a large state that hardly changes: a frozen backbone and a small head.

It captures into its slab after a while, when it is asked to save, and when it is asked to leave;
steps take their time by themselves. What it does it says with times, so that whoever moves it sees
for how long nobody trained. `--plain` never looks for a request to save, as an older program. Of
several ranks each has a frozen part of its own, which no other reads, and hands over its part of a
checkpoint; rank 0 says after which step, as ranks that compute together would agree on it.

A line on standard output is a JSON object: `event` (began, asked, saved, told, left), `step`,
`unix_ns`; steps go to the witness file, one number a line, with the epoch and the time.

    python backbone.py --witness FILE --frozen-mb 200 --step-ms 20
"""

import argparse
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

import baton_sdk

FROZEN_NAME, HEAD_NAME = f"{baton_sdk.OF_THIS_RANK}.frozen", "head.json"
HEAD_BYTES = 1 << 20
MEGABYTE = 1_000_000
ON, SAVE, STOP = "on", "save", "stop"
POLL_S = 0.002
WAIT_S = 60.0  # for the slab, for a free slot, for an answer: only a hang takes so long


def say(event: str, step: int) -> None:
    """One line, at once."""
    line = {"event": event, "step": step, "unix_ns": time.time_ns()}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class Plan:
    """Rank 0's wish at each step, a word a line, in a file that all ranks of the attempt see."""

    def __init__(self, path: Path, rank: int) -> None:
        self.leads = rank == 0
        self.file = path.open("a+", buffering=1)
        self.file.seek(0)
        self.read = ""
        self.pause = threading.Event()  # never set

    def agreed(self, own: str) -> str:
        """The same word on all ranks."""
        if self.leads:
            self.file.write(f"{own}\n")
            return own
        waited_s = 0.0
        while "\n" not in self.read:
            assert waited_s < WAIT_S, "rank 0 is gone"
            self.pause.wait(POLL_S)
            waited_s += POLL_S
            self.read += self.file.read()
        word, _, self.read = self.read.partition("\n")
        return word


class Training:
    def __init__(self, session: baton_sdk.Session, asked: argparse.Namespace) -> None:
        self.session = session
        self.asked = asked
        self.epoch = int(os.environ["BATON_EPOCH"])
        self.frozen = random.Random(asked.seed + session.rank).randbytes(asked.frozen_mb * MEGABYTE)
        self.step = 0
        self.ready: dict[int, None] = {}  # slots that have the frozen part
        self.work = threading.Event()  # never set: a step is nothing but time
        plan = asked.witness.with_name(f"{asked.witness.name}.plan-{self.epoch}")
        self.plan = Plan(plan, session.rank)

    def run(self) -> int:
        """The exit status."""
        if self.session.restore_directory is not None:
            part = f"rank-{self.session.rank:05d}" if self.session.world_size > 1 else ""
            kept = self.session.restore_directory / part
            self.step = json.loads((kept / HEAD_NAME).read_bytes())["step"]
            assert (kept / FROZEN_NAME).stat().st_size == len(self.frozen)
            for other in range(self.session.world_size) if part else ():
                kept = self.session.restore_directory / f"rank-{other:05d}"
                assert json.loads((kept / HEAD_NAME).read_bytes())["step"] == self.step
                assert (kept / FROZEN_NAME).exists() == (other == self.session.rank)
        say("began", self.step)
        slab = self.session.slab(len(self.frozen) + HEAD_BYTES, WAIT_S)
        assert slab is not None, "no slab"
        with self.asked.witness.open("a", buffering=1) as witness:
            while (wish := self.plan.agreed(self.wish())) != STOP:
                self.work.wait(self.asked.step_ms / 1000)
                self.step += 1
                if self.plan.leads:
                    witness.write(f"{self.step} {self.epoch} {time.time_ns()}\n")
                self.session.progress(self.step)
                if wish == SAVE:
                    say("asked", self.step)
                    self.save(slab)
                elif self.step % self.asked.every == 0:
                    self.save(slab)
        say("told", self.step)
        assert self.save(slab).wait_stored(WAIT_S)
        say("left", self.step)
        return baton_sdk.EXIT_RUN_AGAIN

    def wish(self) -> str:
        if self.session.stop_requested is not None:
            return STOP
        asked = not self.asked.plain and self.plan.leads and self.session.take_save_request()
        return SAVE if asked else ON

    def save(self, slab: baton_sdk.Slab) -> baton_sdk.Ticket:
        slot = slab.wait_free_slot(WAIT_S)
        assert slot is not None, "no free slot"
        slab.begin(slot)
        begin, size = slab.offset_bytes(slot), len(self.frozen)
        if slot not in self.ready:
            slab.mapping[begin : begin + size] = self.frozen
            self.ready[slot] = None
        head = json.dumps({"step": self.step, "epoch": self.epoch}).encode()
        slab.mapping[begin + size : begin + size + len(head)] = head
        files = [(FROZEN_NAME, 0, size), (HEAD_NAME, size, len(head))]
        ticket = self.session.capture(slab, slot, files, self.step, parts=self.session.world_size)
        say("saved", self.step)
        return ticket


def main() -> int:
    parser = argparse.ArgumentParser(description="A training whose state hardly changes.")
    parser.add_argument("--witness", type=Path, required=True)
    parser.add_argument("--frozen-mb", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=7, help="of the frozen part")
    parser.add_argument("--every", type=int, default=1_000_000, help="steps between checkpoints")
    parser.add_argument("--plain", action="store_true", help="look for no request to save")
    with baton_sdk.connect() as session:
        return Training(session, parser.parse_args()).run()


if __name__ == "__main__":
    sys.exit(main())
