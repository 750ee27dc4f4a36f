"""Log lines: their shape, that a gap in `seq` is a loss, and that no reader stops the program.

One suite for both programs, whose `logs.py` is the same text.
"""

import json
import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import structlog

import agent.logs
import coordinator.logs


@pytest.fixture(params=[agent.logs, coordinator.logs], ids=["agent", "coordinator"])
def logs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """One program's module; what other tests configured is put back."""
    before, handlers, level = structlog.get_config(), logging.root.handlers[:], logging.root.level
    monkeypatch.setattr(request.param, "_direct", None)  # restored in the end
    # Another test may have left it on, after which pytest has put `showwarning` back: it would
    # count as on, and nothing would be heard.
    logging.captureWarnings(False)
    yield request.param
    logging.captureWarnings(False)
    structlog.configure(**before)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def registered(logs: ModuleType) -> Any:
    """Some events for the tests."""
    return logs.registry(
        logs.Event("attempt.started", "info", "attempt step", "attempt {attempt} at {step}", "."),
        *(
            logs.Event(name, "info", "", f"this is {name}", ".")
            for name in "again e flood library link.lost long loop.failed odd seen tick up".split()
        ),
    )


class File:
    """A file to log to, and what stands in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    file = File(tmp_path / "log")
    yield file
    os.close(file.descriptor)


def test_a_line_has_its_head_then_bound_then_own_fields(logs: ModuleType, file: File) -> None:
    log = logs.configure(
        "info", "json", registered(logs), descriptor=file.descriptor, role="agent", node="n1"
    )
    log.info("attempt.started", attempt="12.3.0", step="é")
    logs.emit("warning", "link.lost", (("reason", "reset"),))
    first, second = file.lines()
    head = ["ts", "level", "event", "msg", "seq", "role", "node", "boot_id"]
    assert list(first) == [*head, "job", "epoch", "attempt", "step"]
    assert (first["job"], first["epoch"]) == (12, 3)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    assert first["boot_id"] == boot_id.replace("-", "")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["ts"])
    assert (first["level"], first["event"]) == ("info", "attempt.started")
    assert first["msg"] == "attempt 12.3.0 at é"
    assert (second["level"], second["reason"]) == ("warning", "reset")
    assert second["seq"] == first["seq"] + 1


def test_where_the_kernel_is_hidden_the_environment_says_the_boot(
    logs: ModuleType, file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_BOOT_ID_PATH", tmp_path / "hidden")
    for said in ("0123456789abcdef0123456789abcdef", ""):
        monkeypatch.setenv("BATON_BOOT_ID", said)
        logs.configure("info", "json", registered(logs), descriptor=file.descriptor)
        logs.emit("info", "e")
    assert [line["boot_id"] for line in file.lines()] == ["0123456789abcdef0123456789abcdef", ""]


def test_the_time_is_utc_with_milliseconds(logs: ModuleType) -> None:
    times = iter([1_790_000_000_007, 1_790_000_000_999, 1_790_000_001_000])
    written: list[dict[str, Any]] = []

    def write(line: bytes) -> bool:
        written.append(json.loads(line))
        return True

    writer = logs.Writer(write, logs._json_line, {}, lambda: next(times))
    for _ in range(3):
        writer.info("info", {"event": "tick"})
    assert [line["ts"] for line in written] == [
        "2026-09-21T14:13:20.007Z",
        "2026-09-21T14:13:20.999Z",
        "2026-09-21T14:13:21.000Z",
    ]


def test_less_than_the_level_is_not_logged_and_can_be_changed(logs: ModuleType, file: File) -> None:
    module_level = structlog.get_logger()
    logs.configure("warning", "json", registered(logs), descriptor=file.descriptor)
    module_level.info("hidden")
    logs.emit("info", "hidden")
    logs.configure("debug", "json", registered(logs), descriptor=file.descriptor)
    module_level.debug("seen")
    logs.emit("debug", "seen")
    first, second = file.lines()
    assert first["event"] == second["event"] == "seen"
    assert second["seq"] == first["seq"] + 1


def test_a_field_does_not_take_the_place_of_the_head(logs: ModuleType, file: File) -> None:
    logs.configure("info", "json", registered(logs), descriptor=file.descriptor, node="n1")
    logs.emit("info", "e", (("event", 1), ("level", 2), ("ts", 3), ("seq", 4), ("node", "n2")))
    (line,) = file.lines()
    assert (line["event"], line["level"], line["node"]) == ("e", "info", "n2")
    assert [line[name] for name in ("event_", "level_", "ts_", "seq_")] == [1, 2, 3, 4]


def test_an_event_that_nobody_registered_is_marked_and_written(
    logs: ModuleType, file: File
) -> None:
    log = logs.configure("info", "json", registered(logs), descriptor=file.descriptor)
    log.warning("made.up", step=1)
    logs.emit("error", "made.up", (("step", 2),))
    for line, (level, step) in zip(file.lines(), [("warning", 1), ("error", 2)], strict=True):
        assert (line["event"], line["original"]) == ("unregistered", "made.up")
        assert (line["msg"], line["level"], line["step"]) == ("made.up", level, step)


def test_a_field_that_is_missing_costs_the_sentence_and_not_the_line(
    logs: ModuleType, file: File
) -> None:
    log = logs.configure("info", "json", registered(logs), descriptor=file.descriptor)
    log.info("attempt.started", attempt="no id")
    (line,) = file.lines()
    assert line["msg"] == "attempt {attempt} at {step}"
    assert "job" not in line


def test_an_event_cannot_be_registered_twice(logs: ModuleType) -> None:
    event = logs.Event("tick", "info", "", "", "")
    with pytest.raises(ValueError, match="twice"):
        logs.registry(event, event)


def test_no_value_keeps_a_line_from_being_written(logs: ModuleType, file: File) -> None:
    circle: list[object] = []
    circle.append(circle)
    values = {"path": Path("/p"), "big": 2**70, "half": "\ud800", "circle": circle, "bytes": b"b"}
    logs.configure("info", "json", registered(logs), descriptor=file.descriptor)
    logs.emit(
        "info", "odd", (*values.items(), ("fine", 1), ("keys", {1: 2}), ("nan", float("nan")))
    )
    (line,) = file.lines()
    assert line["fine"] == 1
    assert line["keys"] == {"1": 2}
    assert line["nan"] is None
    assert line["big"] == str(2**70)
    assert line["half"] == "'\\ud800'"
    assert line["circle"] == "[[...]]"


def test_a_line_that_is_too_long_is_cut_and_says_so(logs: ModuleType, file: File) -> None:
    logs.configure("info", "json", registered(logs), descriptor=file.descriptor)
    logs.emit("info", "long", (("text", "é" * logs.LINE_BYTES_MAX),))
    (line,) = file.lines()
    assert line["event"] == "long"
    assert line["cut_bytes"] > 2 * logs.LINE_BYTES_MAX
    assert "éé" in line["cut"]
    assert file.path.stat().st_size < logs.LINE_BYTES_MAX


def test_an_exception_is_one_field(logs: ModuleType, file: File) -> None:
    log = logs.configure("info", "json", registered(logs), descriptor=file.descriptor)
    try:
        raise ValueError("broken")
    except ValueError as error:
        log.exception("loop.failed")
        log.error("loop.failed", exc_info=error)
    for line in file.lines():
        assert line["level"] == "error"
        assert line["error"].startswith("Traceback")
        assert line["error"].endswith("ValueError: broken\n")
        assert "exc_info" not in line


def test_libraries_are_heard(logs: ModuleType, file: File) -> None:
    logs.configure("info", "json", registered(logs), descriptor=file.descriptor, node="n1")
    logging.getLogger("asyncio").info("talk about itself")
    logging.getLogger("asyncio").error("Task %s", "failed")
    logging.getLogger("asyncio").warning("%d", "not a number")
    first, second = file.lines()
    assert (first["event"], first["level"], first["node"]) == ("library", "error", "n1")
    assert (first["logger"], first["text"]) == ("asyncio", "Task failed")
    assert second["text"] == "%d"


def test_warnings_are_lines_as_well(logs: ModuleType, file: File) -> None:
    logs.configure("info", "json", registered(logs), descriptor=file.descriptor)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("this way is old", DeprecationWarning, stacklevel=1)
    (line,) = file.lines()
    assert (line["event"], line["level"], line["logger"]) == ("library", "warning", "py.warnings")
    assert "DeprecationWarning: this way is old" in line["text"]


def test_the_console_is_for_people(logs: ModuleType, file: File) -> None:
    logs.configure("info", "console", registered(logs), descriptor=file.descriptor, node="n1").info(
        "up", x="y"
    )
    text = file.path.read_text()
    assert re.search(r"^\d{4}-.*Z \[info +\] up +this is up +.*node=n1.* x=y\n$", text)
    assert "\x1b" not in text


def test_auto_looks_at_the_descriptor(logs: ModuleType, file: File) -> None:
    logs.configure("info", "auto", registered(logs), descriptor=file.descriptor).info("up")
    assert file.lines()[0]["event"] == "up"
    primary, terminal = os.openpty()
    try:
        logs.configure("info", "auto", registered(logs), descriptor=terminal).info("up")
        assert b"\x1b[" in os.read(primary, 4096)
    finally:
        os.close(primary)
        os.close(terminal)


def drain(reader: int) -> bytes:
    """All that waits to be read, without waiting for more."""
    os.set_blocking(reader, False)
    parts = []
    while True:
        try:
            parts.append(os.read(reader, 65_536))
        except BlockingIOError:
            return b"".join(parts)


def pipe() -> tuple[int, int]:
    return os.pipe()


def socket_pair() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return theirs.detach(), ours.detach()


@pytest.mark.parametrize("connect", [pipe, socket_pair])
def test_a_reader_that_stops_costs_lines_and_never_the_loop(
    logs: ModuleType, connect: Callable[[], tuple[int, int]]
) -> None:
    reader, writer = connect()
    logs.configure("info", "json", registered(logs), descriptor=writer)
    for number in range(2_000):  # a blocking write would never come back from this loop
        logs.emit("info", "flood", (("number", number), ("text", "x" * 1_000)))
    before = drain(reader)
    logs.emit("info", "again")
    text = before + drain(reader)
    assert os.get_blocking(writer)  # the flags of others who share it are untouched
    os.close(reader)
    os.close(writer)
    *flood, last = [json.loads(line) for line in text.splitlines()]
    assert [line["number"] for line in flood] == list(range(len(flood)))  # whole, in order
    assert 0 < len(flood) < 2_000
    assert last["event"] == "again"
    assert last["seq"] == flood[0]["seq"] + 2_000  # the gap is as large as the loss


def test_a_reader_that_has_gone_is_no_reason_to_stop(logs: ModuleType) -> None:
    reader, writer = os.pipe()
    log = logs.configure("info", "json", registered(logs), descriptor=writer)
    os.close(reader)
    log.info("unheard")
    assert os.get_blocking(writer)  # the flag of others who share it is untouched
    os.close(writer)
