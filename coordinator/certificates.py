"""Says in the log that a certificate will expire, and that it was renewed.

Problem: what has expired is noticed when it is too late. What is connected goes on, since TLS asks
for a certificate only where a connection begins, so nothing is seen for days; then one program is
restarted and nobody can talk to it. And whoever has renewed the files wants to see that this
program, which takes them up at the next connection, has got them.

How: the files are looked at each minute by what the system says of them, and read where that has
changed, once a day, and when the first of them has expired. The agent has the same file; a test
compares them.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from coordinator import https
from coordinator.transport import Tls, TransportError

LOOK_S = 60.0
LOOKS_PER_DAY = 1_440
DAY_S = 86_400
WARN_DAYS = 14  # two weeks: who is away for one still comes in time

Emit = Callable[[str, str, tuple[tuple[str, object], ...]], None]
Sleep = Callable[[float], Awaitable[None]]


async def watch(
    tls: Tls, emit: Emit, now_s: Callable[[], float] = time.time, sleep: Sleep = asyncio.sleep
) -> None:
    """Until it is cancelled. The first look is at once, after a start that has told its doubts."""
    judged = seen = tls.stamp()
    found = _judge(tls)
    _tell_expiry(found, emit, now_s())
    looks = 0
    while True:
        await sleep(LOOK_S)
        looks += 1
        before, seen = seen, tls.stamp()
        # Files that change are left alone until all three are there.
        renewed = judged != seen == before
        over = not found.doubt and now_s() >= found.expires_unix_s
        if not (renewed or over) and looks % LOOKS_PER_DAY:
            continue
        judged = seen
        found = _judge(tls)
        if found.doubt:
            emit("warning", "tls.doubted", (("reason", found.doubt),))
        elif renewed:
            emit("info", "tls.renewed", (("file", tls.cert_path), ("until", _day(found))))
        _tell_expiry(found, emit, now_s())


def _judge(tls: Tls) -> https.Judged:
    try:
        return https.judge(tls)
    except TransportError as error:
        return https.Judged(str(error))


def _tell_expiry(found: https.Judged, emit: Emit, now_s: float) -> None:
    left_days = (found.expires_unix_s - now_s) / DAY_S
    if not found.doubt and left_days < WARN_DAYS:
        told = (("file", found.expiring), ("days", int(left_days)), ("until", _day(found)))
        emit("warning", "tls.expiring", told)


def _day(found: https.Judged) -> str:
    return datetime.fromtimestamp(found.expires_unix_s, UTC).isoformat(timespec="minutes")
