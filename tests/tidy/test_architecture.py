"""ARCHITECTURE.md tells the truth: its diagrams are the tables, its tests and files exist; so do
the tests that docs/known-failures.md names.

`python -m tests.tidy.test_architecture` writes the diagrams anew.
"""

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
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


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
def test_every_named_test_exists(document: Path) -> None:
    named = NAMED_TEST.findall(document.read_text("utf-8"))
    assert len(named) >= 10
    for path, function in named:
        source = (ROOT / path).read_text("utf-8")
        assert not function or f"{function}" in source, f"{path} has no {function}"


def test_every_top_folder_is_on_the_map() -> None:
    text = MAP.read_text("utf-8")
    for folder in ("protos", "agent", "coordinator", "trainers", "systemd", "tests", "bench"):
        assert f"`{folder}/" in text, f"{folder}/ is not on the map"


def test_a_changed_table_is_noticed() -> None:
    changed = MAP.read_text("utf-8").replace("queued --> active", "queued --> succeeded", 1)
    assert drawn(changed) != changed


if __name__ == "__main__":
    MAP.write_text(drawn(MAP.read_text("utf-8")), "utf-8")
