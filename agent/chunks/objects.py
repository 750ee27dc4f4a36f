"""Checkpoints in an object store, for nodes that share no directory: `s3://bucket/prefix`.

Problem: an object store is no file system. Nothing is renamed, nothing is synced, a listing costs
money and time, every answer crosses a network, and "no such key" looks the same whether a chunk was
lost or the operator misspelt the bucket.

What it does give is that an object is there as a whole or not at all. So the order of the directory
store holds without its means: chunks to `objects/ab/<digest>` first, several at a time, then the
manifest to `manifests/<digest>.json`, when the store has confirmed every one of them; a manifest's
presence proves its chunks. What is there is asked object by object, never listed. Whatever is read
is verified: a bucket is as little trusted as a peer. `store.json` marks a chunk store, so that
what is missing in a place that has the mark was never there or is lost, and a place without it is
the wrong one, which says nothing of any checkpoint.

Nothing is ever removed here: other fleets may share the bucket. Nor may a lifecycle rule of the
bucket expire objects by their age: a chunk that a new checkpoint shares with an old one (a frozen
backbone) was written with the old one, is not written again, and has no time stamp that asking for
it renews. Who wants the space back takes a new prefix from time to time, and removes the old one as
a whole once no job resumes from it. Credentials, region and endpoint come from where AWS's tools
take them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws, an instance's role), so none is configured
twice.

fsspec and s3fs are the extra `objects`, imported when they are first used: 19 MiB.

Everything here blocks, and may be called from several threads; a `Writing` by one at a time.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from agent.chunks.manifest import (
    CHUNK_BYTES_MAX,
    MANIFEST_BYTES_MAX,
    Absent,
    Altered,
    Denied,
    Invalid,
    Manifest,
    check_digest,
    decode,
    digest_of,
    short,
)
from agent.chunks.threads import crew
from agent.ports import ChunkError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SCHEME = "s3://"
# An object store answers one request in some 50 ms and many at once; eight chunks of 4 MiB in the
# air fill a 5 Gbit link, and are 32 MiB of memory.
REQUESTS_MAX = 8
# As long as to any other peer, and within the service's own deadline for one call.
CONNECT_DEADLINE_S = 5
ANSWER_DEADLINE_S = 15
# A request that failed by chance is repeated once; the agent tries the whole again by itself.
ATTEMPTS_MAX = 2
_MARK = b'{"baton":"chunks","version":1}'


class ObjectStore:
    """Chunks and manifests below `url`. Every method raises `ChunkError` naming it; `Denied` when
    the credentials do not do."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._root = self._url.removeprefix(SCHEME)
        self._lock = threading.Lock()
        self._system: AbstractFileSystem | None = None

    def open(self) -> None:
        """Mark the place as a chunk store. The bucket must exist."""
        with self._errors("opening it"):
            if not self._exists(self._mark):
                self._connected().pipe_file(self._mark, _MARK)

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Which of these chunks are not here, by name. Raises `Invalid`."""
        asked = [(digest, self._object(digest)) for digest in digests]
        with self._errors("looking for chunks"), crew(REQUESTS_MAX, "objects") as threads:
            here = threads.map(self._exists, [path for _, path in asked])
            return [digest for (digest, _), found in zip(asked, here, strict=True) if not found]

    def read_chunk(self, digest: str, size_bytes: int | None = None) -> bytes:
        """The verified bytes. Raises `Absent` or `Altered`."""
        name = f"chunk {short(digest)}"
        data = self._read(self._object(digest), digest, name, CHUNK_BYTES_MAX)
        if size_bytes is not None and len(data) != size_bytes:
            raise Altered(f"{name}: {size_bytes} bytes expected, {len(data)} found")
        return data

    def read_manifest(self, digest: str) -> bytes:
        """The verified bytes. Raises `Absent` or `Altered`."""
        name = f"manifest {short(digest)}"
        return self._read(self._manifest(digest), digest, name, MANIFEST_BYTES_MAX)

    def writing(self) -> "ObjectWriting":
        """A checkpoint on its way here, for use in a `with` statement."""
        return ObjectWriting(self)

    def put(self, path: str, data: bytes, doing: str) -> None:
        with self._errors(doing):
            self._connected().pipe_file(path, data)

    def _read(self, path: str, digest: str, name: str, bytes_max: int) -> bytes:
        with self._errors(f"reading {name}"):
            try:
                # One byte more than may be there, so that what is too long is not read to its end.
                data: bytes = self._connected().cat_file(path, start=0, end=bytes_max + 1)
            except FileNotFoundError:
                if not self._exists(self._mark):
                    raise ChunkError(
                        f"{self._url} holds no chunk store (is the address right?)"
                    ) from None
                raise Absent(f"{name}: missing") from None
        if digest_of(data) != digest:
            raise Altered(f"{name}: bytes do not match their digest")
        return data

    def _exists(self, path: str) -> bool:
        try:
            self._connected().info(path)
        except FileNotFoundError:
            return False
        return True

    def _connected(self) -> "AbstractFileSystem":
        with self._lock:
            if self._system is None:
                try:
                    import fsspec

                    self._system = fsspec.filesystem(
                        SCHEME.removesuffix("://"),
                        skip_instance_cache=True,
                        use_listings_cache=False,
                        config_kwargs={
                            "connect_timeout": CONNECT_DEADLINE_S,
                            "read_timeout": ANSWER_DEADLINE_S,
                            "retries": {"max_attempts": ATTEMPTS_MAX},
                        },
                    )
                except ImportError as error:
                    raise Denied(
                        f"{self._url} needs the extra 'objects' ({error}): "
                        "pip install 'gpu-baton[objects]'"
                    ) from error
            return self._system

    def _forget_connection(self) -> None:
        """Credentials may be other ones by the next call."""
        with self._lock:
            self._system = None

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turns what the libraries raise into `ChunkError`s; s3fs makes an `OSError` of what the
        store answers, and lets botocore's errors through when there was no answer."""
        self._connected()
        from botocore.exceptions import (
            BotoCoreError,
            NoCredentialsError,
            PartialCredentialsError,
        )

        try:
            yield
        except (PermissionError, NoCredentialsError, PartialCredentialsError) as error:
            self._forget_connection()
            raise Denied(
                f"{self._url}: {doing}: the credentials are refused or missing: {error}"
            ) from error
        except FileNotFoundError as error:
            raise ChunkError(f"{self._url}: {doing}: {error} (is the address right?)") from error
        except (OSError, BotoCoreError) as error:
            raise ChunkError(f"{self._url}: {doing}: {error}") from error

    @property
    def _mark(self) -> str:
        return f"{self._root}/store.json"

    def _object(self, digest: str) -> str:
        check_digest(digest)
        return f"{self._root}/objects/{digest[:2]}/{digest}"

    def _manifest(self, digest: str) -> str:
        return f"{self._root}/manifests/{check_digest(digest)}.json"


