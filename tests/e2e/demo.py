"""`make demo`: a fine-tuning job loses its node in the middle and finishes on another one.

    python -m tests.e2e.demo [--steps N] [--lease-ms N] [--no-comparison] [--stand-in] [--keep]
                             [--json]

This file is the way in and out: the flags, the exit status, and what Ctrl-C does at any moment,
also while the slow imports are under way. What happens in between stands in `demo_story.py`, what
is seen of it in `demo_view.py`, and what is concluded from it in `demo_report.py`.

Exit status: 0 when everything held, 1 with a sentence when something did not, 128 + N when a signal
ended it.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asks us to leave; not an error, so no handler of errors may take it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; see the module for the exit status."""
    try:
        for number in ENDING_SIGNALS:
            signal.signal(number, leave)
        options = _parser().parse_args(arguments)
        from tests.e2e import demo_story  # gRPC and rich: half a second in which Ctrl-C may come

        return demo_story.run(
            steps=options.steps,
            lease_ms=options.lease_ms,
            comparison=options.comparison,
            stand_in=options.stand_in,
            keep=options.keep,
            as_json=options.json,
        )
    except Interrupted as interrupted:
        sys.stderr.write("\nstopped; nothing is left running\n")
        return 128 + interrupted.number


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """Once: what is being ended then must not be interrupted again."""
    for other in ENDING_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "make demo", description="A fine-tuning job loses its node and finishes on another one."
    )
    parser.add_argument(
        "--steps", type=positive, help="of the fine-tuning job (default: 600, on a GPU 6000)"
    )
    parser.add_argument(
        "--lease-ms", type=positive, help="the coordinator's lease (default: its own, 8000)"
    )
    parser.add_argument(
        "--no-comparison",
        dest="comparison",
        action="store_false",
        help="leave out whether anything was transferred, for which three heads are trained",
    )
    parser.add_argument(
        "--stand-in", action="store_true", help="train on the CPU, also where there is a GPU"
    )
    parser.add_argument("--keep", action="store_true", help="leave logs and state in .demo/")
    parser.add_argument("--json", action="store_true", help="the summary as JSON on stdout")
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
