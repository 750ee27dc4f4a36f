"""What the shell takes in of trainers while its journal takes nothing, and what is refused to it by
the machine."""

import asyncio
import errno
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

from agent.core import messages as m
from agent.core.launch import LaunchOptions
from agent.core.node import NodeCore
from agent.core.state import Instant, Memory, Options
from agent.core.trainer_messages import TrainerProgress, TrainerSection
from agent.core.values import Launch, Origin, ReplicaSource, Sample, StoredCheckpoint
from agent.ports import Ports
from agent.shell import BATCH_MAX, INBOX_MAX, AgentShell

OPTIONS = Options("", LaunchOptions("n1", "/run/agent.sock", "/state", "/bin/python", ()))


def test_where_a_trainer_is_gets_through_a_full_inbox() -> None:
    """It had left the section when there was no room: it must not be taken for hung in there."""
    shell = AgentShell(NodeCore(OPTIONS, Memory("j")), cast("Ports", None))
    for step in range(INBOX_MAX):
        shell.on_trainer_message("1.1", TrainerProgress(step, None, ()))
    for name in ("step", "save", ""):
        shell.on_trainer_message("1.1", TrainerSection(7, name, 1))
    shell.on_trainer_message("1.1", TrainerSection(8, "step", 1))
    shell.on_trainer_message("1.1", TrainerProgress(INBOX_MAX, None, ()))
    taken = shell._drain() + shell._drain()
    assert BATCH_MAX < len(taken) <= 2 * BATCH_MAX
    told = [one.message for one in taken if isinstance(one, m.FromTrainer)]
    assert sum(isinstance(message, TrainerProgress) for message in told) == INBOX_MAX
    sections = {one.source: one for one in told if isinstance(one, TrainerSection)}
    assert sections == {7: TrainerSection(7, "", 0), 8: TrainerSection(8, "step", 0)}


def test_a_heartbeat_comes_however_much_there_is_to_do() -> None:
    """Each round finds the next event already there: on a slow disk a commit takes that long."""
    clock = SimpleNamespace(now_ms=lambda: 20_000)
    shell = AgentShell(NodeCore(OPTIONS, Memory("j")), cast("Ports", SimpleNamespace(clock=clock)))
    welcome = m.Welcome(0, heartbeat_interval_ms=1_000, lease_ms=60_000, acknowledged_sequence=0)
    shell._core.handle(Instant(0, 0), m.Connected(()))
    shell._core.handle(Instant(0, 0), m.FromCoordinator(welcome, ""))
    shell.post(m.FromCoordinator(m.EventAck(1), ""))
    (event, tick) = shell._drain()
    assert isinstance(event, m.FromCoordinator)
    effects = shell._core.handle(Instant(20_000, 0), tick)
    assert any(isinstance(one, m.Send) and isinstance(one.message, m.Heartbeat) for one in effects)


REFUSED = OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class _Full:
    """A process that has no descriptor left, as each of the shell's ports."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, str]] = []
        self.samples = 0
        self.slept = asyncio.Event()

    def now_ms(self) -> int:
        return 0

    async def sleep_ms(self, duration_ms: int) -> None:
        if self.samples == 3:
            self.slept.set()
            await asyncio.Event().wait()

    def log(self, level: str, event: str, fields: tuple[tuple[str, object], ...]) -> None:
        self.logged.append((level, event))

    async def in_thread(self, work: Callable[..., object], *arguments: object) -> object:
        return work(*arguments)

    def sample(self) -> Sample:
        self.samples += 1
        raise REFUSED

    def prepare(self, attempt_id: str) -> None:
        raise REFUSED

    async def start(self, launch: Launch) -> int:
        raise REFUSED

    async def store(self, directory: str, origin: Origin) -> StoredCheckpoint:
        raise REFUSED

    async def replicate(self, digest: str, target: ReplicaSource) -> None:
        raise REFUSED

    async def collect(self, keep: frozenset[str]) -> int:
        raise REFUSED


async def test_what_the_machine_refuses_costs_what_was_asked_for_and_not_the_agent() -> None:
    full = _Full()
    names = ("clock", "probe", "processes", "workspace", "chunks")
    ports = SimpleNamespace(
        **dict.fromkeys(names, full), log=full.log, in_thread=full.in_thread, sample_interval_ms=1
    )
    shell = AgentShell(NodeCore(OPTIONS, Memory("j")), cast("Ports", ports))
    target = ReplicaSource("n2", "127.0.0.1:1")
    for command in (
        m.RestoreCheckpoint("1.1", ()),
        m.StartProcess(Launch("1.1", ("true",), (), "/"), ""),
        m.StoreCheckpoint("1.1", "/staging/1", 1, "", False),
        m.ReplicateCheckpoint("1.1", "ab", target),
        m.CollectCheckpoints(()),
    ):
        shell._act(command)
    await asyncio.gather(*shell._tasks)
    assert shell._bug is None
    reason = str(REFUSED)
    assert list(shell._inbox) == [
        m.RestoreFailed("1.1", reason),
        m.StartFailed("1.1", reason, permanent=False),
        m.StoreFailed("1.1", reason),
        m.ReplicationFailed("1.1", "ab", reason),
    ]
    assert full.logged == [("error", "chunks.not_collected")]


async def test_a_copy_that_is_to_go_elsewhere_is_not_sent_on() -> None:
    """Else a node that is silent would answer for minutes, and be heard instead of the other."""
    begun: list[str] = []

    async def replicate(digest: str, target: ReplicaSource) -> None:
        begun.append(target.node)
        if target.node == "n2":
            await asyncio.Event().wait()

    ports = SimpleNamespace(chunks=SimpleNamespace(replicate=replicate), sample_interval_ms=1)
    shell = AgentShell(NodeCore(OPTIONS, Memory("j")), cast("Ports", ports))
    for node in ("n2", "n3"):
        shell._act(m.ReplicateCheckpoint("1.1", "ab", ReplicaSource(node, "127.0.0.1:1")))
        await asyncio.sleep(0)
    await asyncio.gather(*shell._tasks, return_exceptions=True)
    assert begun == ["n2", "n3"]
    assert list(shell._inbox) == [m.ReplicationDone("1.1", "ab", "n3")]
    assert shell._bug is None


async def test_a_box_that_cannot_be_read_is_said_once_and_read_again() -> None:
    full = _Full()
    ports = SimpleNamespace(
        clock=full, probe=full, log=full.log, in_thread=full.in_thread, sample_interval_ms=1
    )
    shell = AgentShell(NodeCore(OPTIONS, Memory("j")), cast("Ports", ports))
    sampling = asyncio.create_task(shell._keep_sampling())
    await full.slept.wait()
    sampling.cancel()
    assert (full.samples, full.logged) == (3, [("error", "sample.failed")])
    assert not shell._inbox
