"""The network of the simulation: sessions between agents and the coordinator, in bytes.

gRPC cannot run under virtual time, so this stands where `agent/uplink.py` and `coordinator/rpc.py`
stand: a value is translated and serialised by its sender's `wire.py`, travels as bytes, and is
parsed and translated by the other's. What TCP would promise is deliberately not kept when the
`Weather` says so: bytes are lost, doubled, reordered and late, and the two ends of a broken session
learn of it at different times, or by their own patience only.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from agent import wire as agent_wire
from agent.core.messages import Order, Upward
from agent.ports import LinkClosed
from coordinator import wire as coordinator_wire
from coordinator.core import messages as cm
from coordinator.shell import CoordinatorShell
from protos.baton.v1 import agent_pb2

LATENCY_MS = (1, 12)
DIAL_TIMEOUT_MS = 5_000  # as uplink.py
KEEPALIVE_MS = 30_000  # a transport's own probes give up on a silent peer after this, as gRPC's do


@dataclass(slots=True)
class Weather:
    """What one node's way to the coordinator does at present. Ratios are 0 to 1."""

    cut: bool = False
    up_silent: bool = False
    down_silent: bool = False
    drop_ratio: float = 0.0
    repeat_ratio: float = 0.0
    reorder_ratio: float = 0.0
    delay_ms_max: int = 0

    @property
    def clear(self) -> bool:
        return self == Weather()


class Air(Protocol):
    """What a session asks of the world."""

    chance: random.Random

    def fired(self, kind: str) -> None: ...
    def trace(self, line: str) -> None: ...


class Listener(Protocol):
    """A coordinator's process, as its kernel sees it."""

    shell: CoordinatorShell | None

    def do(self, work: Callable[[], None]) -> None:
        """Now, or when the process is scheduled again."""
        ...


