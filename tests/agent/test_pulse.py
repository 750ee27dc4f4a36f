"""Which loop stands still, and that the real ones are seen to."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from agent.core import messages as m
from agent.core.launch import LaunchOptions
from agent.core.node import NodeCore
from agent.core.state import Memory, Options
from agent.core.values import HostFacts, HostSample, Sample
from agent.ports import LinkClosed, Ports
from agent.pulse import JOURNAL_PATIENCE_MS, Beat, Pulse, standing
from agent.shell import AgentShell

MAIN = Beat("main", 10_000, 10_000)
LINK = Beat("link", 5_000, 76_000)
OPTIONS = Options("", LaunchOptions("n1", "/run/agent.sock", "/state", "/bin/python", ()))


def test_nothing_stands_while_every_loop_moves() -> None:
    assert standing(20_000, (MAIN, LINK)) is None


def test_the_one_that_is_latest_beyond_its_own_patience_is_named() -> None:
    assert standing(20_001, (MAIN, LINK)) == MAIN
    sampling = Beat("sampling", 0, 15_000)
    assert standing(20_001, (MAIN, sampling, LINK)) == sampling


def test_a_stalled_disk_is_no_hang_until_its_own_patience_is_over() -> None:
    pulse = Pulse()
    pulse.begin(1_000)
    pulse.sampling_ms = 200_000
    pulse.commits = True
    assert standing(1_000 + JOURNAL_PATIENCE_MS, pulse.beats(1_000, 8_000)) is None
    stands = standing(1_001 + JOURNAL_PATIENCE_MS, pulse.beats(1_000, 8_000))
    assert stands is not None
    assert stands.loop == "main"
    pulse.committed(1_000, 100_000)
    assert standing(100_001, pulse.beats(1_000, 8_000)) is None, "who waited for it moves again"
    assert standing(110_001, pulse.beats(1_000, 8_000)) is not None


async def test_a_commit_that_is_on_its_way_is_told_from_a_loop_that_hangs() -> None:
    clock = Clock()
    ports = _ports(clock, "")
    shell = AgentShell(NodeCore(OPTIONS, Memory("j")), ports)
    cast("SimpleNamespace", ports).journal = SimpleNamespace(commit=_for_ever)
    running = asyncio.create_task(shell.run())
    await shell.opened.wait()
    shell.post(m.Connected(()))
    shell.post(m.FromCoordinator(m.Welcome(1, 1_000, 8_000, 0), ""))  # its epoch is kept
    while clock.now_ms() < 200_000 and standing(clock.now_ms(), shell.pulse()) is None:
        shell.nudge()
        await clock.sleep_ms(100)
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert JOURNAL_PATIENCE_MS < clock.now_ms() < 200_000


class Clock:
    """Sleeping is what moves it, so that time passes only while somebody moves."""

    def __init__(self) -> None:
        self.at_ms = 1_000

    def now_ms(self) -> int:
        return self.at_ms

    def unix_ms(self) -> int:
        return self.at_ms

    async def sleep_ms(self, duration_ms: int) -> None:
        self.at_ms += duration_ms
        await asyncio.sleep(0)


async def _for_ever(*_: object) -> object:
    return await asyncio.Event().wait()


async def _at_once(work: Callable[..., object], *arguments: object) -> object:
    return work(*arguments)


def _ports(clock: Clock, stuck: str) -> Ports:
    """An agent whose readings never end, or whose dialling does not."""
    host = HostFacts("n1", "boot", 1, 1, "", "")
    sample = Sample(HostSample(0.0, 0, 0, 0.0), ())

    def asked(work: Callable[..., object], *arguments: object) -> object:
        reads = work is probe.sample
        return _for_ever() if reads and stuck == "sampling" else _at_once(work, *arguments)

    async def opened(*_: object) -> tuple[str, ...]:
        return ()

    async def refused() -> object:
        raise LinkClosed("no coordinator answers")

    async def nothing() -> None: ...

    probe = SimpleNamespace(host_facts=lambda: host, gpu_facts=lambda: (), sample=lambda: sample)
    return cast(
        "Ports",
        SimpleNamespace(
            clock=clock,
            chance=SimpleNamespace(draw=lambda: 1.0),
            probe=probe,
            processes=SimpleNamespace(open=opened, close=nothing),
            uplink=SimpleNamespace(dial=_for_ever if stuck == "link" else refused),
            log=lambda *_: None,
            in_thread=asked,
            xids=SimpleNamespace(open=opened),
            sample_interval_ms=1_000,
        ),
    )


@pytest.mark.parametrize("stuck", ["sampling", "link", ""])
async def test_a_loop_that_hangs_is_told_from_those_that_move(stuck: str) -> None:
    clock = Clock()
    shell = AgentShell(NodeCore(OPTIONS, Memory("j")), _ports(clock, stuck))
    running = asyncio.create_task(shell.run())
    await shell.opened.wait()
    while clock.now_ms() < 200_000 and standing(clock.now_ms(), shell.pulse()) is None:
        shell.nudge()
        await clock.sleep_ms(100)
        await asyncio.sleep(0)
    found = standing(clock.now_ms(), shell.pulse())
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (found.loop if found else "") == stuck
