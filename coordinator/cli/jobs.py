"""`baton jobs`, `job`, `events`, `explain`: a look at jobs after their submission.

Problem: a list of all jobs ever is useless, and a list of open jobs alone hides the one that failed
a minute ago. So `baton jobs` shows every open job and the newest few that have ended, newest first,
in one list. Every bound says so on stderr when it cuts something off.
"""

import re
from datetime import datetime
from typing import TYPE_CHECKING

import click

from coordinator.cli import arrays, goodput, units
from coordinator.cli.completion import projects
from coordinator.cli.render import (
    UNKNOWN,
    Column,
    count_words,
    text,
    write_fields,
    write_json,
    write_notice,
    write_sentence,
    write_table,
)
from coordinator.cli.settings import JOB_ID, common_options, connect, settings_of
from coordinator.core.sentences import quantity

if TYPE_CHECKING:
    from coordinator.cli.values import Attempt, Checkpoint, Job

OPEN_PHASES = ("queued", "held", "active", "cancelling")
ENDED_PHASES = ("succeeded", "failed", "cancelled")

# Enough to find what just ended, without pushing the open jobs off a screen.
ENDED_SHOWN = 20

# A thousand lines are more than anybody reads, and 100,000 are a few seconds of the coordinator's
# time.
LIMIT_DEFAULT = 1000
LIMIT_MAX = 100_000

# What an agent says of a command that its node does not have (`agent/processes/shim.py`). The
# directories alone are wider than a screen; what lies beside is worth its place.
_LOOKED_IN = re.compile(r"looked in PATH=[^();]*(?:; )?")

_LIST_COLUMNS = (
    Column("JOB", right=True),
    Column("NAME", shorten=True, width_max=24),
    Column("CLASS"),
    Column("PHASE"),
    Column("GPUS", right=True),
    Column("NODE"),
    Column("STEP", right=True),
    Column("AGE", right=True),
    Column("REASON", shorten=True),
)
_ATTEMPT_COLUMNS = (
    Column("ATTEMPT", right=True),
    Column("NODE"),
    Column("PHASE"),
    Column("STARTED", right=True),
    Column("RAN", right=True),
    Column("GOODPUT", right=True),
    Column("FROM STEP", right=True),
    Column("EXIT", right=True),
    Column("STANDBY"),
    Column("REASON", wrap=True),
)
_EVENT_COLUMNS = (
    Column("TIME"),
    Column("AGE", right=True),
    Column("EVENT"),
    Column("ATTEMPT"),
    Column("NODE"),
    Column("MESSAGE", wrap=True),
)


@click.command()
@click.option("--all", "everything", is_flag=True, help="Also every job that has ended.")
@click.option("--project", default="", shell_complete=projects, help="Only this project.")
@click.option(
    "--phase",
    "--state",
    "phases",
    multiple=True,
    type=click.Choice([*OPEN_PHASES, *ENDED_PHASES]),
    help="Only this phase; may be given more than once.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, LIMIT_MAX),
    default=LIMIT_DEFAULT,
    metavar="N",
    show_default=True,
    help="At most this many.",
)
@click.option("--trials", is_flag=True, help="A line for each trial of an array.")
@common_options
@click.pass_context
def jobs(
    context: click.Context,
    /,
    *,
    everything: bool,
    project: str,
    phases: tuple[str, ...],
    limit: int,
    trials: bool,
) -> None:
    """List jobs, newest first. `baton ps` is the same.

    Shows all open jobs and the 20 newest that have ended. STEP is the step reached of all steps,
    where the trainer says so. AGE is the time since submission. An array is one line, and its STEP
    the trials that are over of all. With --json: one list, of all trials as well.

    \b
    Example:
      baton jobs
      baton jobs --phase queued --project vision
      baton jobs --json | jq -r '.[] | select(.phase == "failed") | .id'
    """
    if everything and phases:
        raise click.UsageError("--all and --phase contradict each other: give one of them")
    fold = not (trials or settings_of(context).as_json)
    with connect(context) as client:
        if everything or phases:
            found, more = client.jobs(list(phases), project, limit, fold=fold)
        else:
            found, more = client.jobs(list(OPEN_PHASES), project, limit, fold=fold)
            room = min(ENDED_SHOWN, limit - len(found))
            if room:
                found += client.jobs(list(ENDED_PHASES), project, room, fold=fold)[0]
                found = arrays.once(found) if fold else found
                found.sort(key=lambda job: job.id, reverse=True)
    if settings_of(context).as_json:
        write_json(found)
    elif not found:
        asked = phases or project
        write_notice("there is no such job" if asked else "no job yet; see `baton submit --help`")
    else:
        now = client.now()
        write_table(_LIST_COLUMNS, [_row(job, now, fold=fold) for job in found])
    if more:
        write_notice(f"there are more than {limit} such jobs; see --limit")


