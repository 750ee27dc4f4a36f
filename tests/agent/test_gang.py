"""A gang under one agent, with real processes: two ranks, their parts, and both parts again.

Problem: an attempt's id with a rank in it becomes directories, log names, a socket's tokens and the
name of a start; each of them may have an opinion about ids. Here the agent's own adapters do what
they do in production, all but the stream to the coordinator, which the test holds in its hand. The
ranks are programs with the SDK; what they find in their environment they hand over as their part.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import baton_sdk
from agent.chunks.peers import PeerClient
from agent.chunks.service import ChunkService
from agent.chunks.store import ChunkStore
from agent.core import messages as m
from agent.core import values as v
from agent.core.launch import LaunchOptions
from agent.core.node import NodeCore
from agent.core.state import Options
from agent.core.trainer_messages import TrainerMessage
from agent.journal import SqliteJournal
from agent.main import SystemChance, SystemClock
from agent.ports import Ports
from agent.processes import records
from agent.processes.forks import ForkServers
from agent.processes.supervisor import Supervisor
from agent.sdk_server import SdkServer
from agent.shell import AgentShell
from agent.slabs import Slabs
from agent.telemetry.xids import Xids
from agent.workspace import AttemptDirectories

DEADLINE_S = 60.0  # for a condition on a busy machine; reached only when the test fails
RANK = """
import json, os, pathlib, sys
import baton_sdk

