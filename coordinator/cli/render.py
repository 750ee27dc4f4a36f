"""How an answer looks: a table for a person, plain aligned columns for a pipe, one JSON document
for a program.

Problem: a table that is made to fit a terminal cuts things off, and in a pipe a cut id or reason is
a wrong id or reason. So there are two writers. On a terminal there is colour, and what is too wide
gives way (`terminal.py`); ids and figures never do. In a pipe every cell is written whole, in
columns two spaces apart, without a single escape code, and rich is not even imported. What is not
known is "-", never 0.

Texts come from jobs and nodes, so control characters are shown as U+FFFD: a job must not be able to
drive a terminal.
"""

import contextlib
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import click

from coordinator.cli.settings import CommandFailed

UNKNOWN = "-"

GAP = "  "

# How often somebody who reads a log is told how far it is.
TOLD_EVERY_S = 10.0
# Less than this, and no line has two words.
WIDTH_MIN = 20
_COMMAND = re.compile(r"`[^`]*`")
_GLUE = "\ue000"  # of nobody's alphabet

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
    """One column. On a narrow terminal `shorten` may lose its end, and `wrap` go on in a next line.
    `width_max`: of such a column, in cells. `key`: names the row, as the first column always does.
    """

    title: str
    right: bool = False
    shorten: bool = False
    width_max: int | None = None
    wrap: bool = False
    key: bool = False


def text(value: object) -> str:
    """A cell: "-" for what is not known or empty, and nothing that a terminal would obey."""
    if value is None or value == "":
        return UNKNOWN
    return str(value).translate(_CONTROL)


def write_json(document: Any) -> None:
    """One JSON document on one line."""
    import msgspec

    click.echo(msgspec.json.encode(document))


def write_notice(sentence: str, *, whole: bool = False) -> None:
    """A sentence of Baton's own beside the answer: stderr. `whole`: to be copied as it is."""
    said = f"baton: {sentence.translate(_CONTROL)}"
    click.echo(said if whole else _wrapped(said, sys.stderr), err=True)


def write_sentence(sentence: str) -> None:
    """An answer in words: stdout."""
    click.echo(_wrapped(sentence.translate(_CONTROL), sys.stdout))


@contextlib.contextmanager
def progress(steps: int, what: str) -> Iterator[Callable[[int], None]]:
    """It is told how many steps more are done, and shows it on stderr to whoever waits: a bar at a
    terminal, and else a sentence now and then."""
    if not sys.stderr.isatty():
        yield _now_and_then(steps, what)
        return
    with click.progressbar(
        length=steps, label=what, file=sys.stderr, update_min_steps=max(1, steps // 100)
    ) as bar:
        yield bar.update


def _now_and_then(steps: int, what: str) -> Callable[[int], None]:
    done, told_s = 0, time.monotonic()

    def passed(more: int) -> None:
        nonlocal done, told_s
        done += more
        now_s = time.monotonic()
        if now_s - told_s >= TOLD_EVERY_S:
            told_s = now_s
            write_notice(f"{what}: {100 * done // steps}% done")

    return passed


def _wrapped(sentence: str, stream: TextIO, indent: str = GAP) -> str:
    """On a terminal lines break between words, and in no `command`, which somebody may copy."""
    if not stream.isatty():
        return sentence
    import shutil
    import textwrap

    glued = _COMMAND.sub(lambda found: found[0].replace(" ", _GLUE), sentence)
    lines = textwrap.wrap(
        glued,
        max(WIDTH_MIN, shutil.get_terminal_size().columns),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace(_GLUE, " ")


def write_file(path: Path, content: str) -> None:
    """Raises `CommandFailed`."""
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"{path} cannot be written ({error.strerror or error})") from error


def write_plot(path: Path, svg: str) -> None:
    """And say where. Raises `CommandFailed`."""
    write_file(path, svg)
    write_notice(f"plot: {path}")


def write_table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout."""
    cells = [[text(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        from coordinator.cli import terminal  # rich takes its time

        terminal.write(columns, cells, GAP, _STYLES)
    else:
        _write_plain(columns, cells)


def write_fields(fields: Iterable[tuple[str, object]], copied: Sequence[str] = ()) -> None:
    """Names and values; pairs whose value is `None` or empty are left out. The values of `copied`
    are one line each, since somebody may copy them; others go on below themselves."""
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
        said = f"  {name:<{width}}  {value}"
        line = Text(said if name in copied else _wrapped(said, sys.stdout, " " * (width + 4)))
        line.stylize("dim", 2, 2 + len(name))
        if name == "phase":
            word = value.partition(",")[0]
            line.highlight_words([word], _STYLES.get(word, ""))
        console.print(line, soft_wrap=True)


def _write_plain(columns: Sequence[Column], rows: list[list[str]]) -> None:
    lines = [[column.title for column in columns], *rows]
    widths = [max(_cells(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        padded = []
        for column, cell, width in zip(columns, line, widths, strict=True):
            space = " " * (width - _cells(cell))
            padded.append(space + cell if column.right else cell + space)
        click.echo(GAP.join(padded).rstrip())


def _cells(cell: str) -> int:
    """How many places it takes where it is looked at in the end: some letters take two, and marks
    on a letter none."""
    if cell.isascii():
        return len(cell)
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in cell)
    return len(cell) + wide - sum(map(bool, map(unicodedata.combining, cell)))


def count_words(words: Sequence[str]) -> str:
    """Each word once, in order, with how often it is there: "n1 x2, n2"."""
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{word} x{count}" if count > 1 else word for word, count in counts.items())
