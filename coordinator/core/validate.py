"""Which jobs can be accepted at all.

Problem: a job that can never run, accepted politely, waits for ever and nobody knows why. So a
request is judged when it is made, and a refusal says what to change. "Not now" is not judged here;
that is a wait reason of `placement.py`.
"""

import operator
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

from coordinator.core import arrays
from coordinator.core.launch import own_variables
from coordinator.core.model import GpuFacts, HostFacts, JobSpec
from coordinator.core.sentences import quantity, some
from coordinator.core.shares import SHARE_BYTES_MIN, SHARES_PERCENT_MAX, shareable_bytes
from coordinator.core.trainer_keys import KEYS

# Bounds. Each is far above real use and far below what would hurt.
NAME_CHARACTERS_MAX = 128
REQUEST_ID_CHARACTERS_MAX = 64
COMMAND_BYTES_MAX = 64 * 1024  # half of Linux's limit for one argument (MAX_ARG_STRLEN, execve(2))
ENVIRONMENT_ENTRIES_MAX = 256
ENVIRONMENT_BYTES_MAX = 64 * 1024
CONFIG_BYTES_MAX = 64 * 1024
GPUS_MAX = 64
RANKS_MAX = 1_024
GPU_TYPES_MAX = 16
GPU_TYPE_CHARACTERS_MAX = 96  # NVML's own limit for a device name (NVML_DEVICE_NAME_V2_BUFFER_SIZE)
TYPES_NAMED_MAX = 20  # in a sentence
PATH_BYTES_MAX = 4_096  # PATH_MAX, limits.h
DAY_MS = 86_400_000
GRACE_MS_MAX = 7 * DAY_MS
FLEXIBLE_MS_MAX = 30 * DAY_MS  # the term of a lease
MAX_RESTARTS_MAX = 1_000
# Jobs without GPUs share the cores: four a core keeps a burst of small ones moving without swamping
# the node's trainers.
SLOTS_PER_CPU = 4
# A node's list of what it keeps has 4,096 places; a job that takes more than these crowds others
# out.
KEEP_CHECKPOINTS_MAX = 64
# Of the programs of an array's trials together: each is written and kept with its own. Written in a
# tenth of a second, while nobody else is heard; a script takes more, and a name of it no room.
ARRAY_BYTES_MAX = 16 << 20

_PROJECT = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
# The variables of Baton's that are the user's: 0 leaves an unmodified script alone, and a hung one.
_USERS_VARIABLES = ("BATON_HOOK", "BATON_HANG_LIMIT")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def refuse_spec(spec: JobSpec) -> str:
    """A sentence that says what to change; empty when the job is well formed."""
    for check in (_labels, _program, _environment, _request, _share, _deadline, _ending, _array):
        sentence = check(spec)
        if sentence:
            return sentence
    return ""


def _labels(spec: JobSpec) -> str:
    if len(spec.name) > NAME_CHARACTERS_MAX or not spec.name.isprintable():
        return f"name must be at most {NAME_CHARACTERS_MAX} printable characters"
    if not _PROJECT.fullmatch(spec.project):
        return f"project {spec.project!r} must be 1 to 64 of a-z, 0-9 and '-'"
    return ""


def _program(spec: JobSpec) -> str:
    if spec.command and spec.trainer:
        return "give either a command or a built-in trainer, and not both"
    if not spec.command and not spec.trainer:
        return "nothing to run: give a command or a built-in trainer"
    if spec.trainer and spec.trainer not in KEYS:
        return f"unknown trainer {spec.trainer!r}; the built-in ones are {', '.join(KEYS)}"
    if spec.command and not spec.command[0]:
        return "the command's first word is empty"
    if any("\0" in word for word in (*spec.command, spec.working_directory)):
        return "command and working directory must not contain NUL characters"
    if sum(len(word.encode()) + 1 for word in spec.command) > COMMAND_BYTES_MAX:
        return f"the command is longer than {COMMAND_BYTES_MAX} bytes; put it into a script"
    if len(spec.trainer_config_json.encode()) > CONFIG_BYTES_MAX:
        return f"the trainer's configuration is longer than {CONFIG_BYTES_MAX} bytes"
    if spec.working_directory and not spec.working_directory.startswith("/"):
        return f"working directory {spec.working_directory!r} must be an absolute path"
    if len(spec.working_directory.encode()) > PATH_BYTES_MAX:
        return f"the working directory is longer than {PATH_BYTES_MAX} bytes"
    return ""


