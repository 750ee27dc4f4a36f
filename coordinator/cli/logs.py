"""`baton logs`: what a job wrote, byte for byte, from wherever it ran.

The job's bytes go to stdout untouched, so that a pipe gets what the job wrote; what Baton has to
say (a new attempt, a log that a lost node took with it) goes to stderr. JSON has no bytes: there
each attempt has a decoder of its own, which keeps a character together that two parts cut in half.
"""

import codecs
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from coordinator.cli.render import write_json, write_notice
from coordinator.cli.settings import (
    EXIT_UNREACHABLE,
    JOB_ID,
    CommandFailed,
    common_options,
    connect,
    settings_of,
)

if TYPE_CHECKING:
    from coordinator.cli.values import Job, LogPart


@click.command()
@click.argument("job_id", metavar="JOB", type=JOB_ID)
@click.option(
    "-f",
    "--follow",
    is_flag=True,
    help="Go on until the job ends, across its attempts and restarts of the coordinator.",
)
@click.option(
    "--tail-bytes",
    type=click.IntRange(0, 2**63 - 1),
    metavar="N",
    default=0,
    help="Only the last N bytes so far of the newest attempt.  [default: everything that is kept]",
)
@click.option(
    "--rank",
    type=click.IntRange(0, 1023),
    metavar="N",
    default=0,
    show_default=True,
    help="Which rank of a gang.",
)
@common_options
@click.pass_context
def logs(context: click.Context, job_id: int, follow: bool, tail_bytes: int, rank: int) -> None:
    """Print what JOB wrote.

    Its standard output and standard error, across its attempts, from wherever it ran.

    Baton's own remarks go to stderr. With --json, each line is an object with the keys attempt,
    node, text and notice.

    \b
    Example:
      baton logs -f 12
      baton logs --tail-bytes 2000 12
      baton logs --rank 3 12
    """
    with connect(context) as client:
        if follow:
            _say_why_nothing_comes(client.job(job_id))
        parts = client.logs(job_id, follow=follow, tail_bytes=tail_bytes, rank=rank)
        try:
            any_parts = write_parts(parts, as_json=settings_of(context).as_json)
        except CommandFailed as failed:
            if not follow or failed.exit_code != EXIT_UNREACHABLE:
                raise
            again = f"go on with: baton logs -f --tail-bytes 2000 {job_id}"
            raise CommandFailed(f"{failed}; {again}", failed.exit_code) from failed
        job = None if any_parts else client.job(job_id)
    if job is not None:
        from coordinator.cli.jobs import ENDED_PHASES

        if job.phase in ENDED_PHASES:
            became = "is" if job.phase == "cancelled" else "has"
            why = "" if job.phase == "succeeded" else f": {job.reason}"
            said = f"{became} {job.phase}, and there is no output of it{why}"
        else:
            said = f"is {job.phase}: it has no output so far"
        write_notice(f"job {job_id} {said}")


def _say_why_nothing_comes(job: "Job") -> None:
    """Who follows a job that waits sees nothing for hours."""
    if job.phase in ("queued", "held"):
        write_notice(f"job {job.id} is {job.phase}: {job.reason}; its output follows when it runs")


def write_parts(parts: "Iterable[LogPart]", *, as_json: bool) -> bool:
    """Write parts as they come: bytes to stdout and notices to stderr, or all as JSON lines.
    Returns whether there were any."""
    if as_json:
        return _write_json_lines(parts)
    stdout, any_parts, attempt = sys.stdout.buffer, False, ""
    for part in parts:
        any_parts = any_parts or bool(part.data or part.notice)
        if part.data and part.attempt != attempt:
            if attempt:
                write_notice(f"from here on attempt {part.attempt}, on {part.node}")
            attempt = part.attempt
        if part.notice:
            stdout.flush()
            write_notice(part.notice)
        stdout.write(part.data)
        # Somebody is watching, and parts are up to 64 KiB already: nothing is won by holding one
        # back.
        stdout.flush()
    return any_parts


def _write_json_lines(parts: "Iterable[LogPart]") -> bool:
    from coordinator.cli.values import LogLine

    decoders: dict[str, codecs.IncrementalDecoder] = {}
    nodes: dict[str, str] = {}
    any_parts = False
    for part in parts:
        any_parts = any_parts or bool(part.data or part.notice)
        if part.attempt not in decoders:
            decoders[part.attempt] = codecs.getincrementaldecoder("utf-8")("replace")
        nodes[part.attempt] = part.node
        text = decoders[part.attempt].decode(part.data)
        if text or part.notice:
            write_json(LogLine(attempt=part.attempt, node=part.node, text=text, notice=part.notice))
            sys.stdout.flush()
    for attempt, decoder in decoders.items():
        rest = decoder.decode(b"", final=True)
        if rest:
            write_json(LogLine(attempt=attempt, node=nodes[attempt], text=rest, notice=""))
    return any_parts
