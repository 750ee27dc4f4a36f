"""What a trainer tells its node over the socket, as values.

Problem: the lines come from any program that a user cares to run. They are checked and bounded at
the edge (`sdk_server.py`); what reaches the core is one of these and nothing else, so no decision
ever looks into a dictionary.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainerHello:
    """First on every connection, also after a reconnect. `pid` is what the trainer says it is."""

    pid: int


@dataclass(frozen=True, slots=True)
class TrainerProgress:
    """The latest wins. `total_steps` is None when the trainer does not know."""

    step: int
    total_steps: int | None
    metrics: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class TrainerMilestone:
    """A moment worth timing: `imports`, `load`, `first_step` or `evaluated`; wall time."""

    name: str
    unix_ms: int


@dataclass(frozen=True, slots=True)
class TrainerCheckpoint:
    """A directory handed over for keeping; `id` is the trainer's own number, for the answers.

    `path` is absolute, free of symbolic links, and strictly inside the attempt's staging directory.
    """

    id: int
    path: str
    step: int


TrainerMessage = TrainerHello | TrainerProgress | TrainerMilestone | TrainerCheckpoint
