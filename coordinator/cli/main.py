"""`baton`: the group of all commands, and the one place where a failure becomes an exit status.

Problem: scripts act on exit statuses and people on sentences, so every command must end in the same
way. Commands raise (`CommandFailed`, click's `UsageError`), and `_Baton.invoke` turns that into one
line on stderr and a status; `main` does it for an answer that cannot be written:

    0 success   1 refused or failed   2 wrong usage   3 coordinator not reachable   130 Ctrl-C   141
    reader went away

Starting fast matters in shell completion and in loops. This module and the commands' import click
and the standard library only; gRPC, msgspec and rich are imported inside the functions that need
them.
"""

import contextlib
import io
import os
import sys
from typing import Any

import click

from coordinator.cli import (
    checkpoints,
    completion,
    cost,
    fit,
    forecast,
    job_verbs,
    jobs,
    leases,
    logs,
    nodes,
    projects,
    scaling,
    simulate,
    submit,
)
from coordinator.cli.render import write_notice
from coordinator.cli.settings import (
    EXIT_BROKEN_PIPE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    CommandFailed,
    group_options,
)


class _Baton(click.Group):
    """A group that ends every command in the same way and knows one synonym."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """`ps` is what people type who have used containers."""
        return super().get_command(ctx, "jobs" if cmd_name == "ps" else cmd_name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which people need them, not by the alphabet."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Arguments travel as protobuf strings, and those are UTF-8."""
        for argument in args:
            try:
                argument.encode()
            except UnicodeEncodeError as error:
                raise click.UsageError(f"{argument!r} is not UTF-8 text", ctx) from error
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except CommandFailed as failed:
            write_notice(str(failed))
            raise click.exceptions.Exit(failed.exit_code) from failed
        except KeyboardInterrupt as interrupt:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from interrupt
        except BrokenPipeError as error:
            _drop_output()
            raise click.exceptions.Exit(EXIT_BROKEN_PIPE) from error


@click.group(
    cls=_Baton,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 success, 1 refused or failed (the reason is on stderr), 2 wrong usage, "
    "3 coordinator not reachable, 130 interrupted.",
)
@click.version_option(package_name="gpu-baton", prog_name="baton")
@group_options
def cli() -> None:
    """Submit jobs to a fleet of GPUs, watch them, and look after the nodes.

    \b
    A first job, its output, and what became of it:
      baton submit --gpus 1 -- python train.py --epochs 3
      baton logs -f 1
      baton job 1

    `baton COMMAND --help` explains a command and shows an example. The options below may stand
    before or after the command.
    """


for _command in (
    submit.submit,
    fit.fit,
    jobs.jobs,
    jobs.job,
    logs.logs,
    job_verbs.cancel,
    job_verbs.hold,
    job_verbs.release,
    job_verbs.requeue,
    jobs.events,
    jobs.explain,
    checkpoints.checkpoint,
    projects.projects,
    cost.cost,
    leases.leases,
    nodes.nodes,
    nodes.cordon,
    nodes.drain,
    nodes.uncordon,
    nodes.forget,
    nodes.telemetry,
    scaling.plan,
    scaling.scale,
    simulate.simulate,
    forecast.forecast,
    completion.completion,
):
    cli.add_command(_command)


def main() -> None:
    """The console script. Never returns."""
    if sys.stdout is None:  # closed by who called: he wants no answer, and the deed is done
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as we live
    elif isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):
        # PYTHONUNBUFFERED: what the system does not take of a write would be lost, with status 0.
        whole = io.BufferedWriter(sys.stdout.buffer)
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        sys.stdout = io.TextIOWrapper(whole, encoding, errors, line_buffering=True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # names are of any alphabet, terminals are not
    try:
        cli.main(prog_name="baton")
    except OSError as error:
        if error.filename is not None:
            raise
        # Only a write has no file's name: to a full disk, or past a quota. stderr may be there too.
        with contextlib.suppress(OSError):
            write_notice(f"the answer cannot be written: {error.strerror}")
        _drop_output()
        raise SystemExit(EXIT_FAILED) from error


def _drop_output() -> None:
    """The interpreter flushes stdout once more at exit; let that go nowhere instead of failing
    aloud."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
