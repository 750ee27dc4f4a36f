"""ARCHITECTURE.md tells the truth: its diagrams are the tables, the tests, files and functions that
it names exist, and every module of a core has a place; so do the tests of docs/known-failures.md.

`python -m tests.tidy.test_architecture` writes the diagrams anew.
"""

import fnmatch
import re
from pathlib import Path

import pytest

from coordinator.core import phases

ROOT = Path(__file__).resolve().parents[2]
MAP = ROOT / "ARCHITECTURE.md"

DIAGRAMS = {
    "job": phases.diagram(phases.JOB_TRANSITIONS),
    "attempt": phases.diagram(phases.ATTEMPT_TRANSITIONS),
    "node": phases.diagram(phases.NODE_TRANSITIONS),
    "intent": phases.diagram(phases.INTENT_TRANSITIONS),
    "gpu": phases.diagram(phases.GPU_TRANSITIONS),
    "power": phases.diagram(phases.POWER_TRANSITIONS),
}
NAMED = re.compile(r"`(\w+/[\w/]+\.py)(?:::(\w+))?`")


def drawn(text: str) -> str:
    """The map with every diagram as its table has it now."""
    for name, diagram in DIAGRAMS.items():
        block = re.compile(rf"(<!-- phases:{name} -->\n).*?(<!-- phases:end -->)", re.DOTALL)
        title = f"**{name}**\n\n```mermaid\n{diagram}\n```\n"
        text, count = block.subn(rf"\g<1>{title}\g<2>", text)
        if count != 1:
            raise ValueError(f"ARCHITECTURE.md has {count} places for the {name} diagram")
    return text


def test_diagrams_are_the_tables() -> None:
    text = MAP.read_text("utf-8")
    assert drawn(text) == text, "run: python -m tests.tidy.test_architecture"


@pytest.mark.parametrize("document", [MAP, ROOT / "docs/known-failures.md"])
def test_what_is_named_exists(document: Path) -> None:
    named = NAMED.findall(document.read_text("utf-8"))
    assert len(named) >= 10
    for path, function in named:
        source = (ROOT / path).read_text("utf-8")
        assert not function or f"def {function}(" in source, f"{path} has no {function}"


@pytest.mark.parametrize("core", ["coordinator/core", "agent/core"])
def test_every_module_of_a_core_has_a_place(core: str) -> None:
    table = MAP.read_text("utf-8").split(f"| `{core}/` | modules |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([\w*]+)`", table)) - {"handle"}
    modules = {path.stem for path in (ROOT / core).glob("*.py")} - {"__init__"}
    placed = {name: fnmatch.filter(modules, name) for name in named}
    assert [name for name, found in placed.items() if not found] == []
    assert modules - {module for found in placed.values() for module in found} == set()


def test_every_top_folder_is_on_the_map() -> None:
    text = MAP.read_text("utf-8")
    for folder in ("protos", "agent", "coordinator", "trainers", "systemd", "tests", "bench"):
        assert f"`{folder}/" in text, f"{folder}/ is not on the map"


def test_a_changed_table_is_noticed() -> None:
    changed = MAP.read_text("utf-8").replace("queued --> active", "queued --> succeeded", 1)
    assert drawn(changed) != changed


if __name__ == "__main__":
    MAP.write_text(drawn(MAP.read_text("utf-8")), "utf-8")
