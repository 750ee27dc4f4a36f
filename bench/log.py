"""What one log line costs the loop that writes it: ours beside the standard library's.

Both write the same event with the same fields as JSON to a file. Ours also goes into a pipe that
nobody reads, where lines are dropped, and to a datagram socket that stands for journald.
The reference is `logging` with a formatter that makes one JSON object with a UTC time, in the same
run. A core's line goes through `emit`, an adapter's through structlog's logger; both are shown.

The figure is the median of rounds, of the mean of the lines in each. Time is what the thread was
running or in the kernel: on a shared machine a clock on the wall would measure the others.
"""

import json
import logging
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import structlog

from agent import logs
from agent.events import EVENTS
from agent.journald import JournalSocket
from bench import report

ROUNDS, LINES, LINES_QUICK = 9, 20_000, 3_000
GOAL_US = 10.0
BATCH_LINES = 8  # fewer than a queue of datagrams holds
FIELDS = {"attempt": "4711.3.0", "exit_code": 0, "signal": "", "reason": "exited with status 0"}
READ_BYTES = 64 * 1024


class JsonFormatter(logging.Formatter):
    """What people write who want JSON of the standard library."""

    def format(self, record: logging.LogRecord) -> str:
        made = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.msg,
            **record.__dict__["fields"],
        }
        return json.dumps(made)


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    lines = LINES_QUICK if asked.quick else LINES
    report.say(f"log: {ROUNDS} rounds of {lines} lines each")
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        rows = _rows(Path(scratch), lines)
    report.show("What a log line costs", rows, asked)
    return 0


def _rows(scratch: Path, lines: int) -> list[report.Row]:
    rows = []
    file = os.open(scratch / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    reference = _measured(_standard_library(file), lines)
    rows.append(report.row_of("standard library, to a file", reference, "us"))
    usual = statistics.median(reference)
    for name, log in (("a core's line", _emit), ("an adapter's line", _logger)):
        logs.configure("info", "json", EVENTS, descriptor=file, node="n1")
        rows.append(_row(f"{name}, to a file", _measured(log(), lines), usual))
    reading, writing = os.pipe()
    logs.configure("info", "json", EVENTS, descriptor=writing, node="n1")
    rows.append(_row("a core's line, pipe that nobody reads", _measured(_emit(), lines), usual))
    os.close(reading)
    os.close(writing)
    with _Journald(scratch / "socket") as journal:
        send = JournalSocket("baton-agent", str(journal.path)).send
        logs.configure("info", "auto", EVENTS, descriptor=file, journal=send, node="n1")
        found = _measured(_emit(), lines, journal.drain)
        rows.append(_row("a core's line, to the journal", found, usual))
    logs.configure("warning", "json", EVENTS, descriptor=file, node="n1")
    rows.append(_row("a core's line, below the level", _measured(_emit(), lines), None))
    os.close(file)
    return rows


def _row(name: str, samples: list[float], usual: float | None) -> report.Row:
    source = "logging with a JSON formatter, same run" if usual else ""
    row = report.row_of(name, samples, "us")
    return replace(row, reference=usual, reference_source=source, goal=GOAL_US)


def _measured(
    log: Callable[[], object], lines: int, rest: Callable[[], object] = lambda: None
) -> list[float]:
    """Microseconds of a line: one mean for each round, after one that does not count. `rest` is
    done after each batch, and not counted."""
    means = []
    for _ in range(ROUNDS + 1):
        spent_ns = 0
        for _ in range(lines // BATCH_LINES):
            begun_ns = time.thread_time_ns()
            for _ in range(BATCH_LINES):
                log()
            spent_ns += time.thread_time_ns() - begun_ns
            rest()
        means.append(spent_ns / (lines // BATCH_LINES * BATCH_LINES) / 1_000)
    return means[1:]


def _standard_library(descriptor: int) -> Callable[[], object]:
    handler = logging.StreamHandler(os.fdopen(os.dup(descriptor), "w"))
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("bench")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    fields = {**FIELDS, "node": "n1"}
    return lambda: logger.info("attempt.exited", extra={"fields": fields})


def _emit() -> Callable[[], object]:
    pairs = tuple(FIELDS.items())
    return lambda: logs.emit("info", "attempt.exited", pairs)


def _logger() -> Callable[[], object]:
    logger = structlog.get_logger()
    return lambda: logger.info("attempt.exited", **FIELDS)


class _Journald:
    """A socket at a path; what was sent to it is forgotten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def __enter__(self) -> "_Journald":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def drain(self) -> None:
        """Read a batch. Raises `BlockingIOError` when less was sent: then stderr was measured."""
        for _ in range(BATCH_LINES):
            self._socket.recv(READ_BYTES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
