"""What a checkpoint of a training is: one typed, versioned, hashed JSON document, and its shards.

Problem: a directory of tensor files does not say which job and step it belongs to, whether a file
of it was swapped, or how a tensor that four ranks wrote in four pieces fits together again. A
process with another number of ranks must load it all the same, and read no more than its part.

So ``state.json`` is a manifest. Under ``manifest`` it names the job, the attempt's epoch, the step,
the samples done, the parent (the hash of the manifest before it), the layout of the world that
wrote it, the fingerprint of software and hardware, how exactly the run itself was resumed, and
every *logical* tensor: its type, its global shape, and which rows of it lie in which file. All
other keys are small JSON state. ``hash`` is the BLAKE3 of the whole document without the hash,
written with sorted keys and no spaces (the tensors, which seldom change, go in as a hash of their
own).

    {"format": 1, "manifest": {"version": 1, ...}, "optimizer": ..., "progress": ..., "hash": "..."}

Rows are ranges over the first dimension, as FSDP2 shards a parameter; a scalar has one row. A shard
is a tensor in a safetensors file (raw little-endian bytes behind a JSON header). ``read_range``
takes the rows that it is asked for from whichever shards hold them, without reading the rest.
"""

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainers import exactness
from trainers.exactness import Fingerprint, Level

VERSION = 1
FILE = "state.json"
KEY = "manifest"
HASH_KEY = "hash"

DOCUMENT_BYTES_MAX = 64 << 20
"""About 300,000 tensors at 200 bytes; a larger document is none of ours."""

LAYOUTS_KEPT = 4
"""Of one process: before and after the optimizer has its state, and some to spare."""

RANKS_MAX = 65_536
"""More than any training has had."""

HASHED_PIECE_BYTES = 4 << 20
"""Read at once when a file is hashed."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.safetensors")

Document = dict[str, Any]


class ManifestError(ValueError):
    """The document or a shard is not what it must be; the sentence says which and why."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows ``start`` to before ``stop`` of a logical tensor: the tensor ``key`` in ``file``."""

    file: str
    key: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor as the model has it, whoever holds its rows. ``dtype`` is torch's name without
    "torch."; shards are in order and cover every row once."""

    dtype: str
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        return rows_of(self.shape)


class Layout(Mapping[str, LogicalTensor]):
    """Logical tensors by name. It does not change, and neither does its JSON: hundreds of tensors
    take milliseconds to describe, and a training waits while its state is captured."""

    def __init__(self, tensors: Mapping[str, LogicalTensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> LogicalTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @functools.cached_property
    def entries(self) -> Document:
        """As JSON."""
        return {
            name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "shards": [
                    {"file": part.file, "key": part.key, "start": part.start, "stop": part.stop}
                    for part in tensor.shards
                ],
            }
            for name, tensor in self._tensors.items()
        }

    @functools.cached_property
    def hash(self) -> str:
        """BLAKE3 of the JSON."""
        return _hash(self.entries)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but its small JSON state and the bytes themselves."""

    job: int
    """0 outside Baton."""

    epoch: int
    """The attempt's fencing token; 0 outside Baton."""

    step: int
    samples: int
    parent: str
    """Hash of the manifest that this one follows; empty for the first."""

    world_size: int
    """Ranks that wrote it."""

    fingerprint: Fingerprint
    level: Level | None
    """How exactly the writing run was itself resumed; None when it began at the beginning."""

    tensors: Layout
    files: dict[str, str]
    """BLAKE3 of whole files, for those that their writer hashed."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Who writes: the job, the attempt's epoch, and of how many ranks."""

    job: int
    epoch: int
    world_size: int


def attempt_of(environment: Mapping[str, str]) -> Attempt:
    """From the environment of a trainer process. Outside Baton job and epoch are 0."""
    numbers = [environment.get(name) for name in ("BATON_JOB_ID", "BATON_EPOCH", "WORLD_SIZE")]
    job, epoch, world_size = (int(number or 0) for number in numbers)
    return Attempt(job, epoch, max(1, world_size))


def rows_of(shape: Iterable[int]) -> int:
    """Rows over the first dimension; a scalar has one."""
    return next(iter(shape), 1)


