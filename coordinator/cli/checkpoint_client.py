"""Checkpoints over gRPC: which are kept, pins, and their files, each byte verified.

Problem: bytes that have come through three processes are worth what their digests say. So the
manifest is compared with the digest that was asked for, each chunk with the digest that the
manifest gives it, and a path in it may not lead out of the directory. A chunk is written to every
place that the manifest gives it as it arrives, so that a checkpoint needs its own size on this disk
and not twice.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Self

import grpc
from blake3 import blake3

from coordinator.cli import values
from coordinator.cli.client import Client
from coordinator.cli.decoding import decode
from coordinator.cli.settings import CommandFailed
from protos.baton.v1 import checkpoints_pb2 as pb
from protos.baton.v1 import checkpoints_pb2_grpc, peer_pb2

# Where the part of each rank lies, as agents lay out what a gang resumes from.
PART_NAME = "rank-{:05d}"


@dataclass(slots=True)
class _Layout:
    """Where each chunk goes. `places` are (file, offset) by digest; `sizes_bytes` of the chunks."""

    places: dict[str, list[tuple[Path, int]]] = field(default_factory=dict)
    sizes_bytes: dict[str, int] = field(default_factory=dict)


class CheckpointClient(Client):
    """Speaks to one coordinator about checkpoints, and about jobs. A context manager."""

    def __enter__(self) -> Self:
        super().__enter__()
        assert self._channel is not None
        self._checkpoints = checkpoints_pb2_grpc.CheckpointServiceStub(self._channel)
        return self

    def checkpoints(self, job_id: int) -> list[values.KeptCheckpoint]:
        """What is kept of a job, newest first."""
        request = pb.ListCheckpointsRequest(job_id=job_id)
        return _kept(self._call(self._checkpoints.ListCheckpoints, request).checkpoints)

    def pin(self, job_id: int, digest: str, step: int | None) -> list[values.KeptCheckpoint]:
        """Keep one until it is unpinned; returns all that are kept of the job."""
        request = pb.PinCheckpointRequest(job_id=job_id, choice=_choice(digest, step))
        return _kept(self._call(self._checkpoints.PinCheckpoint, request).checkpoints)

    def unpin(self, job_id: int, digest: str, step: int | None) -> list[values.KeptCheckpoint]:
        """Undo one pin, or with neither digest nor step all of the job's."""
        chosen = _choice(digest, step) if digest or step is not None else None
        request = pb.UnpinCheckpointRequest(job_id=job_id, choice=chosen)
        return _kept(self._call(self._checkpoints.UnpinCheckpoint, request).checkpoints)

    def fetch(self, job_id: int, digest: str, step: int | None, target: Path) -> tuple[str, int]:
        """Write a checkpoint's files below `target`, an empty directory; returns its digest and its
        step. Raises `CommandFailed` when it cannot be had or a byte differs."""
        request = pb.ReadCheckpointRequest(job_id=job_id, choice=_choice(digest, step))
        try:
            # No deadline: it takes as long as its bytes take. A dead machine ends the channel.
            responses = self._checkpoints.ReadCheckpoint(request)
            return _receive(iter(responses), target)
        except grpc.RpcError as error:
            raise self._failed(error) from error
        except OSError as error:
            raise CommandFailed(f"cannot write {target}: {error.strerror}") from error


def _choice(digest: str, step: int | None) -> pb.CheckpointChoice:
    return pb.CheckpointChoice(digest=digest, step=step)


def _kept(checkpoints: Iterable[pb.KeptCheckpoint]) -> list[values.KeptCheckpoint]:
    return [
        decode(
            kept.checkpoint,
            values.KeptCheckpoint,
            pinned=kept.pinned,
            bad=kept.bad,
            used_by=list(kept.used_by),
        )
        for kept in checkpoints
    ]


def _receive(responses: Iterator[pb.ReadCheckpointResponse], target: Path) -> tuple[str, int]:
    """One checkpoint, or the parts of all ranks: then each in a directory of its own. How many
    there are shows when the second begins, so the first is moved then."""
    manifest = _manifest(next(responses, None))
    first, step, following = _receive_part(manifest, responses, target)
    if following is None:
        return first, step
    beside = target.with_name(f"{target.name}.rank-0")
    target.rename(beside)
    target.mkdir(mode=0o700)
    beside.rename(target / PART_NAME.format(0))
    rank = 0
    while following is not None:
        rank += 1
        place = target / PART_NAME.format(rank)
        place.mkdir()
        _, part_step, following = _receive_part(_manifest(following), responses, place)
        if part_step != step:
            raise CommandFailed(f"rank {rank}'s part is of step {part_step}, rank 0's of {step}")
    return first, step


def _manifest(response: pb.ReadCheckpointResponse | None) -> peer_pb2.Manifest:
    if response is None or response.WhichOneof("part") != "manifest":
        raise CommandFailed("the checkpoint came without its manifest")
    manifest = response.manifest
    if blake3(manifest.data).hexdigest() != manifest.digest:
        raise CommandFailed(f"the manifest of {manifest.digest[:12]} does not match its digest")
    return manifest


def _receive_part(
    manifest: peer_pb2.Manifest, responses: Iterator[pb.ReadCheckpointResponse], target: Path
) -> tuple[str, int, pb.ReadCheckpointResponse | None]:
    """Digest and step, and what came after it: the next part's manifest, or nothing."""
    document = json.loads(manifest.data)
    layout = _lay_out(document, target)
    missing = dict.fromkeys(layout.places)
    chunk = bytearray()
    following = None
    for response in responses:
        if response.WhichOneof("part") == "manifest":
            following = response
            break
        piece: peer_pb2.Chunk = response.chunk
        chunk += piece.data
        size_bytes = layout.sizes_bytes.get(piece.digest, 0)
        if len(chunk) < size_bytes:
            continue
        if len(chunk) != size_bytes or blake3(chunk).hexdigest() != piece.digest:
            raise CommandFailed(f"chunk {piece.digest[:12]} does not match its digest")
        for path, offset in layout.places[piece.digest]:
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(chunk)
        missing.pop(piece.digest, None)
        chunk = bytearray()
    if missing:
        raise CommandFailed(f"the checkpoint ended with {len(missing)} chunks missing")
    return manifest.digest, int(document["step"]), following


def _lay_out(document: dict[str, object], target: Path) -> _Layout:
    """Make the files, empty, and say where each chunk goes. The manifest's digest has been verified
    and agents check what they sign; a path that leads elsewhere is refused all the same."""
    layout = _Layout()
    files = document["files"]
    assert isinstance(files, list)
    for entry in files:
        relative = PurePosixPath(entry["path"])
        if relative.is_absolute() or ".." in relative.parts:
            raise CommandFailed(f"the checkpoint names a file outside of it: {entry['path']!r}")
        path = target / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        offset = 0
        for digest, size_bytes in entry["chunks"]:
            layout.places.setdefault(digest, []).append((path, offset))
            layout.sizes_bytes[digest] = size_bytes
            offset += size_bytes
        os.truncate(path, offset)
    return layout
