"""When Python looks for garbage in cycles: by a rule of ours, not by its default.

Problem: the collector walks what is alive to find what is not, and nothing is decided meanwhile.
Ten thousand agents are 1.3 million objects here, most of them gRPC's. A walk through all of them
takes 0.9 s, and it came twice in five seconds: reports replace their predecessors so fast that it
always looked as if a quarter of everything were new. That was a third of the coordinator's CPU and
most of the tail of its latency, to find nothing.

For what reports and events leave is freed by reference counts; only streams and calls that end in
errors leave cycles. A call holds its request, which may be megabytes in a few objects: so what is
young is looked through all the time. Not by Python's rule for that either, which counts what came
less what went: where reports replace their predecessors the two are equal, what is young is never
looked through, and grows until it is everything that was said in the last seconds. Then something
else is made, a decision say, and the look at half a million objects takes 0.2 s. By the clock it is
a few milliseconds, each time.

What lives longer is walked when the interpreter holds half as many blocks of memory again as it did
after the last walk, and else once an hour: memory is bounded, and a fleet at work is left alone.
"""

import asyncio
import gc
import sys

YOUNG_INTERVAL_S = 0.1  # 200 reports of the largest fleet, of some fifty objects each
LOOK_INTERVAL_S = 10.0
# A second's pause of the largest fleet once an hour is a thirtieth of a percent.
SECONDS_MAX = 3_600.0
# Blocks; of a small coordinator some tens of megabytes, walked in a tenth of a second.
NEW_MIN = 200_000


def is_due(new: int, left: int, since_s: float) -> bool:
    """Whether to walk everything: with `new` blocks more than the `left` of the last time."""
    return since_s >= SECONDS_MAX or new > max(NEW_MIN, left // 2)


async def collect_seldom() -> None:
    """Until it is cancelled; then Python's own rule holds again."""
    gc.disable()
    try:
        left, since_s, looked_s = _collect(), 0.0, 0.0
        while True:
            await asyncio.sleep(YOUNG_INTERVAL_S)
            gc.collect(0)
            since_s += YOUNG_INTERVAL_S
            if since_s - looked_s < LOOK_INTERVAL_S:
                continue
            looked_s = since_s
            if is_due(sys.getallocatedblocks() - left, left, since_s):
                left, since_s, looked_s = _collect(), 0.0, 0.0
    finally:
        gc.enable()


def _collect() -> int:
    """Returns how many blocks are left."""
    gc.collect()
    return sys.getallocatedblocks()
