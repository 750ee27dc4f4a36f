"""Sizes: a part must be small enough to hold in the head.

The median size hardly separates good code from bad; the tail does. So the tail is cut off: 70 lines
to a function (60 in a core), 500 to a module, five positional parameters, 100 columns, and at the
head of every module a docstring that says which problem it solves. A function is counted from its
`def` to its last line, docstring included: what must be scrolled is what counts.
"""

import ast
from collections.abc import Iterator

from tests.tidy.source import Finding, Source

FUNCTION_LINES_MAX = 70
CORE_FUNCTION_LINES_MAX = 60
MODULE_LINES_MAX = 500
POSITIONAL_PARAMETERS_MAX = 5
COLUMNS_MAX = 100

# Prose (Markdown) breaks where its writer likes, and golden traces are as wide as what they record.
_MEASURED_SUFFIXES = (".py", ".proto", ".sql", ".c", ".h", ".toml", ".service", ".conf", ".css")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def long_function(source: Source) -> Iterator[Finding]:
    """Functions of more than 70 lines, or 60 in a core."""
    limit = CORE_FUNCTION_LINES_MAX if source.is_core else FUNCTION_LINES_MAX
    for node in source.nodes:
        if isinstance(node, _Function):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > limit:
                yield Finding(
                    source.path, node.lineno, f"{node.name} has {lines} lines; limit {limit}"
                )


def long_module(source: Source) -> Iterator[Finding]:
    """Modules of more than 500 lines."""
    lines = source.text.count("\n")
    if lines > MODULE_LINES_MAX:
        yield Finding(source.path, 1, f"the module has {lines} lines; limit {MODULE_LINES_MAX}")


def many_parameters(source: Source) -> Iterator[Finding]:
    """Functions with more than five positional parameters, `self` and `cls` not counted."""
    for node in source.nodes:
        if not isinstance(node, _Function):
            continue
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        count = len(names[1:] if names[:1] in (["self"], ["cls"]) else names)
        if count > POSITIONAL_PARAMETERS_MAX:
            yield Finding(
                source.path,
                node.lineno,
                f"{node.name} has {count} positional parameters; limit"
                f" {POSITIONAL_PARAMETERS_MAX}: make some keyword-only",
            )


def wide_line(source: Source) -> Iterator[Finding]:
    """Lines of more than 100 columns, in code and in configuration."""
    if not source.path.endswith(_MEASURED_SUFFIXES):
        return
    for number, line in enumerate(source.text.splitlines(), start=1):
        if len(line) > COLUMNS_MAX and "https://" not in line:
            yield Finding(source.path, number, f"{len(line)} columns; limit {COLUMNS_MAX}")


def missing_docstring(source: Source) -> Iterator[Finding]:
    """Modules without a docstring; an empty `__init__.py` says enough."""
    if source.text.strip() and not (ast.get_docstring(source.tree) or "").strip():
        yield Finding(source.path, 1, "the module does not say which problem it solves")
