"""README and docs: links lead somewhere, and commands that are shown exist.

A heading that is renamed, a page that is moved or an option that is gone would else be found by a
reader.
"""

import re
from pathlib import Path

import click
import pytest

from coordinator.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))

FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"`(baton [a-z][^`]*)`|^ *(?:\$ )?(baton [a-z].*)$", re.MULTILINE)


def anchors(page: str) -> set[str]:
    """The headings of a page as GitHub makes anchors of them."""
    headings = re.findall(r"^#{1,6} (.+)$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, page: str) -> list[str]:
    """Relative links of a page to no file, or to no heading of one."""
    broken = []
    for link in LINK.findall(FENCE.sub("", page)):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if link.startswith("https://"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            broken.append(link)
    return broken


def wrong_words(line: str) -> list[str]:
    """Words of a `baton` line that are no command or option of the real one."""
    words = re.split(r" -- | --$|  | #", " ".join(line.split("\n")))[0].split()[1:]
    command: click.Command = cli
    known = {"-h", "--help"}
    wrong = []
    for word in words:
        known |= {name for option in command.params for name in option.opts}
        known |= {name for option in command.params for name in option.secondary_opts}
        if word.startswith("-"):
            wrong += [word] if word.split("=")[0] not in known else []
        elif isinstance(command, click.Group):
            within = command.get_command(click.Context(command), word)
            wrong += [word] if within is None and command is cli else []
            command = within or command
    return wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path, path.read_text("utf-8")) == []


def test_commands_exist_with_their_options() -> None:
    shown = 0
    for path in DOCUMENTS:
        if path.name == "ARCHITECTURE.md":  # its picture has several in a line
            continue
        for inline, whole in COMMAND.findall(path.read_text("utf-8")):
            shown += 1
            assert wrong_words(inline or whole) == [], f"{path.name}: {inline or whole}"
    assert shown > 150


def test_what_leads_nowhere_is_found() -> None:
    readme = ROOT / "README.md"
    assert broken_links(readme, "[a](docs/none.md) [b](docs/try.md#none)") == [
        "docs/none.md",
        "docs/try.md#none",
    ]
    assert broken_links(readme, "[a](docs/try.md) [b](docs/events.md#traces)") == []
    assert wrong_words("baton sumbit") == ["sumbit"]
    assert wrong_words("baton submit --gpu 1 --gpus 1 -- python --x") == ["--gpu"]
    assert wrong_words("baton scale list  # --what") == []
