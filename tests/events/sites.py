"""Where the programs log, found in their syntax trees.

Problem: a name that is logged is a string in a call, in one of a handful of forms: a method of a
logger, a core's `log(level, event, ...)`, the coordinator's `tell(unix_ms, job, event, ...)` and
`write_line`, `emit` and the shells' port with pairs, a `Notice`. All of them are read here; what
cannot be read is a finding, except in the functions that pass on what they were given.

A name may be an f-string, which stands for every registered name of its level that fits it, or a
variable that the same module assigns. A starred argument makes the fields open: then more may be
given than is seen.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.tidy.source import Source

LEVELS = frozenset({"debug", "info", "warning", "error", "critical"})
# Functions that pass a name on; `line` and `emit` of logs.py among them.
FORWARDERS = frozenset({"tell", "write_line", "log", "emit", "_act", "_tell", "_do"})
_LOGGERS = frozenset({"log", "_log"})
_PAIRS = frozenset({"logging_setup.emit", "emit", "self._ports.log", "self._log", "ports.log"})
_ANY = r"\w+"
_TELL_ARGUMENTS = 4  # an agent's `tell` is a message to its trainer
_TELL_FIELDS = frozenset({"job", "reason"})


@dataclass(frozen=True)
class Site:
    """One call. `names` are patterns; empty: it passes a name on. `level` is empty where it is not
    written out."""

    where: str
    level: str
    names: tuple[str, ...]
    fields: frozenset[str]
    is_open: bool = False

    def events(self, levels: Mapping[str, str]) -> list[str]:
        """Which of the registered ones it logs; `levels` has the level of each."""
        return [
            name
            for name, level in levels.items()
            if any(re.fullmatch(pattern, name) for pattern in self.names)
            and (_ANY not in "".join(self.names) or level == self.level)
        ]


class Unreadable(Exception):
    """A call that logs something, in a form that is not known here."""


def sites(source: Source) -> Iterator[Site]:
    """Every call of the module that logs. Raises `Unreadable`."""
    values = _assigned(source.tree)
    for function, call in _calls(source.tree):
        where = f"{source.path}:{call.lineno}"
        try:
            site = _site(call, where, values)
        except Unreadable:
            if function in FORWARDERS:
                continue
            raise
        if site is not None:
            yield site


def _site(call: ast.Call, where: str, values: Mapping[str, list[ast.expr]]) -> Site | None:
    called, arguments = ast.unparse(call.func), call.args
    owner, _, method = called.rpartition(".")
    if owner in _LOGGERS and method in LEVELS:
        return _of_keywords(where, method, arguments[0], call, values)
    if called in ("state.log", "self.log"):
        return _of_keywords(where, _text(arguments[0]), arguments[1], call, values)
    if called in ("state.tell", "state.write_line") and len(arguments) == _TELL_ARGUMENTS:
        return _of_keywords(where, "info", arguments[2], call, values, more=_TELL_FIELDS)
    if (called in _PAIRS and len(arguments) >= 2) or called == "Notice":
        level = _text(arguments[0]) if isinstance(arguments[0], ast.Constant) else ""
        names = _names(arguments[1], where, values)
        pairs = arguments[2] if len(arguments) > 2 else ast.Tuple([], ast.Load())
        return Site(where, level, names, _pair_names(pairs, where, values))
    return None


def _of_keywords(
    where: str,
    level: str,
    name: ast.expr,
    call: ast.Call,
    values: Mapping[str, list[ast.expr]],
    *,
    more: frozenset[str] = frozenset(),
) -> Site:
    fields = frozenset(word.arg for word in call.keywords if word.arg)
    is_open = any(word.arg is None for word in call.keywords)
    return Site(where, level, _names(name, where, values), fields | more, is_open)


def _names(node: ast.expr, where: str, values: Mapping[str, list[ast.expr]]) -> tuple[str, ...]:
    match node:
        case ast.Constant(value=str(text)):
            return (re.escape(text),)
        case ast.JoinedStr(values=parts):
            return ("".join(_pattern(part) for part in parts),)
        case ast.IfExp(body=one, orelse=other):
            return _names(one, where, values) + _names(other, where, values)
        case ast.Name(id=name) if name in values:
            return tuple(text for value in values[name] for text in _names(value, where, values))
    raise Unreadable(f"{where}: {ast.unparse(node)} is no name that can be read")


def _pattern(part: ast.expr) -> str:
    return re.escape(_text(part)) if isinstance(part, ast.Constant) else _ANY


def _pair_names(node: ast.expr, where: str, values: Mapping[str, list[ast.expr]]) -> frozenset[str]:
    match node:
        case ast.Tuple(elts=pairs):
            return frozenset(_text(pair.elts[0]) for pair in pairs if isinstance(pair, ast.Tuple))
        case ast.Name(id=name) if name in values:
            found = [_pair_names(value, where, values) for value in values[name]]
            return frozenset().union(*found)
        case ast.Dict(keys=keys):
            return frozenset(_text(key) for key in keys if key is not None)
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="items")) if name in values:
            return frozenset().union(*(_pair_names(one, where, values) for one in values[name]))
    raise Unreadable(f"{where}: {ast.unparse(node)} are no fields that can be read")


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise Unreadable(f"{ast.unparse(node)} is not written out")


def _calls(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.Call]]:
    """Calls, each with the function that it stands in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield function, node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _calls(node, node.name)
        else:
            yield from _calls(node, function)


def _assigned(tree: ast.Module) -> dict[str, list[ast.expr]]:
    """What each name of the module is assigned that could be an event's name or its fields."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ) if isinstance(value, ast.Constant | ast.IfExp | ast.Tuple | ast.Dict):
                found.setdefault(name, []).append(value)
    return found