def split_rows(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """(start, stop) of a rank, as ``torch.chunk`` and FSDP2 cut: all but the last are equal."""
    each = math.ceil(rows / world_size)
    return min(rows, rank * each), min(rows, (rank + 1) * each)


def whole(parts: Mapping[str, Mapping[str, torch.Tensor]]) -> Layout:
    """Logical tensors ``<part>/<name>``, each of which lies whole in ``<part>.safetensors``."""
    return _whole(
        tuple(
            (part, name, tensor.dtype, tensor.shape)
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        )
    )


@functools.lru_cache(maxsize=LAYOUTS_KEPT)
def _whole(described: tuple[tuple[str, str, torch.dtype, torch.Size], ...]) -> Layout:
    found = {}
    for part, name, dtype, size in described:
        shape = tuple(size)
        shards = (Shard(f"{part}.safetensors", name, 0, rows_of(shape)),)
        found[f"{part}/{name}"] = LogicalTensor(_dtype_name(dtype), shape, shards)
    return Layout(found)


def seal(manifest: Manifest, state: Mapping[str, Any]) -> Document:
    """The document: ``state`` (JSON values; it is copied), the manifest, the hash."""
    body: Document = {"version": VERSION}
    for name in ("job", "epoch", "step", "samples", "parent", "world_size", "files"):
        body[name] = getattr(manifest, name)
    body["fingerprint"] = manifest.fingerprint.document()
    body["level"] = manifest.level.name if manifest.level else ""
    body["tensors"] = manifest.tensors.entries
    small = {key: value for key, value in state.items() if key not in (KEY, HASH_KEY)}
    # Through JSON and back: what is hashed is what will be read, keys of dicts as strings.
    document: Document = {**json.loads(json.dumps(small)), KEY: body}
    document[HASH_KEY] = _document_hash(document, manifest.tensors.hash)
    return document


def hash_of(document: Mapping[str, Any]) -> str:
    """BLAKE3 of the document without its hash, in canonical JSON, the tensors in it replaced by
    the BLAKE3 of theirs."""
    body = document.get(KEY)
    return _document_hash(document, _hash(body.get("tensors") if isinstance(body, dict) else None))


def _document_hash(document: Mapping[str, Any], tensors_hash: str) -> str:
    rest = {key: value for key, value in document.items() if key != HASH_KEY}
    if isinstance(rest.get(KEY), dict):
        rest[KEY] = {**rest[KEY], "tensors": tensors_hash}
    return _hash(rest)


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return blake3(text.encode()).hexdigest()


def check_hash(document: Mapping[str, Any]) -> None:
    """Raises ManifestError unless the document has the hash of its content."""
    stored = document.get(HASH_KEY)
    if stored != hash_of(document):
        raise ManifestError(f"the manifest is altered: its hash is not {str(stored)[:12]}...")


def parse(document: Mapping[str, Any]) -> Manifest:
    """The manifest in a document; ``check_hash`` comes first where it was read from somewhere.
    Raises ManifestError."""
    body = document.get(KEY)
    if not isinstance(body, dict) or body.get("version") != VERSION:
        found = body.get("version") if isinstance(body, dict) else None
        raise ManifestError(f"the manifest has version {found}; this one reads {VERSION}")
    try:
        return _manifest(body)
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"the manifest is not well formed: {error}") from error


