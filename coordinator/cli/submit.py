"""`baton submit`: a job from flags, from a job file, or from both.

Problem: a command has options of its own, so a command line of options is ambiguous (`submit python
t.py --name x`: whose name?). Everything after the first `--` is the command, untouched; before it
stand our options and at most one job file. Flags become a `JobFile` and are laid over the file's,
so both are checked by one gate and mean the same.

The working directory is the one where the user stands, as people expect of a batch system (sbatch
does the same) and as their relative paths need it. It must exist on the node as well, which a
shared file system gives; `--workdir ''` asks for a directory of the attempt's own instead.
"""

import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli import share, units
from coordinator.cli.completion import paths, projects
from coordinator.cli.render import UNKNOWN, write_json, write_notice
from coordinator.cli.settings import (
    EXIT_FAILED,
    BadInput,
    CommandFailed,
    common_options,
    connect,
    settings_of,
)
from coordinator.core.sentences import quantity

if TYPE_CHECKING:
    from coordinator.cli.client import Client
    from coordinator.cli.values import JobSpec

_COMMAND = "coordinator.cli.submit.command"

# The contract's longest request id.
REQUEST_ID_CHARACTERS_MAX = 64


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return units.parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Checked(click.ParamType[str]):
    """Checked here by `parse`, converted where a job file's are."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            self._parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


_DURATION = _Checked("duration", units.parse_duration)
_SHARE = _Checked("size", share.parse_share)
_TIME = _Checked("time", lambda text: units.parse_time(text, datetime.now(UTC)))


class _Pair(click.ParamType[tuple[str, str]]):
    name = "k=v"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        name, equals, content = str(value).partition("=")
        if not (name and equals):
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name, content


def _trainers(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    from coordinator.core.trainer_keys import KEYS

    return [name for name in KEYS if name.startswith(begun)]


class _SubmitCommand(click.Command):
    """Takes the command away before click reads the options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Split at the first `--`."""
        if "--" in args:
            split = args.index("--")
            ctx.meta[_COMMAND] = args[split + 1 :]
            return super().parse_args(ctx, args[:split])
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(
                f"{error.format_message()} Your own command's options belong after --, "
                "as in: baton submit -- COMMAND",
                ctx,
            ) from error

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """What click cannot know: that a command may follow."""
        return ["[OPTIONS]", "[JOB.toml]", "[-- COMMAND...]"]


_HELP = """Submit a job: a command, a job file, or a built-in trainer.

\b
Example:
  baton submit --gpus 1 -- python train.py --epochs 3
  baton submit job.toml --class spare
  baton submit --gpus 1 --trainer finetune --config finetune.toml
  baton submit --ranks 4 --gpus 1 -- python train_ddp.py
  baton submit --share-gpu 8GiB -- python evaluate.py
  baton submit --array 0-99%8 --gpus 1 -- python train.py --seed {index}

The command is run as given, without a shell, in the directory where you stand now; that
directory must exist on the node too. Relative paths are taken from there.

A job file has the keys of the options, with underscores, and flags override it:

\b
  name = "finetune-7b"
  class = "guaranteed"
  command = ["python", "train.py"]
  gpus = 2
  gpu_types = ["H100", "A100"]
  gpu_memory_min = "40GB"
  grace = "5m"
  env = { WANDB_MODE = "offline" }

The others are project, trainer, config (a path or a table), workdir, ranks, memory, signal,
share_gpu, flexible, deadline, max_restarts, run_again_exit_codes, replication, slurm_env, hold,
keep_checkpoints and array.

