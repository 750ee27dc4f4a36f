"""Reads the table of XIDs: what follows from each of the driver's errors.

Problem: what an XID means changes with NVIDIA's catalogue, and a site may know better for its own
machines; neither should need a release. So the table is a file with a version, a source and a date:
`xids.toml` beside this module, or one that an operator names. A file that is not understood is
refused at start, with a sentence that names the entry, and never half used.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Final

import msgspec

from agent.core.health import Action, XidRule, XidTable

VERSION: Final = 1
_BYTES_MAX: Final = 1 << 20  # ours has 4 KiB
_ENTRIES_MAX: Final = 4_096  # the catalogue has some 200

_Code = Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,4}$")]


class TableError(Exception):
    """The table cannot be used; the text is a sentence that says what to change."""


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    action: Action
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    lost: bool = False


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    source: Annotated[str, msgspec.Meta(min_length=1)]
    date: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    unlisted: Action
    xids: Annotated[dict[_Code, _Entry], msgspec.Meta(max_length=_ENTRIES_MAX)]


def load_table(path: str = "") -> XidTable:
    """The table of a file; empty: our own. Raises `TableError`."""
    if not path:
        text = Path(__file__).with_name("xids.toml").read_text("utf-8")
        return parse_table(text, "xids.toml")
    try:
        with Path(path).open("rb") as file:
            content = file.read(_BYTES_MAX + 1)
        if len(content) > _BYTES_MAX:
            raise TableError(f"the table of XIDs {path} has more than {_BYTES_MAX} bytes")
        return parse_table(content.decode("utf-8"), path)
    except OSError as error:
        raise TableError(f"the table of XIDs {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TableError(f"the table of XIDs {path} is not UTF-8: {error.reason}") from error


def parse_table(text: str, name: str) -> XidTable:
    """Raises `TableError`; `name` says to people which file it is."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"the table of XIDs {name} is not TOML: {error}") from error
    version = document.get("version")
    if version != VERSION:
        said = "says no version" if version is None else f"has version {version}"
        raise TableError(f"the table of XIDs {name} {said}; this agent reads version {VERSION}")
    try:
        read = msgspec.convert(document, _File)
    except msgspec.ValidationError as error:
        raise TableError(f"the table of XIDs {name} is wrong: {error}") from error
    if read.unlisted is Action.READ:
        raise TableError(f"the table of XIDs {name} is wrong: an unlisted XID says no action")
    rules = {
        int(code): XidRule(entry.action, entry.name, entry.lost)
        for code, entry in read.xids.items()
    }
    return XidTable(read.version, read.source, read.date, read.unlisted, rules)