@click.command()
@click.argument("job_id", metavar="JOB", type=JOB_ID)
@common_options
@click.pass_context
def job(context: click.Context, job_id: int) -> None:
    """Show everything about one JOB.

    Its request, progress, checkpoint and attempts, why it is where it is, and where its time went:
    goodput is the share of it in which it trained, without what had to be done twice. Of a gang the
    newest try is shown with all ranks, those before by rank 0; time counts once, as rank 0 tells.

    \b
    Example:
      baton job 12
      baton job 12 --json | jq .progress.metrics.loss
    """
    with connect(context) as client:
        found = client.job(job_id)
    if settings_of(context).as_json:
        write_json(found)
    else:
        write_job(found, client.now())


@click.command()
@click.argument("job_id", metavar="JOB", type=JOB_ID)
@common_options
@click.pass_context
def events(context: click.Context, job_id: int) -> None:
    """Show the history of JOB, oldest first.

    Times are this machine's local time. With --json, each line is one event, with its time in UTC.

    \b
    Example:
      baton events 12
    """
    with connect(context) as client:
        history = client.events(job_id)
        if settings_of(context).as_json:
            for event in history:
                write_json(event)
            return
        rows = [
            (
                local_time(event.time),
                units.format_span(event.time, client.now()),
                event.name,
                event.attempt,
                event.node,
                event.message,
            )
            for event in history
        ]
    write_table(_EVENT_COLUMNS, rows)


@click.command()
@click.argument("job_id", metavar="JOB", type=JOB_ID)
@common_options
@click.pass_context
def explain(context: click.Context, job_id: int) -> None:
    """Say why JOB waits, or why it runs where it runs.

    One sentence, with numbers. Of a job that waits also where and when it is expected to fit, as
    far as running jobs say how many steps they have, and what would let it start now: options of
    `baton submit` in place of its own, or a node to uncordon. Each of these has been tried against
    the present queue and fleet.

    \b
    Example:
      baton explain 12
      baton explain 12 --json | jq -r '.suggestions[].change'
    """
    with connect(context) as client:
        explanation = client.explain(job_id)
    if settings_of(context).as_json:
        write_json(explanation)
    else:
        write_sentence(text(explanation.sentence))


def local_time(time: datetime | None) -> str:
    """A wall time for people, to the millisecond, in this machine's time zone."""
    return time.astimezone().isoformat(" ", "milliseconds")[:23] if time else UNKNOWN


def write_job(job: "Job", now: datetime) -> None:
    """Everything about a job, for people."""
    spec = job.spec
    click.echo(f"Job {job.id}  {text(spec.name)}")
    write_fields(
        [
            ("phase", _phase(job, now)),
            ("reason", _reason(job)),
            ("class", spec.job_class),
            ("project", spec.project),
            ("request", _request(job)),
            ("command", _command(job)),
            ("trainer", spec.trainer),
            ("config", spec.trainer_config_json),
            ("directory", spec.working_directory or "one of the attempt's own"),
            ("environment", " ".join(spec.environment)),
            ("progress", _progress(job)),
            ("checkpoint", _checkpoint(job, now)),
            ("digest", job.checkpoint.digest if job.checkpoint else ""),
            ("replication", spec.replication),
            ("failures", _failures(job)),
            ("stop", _stop(job)),
            ("submitted", _moment(job.submit_time, now)),
            ("ended", _moment(job.end_time, now)),
        ],
        copied=("command", "config", "directory"),
    )
    if job.accounting is not None and job.accounting.wall_seconds > 0:
        click.echo()
        goodput.write_goodput(job.accounting)
    if job.attempts:
        click.echo("\nAttempts, oldest first")
        newest = newest_try(job)
        shown = [one for one in job.attempts if one.rank == 0 and one.epoch != newest[0].epoch]
        write_table(_ATTEMPT_COLUMNS, [_attempt_row(one, now) for one in (*shown, *newest)])


def newest_try(job: "Job") -> "list[Attempt]":
    """All ranks of it, in order; none before the first."""
    newest = max((attempt.epoch for attempt in job.attempts), default=0)
    return [attempt for attempt in job.attempts if attempt.epoch == newest]


def newest_nodes(job: "Job") -> list[str]:
    """The node of each of its ranks."""
    return [attempt.node for attempt in newest_try(job)]


def _row(job: "Job", now: datetime, *, fold: bool) -> tuple[object, ...]:
    if fold and job.trial:
        return arrays.row(job, job.trial, now)
    here = count_words(newest_nodes(job)) if job.phase not in ("queued", "held") else None
    step = None
    if job.progress is not None:
        total = job.progress.total_steps
        step = f"{job.progress.step}/{total}" if total else job.progress.step
    return (
        job.id,
        job.spec.name,
        job.spec.job_class,
        job.phase,
        job.spec.gpus if job.spec.ranks == 1 else f"{job.spec.ranks}x{job.spec.gpus}",
        here,
        step,
        units.format_span(job.submit_time, now),
        _LOOKED_IN.sub("", _reason(job)).replace(" ()", ""),
    )