With --follow, the job's output goes to stdout, Baton's own remarks to stderr, and the exit
status is 0 only if the job succeeds. With --json and --follow: one line for the submission,
lines as of `baton logs --json`, and one line for the job as it ended.
"""


@click.command(cls=_SubmitCommand, help=_HELP)
@click.argument("words", nargs=-1, shell_complete=paths("file"))
@click.option("--name", help="For people.  [default: that of script, program or trainer]")
@click.option("--project", shell_complete=projects, help="Accounting label.  [default: default]")
@click.option(
    "--class",
    "job_class",
    type=click.Choice(["guaranteed", "standard", "spare"]),
    help="Who may displace whom: guaranteed displaces standard and spare, standard displaces "
    "spare.  [default: standard]",
)
@click.option("--gpus", type=int, metavar="N", help="GPUs, all on one node.  [default: 0]")
@click.option(
    "--ranks",
    type=int,
    metavar="N",
    help="Processes that start together, each with the GPUs and memory given here, on as few nodes "
    "as will do.  [default: 1]",
)
@click.option(
    "--gpu-type",
    "gpu_types",
    multiple=True,
    metavar="NAME",
    help="Only GPUs with NAME in their name, e.g. H100; repeat it to accept several.",
)
@click.option(
    "--gpu-memory-min",
    type=_Size(),
    help="Least memory of each GPU: 40GB, 40GiB or bytes. "
    "An 80 GB card has a little less than 80GiB.",
)
@click.option(
    "--share-gpu",
    type=_SHARE,
    help="Share a GPU with others and take at most this much of its memory, in place of --gpus: "
    "8GiB. auto:8GiB: with one other at most, only where no GPU is free and both together are "
    "fast enough. auto: the size is counted, for a trainer of language models.",
)
@click.option(
    "--deadline",
    type=_TIME,
    help="When it should have ended: 6h from now, or 2026-11-30T09:00. From when it must run for "
    "that, which is known of a training that says its steps, it goes first in its class.",
)
@click.option(
    "--array",
    metavar="INDICES",
    help="A job for each index, as Slurm has it: 0-99%8 is a hundred, of which at most 8 run at "
    "once; 1,3,8-16:4. {index} in the command stands for it, and BATON_ARRAY_INDEX is set to it.",
)
@click.option("--memory", type=_Size(), help="Host memory set aside for the job: 64GiB.")
@click.option(
    "--env", "pairs", multiple=True, type=_Pair(), help="Added to the environment; repeatable."
)
@click.option(
    "--workdir",
    metavar="DIRECTORY",
    shell_complete=paths("dir"),
    help="Where the command runs, on the node; '' is a directory of the attempt's own, "
    "empty at its start.  [default: the current directory, or that of the --config file]",
)
@click.option(
    "--trainer",
    metavar="NAME",
    shell_complete=_trainers,
    help="A built-in trainer: transfer, finetune or lora.",
)
@click.option(
    "--config",
    metavar="FILE",
    shell_complete=paths("file"),
    help="Its configuration: .json or .toml.",
)
@click.option(
    "--grace",
    type=_DURATION,
    help="From the stop request to SIGKILL: 120s, 5m, 2h.  [default: 120s]",
)
@click.option(
    "--flexible",
    type=_DURATION,
    help="It may wait so long when GPUs are dear: until then none is kept free or rented by the "
    "hour for it. 24h, 2d.  [default: 0s]",
)
@click.option(
    "--signal",
    type=click.Choice(["TERM", "USR1", "USR2"]),
    help="The stop request.  [default: TERM]",
)
@click.option(
    "--max-restarts",
    type=int,
    metavar="N",
    help="Failures in a row without a further checkpoint until the job has failed.  [default: 3]",
)
@click.option(
    "--run-again-exit-code",
    "run_again_exit_codes",
    multiple=True,
    type=int,
    metavar="CODE",
    help="Exit status that means: run me again; repeatable. 0 always means finished, also after "
    "a stop request.  [default: 75 and 85]",
)
@click.option(
    "--replication",
    type=click.Choice(["automatic", "required", "none"]),
    help="Whether a checkpoint counts only with a copy off its node.  [default: automatic]",
)
@click.option(
    "--keep-checkpoints",
    type=int,
    metavar="N",
    help="How many of the newest checkpoints are kept, beside pinned ones.  [default: 3]",
)
@click.option(
    "--slurm-env/--no-slurm-env", default=None, help="Also set SLURM_JOB_ID and its like."
)
@click.option("--hold/--no-hold", default=None, help="Wait for `baton release`.")
@click.option(
    "--for-job",
    type=click.IntRange(min=1),
    metavar="JOB",
    help="Say what JOB was, which is held since the coordinator's database was put back from a "
    "copy without it: it goes on from its last checkpoint.",
)
@click.option("--follow", is_flag=True, help="Print the job's output until it ends.")
@click.option(
    "--request-id",
    metavar="ID",
    help="The same ID again answers with the same job, so a retry cannot submit twice.  "
    "[default: a new one]",
)
@common_options
@click.pass_context
def submit(
    context: click.Context,
    /,
    words: tuple[str, ...],
    follow: bool,
    request_id: str | None,
    for_job: int | None,
    **flags: Any,
) -> None:
    """Read the request, submit it, and follow it where asked to."""
    command: list[str] | None = context.meta.get(_COMMAND)
    job_file = _job_file(words)
    if command is not None and flags["trainer"] is not None:
        raise click.UsageError("give a command or --trainer, not both")
    if command == []:
        raise click.UsageError("there is no command after --")
    if command is None and flags["trainer"] is None and job_file is None:
        raise click.UsageError(
            "nothing to run: give a command after --, a job file or --trainer; "
            "see baton submit --help"
        )
    if request_id is None:
        request_id = str(uuid.uuid4())
    elif not 1 <= len(request_id) <= REQUEST_ID_CHARACTERS_MAX:
        raise click.UsageError(f"--request-id has 1 to {REQUEST_ID_CHARACTERS_MAX} characters")

    from coordinator.cli import jobfile  # msgspec is for those who submit

    wanted = jobfile.from_flags({**flags, "command": command})
    if job_file is not None:
        wanted = jobfile.overlay(jobfile.read(job_file), wanted)
    spec = jobfile.to_spec(wanted, here())
    if spec.array and follow:
        raise click.UsageError("--follow shows one job; follow a trial: baton logs -f JOB_INDEX")
    as_json = settings_of(context).as_json
    with connect(context) as client:
        sized, lead_ms = share.with_size(client, spec), jobfile.deadline_in_ms(wanted)
        submission = client.submit(sized, request_id, for_job, lead_ms)
        sentence = f"job {submission.job_id} submitted"
        if spec.array:
            first_id = submission.job_id
            sentence = f"array {first_id} submitted: {quantity(submission.jobs, 'trial')}"
            if submission.jobs > 1:
                sentence += f", jobs {first_id} to {first_id + submission.jobs - 1}"
        if submission.reason:
            sentence += f"; {submission.reason}"
        for note in _notes(spec):
            write_notice(note)
        if as_json:
            write_json(submission)
        elif follow:
            write_notice(sentence)
        else:
            click.echo(sentence)
        if follow:
            _follow(client, submission.job_id, as_json=as_json)


def _notes(spec: "JobSpec") -> Iterator[str]:
    """What may be a mistake. This machine need not have the node's directories, and where an index
    seems to be meant that nobody fills in, it may not: f-strings have such words."""
    from coordinator.core.arrays import INDEX

    directory = spec.working_directory
    if directory and not Path(directory).is_dir():
        yield f"{directory} is no directory on this machine; it must be one on the node"
    if not spec.array and any(INDEX in word for word in spec.command):
        yield f"{INDEX} in the command is left as it is: only with --array it stands for an index"
    for name, value in spec.environment.items():
        if INDEX in value:
            instead = ": the trial's index is in BATON_ARRAY_INDEX" if spec.array else ""
            yield f"{INDEX} in --env {name} is left as it is{instead}"


def here() -> Path:
    """The current directory. Raises `BadInput` where it cannot be named."""
    try:
        found = Path.cwd()
        str(found).encode()
    except FileNotFoundError as error:
        raise BadInput("the current directory does not exist any more; go to another") from error
    except UnicodeEncodeError as error:
        raise BadInput("the current directory's name is not UTF-8 text") from error
    return found


def _job_file(words: tuple[str, ...]) -> Path | None:
    if not words:
        return None
    if len(words) > 1 or not words[0].endswith(".toml"):
        raise click.UsageError(
            f"write -- before a command: baton submit -- {' '.join(words)}   "
            "(a job file's name ends in .toml)"
        )
    return Path(words[0])


def _follow(client: "Client", job_id: int, *, as_json: bool) -> None:
    """Show the job's output until it ends; raises `CommandFailed` unless it succeeded."""
    from coordinator.cli.jobs import ENDED_PHASES
    from coordinator.cli.logs import write_parts

    try:
        write_parts(client.logs(job_id, follow=True, tail_bytes=0), as_json=as_json)
        job = client.job(job_id)
    except CommandFailed as failed:
        raise CommandFailed(
            f"{failed}; job {job_id} goes on: baton logs -f {job_id}", failed.exit_code
        ) from failed
    except KeyboardInterrupt:
        write_notice(f"job {job_id} goes on: baton logs -f {job_id}; baton cancel {job_id} ends it")
        raise
    if as_json:
        write_json(job)
    if job.phase == "succeeded":
        if not as_json:
            write_notice(f"job {job_id} succeeded")
        return
    tail = f": {job.reason}" if job.reason else ""
    if job.phase in ENDED_PHASES:
        raise CommandFailed(f"job {job_id} {job.phase}{tail}", EXIT_FAILED)
    raise CommandFailed(
        f"the log of job {job_id} ended while the job is {job.phase or UNKNOWN}{tail}; "
        f"go on with: baton logs -f {job_id}",
        EXIT_FAILED,
    )
