"""What a trainer has not written to since the agent read it is not read again, and nothing else.

Safety: what is stored is what lies in the slab, whatever was kept in mind of earlier captures.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import baton_sdk
from agent import slabs as agent_slabs
from agent.chunks.manifest import FileEntry, Manifest
from agent.chunks.store import ChunkStore
from agent.chunks.tree import KNOWN_MAX, Known, ingest_capture
from agent.core.values import Origin
from agent.ports import CapturedFile
from tests.trainers import tasks
from tests.trainers.test_capture import ATTEMPT, DeskSession, desk, files_of, session, trained
from tests.trainers.test_one_slot import restored, store
from trainers import capture, loop

__all__ = ["desk", "session", "store"]


class Node:
    """A trainer of one attempt after another, and the agent that keeps its captures."""

    def __init__(
        self, live: loop.Trainer, session: DeskSession, store: ChunkStore, tmp_path: Path
    ) -> None:
        self.live, self.session, self.store = live, session, store
        self.known = Known()
        self.directory = tmp_path
        self.read: set[int] = set()

    def keep(self, *, last: bool = False) -> bool:
        """Capture, store and compare. Whether the agent read the frozen part."""
        self.live.save(last=last)
        self.live.settle()
        desk = self.session.desk
        found = desk.newest(ATTEMPT)
        assert found is not None
        with desk.reading(ATTEMPT, found.name) as source:
            whole, self.read = source.read_into, set()

            def read_into(offset_bytes: int, target: memoryview) -> None:
                if len(target) > agent_slabs.EDGE_BYTES or offset_bytes:
                    self.read.add(offset_bytes)
                whole(offset_bytes, target)

            source.read_into = read_into  # type: ignore[method-assign]
            check, source.check = source.check, lambda: None  # type: ignore[method-assign]
            kept = ingest_capture(self.store, source, Origin(1, 1, found.step, ""), self.known)
            check()
            (frozen,) = [file for file in source.files if file.path == "frozen.safetensors"]
        into = self.directory / f"kept-{len(self.session.tickets)}"
        assert restored(self.store, kept.digest, into) == files_of(desk)
        self.session.answer(self.session.tickets[-1])
        return frozen.offset_bytes in self.read


@pytest.fixture
def node(session: DeskSession, store: ChunkStore, tmp_path: Path) -> Node:
    return Node(trained(tasks.transfer_task, session, 1), session, store, tmp_path)


def frozen_parameter(node: Node) -> torch.nn.Parameter:
    return next(p for p in node.live.task.model.parameters() if not p.requires_grad)


def test_a_frozen_part_is_read_once_for_each_slot_until_it_is_written_again(node: Node) -> None:
    def kept(times: int) -> list[bool]:
        found = []
        for _ in range(times):
            found.append(node.keep())
            node.live.advance()
        return found

    assert kept(4) == [True, True, False, False], "there are two slots"
    with torch.no_grad():
        frozen_parameter(node).add_(1.0)
    assert kept(3) == [True, True, False]
    frozen_parameter(node).data.add_(1.0)  # past autograd's counter
    assert node.keep(last=True), "the last capture copies everything"


def test_the_next_trainer_in_the_same_memory_is_not_taken_for_the_one_before(node: Node) -> None:
    assert [node.keep() for _ in range(3)] == [True, True, False]
    node.live.close()
    with torch.no_grad():
        frozen_parameter(node).add_(1.0)
    node.live._saver._capturer = capture.Capturer(node.session)
    assert [node.keep() for _ in range(3)] == [True, True, False]


def test_a_chunk_that_has_gone_is_read_again(node: Node) -> None:
    assert [node.keep() for _ in range(3)] == [True, True, False]
    for chunk in (node.directory / "chunks").rglob("*"):
        if chunk.is_file():
            chunk.unlink()
    assert node.keep()


def test_what_says_nothing_is_always_read(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program with an older SDK."""
    publish = baton_sdk.Slab.publish

    def older(*arguments: Any, written: object, **named: Any) -> None:
        publish(*arguments, **named)

    monkeypatch.setattr(baton_sdk.Slab, "publish", older)
    assert [node.keep() for _ in range(4)] == [True] * 4


def test_an_overwritten_capture_teaches_nothing(node: Node) -> None:
    node.live.save()
    node.live.settle()
    found = node.session.desk.newest(ATTEMPT)
    assert found is not None
    with node.session.desk.reading(ATTEMPT, found.name) as source:
        node.session.granted.begin(0)  # type: ignore[union-attr]
        with pytest.raises(Exception, match="overwritten"):
            ingest_capture(node.store, source, Origin(1, 1, 1, ""), node.known)
        assert node.known.of(source.files) == []


def test_what_is_kept_in_mind_is_bounded() -> None:
    known = Known()
    manifest = Manifest(1, 1, 1, "", (FileEntry("a", 0o600, ()),))
    entries = [CapturedFile("a", 0, 1, f"1.0.{number}") for number in range(KNOWN_MAX + 5)]
    for entry in entries:
        known.keep([entry], manifest)
    assert len(known.of(entries)) == KNOWN_MAX
    assert known.of([replace(entries[-1], identity="")]) == []