def _environment(spec: JobSpec) -> str:
    if len(spec.environment) > ENVIRONMENT_ENTRIES_MAX:
        return f"more than {ENVIRONMENT_ENTRIES_MAX} environment variables"
    size_bytes, own = 0, own_variables(spec)
    for name, value in spec.environment:
        if not _VARIABLE.fullmatch(name):
            return f"environment variable {name!r} must match [A-Za-z_][A-Za-z0-9_]*"
        if name.startswith("BATON_") and name not in _USERS_VARIABLES:
            return f"environment variable {name} is Baton's own; choose another name"
        if name in own:
            return (
                f"environment variable {name} is set by Baton: leave it out (for this job Baton"
                f" sets {', '.join(own)} and BATON_*)"
            )
        if "\0" in value:
            return f"environment variable {name} contains a NUL character"
        size_bytes += len(name) + len(value.encode()) + 2
    if size_bytes > ENVIRONMENT_BYTES_MAX:
        return f"the environment is larger than {ENVIRONMENT_BYTES_MAX} bytes"
    return ""


def _request(spec: JobSpec) -> str:
    if not 0 <= spec.gpus <= GPUS_MAX:
        return f"gpus is {spec.gpus}; it must be between 0 and {GPUS_MAX}"
    if not 1 <= spec.ranks <= RANKS_MAX:
        return f"ranks is {spec.ranks}; it must be between 1 and {RANKS_MAX}"
    if spec.memory_bytes < 0:
        return f"memory is {spec.memory_bytes} bytes; it must not be negative"
    if spec.gpu_memory_bytes_min < 0:
        return f"GPU memory is {spec.gpu_memory_bytes_min} bytes; it must not be negative"
    if spec.gpus == 0 and (spec.gpu_types or spec.gpu_memory_bytes_min):
        return "a GPU type or GPU memory is given for a job of 0 GPUs; set gpus to 1 or more"
    if len(spec.gpu_types) > GPU_TYPES_MAX or not all(spec.gpu_types):
        return f"gpu types must be at most {GPU_TYPES_MAX} and none of them empty"
    if any(len(kind) > GPU_TYPE_CHARACTERS_MAX for kind in spec.gpu_types):
        return f"a GPU type is longer than {GPU_TYPE_CHARACTERS_MAX} characters"
    return ""


def _share(spec: JobSpec) -> str:
    share_bytes = spec.shared_gpu_memory_bytes
    if spec.share_automatic and not share_bytes:
        return "whether a GPU can be shared depends on memory; say how much of it the job takes"
    if not share_bytes:
        return ""
    if share_bytes < SHARE_BYTES_MIN:
        return (
            f"the share of a GPU is {share_bytes} bytes; it must be 0 or at least {SHARE_BYTES_MIN}"
            f" ({SHARE_BYTES_MIN >> 20} MiB)"
        )
    if spec.gpus != 1 or spec.ranks != 1:
        return (
            f"gpus is {spec.gpus} and ranks is {spec.ranks}; a job that shares a GPU has 1 of each:"
            " set both to 1, or ask for whole GPUs"
        )
    return ""


def _deadline(spec: JobSpec) -> str:
    if spec.deadline_unix_ms < 0:
        return "the deadline is before 1970; leave it out, or give a time to come"
    if spec.deadline_unix_ms and not spec.gpus:
        return "only jobs with GPUs have a deadline; set gpus to 1 or more, or leave it out"
    return ""


