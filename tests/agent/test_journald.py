"""Lines in journald's native protocol, sent to a socket that stands in for it.

One suite for both programs, whose `journald.py` is the same text.
"""

import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import structlog

import agent.journald
import agent.logs
import coordinator.journald
import coordinator.logs

PROGRAMS = {
    "agent": (agent.journald, agent.logs),
    "coordinator": (coordinator.journald, coordinator.logs),
}


class Journald:
    """A datagram socket, and what was sent to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)

    def entries(self) -> list[dict[str, str]]:
        """All that waits, without waiting for more."""
        found = []
        while True:
            try:
                found.append(parsed(self.socket.recv(1 << 20)))
            except BlockingIOError:
                return found

    def end(self) -> None:
        self.socket.close()
        self.path.unlink()


def parsed(data: bytes) -> dict[str, str]:
    """A datagram as the protocol says it is read."""
    found = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(data[:8], "little")
            value, data = data[8 : 8 + length], data[8 + length :]
            assert data[:1] == b"\n"
            data = data[1:]
        found[name.decode()] = value.decode()
    return found


@pytest.fixture(params=PROGRAMS)
def modules(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ModuleType, ModuleType]]:
    """One program's journald and logs; what other tests configured is put back."""
    before, handlers, level = structlog.get_config(), logging.root.handlers[:], logging.root.level
    journald, logs = PROGRAMS[request.param]
    monkeypatch.setattr(logs, "_direct", None)  # restored in the end
    yield journald, logs
    structlog.configure(**before)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journald]:
    journal = Journald(tmp_path / "socket")
    yield journal
    if journal.path.exists():
        journal.end()


def configured(
    modules: tuple[ModuleType, ModuleType],
    journal: Journald,
    stderr: Path,
    log_format: str = "auto",
) -> int:
    """Logs go to the stand-in; answers the descriptor that stands for stderr."""
    journald, logs = modules
    descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    events = logs.registry(
        logs.Event("attempt.exited", "warning", "attempt reason", "{attempt} ended: {reason}", "."),
        logs.Event("up", "info", "", "it is up", "."),
    )
    send = journald.JournalSocket("baton-test", str(journal.path)).send
    logs.configure("info", log_format, events, descriptor=descriptor, journal=send, node="n1")
    return descriptor


def test_an_entry_has_fields_to_ask_for(
    modules: tuple[ModuleType, ModuleType], journal: Journald, tmp_path: Path
) -> None:
    descriptor = configured(modules, journal, tmp_path / "stderr")
    modules[1].emit(
        "warning",
        "attempt.exited",
        (
            ("attempt", "12.3"),
            ("reason", "a\nb=c"),
        ),
    )
    modules[1].emit("info", "up")
    os.close(descriptor)
    first, second = journal.entries()
    line = json.loads(first.pop("BATON_LINE"))
    assert first == {
        "MESSAGE": "12.3 ended: a\nb=c",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "baton-test",
        "MESSAGE_ID": uuid.uuid5(uuid.uuid5(uuid.NAMESPACE_OID, "baton.v1"), "attempt.exited").hex,
        "BATON_EVENT": "attempt.exited",
        "BATON_NODE": "n1",
        "BATON_JOB": "12",
        "BATON_ATTEMPT": "12.3",
        "BATON_EPOCH": "3",
        "BATON_SEQ": str(line["seq"]),
    }
    assert line["reason"] == "a\nb=c"
    assert (second["MESSAGE"], second["PRIORITY"]) == ("it is up", "6")
    assert "BATON_JOB" not in second
    assert (tmp_path / "stderr").read_bytes() == b""


def test_what_the_journal_does_not_take_goes_to_stderr(
    modules: tuple[ModuleType, ModuleType], journal: Journald, tmp_path: Path
) -> None:
    stderr = tmp_path / "stderr"
    descriptor = configured(modules, journal, stderr)
    for _ in range(3_000):  # more than a queue of datagrams holds; a blocking send would hang here
        modules[1].emit("info", "up")
    taken = [json.loads(entry["BATON_LINE"])["seq"] for entry in journal.entries()]
    written = [json.loads(line)["seq"] for line in stderr.read_text().splitlines()]
    assert taken
    assert written
    everything = sorted(taken + written)
    assert everything == list(range(everything[0], everything[0] + 3_000))  # each once

    journal.end()
    modules[1].emit("info", "up")
    assert len(stderr.read_text().splitlines()) == len(written) + 1
    restarted = Journald(journal.path)
    modules[1].emit("info", "up")
    assert len(restarted.entries()) == 1
    restarted.end()
    os.close(descriptor)


def test_json_is_json_even_there(
    modules: tuple[ModuleType, ModuleType], journal: Journald, tmp_path: Path
) -> None:
    descriptor = configured(modules, journal, tmp_path / "stderr", "json")
    modules[1].emit("info", "up")
    os.close(descriptor)
    assert journal.entries() == []
    assert json.loads((tmp_path / "stderr").read_text())["event"] == "up"


def test_the_longest_line_fits_into_a_datagram(
    modules: tuple[ModuleType, ModuleType], journal: Journald, tmp_path: Path
) -> None:
    descriptor = configured(modules, journal, tmp_path / "stderr")
    for length in (20_000, 40_000, 400_000):
        reason = "\n" * length
        modules[1].emit("warning", "attempt.exited", (("attempt", "1.1"), ("reason", reason)))
    os.close(descriptor)
    assert len(journal.entries()) == 3
    assert (tmp_path / "stderr").read_bytes() == b""


def test_only_the_stream_that_systemd_made_is_the_journal(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    journald = modules[0]
    with (tmp_path / "a").open("wb") as ours, (tmp_path / "b").open("wb") as other:
        status = os.fstat(ours.fileno())
        environment = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert journald.stderr_is_journal(environment, ours.fileno())
        assert not journald.stderr_is_journal(environment, other.fileno())
        assert not journald.stderr_is_journal({}, ours.fileno())
        assert not journald.stderr_is_journal({"JOURNAL_STREAM": "x"}, ours.fileno())
