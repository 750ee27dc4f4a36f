"""The list of a checkpoint's files: what goes in comes out, and nothing else is let in.

Safety: a manifest comes from a peer or a disk that nobody vouches for. Whatever points outside the
directory, does not add up, or was not written by `encode`, is refused before anything acts on it.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.chunks.manifest import (
    CHUNK_BYTES_MAX,
    ChunkRef,
    FileEntry,
    Invalid,
    Manifest,
    check_path,
    decode,
    encode,
)

_names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12
).filter(lambda name: name not in (".", ".."))
_modes = st.integers(0, 0o777)


@pytest.mark.parametrize(
    "path",
    ["/a", "../a", "a/../b", "a//b", "", ".", "a/", "a\0b", "a" * 256, "a/" * 64 + "a", "\udc80"],
)
def test_paths_that_escape_or_do_not_fit_are_refused(path: str) -> None:
    with pytest.raises(Invalid):
        check_path(path)


def _manifest(*entries: FileEntry) -> Manifest:
    return Manifest(job_id=1, epoch=2, step=3, parent="", files=entries)


_CHUNK = ChunkRef("ab" * 32, 5)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[" * 100_000,
        b"{}",
        encode(_manifest(FileEntry("../x", 0o600, (_CHUNK,)))),
        encode(_manifest(FileEntry("x", 0o4755, (_CHUNK,)))),
        encode(_manifest(FileEntry("x", 0o600, ()), FileEntry("x", 0o600, ()))),
        encode(_manifest(FileEntry("x", 0o600, ()), FileEntry("x/y", 0o600, ()))),
        encode(_manifest(FileEntry("x", 0o600, (_CHUNK, ChunkRef(_CHUNK.digest, 6))))),
        encode(_manifest(FileEntry("x", 0o600, (ChunkRef("../../etc/passwd", 5),)))),
        encode(_manifest(FileEntry("x", 0o600, (ChunkRef("ab" * 32, CHUNK_BYTES_MAX + 1),)))),
        encode(_manifest(FileEntry("x", 0o600, (_CHUNK,)))).replace(
            b'"size_bytes":5', b'"size_bytes":6'
        ),
        encode(_manifest(FileEntry("x", 0o600, (_CHUNK,)))).replace(b'"epoch":2', b'"epoch":true'),
        encode(_manifest(FileEntry("x", 0o600, (_CHUNK,)))) + b"\n",
        encode(replace(_manifest(), rank=1)).replace(b'"rank":1', b'"rank":null'),
        encode(replace(_manifest(), rank=1)).replace(b'"rank":1', b'"rank":-1'),
    ],
)
def test_a_manifest_that_encode_would_not_write_is_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        decode(data)


@given(
    files=st.dictionaries(_names, _modes, max_size=3),
    numbers=st.tuples(*[st.integers(0, 2**40)] * 3),
    rank=st.none() | st.integers(0, 1_023),
)
def test_decode_is_the_inverse_of_encode(
    files: dict[str, int], numbers: tuple[int, int, int], rank: int | None
) -> None:
    entries = tuple(FileEntry(path, mode, (_CHUNK,)) for path, mode in sorted(files.items()))
    manifest = Manifest(*numbers, parent="cd" * 32, files=entries, rank=rank)
    assert decode(encode(manifest)) == manifest