def _ending(spec: JobSpec) -> str:
    for name, value_ms, most_ms in (
        ("grace", spec.grace_ms, GRACE_MS_MAX),
        ("flexible", spec.flexible_ms, FLEXIBLE_MS_MAX),
    ):
        if value_ms < 0:
            return f"{name} is {value_ms} ms; it must not be negative"
        if value_ms > most_ms:
            return f"{name} is {value_ms / DAY_MS:.3g} days; the most is {most_ms // DAY_MS} days"
    if spec.flexible_ms and not spec.gpus:
        return "nothing is kept or rented for a job without GPUs; leave flexible out"
    if not 0 <= spec.max_restarts <= MAX_RESTARTS_MAX:
        return f"max restarts is {spec.max_restarts}; it must be between 0 and {MAX_RESTARTS_MAX}"
    if not 1 <= spec.keep_checkpoints <= KEEP_CHECKPOINTS_MAX:
        return (
            f"keep checkpoints is {spec.keep_checkpoints}; it must be between 1 and"
            f" {KEEP_CHECKPOINTS_MAX}"
        )
    if len(spec.run_again_exit_codes) > 255:
        return "there are only 255 exit statuses that can mean 'run me again'"
    for code in spec.run_again_exit_codes:
        if not 1 <= code <= 255:
            return f"exit status {code} cannot mean 'run me again'; it must be between 1 and 255"
    return ""


def _array(spec: JobSpec) -> str:
    if not spec.array:
        return ""
    try:
        trials = len(arrays.parse(spec.array).indices)
    except ValueError as error:
        return str(error)
    size_bytes = trials * spec_bytes(spec)
    if size_bytes > ARRAY_BYTES_MAX:
        return (
            f"command, environment and configuration of {quantity(trials, 'trial')} have"
            f" {size_bytes} bytes together, and {ARRAY_BYTES_MAX} is the limit: put them into a"
            " file, or submit fewer at once"
        )
    return ""


def spec_bytes(spec: JobSpec) -> int:
    """Of what may be long of a request: command, environment and configuration."""
    return sum(map(len, _texts(spec)))


def _texts(spec: JobSpec) -> Iterable[bytes]:
    words = [
        *spec.command,
        spec.trainer_config_json,
        *(word for pair in spec.environment for word in pair),
    ]
    return (word.encode() for word in words)


class GpuNeed(Protocol):
    """What `JobSpec` says of each of its GPUs."""

    @property
    def gpu_types(self) -> tuple[str, ...]: ...

    @property
    def gpu_memory_bytes_min(self) -> int: ...

    @property
    def shared_gpu_memory_bytes(self) -> int: ...


def suits(spec: GpuNeed, gpu: GpuFacts) -> bool:
    """Whether this GPU, free, could serve the job."""
    if gpu.memory_bytes < spec.gpu_memory_bytes_min:
        return False
    if spec.shared_gpu_memory_bytes > shareable_bytes(gpu):
        return False
    return is_of_type(spec, gpu.name)


def is_of_type(spec: GpuNeed, name: str) -> bool:
    """Whether a GPU of this name is one of the types that the job accepts."""
    return not spec.gpu_types or _is_of_type(spec.gpu_types, name)


@lru_cache(maxsize=1_024)  # each GPU of a fleet is asked, of which there are a few kinds
def _is_of_type(gpu_types: tuple[str, ...], name: str) -> bool:
    return any(kind.lower() in name.lower() for kind in gpu_types)


def could_hold(spec: JobSpec, gpus: Sequence[GpuFacts], memory_bytes: int) -> bool:
    """Whether a node, wholly free, could serve one rank of the job."""
    fitting = sum(1 for gpu in gpus if suits(spec, gpu))
    return fitting >= spec.gpus and memory_bytes >= spec.memory_bytes


