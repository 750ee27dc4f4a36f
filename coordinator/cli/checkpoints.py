"""`baton checkpoint`: which are kept, keep this one, and take one out of the fleet or into it.

Problem: what a job has learned must not be locked into the system that ran it. So a checkpoint can
be had as files: this command fetches them from a node that holds them, verified, and the trainers'
own program (`python -m trainers.export`) writes the format that is asked for. That program runs in
an interpreter of its own, because it needs torch and this one need not have it; `--format raw`
needs neither.

What is written appears whole or not at all: it is made beside its place and gets its name last.
"""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coordinator.cli import units
from coordinator.cli.completion import paths
from coordinator.cli.render import (
    Column,
    count_words,
    write_json,
    write_notice,
    write_table,
)
from coordinator.cli.settings import JOB_ID, BadInput, CommandFailed, common_options, settings_of

if TYPE_CHECKING:
    from coordinator.cli.checkpoint_client import CheckpointClient
    from coordinator.cli.values import Job, KeptCheckpoint

FORMATS = ("huggingface", "safetensors", "dcp")
# What a digest is shown as; as many digits as the sentences of the history have.
DIGEST_SHOWN = 12

_COLUMNS = (
    Column("DIGEST"),
    Column("STEP", right=True),
    Column("AGE", right=True),
    Column("SIZE", right=True),
    Column("COPIES ON", wrap=True),
    Column("PINNED"),
    Column("USED BY"),
    Column("NOTE", wrap=True),
)


class _Which(click.ParamType[tuple[str, int | None]]):
    """Digits only and short is a step; everything else has to be a digest."""

    name = "digest|step"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int | None]:
        if isinstance(value, tuple):
            return value
        word = str(value)
        if word.isascii() and word.isdigit() and len(word) < 19:
            return "", int(word)
        if not set(word) <= set("0123456789abcdef"):
            self.fail(f"{word!r} is neither a step nor the beginning of a digest", param, ctx)
        return word, None


@click.group()
@common_options
def checkpoint() -> None:
    """List checkpoints, keep some, and take them out or in.

    Of an open job the newest few are kept (see --keep-checkpoints of submit), of one that has ended
    the last, for as long as the job is remembered: until 10,000 others have ended after it, or as
    many as the coordinator's jobs_kept says. A pinned checkpoint is kept until it is unpinned,
    whatever becomes of its job.

    \b
    Examples:
      baton checkpoint list 12
      baton checkpoint pin 12 400
      baton checkpoint export 12 --format huggingface --to ./my-model
    """


@checkpoint.command("list")
@click.argument("job_id", metavar="JOB", type=JOB_ID)
@common_options
@click.pass_context
def list_command(context: click.Context, job_id: int) -> None:
    """List the checkpoints that are kept of JOB, newest first.

    USED BY is "head" for the one that the next attempt resumes from, and the attempts that run from
    it. NOTE says why nobody resumes from it any more. With --json: one list, with whole digests.

    \b
    Example:
      baton checkpoint list 12
    """
    with _connect(context) as client:
        found = client.checkpoints(job_id)
    _show(context, found, job_id, client.now())


@checkpoint.command()
@click.argument("job_id", metavar="JOB", type=JOB_ID)
@click.argument("which", metavar="[DIGEST|STEP]", type=_Which(), required=False)
@common_options
@click.pass_context
def pin(context: click.Context, job_id: int, which: tuple[str, int | None] | None) -> None:
    """Keep a checkpoint of JOB until it is unpinned.

    The last one, or the one with this DIGEST (at least 6 digits of it) or of this STEP. No node
    drops a byte of it, also after the job has ended.

    \b
    Examples:
      baton checkpoint pin 12
      baton checkpoint pin 12 400
    """
    digest, step = which or ("", None)
    with _connect(context) as client:
        found = client.pin(job_id, digest, step)
        _show(context, found, job_id, client.now())


