"""`make demo-scaling`: a fleet follows a real day of demand at 240 times its speed.

    python -m tests.e2e.demo_scaling [--first-step N] [--steps N] [--step-minutes N] [--plot FILE]
        [--keep]

Problem: that nodes go off and come back before they are missed is a claim about a day, and nobody
watches for a day. So a minute of the plan is a quarter of a second here, and all else is real: the
coordinator, agents whose processes a resume and a suspend script start and end, jobs that take
checkpoints, and the demand, which a fleet of 420 nodes had (`scaling_day.py`). What happens stands
in `scaling_story.py`, what is concluded from it in `scaling_report.py`.

Exit status: 0 when no job was lost, nodes really went off and came back, and, over a whole day,
jobs were handed off so that one could go off; 1 with a sentence when not, 128 + N when a signal
ended it.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.demo import ENDING_SIGNALS, Interrupted, leave, positive
from tests.e2e.scaling_day import MINUTES_PER_STEP, STEPS_PER_DAY


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; see the module for the exit status."""
    try:
        for number in ENDING_SIGNALS:
            signal.signal(number, leave)
        options = _parser().parse_args(arguments)
        from tests.e2e import scaling_story  # gRPC: half a second in which Ctrl-C may come

        return scaling_story.run(
            first_step=options.first_step,
            steps=options.steps,
            step_minutes=options.step_minutes,
            plot=options.plot,
            keep=options.keep,
        )
    except Interrupted as interrupted:
        sys.stderr.write("\nstopped; nothing is left running\n")
        return 128 + interrupted.number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "make demo-scaling", description="A small fleet follows a real day of demand."
    )
    parser.add_argument(
        "--first-step",
        type=int,
        choices=range(STEPS_PER_DAY),
        default=0,
        metavar="N",
        help="ten minutes of the day to begin at (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=positive, default=STEPS_PER_DAY, help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--step-minutes",
        type=positive,
        default=MINUTES_PER_STEP,
        help="minutes of the plan that each lasts; less is a faster day (default: %(default)s)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        default=Path(".demo", "scaling.svg"),
        help="where the plot goes (default: %(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="leave logs and state in .demo/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
