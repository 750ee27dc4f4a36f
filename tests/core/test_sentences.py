"""Counts in sentences: one of a thing, and several."""

import ast
import re
from pathlib import Path

import pytest

import coordinator
from coordinator.core import foresight
from coordinator.core.sentences import listed, quantity

ROOT = Path(coordinator.__file__).parent
# After a figure that may be 1 these are wrong; "1 of 8 ranks" and "2 ranks at least" are not.
PLURALS = re.compile(r"^ (GPUs|nodes|jobs|attempts|runs|checkpoints) (are|of|wait|run|need)\b")


def test_one_and_several() -> None:
    assert quantity(1, "GPU") == "1 GPU"
    assert [quantity(n, "GPU is", "GPUs are") for n in (0, 1, 2)] == [
        "0 GPUs are", "1 GPU is", "2 GPUs are",
    ]  # fmt: skip


def test_lists() -> None:
    assert [listed(words) for words in ((), "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]


def test_spans_have_the_unit_that_people_count_them_in() -> None:
    hours = (-1, 1 / 60, 1, 27.6, 47.9, 48, 277.8, 60_611.8)
    assert [foresight.seconds(h * 3600) for h in hours] == [
        "0 s", "60 s", "60 min", "27.6 h", "47.9 h", "2.0 days", "11.6 days", "2525 days",
    ]  # fmt: skip


@pytest.mark.long
def test_no_sentence_counts_with_a_plural_of_its_own() -> None:
    """An f-string whose figure is followed by such a plural has not asked for the singular."""
    found = []
    for path in sorted([*ROOT.glob("core/*.py"), *ROOT.glob("cli/*.py")]):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.JoinedStr):
                continue
            for before, after in zip(node.values, node.values[1:], strict=False):
                words = after.value if isinstance(after, ast.Constant) else ""
                if isinstance(before, ast.FormattedValue) and PLURALS.match(str(words)):
                    found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
