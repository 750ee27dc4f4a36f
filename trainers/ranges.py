"""Rows of a checkpoint's tensors, read from wherever they lie: from one directory, or each rank's.

Problem: a training of two ranks ends on a machine with room for three, or one. Each of them needs
other rows than anybody wrote, and no more of the rest than it can hold.

A checkpoint of several ranks is a directory of each, ``rank-00000``, ``rank-00001`` and so on: an
ordinary checkpoint directory whose manifest names the rank and the rows that it has. They are one
checkpoint if they agree on job, attempt, step, samples and number of ranks, and every row is there
once. What every rank has a different one of, the random generators, is in no common layout.

A ``Reader`` takes the rows that it is asked for from whichever files hold them. The files are
mapped, so what is not asked for is not read.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from trainers.manifest import (
    Document,
    Layout,
    LogicalTensor,
    Manifest,
    ManifestError,
    Shard,
    check_cover,
    check_files,
    dtype_name,
    load,
)

OF_EACH_RANK = "random/"
"""Logical tensors that every rank has whole, and another one's than its neighbour's."""


def name_of_part(rank: int) -> str:
    """The directory of a rank's part."""
    return f"rank-{rank:05d}"


def in_parts(directory: Path) -> bool:
    """Whether the checkpoint in a directory is one of several ranks."""
    return (directory / name_of_part(0)).is_dir()


def load_parts(directory: Path) -> tuple[Manifest, list[Document]]:
    """What the ranks' directories are together: rank 0's manifest with the tensors of all, and each
    rank's document. Raises ManifestError where one is missing, altered, or of another checkpoint.
    """
    first, document = load(directory / name_of_part(0))
    manifests, documents = [first], [document]
    for rank in range(1, first.world_size):
        found, document = load(directory / name_of_part(rank))
        manifests.append(found)
        documents.append(document)
    held: list[dict[str, LogicalTensor]] = []
    files: dict[str, str] = {}
    for rank, found in enumerate(manifests):
        part = name_of_part(rank)
        if found.rank != rank:
            raise ManifestError(f"{part} in {directory} is the part of rank {found.rank}")
        for key in ("job", "epoch", "step", "samples", "world_size"):
            ours, theirs = getattr(found, key), getattr(first, key)
            if ours != theirs:
                raise ManifestError(
                    f"{part} in {directory} belongs to another checkpoint: its '{key}' is {ours},"
                    f" and that of {name_of_part(0)} is {theirs}"
                )
        held.append(_below(part, found.tensors))
        files |= {f"{part}/{name}": digest for name, digest in found.files.items()}
    return replace(first, rank=None, tensors=merge(held), files=files), documents


def load_any(directory: Path) -> Manifest:
    """The manifest of a checkpoint, in parts or whole. Raises ManifestError."""
    return (load_parts if in_parts(directory) else load)(directory)[0]


def _below(part: str, tensors: Mapping[str, LogicalTensor]) -> dict[str, LogicalTensor]:
    """A part's tensors, seen from the directory above it."""
    return {
        name: replace(
            tensor, shards=tuple(replace(s, file=f"{part}/{s.file}") for s in tensor.shards)
        )
        for name, tensor in tensors.items()
        if not name.startswith(OF_EACH_RANK)
    }


def verify(directory: Path) -> Manifest:
    """Load a checkpoint, in parts or whole, and hold the files against it: every shard is there
    with its type and shape, every hashed file has its hash. Raises ManifestError."""
    manifest = load_any(directory)
    check_files(directory, manifest.files)
    with Reader(directory, manifest) as reader:
        for name, tensor in manifest.tensors.items():
            for shard in tensor.shards:
                reader.rows(name, shard, shard.start, shard.start)
    return manifest


class Reader:
    """Reads ranges of the logical tensors of a checkpoint, each file opened once."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._opened: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._opened.clear()

    def range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to before ``stop`` of a logical tensor, from whichever shards hold them. A
        scalar is read with 0 and 1, and comes back as one. Raises ManifestError."""
        tensor = self.manifest.tensors.get(name)
        if tensor is None:
            raise ManifestError(f"the checkpoint has no tensor '{name}'")
        if not 0 <= start <= stop <= tensor.rows:
            raise ManifestError(f"'{name}' has {tensor.rows} rows; there is no {start} to {stop}")
        parts = [
            self.rows(name, shard, max(start, shard.start), min(stop, shard.stop))
            for shard in tensor.shards
            if shard.start < stop and start < shard.stop
        ]
        if not parts:
            return torch.empty((0, *tensor.shape[1:]), dtype=getattr(torch, tensor.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, name: str, shard: Shard, start: int, stop: int) -> torch.Tensor:
        """Of one shard; its type and shape are held against the manifest. Raises ManifestError."""
        tensor = self.manifest.tensors[name]
        try:
            opened = self._open(shard.file)
            part = opened.get_slice(shard.key)
            shape = tuple(part.get_shape())
            expected = (shard.stop - shard.start, *tensor.shape[1:]) if tensor.shape else ()
            if shape != expected:
                raise ManifestError(
                    f"'{name}' in {shard.file} is {list(shape)}, not {list(expected)}"
                )
            if not tensor.shape:
                rows = opened.get_tensor(shard.key)
            else:
                rows = part[start - shard.start : stop - shard.start]
        except (OSError, SafetensorError) as error:
            raise ManifestError(f"{shard.file} does not hold '{name}': {error}") from error
        if dtype_name(rows.dtype) != tensor.dtype:
            raise ManifestError(f"'{name}' in {shard.file} is {rows.dtype}, not {tensor.dtype}")
        assert isinstance(rows, torch.Tensor)
        return rows

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            opened = safe_open(self.directory / file, framework="pt")
            self._opened[file] = self._stack.enter_context(opened)
        return self._opened[file]


def merge(held: Iterable[Mapping[str, LogicalTensor]]) -> Layout:
    """What all ranks hold, put together. Raises ManifestError when rows are missing or twice."""
    found: dict[str, tuple[LogicalTensor, list[Shard]]] = {}
    for one in held:
        for name, tensor in one.items():
            first, shards = found.setdefault(name, (tensor, []))
            if (first.dtype, first.shape) != (tensor.dtype, tensor.shape):
                raise ManifestError(f"the ranks disagree on type or shape of '{name}'")
            shards.extend(tensor.shards)
    merged: dict[str, LogicalTensor] = {}
    for name, (first, shards) in found.items():
        # Once, when all are there: of as many ranks as there are shards.
        shards.sort(key=lambda shard: shard.start)
        merged[name] = LogicalTensor(first.dtype, first.shape, tuple(shards))
        check_cover(name, merged[name])
    return Layout(merged)
