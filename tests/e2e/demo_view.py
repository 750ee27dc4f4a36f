"""What the demo shows while it runs: plain lines, and on a terminal a table that stays below them.

Problem: a live display is pleasant on a terminal and garbage in a file. So everything that happens
is one plain line with the seconds since the start, and the table of jobs and nodes exists only
where rich finds a terminal; elsewhere a line of figures every few seconds takes its place.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

FIGURES_EVERY_S = 5.0
BAR_CELLS = 24


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as the display needs it; `step` is -1 before its first."""

    id: int
    name: str
    phase: str
    node: str
    step: int
    total_steps: int
    loss: float | None
    checkpoint_step: int
    replicas: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node as the display needs it."""

    id: str
    gpu: str
    phase: str
    reason: str
    attempts: tuple[str, ...]


class View:
    """Use as a context manager. `as_json` keeps stdout free for the summary."""

    def __init__(self, *, as_json: bool) -> None:
        stream: TextIO = sys.stderr if as_json else sys.stdout
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._began_s = time.monotonic()
        self._figures_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end_table()

    def title(self, text: str) -> None:
        """A heading with a line of space above it."""
        self._print(Text(f"\n{text}", style="bold"))

    def text(self, line: str = "") -> None:
        """A line as it is."""
        self._print(Text(line))

    def command(self, line: str) -> None:
        """What a user would type."""
        self._print(Text(f"  $ {line}", style="cyan"))

    def happened(self, line: str, *, style: str = "") -> None:
        """A line with its time."""
        elapsed_s = time.monotonic() - self._began_s
        self._print(Text(f"  {elapsed_s:6.1f} s  {line}", style=style))

    def show(self, jobs: Sequence[JobRow], nodes: Sequence[NodeRow]) -> None:
        """The present state: the table, or now and then a line."""
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=8, transient=True)
                self._live.start()
            self._live.update(Group(Text(), _jobs_table(jobs), Text(), _nodes_table(nodes)))
            return
        now_s = time.monotonic()
        if now_s - self._figures_s >= FIGURES_EVERY_S:
            self._figures_s = now_s
            silent = {node.id for node in nodes if node.phase in ("suspect", "lost")}
            training = [
                _figures(job)
                for job in jobs
                if job.phase == "active" and job.step >= 0 and job.node not in silent
            ]
            if training:
                self.happened("; ".join(training))

    def end_table(self) -> None:
        """Take the table away; what follows are lines again."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: Text) -> None:
        self._console.print(text)


def _figures(job: JobRow) -> str:
    parts = [f"{job.name} on {job.node}: step {job.step} of {job.total_steps}"]
    if job.loss is not None:
        parts.append(f"loss {job.loss:.3g}")
    if job.replicas:
        parts.append(f"checkpoint {job.checkpoint_step} on {' and '.join(job.replicas)}")
    return ", ".join(parts)


def _jobs_table(jobs: Sequence[JobRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("  JOB", "PHASE", "NODE", "STEP", "", "LOSS", "LAST CHECKPOINT"):
        table.add_column(title, no_wrap=True)
    for job in jobs:
        ratio = max(job.step, 0) / job.total_steps if job.total_steps else 0.0
        filled = round(ratio * BAR_CELLS)
        table.add_row(
            f"  {job.id} {job.name}",
            job.phase,
            job.node,
            f"{job.step}/{job.total_steps}" if job.step >= 0 else "-",
            Text("━" * filled, style="green") + Text("━" * (BAR_CELLS - filled), style="dim"),
            f"{job.loss:.3g}" if job.loss is not None else "-",
            f"{job.checkpoint_step} on {', '.join(job.replicas)}" if job.replicas else "-",
        )
    return table


def _nodes_table(nodes: Sequence[NodeRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("  NODE", "GPU", "PHASE", "RUNS"):
        table.add_column(title, no_wrap=True)
    for node in nodes:
        style = "red" if node.phase == "lost" else ""
        runs = ", ".join(f"attempt {attempt}" for attempt in node.attempts) or "-"
        table.add_row(f"  {node.id}", node.gpu, node.phase, runs, style=style)
    return table
