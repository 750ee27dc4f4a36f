"""Each rule catches what it forbids, and leaves alone what it allows."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protos import generate
from tests.tidy import bans, layout, purity, shape
from tests.tidy.source import Finding, Source, project_sources

Rule = Callable[[Source], Iterator[Finding]]
CORE = "coordinator/core/queue.py"
AGENT = "agent/journal.py"
TEST = "tests/agent/test_journal.py"


def body(lines: int) -> str:
    """A function whose definition takes this many lines."""
    return "def f():\n" + "    pass\n" * (lines - 1)


# rule, path, what it must catch
CAUGHT: list[tuple[Rule, str, str]] = [
    (shape.long_function, AGENT, body(71)),
    (shape.long_function, CORE, body(61)),
    (shape.long_function, AGENT, "class A:\n    async " + body(71).replace("    ", "        ")),
    (shape.long_module, AGENT, "x = 1\n" * 501),
    (shape.many_parameters, AGENT, "def f(a, b, c, d, e, f): ..."),
    (shape.many_parameters, AGENT, "def f(a, b, c, /, d, e, f): ..."),
    (shape.many_parameters, AGENT, "class A:\n    def f(self, a, b, c, d, e, f): ..."),
    (shape.wide_line, AGENT, "#" * 101),
    (shape.wide_line, "protos/baton/v1/jobs.proto", "/" * 101),
    (shape.missing_docstring, AGENT, "x = 1\n"),
    (shape.missing_docstring, AGENT, '""" """\nx = 1\n'),
    (bans.stray_print, AGENT, "print('x')"),
    (bans.stray_print, "trainers/loop.py", "def f():\n    print('x')"),
    (bans.catch_all, AGENT, "try: pass\nexcept Exception: pass"),
    (bans.catch_all, AGENT, "try: pass\nexcept (ValueError, Exception) as e: raise OSError from e"),
    (bans.catch_all, AGENT, "try: pass\nexcept: pass"),
    (bans.catch_all, AGENT, "try: pass\nexcept* builtins.BaseException: pass"),
    (bans.catch_all, AGENT, "with contextlib.suppress(Exception): pass"),
    (bans.blanket_ignore, AGENT, "x = 1  # type: " + "ignore\n"),
    (bans.blanket_ignore, AGENT, "x = 1  # no" + "qa\n"),
    (bans.sleeping_test, TEST, "import time\ntime.sleep(1)"),
    (bans.sleeping_test, TEST, "from time import sleep"),
    (purity.impure_import, CORE, "import time"),
    (purity.impure_import, CORE, "def f():\n    from os import path"),
    (purity.impure_import, CORE, "import msgspec"),
    (purity.impure_import, CORE, "from coordinator.ports import Store"),
    (purity.impure_import, CORE, "from ..ports import Store"),
    (purity.impure_import, CORE, "from agent.core.values import Sample"),
    (purity.impure_import, CORE, "import protos.baton.v1.jobs_pb2"),
    (purity.impure_call, CORE, "f = open('x')"),
    (purity.impure_call, CORE, "x = hash('a')"),
    (purity.impure_call, CORE, "x = datetime.datetime.now()"),
    (purity.set_iteration, CORE, "for x in {1, 2}: pass"),
    (purity.set_iteration, CORE, "[x for x in set(y)]"),
    (purity.set_iteration, CORE, "[x for x in {z for z in y}]"),
    (purity.set_iteration, CORE, "def f(a: frozenset[str]):\n    return list(a)"),
    (purity.set_iteration, CORE, "def f():\n    a = set()\n    for x in a: pass"),
    (purity.set_iteration, CORE, "def f(a: set[int], b):\n    return (*(a - b),)"),
    (purity.set_iteration, CORE, "def f(a: set[int]):\n    return a.pop()"),
    (purity.set_iteration, CORE, "def f(a: set[str]):\n    return ','.join(a)"),
    (layout.drawer, "agent/utils/text.py", ""),
    (layout.drawer, "coordinator/common.py", ""),
    (layout.machine_path, "README.md", "see " + "/work" + "/main"),
    (layout.machine_path, AGENT, "x = '" + "/home" + "/ada/baton'"),
    (layout.generated_elsewhere, AGENT, "from protos.baton.v1 import jobs_pb2"),
    (layout.generated_elsewhere, AGENT, "import protos.baton.v1.jobs_pb2_grpc"),
    (layout.foreign_sdk_import, "trainers/sdk/baton_sdk/link.py", "import torch"),
    (layout.foreign_sdk_import, "trainers/sdk/baton_sdk/link.py", "import baton_hook"),
    (layout.foreign_sdk_import, "trainers/sdk/baton_hook/trainer.py", "import transformers"),
    (layout.foreign_sdk_import, "trainers/sdk/baton_sdk/link.py", "from agent import ports"),
]

# rule, path, what it must leave alone
ALLOWED: list[tuple[Rule, str, str]] = [
    (shape.long_function, AGENT, body(70)),
    (shape.long_function, CORE, body(60)),
    (shape.long_module, AGENT, "x = 1\n" * 500),
    (shape.many_parameters, AGENT, "class A:\n    def f(self, a, b, c, d, e, *, f, g): ..."),
    (shape.wide_line, AGENT, "#" * 100),
    (shape.wide_line, "README.md", "#" * 101),
    (shape.missing_docstring, "agent/__init__.py", ""),
    (bans.stray_print, "coordinator/cli/jobs.py", "print('x')"),
    (bans.stray_print, AGENT, "# print('x')\nlog.print('x')"),
    (bans.catch_all, "agent/shell.py", "try: pass\nexcept Exception: pass"),
    (bans.catch_all, AGENT, "try: pass\nexcept BaseException:\n    undo()\n    raise"),
    (bans.catch_all, AGENT, "try: pass\nexcept OSError: pass"),
    (bans.blanket_ignore, AGENT, "x = 1  # type: ignore[misc]  # noqa: E501\n"),
    (bans.blanket_ignore, AGENT, "x = '# type: ignore'\n"),
    (bans.sleeping_test, AGENT, "import time\ntime.sleep(1)"),
    (bans.sleeping_test, TEST, "await clock.sleep(1)"),
    (purity.impure_import, CORE, "import heapq\nfrom coordinator.core.model import Job"),
    (purity.impure_import, CORE, "from .model import Job"),
    (purity.impure_call, CORE, "x = len([])\nhandler.open()"),
    (purity.set_iteration, CORE, "def f(a: set[int]):\n    return sorted(a), len(a), 1 in a"),
    (purity.set_iteration, CORE, "def f(a: set[int]): ...\ndef g(a: list[int]): return [*a]"),
    (purity.set_iteration, CORE, "def f(a: dict[str, int]):\n    return a.pop('x')"),
    (layout.drawer, "agent/utility_meter.py", ""),
    (layout.machine_path, "README.md", "https://example.org/work/x and ./work/y and /workshop/"),
    (layout.generated_elsewhere, "agent/wire.py", "from protos.baton.v1 import jobs_pb2"),
    (layout.generated_elsewhere, "tests/wire/t.py", "from protos.baton.v1 import jobs_pb2"),
    (layout.foreign_sdk_import, "trainers/sdk/baton_sdk/link.py", "import json, baton_sdk.link"),
    (layout.foreign_sdk_import, "trainers/sdk/baton_hook/trainer.py", "import json, baton_sdk"),
    (layout.foreign_sdk_import, "trainers/loop.py", "import torch"),
]


@pytest.mark.parametrize(("rule", "path", "text"), CAUGHT)
def test_caught(rule: Rule, path: str, text: str) -> None:
    findings = list(rule(Source(path, text)))
    assert findings
    assert all(finding.path == path and finding.sentence for finding in findings)


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_allowed(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text))) == []


def test_a_field_annotated_as_a_set_is_known_in_every_module_of_the_core() -> None:
    model = Source("coordinator/core/model.py", "class Node:\n    labels: frozenset[str]")
    user = Source(CORE, "def f(node):\n    return [label for label in node.labels]")
    attributes = purity.set_attributes([model])
    assert [finding.line for finding in purity.set_iteration(user, attributes)] == [2]


def test_a_module_that_only_its_test_uses_is_dead() -> None:
    used = Source("agent/used.py", '"""x"""')
    dead = Source("agent/dead.py", '"""x"""\nimport agent.dead')
    lazy = Source("agent/lazy.py", '"""x"""')
    entry = Source("agent/entry.py", '"""x"""')
    main = Source("agent/__main__.py", "from agent import used\nload('agent.lazy')")
    test = Source("tests/agent/test_dead.py", "from agent import dead")
    findings = layout.dead_module([used, dead, lazy, entry, main, test], 'b = "agent.entry:main"')
    assert [finding.path for finding in findings] == ["agent/dead.py"]


def test_the_walk_leaves_out_what_is_built_or_hidden(tmp_path: Path) -> None:
    for name in ("agent/a.py", "build/b.py", ".venv/c.py", ".ci/run", "agent/__pycache__/d.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    assert [source.path for source in project_sources(tmp_path)] == [".ci/run", "agent/a.py"]


def test_drift_names_each_file(tmp_path: Path) -> None:
    package = tmp_path / generate.PACKAGE
    package.mkdir(parents=True)
    head = 'syntax = "proto3";\npackage baton.v1;\n'
    (package / "a.proto").write_text(head + "message A { int64 id = 1; }\n")
    uses_a = 'import "baton/v1/a.proto";\nmessage B { A a = 1; }\n'
    (package / "b.proto").write_text(head + uses_a)
    generate.generate(tmp_path, tmp_path)
    assert generate.drift(tmp_path) == []
    assert "from protos.baton.v1 import a_pb2" in (package / "b_pb2.py").read_text()

    (package / "a.proto").write_text(head + "message A { int64 id = 2; }\n")
    (package / "b_pb2.pyi").unlink()
    (package / "c_pb2.py").write_text("")
    assert generate.drift(tmp_path) == [
        "baton/v1/a_pb2.py differs from what its .proto generates",
        "baton/v1/b_pb2.pyi is missing",
        "baton/v1/c_pb2.py has no .proto any more",
    ]


def test_a_contract_that_does_not_compile_says_why(tmp_path: Path) -> None:
    with pytest.raises(generate.GenerateError, match="no \\.proto file"):
        generate.generate(tmp_path, tmp_path)
    package = tmp_path / generate.PACKAGE
    package.mkdir(parents=True)
    (package / "a.proto").write_text("message")
    with pytest.raises(generate.GenerateError, match=r"a\.proto"):
        generate.generate(tmp_path, tmp_path)
