"""Which rank's output is read, over the tries of a gang, where it lies is all lost, so that each
attempt that is asked for leaves its sentence; and what is said of output that is kept no more."""

from typing import Any, NoReturn, Self

import pytest

from coordinator.core.model import Attempt, HostFacts, Job, JobSpec, JobView, Node, NodeView
from coordinator.core.phases import AttemptPhase, JobPhase, NodePhase
from coordinator.peers import Fleet, LogReader, Place
from protos.baton.v1 import peer_pb2

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
    told = [piece for piece in said if piece.notice]
    assert [(piece.attempt, piece.node) for piece in told] == [
        (f"1.{epoch}.{rank}", f"n{rank}") for epoch in range(1, TRIES + 1)
    ]
    assert all("is lost" in piece.notice for piece in told)
    tail = [p async for p in reader.stream(fleet, follow=follow, tail_bytes=9, rank=rank)]
    assert {piece.attempt for piece in tail} == {f"1.{TRIES}.{rank}"}


class Agent:
    """A channel to an agent that keeps bytes 7 to 10, and 15 and 16 when these are asked for."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing is open."""

    def unary_unary(self, *_: Any, **__: Any) -> None:
        """Nobody asks."""

    stream_unary = stream_stream = unary_unary

    def unary_stream(self, *_: Any, **__: Any) -> Any:
        return self._call

    def _call(self, request: peer_pb2.ReadLogRequest) -> Self:
        first = 9 if request.tail_bytes else max(7, request.offset)
        kept = [(first, b"789a"[first - 7 :]), (15, b"fg")]
        self._pieces = [
            peer_pb2.ReadLogResponse(offset=max(at, first), data=data[max(0, first - at) :])
            for at, data in kept
            if at + len(data) > first and data
        ]
        return self

    async def read(self) -> peer_pb2.ReadLogResponse | None:
        return self._pieces.pop(0) if self._pieces else None

    def cancel(self) -> None:
        """It has ended."""


async def somewhere(node_id: str) -> NodeView | None:
    return NodeView(Node(node_id, "j", "n0:1", HostFacts(), ()), NodePhase.UP, (), (), "")


async def test_what_is_kept_no_more_leaves_a_sentence_and_no_silent_gap() -> None:
    reader = LogReader(lambda _: Agent())  # type: ignore[arg-type,return-value]
    fleet = Fleet(job, somewhere)
    told = [p async for p in reader.stream(fleet, follow=False, tail_bytes=0)]
    words = [piece.data.decode() or piece.notice for piece in told[: len(told) // TRIES]]
    gap = "bytes of the output of attempt 1.1.0 are missing: a node keeps the newest of it"
    assert words == [f"here 7 {gap}", "789a", f"here 4 {gap}", "fg"]
    tail = [p async for p in reader.stream(fleet, follow=False, tail_bytes=4)]
    assert [bool(piece.notice) for piece in tail] == [False, True, False]


@pytest.mark.parametrize("look", [somewhere, nowhere])
async def test_who_was_cut_off_hears_the_rest_and_nothing_twice(look: Any) -> None:
    """After each part, whatever the attempt of it has become meanwhile."""
    reader = LogReader(lambda _: Agent())  # type: ignore[arg-type,return-value]
    fleet = Fleet(job, look)
    told = [p async for p in reader.stream(fleet, follow=True, tail_bytes=0)]
    assert sum(bool(piece.data or piece.notice) for piece in told) > 1
    for heard, piece in enumerate(told, 1):
        after = Place(piece.attempt, piece.next_offset)
        rest = reader.stream(fleet, follow=True, tail_bytes=9, after=after)
        words = [(p.attempt, p.data or p.notice) async for p in rest if p.data or p.notice]
        assert words == [
            (p.attempt, p.data or p.notice) for p in told[heard:] if p.data or p.notice
        ]


async def test_of_an_attempt_that_is_forgotten_the_later_ones_are_told() -> None:
    reader = LogReader(lambda _: Agent())  # type: ignore[arg-type,return-value]
    after = Place("1.0.0", 3)
    rest = [
        p
        async for p in reader.stream(Fleet(job, somewhere), follow=True, tail_bytes=0, after=after)
    ]
    assert {piece.attempt for piece in rest} == {"1.1.0", "1.2.0"}
