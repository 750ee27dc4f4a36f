"""Ten thousand agents in one process, for `bench.link`: each its own connection, its own stream.

Problem: a load generator of ten thousand `grpc.aio` channels costs more than the coordinator that
it is to measure, on the same two cores. What an agent's stream needs of HTTP/2 (RFC 9113) is
little: a preface, one request, data frames both ways, answers to settings and pings, and credit for
what was read. So an agent here is one asyncio protocol that speaks just that, some kilobytes and
twenty microseconds a message. The messages are the real ones, of a node with eight GPUs.

Header blocks are written as literals without Huffman code or index (RFC 7541, 6.2.2), which every
server takes, and never read: how a call ended does not matter here, only that it did.
"""

import asyncio
import random
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from agent.core.backoff import backoff_ms
from protos.baton.v1 import agent_pb2, types_pb2

GPUS = 8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK = END_STREAM = 1
END_HEADERS = 4
FRAME_HEADER_BYTES = 9
# Credit is given back in pieces of this size; a quarter of the window that HTTP/2 begins with.
CREDIT_BYTES = 16_384
# As many connections at once as a listener's queue takes without dropping one.
CONNECTING_MAX = 256


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    return bytes((0, len(name))) + name + bytes((len(value),)) + value


def opening(authority: str) -> bytes:
    """The bytes that begin a connection with one open call on it."""
    block = b"".join(
        _literal(name, value)
        for name, value in (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", b"/baton.v1.AgentService/Session"),
            (b":authority", authority.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
        )
    )
    return PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, block)


def message_frame(message: agent_pb2.SessionRequest) -> bytes:
    data = message.SerializeToString()
    return frame(DATA, 0, 1, struct.pack(">BI", 0, len(data)) + data)


@dataclass(slots=True)
class Tally:
    """What all agents together have seen since `clear`. Times are seconds."""

    welcomed: int = 0
    in_line: int = 0
    closed: int = 0
    reports: int = 0
    renewed: int = 0
    event_s: list[float] = field(default_factory=list)
    renewal_s: list[float] = field(default_factory=list)

    def clear(self) -> None:
        self.welcomed = self.in_line = self.closed = self.reports = self.renewed = 0
        self.event_s, self.renewal_s = [], []


