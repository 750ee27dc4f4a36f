"""What an attempt is started with beside its job: its place in a gang, what it may resume from.

Problem: ranks that are started one by one, each with its own idea of who the others are, never
meet. So the coordinator, which alone knows all of them, says to each where it stands and where rank
0 listens, in the very order that starts it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PeerAddress:
    node: str
    address: str


@dataclass(frozen=True, slots=True)
class RestorePart:
    """`sources` best first."""

    digest: str
    sources: tuple[PeerAddress, ...]


@dataclass(frozen=True, slots=True)
class RestoreCandidate:
    """`sources` best first; of a checkpoint in parts, rank 0's, and `parts` are the others'."""

    digest: str
    step: int
    sources: tuple[PeerAddress, ...]
    parts: tuple[RestorePart, ...] = ()


@dataclass(frozen=True, slots=True)
class Gang:
    """The place of one rank. `nodes` are by node rank; `node_gpu_uuids` are those of all ranks of
    this gang on this node, in order of local rank."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    nodes: tuple[str, ...]
    master_host: str
    master_port: int
    node_gpu_uuids: tuple[str, ...]
