"""A table on a terminal: nothing is lost, however narrow it is.

Problem: rich's own table gives up whole columns, ids among them, when there is no room, and a line
that the terminal breaks is no row any more. So a table that is too wide gives way in this order:
titles break between words, sentences go on below, names lose their end (with a "…"), and columns
that still have no place stand in another block, beside the names of their rows, as R and pandas
print wide tables. Ids and figures are never touched. Only when one column beside the names is too
wide does the terminal break the line.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from coordinator.cli.render import UNKNOWN

if TYPE_CHECKING:
    from coordinator.cli.render import Column

# Below this, the beginning of a name says nothing any more.
SHORTENED_WIDTH_MIN = 16
# Below this, a sentence is a list of words.
WRAPPED_WIDTH_MIN = 24


class _Need(NamedTuple):
    """Of a column, in cells of the terminal: as it is, with its title broken, and at least."""

    whole: int
    folded: int
    least: int
    is_empty: bool


def write(
    columns: "Sequence[Column]", rows: Sequence[Sequence[str]], gap: str, styles: Mapping[str, str]
) -> None:
    """On stdout. `styles` by cell: what a phase or an intent looks like."""
    console = Console(highlight=False)
    needs = [_need(column, [row[at] for row in rows]) for at, column in enumerate(columns)]
    for number, block in enumerate(_blocks(columns, needs, console.width, len(gap))):
        if number:
            console.print()
        titles = [_lines(console, Text(columns[at].title, "bold"), width) for at, width in block]
        # They stand on the row below them, so they end on one line.
        height = max(map(len, titles))
        lines = [[Text()] * (height - len(title)) + title for title in titles]
        _print(console, columns, block, lines, gap)
        for row in rows:
            lines = []
            for at, width in block:
                # Text and not str: a name such as "[red]" is a name, not markup.
                cell = Text(row[at], styles.get(row[at], ""))
                if columns[at].shorten:
                    cell.truncate(width, overflow="ellipsis")
                lines.append(_lines(console, cell, width))
            _print(console, columns, block, lines, gap)


def _need(column: "Column", cells: Sequence[str]) -> _Need:
    inside = max(map(cell_len, cells), default=0)
    inside = min(inside, column.width_max or inside)
    folded = max(inside, *map(cell_len, column.title.split()))
    least = folded
    if column.shorten or column.wrap:
        least = min(folded, WRAPPED_WIDTH_MIN if column.wrap else SHORTENED_WIDTH_MIN)
    is_empty = set(cells) == {UNKNOWN}
    return _Need(max(inside, cell_len(column.title)), folded, least, is_empty)


def _blocks(
    columns: "Sequence[Column]", needs: Sequence[_Need], width: int, gap: int
) -> list[list[tuple[int, int]]]:
    """The columns that stand beside one another, each with its width. One in which nothing is
    known, and that has no place beside others, says nothing in a block of its own."""
    keys = [at for at, column in enumerate(columns) if at == 0 or column.key]
    found = [list(keys)]
    for at in range(len(columns)):
        if at in keys:
            continue
        least = sum(needs[each].least + gap for each in [*found[-1], at])
        if least - gap > width and len(found[-1]) > len(keys):
            if needs[at].is_empty:
                continue
            found.append(list(keys))
        found[-1].append(at)
    return [
        list(zip(block, _widths([needs[at] for at in block], width, gap), strict=True))
        for block in found
    ]


def _widths(needs: Sequence[_Need], width: int, gap: int) -> list[int]:
    room = width - gap * (len(needs) - 1)
    if sum(need.whole for need in needs) <= room:
        return [need.whole for need in needs]
    widths = [need.folded for need in needs]
    for at in reversed(range(len(needs))):
        excess = max(0, sum(widths) - room)
        widths[at] -= min(excess, widths[at] - needs[at].least)
    return widths


def _lines(console: Console, cell: Text, width: int) -> list[Text]:
    lines = list(cell.wrap(console, width))
    for line in lines:
        line.rstrip()
    return lines


def _print(
    console: Console,
    columns: "Sequence[Column]",
    block: Sequence[tuple[int, int]],
    lines: Sequence[Sequence[Text]],
    gap: str,
) -> None:
    for parts in zip_longest(*lines, fillvalue=Text()):
        line = []
        for (at, width), part in zip(block, parts, strict=True):
            field = part.copy()
            field.align("right" if columns[at].right else "left", width)
            line.append(field)
        whole = Text(gap).join(line)
        whole.rstrip()
        console.print(whole, soft_wrap=True)
