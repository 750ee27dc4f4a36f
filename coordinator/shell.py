"""The coordinator's only loop: receive, handle, persist, send.

Everything (a request, an agent's message, a tick) is an event in one inbox. The loop drains the
inbox, asks the core about each event, lets it decide placement once for the batch, makes all the
records durable with one commit, and only then sends commands and replies. While a commit waits for
the disk the inbox fills, so load makes batches larger and not replies slower: group commit without
a timer (as in the duties of etcd-io/raft's `doc.go`).

When the store is unavailable (disk full) the batch waits and is tried again: nothing of it has left
the process, so nothing is promised. Requests that come meanwhile are refused at once, with the
reason. When another coordinator has taken over, this one stops.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.core import messages as m
from coordinator.core.capacity_orders import CapacityOutcome
from coordinator.core.census import census
from coordinator.core.coordinator import Coordinator
from coordinator.core.gangs import RUNNING_JOB
from coordinator.core.phases import ATTEMPT_ENDED, NodePhase
from coordinator.core.state import Instant
from coordinator.counts import Counts, View
from coordinator.ports import (
    Actuator,
    Allocating,
    Clock,
    Forecasting,
    Leasing,
    Store,
    StoreUnavailable,
    Tracer,
)

TICK_MS = 250  # how late a lease may be noticed; four wake-ups a second cost nothing measurable
BATCH_MAX = 2_048  # events per commit; more would only delay the first one's reply
# Waiting requests. Beyond it, the fleet asks faster than the disk can promise, and a refusal now is
# better than an answer after the client has given up.
REQUESTS_MAX = 20_000
STORE_RETRY_MS = 500
SLOW_COMMIT_MS = 5  # below it, waiting for company costs more than it saves
GATHER_STEP_MS = 1  # how often to look whether those who were answered have asked again
# Waiting messages of agents: ten of each node while the disk is full. Beyond it they are lost as on
# a bad link, which is harmless: whatever an agent says, it says again until it is answered.
MESSAGES_MAX = 200_000


class Unavailable(Exception):
    """The coordinator cannot promise anything now; ask again. The text is a sentence."""


@dataclass(slots=True)
class _Peer:
    """One agent's stream, as the shell sees it."""

    send: Callable[[m.AgentOrder], None]
    close: Callable[[str], None]


