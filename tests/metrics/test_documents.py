"""docs/metrics.md names every metric, with the unit and the words of the code.

`python -m tests.metrics.test_documents` writes its tables anew.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from agent.metrics import DCGM_METRICS
from agent.metrics import METRICS as AGENT_METRICS
from coordinator.metrics import METRICS as COORDINATOR_METRICS
from tests.metrics.names import UNITS, Described, unit

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/metrics.md"
TABLES: dict[str, Iterable[Described]] = {
    "agent": AGENT_METRICS,
    "dcgm": DCGM_METRICS,
    "coordinator": COORDINATOR_METRICS,
}


def table(metrics: Iterable[Described]) -> str:
    """One row for each metric."""
    rows = ["| metric | type | labels | unit | meaning |", "|---|---|---|---|---|"]
    for one in metrics:
        shown = UNITS.get(unit(one.name), "")
        rows.append(
            f"| `{one.name}` | {one.kind} | {', '.join(one.labels)} | {shown} | {one.help} |"
        )
    return "\n".join(rows) + "\n"


def written(text: str) -> str:
    """The document with every table as the code has it now."""
    for name, metrics in TABLES.items():
        block = re.compile(rf"(<!-- metrics:{name} -->\n).*?(<!-- metrics:end -->)", re.DOTALL)
        made = table(metrics).replace("\\", r"\\")
        text, count = block.subn(rf"\g<1>\n{made}\n\g<2>", text)
        if count != 1:
            raise ValueError(f"docs/metrics.md has {count} places for the table {name}")
    return text


def test_the_tables_are_the_code() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert written(text) == text, "run: python -m tests.metrics.test_documents"


def test_a_changed_row_is_noticed() -> None:
    changed = DOCUMENT.read_text("utf-8").replace(
        "| `baton_gpu_power_watts`", "| `baton_gpu_power`"
    )
    assert written(changed) != changed


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text("utf-8")), "utf-8")
