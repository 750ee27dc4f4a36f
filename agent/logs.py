"""Structured logs: one JSON object a line on stderr, or a console's lines when people look on.

Problem: a log is written by the loop that keeps jobs alive and read by somebody who may stop
reading. Printing blocks that loop as soon as the reader's pipe is full; dropping lines in silence
makes the log a liar; and one value that JSON does not know, or a field of ten megabytes, ends or
drowns everything.

So: every line carries `seq`, which counts this process's lines, so that a gap is a loss and says
how large. A line goes to a pipe or socket without blocking: a full one is waited for once, a few
milliseconds, which is enough for a reader that lives; until it reads again lines are dropped at
once. (Files are written directly, and so are terminals: Ctrl-S there does stop the loop, as
it does for any program.) A value that JSON does not know is written as its `repr`, a line that is
too long is cut and says so, and an unwritable stderr never stops the program. What libraries say
through `logging` becomes lines of the same kind, under the event `library`.

A line: ts (RFC 3339, UTC, ms), level, event (a stable name), msg (a sentence for people), seq, the
fields bound at `configure` and the machine's boot_id, then job and epoch where an attempt is named,
then its own; an exception is the text `error`. journald cuts lines at 48 KiB (journald.conf(5),
LineMax=), so we do before.

Events come from a closed list (`events.py`), from which msg is made. A name that is not on it is a
bug, but none that may cost a line or a daemon: it is logged as `unregistered`, with its name in
`original`. Where stderr is the journal, and `format` is auto, lines go to it with fields of its own
(`journald.py`), all of them, since two ways into one journal would show them out of order; one that
it does not take at once goes to stderr as JSON.

A core's line goes to the writer directly: structlog's chain would cost it as much again.

Coordinator and agent each have this file, word for word (a test compares them), because neither may
import the other.
"""

import contextlib
import functools
import itertools
import logging
import os
import select
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import structlog
from structlog.typing import EventDict, FilteringBoundLogger

LINE_BYTES_MAX: Final = 48 * 1024  # journald's LineMax
CUT_CHARACTERS: Final = 4 * 1024  # of a line that was too long: enough to recognise it
STALL_MS_MAX: Final = (
    20  # a reader that lives empties a pipe in less; heartbeats notice no such wait
)

