"""When Python looks for garbage in cycles: by a rule of ours, not by its default.

Problem: the collector walks what is alive to find what is not, and nothing is decided meanwhile.
Ten thousand agents are 1.3 million objects here, most of them gRPC's. A walk through all of them
takes 0.9 s, and it came twice in five seconds: reports replace their predecessors so fast that it
always looked as if a quarter of everything were new. That was a third of the coordinator's CPU and
most of the tail of its latency, to find nothing.

For what reports and events leave is freed by reference counts; only streams and calls that end in
errors leave cycles. A call holds its request, which may be megabytes in a few objects: so Python
goes on looking through what is young, by its own rule, which costs little. What lives longer is
walked when the interpreter holds half as many blocks of memory again as it did after the last walk,
and else once an hour: memory is bounded, and a fleet at work is left alone.
"""

import asyncio
import gc
import sys

LOOK_INTERVAL_S = 10.0
# A second's pause of the largest fleet once an hour is a thirtieth of a percent.
SECONDS_MAX = 3_600.0
# Blocks; of a small coordinator some tens of megabytes, walked in a tenth of a second.
NEW_MIN = 200_000
# How often the middle generation is looked through before Python walks the oldest: never.
NEVER = 2**31 - 1


def is_due(new: int, left: int, since_s: float) -> bool:
    """Whether to walk everything: with `new` blocks more than the `left` of the last time."""
    return since_s >= SECONDS_MAX or new > max(NEW_MIN, left // 2)


async def collect_seldom() -> None:
    """Until it is cancelled; then Python's own rule holds again."""
    young, middle, _ = rule = gc.get_threshold()
    gc.set_threshold(young, middle, NEVER)
    try:
        left, since_s = _collect(), 0.0
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            since_s += LOOK_INTERVAL_S
            if is_due(sys.getallocatedblocks() - left, left, since_s):
                left, since_s = _collect(), 0.0
    finally:
        gc.set_threshold(*rule)


def _collect() -> int:
    """Returns how many blocks are left."""
    gc.collect()
    return sys.getallocatedblocks()
