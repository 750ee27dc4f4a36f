"""The comparison of `bench.checkpoint` with the state on a CUDA device.

Problem: on a CPU a capture is a copy from memory to memory, and no faster than one. On a GPU it is
a transfer over the bus into page-locked memory, by a stream of its own beside the next forward and
backward passes; what a step loses to it, only a GPU can say. Steps are the same, and end when the
device has done them. Exits with 3 where there is none.
"""

import sys

from bench import checkpoint, report
from bench.gpu import EXIT_NO_DEVICE, card


def main() -> int:
    """Print the table."""
    parser = report.parser(__doc__)
    arguments = parser.parse_args()
    if reason := card.missing():
        report.say(reason)
        return EXIT_NO_DEVICE
    asked = report.options(arguments)
    sizes = checkpoint.QUICK_SIZES_GB if asked.quick else checkpoint.SIZES_GB
    found = [row for size in sizes for row in checkpoint.rows(size, asked, "cuda")]
    notes = [f"device: {card.described()}", *checkpoint.NOTES]
    report.show("Checkpoints on a GPU", found, asked, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
