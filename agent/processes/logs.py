"""Reading a trainer's output while it is being written, rotated and dropped by somebody else.

Problem: the shim writes segments and removes the oldest; the reader is another process (this agent,
or the one after it) and there is no lock between them. "The end of the file" is not the end of the
log, a segment may vanish between listing and opening, and a slow reader may find its place gone.

How: a place in the log is the offset of a byte since the attempt began, and a segment's name is the
offset of its first byte, so any reader finds its place from a listing alone. What was rotated away
is skipped and counted. The log has ended when `exit.json` was there *before* a read that found
nothing more: the shim writes it after the last byte.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from agent.processes.records import segments
from agent.processes.shim import EXIT_NAME

# one message to the coordinator must stay well under gRPC's 4 MiB default
READ_BYTES_MAX = 256 * 1024
FOLLOW_POLL_S = 0.1  # a person watching sees no delay; ten listings a second cost nothing
READ_ATTEMPTS_MAX = 3  # a segment was rotated away between listing and opening: list again


class LogRead(NamedTuple):
    """One piece of a log: bytes [next_offset - len(data), next_offset).

    `ended` says that nothing will ever follow; `gone_bytes` lay between the offset that was asked
    for and the oldest byte that is still kept.
    """

    data: bytes
    next_offset: int
    ended: bool
    gone_bytes: int


def read(attempt_directory: Path, offset: int, max_bytes: int = READ_BYTES_MAX) -> LogRead:
    """Up to `max_bytes` (> 0) from `offset` (>= 0) on; no data and not ended means "nothing yet".

    Raises FileNotFoundError when nothing is kept of the attempt, ValueError for bad numbers.
    """
    if offset < 0 or max_bytes <= 0:
        raise ValueError(f"cannot read {max_bytes} bytes at offset {offset}")
    if not attempt_directory.exists():
        raise FileNotFoundError(f"no log is kept for attempt {attempt_directory.name}")
    for _ in range(READ_ATTEMPTS_MAX):
        finished = (attempt_directory / EXIT_NAME).exists()  # before the read, see above
        try:
            data, gone_bytes = _read_segments(attempt_directory, offset, max_bytes)
        except FileNotFoundError:
            continue
        next_offset = offset + gone_bytes + len(data)
        return LogRead(data, next_offset, finished and len(data) < max_bytes, gone_bytes)
    return LogRead(b"", offset, False, 0)  # rotating faster than it can be listed: try later


async def follow(
    attempt_directory: Path,
    offset: int = 0,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[LogRead]:
    """Pieces of the log as they come, until the attempt has ended and all was read.

    Also ends when the log is dropped to make room. Raises FileNotFoundError when there is none at
    the start. `sleep` takes seconds.
    """
    piece = read(attempt_directory, offset)
    while True:
        if piece.data or piece.gone_bytes or piece.ended:
            yield piece
        if piece.ended:
            return
        if not piece.data:
            await sleep(FOLLOW_POLL_S)
        try:
            piece = read(attempt_directory, piece.next_offset)
        except FileNotFoundError:
            return


def _read_segments(attempt_directory: Path, offset: int, max_bytes: int) -> tuple[bytes, int]:
    kept = segments(attempt_directory)
    gone_bytes = max(0, kept[0][0] - offset) if kept else 0
    start = offset + gone_bytes
    data = b""
    for index, (first, path) in enumerate(kept):
        place = start + len(data)
        is_last = index + 1 == len(kept)
        if len(data) == max_bytes or place < first:
            break
        if not is_last and place >= kept[index + 1][0]:
            continue
        with path.open("rb") as file:
            file.seek(place - first)
            data += file.read(max_bytes - len(data))
    return data, gone_bytes


def end_offset(attempt_directory: Path) -> int:
    """One past the newest byte that is kept; 0 when nothing is."""
    kept = segments(attempt_directory)
    if not kept:
        return 0
    first, path = kept[-1]
    try:
        return first + path.stat().st_size
    except FileNotFoundError:
        return first
