"""`baton cancel`, `hold`, `release`, `requeue`: what is asked of jobs, or of whole arrays.

Each answers with one sentence: what the job is now, and who has still to leave; of an array for how
many of its trials it was done. Of several jobs each is asked, whatever became of those before it: a
job that has just ended keeps nobody from cancelling the others.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli import arrays, completion
from coordinator.cli.render import UNKNOWN, count_words, write_json, write_notice, write_sentence
from coordinator.cli.settings import (
    EXIT_FAILED,
    EXIT_UNREACHABLE,
    JOB_ID,
    CommandFailed,
    common_options,
    connect,
    settings_of,
)
from coordinator.core.sentences import quantity

if TYPE_CHECKING:
    from coordinator.cli.client import Changed, Client

_ARRAY = click.option("--array", is_flag=True, help="All trials of the array of which JOB is one.")


def _jobs(*phases: str, required: bool = True) -> Callable[[Any], Any]:
    """The argument; Tab offers those in these phases."""
    return click.argument(
        "job_ids",
        metavar="JOB..." if required else "[JOB...]",
        type=JOB_ID,
        nargs=-1,
        required=required,
        shell_complete=completion.job_ids(*phases),
    )


def _verb(
    name: str,
    phases: Sequence[str],
    call: "Callable[[Client, int, bool], Changed]",
    help_text: str,
) -> click.Command:
    """One command that takes jobs, of which most are in these phases, and shows what became of
    them."""

    @click.command(name, help=help_text)
    @_jobs(*phases)
    @_ARRAY
    @common_options
    @click.pass_context
    def command(context: click.Context, job_ids: list[int], array: bool) -> None:
        _change_each(context, job_ids, lambda client, job_id: call(client, job_id, array))

    return command


def _change_each(
    context: click.Context, job_ids: Sequence[int], call: "Callable[[Client, int], Changed]"
) -> None:
    failed = False
    with connect(context) as client:
        for job_id in dict.fromkeys(job_ids):
            try:
                _show(context, call(client, job_id))
            except CommandFailed as refused:
                if len(job_ids) == 1 or refused.exit_code == EXIT_UNREACHABLE:
                    raise
                write_notice(str(refused))
                failed = True
    if failed:
        raise click.exceptions.Exit(EXIT_FAILED)


def _show(context: click.Context, changed: "Changed") -> None:
    from coordinator.cli.values import ArrayChange

    if settings_of(context).as_json:
        write_json(changed)
        return
    if isinstance(changed, ArrayChange):
        write_sentence(arrays.changed(str(context.info_name), changed))
        return
    # Why it runs where it runs is no answer to "hold it".
    leaving = [one.node for one in changed.attempts if one.phase == "stopping"]
    said = f"saves, and leaves {count_words(leaving)}" if leaving else changed.reason
    phase = changed.phase or UNKNOWN
    parts = (phase, said) if not said.startswith(phase) else (said,)  # "held by its owner"
    write_sentence(f"job {changed.id}: {'; '.join(filter(None, parts))}")


cancel = _verb(
    "cancel",
    ("queued", "held", "active"),
    lambda client, job_id, array: client.cancel(job_id, array),
    """End JOB for good.

    A queued job ends at once. An active one gets its stop signal and its grace to save and leave.

    \b
    Example:
      baton cancel 12
      baton cancel 12 13 14
      baton cancel 12_3           (the trial with index 3 of array 12)
      baton cancel --array 12
    """,
)
hold = _verb(
    "hold",
    ("queued", "active"),
    lambda client, job_id, array: client.hold(job_id, array),
    """Keep JOB from running until `baton release`.

    An active job is checkpointed and stopped first.

    \b
    Example:
      baton hold 12
    """,
)


@click.command("release")
@_jobs("held", required=False)
@_ARRAY
@click.option(
    "--restored",
    is_flag=True,
    help="All jobs that are held since the database was put back or moved.",
)
@common_options
@click.pass_context
def release(context: click.Context, job_ids: list[int], *, array: bool, restored: bool) -> None:
    """Put a held JOB back to its old place in the queue.

    With --restored all jobs are meant that are held since the coordinator's database was put back
    from a copy, or was moved and passed for one. Give it only when all nodes are back: a job that
    has finished since the copy was made runs again from its last checkpoint. Who held a job
    himself releases it himself.

    \b
    Example:
      baton release 12
      baton release --restored
    """
    if restored == bool(job_ids) or (restored and array):
        raise click.UsageError("give either jobs, or --restored alone")
    if not restored:
        _change_each(context, job_ids, lambda client, job_id: client.release(job_id, array))
        return
    from coordinator.cli.values import Released

    with connect(context) as client:
        released = Released(jobs=client.release_restored())
    if settings_of(context).as_json:
        write_json(released)
    else:
        write_sentence(f"released {quantity(released.jobs, 'job')}")


@click.command("requeue")
@_jobs()
@click.option(
    "--abandon",
    is_flag=True,
    help="Give up checkpoints that lie only on lost nodes, and go on from the newest within reach.",
)
@_ARRAY
@click.option(
    "--all", "every", is_flag=True, help="With --array: also trials that run or have succeeded."
)
@common_options
@click.pass_context
def requeue(
    context: click.Context, job_ids: list[int], *, abandon: bool, array: bool, every: bool
) -> None:
    """Run JOB again from its last checkpoint.

    An active job is checkpointed, stopped and queued again; one that has ended, or is quarantined,
    is queued again. With --array this is done for the trials that have failed, were cancelled or
    are quarantined.

    \b
    Examples:
      baton requeue 12
      baton requeue --array 12
      baton requeue --abandon 12
    """
    if every and not array:
        raise click.UsageError("--all says which trials of --array are meant")
    _change_each(
        context, job_ids, lambda client, job_id: client.requeue(job_id, array, abandon, every)
    )
