"""The stream to the coordinator over gRPC.

The agent dials, never the other way round: a GPU box behind a firewall needs no open port for
orders, and nobody but the coordinator that it dialled can give it any. Under mutual TLS both sides
prove who they are from plain certificate files.
"""

import asyncio
import contextlib

import grpc

from agent.core.messages import Order, Upward
from agent.ports import LinkClosed
from agent.transport import Tls, TransportError, open_channel
from agent.wire import WireError, decode, encode
from protos.baton.v1 import agent_pb2, agent_pb2_grpc

# A connection that takes longer than this is not there; the back-off tries again.
DIAL_TIMEOUT_S = 5.0
# The transport's own probes find a dead peer where the application is silent; heartbeats are faster
# and are what leases count.
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 16 << 20),
    # No pings to learn how much the line would take, which both ends pay for: as at the other end.
    ("grpc.http2.bdp_probe", 0),
    # Our own back-off paces the dials; gRPC's would add up to two minutes to it. The least of its
    # pauses is its limit for a handshake, too: as long as a dial may take.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", int(DIAL_TIMEOUT_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)

_CLOSED_HERE = "this agent closed the session"

Stream = grpc.aio.StreamStreamCall[agent_pb2.SessionRequest, agent_pb2.SessionResponse]


class GrpcSession:
    """One call. The channel goes with it, so that every dial begins with a fresh connection."""

    def __init__(self, channel: grpc.aio.Channel, call: Stream) -> None:
        self._channel = channel
        self._call = call

    async def send(self, message: Upward) -> None:
        try:
            await self._call.write(encode(message))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise LinkClosed(_sentence(error)) from error
        except asyncio.CancelledError:
            if _is_being_cancelled():
                raise
            raise LinkClosed(_CLOSED_HERE) from None

    async def receive(self) -> Order:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise LinkClosed(_sentence(error)) from error
        except asyncio.CancelledError:
            if _is_being_cancelled():
                raise
            raise LinkClosed(_CLOSED_HERE) from None
        if not isinstance(response, agent_pb2.SessionResponse):
            raise LinkClosed(await self._ending())
        try:
            return decode(response)
        except WireError as error:
            raise LinkClosed(str(error)) from error

    async def _ending(self) -> str:
        code, details = await self._call.code(), await self._call.details()
        return f"the coordinator ended the session: {details or code.name.lower()}"

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()


class GrpcUplink:
    def __init__(self, address: str, tls: Tls | None) -> None:
        self._address = address
        self._tls = tls

    async def dial(self) -> GrpcSession:
        """Raises `LinkClosed` when nobody answers in time."""
        try:
            channel = open_channel(self._address, self._tls, CHANNEL_OPTIONS)
        except TransportError as error:  # a certificate that is being replaced; try again
            raise LinkClosed(str(error)) from error
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                await channel.channel_ready()
        except TimeoutError:
            await channel.close()
            beside = ", or TLS with it fails" if self._tls else ""
            raise LinkClosed(f"no coordinator answers at {self._address}{beside}") from None
        except asyncio.CancelledError:
            with contextlib.suppress(asyncio.CancelledError):
                await channel.close()
            raise
        return GrpcSession(channel, agent_pb2_grpc.AgentServiceStub(channel).Session())


def _is_being_cancelled() -> bool:
    """A call that `close` cancels ends its reader with a `CancelledError`, though nobody cancelled
    the reader: passed on, it would end whoever keeps the link, for good and in silence."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _sentence(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name.lower()
    return f"the session is over: {error}"
