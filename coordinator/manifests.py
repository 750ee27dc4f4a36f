"""Reads from nodes what the checkpoints are that a store which was put back does not know.

Problem: a hello gives digests alone, and what they are of is in manifests, on the nodes' disks. So
they are read there as any other reader reads them, one after another, beside the loop. What a node
sends has the digest that was asked for, so it is what an agent once wrote. Who does not answer is
asked again in the next round, as long as it is connected.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated

import grpc
import msgspec

from coordinator.checkpoint_rpc import OpenChannel, Unusable, read_manifest
from coordinator.core import messages as m
from coordinator.core.checkpoint_requests import Manifest, NoteManifests
from coordinator.shell import Unavailable

INTERVAL_S = 1.0
# So many are told in one request, each some hundred bytes.
TOLD_MAX = 64

# What the store can hold, also of all files together: a node may say anything.
NUMBER_MAX = 2**62

_Number = Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]

Wanted = Callable[[], list[tuple[str, str, tuple[str, ...]]]]


class _File(msgspec.Struct):
    size_bytes: _Number


class _Manifest(msgspec.Struct):
    """What of it is looked at (agent/chunks/manifest.py). `rank`: it is a part of a gang's."""

    job: _Number
    epoch: _Number
    step: _Number
    parent: str
    files: list[_File]
    rank: _Number | None = None


_decoder = msgspec.json.Decoder(_Manifest)


class ManifestReader:
    """`wanted` says what nobody has read, by node; `request` tells the core what it is."""

    def __init__(
        self,
        wanted: Wanted,
        request: Callable[[m.RequestBody], Awaitable[m.Answer]],
        open_channel: OpenChannel,
    ) -> None:
        self._wanted = wanted
        self._request = request
        self._open_channel = open_channel

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(INTERVAL_S)

    async def look(self) -> None:
        """Once, at every node."""
        for node, address, digests in self._wanted():
            try:
                async with self._open_channel(address) as channel:
                    for first in range(0, len(digests), TOLD_MAX):
                        some = digests[first : first + TOLD_MAX]
                        found = await _read(channel, some)
                        await self._request(NoteManifests(node, some, found))
            except (grpc.aio.AioRpcError, Unavailable):
                continue


async def _read(channel: grpc.aio.Channel, digests: Sequence[str]) -> tuple[Manifest, ...]:
    """Those that can be told. Raises `AioRpcError` when the node does not answer."""
    found = []
    for digest in digests:
        try:
            said = _decoder.decode(await read_manifest(channel, digest))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
        except (Unusable, msgspec.DecodeError):
            continue  # nobody could resume from it
        else:
            size_bytes = sum(file.size_bytes for file in said.files)
            place = said.job, said.epoch, said.step
            if size_bytes <= NUMBER_MAX:
                found.append(Manifest(digest, *place, said.parent, size_bytes, said.rank))
    return tuple(found)