@checkpoint.command()
@click.argument("job_id", metavar="JOB", type=JOB_ID)
@click.argument("which", metavar="[DIGEST|STEP]", type=_Which(), required=False)
@common_options
@click.pass_context
def unpin(context: click.Context, job_id: int, which: tuple[str, int | None] | None) -> None:
    """Undo a pin of JOB, or all of them.

    What is neither among the newest nor the last of an ended job goes at once.

    \b
    Example:
      baton checkpoint unpin 12 400
    """
    digest, step = which or ("", None)
    with _connect(context) as client:
        found = client.unpin(job_id, digest, step)
        _show(context, found, job_id, client.now())


_PYTHON = click.option(
    "--python",
    metavar="FILE",
    shell_complete=paths("file"),
    envvar="BATON_TRAINER_PYTHON",
    show_envvar=True,
    help="Interpreter with torch, for the conversion.  [default: this program's own]",
)


@checkpoint.command(short_help="Write a checkpoint of JOB as files, in a chosen format.")
@click.argument("job_id", metavar="JOB", type=JOB_ID)
@click.option("--format", "kind", required=True, type=click.Choice([*FORMATS, "raw"]))
@click.option(
    "--to", "target", required=True, type=click.Path(path_type=Path), help="A new directory."
)
@click.option("--step", type=click.IntRange(0, 2**63 - 1), help="The newest of this step.")
@click.option("--digest", default="", help="The one with this digest, or its first 6 digits.")
@click.option(
    "--model",
    metavar="FOLDER",
    help="For huggingface: where config.json lies.  [default: the model of the job]",
)
@_PYTHON
@common_options
@click.pass_context
def export(
    context: click.Context,
    /,
    *,
    job_id: int,
    kind: str,
    target: Path,
    step: int | None,
    digest: str,
    model: str | None,
    python: str | None,
) -> None:
    """Write a checkpoint of JOB as a directory of files: the last, or a chosen one.

    The bytes come from a node that holds them, and each is verified. The formats:

    \b
      huggingface  of a finetune job: what from_pretrained() opens, with the
                   configuration (and tokenizer) of the job's model folder
      safetensors  model.safetensors with all weights, checkpoint.json beside it
      dcp          the weights as torch.distributed.checkpoint writes them
      raw          the checkpoint's own files, as the trainer wrote them;
                   of a gang those of each rank, in rank-00000 and so on

    \b
    Examples:
      baton checkpoint export 12 --format huggingface --to ./my-model
      baton checkpoint export 12 --step 400 --format raw --to ./step-400
    """
    if digest and step is not None:
        raise click.UsageError("--digest and --step contradict each other: give one of them")
    target = _new(target)
    with _connect(context) as client, _made(target) as place:
        job = client.job(job_id)
        raw = place / "checkpoint"
        raw.mkdir()
        found, found_step = client.fetch(job_id, digest, step, raw)
        if kind == "raw":
            raw.rename(target)
        else:
            about = {"job": job_id, "digest": found, "step": found_step, "name": job.spec.name}
            about["trainer"] = job.spec.trainer
            arguments = ["--checkpoint", str(raw), "--format", kind, "--about", json.dumps(about)]
            if kind == "huggingface":
                arguments += ["--model", model or _model_of(job)]
            _convert(python, arguments, place / "made")
            (place / "made").rename(target)
    from coordinator.cli.values import Export

    if settings_of(context).as_json:
        write_json(
            Export(job_id=job_id, digest=found, step=found_step, format=kind, directory=str(target))
        )
    else:
        named = f"step {found_step} of job {job_id} ({found[:DIGEST_SHOWN]})"
        click.echo(f"{named} is in {target}")


