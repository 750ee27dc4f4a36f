"""What a trainer tells its node over the socket, as values.

Problem: the lines come from any program that a user cares to run. They are checked and bounded at
the edge (`sdk_server.py`); what reaches the core is one of these and nothing else, so no decision
ever looks into a dictionary.
"""

from dataclasses import dataclass

from agent.core.ids import RANKS_MAX

PARTS_MAX = RANKS_MAX  # each rank has one


@dataclass(frozen=True, slots=True)
class TrainerHello:
    """First on every connection, also after a reconnect. `pid` is what the trainer says it is."""

    pid: int


@dataclass(frozen=True, slots=True)
class TrainerTime:
    """How the trainer's process has spent its time so far: finite seconds, 0 or more, none counted
    twice."""

    step_s: float = 0.0
    evaluate_s: float = 0.0
    input_wait_s: float = 0.0
    capture_s: float = 0.0
    restore_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainerProgress:
    """The latest wins. `total_steps` is None when the trainer does not know, `time` when it does
    not say."""

    step: int
    total_steps: int | None
    metrics: tuple[tuple[str, float], ...]
    time: TrainerTime | None = None


@dataclass(frozen=True, slots=True)
class TrainerMilestone:
    """A moment worth timing: `imports`, `load`, `first_step` or `evaluated`; wall time."""

    name: str
    unix_ms: int


@dataclass(frozen=True, slots=True)
class TrainerCheckpoint:
    """A directory or a capture handed over for keeping; `id` is the trainer's own number, for the
    answers.

    `path` is absolute, free of symbolic links, and strictly inside the attempt's staging directory;
    for a capture it is the `capture_name`, which is no path. `parts`, 1 to `PARTS_MAX`: as many
    ranks hand over a part of this step each, and this is its own; 1: it is the whole.
    """

    id: int
    path: str
    step: int
    parts: int = 1


@dataclass(frozen=True, slots=True)
class TrainerSlab:
    """The trainer has a slab, memory of the agent's that it writes captures into: given just now,
    or held by the trainer over an agent's restart."""

    slot_bytes: int
    slots: int


@dataclass(frozen=True, slots=True)
class TrainerSection:
    """The trainer behind connection `source` is in this section now; empty: in none. `count` are
    those that have ended since it last said so. `ended`: so has the connection."""

    source: int
    name: str = ""
    count: int = 0
    ended: bool = False


@dataclass(frozen=True, slots=True)
class TrainerHeedsSaves:
    """The trainer looks for requests to save after its steps, and so may be sent one."""


@dataclass(frozen=True, slots=True)
class TrainerLeaving:
    """The last word of a program: it, and whatever runs beside it below one launcher, will end with
    this status, 0 to 255. `reason` is a sentence, or empty."""

    status: int
    reason: str = ""


TrainerMessage = (
    TrainerHello
    | TrainerProgress
    | TrainerMilestone
    | TrainerCheckpoint
    | TrainerSlab
    | TrainerSection
    | TrainerHeedsSaves
    | TrainerLeaving
)

_CAPTURE = "slab:"


def capture_name(slab: int, sequence: int) -> str:
    """What a capture goes by where a checkpoint's directory would be named: `slab` is a number that
    no other slab of this boot has, `sequence` only grows. Directories are absolute paths, so no
    name is both."""
    return f"{_CAPTURE}{slab}:{sequence}"


def capture_place(name: str) -> tuple[int, int]:
    """The slab and the sequence of a capture's name."""
    _, slab, sequence = name.split(":")
    return int(slab), int(sequence)


def is_capture(path: str) -> bool:
    """Whether a checkpoint lies in a slab, and not in a directory."""
    return path.startswith(_CAPTURE)
