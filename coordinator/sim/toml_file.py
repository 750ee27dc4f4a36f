"""A TOML file of a simulation as its `msgspec` structs, and a sentence that names what is wrong.

Problem: a misspelt key that is passed over gives a plausible wrong answer, and a message of the
decoder speaks of types and of `$.gpus[...]`. So each value is converted by itself, under its whole
name, and an unknown key is answered with the nearest right one.
"""

import difflib
import math
import re
from codecs import BOM_UTF8
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

import msgspec

WORDS: Final[Mapping[Any, str]] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
}

_MISSING: Final = re.compile(
    r"Object missing required field `(?P<key>\w+)`(?: - at `\$(?P<place>.*)`)?"
)

_Said = TypeVar("_Said", bound=msgspec.Struct)


class BadFile(ValueError):
    """A file cannot be used; the text is a sentence that names the place."""


def read_toml(path: Path, kind: type[_Said]) -> _Said:
    """The file as this struct. Raises `BadFile`."""
    document = _document(path)
    _check(path, "", document, kind)
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:  # a key without a default is missing
        raise BadFile(f"{path}: {_missing(error)}") from error


def read_table(path: Path, name: str, kind: type[_Said]) -> dict[str, _Said]:
    """Of a file whose other keys are others' business: the tables `[name.KEY]`, each as this
    struct. Raises `BadFile`."""
    tables = _document(path).get(name, {})
    _check(path, f"{name}.", tables, dict[str, kind])  # type: ignore[valid-type]
    return {key: msgspec.convert(each, kind) for key, each in tables.items()}


def _document(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = msgspec.toml.decode(path.read_bytes().removeprefix(BOM_UTF8))
    except OSError as error:
        raise BadFile(f"{path} cannot be read ({error.strerror or error})") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadFile(f"{path} is no TOML: {error}") from error
    return found


def _missing(error: msgspec.ValidationError) -> str:
    """The decoder's "Object missing required field `count` - at `$.gpus[...]`", in our words."""
    match = _MISSING.fullmatch(str(error))
    if match is None:
        return str(error)
    place = (match["place"] or "").replace("[...]", ".NAME").removeprefix(".")
    return f"{'.'.join(filter(None, (place, match['key'])))} is missing"


def check_number(path: Path | str, key: str, number: float, *, above: bool = False) -> None:
    """Finite, and 0 or more; `above`: more than 0. Raises `BadFile`."""
    if not 0 <= number < math.inf or (above and number == 0):
        least = "above 0" if above else "0 or more, and finite"
        raise BadFile(f"{path}: {key} is {number:g}; it must be {least}")


def _check(path: Path, name: str, value: Any, kind: Any) -> None:
    """That each key is known, and each value of its kind. `name` ends in a dot, if there is one."""
    is_struct = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    if not is_struct and get_origin(kind) is not dict:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            shown = f"{value!r:.40}"
            said = f"{path}: {name.removesuffix('.')} must be {WORDS[kind]}, not {shown}"
            raise BadFile(said) from error
        return
    if not isinstance(value, dict):
        raise BadFile(f"{path}: {name.removesuffix('.')} must be a table, not {value!r:.40}")
    known = get_type_hints(kind) if is_struct else {}
    for key, each in value.items():
        if is_struct and key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
            raise BadFile(f"{path}: unknown key {name + key!r}; {hint}")
        _check(path, f"{name}{key}.", each, known[key] if is_struct else get_args(kind)[1])