@checkpoint.command("import", short_help="Make of weights what a new job can begin with.")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--format", "kind", required=True, type=click.Choice(FORMATS))
@click.option(
    "--to", "target", required=True, type=click.Path(path_type=Path), help="A new directory."
)
@_PYTHON
@common_options
@click.pass_context
def import_command(
    context: click.Context, directory: Path, kind: str, target: Path, python: str | None
) -> None:
    """Make a checkpoint directory of the weights in DIRECTORY, for a new job to begin with.

    Weights only: a job that begins with them is at step 0, with a fresh optimizer and its data from
    the start. The coordinator takes no part. Put the directory where the nodes see it, and name it
    in the configuration of a finetune job:

    \b
      start_from = "my-weights"

    A dcp directory holds a pickled index: import it only from somebody whom you would let run
    programs here.

    \b
    Example:
      baton checkpoint import ./my-model --format huggingface --to ./my-weights
    """
    target = _new(target)
    with _made(target) as place:
        _convert(python, ["--weights", str(directory), "--format", kind], place / "made")
        (place / "made").rename(target)
    from coordinator.cli.values import Imported

    if settings_of(context).as_json:
        write_json(Imported(format=kind, directory=str(target)))
    else:
        click.echo(
            f"weights are in {target}; a finetune job with start_from = {json.dumps(str(target))}"
            " begins with them, at step 0"
        )


def _connect(context: click.Context) -> "CheckpointClient":
    from coordinator.cli.checkpoint_client import CheckpointClient  # grpc takes its time

    return CheckpointClient(settings_of(context))


def _new(target: Path) -> Path:
    """An absolute path that nothing lies at yet."""
    target = target.absolute()
    if target.exists():
        raise BadInput(f"{target} exists already; name a new directory")
    if not target.parent.is_dir():
        raise BadInput(f"{target.parent} is no directory")
    return target


@contextlib.contextmanager
def _made(target: Path) -> Iterator[Path]:
    """A scratch directory beside `target`, on the same file system; gone afterwards."""
    place = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o700)
    except OSError as error:
        raise CommandFailed(f"cannot write {place}: {error.strerror}") from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _model_of(job: "Job") -> str:
    """What the job's configuration calls its model: a folder seen from its directory, or a name
    on a hub."""
    try:
        name = json.loads(job.spec.trainer_config_json or "{}").get("model", "")
    except (ValueError, AttributeError):
        name = ""
    if not isinstance(name, str) or not name:
        raise BadInput(f"job {job.id} does not name its model; give --model FOLDER")
    folder = Path(job.spec.working_directory or "/") / name
    return str(folder) if folder.exists() else name


def _convert(python: str | None, arguments: list[str], made: Path) -> None:
    """Run the trainers' program, which makes the directory `made`; raises `CommandFailed` with its
    sentence."""
    program = [python or sys.executable, "-P", "-m", "trainers.export"]
    command = [*program, *arguments, "--to", str(made)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise BadInput(f"cannot run {command[0]}: {error.strerror}; see --python") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise CommandFailed(f"the conversion failed: {said[-1]}")


def _show(
    context: click.Context, found: "list[KeptCheckpoint]", job_id: int, now: datetime
) -> None:
    if settings_of(context).as_json:
        write_json(found)
        return
    if not found:
        write_notice(f"job {job_id} has no checkpoint")
        return
    write_table(_COLUMNS, [_row(kept, now) for kept in found])


def _holders(kept: "KeptCheckpoint") -> str:
    from coordinator.cli.jobs import part_nodes

    if not kept.parts:
        return " ".join(kept.replicas)
    return f"{len(kept.parts) + 1} parts: {count_words(part_nodes(kept))}"


def _row(kept: "KeptCheckpoint", now: datetime) -> tuple[object, ...]:
    return (
        kept.digest[:DIGEST_SHOWN],
        kept.step,
        units.format_span(kept.commit_time, now),
        units.format_size(kept.size_bytes),
        _holders(kept),
        "yes" if kept.pinned else None,
        " ".join(kept.used_by),
        kept.bad,
    )
