"""A host that has room for one slot: the capture before is on the agent's disk, or none begins.

Safety: at whichever piece of a copy a process is killed, the generation before it can be restored.
Liveness: a capture that was put off is taken as soon as the agent has stored the one before it.
"""

from pathlib import Path

import pytest

import baton_sdk
from agent import slabs as agent_slabs
from agent.chunks.manifest import decode
from agent.chunks.store import ChunkStore
from agent.chunks.tree import ingest_capture, lay_out
from agent.core.values import Origin
from tests.trainers import tasks
from tests.trainers.test_capture import ATTEMPT, DeskSession, bytes_of, desk, files_of
from tests.trainers.test_overlap import Copier, copier, state_of, trainer
from trainers import checkpoint

__all__ = ["copier", "desk"]


class OneSlot(DeskSession):
    """The host has room for one and a half slots, whatever is asked for."""

    def slab(self, slot_bytes: int, wait_s: float = 0.0) -> baton_sdk.Slab | None:
        self.desk._available_bytes = lambda: agent_slabs.PAYLOAD_OFFSET + slot_bytes * 3 // 2
        return super().slab(slot_bytes, wait_s)


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    made = ChunkStore(tmp_path / "chunks")
    made.open()
    return made


def drain(desk: agent_slabs.Slabs, store: ChunkStore) -> str:
    """As the agent does; the digest."""
    found = desk.newest(ATTEMPT)
    assert found is not None
    with desk.reading(ATTEMPT, found.name) as source:
        return ingest_capture(store, source, Origin(1, 1, found.step, "")).digest


def restored(store: ChunkStore, digest: str, into: Path) -> dict[str, bytes]:
    into.mkdir()
    assert lay_out(store, decode(store.read_manifest(digest)), into) == {}
    return bytes_of(into)


def test_a_capture_waits_for_the_disk_and_a_kill_falls_back_to_it(
    desk: agent_slabs.Slabs, store: ChunkStore, copier: Copier, tmp_path: Path
) -> None:
    session = OneSlot(desk, tmp_path)
    live = trainer(tasks.transfer_task(), session)
    live.advance()
    first = state_of(live)
    live.save()
    live.advance()
    assert session.granted is not None
    assert session.granted.slots == 1
    for _ in range(3):
        assert not live.checkpoint_due(), "until it is stored"
        live.save()
        assert files_of(desk) == first, "the only copy is not touched"
        live.advance()
    digest = drain(desk, store)
    session.answer(session.tickets[-1])
    assert live.checkpoint_due(), "it was put off, not dropped"
    second = state_of(live)
    live.save()
    pieces = 0
    while copier.running:
        assert desk.newest(ATTEMPT) is None
        assert restored(store, digest, tmp_path / f"kept-{pieces}") == first
        copier.let(1 + pieces)
        pieces += 1
    assert pieces > 5
    live.settle()
    assert files_of(desk) == second


def test_a_capture_that_the_agent_could_not_store_is_replaced(
    desk: agent_slabs.Slabs, store: ChunkStore, copier: Copier, tmp_path: Path
) -> None:
    """A full disk today is no reason for no captures tomorrow: the generation on the disk, from
    before, is what a kill falls back to."""
    session = OneSlot(desk, tmp_path)
    live = trainer(tasks.transfer_task(), session)
    live.advance()
    first = state_of(live)
    live.save()
    live.advance()
    digest = drain(desk, store)
    session.answer(session.tickets[-1])
    live.save()
    live.advance()
    session.tickets[-1].settle(baton_sdk.TicketState.REFUSED, reason="disk full")
    live.save()
    assert desk.newest(ATTEMPT) is None
    assert restored(store, digest, tmp_path / "kept") == first
    live.settle()
    assert files_of(desk)[checkpoint.STATE_FILE]
