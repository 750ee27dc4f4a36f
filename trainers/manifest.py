"""What a checkpoint of a training is: one typed, versioned, hashed JSON document, and its shards.

Problem: a directory of tensor files does not say which job and step it belongs to, whether a file
of it was swapped, or how a tensor that four ranks wrote in four pieces fits together again. A
training with another number of ranks must load it all the same, and read no more than its part.

So ``state.json`` is a manifest. Under ``manifest`` it names the job, the attempt's epoch, the step,
the samples done, the parent (the hash of the manifest before it), the layout of the world that
wrote it, the fingerprint of software and hardware, how exactly the run itself was resumed, and
every *logical* tensor: its type, its global shape, and which rows of it lie in which file. All
other keys are small JSON state. ``hash`` is the BLAKE3 of the whole document without the hash,
written with sorted keys and no spaces (the tensors, which seldom change, go in as a hash of their
own).

    {"format": 1, "manifest": {"version": 1, ...}, "optimizer": ..., "progress": ..., "hash": "..."}

Rows are ranges over the first dimension, as FSDP2 shards a parameter; a scalar has one row. A shard
is a tensor in a safetensors file (raw little-endian bytes behind a JSON header). A checkpoint of
several ranks has a manifest for each, which names the rank, the global shapes and the rows that
this one has; ``ranges`` puts them together and reads them.
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

import baton_sdk
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

    rank: int | None = None
    """Whose part this is; None for a whole checkpoint."""

    fingerprint: Fingerprint
    level: Level | None
    """How exactly the writing run was itself resumed; None when it began at the beginning."""

    tensors: Layout
    files: dict[str, str]
    """BLAKE3 of whole files, where no agent hashes them: in a directory outside Baton. Of a
    checkpoint in parts below the directory of each."""


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


Place = tuple[int, tuple[int, ...]]
"""Of rows: the number of the first one, and the shape of the tensor that they are of."""


def file_name(part: str, *, rows: bool = False) -> str:
    """Where the tensors of a part are. What is one rank's ``rows`` of them is beside the others:
    no other rank reads it, and as many ranks as wrote a checkpoint are not sent each other's."""
    return f"{baton_sdk.OF_THIS_RANK}-{part}.safetensors" if rows else f"{part}.safetensors"


def layout(parts: Mapping[str, Mapping[str, torch.Tensor]], places: Mapping[str, Place]) -> Layout:
    """Logical tensors ``<part>/<name>``, each of which lies whole in ``<part>.safetensors``, or is
    rows of one: those that have a place."""
    return _layout(
        tuple(
            (part, name, tensor.dtype, tensor.shape, places.get(f"{part}/{name}"))
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        )
    )


@functools.lru_cache(maxsize=LAYOUTS_KEPT)
def _layout(
    described: tuple[tuple[str, str, torch.dtype, torch.Size, Place | None], ...],
) -> Layout:
    found = {}
    for part, name, dtype, size, place in described:
        start, shape = place or (0, tuple(size))
        file = file_name(part, rows=place is not None)
        shards = (Shard(file, name, start, start + rows_of(size)),)
        found[f"{part}/{name}"] = LogicalTensor(dtype_name(dtype), shape, shards)
    return Layout(found)


def seal(manifest: Manifest, state: Mapping[str, Any]) -> Document:
    """The document: ``state`` (JSON values; it is copied), the manifest, the hash."""
    body: Document = {"version": VERSION}
    for name in ("job", "epoch", "step", "samples", "parent", "world_size", "files"):
        body[name] = getattr(manifest, name)
    if manifest.rank is not None:
        body["rank"] = manifest.rank
    body["fingerprint"] = manifest.fingerprint.document()
    if manifest.fingerprint.libraries is not None:
        body["libraries"] = manifest.fingerprint.libraries
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


def with_files(document: Document, directory: Path) -> Document:
    """The document with the hashes of the files of tensors in this directory, sealed again. Raises
    OSError."""
    files = sorted(directory.glob("*.safetensors"))
    try:
        hashes = {file.name: file_hash(file) for file in files}
    except ManifestError as error:
        raise OSError(str(error)) from error
    found: Document = {**document, KEY: {**document[KEY], "files": hashes}}
    found[HASH_KEY] = hash_of(found)
    return found


def check_files(directory: Path, files: Mapping[str, str]) -> None:
    """Raises ManifestError, naming the first file that has another hash."""
    for name, expected in files.items():
        if file_hash(directory / name) != expected:
            raise ManifestError(
                f"{name} in {directory} is altered: its bytes are not those of the manifest"
            )


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
    rank = body.get("rank")
    if rank is not None and not (type(rank) is int and 0 <= rank < numbers["world_size"]):
        raise ManifestError(f"'rank' is {rank!r} of {numbers['world_size']}")
    tensors = {name: _tensor(name, entry) for name, entry in body["tensors"].items()}
    for name, tensor in tensors.items() if rank is None else ():
        check_cover(name, tensor)
    names = [shard.file for tensor in tensors.values() for shard in tensor.shards]
    for file in (*names, *body["files"]):
        if not _FILE_NAME.fullmatch(file):
            raise ManifestError(f"{file[:80]!r} is not the name of a tensor file")
    return Manifest(
        **numbers,
        rank=rank,
        parent=body["parent"],
        fingerprint=exactness.parse(body["fingerprint"], body.get("libraries")),
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
    return LogicalTensor(entry["dtype"], tuple(int(size) for size in entry["shape"]), shards)


def check_cover(name: str, tensor: LogicalTensor) -> None:
    """Raises ManifestError unless the shards hold every row once."""
    place = 0
    for shard in tensor.shards:
        if shard.start != place or shard.stop < shard.start:
            raise ManifestError(f"rows of '{name}' are missing or twice at row {place}")
        place = shard.stop
    if place != tensor.rows:
        raise ManifestError(f"'{name}' has {tensor.rows} rows, its shards hold {place}")


def dtype_name(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")
