"""docs/events.md names every event and field, in the words of the code.

`python -m tests.events.test_documents` writes its tables anew.
"""

import re
from pathlib import Path

from agent.journald import message_id
from tests.events.test_code import PROGRAMS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/events.md"


def table(program: str) -> str:
    """Two tables: the events, and what their fields mean."""
    events, glossary = PROGRAMS[program]
    rows = ["| event | level | msg | fields | meaning | MESSAGE_ID |", "|---|---|---|---|---|---|"]
    for event in events.values():
        fields = ", ".join(event.fields.split())
        msg = event.msg.replace("|", "\\|")
        rows.append(
            f"| `{event.name}` | {event.level} | {msg} | {fields} | {event.meaning} "
            f"| `{message_id(event.name)}` |"
        )
    rows += ["", "| field | meaning |", "|---|---|"]
    rows += [f"| `{name}` | {meaning} |" for name, meaning in glossary.items()]
    return "\n".join(rows) + "\n"


def written(text: str) -> str:
    """The document with every table as the code has it now."""
    for program in PROGRAMS:
        block = re.compile(rf"(<!-- events:{program} -->\n).*?(<!-- events:end -->)", re.DOTALL)
        made = table(program).replace("\\", r"\\")
        text, count = block.subn(rf"\g<1>\n{made}\n\g<2>", text)
        if count != 1:
            raise ValueError(f"docs/events.md has {count} places for the events of {program}")
    return text


def test_the_tables_are_the_code() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert written(text) == text, "run: python -m tests.events.test_documents"


def test_a_changed_row_is_noticed() -> None:
    changed = DOCUMENT.read_text("utf-8").replace(
        "| `attempt.exited` | info", "| `attempt.exited` |"
    )
    assert written(changed) != changed


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text("utf-8")), "utf-8")
