"""A job as a TOML file: read, checked, and every mistake answered with a sentence that names the
file and the key.

Problem: a job file that says `gpu = 4` where it should say `gpus = 4` would run on no GPU at all,
and its owner would find out in the morning. So an unknown key is an error that names the nearest
right one, and a value of the wrong type says what was expected. All unknown keys are found by hand
first, because msgspec stops at the first and knows no neighbours; msgspec then checks types, with
`forbid_unknown_fields` as the second lock.

`JobFile` is also what the flags of `baton submit` become: the file and the flags are two spellings
of one thing, and `overlay` puts the second over the first.
"""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from coordinator.cli import values
from coordinator.cli.settings import BadInput
from coordinator.cli.share import parse_share
from coordinator.cli.units import parse_duration, parse_lead, parse_size, parse_time

# A job file is written by hand; the coordinator takes a trainer configuration of at most 64 KiB in
# it.
FILE_BYTES_MAX = 1024 * 1024

_Parsed = TypeVar("_Parsed")
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]


class JobFile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a job file may say. `UNSET` is what it does not say."""

    name: str | UnsetType = UNSET
    project: str | UnsetType = UNSET
    job_class: Literal["guaranteed", "standard", "spare"] | UnsetType = msgspec.field(
        default=UNSET, name="class"
    )
    command: list[str] | UnsetType = UNSET
    trainer: str | UnsetType = UNSET
    config: str | dict[str, Any] | UnsetType = UNSET
    env: dict[str, str] | UnsetType = UNSET
    workdir: str | UnsetType = UNSET
    ranks: Int32 | UnsetType = UNSET
    gpus: Int32 | UnsetType = UNSET
    gpu_types: list[str] | UnsetType = UNSET
    gpu_memory_min: int | str | UnsetType = UNSET
    share_gpu: int | str | UnsetType = UNSET
    memory: int | str | UnsetType = UNSET
    grace: str | UnsetType = UNSET
    flexible: str | UnsetType = UNSET
    signal: Literal["TERM", "USR1", "USR2"] | UnsetType = UNSET
    max_restarts: Int32 | UnsetType = UNSET
    run_again_exit_codes: list[Int32] | UnsetType = UNSET
    replication: Literal["automatic", "required", "none"] | UnsetType = UNSET
    slurm_env: bool | UnsetType = UNSET
    hold: bool | UnsetType = UNSET
    keep_checkpoints: Int32 | UnsetType = UNSET
    deadline: str | UnsetType = UNSET
    array: str | UnsetType = UNSET


def read(path: Path) -> JobFile:
    """The job file at `path`. Raises `BadInput` with one sentence that names the file."""
    try:
        document = tomllib.loads(_read_text(path))
    except ValueError as error:  # also for a number of thousands of digits
        wanted = "not valid TOML, as a job file is"
        raise BadInput(f"{path}: {wanted}: {_lower_first(str(error))}") from error
    except RecursionError as error:
        raise BadInput(f"{path}: nested too deeply") from error
    known = [field.encode_name for field in msgspec.structs.fields(JobFile)]
    unknown = [_unknown(key, known) for key in document if key not in known]
    if unknown:
        raise BadInput(f"{path}: {'; '.join(unknown)}")
    # TOML has times and days of its own, which mean what they mean in quotes.
    if isinstance(deadline := document.get("deadline"), date):
        document["deadline"] = deadline.isoformat()
    try:
        return msgspec.convert(document, JobFile)
    except msgspec.ValidationError as error:
        said = _sentence(str(error))
        if isinstance(env := document.get("env"), dict):
            name = next((name for name, word in env.items() if not isinstance(word, str)), "")
            said = said.replace("env[...]", f"env.{name}")
        raise BadInput(f"{path}: {said}") from error


def from_flags(flags: dict[str, Any]) -> JobFile:
    """The flags of `baton submit` as if they stood in a file; `None` and empty are "not given".

    Raises `BadInput` for a number that does not fit.
    """
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    if "job_class" in given:
        given["class"] = given.pop("job_class")
    if "pairs" in given:
        given["env"] = dict(given.pop("pairs"))
    try:
        return msgspec.convert(given, JobFile)
    except msgspec.ValidationError as error:
        raise BadInput(f"--{_sentence(str(error)).replace('_', '-')}") from error


def overlay(below: JobFile, above: JobFile) -> JobFile:
    """`above` where it says something, else `below`. Environments are merged; a new command or
    trainer replaces both, and so do whole GPUs or a share of one."""
    changes: dict[str, Any] = {
        name: getattr(above, name)
        for name in above.__struct_fields__
        if getattr(above, name) is not UNSET
    }
    if above.env is not UNSET and below.env is not UNSET:
        changes["env"] = {**below.env, **above.env}
    if above.command is not UNSET:
        changes |= {"trainer": UNSET, "config": UNSET}
    if above.trainer is not UNSET:
        changes |= {"command": UNSET}
    if (above.gpus is UNSET) != (above.share_gpu is UNSET):
        changes |= {"share_gpu" if above.share_gpu is UNSET else "gpus": UNSET}
    return msgspec.structs.replace(below, **changes)


def to_spec(job: JobFile, here: Path) -> values.JobSpec:
    """The request that goes to the coordinator; relative paths are taken from `here`, an absolute
    path.

    Raises `BadInput` for what this side can know: sizes, durations, a configuration that is missing
    or cannot be read.
    """
    if job.gpus is not UNSET and job.share_gpu is not UNSET:
        raise BadInput("--share-gpu is in place of --gpus: leave one of them out")
    if job.array == "":  # on the wire it is unsaid, and would be one job
        raise BadInput("--array is empty; write it like 0-99, 0-99%8 or 1,3,8-16:4")
    if job.ranks is not UNSET and job.ranks < 1:
        # On the wire 0 is unsaid, and would be one rank.
        raise BadInput(f"--ranks is {job.ranks}; a job has 1 at least")
    if job.trainer and job.config is UNSET:
        raise BadInput(
            "--trainer needs --config FILE, which names at least its model and train_data"
        )
    # A configuration means its paths from where it lies, as it does for the trainer run by hand.
    default = (here / job.config).parent if isinstance(job.config, str) else here
    workdir = _or(job.workdir, str(default))
    automatic, share_bytes = _parsed("share_gpu", job.share_gpu, (False, 0), parse_share)
    return values.JobSpec(
        name=_or(job.name, ""),
        project=_or(job.project, ""),
        job_class=_or(job.job_class, None),
        command=_or(job.command, []),
        trainer=_or(job.trainer, ""),
        trainer_config_json="" if job.config is UNSET else _config_json(job.config, here),
        environment=_or(job.env, {}),
        working_directory=str(here / workdir) if workdir else "",
        gpus=_or(job.gpus, 1 if share_bytes or automatic else 0),
        gpu_types=_or(job.gpu_types, []),
        gpu_memory_bytes_min=_parsed("gpu_memory_min", job.gpu_memory_min, 0, parse_size),
        memory_bytes=_parsed("memory", job.memory, 0, parse_size),
        grace_ms=_parsed("grace", job.grace, None, parse_duration),
        stop_signal=None if job.signal is UNSET else job.signal.lower(),
        max_restarts=_or(job.max_restarts, None),
        run_again_exit_codes=_or(job.run_again_exit_codes, []),
        replication=_or(job.replication, None),
        slurm_environment=_or(job.slurm_env, False),
        hold=_or(job.hold, False),
        keep_checkpoints=_or(job.keep_checkpoints, None),
        ranks=_or(job.ranks, 1),
        shared_gpu_memory_bytes=share_bytes,
        flexible_ms=_parsed("flexible", job.flexible, 0, parse_duration),
        deadline=_parsed(
            "deadline", job.deadline, None, lambda text: parse_time(text, datetime.now(UTC))
        ),
        share_automatic=automatic,
        array=_or(job.array, ""),
    )


def deadline_in_ms(job: JobFile) -> int:
    """How long after its submission the deadline is, where it is said so; otherwise 0. The clock
    that counts is the coordinator's."""
    return _parsed("deadline", job.deadline, 0, parse_lead)


