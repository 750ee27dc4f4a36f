"""What looking for better standbys may cost a tick."""

import pytest

from coordinator.core import standby
from coordinator.core.messages import Tick
from coordinator.core.model import Job
from coordinator.core.state import Options, State
from tests.core.test_gpu_health import Fleet

NODES = ("n1", "n2", "n3", "n4")


def test_a_review_looks_at_no_more_nodes_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """All attempts in turn, and of a fleet that is too large for one tick one in several."""
    looked: list[str] = []
    find = standby.candidates

    def counted(state: State, job: Job, node_id: str, rank: int = 0) -> list[standby.Candidate]:
        looked.append(node_id)
        return find(state, job, node_id, rank)

    fleet = Fleet(dict.fromkeys(NODES, 1), Options(suspect_ms=60_000, lease_ms=60_000))
    for _ in NODES:
        fleet.submit()
    monkeypatch.setattr(standby, "LOOKS_PER_TICK_MAX", 2)
    monkeypatch.setattr(standby, "candidates", counted)
    ticks = 40
    for _ in range(ticks):
        fleet.rig.now_ms += 250
        fleet.rig.handle(Tick())
    # One attempt costs its own look and one at each node.
    assert ticks * 2 // (1 + len(NODES)) - 1 <= len(looked) <= ticks * 2 // len(NODES)
    assert set(looked) == set(NODES)