session = baton_sdk.connect()
print("rank", session.rank, "of", session.world_size, flush=True)
found = session.restore_directory
before = sorted(str(path.relative_to(found)) for path in found.rglob("state")) if found else []
directory = session.staging_directory / "part"
directory.mkdir()
said = {"environment": dict(os.environ), "found": before, "step": session.restore_step}
(directory / "state").write_text(json.dumps(said))
ticket = session.checkpoint(directory, session.restore_step + 10, parts=session.world_size)
stored = ticket.wait_stored(60)
session.close()
sys.exit(0 if stored else 1)
"""


class Coordinator:
    """The other end of the stream: says what the test says, and takes down what it hears."""

    def __init__(self) -> None:
        self.orders: asyncio.Queue[m.Order] = asyncio.Queue()
        self.heard: dict[int, m.AgentEvent] = {}
        self.changed = asyncio.Condition()
        self.greeted = False

    async def dial(self) -> "Coordinator":
        return self

    async def send(self, message: m.Upward) -> None:
        if isinstance(message, m.Hello):
            self.orders.put_nowait(m.Welcome(1, 1_000, 600_000, 0))
            self.greeted = True
        if isinstance(message, m.AgentEvent):
            self.heard[message.sequence] = message
            self.orders.put_nowait(m.EventAck(message.sequence))
        async with self.changed:
            self.changed.notify_all()

    async def receive(self) -> m.Order:
        return await self.orders.get()

    async def close(self) -> None:
        self.orders.put_nowait(m.LeaseRenewal(0))

    def of(self, kind: type[m.SpooledBody]) -> dict[str, m.SpooledBody]:
        """What was said of each attempt, of one kind."""
        bodies = [(event.attempt, event.body) for event in self.heard.values()]
        return {attempt: body for attempt, body in bodies if isinstance(body, kind)}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S), self.changed:
            await self.changed.wait_for(condition)


class Probe:
    """A box without a GPU."""

    def host_facts(self) -> v.HostFacts:
        return v.HostFacts("box", "boot", 2, 1 << 30, "", "")

    def gpu_facts(self) -> tuple[v.GpuFacts, ...]:
        return ()

    def sample(self) -> v.Sample:
        return v.Sample(v.HostSample(0.0, 0, 0, 0.0), ())

    def follow_rate(self, rate: str) -> None:
        """There is nothing that costs anything."""

    def occupancy(self, gpu_uuids: Sequence[str]) -> tuple[v.GpuOccupancy, ...]:
        return ()


class Ears:
    def __init__(self) -> None:
        self.shell: AgentShell | None = None

    def __call__(self, attempt_id: str, message: TrainerMessage) -> None:
        assert self.shell is not None
        self.shell.on_trainer_message(attempt_id, message)


@pytest.fixture(params=["executed", "forked"])
async def coordinator(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Coordinator]:
    """With an agent that has dialled it; its shims are of either kind."""
    made = Coordinator()
    async with AsyncExitStack() as stack:
        journal = SqliteJournal(tmp_path / "journal.sqlite3")
        stack.push_async_callback(journal.close)
        memory = await journal.open("j1")
        workspaces, ears, slabs = tmp_path / "workspaces", Ears(), Slabs(0.1)
        chunks = ChunkService(
            ChunkStore(tmp_path / "chunks"), PeerClient(None), staging_root=workspaces
        )
        stack.push_async_callback(chunks.close)
        await chunks.open()
        trainers = SdkServer(tmp_path / "run", ears, slabs)
        stack.push_async_callback(trainers.close)
        await trainers.open()
        python_path = str(Path(baton_sdk.__file__).parents[1])
        base = (("PATH", os.environ["PATH"]), ("PYTHONPATH", python_path))
        forks = ForkServers() if request.param == "forked" else None
        if forks is not None:
            stack.push_async_callback(forks.close)
            forks.open()
            async with asyncio.timeout(DEADLINE_S):
                await forks.plain.ready.wait()
        launch = LaunchOptions("n1", trainers.socket_path, str(workspaces), sys.executable, base)
        ports = Ports(
            SystemClock(), SystemChance(), Probe(), Supervisor(tmp_path, forks=forks),
            AttemptDirectories(workspaces), trainers, slabs, chunks, journal, made,
            lambda *_: None, asyncio.to_thread, Xids(""),
        )  # fmt: skip
        ears.shell = AgentShell(NodeCore(Options("", launch), memory), ports)
        running = asyncio.create_task(ears.shell.run())
        await made.until(lambda: made.greeted)
        yield made
        ears.shell.leave(None)
        async with asyncio.timeout(DEADLINE_S):
            await running


def start(epoch: int, rank: int, candidates: tuple[v.RestoreCandidate, ...] = ()) -> m.StartAttempt:
    gang = v.Gang(rank, 2, rank, 2, 0, ("n1",), "127.0.0.1", 29_500)
    spec = m.JobSpec(command=(sys.executable, "-c", RANK))
    return m.StartAttempt(f"7.{epoch}.{rank}", spec, (), candidates, gang=gang)


def parts_of(told: dict[str, m.SpooledBody], epoch: int) -> list[m.CheckpointProposed]:
    parts = [told[f"7.{epoch}.{rank}"] for rank in range(2)]
    return [part for part in parts if isinstance(part, m.CheckpointProposed)]


async def test_two_ranks_their_parts_and_both_parts_again(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    for rank in range(2):
        coordinator.orders.put_nowait(start(1, rank))
    await coordinator.until(lambda: len(coordinator.of(m.AttemptExited)) == 2)
    ended = coordinator.of(m.AttemptExited)
    well = m.AttemptExited(exit_code=0, by_itself=True)
    assert ended == dict.fromkeys(("7.1.0", "7.1.1"), well)
    first = parts_of(coordinator.of(m.CheckpointProposed), 1)
    assert [(part.step, part.parts, part.replicas) for part in first] == [(10, 2, ("n1",))] * 2
    for rank in range(2):
        [(_, log)] = records.segments(tmp_path / "attempts" / f"7.1.{rank}")
        assert log.read_text() == f"rank {rank} of 2\n"

    whole = v.RestoreCandidate(first[0].digest, 10, (), (v.RestorePart(first[1].digest, ()),))
    # A rank that is told to stop before its start arrives never begins; the other one does.
    coordinator.orders.put_nowait(start(2, 0, (whole,)))
    coordinator.orders.put_nowait(m.StopAttempt("7.2.1", None, "rank 0 has failed"))
    coordinator.orders.put_nowait(start(2, 1, (whole,)))
    await coordinator.until(lambda: len(coordinator.of(m.AttemptExited)) == 4)
    ended = coordinator.of(m.AttemptExited)
    assert ended["7.2.0"] == well
    assert ended["7.2.1"] == m.AttemptExited(reason="it never started here")
    started = coordinator.of(m.AttemptStarted)
    assert sorted(started) == ["7.1.0", "7.1.1", "7.2.0"]

    # What the second try handed over says what it found; read back as a third one would.
    again = coordinator.of(m.CheckpointProposed)["7.2.0"]
    assert isinstance(again, m.CheckpointProposed)
    reader = ChunkService(
        ChunkStore(tmp_path / "chunks"), PeerClient(None), staging_root=tmp_path / "workspaces"
    )
    await reader.open()
    wanted = v.RestoreCandidate(again.digest, 20, ())
    restored = await reader.restore([wanted], str(tmp_path / "third"))
    await reader.close()
    said = json.loads((Path(restored.directory) / "state").read_text())
    assert (said["step"], said["found"]) == (10, ["rank-00000/state", "rank-00001/state"])
    told = {name: said["environment"][name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    assert told == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    assert said["environment"]["MASTER_PORT"] == "29500"