def _or(value: Any, default: Any) -> Any:
    return default if value is UNSET else value


def _parsed(key: str, value: Any, default: _Parsed, parse: Callable[[str], _Parsed]) -> _Parsed:
    """What `parse` makes of it. A size may be a number, and goes through the same gate, so that
    both spellings have the same bounds."""
    if value is UNSET:
        return default
    try:
        return parse(str(value))
    except ValueError as error:
        raise BadInput(f"{key}: {error}") from error


def _config_json(config: str | dict[str, Any], here: Path) -> str:
    """A trainer's configuration as JSON: a table of the job file, or a path to a .json or .toml
    file."""
    where, table = "config", config
    if isinstance(config, str):
        path = here / config
        where, table = config, _read_config(path, config)
    if not isinstance(table, dict):
        raise BadInput(f"{where}: a trainer's configuration is a table of keys and values")
    trouble = _not_json(table)
    if trouble:
        raise BadInput(f"{where}: {trouble}")
    return json.dumps(table, allow_nan=False)


def _read_config(path: Path, name: str) -> Any:
    content = _read_text(path)
    try:
        return tomllib.loads(content) if path.suffix == ".toml" else json.loads(content)
    except ValueError as error:  # also for a number of thousands of digits
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise BadInput(f"{name}: not valid {kind}: {_lower_first(str(error))}") from error
    except RecursionError as error:
        raise BadInput(f"{name}: nested too deeply") from error


