"""Where a job's time went, for people: its goodput, a bar, and a legend of what is in the bar.

Problem: nine numbers are a table that nobody reads, and a single percentage does not say what to
do about it. A bar shows at a glance what is large. It has to be readable without colour too (in a
pipe, in a log, on a terminal that was told so), so every part has a letter of its own: the bar is
made of the letters, and on a terminal of blocks in the part's colour.

A bar of forty cells cannot show a part of a hundredth. Cells go to the parts by the largest
remainder (Hamilton's method), so that they always fill the bar; what gets none is in the legend.
"""

import sys
from typing import TYPE_CHECKING, NamedTuple

import click

from coordinator.cli.render import write_sentence
from coordinator.cli.units import format_seconds

if TYPE_CHECKING:
    from coordinator.cli.values import Accounting

BAR_CELLS = 50
# Less than this is what is left over when floating-point numbers are subtracted.
SHOWN_SECONDS_MIN = 0.0005
# The trainer's clock and ours never agree to the last digit; a difference above this is worth a
# sentence.
OVERSTATED_SHOWN_RATIO = 1.01


class Part(NamedTuple):
    """`field` of the account, its word, its letter and its colour."""

    field: str
    word: str
    letter: str
    style: str


PARTS = (
    Part("productive_seconds", "productive", "#", "green"),
    Part("input_wait_seconds", "input wait", "w", "yellow"),
    Part("capture_seconds", "capture", "c", "cyan"),
    Part("recompute_seconds", "recompute", "r", "red"),
    Part("detect_seconds", "detect", "d", "magenta"),
    Part("schedule_seconds", "schedule", "q", "blue"),
    Part("start_seconds", "start", "s", "bright_yellow"),
    Part("restore_seconds", "restore", "f", "bright_cyan"),
    Part("idle_seconds", "idle", ".", "bright_black"),
)


def percent(ratio: float | None) -> str:
    """With one digit; something is never shown as nothing, nor almost all of it as all of it."""
    if ratio is None:
        return ""
    if 0 < ratio < 0.0005:
        return "<0.1%"
    if 0.9995 <= ratio < 1:
        return ">99.9%"
    return f"{ratio:.1%}"


def duration(seconds: float) -> str:
    """The largest two units, and a digit behind the point below ten seconds."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    return format_seconds(round(seconds))


def cells(account: "Accounting", count: int) -> list[tuple[Part, int]]:
    """How many cells of `count` each part gets, in order; they add up, unless there is no time."""
    if account.wall_seconds <= 0:
        return []
    exact = [
        max(0.0, getattr(account, part.field)) / account.wall_seconds * count for part in PARTS
    ]
    given = [int(value) for value in exact]
    by_remainder = sorted(range(len(PARTS)), key=lambda index: given[index] - exact[index])
    for index in by_remainder[: max(0, count - sum(given))]:
        given[index] += 1
    return [(part, cell_count) for part, cell_count in zip(PARTS, given, strict=True) if cell_count]


def legend(account: "Accounting") -> list[tuple[Part, str]]:
    """The parts that are not zero, with a line for each."""
    shown = [
        (part, getattr(account, part.field))
        for part in PARTS
        if getattr(account, part.field) >= SHOWN_SECONDS_MIN
    ]
    return [
        (part, f"{part.word:<10}  {duration(value):>6}  {percent(value / account.wall_seconds):>6}")
        for part, value in shown
    ]


def remarks(account: "Accounting") -> list[str]:
    """What a reader has to know to believe it."""
    found = []
    if not account.measured:
        found.append("a trainer does not say its times: all of it after its start counts as steps")
    if account.overstated_ratio >= OVERSTATED_SHOWN_RATIO:
        found.append(
            f"a trainer's own times were {account.overstated_ratio:.2f} times as long as the time"
            " that there was; they are divided by that"
        )
    return found


def write_goodput(account: "Accounting") -> None:
    """Headline, bar, legend and remarks on stdout."""
    head = f"goodput {percent(account.goodput_ratio)} of {duration(account.wall_seconds)}"
    parts, lines = cells(account, BAR_CELLS), legend(account)
    if sys.stdout.isatty():
        _write_rich(head, parts, lines)
    else:
        click.echo(head)
        click.echo(f"  [{''.join(part.letter * count for part, count in parts)}]")
        for part, line in lines:
            click.echo(f"  {part.letter}  {line}")
    for sentence in remarks(account):
        write_sentence(f"  ({sentence})")


def _write_rich(head: str, parts: list[tuple[Part, int]], lines: list[tuple[Part, str]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    plain = console.no_color
    console.print(Text(head, style="bold"), soft_wrap=True)
    blocks = [(part.letter * count if plain else "█" * count, part.style) for part, count in parts]
    console.print(Text.assemble("  ", *blocks), soft_wrap=True)
    for part, line in lines:
        mark = part.letter if plain else "■"
        console.print(Text.assemble("  ", (mark, part.style), f"  {line}"), soft_wrap=True)
