"""Every rule, on this tree. A failure lists each finding as `path:line: sentence`."""

import ast
import gc
from collections.abc import Callable, Iterator

import pytest

from protos.generate import drift
from tests.tidy import bans, layout, purity, shape
from tests.tidy.source import ROOT, Finding, Source, project_sources

# One worker reads and parses all files, once.
pytestmark = pytest.mark.xdist_group("tidy")

Rule = Callable[[Source], Iterator[Finding]]

PYTHON_RULES: list[Rule] = [
    shape.long_function,
    shape.long_module,
    shape.many_parameters,
    shape.missing_docstring,
    bans.stray_print,
    bans.catch_all,
    bans.blanket_ignore,
    bans.sleeping_test,
    layout.generated_elsewhere,
    layout.foreign_sdk_import,
]
CORE_RULES: list[Rule] = [purity.impure_import, purity.impure_call]
TEXT_RULES: list[Rule] = [shape.wide_line, layout.drawer, layout.machine_path]


def sources() -> list[Source]:
    """What is judged: everything but generated code."""
    return [source for source in project_sources() if not source.is_generated]


def python_sources() -> list[Source]:
    """The Python among it."""
    return [source for source in sources() if source.is_python]


def complain(findings: list[Finding]) -> None:
    """Fail with every finding, not only the first."""
    if findings:
        pytest.fail("\n".join(str(finding) for finding in findings), pytrace=False)


@pytest.fixture(scope="module", autouse=True)
def parsed() -> None:
    """Millions of nodes that stay are not looked through for garbage, again and again."""
    gc.disable()
    for source in python_sources():
        assert isinstance(source.tree, ast.Module)
    gc.freeze()
    gc.enable()


def test_the_tree_is_seen() -> None:
    """A walk that found nothing would pass every rule."""
    paths = {source.path for source in project_sources()}
    assert {"pyproject.toml", "Makefile", ".ci/run", "tests/tidy/source.py"} <= paths
    assert any(source.is_core for source in python_sources())
    assert any(source.is_generated for source in project_sources())


def test_the_tests_of_a_group_go_to_one_worker(request: pytest.FixtureRequest) -> None:
    """They share what is dear to start, such as a cluster. xdist names a group in the ids of its
    tests; where pytest does not take that, they are spread all the same, each worker starts all of
    it, and everything passes, only far later."""
    if request.config.getoption("loadgroup", False):
        marked = [item for item in request.session.items if item.get_closest_marker("xdist_group")]
        assert not [item.nodeid for item in marked if "@" not in item.nodeid]


@pytest.mark.parametrize("rule", PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_python(rule: Rule) -> None:
    complain([finding for source in python_sources() for finding in rule(source)])


@pytest.mark.parametrize("rule", CORE_RULES, ids=lambda rule: rule.__name__)
def test_core(rule: Rule) -> None:
    complain([finding for source in _core() for finding in rule(source)])


def test_core_walks_through_no_set() -> None:
    attributes = purity.set_attributes(_core())
    complain([found for source in _core() for found in purity.set_iteration(source, attributes)])


@pytest.mark.parametrize("rule", TEXT_RULES, ids=lambda rule: rule.__name__)
def test_text(rule: Rule) -> None:
    complain([finding for source in sources() for finding in rule(source)])


def test_no_dead_module() -> None:
    entry_points = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    complain(list(layout.dead_module(project_sources(), entry_points)))


def test_exceptions_are_needed() -> None:
    """An exception for a path that is gone would let the next file of that name slip through."""
    paths = [source.path for source in project_sources()]
    exceptions = (*bans.MAY_PRINT, *bans.MAY_CATCH_ALL, *layout.ALIVE)
    stale = [name for name in exceptions if not any(path.startswith(name) for path in paths)]
    assert stale == []


def test_generated_code_is_current() -> None:
    assert drift() == []


def _core() -> list[Source]:
    return [source for source in python_sources() if source.is_core]
