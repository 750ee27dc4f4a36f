"""Tests on a machine that is slow here and there: `python -m tests.stalls tests/agent`.

Problem: an order of events that nearly always holds is found out on the one machine where it does
not, a thousand runs later. So the processes of a test run are stopped at random, for moments or for
seconds: workers now and then, and more often the agents, coordinators, shims and trainers that
tests start, above all the youngest, since most of what goes wrong goes wrong at a start. What fails
here and not otherwise depends on who is faster: the test, or what it tests.

The seed says who is stopped in which order; how far they have come by then it cannot say, so a
failure may take several runs to come again.
"""

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
HANDS = 3  # so many processes stand still at a time, at most
YOUNG_S = 1.0
WORKER_RATIO = 0.1  # of the times that a worker of pytest is drawn: else the others had no chance
BETWEEN_S_MAX = 0.05


def stop_at_random(top: psutil.Process, draw: random.Random, longest_s: float, young: bool) -> None:
    """One process after another, until `top` has ended. Most stops are short: a cube of chance."""
    pause = threading.Event()
    while top.is_running() and top.status() != psutil.STATUS_ZOMBIE:
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if chosen := choose(top, draw, young):
                stop(chosen, draw.random() ** 3 * longest_s, pause)
        pause.wait(draw.random() * BETWEEN_S_MAX)


def choose(top: psutil.Process, draw: random.Random, young: bool) -> psutil.Process | None:
    below = top.children(recursive=True)
    if young:
        below = [one for one in below if time.time() - one.create_time() < YOUNG_S] or below
    chosen = draw.choice(below) if below else None
    if chosen and chosen.ppid() == top.pid and draw.random() >= WORKER_RATIO:
        return None
    return chosen


def stop(chosen: psutil.Process, seconds: float, pause: threading.Event) -> None:
    if chosen.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
        return  # a test has stopped it itself
    chosen.send_signal(signal.SIGSTOP)
    try:
        pause.wait(seconds)
    finally:
        chosen.send_signal(signal.SIGCONT)


def run(words: Sequence[str], seed: int, longest_s: float) -> int:
    """pytest's status."""
    command = [sys.executable, "-m", "pytest", "-n", "3", "--dist", "loadgroup", *words]
    with subprocess.Popen(command, cwd=ROOT) as tests:
        top = psutil.Process(tests.pid)
        hands = [
            threading.Thread(
                target=stop_at_random,
                args=(top, random.Random(seed * HANDS + number), longest_s, number == 0),
            )
            for number in range(HANDS)
        ]
        for hand in hands:
            hand.start()
        with contextlib.suppress(KeyboardInterrupt):  # pytest gets it as well, and says so
            tests.wait()
        for hand in hands:
            hand.join()
        return tests.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.stalls", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="who is stopped, and in which order")
    parser.add_argument("--longest-s", type=float, default=2.0, help="of one stop (default: 2)")
    parser.add_argument("words", nargs="+", help="for pytest: paths, and options after `--`")
    asked = parser.parse_args()
    return run(asked.words, asked.seed, asked.longest_s)


if __name__ == "__main__":
    raise SystemExit(main())
