"""Nodes with a chunk store and a peer service, for the tests of what goes between them; boxes of
described GPUs, for those of what a driver does; a server for trainers."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # most tests here do without gRPC
    from agent.telemetry.remote import RemoteGpus
    from tests.agent.chunk_worlds import Node
    from tests.agent.http_worlds import World
    from tests.agent.sampler_worlds import Box
    from tests.agent.sdk_house import House


@pytest.fixture
def way() -> str:
    """In which chunks are moved; a module that tests both has parameters instead."""
    return "http"


@pytest.fixture
async def one(tmp_path: Path, way: str) -> "AsyncIterator[Node]":
    from tests.agent.chunk_worlds import running

    async with running(tmp_path, "n1", way=way) as node:
        yield node


@pytest.fixture
async def two(tmp_path: Path, way: str) -> "AsyncIterator[Node]":
    from tests.agent.chunk_worlds import running

    async with running(tmp_path, "n2", way=way) as node:
        yield node


@pytest.fixture
async def house(tmp_path: Path) -> "AsyncIterator[House]":
    from tests.agent.sdk_house import open_house

    async with open_house(tmp_path) as opened:
        yield opened


@pytest.fixture
def world(tmp_path: Path) -> "Iterator[World]":
    """A server of chunks, alone."""
    from tests.agent.http_worlds import World

    made = World(tmp_path)
    made.store.open()
    made.server.bind()
    made.port = made.server.start()
    yield made
    made.server.close()
    made.transfers.close()


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Box":
    from tests.agent.sampler_worlds import Box

    return Box(tmp_path, monkeypatch)


@pytest.fixture
def opened(box: "Box") -> "Iterator[RemoteGpus]":
    """Three healthy GPUs, and a sampler that has found them."""
    from tests.fakenvml.build import h100

    box.describe(*h100(3))
    gpus = box.gpus()
    gpus.open()
    yield gpus
    gpus.close()