def describe_need(spec: JobSpec) -> str:
    """What the job asks of one node, for a sentence: "2 GPUs of type H100 with 80.0 GB each"."""
    if spec.gpus == 0:
        need = "a place for a job without GPUs"
    else:
        share = spec.shared_gpu_memory_bytes
        need = f"{gigabytes(share)} of " if share else ""
        need += "a shared GPU" if share else quantity(spec.gpus, "GPU")
        if spec.gpu_types:
            need += f" of type {' or '.join(spec.gpu_types)}"
        if spec.gpu_memory_bytes_min:
            each = " each" if spec.gpus > 1 and spec.ranks == 1 else ""
            need += f" with at least {gigabytes(spec.gpu_memory_bytes_min)}{each}"
    if spec.memory_bytes:
        need += f" and {gigabytes(spec.memory_bytes)} of host memory"
    return need


def describe_ranks(spec: JobSpec) -> str:
    """The same of a gang: "4 ranks of 1 GPU each"."""
    return f"{spec.ranks} ranks of {describe_need(spec)} each"


def gigabytes(count_bytes: int) -> str:
    return f"{count_bytes / 1e9:.1f} GB"


def refuse_fleet(
    spec: JobSpec,
    fleet: Iterable[tuple[HostFacts, tuple[GpuFacts, ...]]],
    counts: Sequence[int] = (),
) -> str:
    """Whether any node that was ever seen, wholly free, could run the job. A fleet that nobody has
    joined refuses nothing. `counts`: so many nodes are like each; one where it is not said.

    Lost and drained nodes count: they may come back.
    """
    nodes = list(fleet)
    if not nodes:
        return ""
    names = sorted(dict.fromkeys(gpu.name for _, gpus in nodes for gpu in gpus))
    if spec.gpus and not names:
        return (
            f"needs {describe_need(spec)}, and no node has a GPU that its agent can read;"
            " `baton nodes` says why"
        )
    if spec.gpu_types and names and not any(is_of_type(spec, name) for name in names):
        return (
            f"no node has a GPU of type {' or '.join(spec.gpu_types)}; there are"
            f" {some(names, TYPES_NAMED_MAX)}"
        )
    fitting = [sum(1 for gpu in gpus if suits(spec, gpu)) for _, gpus in nodes]
    if max(fitting) < spec.gpus:
        if spec.shared_gpu_memory_bytes:
            return (
                f"needs {describe_need(spec)}, and shares are at most {SHARES_PERCENT_MAX}% of a"
                " GPU's memory; no node has one that is large enough: ask for less, or for other"
                " GPUs"
            )
        if not max(fitting):
            known = [gpu for _, gpus in nodes for gpu in gpus if is_of_type(spec, gpu.name)]
            largest = gigabytes(max(gpu.memory_bytes for gpu in known))
            return f"needs {describe_need(spec)}; the largest has {largest}: ask for less memory"
        return (
            f"needs {describe_need(spec)} on one node; the most that any node has is"
            f" {max(fitting)}: ask for fewer, or for other GPUs"
        )
    able = [
        host.memory_bytes
        for (host, _), count in zip(nodes, fitting, strict=True)
        if count >= spec.gpus
    ]
    if max(able) < spec.memory_bytes:
        return (
            f"needs {gigabytes(spec.memory_bytes)} of host memory; the most that a node with"
            f" enough GPUs has is {gigabytes(max(able))}: ask for less memory"
        )
    if spec.ranks == 1:
        return ""
    each = [_places(spec, host, gpus) for host, gpus in nodes]
    return _refuse_gang(spec, sum(map(operator.mul, each, counts or [1] * len(each))))


def _refuse_gang(spec: JobSpec, places: int) -> str:
    if places >= spec.ranks:
        return ""
    return (
        f"needs {describe_ranks(spec)}; the whole fleet, with nothing else on it, has places for"
        f" {places}: ask for fewer ranks, or for less for each"
    )


def _places(spec: JobSpec, host: HostFacts, gpus: tuple[GpuFacts, ...]) -> int:
    """How many ranks a node could hold at most."""
    if spec.gpus:
        count = sum(1 for gpu in gpus if suits(spec, gpu)) // spec.gpus
    else:
        count = max(1, host.cpu_count) * SLOTS_PER_CPU
    return min(count, host.memory_bytes // spec.memory_bytes) if spec.memory_bytes else count
