"""What every benchmark prints: a table for people, or one JSON list of rows for programs.

Problem: a number without a reference says nothing, one without its goal is read as a success, and a
single run is an anecdote. So a row carries reference, source, goal and verdict, and a figure that
was measured several times is its median with the lowest and the highest beside it. A missed goal is
printed as missed.

`ratio` is how many times better than the reference the value is: reference / value where less is
better, value / reference where more is. In JSON the spread of a row are two more rows, named
"<name>, lowest" and "<name>, highest", so that every row has the same keys.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

TABLE_COLUMNS = 150  # of a table that is written to a file or a pipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure. `reference` and `goal` are in the row's unit; `low` and `high` are the spread."""

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    reference_source: str = ""
    goal: float | None = None
    more_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        """Times better than the reference; above 1 is better. None without a reference."""
        if not self.reference or not self.value:
            return None
        return self.value / self.reference if self.more_is_better else self.reference / self.value

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.more_is_better else self.value <= self.goal


@dataclass(frozen=True, slots=True)
class Options:
    """What every benchmark is asked: `json` rows instead of a table, `quick` under a minute."""

    json: bool
    quick: bool


@dataclass(frozen=True, slots=True)
class Data:
    """Data that is not part of Baton: the option that names its folder, the variable that does so
    for all benchmarks, and what lies there."""

    flag: str
    variable: str
    what: str


DEMAND = Data("--demand", "BATON_BENCH_DEMAND", "the series as CSV")
GAVEL = Data("--gavel", "BATON_BENCH_GAVEL", "Gavel's traces and tables")


def parser(module_docstring: str | None) -> argparse.ArgumentParser:
    """The common arguments; a benchmark may add its own."""
    title = (module_docstring or "").strip().split("\n")[0]
    made = argparse.ArgumentParser(description=title)
    made.add_argument("--json", action="store_true", help="one JSON list of rows, nothing else")
    made.add_argument("--quick", action="store_true", help="fewer repetitions, under a minute")
    return made


def options(arguments: argparse.Namespace) -> Options:
    return Options(arguments.json, arguments.quick)


def data_option(made: argparse.ArgumentParser, data: Data) -> None:
    """A `Path`, or None where neither flag nor variable names one."""
    made.add_argument(
        data.flag,
        type=Path,
        default=os.environ.get(data.variable) or None,
        help=f"folder with {data.what} [{data.variable}]",
    )


def nothing_measured(bench: str, file: str, data: Data, asked: Options) -> None:
    """What `bench` says where the folder does not have its data, of which `file` is one."""
    say(
        f"bench.{bench} needs {file} (see the head of bench/{bench}.py): say where with"
        f" {data.flag} FOLDER or {data.variable}; nothing was measured"
    )
    if asked.json:
        print("[]")


def row_of(
    name: str,
    samples: Sequence[float],
    unit: str,
    *,
    goal: float | None = None,
    reference: float | None = None,
    source: str = "",
) -> Row:
    """The median of at least one sample, with its spread. `source` is that of the reference."""
    return Row(
        name=name,
        value=statistics.median(samples),
        unit=unit,
        low=min(samples) if len(samples) > 1 else None,
        high=max(samples) if len(samples) > 1 else None,
        goal=goal,
        reference=reference,
        reference_source=source,
    )


def percentile(samples: Sequence[float], ratio: float) -> float:
    """The smallest sample that is not below `ratio` (0 to 1) of all of them."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(ratio * len(ordered)) - 1))]


def say(line: str) -> None:
    """Progress, for the person who waits; on stderr, so that JSON stays JSON."""
    print(line, file=sys.stderr, flush=True)


def show(title: str, rows: Sequence[Row], asked: Options, notes: Sequence[str] = ()) -> None:
    """Print the result as it was asked for."""
    if asked.json:
        print(json.dumps([entry for row in rows for entry in _entries(row)]))
        return
    console = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("figure", "median (spread)", "unit", "goal", "reference", "times better"):
        justify = "left" if heading in ("figure", "unit", "reference") else "right"
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        verdict = {None: "", True: " met", False: " MISSED"}[row.met]
        bound = ">=" if row.more_is_better else "<="
        table.add_row(
            row.name,
            number(row.value) + _spread(row),
            row.unit,
            "" if row.goal is None else f"{bound} {number(row.goal)}{verdict}",
            "" if row.reference is None else f"{number(row.reference)}, {row.reference_source}",
            "" if row.ratio is None else number(row.ratio),
        )
    console.print(table)
    for note in (*notes, machine()):
        console.print(note, highlight=False, soft_wrap=True, markup=False)


def number(value: float) -> str:
    """Three significant digits are all that a benchmark knows."""
    if value == 0 or abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def machine() -> str:
    """Where this ran, in one line."""
    try:
        load = f"load average {os.getloadavg()[0]:.1f}"
    except OSError:
        load = "load average unknown"
    return (
        f"machine: {os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}, {load} at the end"
    )


def _spread(row: Row) -> str:
    if row.low is None or row.high is None:
        return ""
    return f" ({number(row.low)} to {number(row.high)})"


def _entries(row: Row) -> list[dict[str, object]]:
    entry: dict[str, object] = {
        "name": row.name,
        "value": row.value,
        "unit": row.unit,
        "reference": row.reference,
        "reference_source": row.reference_source,
        "ratio": row.ratio,
        "goal": row.goal,
        "met": row.met,
    }
    found = [entry]
    plain = dict.fromkeys(("reference", "ratio", "goal", "met"))
    for end, value in (("lowest", row.low), ("highest", row.high)):
        if value is not None:
            spread = {**entry, **plain, "reference_source": ""}
            found.append({**spread, "name": f"{row.name}, {end}", "value": value})
    return found
