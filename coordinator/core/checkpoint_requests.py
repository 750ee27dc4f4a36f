"""What people ask of checkpoints, a part of what `messages.py` says goes into the core: which are
kept, keep this one, and one of them for reading; and those on nodes that the store has forgotten.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ListCheckpoints:
    job_id: int


@dataclass(frozen=True, slots=True)
class CheckpointChoice:
    """A digest or its first digits, or else a step, or else the job's last checkpoint."""

    digest: str = ""
    step: int | None = None


@dataclass(frozen=True, slots=True)
class PinCheckpoint:
    job_id: int
    choice: CheckpointChoice


@dataclass(frozen=True, slots=True)
class UnpinCheckpoint:
    """`choice` of `None`: every pin of the job."""

    job_id: int
    choice: CheckpointChoice | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint on a node says of itself. `rank`: it is that one's part; `None`: whole."""

    digest: str
    job_id: int
    epoch: int
    step: int
    parent: str
    size_bytes: int
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class NoteManifests:
    """Of these digests on a node somebody has read what they are; of some, that they are nothing
    to us."""

    node: str
    digests: tuple[str, ...]
    manifests: tuple[Manifest, ...]


@dataclass(frozen=True, slots=True)
class FindCheckpoint:
    """One of a job's checkpoints, for reading it."""

    job_id: int
    choice: CheckpointChoice
