"""Which rank's output is read, over the tries of a gang; where it lies is all lost here, so that
each attempt that is asked for leaves its sentence."""

from typing import NoReturn

import pytest

from coordinator.core.model import Attempt, Job, JobSpec, JobView, NodeView
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.peers import Fleet, LogReader

TRIES = 2
RANKS = 3


async def job() -> JobView:
    attempts = tuple(
        Attempt(1, epoch, f"n{rank}", (), AttemptPhase.FAILED, 0, rank=rank, ranks=RANKS)
        for epoch in range(1, TRIES + 1)
        for rank in range(RANKS)
    )
    return JobView(Job(1, JobSpec(ranks=RANKS), JobPhase.FAILED, 0, epoch=TRIES), attempts)


async def nowhere(node_id: str) -> NodeView | None:
    return None


def undialled(address: str) -> NoReturn:
    raise AssertionError(f"{address} was dialled")


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("rank", range(RANKS))
async def test_one_rank_is_read_as_if_there_were_no_other(rank: int, follow: bool) -> None:
    reader = LogReader(undialled)
    fleet = Fleet(job, nowhere)
    said = [p async for p in reader.stream(fleet, follow=follow, tail_bytes=0, rank=rank)]
    assert [(piece.attempt, piece.node) for piece in said] == [
        (f"1.{epoch}.{rank}", f"n{rank}") for epoch in range(1, TRIES + 1)
    ]
    assert all("is lost" in piece.notice for piece in said)
    tail = [p async for p in reader.stream(fleet, follow=follow, tail_bytes=9, rank=rank)]
    assert [piece.attempt for piece in tail] == [f"1.{TRIES}.{rank}"]
