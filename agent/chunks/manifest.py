"""What a checkpoint is: a canonical list of files and of the chunks they are made of.

Problem: two nodes must agree, byte by byte, on what a checkpoint holds, and a node must be able to
lay one out that came from elsewhere without trusting it. A tar file has neither a canonical form
nor a limit, and can name `../../etc/passwd`.

So: a manifest is JSON with sorted keys and no spaces, UTF-8; the BLAKE3 of those bytes is the name
of the checkpoint, and so covers every chunk digest, size, mode and path in it. Decoding accepts
exactly what encoding produces, and nothing that points outside the directory, is both a file and a
directory, or does not add up. Every limit of the chunk store and of its traffic stands in this
file, and so do the kinds of failure that callers tell apart.
"""

import json
import re
from dataclasses import dataclass
from typing import NoReturn

from blake3 import blake3

from agent.ports import ChunkError

VERSION = 1
HASH_NAME = "blake3"

# Large enough that hashing and syncing dominate the per-chunk cost, small enough that a changed
# head does not drag a frozen backbone with it.
CHUNK_BYTES_MAX = 4 << 20
# gRPC refuses messages over 4 MiB by default and advises small ones; two pieces make a chunk.
PIECE_BYTES_MAX = 2 << 20
# A checkpoint of more files is a data set; at 180 bytes each the list would not fit a message any
# more either.
FILES_MAX = 100_000
# A manifest travels in one message: 15 MiB name some 200,000 chunks, which is 800 GB in 4 MiB
# chunks.
MANIFEST_BYTES_MAX = 15 << 20
MESSAGE_BYTES_MAX = MANIFEST_BYTES_MAX + (1 << 20)
# What such a manifest can name at most, rounded up: an upload of more cannot end in a manifest.
CHUNKS_MAX = 250_000
# As peer.proto says: 6.6 MB of digests in one request.
DIGESTS_MAX = 100_000
# Linux allows 4096 for the whole path; the restore directory in front needs its part.
PATH_BYTES_MAX = 1024
# NAME_MAX of every common Linux file system.
NAME_BYTES_MAX = 255
# Deeper trees are loops or mistakes; the limit also bounds the work of checking a path.
DEPTH_MAX = 64

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_KEYS = {"path", "size_bytes", "mode", "chunks"}
_MANIFEST_KEYS = {"version", "hash", "job", "epoch", "step", "parent", "files"}
_PART_KEYS = _MANIFEST_KEYS | {"rank"}


class DiskFull(ChunkError):
    """The disk has no room. Trying again does not help until something is removed."""


class Altered(ChunkError):
    """Bytes are there, and are not those that their digest or size promises."""


class Absent(ChunkError):
    """No such chunk or checkpoint here."""


class Incomplete(ChunkError):
    """A manifest names chunks that are not here, or a peer sent less than it was asked for."""


class Invalid(ChunkError):
    """The caller's mistake; trying again does not help."""


class Denied(ChunkError):
    """A source that cannot be asked as things are configured: a certificate, an address, a
    directory. Trying again does not help until somebody changes that."""


class Unreachable(ChunkError):
    """A source that may have the checkpoint gave no answer; nobody may conclude that it is lost."""


# What says that good bytes are not there. Everything else that can go wrong (a connection, a
# deadline, a directory that is not mounted, a process out of files) says nothing of the bytes.
DEFINITE = (Absent, Altered, Incomplete, Invalid)


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """One chunk of a file: its digest, and its size from 1 to `CHUNK_BYTES_MAX`."""

    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file: relative posix path, permission bits (0 to 0o777), and its chunks in order. An empty
    file has none."""

    path: str
    mode: int
    chunks: tuple[ChunkRef, ...]

    @property
    def size_bytes(self) -> int:
        return sum(chunk.size_bytes for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint of a job, written under `epoch` at `step`; `parent` is the digest it follows, or
    empty. `rank`: the rank of a gang whose part this is, which has a history of its own; `None`: it
    is whole.

    It lists files, and directories only as parts of their paths: empty directories are not kept.
    """

    job_id: int
    epoch: int
    step: int
    parent: str
    files: tuple[FileEntry, ...]
    rank: int | None = None

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files)

    def sizes_bytes(self) -> dict[str, int]:
        """Every chunk once, in order of first use: digest to size."""
        return {chunk.digest: chunk.size_bytes for entry in self.files for chunk in entry.chunks}


def digest_of(data: bytes | bytearray | memoryview) -> str:
    return blake3(data).hexdigest()


def short(digest: str) -> str:
    """Enough of a digest for a sentence."""
    return f"{digest[:8]}..."


def check_digest(digest: str) -> str:
    """Returns it; raises `Invalid`. Every digest becomes part of a path, so none goes unchecked."""
    if not _DIGEST.fullmatch(digest):
        raise Invalid(f"not a digest of 64 lowercase hexadecimal digits: {digest[:80]!r}")
    return digest


