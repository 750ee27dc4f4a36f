"""A core decides; it does not act, look at a clock, roll dice or depend on the order of a set.

import-linter sees the imports of a core too, but neither calls nor iteration. Iterating over a set
of strings gives another order in every process (hash randomization), so a replay would decide
otherwise; `sorted(...)`, `len(...)`, membership and set algebra are fine. Python has no types at
this level, so an expression counts as a set when it is written as one, or when its name is
annotated as one, or assigned one, in the same function (attributes: anywhere in the cores).
"""

import ast
import sys
from collections.abc import Iterable, Iterator

from tests.tidy.source import Finding, Source

FORBIDDEN_IMPORTS = frozenset(
    """time random asyncio threading socket os subprocess sqlite3 logging grpc protos
    secrets uuid multiprocessing concurrent signal select selectors""".split()
)
FORBIDDEN_CALLS = frozenset("open print input id hash eval exec __import__".split())
FORBIDDEN_METHODS = frozenset(("datetime.now", "datetime.utcnow", "datetime.today", "date.today"))

# What walks through its argument in the argument's order. `sorted`, `len`, `min`, `any` do not tell
# it.
_WALKERS = frozenset("list tuple iter enumerate zip map filter dict reversed deque".split())
_SET_TYPES = frozenset("set frozenset Set AbstractSet MutableSet".split())
_SET_METHODS = frozenset("union intersection difference symmetric_difference".split())

_Scope = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def impure_import(source: Source) -> Iterator[Finding]:
    """A core imports the standard library (less what acts) and itself."""
    core = ".".join(source.module.split(".")[:2])
    for node in source.nodes:
        for name in imported_names(node, source):
            top = name.split(".")[0]
            if name == core or name.startswith(core + "."):
                continue
            if top in FORBIDDEN_IMPORTS or top not in sys.stdlib_module_names:
                line = getattr(node, "lineno", 1)
                yield Finding(source.path, line, f"a core must not import {name}")


def impure_call(source: Source) -> Iterator[Finding]:
    """A core calls nothing that acts, reads a clock or differs from process to process."""
    for node in source.nodes:
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            tail = ".".join(name.split(".")[-2:])
            if name in FORBIDDEN_CALLS or tail in FORBIDDEN_METHODS:
                yield Finding(source.path, node.lineno, f"a core must not call {name}()")


def set_iteration(source: Source, attributes: frozenset[str] = frozenset()) -> Iterator[Finding]:
    """Iteration over a set; `attributes` are the names of attributes known to be sets."""
    for scope, nodes in _scopes(source.tree):
        names = _set_names(nodes, scope)
        for node in nodes:
            for walked in _walked(node):
                if _is_set(walked, names, attributes):
                    yield Finding(
                        source.path,
                        walked.lineno,
                        f"walks through the set {ast.unparse(walked)}: sort it first",
                    )


def set_attributes(sources: Iterable[Source]) -> frozenset[str]:
    """Names of fields and attributes that any of these modules annotates as sets."""
    found: set[str] = set()
    for source in sources:
        for node in source.nodes:
            if isinstance(node, ast.ClassDef):
                found.update(
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign)
                    and isinstance(item.target, ast.Name)
                    and _is_set_type(item.annotation)
                )
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
                if _is_set_type(node.annotation):
                    found.add(node.target.attr)
    return frozenset(found)


def imported_names(node: ast.AST, source: Source) -> list[str]:
    """Dotted names that an import statement brings in, relative ones made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = source.module.split(".")
        if not source.path.endswith("/__init__.py"):
            package = package[:-1]
        kept = package[: len(package) - node.level + 1]
        base = ".".join([*kept, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def _scopes(tree: ast.Module) -> Iterator[tuple[_Scope, list[ast.AST]]]:
    """Each scope with the nodes of its own, nested functions left to themselves."""
    pending: list[_Scope] = [tree]
    while pending:
        scope = pending.pop()
        own: list[ast.AST] = []
        queue: list[ast.AST] = list(ast.iter_child_nodes(scope))
        while queue:
            node = queue.pop()
            own.append(node)
            if isinstance(node, _Scope):
                pending.append(node)
            else:
                queue.extend(ast.iter_child_nodes(node))
        yield scope, own


def _set_names(nodes: list[ast.AST], scope: _Scope) -> frozenset[str]:
    names: set[str] = set()
    if not isinstance(scope, ast.Module):
        arguments = (*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs)
        names.update(a.arg for a in arguments if a.annotation and _is_set_type(a.annotation))
    for node in nodes:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if _is_set_type(node.annotation):
                names.add(node.target.id)
        elif isinstance(node, ast.Assign) and _is_set(node.value, frozenset(), frozenset()):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return frozenset(names)


def _walked(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
        yield node.iter
    elif isinstance(node, ast.Starred):
        yield node.value
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in _WALKERS:
            yield from node.args
        elif isinstance(node.func, ast.Attribute):
            if node.func.attr in ("join", "extend"):
                yield from node.args
            elif node.func.attr == "pop" and not node.args:
                yield node.func.value


def _is_set(node: ast.expr, names: frozenset[str], attributes: frozenset[str]) -> bool:
    if isinstance(node, ast.Set | ast.SetComp):
        return True
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Attribute):
        return node.attr in attributes
    if isinstance(node, ast.BinOp) and isinstance(
        node.op, ast.BitOr | ast.BitAnd | ast.Sub | ast.BitXor
    ):
        return any(_is_set(side, names, attributes) for side in (node.left, node.right))
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name):
            return node.func.id in ("set", "frozenset")
        if isinstance(node.func, ast.Attribute) and node.func.attr in _SET_METHODS:
            return _is_set(node.func.value, names, attributes)
    return False


def _is_set_type(annotation: ast.expr) -> bool:
    base = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return ast.unparse(base).split(".")[-1] in _SET_TYPES
