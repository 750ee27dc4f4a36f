"""A job that knows nothing of Baton: it says which signals reach it, and what it was started with.

signals.py --leave-with N    says `got SIGNAL` and leaves with N
signals.py --stubborn        says `got SIGNAL` and stays
signals.py --daemon          leaves a grandchild in a session of its own behind, and stays
"""

import argparse
import os
import signal
import sys
from types import FrameType


def say(text: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def daemon() -> int:
    """Fork twice with a new session between, as daemons do; returns the grandchild's pid."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(writer, str(os.getpid()).encode())
            while True:
                signal.pause()
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(reader, 32))


def main() -> int:
    """Wait for signals."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--leave-with", type=int, default=0)
    parser.add_argument("--stubborn", action="store_true")
    parser.add_argument("--daemon", action="store_true")
    options = parser.parse_args()

    def heard(number: int, _frame: FrameType | None) -> None:
        say(f"got {signal.Signals(number).name}")
        if not options.stubborn:
            raise SystemExit(options.leave_with)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, heard)
    if options.daemon:
        say(f"daemon {daemon()}")
    say("ready")
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