class CoordinatorShell:
    def __init__(
        self,
        core: Coordinator,
        store: Store,
        clock: Clock,
        log: Callable[[str, str, tuple[tuple[str, object], ...]], None],
    ) -> None:
        self._core = core
        self._store = store
        self._clock = clock
        self._log = log
        self._inbox: deque[m.Event] = deque()
        self._wake = asyncio.Event()
        self._peers: dict[int, _Peer] = {}
        self._replies: dict[int, asyncio.Future[m.Answer]] = {}
        self._last_session = 0
        self._last_reply = 0
        self._unavailable = ""
        self._tick_due = False
        self._leaving = False
        self._counts = Counts()
        self._tracer: Tracer | None = None
        self._actuator: Actuator | None = None
        self._allocating: Allocating | None = None
        self._forecasting: Forecasting | None = None
        self._leasing: Leasing | None = None
        self.progress_ms = 0  # when the loop last went round; the watchdog looks at it

    # --- what others call -------------------------------------------------------------------------

    def unix_ms(self) -> int:
        """The wall time that is written down."""
        return self._clock.unix_ms()

    async def request(self, body: m.RequestBody) -> m.Answer:
        """A person's request; answered after what it changed is durable. Raises `Unavailable`."""
        self._counts.requests += 1
        if self._unavailable:
            self._counts.requests_refused += 1
            raise Unavailable(self._unavailable)
        if len(self._replies) >= REQUESTS_MAX:
            self._counts.requests_refused += 1
            raise Unavailable(f"{len(self._replies)} requests are waiting; try again later")
        self._last_reply += 1
        number = self._last_reply
        reply: asyncio.Future[m.Answer] = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        self._post(m.Request(number, body))
        try:
            return await reply
        finally:
            self._replies.pop(number, None)

    def open_session(
        self, send: Callable[[m.AgentOrder], None], close: Callable[[str], None]
    ) -> int:
        """An agent's stream begins; both callbacks must return at once. Returns its number."""
        self._last_session += 1
        self._counts.sessions += 1
        self._peers[self._last_session] = _Peer(send, close)
        return self._last_session

    def from_agent(self, session: int, message: m.AgentMessage) -> None:
        self._counts.messages += 1
        if len(self._inbox) < MESSAGES_MAX:
            self._post(m.FromAgent(session, message, self._clock.now_ms()))
        else:
            self._counts.messages_lost += 1

    def close_session(self, session: int) -> None:
        """The stream has ended, however it did."""
        if self._peers.pop(session, None) is not None:
            self._post(m.FromAgent(session, m.SessionClosed()))

    def running_jobs(self) -> int:
        """Call it in the loop's thread."""
        return sum(job.phase in RUNNING_JOB for job in self._core.state.jobs.values())

    def leave(self) -> None:
        """End after the present batch."""
        self._leaving = True
        self._wake.set()

    def view(self) -> View:
        """What this coordinator has and does, for its metrics; call it in the loop's thread."""
        now_census = census(self._core.state, self._clock.unix_ms())
        waiting = len(self._replies)
        return View(now_census, self._counts, len(self._inbox), waiting, not self._unavailable)

    def act_through(self, actuator: Actuator) -> None:
        """From now on orders to switch nodes have somewhere to go; call it before `run`."""
        self._actuator = actuator

    def actuated(self, outcome: CapacityOutcome) -> None:
        """A driver has spoken; call it in the loop's thread."""
        self._counts.capacity_failures += not outcome.done
        self._post(m.Actuated(outcome))

    def is_up(self, node_id: str) -> bool:
        """Whether it has said hello and is heard; call it in the loop's thread."""
        live = self._core.state.nodes.get(node_id)
        return live is not None and live.phase is not NodePhase.LOST

    def trace_to(self, tracer: Tracer) -> None:
        """Hand over what becomes durable from now on, and count what becomes of it."""
        self._tracer = tracer
        tracer.counts = self._counts

    def forecast_by(self, forecasting: Forecasting) -> None:
        """Hand over samples of demand from now on."""
        self._forecasting = forecasting

    def forecast_made(self, made: m.ForecastMade) -> None:
        """Call it in the loop's thread."""
        self._post(made)

    def allocate_by(self, allocating: Allocating) -> None:
        """Have jobs weighed against each other from now on."""
        self._allocating = allocating

    def allocation_made(self, made: m.AllocationMade) -> None:
        """Call it in the loop's thread."""
        self._post(made)

    def lease_by(self, leasing: Leasing) -> None:
        """Ask once a day what is worth leasing from now on."""
        self._leasing = leasing

    def leases_made(self, made: m.LeasesMade) -> None:
        """Call it in the loop's thread."""
        self._post(made)

    async def run(self) -> None:
        """Until `leave`. The core must have been loaded. Raises `LeaderLost`."""
        self._core.begin(self._clock.now_ms())
        ticking = asyncio.create_task(self._tick())
        try:
            while not self._leaving:
                if ticking.done():
                    ticking.result()  # its exception is a bug of ours and ends the coordinator
                if not self._inbox and not self._tick_due:
                    self._wake.clear()
                    await self._wake.wait()
                await self._round()
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            self._unavailable = "the coordinator is stopping"
            for reply in self._replies.values():
                if not reply.done():
                    reply.set_exception(Unavailable(self._unavailable))

    # --- the loop ---------------------------------------------------------------------------------

    def _post(self, event: m.Event) -> None:
        self._inbox.append(event)
        self._wake.set()

    async def _tick(self) -> None:
        """One tick waits at a time, however long a commit takes."""
        while True:
            self._tick_due = True
            self._wake.set()
            await self._clock.sleep_ms(TICK_MS)

    async def _round(self) -> None:
        count = min(len(self._inbox), BATCH_MAX)
        self._counts.rounds += 1
        if count:
            self._counts.batch_events.observe(count)
        now = Instant(self._clock.now_ms(), self._clock.unix_ms())
        effects: list[m.Effect] = []
        for _ in range(count):
            effects += self._core.handle(now, self._inbox.popleft())
        if self._tick_due:
            # After what agents have said: a lease that was renewed in time has not ended.
            self._tick_due = False
            effects += self._core.handle(now, m.Tick())
        effects += self._core.handle(now, m.Decide())
        begun_ms = self._clock.now_ms()
        records, commands = m.divide(effects)
        if not await self._commit(records):
            return
        commit_ms = self._clock.now_ms() - begun_ms
        if self._tracer is not None:
            self._trace(self._tracer, effects, now)
        for command in commands:
            self._act(command)
        self.progress_ms = now.now_ms
        answered = sum(isinstance(command, m.Reply) for command in commands)
        if answered > 1 and commit_ms >= SLOW_COMMIT_MS:
            await self._gather(answered, commit_ms)

    def _trace(self, tracer: Tracer, effects: list[m.Effect], now: Instant) -> None:
        """What a batch has ended and committed; a checkpoint that was put again is not new."""
        jobs = self._core.state.jobs
        for effect in effects:
            match effect:
                case m.PutAttempt(attempt) if attempt.phase in ATTEMPT_ENDED:
                    if attempt.job_id in jobs:
                        tracer.ended(jobs[attempt.job_id], attempt)
                case m.PutCheckpoint(checkpoint) if checkpoint.committed_unix_ms == now.unix_ms:
                    if checkpoint.job_id in jobs:
                        tracer.committed(jobs[checkpoint.job_id], checkpoint)

    async def _gather(self, answered: int, commit_ms: int) -> None:
        """Whoever was just answered is about to ask again. On a slow disk the next commit is worth
        that moment: otherwise clients split into two halves that take turns, and every batch is
        half as large. At most one more commit's time."""
        for _ in range(commit_ms // GATHER_STEP_MS):
            if len(self._inbox) >= answered or self._leaving:
                return
            await self._clock.sleep_ms(GATHER_STEP_MS)

    async def _commit(self, records: list[m.Record]) -> bool:
        """Until it is durable, or until we leave: then nothing of it was promised to anybody."""
        while records:
            begun_ms = self._clock.now_ms()
            try:
                await self._store.commit(records)
            except StoreUnavailable as error:
                self._counts.commit_failures += 1
                if not self._unavailable:
                    self._log("error", "store.unavailable", (("reason", str(error)),))
                self._unavailable = str(error)
                self.progress_ms = self._clock.now_ms()
                if self._leaving:
                    return False
                await self._clock.sleep_ms(STORE_RETRY_MS)
            else:
                # Of whole milliseconds; what is cut off one is added to the next, on the average.
                self._counts.commit_s.observe((self._clock.now_ms() - begun_ms) / 1000)
                break
        if self._unavailable:
            self._log("info", "store.available", ())
            self._unavailable = ""
        return True

    def _act(self, command: m.Command) -> None:
        match command:
            case m.Send():
                peer = self._peers.get(command.session)
                if peer is not None:
                    self._counts.orders += 1
                    self._counts.waits_told += isinstance(command.order, m.ComeLater)
                    peer.send(command.order)
                if isinstance(command.order, m.CommitResult):
                    self._counts.checkpoints_accepted += command.order.accepted
                    self._counts.checkpoints_refused += not command.order.accepted
            case m.CloseSession():
                peer = self._peers.get(command.session)
                if peer is not None:
                    peer.close(command.reason)
            case m.Reply():
                reply = self._replies.get(command.reply_to)
                if reply is not None and not reply.done():
                    reply.set_result(command.answer)
            case m.Actuate():
                if self._actuator is not None:
                    self._counts.capacity_orders += 1
                    self._actuator.give(command.order)
            case m.MakeAllocation():
                if self._allocating is not None:
                    self._allocating.make(command)
            case m.MakeForecast():
                if self._forecasting is not None:
                    self._forecasting.make(command)
            case m.MakeLeases():
                if self._leasing is not None:
                    self._leasing.make(command)
            case m.PublishLeases():
                if self._leasing is not None:
                    self._leasing.publish(command)
            case m.Log():
                self._log(command.level, command.event, command.fields)
