"""How the files hang together: nothing dead, nothing foreign, nothing in a drawer called "utils".

A module that nothing imports is code that nobody runs and everybody maintains. Tests alone do not
keep a module alive: what only its own test uses is dead too. A module lives when other product code
imports it or names it in a string (lazy imports, `python -m ...`), when it is a program, or when it
stands in `ALIVE` with the reason.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping

from tests.tidy.purity import imported_names
from tests.tidy.source import Finding, Source

_PRODUCT = ("agent/", "coordinator/", "trainers/")

ALIVE: Mapping[str, str] = {
    "trainers/sdk/baton_hook/path/sitecustomize.py": "Python itself imports it, by its name",
    "coordinator/store/memory.py": "the store's fake: driven by the simulations and its suite",
}

FORBIDDEN_FOLDERS = frozenset("utils util common helpers misc shared".split())

# A path of one machine, in a file meant for all of them. (Spelled so that it does not find itself.)
_MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:work|roo[t]|hom[e]/\w+)/")
_GENERATED = re.compile(r"^protos\.baton\.v1\b.*_pb2")
_SDK_PACKAGES = frozenset({"baton_sdk", "baton_hook"})
_MODULE_NAME = re.compile(r"^(agent|coordinator|trainers|baton_sdk)(\.\w+)+$")

# The translators: the only modules that touch generated code (contract 3 in .importlinter).
TRANSLATORS = frozenset(
    """agent/wire.py agent/uplink.py agent/peer.py agent/chunks/peers.py coordinator/wire.py
    agent/wire_health.py coordinator/wire_health.py
    coordinator/wire_time.py coordinator/wire_explain.py coordinator/wire_fit.py
    coordinator/wire_nodes.py coordinator/wire_projects.py
    coordinator/rpc.py coordinator/peers.py
    coordinator/cli/client.py coordinator/cli/decoding.py coordinator/checkpoint_rpc.py
    coordinator/cli/checkpoint_client.py
    coordinator/cost_rpc.py coordinator/cli/cost_client.py
    coordinator/wire_demand.py coordinator/demand_rpc.py coordinator/cli/demand_client.py
    coordinator/wire_capacity.py coordinator/capacity_rpc.py
    coordinator/cli/capacity_client.py""".split()
)


def dead_module(sources: Iterable[Source], entry_points: str) -> Iterator[Finding]:
    """Modules of the product that nothing reaches; `entry_points` is the text of pyproject.toml."""
    modules = [s for s in sources if s.is_python and not s.is_generated]
    reached: set[str] = set()
    for source in modules:
        if not source.path.startswith("tests/"):
            reached |= {name for name in _mentioned(source) if name != source.module}
    for source in modules:
        if not source.path.startswith(_PRODUCT) or source.path.endswith("__init__.py"):
            continue
        program = source.path.endswith("__main__.py") or 'if __name__ == "__main__"' in source.text
        named = f'"{source.module}:' in entry_points
        if not (source.module in reached or program or named or source.path in ALIVE):
            yield Finding(source.path, 1, f"nothing uses {source.module}")


def drawer(source: Source) -> Iterator[Finding]:
    """Folders and modules whose name says nothing; what both programs need is a message."""
    for part in source.path.split("/"):
        if part.partition(".")[0] in FORBIDDEN_FOLDERS:
            yield Finding(source.path, 1, f"{part!r} does not say what is in it")


def machine_path(source: Source) -> Iterator[Finding]:
    """Absolute paths that exist on somebody's machine only."""
    for number, line in enumerate(source.text.splitlines(), start=1):
        found = _MACHINE_PATH.search(line)
        if found:
            yield Finding(source.path, number, f"{found.group()!r} is a path of one machine")


def generated_elsewhere(source: Source) -> Iterator[Finding]:
    """Generated protobuf code outside the translators."""
    if not source.path.startswith(_PRODUCT) or source.path in TRANSLATORS:
        return
    for node in source.nodes:
        for name in imported_names(node, source):
            if _GENERATED.match(name):
                line = getattr(node, "lineno", 1)
                yield Finding(source.path, line, f"imports {name}; only translators may")


def foreign_sdk_import(source: Source) -> Iterator[Finding]:
    """The SDK imports the standard library and itself: it lives in other people's environments. So
    does the hook, which may import the SDK."""
    if not source.path.startswith("trainers/sdk/"):
        return
    own = {"baton_sdk"} if source.path.startswith("trainers/sdk/baton_sdk/") else _SDK_PACKAGES
    for node in source.nodes:
        for name in imported_names(node, source):
            top = name.split(".")[0]
            if top not in own and top not in sys.stdlib_module_names:
                yield Finding(source.path, getattr(node, "lineno", 1), f"the SDK imports {name}")


def _mentioned(source: Source) -> Iterator[str]:
    """Names of modules that this one imports, or holds in a string."""
    for node in source.nodes:
        for name in imported_names(node, source):
            yield name
            yield name.rpartition(".")[0]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _MODULE_NAME.match(node.value):
                yield node.value
