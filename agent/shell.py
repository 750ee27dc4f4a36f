"""The agent's only loop: receive, handle, journal, act.

Everything that happens (an order, a trainer's word, an exit, a finished copy, a reading, time) is
an event in one inbox. The loop drains the inbox, asks the core about each event, makes the records
of the whole batch durable with one commit, and only then carries out the commands, in their order.
What takes long (a restore, a copy, a start) becomes a task whose outcome is again an event. So is
what the machine refuses to it, for want of descriptors or of threads: it costs what was asked for,
and not the jobs of the node.

The loop knows ports only. Production and simulation differ in what `main.py` and `tests/sim` plug
in, and in nothing else.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Coroutine
from dataclasses import replace
from typing import cast

from agent.core import messages as m
from agent.core.backoff import backoff_ms
from agent.core.census import census
from agent.core.gpu_messages import FollowRate, GpusInspected, InspectGpus, Report, Sampled
from agent.core.ids import parse_attempt_id
from agent.core.link import WAIT_MS_MAX
from agent.core.node import NodeCore
from agent.core.state import Effect, Instant, Record
from agent.core.trainer_messages import (
    TrainerCheckpoint,
    TrainerMessage,
    TrainerSection,
    TrainerSlab,
    is_capture,
)
from agent.core.values import (
    DriverLoaded,
    GpuOccupancy,
    Origin,
    ProcessExit,
    ReplicaSource,
    Sample,
    StoredCheckpoint,
    XidSeen,
)
from agent.counts import Counts, View
from agent.outbox import Outbox
from agent.ports import (
    ChunkError,
    FoundCapture,
    JournalUnavailable,
    LinkClosed,
    Ports,
    Session,
    StartError,
)
from agent.pulse import Beat, Pulse

BATCH_MAX = 1_024  # events per commit; more would only delay the first one's commands
JOURNAL_RETRY_MS = 500
# Events that wait while the journal takes none, half an hour of readings. Beyond it readings and
# progress are not taken in: the next ones say more.
INBOX_MAX = 2_000


class AgentShell:
    def __init__(self, core: NodeCore, ports: Ports) -> None:
        self._core = core
        self._ports = ports
        self._inbox: deque[m.Event] = deque()
        # Where trainers are, by attempt and connection, for which the inbox had no room.
        self._unheard: dict[tuple[str, int], TrainerSection] = {}
        self._unheard_xids: dict[tuple[str, str, int, str], XidSeen] = {}
        self._wake = asyncio.Event()
        self._session: Session | None = None
        self._closing = ""  # why we end it ourselves: who reads learns no more than that it is over
        self._outbox = Outbox()
        # In the order of their making, so that a simulation ends them in the same order again.
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._copying: dict[str, asyncio.Task[None]] = {}  # by attempt
        self._bug: BaseException | None = None
        self._stuck = False  # the journal takes nothing: we can promise nothing
        self._leaving = asyncio.Event()
        self._gone = asyncio.Event()
        self._counts = Counts()
        self._pulse = Pulse()
        self.opened = asyncio.Event()  # trainers of an earlier run have been adopted

    # --- what others call -------------------------------------------------------------------------

    def post(self, event: m.Event) -> None:
        self._inbox.append(event)
        self._wake.set()

    def on_trainer_message(self, attempt_id: str, message: TrainerMessage) -> None:
        """A word of a trainer. While the journal takes nothing, what can be said again is not taken
        in, and a checkpoint is refused, so that no job can fill this process."""
        # That memory was given must not be missed: it says that there is something to rescue.
        if len(self._inbox) < INBOX_MAX or isinstance(message, TrainerSlab):
            self.post(m.FromTrainer(attempt_id, message))
        elif isinstance(message, TrainerSection):
            # One that it has left must not be taken for one that it hangs in: the latest is kept.
            self._unheard[attempt_id, message.source] = replace(message, count=0)
        elif isinstance(message, TrainerCheckpoint):
            reason = f"{len(self._inbox)} events wait for the agent's journal"
            answer = {"type": "refused", "id": message.id, "reason": reason}
            self._ports.trainers.tell(attempt_id, answer)

    def on_exit(self, ended: ProcessExit) -> None:
        self.post(m.ProcessEnded(ended))

    def on_xid(self, word: XidSeen | DriverLoaded) -> None:
        """An error of a GPU. None is lost while the journal takes nothing: they add up."""
        if len(self._inbox) < INBOX_MAX or isinstance(word, DriverLoaded):
            self.post(word)
            return
        key = (word.uuid, word.pci_bus_id, word.code, word.source)
        before = self._unheard_xids.get(key)
        if before is not None:
            count, since_ms = before.count + word.count, before.since_unix_ms
            word = replace(word, count=count, first_unix_ms=since_ms)
        if before is not None or len(self._unheard_xids) < INBOX_MAX:
            self._unheard_xids[key] = word

    def leave(self, absence_ms: int | None) -> None:
        """Say goodbye and end; trainers go on."""
        self.post(m.Leaving(absence_ms))
        self._leaving.set()
        self._wake.set()

    def view(self) -> View:
        """What this agent has and does, for its metrics; call it in the loop's thread."""
        now_census = census(self._core.state, self._ports.clock.now_ms())
        return View(now_census, self._counts, len(self._inbox), len(self._outbox))

    def nudge(self) -> None:
        """Have the loop go round once, though there may be nothing to do."""
        self._wake.set()

    def pulse(self) -> tuple[Beat, ...]:
        """When each loop last moved; `nudge` first, and look at the next turn."""
        return self._pulse.beats(self._ports.sample_interval_ms, self._core.state.lease_ms)

    async def run(self) -> None:
        """Until `leave`. Raises only for bugs of our own, which systemd answers with a restart."""
        adopted = await self._ports.processes.open(self.on_exit, self.post)
        host = await self._ports.in_thread(self._ports.probe.host_facts)
        gpus = await self._ports.in_thread(self._ports.probe.gpu_facts)
        self.post(m.Opened(adopted, host, gpus))  # type: ignore[arg-type]
        self._pulse.begin(self._ports.clock.now_ms())
        await self._ports.xids.open(self.on_xid)
        self.opened.set()
        self._spawn(self._keep_link())
        self._spawn(self._keep_sampling())
        try:
            await self._loop()
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._ports.xids.close()
            await self._ports.processes.close()

    # --- the loop ---------------------------------------------------------------------------------

    async def _loop(self) -> None:
        while True:
            await self._wait()
            if self._bug is not None:
                raise self._bug
            batch = self._drain()
            self._counts.rounds += 1
            self._counts.events += len(batch)
            effects: list[Effect] = []
            for event in batch:
                effects += self._core.handle(self._now(), event)
            if not await self._commit([e for e in effects if isinstance(e, Record)]):
                return
            for effect in effects:
                if not isinstance(effect, Record):
                    self._act(effect)
            self._pulse.main_ms = self._ports.clock.now_ms()
            if self._leaving.is_set() and not self._inbox:
                await self._say_goodbye()
                return

    async def _wait(self) -> None:
        if self._inbox or self._bug is not None:
            return
        self._wake.clear()
        wake_ms = self._core.next_wake_ms()
        left_ms = None if wake_ms is None else max(0, wake_ms - self._ports.clock.now_ms())
        timeout_s = None if left_ms is None else left_ms / 1000
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            self._inbox.append(m.Tick())

    def _drain(self) -> list[m.Event]:
        count = min(len(self._inbox), BATCH_MAX)
        batch = [self._inbox.popleft() for _ in range(count)]
        while self._unheard and len(self._inbox) < INBOX_MAX:
            (attempt_id, _), section = self._unheard.popitem()
            self._inbox.append(m.FromTrainer(attempt_id, section))
        while self._unheard_xids and len(self._inbox) < INBOX_MAX:
            self._inbox.append(self._unheard_xids.pop(next(iter(self._unheard_xids))))
        wake_ms = self._core.next_wake_ms()
        if batch and wake_ms is not None and wake_ms <= self._ports.clock.now_ms():
            batch.append(m.Tick())  # else none comes while each round finds something new
        return batch

    def _now(self) -> Instant:
        return Instant(self._ports.clock.now_ms(), self._ports.clock.unix_ms())

    async def _commit(self, records: list[Record]) -> bool:
        """Until it is durable, since nothing may be done that the journal does not know of; or
        until we leave, and then none of it has happened."""
        while records:
            begun_ms = self._ports.clock.now_ms()
            self._pulse.commits = True
            try:
                await self._ports.journal.commit(records)
                self._counts.committed(records, self._ports.clock.now_ms() - begun_ms)
                break
            except JournalUnavailable as error:
                if not self._stuck:
                    self._ports.log("error", "journal.unavailable", (("reason", str(error)),))
                self._stuck = True
            finally:
                self._pulse.committed(begun_ms, self._ports.clock.now_ms())
            if self._leaving.is_set():
                return False
            await self._ports.clock.sleep_ms(JOURNAL_RETRY_MS)
        self._stuck = False
        return True

    # --- commands ---------------------------------------------------------------------------------

    def _act(self, command: m.Command) -> None:
        ports = self._ports
        match command:
            case m.Send():
                self._queue(command.message)
            case m.CloseLink():
                self._spawn(self._close_link(command.reason))
            case m.RegisterTrainer():
                directory = ports.workspace.staging_directory(command.attempt)
                ports.trainers.register(command.attempt, command.token, directory)
            case m.RestoreCheckpoint():
                self._spawn(self._restore(command))
            case m.StartProcess():
                self._spawn(self._start(command))
            case m.SignalProcess():
                ports.processes.signal(command.attempt, command.signal)
            case m.DumpStacks():
                ports.processes.dump_stacks(command.attempt, command.nccl_pipes)
            case m.KillProcess():
                ports.processes.kill(command.attempt)
            case m.ForgetAttempt():
                ports.trainers.unregister(command.attempt)
                ports.slabs.release(command.attempt)
                ports.processes.forget(command.attempt)
                self._copying.pop(command.attempt, None)
                self._spawn(self._clear(command.attempt))
            case m.TellTrainer():
                ports.trainers.tell(command.attempt, dict(command.message))
            case m.FindCapture():
                found = ports.slabs.newest(command.attempt) or FoundCapture("", 0)
                self.post(m.CaptureFound(command.attempt, found.name, found.step, found.parts))
            case m.ReleaseSlab():
                ports.slabs.release(command.attempt)
            case m.StoreCheckpoint():
                self._spawn(self._store(command))
            case m.DiscardSource():
                self._spawn(ports.chunks.discard(command.path))
            case m.ReplicateCheckpoint():
                if before := self._copying.pop(command.attempt, None):
                    before.cancel()  # it is to go elsewhere now
                self._copying[command.attempt] = self._spawn(self._replicate(command))
            case m.CollectCheckpoints():
                self._spawn(self._collect(command))
            case Report():
                self._outbox.lay(command)
            case FollowRate():
                ports.probe.follow_rate(command.rate)
            case InspectGpus():
                self._spawn(self._inspect(command))
            case m.Log():
                ports.log(command.level, command.event, command.fields)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        """A bug in an adapter must end the agent, not vanish with its task."""
        self._tasks.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            self._bug = self._bug or task.exception()
            self._wake.set()

    async def _restore(self, command: m.RestoreCheckpoint) -> None:
        ports = self._ports
        try:
            await ports.in_thread(ports.workspace.prepare, command.attempt)
            directory = ports.workspace.restore_directory(command.attempt)
            restored = await ports.chunks.restore(command.candidates, directory, command.gang)
        except (ChunkError, StartError, OSError) as error:
            self.post(m.RestoreFailed(command.attempt, str(error)))
        else:
            self.post(m.RestoreDone(command.attempt, restored))

    async def _start(self, command: m.StartProcess) -> None:
        attempt_id = command.launch.attempt_id
        ports = self._ports
        try:
            if command.trainer_config_json:
                config = command.trainer_config_json
                await ports.in_thread(ports.workspace.write_trainer_config, attempt_id, config)
            pid = await ports.processes.start(command.launch)
        except StartError as error:
            self.post(m.StartFailed(attempt_id, str(error), error.permanent))
        except OSError as error:
            self.post(m.StartFailed(attempt_id, str(error), permanent=False))
        else:
            self.post(m.ProcessStarted(attempt_id, pid, ports.processes.age_ms(attempt_id)))

    async def _inspect(self, command: InspectGpus) -> None:
        found = await self._ports.in_thread(self._ports.probe.occupancy, command.gpu_uuids)
        self.post(GpusInspected(cast(tuple[GpuOccupancy, ...], found)))

    async def _clear(self, attempt_id: str) -> None:
        await self._ports.in_thread(self._ports.workspace.clear, attempt_id)

    async def _store(self, command: m.StoreCheckpoint) -> None:
        try:
            stored = await self._stored(command)
        except (ChunkError, OSError) as error:
            self._counts.store_failures += 1
            self.post(m.StoreFailed(command.attempt, str(error)))
        else:
            self._counts.checkpoints_stored += 1
            self._counts.checkpoint_bytes_stored += stored.new_bytes
            self.post(m.StoreDone(command.attempt, stored))

    async def _stored(self, command: m.StoreCheckpoint) -> StoredCheckpoint:
        """Raises `ChunkError`."""
        named = parse_attempt_id(command.attempt)
        rank = named.rank if command.part else None
        origin = Origin(named.job_id, named.epoch, command.step, command.parent, rank)
        if not is_capture(command.path):
            return await self._ports.chunks.store(command.path, origin)
        with self._ports.slabs.reading(command.attempt, command.path) as source:
            return await self._ports.chunks.store_capture(source, origin)

    async def _replicate(self, command: m.ReplicateCheckpoint) -> None:
        target: ReplicaSource = command.target
        try:
            await self._ports.chunks.replicate(command.digest, target)
        except (ChunkError, OSError) as error:
            self._counts.replication_failures += 1
            self.post(m.ReplicationFailed(command.attempt, command.digest, str(error)))
        else:
            self._counts.checkpoints_replicated += 1
            self.post(m.ReplicationDone(command.attempt, command.digest, target.node))

    async def _collect(self, command: m.CollectCheckpoints) -> None:
        try:
            freed_bytes = await self._ports.chunks.collect(frozenset(command.keep))
        except (ChunkError, OSError) as error:
            self._ports.log("error", "chunks.not_collected", (("reason", str(error)),))
        else:
            if freed_bytes:
                self._ports.log("info", "chunks.collected", (("freed_bytes", freed_bytes),))

    # --- the link ---------------------------------------------------------------------------------

    def _queue(self, message: m.Upward) -> None:
        if self._session is not None and not self._outbox.push(message):
            self._spawn(self._close_link("the coordinator takes too little of what it is sent"))

    async def _close_link(self, reason: str) -> None:
        if self._session is not None:
            self._closing = self._closing or reason
            await self._session.close()

    async def _keep_link(self) -> None:
        """Dial, talk until it breaks, wait a little longer each time, dial again."""
        failures = 0
        said = ""
        while not self._leaving.is_set():
            self._pulse.link_ms = self._ports.clock.now_ms()
            if self._stuck:  # a hello would wait for the journal, and pile up behind it
                await self._ports.clock.sleep_ms(JOURNAL_RETRY_MS)
                continue
            try:
                session = await self._ports.uplink.dial()
                reason, talked = await self._talk(session)
                failures = 0 if talked else failures + 1
            except LinkClosed as error:
                reason, failures = str(error), failures + 1
            if reason != said:
                self._ports.log("warning", "link.closed", (("reason", reason),))
                said = reason
            wait_ms = backoff_ms(failures, self._ports.chance.draw())
            self._pulse.link_ms = self._ports.clock.now_ms() + wait_ms
            await self._ports.clock.sleep_ms(wait_ms)

    async def _talk(self, session: Session) -> tuple[str, bool]:
        """One session, from hello to its end; returns how it ended, and whether it was answered by
        somebody who is obeyed: from a ghost we come back ever more seldom."""
        self._outbox.clear()
        self._session, self._closing = session, ""
        self._counts.sessions += 1
        talked, ghost, reason = False, False, "the session ended"
        sender = asyncio.create_task(self._send_all(session))
        try:
            self.post(m.Connected(await self._ports.chunks.checkpoints()))
            while True:
                order = await session.receive()
                self._pulse.link_ms = self._ports.clock.now_ms()
                self._counts.orders_received += 1
                known = self._core.state.leader_epoch
                ghost |= isinstance(order, m.Welcome) and order.leader_epoch < known
                talked = not ghost
                if isinstance(order, m.ComeLater):
                    self._pulse.link_ms += min(order.wait_ms, WAIT_MS_MAX)
                self.post(m.FromCoordinator(order, self._ports.chance.token()))
        except (LinkClosed, ChunkError) as error:
            reason = self._closing or str(error)
            return reason, talked
        finally:
            self._session = None
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sender
            await session.close()
            self.post(m.Disconnected(reason))

    async def _send_all(self, session: Session) -> None:
        try:
            while True:
                while (message := self._outbox.take(self._ports.clock.now_ms())) is not None:
                    await session.send(message)
                    self._counts.messages_sent += 1
                if self._leaving.is_set():
                    self._gone.set()
                await self._outbox.wait()
        except LinkClosed:
            await session.close()  # `receive` ends the session

    async def _say_goodbye(self) -> None:
        """The goodbye is in the outbox; give it a moment to leave."""
        if self._session is None:
            return
        self._outbox.wake()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._gone.wait()
        await self._close_link("the agent is leaving")

    async def _keep_sampling(self) -> None:
        """Readings at their own pace. One that blocks delays the next one, and nothing else."""
        interval_ms = self._ports.sample_interval_ms
        said = False
        while True:
            begun_ms = self._ports.clock.now_ms()
            try:
                sample = cast("Sample", await self._ports.in_thread(self._ports.probe.sample))
            except OSError as error:
                if not said:
                    self._ports.log("error", "sample.failed", (("reason", str(error)),))
                said = True
            else:
                said = False
                sampled_ms = self._ports.clock.now_ms()
                self._counts.sampled(sample, sampled_ms - begun_ms, interval_ms)
                if len(self._inbox) < INBOX_MAX:
                    self.post(Sampled(sample))
            self._pulse.sampling_ms = self._ports.clock.now_ms()
            await self._ports.clock.sleep_ms(interval_ms)
