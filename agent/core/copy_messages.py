"""What is said of copies of checkpoints: where they are to go, and what came of one.

Problem: as in `messages.py`. A copy goes from this node to one other node, or to the shared
directory, and is told of by the attempt and the digest of what was copied.
"""

from dataclasses import dataclass

from agent.core.values import LoneCheckpoint, ReplicaSource


@dataclass(frozen=True, slots=True)
class SetReplicaTarget:
    """`lone` is to be copied there at once. `lost`: the node before takes nothing any more, so that
    what is on its way there would not arrive."""

    attempt: str
    target: ReplicaSource | None
    required: bool
    lone: LoneCheckpoint | None = None
    lost: bool = False


@dataclass(frozen=True, slots=True)
class ReplicateCheckpoint:
    attempt: str
    digest: str
    target: ReplicaSource


@dataclass(frozen=True, slots=True)
class ReplicationDone:
    attempt: str
    digest: str
    node: str


@dataclass(frozen=True, slots=True)
class ReplicationFailed:
    attempt: str
    digest: str
    reason: str
