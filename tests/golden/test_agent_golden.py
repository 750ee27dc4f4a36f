"""Scenarios of one node, in a form that a reviewer reads like a protocol trace.

After a wanted change, `BATON_GOLDEN=write pytest tests/golden` writes what the core does now below
each command, and the difference in version control is the review. The language stands in
`agent_script.py`.
"""

import os
from pathlib import Path

import pytest

from tests.golden.agent_script import World

SCENARIOS = sorted(Path(__file__).with_name("agent").glob("*.txt"))


def play(text: str) -> str:
    """The scenario with everything that the core answers below each command."""
    world = World()
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("  "):
            continue  # an answer of the last time
        lines.append(line)
        if line.startswith("> "):
            lines += [f"  {answer}" for answer in world.run(line.removeprefix("> "))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    expected = path.read_text("utf-8")
    got = play(expected)
    if os.environ.get("BATON_GOLDEN") == "write":
        path.write_text(got, "utf-8")
    else:
        assert got.splitlines() == expected.splitlines()


def test_every_command_is_answered_for() -> None:
    """A scenario that was never written out would pass without saying anything."""
    assert SCENARIOS
    for path in SCENARIOS:
        lines = path.read_text("utf-8").splitlines()
        assert any(line.startswith("  ") for line in lines), path.name