def _reason(job: "Job") -> str:
    """Why it is where it is; of one that leaves, why it does."""
    leaving = [one for one in newest_try(job) if one.phase == "stopping" and one.reason]
    if not leaving:
        return job.reason
    return f"leaves {count_words([one.node for one in leaving])}: {leaving[0].reason}"


def _attempt_row(attempt: "Attempt", now: datetime) -> tuple[object, ...]:
    ended = attempt.exit_code
    return (
        attempt.id,
        attempt.node,
        attempt.phase,
        units.format_span(attempt.start_time, now),
        units.format_span(attempt.start_time, attempt.end_time or now),
        goodput.percent(attempt.accounting.goodput_ratio) if attempt.accounting else None,
        attempt.restored_step,
        f"signal {attempt.signal}" if attempt.signal is not None else ended,
        attempt.replica_node,
        attempt.reason,
    )


def _phase(job: "Job", now: datetime) -> str:
    if job.phase in ENDED_PHASES:
        return f"{job.phase}, after {units.format_span(job.submit_time, job.end_time)}"
    if job.phase == "active" and job.attempts:
        newest = newest_try(job)[0]
        since = newest.start_time or newest.assign_time
        where = count_words(newest_nodes(job))
        return f"active, on {where} for {units.format_span(since, now)}"
    return f"{job.phase or UNKNOWN}, {units.format_span(job.submit_time, now)} after submission"


def _request(job: "Job") -> str:
    spec = job.spec
    wishes = [quantity(spec.gpus, "GPU")]
    if spec.shared_gpu_memory_bytes:
        wishes = [f"{units.format_size(spec.shared_gpu_memory_bytes)} of a shared GPU"]
    if spec.share_automatic:
        wishes[0] += " where that pays"
    if spec.ranks > 1:
        wishes = [f"{spec.ranks} ranks of {wishes[0]} each"]
    if spec.gpu_types:
        wishes.append(" or ".join(spec.gpu_types))
    if spec.gpu_memory_bytes_min:
        wishes.append(f"at least {units.format_size(spec.gpu_memory_bytes_min)} each")
    if spec.memory_bytes:
        wishes.append(f"{units.format_size(spec.memory_bytes)} of host memory")
    if spec.flexible_ms:
        wishes.append(f"may wait {units.format_duration(spec.flexible_ms)}")
    if spec.deadline is not None:
        wishes.append(f"ended by {spec.deadline.isoformat(sep=' ', timespec='minutes')}")
    if job.trial is not None:
        of = f"trial {job.trial.index} of array {arrays.name_of(job, job.trial)}"
        wishes.append(f"{of}, of which {arrays.standing(job.trial)}")
    return ", ".join(wishes)


def _command(job: "Job") -> str:
    """As it is run, a trial's with its own index."""
    import shlex

    from coordinator.core.arrays import INDEX

    index = INDEX if job.trial is None else str(job.trial.index)
    return shlex.join(word.replace(INDEX, index) for word in job.spec.command)


def _progress(job: "Job") -> str:
    if job.progress is None:
        return ""
    step, total = job.progress.step, job.progress.total_steps
    said = f"step {step} of {total} ({step / total:.0%})" if total else f"step {step}"
    return ", ".join(
        [said, *(f"{name} {value:.5g}" for name, value in job.progress.metrics.items())]
    )


def _checkpoint(job: "Job", now: datetime) -> str:
    kept = job.checkpoint
    if kept is None:
        return ""
    where = f" on {', '.join(kept.replicas)}" if kept.replicas else ""
    if kept.parts:
        where = f" in {len(kept.parts) + 1} parts, on {count_words(part_nodes(kept))}"
    age = units.format_span(kept.commit_time, now)
    return f"step {kept.step}, {units.format_size(kept.size_bytes)}{where}, committed {age} ago"


def part_nodes(kept: "Checkpoint") -> list[str]:
    """Whoever holds a part, as often as it holds one."""
    return [*kept.replicas, *(node for part in kept.parts for node in part.replicas)]


def _failures(job: "Job") -> str:
    if not job.failures:
        return ""
    limit = job.spec.max_restarts
    return f"{job.failures} in a row" + ("" if limit is None else f", of at most {limit}")


def _stop(job: "Job") -> str:
    signal = f"SIG{(job.spec.stop_signal or 'term').upper()}"
    if job.spec.grace_ms is None:
        return signal
    return f"{signal}, then {units.format_duration(job.spec.grace_ms)} of grace"


def _moment(time: datetime | None, now: datetime) -> str:
    return f"{local_time(time)} ({units.format_span(time, now)} ago)" if time else ""
