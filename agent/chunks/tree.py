"""Between a directory of files and the chunk store: taking a checkpoint in, and laying one out
again.

Problem: the directory that a trainer hands over is not to be trusted with more than its files. A
symbolic link in it would copy what the agent may read and the trainer may not; a socket would block
the reader; a million files would fill the manifest. And what lies in the store may have rotted
since it was written, so laying it out has to verify again.

`ingest` looks at the whole tree first and refuses before it copies anything; then it reads each
file once, hashing and keeping it in chunks. `lay_out` verifies each chunk as it writes it, carries
on past those that are missing or altered and returns them: the caller repairs the chunks from a
peer and calls again for just those, so that intact ones are read once.
"""

import os
import stat
from collections.abc import Collection
from pathlib import Path

from agent.chunks.disk import check_room, disk_errors
from agent.chunks.manifest import (
    CHUNK_BYTES_MAX,
    FILES_MAX,
    Absent,
    Altered,
    ChunkRef,
    DiskFull,
    FileEntry,
    Invalid,
    Manifest,
    check_path,
    digest_of,
    encode,
)
from agent.chunks.store import ChunkStore, Writing
from agent.core.values import StoredCheckpoint


def ingest(
    store: ChunkStore, directory: Path, *, job_id: int, epoch: int, step: int, parent: str
) -> StoredCheckpoint:
    """Keep every regular file under `directory`, durably; the directory stays as it is. Empty
    directories are not kept.

    Raises `Invalid` with the path for what is no plain file, `DiskFull` after giving back what was
    written, `ChunkError`.
    """
    paths = scan(directory)
    new_bytes = 0
    entries = []
    try:
        with store.writing() as writing:
            for path in paths:
                entry, written_bytes = _ingest_file(writing, directory, path)
                entries.append(entry)
                new_bytes += written_bytes
            manifest = Manifest(job_id, epoch, step, parent, tuple(entries))
            data = encode(manifest)
            digest = digest_of(data)
            writing.publish(digest, data)
    except DiskFull:
        store.give_back()
        raise
    return StoredCheckpoint(digest, step, manifest.size_bytes, new_bytes)


def scan(directory: Path) -> list[str]:
    """Relative paths of every file, sorted. Raises `Invalid` for links, devices, sockets, pipes,
    and for too many."""
    with disk_errors(f"reading the checkpoint {directory}"):
        if not stat.S_ISDIR(os.lstat(directory).st_mode):
            raise Invalid(f"{directory} is not a directory")
        found: list[str] = []
        entries_count = 0
        pending = [""]
        while pending:
            prefix = pending.pop()
            with os.scandir(directory / prefix) as entries:
                for entry in entries:
                    entries_count += 1
                    if entries_count > FILES_MAX:
                        raise Invalid(
                            f"{directory} has more than {FILES_MAX} files and directories"
                        )
                    path = check_path(prefix + entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{path}/")
                    elif entry.is_file(follow_symlinks=False):
                        found.append(path)
                    else:
                        raise _not_plain(directory / path, os.lstat(entry.path).st_mode)
    if not found:
        raise Invalid(f"{directory} holds no file")
    return sorted(found)


def lay_out(
    store: ChunkStore, manifest: Manifest, into: Path, only: Collection[str] | None = None
) -> dict[str, str]:
    """Write the files under `into`; with `only`, just the chunks with these digests, into files of
    an earlier call.

    Returns the chunks that are missing or altered, each with a sentence. Raises `DiskFull`, before
    the first byte where the whole has no room; `ChunkError`. Nothing is synced: a machine that
    loses power loses the attempt that would have read these files too.
    """
    wrong: dict[str, str] = {}
    doing = f"laying out a checkpoint of {manifest.size_bytes} bytes under {into}"
    if only is None:
        check_room(into.parent, manifest.size_bytes, doing)
    with disk_errors(doing):
        for entry in manifest.files:
            if only is None:
                (into / entry.path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            elif not any(chunk.digest in only for chunk in entry.chunks):
                continue
            _lay_out_file(store, entry, into, only, wrong)
    return wrong


def _ingest_file(writing: Writing, directory: Path, path: str) -> tuple[FileEntry, int]:
    chunks = []
    new_bytes = 0
    # Not following and not blocking: it may have been exchanged for a link or a pipe since it was
    # looked at.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with (
        disk_errors(f"reading {directory / path}"),
        open(
            directory / path, "rb", buffering=0, opener=lambda name, _: os.open(name, flags)
        ) as handle,
    ):
        mode = os.fstat(handle.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise _not_plain(directory / path, mode)
        while data := _read_full(handle.fileno(), CHUNK_BYTES_MAX):
            digest = digest_of(data)
            new_bytes += writing.put_chunk(digest, data)
            chunks.append(ChunkRef(digest, len(data)))
    return FileEntry(path, stat.S_IMODE(mode) & 0o777, tuple(chunks)), new_bytes


def _read_full(descriptor: int, bytes_max: int) -> bytes:
    """A plain read may return less than there is; chunk borders must not depend on that."""
    data = os.read(descriptor, bytes_max)
    while data and len(data) < bytes_max:
        more = os.read(descriptor, bytes_max - len(data))
        if not more:
            break
        data += more
    return data


def _lay_out_file(
    store: ChunkStore,
    entry: FileEntry,
    into: Path,
    only: Collection[str] | None,
    wrong: dict[str, str],
) -> None:
    complete = True
    with open(into / entry.path, "xb" if only is None else "r+b") as handle:
        offset_bytes = 0
        for chunk in entry.chunks:
            if only is None or chunk.digest in only:
                try:
                    data = store.read_chunk(chunk.digest, chunk.size_bytes, of=entry.path)
                except (Absent, Altered) as error:
                    wrong.setdefault(chunk.digest, str(error))
                    complete = False
                else:
                    # Again for each chunk: others write to this disk meanwhile.
                    check_room(into, len(data), f"laying out {into / entry.path}")
                    handle.seek(offset_bytes)
                    handle.write(data)
            offset_bytes += chunk.size_bytes
    # Last, since the mode may forbid writing, and only then is there nothing left to write.
    if complete:
        os.chmod(into / entry.path, entry.mode)


def _not_plain(path: Path, mode: int) -> Invalid:
    kinds = (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISDIR, "a directory"),
    )
    kind = next((name for matches, name in kinds if matches(mode)), "a device")
    return Invalid(f"{path} is {kind}; a checkpoint holds plain files only")
