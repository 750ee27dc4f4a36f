"""How an answer looks: a table for a person, plain aligned columns for a pipe, one JSON document
for a program.

Problem: a table that is made to fit a terminal cuts things off, and in a pipe a cut id or reason is
a wrong id or reason. So there are two writers. On a terminal there is colour (rich), and only
columns that say so (a name, a sentence) may be shortened; ids never are. In a pipe every cell is
written whole, in columns two spaces apart, without a single escape code, and rich is not even
imported. What is not known is "-", never 0.

Texts come from jobs and nodes, so control characters are shown as U+FFFD: a job must not be able to
drive a terminal.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import click

UNKNOWN = "-"

GAP = "  "

# Below this, the beginning of a sentence says nothing any more.
SHORTENED_WIDTH_MIN = 16

# What a phase or an intent looks like on a terminal; everything else is plain.
_STYLES = {
    "active": "green",
    "running": "green",
    "up": "green",
    "succeeded": "green",
    "queued": "yellow",
    "held": "yellow",
    "cordoned": "yellow",
    "draining": "yellow",
    "suspect": "yellow",
    "stopping": "yellow",
    "unreachable": "yellow",
    "failed": "red",
    "lost": "red",
    "refused": "red",
}

_CONTROL = dict.fromkeys([*range(32), *range(127, 160)], "�") | {
    ord("\n"): " ",
    ord("\t"): " ",
}


class Column(NamedTuple):
    """One column. `shorten`: may lose its end on a narrow terminal. `width_max`: of such a column,
    in cells."""

    title: str
    right: bool = False
    shorten: bool = False
    width_max: int | None = None


def text(value: object) -> str:
    """A cell: "-" for what is not known or empty, and nothing that a terminal would obey."""
    if value is None or value == "":
        return UNKNOWN
    return str(value).translate(_CONTROL)


def write_json(document: Any) -> None:
    """One JSON document on one line."""
    import msgspec

    click.echo(msgspec.json.encode(document))


def write_notice(sentence: str) -> None:
    """A sentence of Baton's own beside the answer: stderr."""
    click.echo(f"baton: {sentence.translate(_CONTROL)}", err=True)


def write_table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout."""
    cells = [[text(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        _write_rich(columns, cells)
    else:
        _write_plain(columns, cells)


def write_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Names and values, one pair a line; pairs whose value is `None` or empty are left out."""
    known = [(name, text(value)) for name, value in fields if value not in (None, "")]
    width = max((len(name) for name, _ in known), default=0)
    if not sys.stdout.isatty():
        for name, value in known:
            click.echo(f"  {name:<{width}}  {value}")
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for name, value in known:
        line = Text.assemble("  ", (f"{name:<{width}}", "dim"), "  ", value)
        if name == "phase":
            word = value.partition(",")[0]
            line.highlight_words([word], _STYLES.get(word, ""))
        console.print(line, soft_wrap=True)


def _write_plain(columns: Sequence[Column], rows: list[list[str]]) -> None:
    lines = [[column.title for column in columns], *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        padded = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        ]
        click.echo(GAP.join(padded).rstrip())


def _write_rich(columns: Sequence[Column], rows: list[list[str]]) -> None:
    """Our own layout: rich's table gives up whole columns, ids among them, on a narrow terminal.

    When even the shortest form is too wide, the terminal breaks the line, and nothing is lost.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    titles = [column.title for column in columns]
    widths = [
        min(max(cell_len(line[index]) for line in [titles, *rows]), column.width_max or sys.maxsize)
        for index, column in enumerate(columns)
    ]
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - console.width
    for index in reversed(range(len(columns))):
        if columns[index].shorten and excess > 0:
            given_up = min(excess, max(0, widths[index] - SHORTENED_WIDTH_MIN))
            widths[index] -= given_up
            excess -= given_up
    for number, line in enumerate([titles, *rows]):
        parts = []
        for column, cell, width in zip(columns, line, widths, strict=True):
            # Text and not str: a name such as "[red]" is a name, not markup.
            part = Text(cell, style="bold" if number == 0 else _STYLES.get(cell, ""))
            part.truncate(width, overflow="ellipsis")
            part.align("right" if column.right else "left", width)
            parts.append(part)
        whole = Text(GAP).join(parts)
        whole.rstrip()
        console.print(whole, soft_wrap=True)


def count_words(words: Sequence[str]) -> str:
    """Each word once, in order, with how often it is there: "n1 x2, n2"."""
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{word} x{count}" if count > 1 else word for word, count in counts.items())
