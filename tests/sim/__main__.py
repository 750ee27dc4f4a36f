"""`python -m tests.sim --seeds 5000`: look for a seed that breaks a rule.

A failure prints the seed, the sentence and the command that replays it, and exits 1. A fault that
had no effect is one, too: the plan has tried nothing.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from tests.sim.faults import plan
from tests.sim.injector import broken, run_plan


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds to run")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run this one only")
    parser.add_argument("--trace", action="store_true", help="print what happens, line by line")
    parser.add_argument("--all", action="store_true", help="go on after a failure")
    options = parser.parse_args(arguments)
    first, count = (options.start, options.seeds) if options.seed is None else (options.seed, 1)
    begun_s = time.perf_counter()
    failures = 0
    for seed in range(first, first + count):
        outcome = run_plan(plan(seed))
        if options.trace:
            sys.stdout.write("\n".join(outcome.lines) + "\n")
        if options.seed is not None:
            sys.stdout.write(f"fingerprint {outcome.fingerprint}\n")
        if failure := broken(plan(seed), outcome):
            failures += 1
            sys.stdout.write(f"seed {seed}: {failure}\n")
            sys.stdout.write(f"replay: python -m tests.sim --seed {seed} --trace\n")
            sys.stdout.flush()
            if not options.all:
                break
    elapsed_s = time.perf_counter() - begun_s
    sys.stdout.write(f"{count} seeds, {failures} failed, {elapsed_s:.1f} s\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
