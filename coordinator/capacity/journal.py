"""What was begun and how it ended, by key and node, in a file that outlives the coordinator.

Problem: after a restart the core gives an order again whose outcome it has not recorded. A node may
be switched on twice, but money may not be spent twice. So a deed is noted, and the note is on the
disk, before it is begun, and again when it has ended; an order that comes again is answered from
here, and one that was begun and never ended is known as such.

One JSON object a line, only ever appended. A line that a crash has torn is the last one, and is
dropped: what it would have said had not begun. At each start, and whenever twice as many lines are
there as deeds are kept, the file is written anew with the newest deeds.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Final

import orjson

DEEDS_MAX: Final = 10_000  # nodes of orders; at a fleet's two hundred a day some weeks of them


class Stage(Enum):
    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Deed:
    key: str
    node: str
    stage: Stage
    reason: str = ""


class Journal:
    """At `path`. Its methods block, and raise `OSError`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._deeds: dict[tuple[str, str], Deed] = {}
        self._lines = 0

    def open(self) -> None:
        """Read what is there, and leave a file to which lines can be appended."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            lines = []
        for line in lines:
            deed = _deed(line)
            if deed is not None:
                self._keep(deed)
        self._rewrite()

    def seen(self, key: str, node: str) -> Deed | None:
        """How far it is, or `None` for what was never begun."""
        return self._deeds.get((key, node))

    def note(self, deeds: Sequence[Deed]) -> None:
        """All of them, durable when it returns."""
        with self._path.open("ab") as file:
            file.write(b"".join(_line(deed) for deed in deeds))
            file.flush()
            os.fsync(file.fileno())
        for deed in deeds:
            self._keep(deed)
        self._lines += len(deeds)
        if self._lines > 2 * DEEDS_MAX:
            self._rewrite()

    def _keep(self, deed: Deed) -> None:
        self._deeds.pop((deed.key, deed.node), None)
        self._deeds[deed.key, deed.node] = deed
        if len(self._deeds) > DEEDS_MAX:
            del self._deeds[next(iter(self._deeds))]

    def _rewrite(self) -> None:
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as file:
            file.writelines(_line(deed) for deed in self._deeds.values())
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._lines = len(self._deeds)


def _line(deed: Deed) -> bytes:
    return orjson.dumps(asdict(deed), option=orjson.OPT_APPEND_NEWLINE)


def _deed(line: bytes) -> Deed | None:
    """`None` for an empty, torn or foreign line."""
    try:
        values = orjson.loads(line)
        return Deed(
            str(values["key"]), str(values["node"]), Stage(values["stage"]), str(values["reason"])
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