def load(directory: Path) -> tuple[Manifest, Document]:
    """The manifest of a directory and its whole document. Raises ManifestError."""
    file = directory / FILE
    try:
        if file.stat().st_size > DOCUMENT_BYTES_MAX:
            raise ManifestError(f"{file} is larger than {DOCUMENT_BYTES_MAX} bytes")
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ManifestError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ManifestError(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ManifestError(f"{file} does not hold an object")
    check_hash(document)
    return parse(document), document


def verify(directory: Path) -> Manifest:
    """Load, and hold the files against it: every shard is there with its type and shape, every
    hashed file has its hash. Raises ManifestError."""
    manifest, _ = load(directory)
    for name, expected in manifest.files.items():
        if file_hash(directory / name) != expected:
            raise ManifestError(f"{name} is altered: its bytes are not those of the manifest")
    for name, tensor in manifest.tensors.items():
        for shard in tensor.shards:
            _rows(directory, name, tensor, shard, (shard.start, shard.start))
    return manifest


def read_range(directory: Path, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to before ``stop`` of a logical tensor, from whichever shards hold them. A
    scalar is read with 0 and 1, and comes back as one. Raises ManifestError."""
    manifest, _ = load(directory)
    return take_range(directory, manifest, name, start, stop)


def take_range(
    directory: Path, manifest: Manifest, name: str, start: int, stop: int
) -> torch.Tensor:
    """``read_range`` for many reads of one checkpoint: the manifest is loaded already."""
    tensor = manifest.tensors.get(name)
    if tensor is None:
        raise ManifestError(f"the checkpoint has no tensor '{name}'")
    if not 0 <= start <= stop <= tensor.rows:
        raise ManifestError(f"'{name}' has {tensor.rows} rows; there is no {start} to {stop}")
    parts = [
        _rows(directory, name, tensor, shard, (max(start, shard.start), min(stop, shard.stop)))
        for shard in tensor.shards
        if shard.start < stop and start < shard.stop
    ]
    if not parts:
        return torch.empty((0, *tensor.shape[1:]), dtype=getattr(torch, tensor.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def write_shard(
    directory: Path, rank: int, parts: Mapping[str, tuple[torch.Tensor, int, tuple[int, ...]]]
) -> dict[str, LogicalTensor]:
    """Write one rank's rows: by logical name the rows, the first one's number, and the global
    shape. Returns what this rank holds, for ``merge``. Raises OSError."""
    file = f"rank-{rank:05d}.safetensors"
    held = {}
    tensors = {}
    for name, (rows, start, shape) in parts.items():
        count = rows_of(rows.shape)
        if count:
            tensors[name] = rows.detach().to("cpu", copy=True).contiguous()
        shards = (Shard(file, name, start, start + count),) if count else ()
        held[name] = LogicalTensor(_dtype_name(rows.dtype), shape, shards)
    try:
        save_file(tensors, directory / file)
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error
    return held


def merge(held: Iterable[Mapping[str, LogicalTensor]]) -> Layout:
    """What all ranks hold, put together. Raises ManifestError when rows are missing or twice."""
    merged: dict[str, LogicalTensor] = {}
    for one in held:
        for name, tensor in one.items():
            before = merged.get(name, LogicalTensor(tensor.dtype, tensor.shape, ()))
            if (before.dtype, before.shape) != (tensor.dtype, tensor.shape):
                raise ManifestError(f"the ranks disagree on type or shape of '{name}'")
            shards = sorted((*before.shards, *tensor.shards), key=lambda shard: shard.start)
            merged[name] = LogicalTensor(tensor.dtype, tensor.shape, tuple(shards))
    for name, tensor in merged.items():
        _check_cover(name, tensor)
    return Layout(merged)


def file_hash(file: Path) -> str:
    """BLAKE3 of a file's bytes. Raises ManifestError when it cannot be read."""
    digest = blake3()
    try:
        with file.open("rb") as opened:
            while piece := opened.read(HASHED_PIECE_BYTES):
                digest.update(piece)
    except OSError as error:
        raise ManifestError(f"cannot read {file.name}: {error.strerror}") from error
    return digest.hexdigest()


def _manifest(body: Mapping[str, Any]) -> Manifest:
    numbers = {key: body[key] for key in ("job", "epoch", "step", "samples", "world_size")}
    for key, value in numbers.items():
        if type(value) is not int or value < 0:
            raise ManifestError(f"'{key}' is {value!r}")
    if not 1 <= numbers["world_size"] <= RANKS_MAX:
        raise ManifestError(f"'world_size' is {numbers['world_size']}")
    digests = [body["parent"], *body["files"].values()]
    if any(value and not _DIGEST.fullmatch(value) for value in digests):
        raise ManifestError("a hash is not 64 hexadecimal digits")
    tensors = {name: _tensor(name, entry) for name, entry in body["tensors"].items()}
    names = [shard.file for tensor in tensors.values() for shard in tensor.shards]
    for file in (*names, *body["files"]):
        if not _FILE_NAME.fullmatch(file):
            raise ManifestError(f"{file[:80]!r} is not the name of a tensor file")
    return Manifest(
        **numbers,
        parent=body["parent"],
        fingerprint=exactness.parse(body["fingerprint"]),
        level=Level[body["level"]] if body["level"] else None,
        tensors=Layout(tensors),
        files=dict(body["files"]),
    )


def _tensor(name: str, entry: Mapping[str, Any]) -> LogicalTensor:
    shards = tuple(
        Shard(shard["file"], shard["key"], int(shard["start"]), int(shard["stop"]))
        for shard in entry["shards"]
    )
    if not isinstance(getattr(torch, entry["dtype"], None), torch.dtype):
        raise ManifestError(f"'{name}' has the unknown type {entry['dtype']!r}")
    tensor = LogicalTensor(entry["dtype"], tuple(int(size) for size in entry["shape"]), shards)
    _check_cover(name, tensor)
    return tensor


def _check_cover(name: str, tensor: LogicalTensor) -> None:
    place = 0
    for shard in tensor.shards:
        if shard.start != place or shard.stop < shard.start:
            raise ManifestError(f"rows of '{name}' are missing or twice at row {place}")
        place = shard.stop
    if place != tensor.rows:
        raise ManifestError(f"'{name}' has {tensor.rows} rows, its shards hold {place}")


def _rows(
    directory: Path, name: str, tensor: LogicalTensor, shard: Shard, wanted: tuple[int, int]
) -> torch.Tensor:
    """The wanted rows, which lie in this shard; type and shape are held against the manifest."""
    try:
        with safe_open(directory / shard.file, framework="pt") as opened:
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
                rows = part[wanted[0] - shard.start : wanted[1] - shard.start]
    except (OSError, SafetensorError) as error:
        raise ManifestError(f"{shard.file} does not hold '{name}': {error}") from error
    if _dtype_name(rows.dtype) != tensor.dtype:
        raise ManifestError(f"'{name}' in {shard.file} is {rows.dtype}, not {tensor.dtype}")
    assert isinstance(rows, torch.Tensor)
    return rows


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
