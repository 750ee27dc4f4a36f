"""How `baton simulate` shows what came of it: rows, what changes by a question, and plots.

Problem: two runs that stand below one another are compared by eye, and wrongly. So with a question
each policy has a third row that says what it changed, in percent of what it was, and of shares of
time in points.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.cli.render import Column, write_json, write_notice, write_table
from coordinator.cli.settings import CommandFailed
from coordinator.cli.simulate_cases import AFTER, BEFORE

if TYPE_CHECKING:
    from coordinator.sim.model import Outcome
    from coordinator.sim.report import Figures
    from coordinator.sim.whatif import Case

    Results = dict[str, dict[str, tuple[Figures, Outcome]]]

CHANGE = "change"
MS_PER_H = 3_600_000
_COLUMNS = (
    Column("MEAN H", right=True),
    Column("P99 H", right=True),
    Column("WORST H", right=True),
    Column("MAKESPAN H", right=True),
    Column("FAIRNESS P99", right=True),
    Column("WORST", right=True),
    Column("BUSY", right=True),
    Column("WHILE ONE WAITS", right=True),
    Column("COST", right=True),
    Column("RESTARTS", right=True),
)


def write_figures(found: "Results") -> None:
    rows = []
    for name, by_case in found.items():
        for when, (each, _) in by_case.items():
            where = {"fleet": when} if AFTER in by_case else {}
            rows.append({"policy": name, **where, **dataclasses.asdict(each)})
    write_json(rows)


def write_rows(found: "Results") -> None:
    """With a question, what changes by it stands below. Of deadlines where there are some."""
    asks = any(AFTER in by_case for by_case in found.values())
    due = any(each.deadlines for by_case in found.values() for each, _ in by_case.values())
    rows: list[tuple[object, ...]] = []
    for name, by_case in found.items():
        for when, (each, _) in by_case.items():
            late = (f"{each.late} of {each.deadlines}",) if due else ()
            words = (name, *((when,) if asks else ()))
            rows.append((*words, *_cells(each), *late, each.trace_hash))
        if asks:
            before, after = by_case[BEFORE][0], by_case[AFTER][0]
            late = (f"{after.late - before.late:+d}",) if due else ()
            rows.append((name, CHANGE, *_changes(before, after), *late, ""))
    named = (Column("POLICY"), *((Column("FLEET", key=True),) if asks else ()))
    last = (*((Column("LATE", right=True),) if due else ()), Column("TRACE"))
    write_table((*named, *_COLUMNS, *last), rows)


def write_projects(found: "Results", cases: "Mapping[str, Case]") -> None:
    """Whose jobs gain by a quota, and whose lose: mean completion by project."""
    columns = [Column("POLICY"), Column("PROJECT", key=True), Column("JOBS", right=True)]
    columns += [Column(f"MEAN H {words.upper()}", right=True) for words in (BEFORE, AFTER, CHANGE)]
    rows = []
    projects = sorted({job.project for job in cases[BEFORE].jobs})
    for name, by_case in found.items():
        for project in projects:
            jobs = [job for job in cases[BEFORE].jobs if job.project == project]
            before, after = (
                sum(by_case[when][1].finished_ms[job.job_id] - job.arrival_ms for job in jobs)
                / len(jobs)
                / MS_PER_H
                for when in (BEFORE, AFTER)
            )
            change = f"{after / before - 1:+.1%}" if before else None
            cells = (f"{before:.2f}", f"{after:.2f}", change)
            rows.append((name, project, len(jobs), *cells))
    write_table(columns, rows)


def write_plots(folder: Path, found: "Results", cases: "Mapping[str, Case]") -> None:
    from coordinator.sim import plots

    runs = []
    for name, by_case in found.items():
        for when, (_, outcome) in by_case.items():
            case = cases[when]
            known = {job.job_id: job for job in case.jobs}
            label = f"{name}, {when}" if AFTER in cases else name
            runs.append(plots.Shown(label, outcome, known, case.fleet))
    drawn = plots.files(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in drawn.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"{folder} cannot be written ({error.strerror or error})") from error
    write_notice(f"plots: {len(drawn)} files in {folder}")


def _cells(found: "Figures") -> tuple[object, ...]:
    return (
        *(f"{hours:.2f}" for hours in _hours(found)),
        *(f"{ratio:.2f}" for ratio in (found.fairness.p99, found.fairness.worst)),
        *(f"{ratio:.1%}" for ratio in (found.busy_ratio, found.busy_waiting_ratio)),
        f"{found.provisioned_cost:.0f}",
        found.restarts,
    )


def _hours(found: "Figures") -> tuple[float, ...]:
    spread = found.completion_h
    return spread.mean, spread.p99, spread.worst, found.makespan_h


def _changes(before: "Figures", after: "Figures") -> tuple[object, ...]:
    """Percent of what it was; of shares of time, points."""

    def relative(one: float, other: float) -> str | None:
        return f"{other / one - 1:+.1%}" if one else None

    pairs = zip(_hours(before), _hours(after), strict=True)
    return (
        *(relative(one, other) for one, other in pairs),
        relative(before.fairness.p99, after.fairness.p99),
        relative(before.fairness.worst, after.fairness.worst),
        f"{100 * (after.busy_ratio - before.busy_ratio):+.1f}",
        f"{100 * (after.busy_waiting_ratio - before.busy_waiting_ratio):+.1f}",
        relative(before.provisioned_cost, after.provisioned_cost),
        f"{after.restarts - before.restarts:+d}",
    )
