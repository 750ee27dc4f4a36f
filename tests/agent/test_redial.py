"""When an agent dials again: by its own back-off with full jitter, never before the coordinator has
said so, and while it waits for that its link does not count as one that hangs."""

import asyncio
from types import SimpleNamespace
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from agent.core import messages as m
from agent.core.backoff import CAP_MS, FIRST_MS, TOLD_MS_MAX, backoff_ms
from agent.core.launch import LaunchOptions
from agent.core.node import NodeCore
from agent.core.state import Memory, Options
from agent.ports import LinkClosed
from agent.pulse import standing
from agent.shell import AgentShell, Ports

OPTIONS = Options("", LaunchOptions("n1", "/run/agent.sock", "/state", "/bin/python", ()))
DRAW = 0.5


@given(st.integers(0, 1_000), st.floats(0, 1), st.integers(0, 10**9))
def test_jitter_is_full_and_comes_on_top_of_what_was_told(
    failures: int, draw: float, told_ms: int
) -> None:
    ceiling_ms = min(CAP_MS, FIRST_MS * 2 ** min(failures, 10))
    assert backoff_ms(failures, 0.0) == 0
    assert backoff_ms(failures, 1.0) == ceiling_ms
    assert 0 <= backoff_ms(failures, draw) <= ceiling_ms
    told = min(told_ms, TOLD_MS_MAX)
    assert told <= backoff_ms(failures, draw, told_ms) <= told + ceiling_ms


class Clock:
    """Stands still; who sleeps is held, and says for how long."""

    def __init__(self) -> None:
        self.at_ms = 1_000
        self.sleeps: asyncio.Queue[int] = asyncio.Queue()
        self.go = asyncio.Event()

    def now_ms(self) -> int:
        return self.at_ms

    async def sleep_ms(self, duration_ms: int) -> None:
        self.sleeps.put_nowait(duration_ms)
        self.go.clear()
        await self.go.wait()
        self.at_ms += duration_ms


class Answers:
    """A session in which the coordinator says this and then ends it."""

    def __init__(self, *orders: m.Order) -> None:
        self.orders = list(orders)

    async def send(self, message: m.Upward) -> None: ...

    async def receive(self) -> m.Order:
        if not self.orders:
            raise LinkClosed("the coordinator ended the session")
        return self.orders.pop(0)

    async def close(self) -> None: ...


def agent(clock: Clock, sessions: list[Answers]) -> AgentShell:
    async def dial() -> Answers:
        if not sessions:
            raise LinkClosed("no coordinator answers")
        return sessions.pop(0)

    async def checkpoints() -> tuple[str, ...]:
        return ()

    ports = SimpleNamespace(
        clock=clock,
        chance=SimpleNamespace(draw=lambda: DRAW, token=lambda: ""),
        uplink=SimpleNamespace(dial=dial),
        chunks=SimpleNamespace(checkpoints=checkpoints),
        log=lambda *_: None,
        sample_interval_ms=1_000,
    )
    return AgentShell(NodeCore(OPTIONS, Memory("j")), cast("Ports", ports))


async def waits(shell: AgentShell, clock: Clock, count: int) -> list[int]:
    """Between the first so many dials."""
    keeping = asyncio.create_task(shell._keep_link())
    found = []
    async with asyncio.timeout(30):
        for _ in range(count):
            found.append(await clock.sleeps.get())
            clock.go.set()
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    return found


async def test_an_agent_that_is_told_to_come_later_comes_then_and_no_sooner() -> None:
    clock = Clock()
    later = Answers(m.ComeLater(50_000), m.EventAck(1))
    shell = agent(clock, [later, Answers(m.Welcome(1, 1_000, 8_000, 0))])
    jitter_ms = int(FIRST_MS * DRAW)
    assert await waits(shell, clock, 3) == [50_000 + jitter_ms, jitter_ms, 2 * jitter_ms]
    assert later.orders, "it left at once"


async def test_a_link_that_waits_because_it_was_told_to_does_not_hang() -> None:
    clock = Clock()
    shell = agent(clock, [Answers(m.ComeLater(300_000))])
    shell._pulse.begin(clock.now_ms())
    keeping = asyncio.create_task(shell._keep_link())
    async with asyncio.timeout(30):
        wait_ms = await clock.sleeps.get()
    for late_ms, hangs in ((0, False), (100_000, True)):
        now_ms = clock.now_ms() + wait_ms + late_ms
        shell._pulse.main_ms = shell._pulse.sampling_ms = now_ms
        found = standing(now_ms, shell.pulse())
        assert (found is not None and found.loop == "link") is hangs
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
