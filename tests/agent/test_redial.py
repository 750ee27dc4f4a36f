"""When an agent dials again: by its own back-off with full jitter, never before the coordinator has
said so, and while it waits for that its link does not count as one that hangs."""

import asyncio
from types import SimpleNamespace
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from agent.core import messages as m
from agent.core.backoff import CAP_MS, FIRST_MS, backoff_ms
from agent.core.launch import LaunchOptions
from agent.core.node import NodeCore
from agent.core.state import Instant, Memory, Options
from agent.ports import LinkClosed, Ports
from agent.pulse import standing
from agent.shell import AgentShell

OPTIONS = Options("", LaunchOptions("n1", "/run/agent.sock", "/state", "/bin/python", ()))
DRAW = 0.5


@given(st.integers(0, 1_000), st.floats(0, 1))
def test_jitter_is_full(failures: int, draw: float) -> None:
    ceiling_ms = min(CAP_MS, FIRST_MS * 2 ** min(failures, 10))
    assert backoff_ms(failures, 0.0) == 0
    assert backoff_ms(failures, 1.0) == ceiling_ms
    assert 0 <= backoff_ms(failures, draw) <= ceiling_ms


class Clock:
    """Stands still; who sleeps is held, and says for how long."""

    def __init__(self) -> None:
        self.at_ms = 1_000
        self.sleeps: asyncio.Queue[int] = asyncio.Queue()
        self.go = asyncio.Event()
        self.said: list[tuple[str, dict[str, object]]] = []

    def now_ms(self) -> int:
        return self.at_ms

    async def sleep_ms(self, duration_ms: int) -> None:
        self.sleeps.put_nowait(duration_ms)
        self.go.clear()
        await self.go.wait()
        self.at_ms += duration_ms


class Answers:
    """A session in which the coordinator says this and then ends it, or is silent."""

    def __init__(self, *orders: m.Order) -> None:
        self.orders = list(orders)
        self.heard = asyncio.Event()
        self.ends = asyncio.Event()
        self.ends.set()

    async def send(self, message: m.Upward) -> None: ...

    async def receive(self) -> m.Order:
        if not self.orders:
            self.heard.set()
            await self.ends.wait()
            raise LinkClosed("the session is over")
        return self.orders.pop(0)

    async def close(self) -> None:
        self.ends.set()


def agent(clock: Clock, sessions: list[Answers], leader_epoch: int = 0) -> AgentShell:
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
        log=lambda _level, event, fields: clock.said.append((event, dict(fields))),
        sample_interval_ms=1_000,
    )
    return AgentShell(
        NodeCore(OPTIONS, Memory("j", leader_epoch=leader_epoch)), cast("Ports", ports)
    )


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


async def test_an_agent_that_is_told_to_wait_stays_and_dials_no_more() -> None:
    clock = Clock()
    first = Answers(m.ComeLater(50_000), m.Welcome(1, 1_000, 8_000, 0))
    shell = agent(clock, [first, Answers(m.Welcome(1, 1_000, 8_000, 0))])
    jitter_ms = int(FIRST_MS * DRAW)
    assert await waits(shell, clock, 3) == [jitter_ms, jitter_ms, 2 * jitter_ms]
    assert not first.orders, "it heard the welcome on the same stream"


async def test_who_is_not_obeyed_is_not_dialled_again_at_once() -> None:
    """An older coordinator that came up again, beside a restored one or in its place."""
    clock = Clock()
    ghosts = [Answers(m.Welcome(2, 1_000, 8_000, 0), m.LeaseRenewal(1)) for _ in range(3)]
    shell = agent(clock, ghosts, leader_epoch=3)
    first_ms = int(FIRST_MS * DRAW)
    assert await waits(shell, clock, 3) == [2 * first_ms, 4 * first_ms, 8 * first_ms]


async def test_a_link_that_waits_because_it_was_told_to_does_not_hang() -> None:
    clock = Clock()
    line = Answers(m.ComeLater(300_000))
    line.ends.clear()
    shell = agent(clock, [line])
    shell._pulse.begin(clock.now_ms())
    keeping = asyncio.create_task(shell._keep_link())
    async with asyncio.timeout(30):
        await line.heard.wait()
    for late_ms, hangs in ((0, False), (100_000, True)):
        now_ms = clock.now_ms() + 300_000 + late_ms
        shell._pulse.main_ms = shell._pulse.sampling_ms = now_ms
        found = standing(now_ms, shell.pulse())
        assert (found is not None and found.loop == "link") is hangs
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_the_log_has_why_the_agent_itself_has_closed_its_link() -> None:
    """And not "this agent closed the session", which is all that the one who reads it learns."""
    clock = Clock()
    silent = Answers(m.Welcome(1, 1_000, 8_000, 0))
    silent.ends.clear()
    shell = agent(clock, [silent])
    keeping = asyncio.create_task(shell._keep_link())
    async with asyncio.timeout(30):
        await silent.heard.wait()
        reason = "nothing was heard from the coordinator for 8000 ms"
        shell._act(m.CloseLink(reason))
        await clock.sleeps.get()
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert clock.said == [("link.closed", {"reason": reason})]
    assert shell._inbox[-1] == m.Disconnected(reason), "and `link.lost` says the same"


def test_silence_in_line_means_nothing_before_it_was_told_to_end() -> None:
    core = NodeCore(OPTIONS, Memory("j"))
    core.handle(Instant(1_000, 1_000), m.Connected(()))
    core.handle(Instant(1_500, 1_500), m.FromCoordinator(m.ComeLater(50_000), ""))
    lease_ms = core.state.lease_ms

    def closes(now_ms: int) -> bool:
        effects = core.handle(Instant(now_ms, now_ms), m.Tick())
        return any(isinstance(effect, m.CloseLink) for effect in effects)

    assert not closes(51_500 + lease_ms - 1)
    assert closes(51_500 + lease_ms)
