"""Reading a job's output from wherever it ran, across its attempts.

Output stays on the node that made it. So the coordinator asks the agents, attempt by attempt, and
passes the bytes on. What cannot be had leaves a sentence in place of the output, never a silent
gap and never a network library's own words: a lost node has taken its output with it, and one that
does not answer may only be restarting its agent, so a follower asks again, from the byte where it
was broken off, until the node answers or is lost. The next attempt is then waited for, until the
job has ended. Of a gang one rank's output is read, as if there were no other.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

import grpc

from coordinator.core.model import Attempt, JobView, NodeView
from coordinator.core.phases import ATTEMPT_ENDED, JOB_ENDED, AttemptPhase, NodePhase
from protos.baton.v1 import peer_pb2, peer_pb2_grpc

# How often a follower looks whether there is something new to follow. People read slower than this.
LOOK_S = 0.25
# A follower of an attempt whose node has vanished must notice that the job goes on elsewhere.
STALLED_S = 2.0
# An agent's restart takes some seconds; after so many tries in vain an attempt that is over is left
# alone.
TRIES_AFTER_END_MAX = 40
# What our own agents answer with a sentence for people; anything else is the network's word.
_AGENT_ANSWERS = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
)

Channel = grpc.aio.Channel
ReadCall = grpc.aio.UnaryStreamCall[peer_pb2.ReadLogRequest, peer_pb2.ReadLogResponse]


# In place of a byte: all of that attempt has been told.
ALL = -1


@dataclass(frozen=True, slots=True)
class Place:
    """What has been told: everything before this byte of this attempt's output."""

    attempt: str
    offset: int


@dataclass(frozen=True, slots=True)
class LogPiece:
    """`next_offset`: of its attempt's output, after it; `ALL`, where there is no more."""

    attempt: str
    node: str
    data: bytes = b""
    notice: str = ""
    next_offset: int = 0


@dataclass(frozen=True, slots=True)
class Fleet:
    """Where to look: `job` reads the job that is followed, `node` one node, `None` when unknown."""

    job: Callable[[], Awaitable[JobView]]
    node: Callable[[str], Awaitable[NodeView | None]]


@dataclass(slots=True)
class _Reading:
    """How far one attempt's output has been read. `broken` is why it stopped short, if it did."""

    attempt: Attempt
    follow: bool
    tail_bytes: int
    offset: int = 0
    broken: str = ""
    answered: bool = False

    def piece(self, data: bytes) -> LogPiece:
        return LogPiece(self.attempt.id, self.attempt.node, data, next_offset=self.offset)

    def notice(self, sentence: str, *, last: bool = False) -> LogPiece:
        piece = replace(self.piece(b""), notice=sentence)
        return replace(piece, next_offset=ALL) if last else piece

    def output(self) -> str:
        rest = "the rest of the output" if self.offset else "the output"
        return f"{rest} of attempt {self.attempt.id}"


