"""What must not be written, except where this file says so and why.

A ban without exceptions gets worked around; a ban whose exceptions are scattered over the tree as
comments is no ban. So every exception stands here, short and with its reason, and `test_tree.py`
fails for an exception that nothing needs any more.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping

from tests.tidy.source import Finding, Source

# Paths (a trailing slash means the folder) that may print, because standard output is their
# product.
MAY_PRINT: Mapping[str, str] = {
    "coordinator/cli/": "the command line's tables",
    "bench/": "tables of the comparisons",
    "tests/": "the demo, the torture and the replay commands",
    "trainers/compare.py": "a table: transferred, from scratch, untrained",
    "trainers/prepare.py": "says which model and data it writes where",
}

# Outermost loops. Everywhere else an unknown error is a bug, and a bug ends the program.
MAY_CATCH_ALL: Mapping[str, str] = {
    "agent/processes/forkserver.py": "the outermost frame of a forked trainer, as an interpreter's",
    "agent/shell.py": "the agent's only loop",
    "coordinator/shell.py": "the coordinator's only loop",
    "tests/core/mixed_histories.py": "a search: whatever breaks is a finding, and it goes on",
    "trainers/sdk/baton_hook/guard.py": "a guest in a user's program, which must not end it",
    "trainers/sdk/baton_hook/path/sitecustomize.py": "the same, before the guard is imported",
    "trainers/prefetch.py": "a thread's only loop; what make() raised is raised by next()",
}

_BLANKET_IGNORE = re.compile(r"#\s*(type:\s*ignore(?!\[\w)|noqa(?!:\s*[A-Z]))")
_CATCH_ALL_NAMES = frozenset({"Exception", "BaseException"})


def stray_print(source: Source) -> Iterator[Finding]:
    """`print(` outside the command line: daemons log, libraries return."""
    if exempt(source.path, MAY_PRINT):
        return
    for node in source.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "print":
                yield Finding(source.path, node.lineno, "print() outside the command line")


def catch_all(source: Source) -> Iterator[Finding]:
    """`except Exception` (or wider, or `suppress(Exception)`) outside an outermost loop.

    A handler that ends in a bare `raise` swallows nothing, and is allowed everywhere.
    """
    if exempt(source.path, MAY_CATCH_ALL):
        return
    for node in source.nodes:
        if isinstance(node, ast.ExceptHandler):
            last = node.body[-1]
            reraises = isinstance(last, ast.Raise) and last.exc is None
            if (node.type is None or _names_catch_all(node.type)) and not reraises:
                yield Finding(source.path, node.lineno, "catches everything; name the errors")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            if any(_names_catch_all(argument) for argument in node.args):
                yield Finding(source.path, node.lineno, "suppresses everything; name the errors")


def blanket_ignore(source: Source) -> Iterator[Finding]:
    """`# type: ignore` and `# noqa` that do not name what they ignore."""
    if not _BLANKET_IGNORE.search(source.text):
        return  # as good as always, and found out without cutting the text into tokens
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT and _BLANKET_IGNORE.search(token.string):
            yield Finding(source.path, token.start[0], f"{token.string!r} does not name its code")


def sleeping_test(source: Source) -> Iterator[Finding]:
    """`time.sleep` in a test: it is too short on a busy machine and too long on every other."""
    if not source.path.startswith("tests/"):
        return
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "time.sleep":
            yield Finding(source.path, node.lineno, "sleeps on real time; wait for a condition")
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            if any(alias.name == "sleep" for alias in node.names):
                yield Finding(source.path, node.lineno, "imports sleep; wait for a condition")


def exempt(path: str, exceptions: Mapping[str, str]) -> bool:
    """Is this path, or a folder that it lies in, one of the exceptions?"""
    return any(
        path == name or (name.endswith("/") and path.startswith(name)) for name in exceptions
    )


def _names_catch_all(expression: ast.expr) -> bool:
    members = expression.elts if isinstance(expression, ast.Tuple) else [expression]
    return any(ast.unparse(member).split(".")[-1] in _CATCH_ALL_NAMES for member in members)