_LEVELS: Final[Mapping[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_METHODS: Final[Mapping[str, str]] = {"warn": "warning", "exception": "error", "fatal": "critical"}
# These belong to the line; a field of such a name gets an underscore.
_RESERVED: Final = ("ts", "level", "event", "msg", "seq", "boot_id")
_RESERVED_SET: Final = frozenset(_RESERVED)
_UNREGISTERED: Final = "unregistered"
_BOOT_ID_PATH: Final = Path("/proc/sys/kernel/random/boot_id")
_BOOT_ID_VARIABLE: Final = "BATON_BOOT_ID"

_Render = Callable[[dict[str, Any]], bytes]
# Takes a line with its values to the journal, if it can: the values, and their line as JSON.
_Journal = Callable[[Mapping[str, Any], bytes], bool]


@dataclass(frozen=True, slots=True)
class Event:
    """A kind of line. `fields` are names with spaces between; `msg` holds some of them in braces,
    and `meaning` says when it is logged, and what to do where that is not plain."""

    name: str
    level: str
    fields: str
    msg: str
    meaning: str


def registry(*events: Event) -> Mapping[str, Event]:
    """By name. Raises `ValueError` for a name that is there twice."""
    found = {event.name: event for event in events}
    if len(found) != len(events):
        raise ValueError("an event is registered twice")
    return found


def configure(
    level: str,
    format: str,
    events: Mapping[str, Event],
    *,
    descriptor: int | None = None,
    journal: _Journal | None = None,
    **bound: object,
) -> FilteringBoundLogger:
    """Send all logs of this process to stderr, or `descriptor`. May be called again (SIGHUP).

    `level` is debug, info, warning, error or critical; `format` json, console or auto (console when
    stderr is a terminal, else `journal` if there is one). `events` are those that may be logged;
    `bound` are fields of every line. Raises `KeyError` for another level.
    """
    global _direct
    descriptor = sys.stderr.fileno() if descriptor is None else descriptor
    terminal = os.isatty(descriptor)
    console = format == "console" or (format == "auto" and terminal)
    render = _console(colors=terminal) if console else _json_line
    writer = Writer(open_stream(descriptor), render, {**bound, "boot_id": _boot_id()})
    writer.events = events
    writer.journal = journal if format == "auto" and not console else None
    _direct = (_LEVELS[level], writer)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        processors=[_as_arguments],
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=False,  # module-level loggers follow a later `configure`
    )
    # grpc and asyncio speak through `logging`, and so do `warnings` when they are told to; below a
    # warning they talk about themselves.
    logging.basicConfig(
        level=max(_LEVELS[level], logging.WARNING), handlers=[_Library()], force=True
    )
    logging.captureWarnings(True)
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger


def emit(level: str, event: str, fields: Iterable[tuple[str, object]] = ()) -> None:
    """Log one line: what a core's `Log` says. Raises `KeyError` for an unknown level."""
    values = dict(fields)
    if "event" in values:
        values["event_"] = values.pop("event")
    if _direct is None:
        structlog.get_logger().log(_LEVELS[level], event, **values)
        return
    threshold, writer = _direct
    if _LEVELS[level] >= threshold:
        values["event"] = event
        writer.line(level, values)


class Writer:
    """Numbers, renders and writes lines; structlog's innermost logger. Thread-safe."""

    def __init__(
        self,
        write: Callable[[bytes], bool],
        render: _Render,
        bound: Mapping[str, object],
        unix_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._write = write
        self._render = render
        self._bound = dict(bound)
        self._unix_ms = unix_ms
        self.events: Mapping[str, Event] = {}
        self.journal: _Journal | None = None
        self._lock = threading.Lock()
        self._stamp_s = -1
        self._stamp = ""

    def line(self, method: str, fields: EventDict) -> None:
        """Write what structlog's method of this name was given; `event` is among the fields."""
        event = fields.pop("event", None)
        if "exc_info" in fields or "stack_info" in fields:
            _spell_exception(fields)
        if not _RESERVED_SET.isdisjoint(fields):
            for name in _RESERVED:
                if name in fields:
                    fields[name + "_"] = fields.pop(name)
        level = _METHODS.get(method, method)
        registered = self.events.get(event) if isinstance(event, str) else None
        if registered is None:
            fields["original"], event, msg = event, _UNREGISTERED, str(event)
        else:
            msg = _sentence(registered, fields)
        with self._lock:  # the order of `seq` is the order of lines
            head = {
                "ts": self._timestamp(),
                "level": level,
                "event": event,
                "msg": msg,
                "seq": next(_numbers),
                **self._bound,
            }
            values = {**head, **_whose(fields), **fields}
            line = self._render(values)
            if len(line) > LINE_BYTES_MAX:
                text = line[:CUT_CHARACTERS].decode("utf-8", "ignore")
                values = head | {"msg": msg[:CUT_CHARACTERS], "cut_bytes": len(line), "cut": text}
                line = self._render(values)
            if self.journal is None or not self.journal(values, line):
                self._write(line)

    debug = info = warning = warn = error = exception = critical = fatal = msg = line

    def _timestamp(self) -> str:
        seconds, rest_ms = divmod(self._unix_ms(), 1_000)
        if seconds != self._stamp_s:
            self._stamp_s = seconds
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        return f"{self._stamp}.{rest_ms:03}Z"


class Stream:
    """A pipe or socket that may be full. `write` answers whether the line was taken whole."""

    def __init__(self, descriptor: int, send: Callable[[bytes], int]) -> None:
        self._descriptor = descriptor
        self._send = send
        self._rest = b""  # of a line of which a part went out: it must be ended before another
        self._stalled = False

    def write(self, line: bytes) -> bool:
        """Never waits longer than `STALL_MS_MAX`, and only once until something is read again."""
        before = self._rest
        pending = before + line
        sent = self._push(pending)
        if sent < len(pending) and not self._stalled:
            self._wait()
            sent += self._push(pending[sent:])
        self._stalled = sent < len(pending)
        if sent <= len(before):
            self._rest = pending[sent : len(before)]
            return False
        self._rest = pending[sent:]
        return True

    def _push(self, data: bytes) -> int:
        sent = 0
        with contextlib.suppress(OSError):  # full, or nobody reads any more: the line is lost
            while sent < len(data):
                sent += self._send(data[sent:])
        return sent

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        poll.poll(STALL_MS_MAX)


def open_stream(descriptor: int) -> Callable[[bytes], bool]:
    """A function that writes a line to `descriptor`, without blocking where the kernel offers that
    without changing the descriptor for those that share it. The same one for the same file: a
    second `configure` must not forget a line of which a part went out."""
    status = os.fstat(descriptor)
    return _opened(descriptor, status.st_mode, (status.st_dev, status.st_ino))


@functools.lru_cache(maxsize=1)
def _opened(descriptor: int, mode: int, _identity: tuple[int, int]) -> Callable[[bytes], bool]:
    if stat.S_ISFIFO(mode):
        # A pipe opened anew has flags of its own; O_NONBLOCK on a shared one would hit everybody.
        with contextlib.suppress(OSError):
            own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            return Stream(own, lambda data: os.write(own, data)).write
    if stat.S_ISSOCK(mode):
        link = socket.socket(fileno=os.dup(descriptor))
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        return Stream(link.fileno(), lambda data: link.send(data, flags)).write
    return Stream(descriptor, lambda data: os.write(descriptor, data)).write


class _Library(logging.Handler):
    """What libraries say through `logging`, as lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        level = logging.getLevelName(record.levelno).lower()
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit their format
            message = str(record.msg)
        fields: dict[str, object] = {"logger": record.name, "text": message}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        emit(level if level in _LEVELS else "warning", "library", fields.items())


# One count for the process: a second `configure` goes on where the first one was.
_numbers = itertools.count(1)
# The least level that is written, and by whom; None before the first `configure`.
_direct: tuple[int, Writer] | None = None


def _sentence(event: Event, fields: Mapping[str, object]) -> str:
    try:
        return event.msg.format_map(fields)
    except (LookupError, TypeError, ValueError):  # a field that this line lacks: its name stays
        return event.msg


def _whose(fields: Mapping[str, object]) -> dict[str, object]:
    """Job and epoch of the attempt that is named: attempts are called `<job>.<epoch>[.<rank>]`."""
    attempt = fields.get("attempt")
    if not isinstance(attempt, str):
        return {}
    job, _, rest = attempt.partition(".")
    epoch = rest.partition(".")[0]
    return {"job": int(job), "epoch": int(epoch)} if job.isdecimal() and epoch.isdecimal() else {}


def _boot_id() -> str:
    """Of this start of the machine, as journald writes it. A unit that hides the kernel's file
    (`ProcSubset=pid`) says it in the environment; empty where neither does."""
    with contextlib.suppress(OSError):
        return _BOOT_ID_PATH.read_text("ascii").strip().replace("-", "")
    return os.environ.get(_BOOT_ID_VARIABLE, "")


def _as_arguments(
    logger: object, method: str, fields: EventDict
) -> tuple[tuple[str, EventDict], dict[str, Any]]:
    """The whole of structlog's chain: hand everything to `Writer.line`."""
    return (method, fields), {}


def _json_line(values: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(values, default=repr, option=_JSON_OPTIONS)
    except TypeError:  # a number of more than 64 bits, half a surrogate pair, a circle
        values = {name: _encodable(value) for name, value in values.items()}
        return orjson.dumps(values, default=repr, option=_JSON_OPTIONS)


_JSON_OPTIONS: Final = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS


def _encodable(value: object) -> object:
    try:
        orjson.dumps(value, default=repr, option=_JSON_OPTIONS)
    except TypeError:
        return ascii(value)
    return value


# What only programs compare, and what the sentence has said.
_NOT_FOR_PEOPLE: Final = frozenset({"seq", "boot_id", "job", "epoch"})


def _console(*, colors: bool) -> _Render:
    renderer = structlog.dev.ConsoleRenderer(
        colors=colors,
        timestamp_key="ts",
        # The plain one: rich's would print local variables, and those hold tokens.
        exception_formatter=structlog.dev.plain_traceback,
    )

    def render(values: dict[str, Any]) -> bytes:
        values = {name: value for name, value in values.items() if name not in _NOT_FOR_PEOPLE}
        values["event"] = f"{values['event']:<24} {values.pop('msg')}"
        return f"{renderer(None, '', values)}\n".encode("utf-8", "backslashreplace")

    return render


def _spell_exception(fields: EventDict) -> None:
    """`exc_info`, in any of the forms that `logging` knows, becomes the text `error`."""
    fields.pop("stack_info", None)
    given = fields.pop("exc_info", None)
    if given is True:
        given = sys.exc_info()
    error = given[1] if isinstance(given, tuple) else given
    if isinstance(error, BaseException):
        fields["error"] = "".join(traceback.format_exception(error))