class LogReader:
    """`open_channel(address)` dials an agent's peer service."""

    def __init__(
        self,
        open_channel: Callable[[str], Channel],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._open_channel = open_channel
        self._sleep = sleep

    async def stream(
        self,
        fleet: Fleet,
        *,
        follow: bool,
        tail_bytes: int,
        rank: int = 0,
        after: Place | None = None,
    ) -> AsyncIterator[LogPiece]:
        """Pieces of output, attempt by attempt; ends with the job when it follows it. `after`: what
        comes after this place alone, whatever `tail_bytes` is. Of an attempt that is forgotten
        nothing is left."""
        done_epoch = 0
        view = await fleet.job()
        if after is not None:
            tail_bytes = 0
            told = next((one for one in view.attempts if one.id == after.attempt), None)
            done_epoch = 0 if told is None else told.epoch - (after.offset != ALL)
        elif tail_bytes and view.attempts:
            done_epoch = view.attempts[-1].epoch - 1
        while True:
            view = await fleet.job()
            mine = [attempt for attempt in view.attempts if attempt.rank == rank]
            later = [attempt for attempt in mine if attempt.epoch > done_epoch]
            for attempt in later:
                newest = attempt is later[-1]
                if attempt.phase is AttemptPhase.ASSIGNED and newest and follow:
                    break
                done_epoch = attempt.epoch
                begun = after is not None and attempt.id == after.attempt
                offset = after.offset if after is not None and begun else 0
                reading = _Reading(attempt, follow and newest, tail_bytes, offset)
                async for piece in self._attempt(reading, fleet):
                    yield piece
                if follow:
                    yield replace(reading.piece(b""), next_offset=ALL)
                tail_bytes = 0
            ended = view.job.phase in JOB_ENDED and not any(
                attempt.epoch > done_epoch for attempt in mine
            )
            if not follow or ended:
                return
            await self._sleep(LOOK_S)

    async def _attempt(self, reading: _Reading, fleet: Fleet) -> AsyncIterator[LogPiece]:
        """All of one attempt's output, asking again where that makes sense."""
        name = reading.attempt.node
        told = False
        tries_after_end = 0
        while True:
            live = await fleet.node(name)
            if live is None or live.phase is NodePhase.LOST:
                yield reading.notice(f"{name} is lost, and {reading.output()} with it", last=True)
                return
            reading.broken, reading.answered = "", False
            async for piece in self._read(reading, live.node.peer_address, fleet):
                told, tries_after_end = False, 0
                yield piece
            if not reading.broken:
                return
            over = await _is_over(reading.attempt, fleet)
            tries_after_end += over
            again = reading.follow and not reading.answered
            if not again or tries_after_end > TRIES_AFTER_END_MAX:
                where = f"{reading.output()} is on {name}: {reading.broken}"
                yield reading.notice(where, last=reading.follow)
                return
            if not told:
                waits = "is shown when it does"
                yield reading.notice(f"{reading.broken}; {reading.output()} {waits}")
                told = True
            await self._sleep(LOOK_S)

    async def _read(self, reading: _Reading, address: str, fleet: Fleet) -> AsyncIterator[LogPiece]:
        """What one call brings. Sets `broken` when it ended before the output did."""
        tail_bytes = 0 if reading.offset else reading.tail_bytes
        request = peer_pb2.ReadLogRequest(
            attempt=reading.attempt.id,
            offset=reading.offset,
            follow=reading.follow,
            tail_bytes=tail_bytes,
        )
        async with self._open_channel(address) as channel:
            call = peer_pb2_grpc.PeerServiceStub(channel).ReadLog(request)
            try:
                async for response in self._responses(call, reading, fleet):
                    gone_bytes = response.offset - reading.offset
                    reading.offset = response.offset
                    if gone_bytes > 0 and not tail_bytes:
                        yield reading.notice(
                            f"here {gone_bytes} bytes of the output of attempt "
                            f"{reading.attempt.id} are missing: a node keeps the newest of it"
                        )
                    tail_bytes = 0
                    reading.offset += len(response.data)
                    yield reading.piece(response.data)
            except grpc.aio.AioRpcError as error:
                # A server that stops ends its calls politely, and the output goes on after it.
                reading.answered = error.code() in _AGENT_ANSWERS
                said = error.details() if reading.answered else ""
                reading.broken = said or f"{reading.attempt.node} does not answer"
            finally:
                call.cancel()

    async def _responses(
        self, call: ReadCall, reading: _Reading, fleet: Fleet
    ) -> AsyncIterator[peer_pb2.ReadLogResponse]:
        """The call's messages, until it ends, or the node is lost or the job goes on elsewhere
        without the call noticing."""
        pending: asyncio.Future[object] | None = None
        while True:
            pending = pending or asyncio.ensure_future(call.read())
            done, _ = await asyncio.wait([pending], timeout=STALLED_S)
            if done:
                response = pending.result()
                pending = None
                if not isinstance(response, peer_pb2.ReadLogResponse):
                    return
                yield response
                continue
            live = await fleet.node(reading.attempt.node)
            if live is None or live.phase is NodePhase.LOST:
                reading.broken = f"{reading.attempt.node} does not answer"
            elif (await fleet.job()).job.epoch == reading.attempt.epoch:
                continue
            pending.cancel()
            return


async def _is_over(attempt: Attempt, fleet: Fleet) -> bool:
    """Whether nothing more will be written: it has ended, or another took its place."""
    view = await fleet.job()
    now = [other for other in view.attempts if other.id == attempt.id]
    ended = not now or now[0].phase in ATTEMPT_ENDED
    return ended or view.job.epoch > attempt.epoch
