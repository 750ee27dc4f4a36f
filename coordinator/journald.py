"""Log lines as entries of systemd's journal, with fields of their own.

Problem: what journald reads from stderr is text to it. `journalctl BATON_JOB=12` finds nothing in
it, every line has the same priority, and JSON is what people see. So where stderr is the journal
(JOURNAL_STREAM in the environment names the same file, systemd.exec(5)), lines go to its socket in
the native protocol: one datagram an entry, a field a line, `NAME=value`; a value with a newline in
it is NAME, newline, its length as 64 bits little-endian, the value, newline
(https://systemd.io/JOURNAL_NATIVE_PROTOCOL/). Large entries would need a sealed memory file; ours
are cut to LINE_BYTES_MAX before, which a datagram holds.

MESSAGE is the sentence, PRIORITY the level, MESSAGE_ID the kind of event, BATON_LINE the whole line
as JSON, and what people look for is a field: BATON_EVENT, _NODE, _JOB, _ATTEMPT, _EPOCH, _GPU,
_SEQ, _TRACE_ID. Sending never waits, and each datagram finds the socket by its path, so that a
journald that was restarted is found again. Whatever is not taken at once is the caller's to write
elsewhere.

Coordinator and agent each have this file, word for word (a test compares them), because neither may
import the other.
"""

import functools
import os
import socket
from collections.abc import Mapping
from typing import Any, Final

SOCKET_PATH: Final = "/run/systemd/journal/socket"
# Never changed: the ids of events are derived from it.
MESSAGE_NAMESPACE: Final = "baton.v1"

_PRIORITIES: Final[Mapping[str, str]] = {  # of syslog(3)
    "debug": "7",
    "info": "6",
    "warning": "4",
    "error": "3",
    "critical": "2",
}
_FIELDS: Final = tuple(
    (name, f"BATON_{name.upper()}")
    for name in ("node", "job", "attempt", "epoch", "gpu", "seq", "trace_id")
)


class JournalSocket:
    """A way to the journal. `send` is what `logs.configure` calls `journal`; threads may share."""

    def __init__(self, identifier: str, path: str = SOCKET_PATH) -> None:
        self._identifier = identifier
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def send(self, values: Mapping[str, Any], line: bytes) -> bool:
        """Whether journald has it: not when its queue is full, or when there is no journald."""
        parts = [_kind(values["event"], values["level"], self._identifier)]
        parts.append(_field("MESSAGE", values["msg"]))
        for name, field in _FIELDS:
            value = values.get(name)
            if value is not None:
                parts.append(_field(field, str(value)))
        parts.append(b"BATON_LINE=" + line)  # which is JSON, and has one newline, at its end
        try:
            self._socket.sendto(b"".join(parts), socket.MSG_DONTWAIT, self._path)
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._socket.close()


def stderr_is_journal(environment: Mapping[str, str], descriptor: int = 2) -> bool:
    """Whether what is written to `descriptor` ends in the journal: it is the very stream that
    systemd connected, and no file or pipe that stderr was sent to since."""
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


@functools.lru_cache(maxsize=1)
def journal_of(identifier: str) -> JournalSocket:
    """The same one each time: logs are configured again at each SIGHUP."""
    return JournalSocket(identifier)


@functools.cache
def message_id(event: str) -> str:
    """MESSAGE_ID of a kind of event: the same in every version."""
    import uuid  # a quarter of a MiB, for those alone who write to journald

    return uuid.uuid5(uuid.uuid5(uuid.NAMESPACE_OID, MESSAGE_NAMESPACE), event).hex


@functools.lru_cache(maxsize=512)  # more than there are events
def _kind(event: str, level: str, identifier: str) -> bytes:
    """What all entries of a kind have in common: made once, since a line has ten microseconds."""
    return (
        f"PRIORITY={_PRIORITIES[level]}\nSYSLOG_IDENTIFIER={identifier}\n"
        f"MESSAGE_ID={message_id(event)}\nBATON_EVENT={event}\n"
    ).encode()


def _field(name: str, value: str) -> bytes:
    if "\n" not in value:
        return f"{name}={value}\n".encode("utf-8", "backslashreplace")
    data = value.encode("utf-8", "backslashreplace")
    return b"%s\n%s%s\n" % (name.encode(), len(data).to_bytes(8, "little"), data)
