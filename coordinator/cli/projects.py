"""`baton projects`: how each project stands by its quota.

Problem: "why does their job run and mine wait" is a question between teams, and one table that both
can read answers it: what each is due, what it has used of late, and who has what of whom. All GPUs
in it are weighted by type, so a line adds up whatever the cards are.
"""

import click

from coordinator.cli.render import Column, write_json, write_notice, write_table
from coordinator.cli.settings import common_options, connect, settings_of

_COLUMNS = (
    Column("PROJECT", shorten=True),
    Column("QUOTA H/DAY", right=True),
    Column("USED H", right=True),
    Column("ENTITLED", right=True),
    Column("RUNNING", right=True),
    Column("BORROWED", right=True),
    Column("LENT", right=True),
    Column("WAITING", right=True),
    Column("JOBS", right=True),
)


@click.command(short_help="Show quotas, what was used, and who borrows.")
@common_options
@click.pass_context
def projects(context: click.Context) -> None:
    """Show how projects stand by their quotas.

    A project is what `baton submit --project` names. Its quota stands in the coordinator's
    configuration ([projects.NAME], gpu_hours_per_day). Within a class jobs within their project's
    quota come first; what it leaves idle is lent to the others, and recalled with a checkpoint.

    QUOTA is what a project is due, in GPU-hours a day; "-": it has none. USED is what it has used,
    of which half is forgotten after the time that stands below the table. ENTITLED is how many GPUs
    it may have now before others of the same class, RUNNING how many it has, BORROWED how many of
    these it gives back when somebody within a quota wants them, and LENT how many of its own others
    have. WAITING is what its waiting jobs want; JOBS are those that run and those that wait, as in
    "3+1". `baton explain JOB` says what this means for one job.

    Hours and GPUs are those of an H100, of which other types count a part.

    \b
    Example:
      baton projects
    """
    with connect(context) as client:
        report = client.projects()
    if settings_of(context).as_json:
        write_json(report)
        return
    rows = [
        (
            project.name,
            _number(project.quota_gpu_hours_per_day),
            _number(project.used_gpu_hours),
            _number(project.entitled_gpus),
            _number(project.running_gpus),
            _number(project.borrowed_gpus),
            _number(project.lent_gpus),
            _number(project.waiting_gpus),
            f"{project.running_jobs}+{project.waiting_jobs}",
        )
        for project in report.projects
    ]
    if not rows:
        write_notice("no project has a job yet, and none has a quota")
        return
    write_table(_COLUMNS, rows)
    write_notice(f"half of what was used is forgotten after {report.half_life_hours:.1f} h")


def _number(value: float | None) -> str | None:
    """One digit behind the point, and none where that is 0 or the number is large."""
    if value is None:
        return None
    return f"{value:.1f}".removesuffix(".0") if value < 99.95 else f"{value:.0f}"