class ObjectWriting:
    """Chunks go out behind the caller's back, `REQUESTS_MAX` at a time; `publish` waits for all."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._threads = crew(REQUESTS_MAX, "objects")
        self._flying: deque[Future[None]] = deque()

    def __enter__(self) -> "ObjectWriting":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def put_chunk(self, digest: str, data: bytes) -> int:
        """Returns the bytes to be written. Raises `Altered`, `Invalid`, and what went wrong with an
        earlier chunk."""
        path = self._store._object(digest)
        if not 1 <= len(data) <= CHUNK_BYTES_MAX:
            raise Invalid(
                f"chunk {short(digest)} of {len(data)} bytes; 1 to {CHUNK_BYTES_MAX} are allowed"
            )
        if digest_of(data) != digest:
            raise Altered(f"chunk {short(digest)}: bytes do not match their digest")
        while len(self._flying) >= REQUESTS_MAX:
            self._flying.popleft().result()
        doing = f"writing chunk {short(digest)}"
        self._flying.append(self._threads.submit(self._store.put, path, data, doing))
        return len(data)

    def publish(self, digest: str, data: bytes) -> Manifest:
        """Write the manifest, once every chunk has arrived. That the others were there is for the
        caller to have asked: `missing` and this block are one push. Raises `Altered`, `Invalid`."""
        if digest_of(data) != digest:
            raise Altered(f"manifest {short(digest)}: bytes do not match their digest")
        manifest = decode(data)
        while self._flying:
            self._flying.popleft().result()
        self._store.put(self._store._manifest(digest), data, f"writing manifest {short(digest)}")
        return manifest
