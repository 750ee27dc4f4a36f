"""An agent's stream: what it says goes to the shell, and orders are written in their turn.

Problem: ten thousand streams say 2,000 things a second and are answered as often. A task on each
that waits for orders costs more than what it waits for: futures and coroutines of its queue are
made anew with every message, live until the next one, and the collector walks them all meanwhile.
So what waits on a stream is the reader alone; orders lie in a plain queue, and whoever brings the
first one starts a writer, which ends with the last. Nothing of a message outlives its handling.
"""

import asyncio
from collections import deque
from typing import Any

import grpc

from coordinator import wire
from coordinator.access import Access
from coordinator.callers import caller_of
from coordinator.core import messages as m
from coordinator.shell import CoordinatorShell

# Orders for an agent that does not read them; it is cut off and told again when it returns.
ORDERS_MAX = 8_192
# How long a session that has been closed may take to hear why before it is cut.
CLOSE_GRACE_S = 2.0

Context = grpc.aio.ServicerContext[object, object]
Ending = tuple[grpc.StatusCode, str]


class Session:
    """`serve` it once."""

    def __init__(self, shell: CoordinatorShell, context: Context, access: Access) -> None:
        self._shell = shell
        self._access = access
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ending] = self._loop.create_future()
        self._orders: deque[m.AgentOrder] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._handler = asyncio.current_task()
        self._number = shell.open_session(self._send, self._close)

    async def serve(self) -> None:
        """Until either side ends it; orders that were given before are written first."""
        reader = self._loop.create_task(self._read())
        try:
            code, reason = await self._ended
            reader.cancel()
            if self._writer is not None:
                await self._writer
            if code is not grpc.StatusCode.OK:
                await self._context.abort(code, reason)
        finally:
            reader.cancel()
            if self._writer is not None:
                self._writer.cancel()
            self._shell.close_session(self._number)

    def _end(self, code: grpc.StatusCode, reason: str = "") -> None:
        if self._ended.done():
            return
        self._ended.set_result((code, reason))
        # An agent that does not read holds the writer, and `serve` with it.
        if self._handler is not None:
            self._loop.call_later(CLOSE_GRACE_S, self._handler.cancel)

    # --- from the agent ---------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            while self._heard(await self._context.read()):
                pass  # no name here holds a message while the next one is waited for
        except wire.WireError as error:
            self._end(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            self._end(grpc.StatusCode.OK)

    def _heard(self, request: Any) -> bool:
        """Whether there may be more."""
        if request is grpc.aio.EOF:
            return False
        message = wire.decode(request)
        stranger = self._stranger(message)
        if stranger:
            self._end(grpc.StatusCode.PERMISSION_DENIED, stranger)
        else:
            self._shell.from_agent(self._number, message)
        return not stranger

    def _stranger(self, message: m.AgentMessage) -> str:
        """Under TLS a node's certificate must name it, or any user's could pose as a node and be
        sent other people's jobs. Empty when it does, or when there is no TLS."""
        caller = caller_of(self._context) if isinstance(message, m.Hello) else None
        if caller is None or not isinstance(message, m.Hello):
            return ""
        return self._access.refuse_node(caller, message.node)

    # --- to the agent -----------------------------------------------------------------------------

    def _send(self, order: m.AgentOrder) -> None:
        if self._ended.done():
            return
        if len(self._orders) >= ORDERS_MAX:
            self._close(f"{ORDERS_MAX} orders were not read")
            return
        self._orders.append(order)
        if self._writer is None:
            self._writer = self._loop.create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._orders:
                await self._context.write(wire.encode(self._orders.popleft()))
            self._writer = None
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            self._end(grpc.StatusCode.OK)  # there is nobody left to be told
        except BaseException:
            # An order was lost: the agent comes back and is told again, and `serve` says why.
            self._end(grpc.StatusCode.INTERNAL, "an order could not be written")
            raise

    def _close(self, reason: str) -> None:
        if self._ended.done():
            return
        self._end(grpc.StatusCode.ABORTED, reason)
        self._shell.close_session(self._number)