def check_path(path: str) -> str:
    """Returns it; raises `Invalid` for whatever could land outside a directory, or could not be
    written there."""
    try:
        size_bytes = len(path.encode())
    except UnicodeEncodeError:
        raise Invalid(f"file name is not UTF-8: {path!r}") from None
    parts = path.split("/")
    if path.startswith("/") or "" in parts or "." in parts or ".." in parts or "\0" in path:
        raise Invalid(f"path escapes the checkpoint or is not plain: {path[:200]!r}")
    if size_bytes > PATH_BYTES_MAX or len(parts) > DEPTH_MAX:
        raise Invalid(
            f"path of {size_bytes} bytes and {len(parts)} levels, at most {PATH_BYTES_MAX} "
            f"and {DEPTH_MAX}: {path[:200]!r}"
        )
    if any(len(part.encode()) > NAME_BYTES_MAX for part in parts):
        raise Invalid(f"a name of more than {NAME_BYTES_MAX} bytes in {path[:200]!r}")
    return path


def encode(manifest: Manifest) -> bytes:
    """The canonical bytes. Raises `Invalid` when they are too many."""
    document: dict[str, object] = {
        "version": VERSION,
        "hash": HASH_NAME,
        "job": manifest.job_id,
        "epoch": manifest.epoch,
        "step": manifest.step,
        "parent": manifest.parent,
        "files": [
            {
                "path": entry.path,
                "size_bytes": entry.size_bytes,
                "mode": entry.mode,
                "chunks": [[chunk.digest, chunk.size_bytes] for chunk in entry.chunks],
            }
            for entry in manifest.files
        ],
    }
    if manifest.rank is not None:
        document["rank"] = manifest.rank
    data = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if len(data) > MANIFEST_BYTES_MAX:
        raise Invalid(
            f"manifest of {len(data)} bytes, at most {MANIFEST_BYTES_MAX}: keep fewer files"
        )
    return data


def decode(data: bytes) -> Manifest:
    """The inverse of `encode`. Raises `Invalid` for anything that `encode` would not have
    written."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise Invalid(f"manifest of {len(data)} bytes, at most {MANIFEST_BYTES_MAX}")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"manifest is not JSON: {error}") from error
    if not isinstance(document, dict) or set(document) not in (_MANIFEST_KEYS, _PART_KEYS):
        raise Invalid(f"manifest must have exactly the keys {', '.join(sorted(_MANIFEST_KEYS))}")
    if document["version"] != VERSION or document["hash"] != HASH_NAME:
        raise Invalid(f"manifest is not version {VERSION} with hash {HASH_NAME}")
    parent = document["parent"]
    if not isinstance(parent, str) or (parent and not _DIGEST.fullmatch(parent)):
        _malformed("parent")
    files = document["files"]
    if not isinstance(files, list) or len(files) > FILES_MAX:
        _malformed("files")
    manifest = Manifest(
        job_id=_count(document["job"], "job"),
        epoch=_count(document["epoch"], "epoch"),
        step=_count(document["step"], "step"),
        parent=parent,
        files=tuple(_decode_file(item) for item in files),
        rank=_count(document["rank"], "rank") if "rank" in document else None,
    )
    _check_tree(manifest)
    if encode(manifest) != data:
        raise Invalid("manifest is not in its canonical form")
    return manifest


def _decode_file(item: object) -> FileEntry:
    if not isinstance(item, dict) or set(item) != _FILE_KEYS or not isinstance(item["path"], str):
        _malformed("files")
    path = check_path(item["path"])
    mode = _count(item["mode"], "mode")
    if mode > 0o777 or not isinstance(item["chunks"], list):
        _malformed(f"mode or chunks of {path}")
    chunks = []
    for pair in item["chunks"]:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            _malformed(f"chunks of {path}")
        size_bytes = _count(pair[1], "chunks")
        if not 1 <= size_bytes <= CHUNK_BYTES_MAX:
            _malformed(f"chunks of {path}")
        chunks.append(ChunkRef(check_digest(pair[0]), size_bytes))
    # A wrong "size_bytes" is caught by the comparison with the canonical form.
    return FileEntry(path, mode, tuple(chunks))


def _check_tree(manifest: Manifest) -> None:
    paths = {entry.path for entry in manifest.files}
    if len(paths) != len(manifest.files):
        raise Invalid("manifest names a path twice")
    for path in paths:
        end = path.rfind("/")
        while end > 0:
            if path[:end] in paths:
                raise Invalid(f"manifest has {path[:end]!r} both as a file and as a directory")
            end = path.rfind("/", 0, end)
    sizes_bytes: dict[str, int] = {}
    for entry in manifest.files:
        for chunk in entry.chunks:
            if sizes_bytes.setdefault(chunk.digest, chunk.size_bytes) != chunk.size_bytes:
                raise Invalid(f"manifest gives chunk {short(chunk.digest)} two sizes")


def _count(value: object, name: str) -> int:
    # `bool` is an `int` in Python, and `true` is not a number in a manifest.
    if type(value) is not int or not 0 <= value < 1 << 63:
        _malformed(name)
    return value


def _malformed(name: str) -> NoReturn:
    raise Invalid(f"manifest has a malformed field: {name}")
