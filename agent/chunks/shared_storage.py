"""Storage that every node can reach: a directory on a network file system, or an object store.

Problem: a network file system that hangs must not hang this node's own store with it, nor the end
of the agent. So it has two threads of its own, every answer has a deadline, and closing does not
wait.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from agent.chunks.manifest import Denied
from agent.chunks.objects import SCHEME, ObjectStore
from agent.chunks.peers import deadline_s
from agent.chunks.store import ChunkStore
from agent.chunks.threads import crew
from agent.core.values import ReplicaSource
from agent.ports import ChunkError

# The node name under which a start order or replica target means such storage instead of a peer.
SHARED_NODE = "shared"
THREADS_MAX = 2

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


class SharedStorage:
    """`open` before use, `close` after."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._objects: dict[str, ObjectStore] = {}

    def open(self) -> None:
        self._threads = crew(THREADS_MAX, "chunks-shared")

    def close(self) -> None:
        """What hangs is left."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)

    def at(self, source: ReplicaSource) -> ChunkStore | ObjectStore:
        """Raises `Denied` for an address that is none."""
        if source.address.startswith(SCHEME):
            # Kept, as a connection is; there is one address in the configuration.
            return self._objects.setdefault(source.address, ObjectStore(source.address))
        if not source.address.startswith("/"):
            raise Denied(f"shared directory {source.address!r} is not an absolute path")
        return ChunkStore(Path(source.address), shared=True)

    async def run(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kw: _Arguments.kwargs
    ) -> _Result:
        """Raises `ChunkError` when the storage does not answer in time."""
        assert self._threads is not None, "not opened"
        call = partial(work, *args, **kw)
        future = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            return await asyncio.wait_for(future, deadline_s(0))
        except TimeoutError:
            raise ChunkError("the shared directory does not answer") from None