def _not_json(value: Any, path: str = "") -> str:
    """Why `value` has no JSON form, or nothing. TOML nests at most as deep as its author did."""
    if isinstance(value, dict):
        parts = [(f"{path}.{key}" if path else str(key), child) for key, child in value.items()]
    elif isinstance(value, list):
        parts = [(f"{path}[{index}]", child) for index, child in enumerate(value)]
    else:
        if isinstance(value, float) and not math.isfinite(value):
            return f"{path}: {value} has no JSON form"
        if value is not None and not isinstance(value, str | int | float | bool):
            return f"{path}: a date or time has no JSON form; write it as a string"
        return ""
    return next(filter(None, (_not_json(child, where) for where, child in parts)), "")


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
        if len(content) > FILE_BYTES_MAX:
            raise BadInput(f"{path}: larger than {FILE_BYTES_MAX} bytes")
        return content.decode("utf-8-sig")  # some editors mark UTF-8
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})") from error


def _unknown(key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if nearest:
        return f"unknown key {key!r}; did you mean {nearest[0]!r}?"
    return f"unknown key {key!r}; the keys are {', '.join(known)}"


_EXPECTED = re.compile(r"Expected `([^`]+)`, got `([^`]+)`")
_TYPE_WORDS = {
    "int": "a whole number",
    "str": "a string",
    "bool": "true or false",
    "float": "a number with a decimal point",
    "array": "a list",
    "object": "a table",
    "date": "a date",
    "datetime": "a date and time",
    "time": "a time",
}


def _sentence(error: str) -> str:
    """msgspec's message as one of ours: "gpus: expected a whole number, got a string"."""
    message, _, path = error.partition(" - at `$")
    key = path.rstrip("`").removeprefix(".")
    match = _EXPECTED.fullmatch(message)
    if match:
        expected, got = (
            " or ".join(_TYPE_WORDS.get(word, word) for word in side.split(" | "))
            for side in match.groups()
        )
        message = f"expected {expected}, got {got}"
        if key == "command":
            message += '; write the words apart: command = ["python", "train.py"]'
        if key == "deadline":
            message += "; write it like 2026-11-30T09:00:00"
        if key in ("grace", "flexible"):
            message += f'; write it with its unit: {key} = "120s"'
        if key.startswith("env["):
            message += '; write each value in quotes: NAME = "1"'
    elif message.startswith("Invalid enum value"):
        message = f"{message.removeprefix('Invalid enum value ')} is none of {_choices(key)}"
    message = message.replace("`int`", _TYPE_WORDS["int"])
    return f"{key}: {_lower_first(message)}" if key else _lower_first(message)


def _choices(key: str) -> str:
    kind = {field.encode_name: field.type for field in msgspec.structs.fields(JobFile)}[key]
    return ", ".join(get_args(get_args(kind)[0]))


def _lower_first(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