class Pipe:
    """One direction. In order, unless the weather says otherwise."""

    def __init__(self, air: Air, weather: Weather, upward: bool) -> None:
        self._air = air
        self._weather = weather
        self._upward = upward
        self._queue: deque[tuple[float, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.deliver: Callable[[bytes], None] = lambda _: None
        self.closed = False

    def push(self, data: bytes) -> None:
        weather, chance = self._weather, self._air.chance
        if weather.cut:
            return
        if weather.up_silent if self._upward else weather.down_silent:
            self._air.fired("half_open")
            return
        if chance.random() < weather.drop_ratio:
            self._air.fired("drop")
            return
        copies = 1
        if chance.random() < weather.repeat_ratio:
            self._air.fired("repeat")
            copies = 2
        delay_ms = chance.randint(*LATENCY_MS)
        if weather.delay_ms_max:
            self._air.fired("delay")
            delay_ms += chance.randint(0, weather.delay_ms_max)
        now_s = asyncio.get_running_loop().time()
        at_s = now_s + delay_ms / 1000
        if self._queue:
            at_s = max(at_s, self._queue[-1][0])
        self._queue.extend([(at_s, data)] * copies)
        if len(self._queue) > 1 and chance.random() < weather.reorder_ratio:
            self._air.fired("reorder")
            (first_s, first), (second_s, second) = self._queue[-2], self._queue[-1]
            self._queue[-2], self._queue[-1] = (first_s, second), (second_s, first)
        if self._timer is None:
            self._arm()

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(self._queue[0][0], self._pump) if self._queue else None

    def _pump(self) -> None:
        now_s = asyncio.get_running_loop().time()
        while self._queue and self._queue[0][0] <= now_s:
            _, data = self._queue.popleft()
            if not self.closed and not self._weather.cut:
                self.deliver(data)
        self._arm()


class Connection:
    """A session with its two ends."""

    def __init__(
        self, air: Air, weather: Weather, listener: Listener, shell: CoordinatorShell
    ) -> None:
        self.listener = listener
        self._air = air
        self._weather = weather
        self._shell = shell
        self._up = Pipe(air, weather, upward=True)
        self._down = Pipe(air, weather, upward=False)
        self._arrived: deque[bytes] = deque()
        self._arrival = asyncio.Event()
        self._number: int | None = None
        self.agent_reason = ""
        self.agent_open = True
        self.coordinator_open = True

    def open(self) -> None:
        self._up.deliver = self._at_coordinator
        self._down.deliver = self._at_agent
        self._number = self._shell.open_session(self._order, self._close_politely)

    # --- the agent's end: implements `agent.ports.Session` ----------------------------------------

    async def send(self, message: Upward) -> None:
        if not self.agent_open:
            raise LinkClosed(self.agent_reason)
        self._up.push(agent_wire.encode(message).SerializeToString(deterministic=True))

    async def receive(self) -> Order:
        while not self._arrived:
            if not self.agent_open:
                raise LinkClosed(self.agent_reason)
            self._arrival.clear()
            await self._arrival.wait()
        response = agent_pb2.SessionResponse.FromString(self._arrived.popleft())
        try:
            return agent_wire.decode(response)
        except agent_wire.WireError as error:
            raise LinkClosed(str(error)) from error

    async def close(self) -> None:
        """The other end hears of it, unless the way there is broken."""
        if self.agent_open:
            self.end_agent("closed by this agent")
        broken = self._weather.cut or self._weather.up_silent
        self._later(self.end_coordinator, KEEPALIVE_MS if broken else None)

    def end_agent(self, reason: str) -> None:
        self.agent_open = False
        self.agent_reason = self.agent_reason or reason
        self._down.closed = True
        self._arrival.set()

    def _at_agent(self, data: bytes) -> None:
        self._arrived.append(data)
        self._arrival.set()

    # --- the coordinator's end --------------------------------------------------------------------

    def end_coordinator(self) -> None:
        if self.coordinator_open and self._number is not None:
            self.coordinator_open = False
            self._up.closed = True
            number = self._number
            self.listener.do(lambda: self._shell.close_session(number))

    def _order(self, order: cm.AgentOrder) -> None:
        if isinstance(order, cm.ComeLater):
            self._air.fired("herd")
        if self.coordinator_open:
            self._down.push(coordinator_wire.encode(order).SerializeToString(deterministic=True))

    def _close_politely(self, reason: str) -> None:
        """After what was sent before it."""
        broken = self._weather.cut or self._weather.down_silent
        delay_ms = KEEPALIVE_MS if broken else 20 + self._weather.delay_ms_max
        self._later(lambda: self.end_agent(reason), delay_ms)
        self._later(self.end_coordinator, None)

    def _at_coordinator(self, data: bytes) -> None:
        if not self.coordinator_open or self._number is None:
            return
        number, request = self._number, agent_pb2.SessionRequest.FromString(data)
        try:
            message = coordinator_wire.decode(request)
        except coordinator_wire.WireError as error:
            self._close_politely(str(error))
        else:
            self.listener.do(lambda: self._shell.from_agent(number, message))

    # --- both -------------------------------------------------------------------------------------

    def coordinator_died(self) -> None:
        """Its kernel resets the connection, if anything gets through."""
        self.coordinator_open = False
        broken = self._weather.cut or self._weather.down_silent
        delay_ms = KEEPALIVE_MS if broken else None
        self._later(lambda: self.end_agent("connection reset"), delay_ms)

    def agent_died(self, power: bool) -> None:
        """A killed process resets its connections; a box without power says nothing."""
        self.end_agent("this agent is dead")
        broken = power or self._weather.cut or self._weather.up_silent
        self._later(self.end_coordinator, KEEPALIVE_MS if broken else None)

    def cut(self) -> None:
        """Each end learns of it in its own time."""
        for end in (lambda: self.end_agent("connection timed out"), self.end_coordinator):
            self._later(end, self._air.chance.choice((5, 500, 4_000, 12_000, KEEPALIVE_MS)))

    def _later(self, work: Callable[[], None], delay_ms: int | None) -> None:
        if delay_ms is None:
            delay_ms = self._air.chance.randint(*LATENCY_MS)
        asyncio.get_running_loop().call_later(delay_ms / 1000, work)
