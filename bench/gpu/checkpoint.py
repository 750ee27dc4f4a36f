"""The comparison of `bench.checkpoint` with the state on a CUDA device.

Problem: on a CPU a capture is a copy from memory to memory, and no faster than one. On a GPU it is
a transfer over the bus into page-locked memory, behind the step that computes what is captured; how
long the training stands still then, only a GPU can say. Exits with 3 where there is none.
"""

import sys

import torch

from bench import checkpoint, report


def main() -> int:
    """Print the table."""
    parser = report.parser(__doc__)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        report.say("no CUDA device here: this comparison needs one")
        return 3
    asked = report.options(arguments)
    sizes = checkpoint.QUICK_SIZES_GB if asked.quick else checkpoint.SIZES_GB
    rounds = checkpoint.QUICK_ROUNDS if asked.quick else checkpoint.ROUNDS
    found = [row for size in sizes for row in checkpoint.rows(size, rounds, "cuda")]
    notes = [f"device: {torch.cuda.get_device_name()}", "half of the state is frozen"]
    report.show("Checkpoints on a GPU", found, asked, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