class Herd:
    """The agents, and what they share."""

    def __init__(self, address: str, seed: int) -> None:
        self.host, _, port = address.rpartition(":")
        self.port = int(port)
        self.chance = random.Random(seed)
        self.tally = Tally()
        self.agents: list[FleetAgent] = []
        self.connecting = asyncio.Semaphore(CONNECTING_MAX)
        self.connected = 0
        self.stopping = False
        self.opening = opening(address)
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._changed = asyncio.Event()

    def grow(self, count: int) -> None:
        """Until there are `count`; they dial at once."""
        for number in range(len(self.agents), count):
            agent = FleetAgent(self, f"n{number:05}")
            self.agents.append(agent)
            self.spawn_dial(agent, 0)

    def welcomed(self, change: int) -> None:
        self.connected += change
        if self.connected == len(self.agents):
            self._changed.set()

    async def all_connected(self, timeout_s: float) -> None:
        """Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            while self.connected < len(self.agents):
                self._changed.clear()
                await self._changed.wait()

    def spawn_dial(self, agent: "FleetAgent", wait_ms: int) -> None:
        if self.stopping:
            return
        task = asyncio.get_running_loop().create_task(agent.dial(wait_ms))
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def stop(self) -> None:
        self.stopping = True
        for task in list(self._tasks):
            task.cancel()
        for agent in self.agents:
            agent.close()
        await asyncio.sleep(0)


class FleetAgent:
    """One node's end of the link: hello, reports, events that are sent until acknowledged."""

    def __init__(self, herd: Herd, node: str) -> None:
        self.herd = herd
        self.node = node
        self.welcomed = False
        self.attempts: dict[str, tuple[str, ...]] = {}
        self.failures = 0
        self.acknowledged = 0
        self.spool: dict[int, tuple[float, agent_pb2.SessionRequest]] = {}
        self._next_sequence = 1
        self._beats = 0
        self._beaten_s = 0.0
        self._session: _Connection | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._interval_s = 1.0
        self._gpus = [f"GPU-{node}-{index}" for index in range(GPUS)]
        self._beat = agent_pb2.SessionRequest(heartbeat=_heartbeat(self._gpus))

    async def dial(self, wait_ms: int) -> None:
        herd = self.herd
        await asyncio.sleep(wait_ms / 1000)
        loop = asyncio.get_running_loop()
        try:
            async with herd.connecting:
                await loop.create_connection(partial(_Connection, self), herd.host, herd.port)
        except OSError:
            self._again()

    def close(self) -> None:
        self._stop_beating()
        if self._session is not None:
            self._session.close()

    def _again(self) -> None:
        self.failures += 1
        self.herd.spawn_dial(self, backoff_ms(self.failures, self.herd.chance.random()))

    # --- what a connection tells ------------------------------------------------------------------

    def opened(self, session: "_Connection") -> None:
        self._session = session
        hello = agent_pb2.Hello(
            node=self.node,
            journal_id=f"journal-{self.node}",
            peer_address="127.0.0.1:1",
            host=types_pb2.HostFacts(
                hostname=self.node, boot_id="boot", cpu_count=64, memory_bytes=1 << 39
            ),
            gpus=[
                agent_pb2.GpuFacts(uuid=uuid, name="NVIDIA H100", memory_bytes=80 << 30)
                for uuid in self._gpus
            ],
            attempts=self._held(),
            acknowledged_sequence=self.acknowledged,
        )
        session.send(agent_pb2.SessionRequest(hello=hello))

    def lost(self, session: "_Connection") -> None:
        if session is not self._session:
            return
        self._session = None
        self._stop_beating()
        if self.welcomed:
            self.herd.tally.closed += 1
            self.herd.welcomed(-1)
        self.welcomed = False
        self._again()

    def told(self, response: agent_pb2.SessionResponse) -> None:
        tally = self.herd.tally
        kind = response.WhichOneof("message")
        if kind == "lease_renewal":
            tally.renewed += 1
            tally.renewal_s.append(time.perf_counter() - self._beaten_s)
        elif kind == "event_ack":
            self._settle(response.event_ack.sequence)
        elif kind == "come_later":
            tally.in_line += 1
        elif kind == "welcome":
            self._welcome(response.welcome)
        elif kind == "start_attempt":
            order = response.start_attempt
            if order.attempt not in self.attempts:
                self.attempts[order.attempt] = tuple(order.gpu_uuids)
                started = agent_pb2.AttemptStarted(pid=1)
                self.event(agent_pb2.AgentEvent(attempt=order.attempt, started=started))

    def _welcome(self, welcome: agent_pb2.Welcome) -> None:
        self.welcomed = True
        self.failures = self._beats = 0
        self.herd.tally.welcomed += 1
        self.herd.welcomed(1)
        self._settle(welcome.acknowledged_sequence)
        for _, request in self.spool.values():
            self._send(request)
        self._interval_s = welcome.heartbeat_interval.ToTimedelta().total_seconds()
        self._stop_beating()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._interval_s * self.herd.chance.random(), self._report)

    # --- what it says -----------------------------------------------------------------------------

    def event(self, event: agent_pb2.AgentEvent) -> None:
        event.sequence = self._next_sequence
        event.time.GetCurrentTime()
        self._next_sequence += 1
        request = agent_pb2.SessionRequest(event=event)
        self.spool[event.sequence] = (time.perf_counter(), request)
        if self.welcomed:
            self._send(request)

    def _settle(self, sequence: int) -> None:
        now_s = time.perf_counter()
        for known in [known for known in self.spool if known <= sequence]:
            self.herd.tally.event_s.append(now_s - self.spool.pop(known)[0])
        self.acknowledged = max(self.acknowledged, min(sequence, self._next_sequence - 1))

    def _report(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._report)
        self._beats += 1
        beat = self._beat.heartbeat
        beat.sequence = self._beats
        if len(beat.attempts) != len(self.attempts):
            del beat.attempts[:]
            beat.attempts.extend(self._held())
        self._beaten_s = time.perf_counter()
        self.herd.tally.reports += 1
        self._send(self._beat)

    def _held(self) -> list[agent_pb2.HeldAttempt]:
        return [
            agent_pb2.HeldAttempt(attempt=attempt, gpu_uuids=gpu_uuids, live=True)
            for attempt, gpu_uuids in self.attempts.items()
        ]

    def _send(self, request: agent_pb2.SessionRequest) -> None:
        if self._session is not None:
            self._session.send(request)

    def _stop_beating(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Connection(asyncio.Protocol):
    """HTTP/2 with one stream, as far as an agent needs it."""

    def __init__(self, agent: FleetAgent) -> None:
        self._agent = agent
        self._transport: asyncio.Transport | None = None
        self._arrived = bytearray()
        self._body = bytearray()
        self._unpaid_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._agent.herd.opening)
        self._agent.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._agent.lost(self)

    def send(self, request: agent_pb2.SessionRequest) -> None:
        if self._transport is not None:
            self._transport.write(message_frame(request))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._arrived += data
        while len(self._arrived) >= FRAME_HEADER_BYTES:
            size = int.from_bytes(self._arrived[:3], "big")
            whole = FRAME_HEADER_BYTES + size
            if len(self._arrived) < whole:
                return
            kind, flags = self._arrived[3], self._arrived[4]
            payload = bytes(self._arrived[FRAME_HEADER_BYTES:whole])
            del self._arrived[:whole]
            self._frame(kind, flags, payload)

    def _frame(self, kind: int, flags: int, payload: bytes) -> None:
        transport = self._transport
        if transport is None:
            return
        if kind == DATA:
            self._pay(len(payload))
            self._body += payload
            self._messages(self._agent.told)
        elif kind == SETTINGS and not flags & ACK:
            transport.write(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            transport.write(frame(PING, ACK, 0, payload))
        if kind in (GOAWAY, RST_STREAM) or (kind in (DATA, HEADERS) and flags & END_STREAM):
            transport.close()

    def _messages(self, told: Callable[[agent_pb2.SessionResponse], None]) -> None:
        while len(self._body) >= 5:
            end = 5 + int.from_bytes(self._body[1:5], "big")
            if len(self._body) < end:
                return
            response = agent_pb2.SessionResponse.FromString(bytes(self._body[5:end]))
            del self._body[:end]
            told(response)

    def _pay(self, size: int) -> None:
        self._unpaid_bytes += size
        if self._unpaid_bytes >= CREDIT_BYTES and self._transport is not None:
            credit = struct.pack(">I", self._unpaid_bytes)
            self._transport.write(frame(WINDOW_UPDATE, 0, 0, credit))
            self._transport.write(frame(WINDOW_UPDATE, 0, 1, credit))
            self._unpaid_bytes = 0


def _heartbeat(gpu_uuids: list[str]) -> agent_pb2.Heartbeat:
    """A report as an agent with these GPUs makes it."""
    return agent_pb2.Heartbeat(
        host=types_pb2.HostTelemetry(
            cpu_utilization_ratio=0.31,
            memory_used_bytes=123 << 30,
            disk_free_bytes=1 << 40,
            load_1min=12.5,
        ),
        gpus=[
            types_pb2.GpuTelemetry(
                uuid=uuid,
                utilization_ratio=0.97,
                memory_used_bytes=60 << 30,
                temperature_celsius=64,
                power_mw=655_000,
                energy_mj=1 << 40,
                sm_clock_mhz=1_980,
                memory_clock_mhz=2_619,
            )
            for uuid in gpu_uuids
        ],
    )
