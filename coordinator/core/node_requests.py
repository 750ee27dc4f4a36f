"""What people ask of nodes, a part of what `messages.py` says goes into the core: that they go out
of service and come back, how often their GPUs are read, and that one is forgotten."""

from dataclasses import dataclass

from coordinator.core.model import TelemetryRate


@dataclass(frozen=True, slots=True)
class CordonNode:
    node: str


@dataclass(frozen=True, slots=True)
class DrainNode:
    node: str


@dataclass(frozen=True, slots=True)
class UncordonNode:
    node: str


@dataclass(frozen=True, slots=True)
class SetTelemetryRate:
    node: str
    rate: TelemetryRate


@dataclass(frozen=True, slots=True)
class ForgetNode:
    """It is not coming back. `lose_checkpoints`: also those that lie nowhere else."""

    node: str
    lose_checkpoints: bool = False


@dataclass(frozen=True, slots=True)
class ListNodes:
    """By id: so many at most, after that one, or all (0); of `nodes` alone where any are named."""

    page_size: int = 0
    after_node: str = ""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DropNode:
    """The record that nothing is kept of a node."""

    node: str
