"""What a rank of a gang says and knows, beyond what a process of its own does.

Safety: a part is never taken for the whole, nor the other way round, whether its trainer lived to
hand it over or not; and no rank but one saves the whole.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

import baton_sdk
from agent.slabs import Slabs
from tests.trainers.fake_agent import DEADLINE_S, FakeAgent


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    desk = Slabs(0.5, lambda: 100_000_000)
    fake = FakeAgent(tmp_path / "agent.sock", slabs=desk)
    fake.start()
    yield fake
    fake.stop()
    desk.close()


def test_a_part_says_of_how_many_on_the_line_and_in_its_header(
    agent: FakeAgent, tmp_path: Path
) -> None:
    with baton_sdk.connect(agent.environment()) as session:
        slab = session.slab(1000, DEADLINE_S)
        assert slab is not None
        assert agent.slabs is not None
        for slot, parts in enumerate((1, 4)):
            slab.begin(slot)
            session.capture(slab, slot, [("data", 0, 4)], parts * 10, parts=parts)
            line = agent.expect("checkpoint")
            assert (line["step"], line.get("parts")) == (parts * 10, None if parts == 1 else parts)
            found = agent.slabs.newest("1.1")
            assert found is not None
            assert (found.step, found.parts) == (parts * 10, parts)
        session.checkpoint(tmp_path / "checkpoint-50", 50, parts=2)
        assert agent.expect("checkpoint")["parts"] == 2


def test_a_rank_knows_its_place() -> None:
    alone = baton_sdk.Session({"RANK": "3", "WORLD_SIZE": "4"})
    assert (alone.rank, alone.world_size) == (0, 1), "of a launcher's own ranks"
    rank = baton_sdk.Session({"BATON_RANK": "3", "BATON_WORLD_SIZE": "4", "RANK": "0"})
    assert (rank.rank, rank.world_size) == (3, 4)


def test_only_rank_0_has_baton_save_after_a_step(agent: FakeAgent, tmp_path: Path) -> None:
    saved: list[Path] = []
    for rank in ("0", "1"):
        more = {"BATON_RANK": rank, "BATON_WORLD_SIZE": "2", "BATON_STAGING_DIR": str(tmp_path)}
        with baton_sdk.connect(agent.environment(**more)) as session:
            if rank == "0":
                session.after_step(1, saved.append, every_steps=1)
                assert "parts" not in agent.expect("checkpoint")
            else:
                with pytest.raises(RuntimeError, match="rank 1 of 2: it saves a whole checkpoint"):
                    session.after_step(1, saved.append, every_steps=1)
    assert len(saved) == 1
