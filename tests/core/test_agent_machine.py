"""The agent's core against a world that drops, repeats, kills and fails, at every turn.

Problem: the dangerous moments of a node lie between two lines: the agent is killed after its
journal has the decision and before anybody carried it out; a stop crosses a start on the wire; a
commit is answered into a link that has just been cut. Nobody thinks of all of them, so hypothesis
draws the history, and what must hold is stated once:

Safety. No process starts after its stop or end. No GPU and no job has two. Sequences have no gaps
and are never used again; an event leaves the spool only when acknowledged. An attempt ends once,
after all that it proposes. A checkpoint follows the one before it, or the last accepted. No capture
is stored twice, or after a newer directory. Who never named a section is not asked for stacks. A
tick is never asked for twice at the same instant. The same events have the same effects.
Liveness. Once nothing fails any more everything ends, is answered, acknowledged and forgotten. The
newest capture of a process that dies under an agent that knows of its slab, or what is newer, is
stored or told to have failed before its end is.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from agent.core import messages as m
from agent.core import state as s
from agent.core import trainer_messages as t
from agent.core import values as v
from agent.core.gpu_messages import InspectGpus
from agent.core.node import NodeCore
from agent.core.pipeline import SETTLE_MS_MAX
from tests.core.agent_box import ENDS, GPUS, HOST, OPTIONS, PEER, ROUNDS_MAX
from tests.core.agent_memory import MemoryJournal, inspected


class AgentMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_ms = 0
        self.journal = MemoryJournal()
        # carry out so many commands of the next batch, then die
        self.doomed_after: int | None = None
        # what outlives the agent
        self.gpus: dict[str, tuple[str, ...]] = {}  # of every attempt that was ever ordered
        self.processes: dict[str, bool] = {}  # by attempt: whether it still runs
        self.forgotten: set[str] = set()
        self.in_sections: set[str] = set()  # who has ever said so
        self.directories: set[str] = set()
        self.captures: dict[str, tuple[str, int]] = {}  # of each slab: the newest, and its step
        self.captures_stored: set[str] = set()
        self.captures_failed: set[str] = set()
        self.captures_past: set[str] = set()  # a directory that came after it is stored
        self.ended_ms: dict[str, int] = {}  # when the agent heard of an end
        self.due: dict[str, str] = {}  # by attempt that ended: the capture to be stored before
        self.offered: dict[str, dict[int, t.TrainerCheckpoint]] = {}  # not answered yet
        self.offers = 0
        # the coordinator
        self.epochs: dict[int, int] = {}
        self.starts: list[m.StartAttempt] = []
        self.heard = 0
        self.heads: dict[str, str] = {}
        self.ended: dict[str, int] = {}
        # what has been seen in the journal
        self.last_sequence = 0
        self.acknowledged = 0
        self.stopped: set[str] = set()
        self.accepted: set[str] = set()
        self.ends: set[str] = set()
        self.proposals: dict[str, list[str]] = {}
        self.stored: set[str] = set()
        self.abandoned: set[str] = set()
        self.boot()

    # --- the agent --------------------------------------------------------------------------------

    def boot(self) -> None:
        self.core = NodeCore(OPTIONS, self.journal.memory())
        self.twin = NodeCore(OPTIONS, self.journal.memory())
        self.tasks: list[m.Event] = []  # outcomes on their way to the inbox
        self.up: list[m.Upward] = []
        self.down: list[m.Order] = []
        self.connected = False
        self.slabs: set[str] = set()  # that this agent holds
        self.said: dict[str, str] = {}  # by attempt: the newest capture that this agent heard of
        self.since: dict[str, str] = {}  # by directory: the one it came after
        self.due.clear()
        gone = [attempt for attempt, running in self.processes.items() if not running]
        self.tasks += [m.ProcessEnded(v.ProcessExit(attempt, 0, None)) for attempt in gone]
        facts = tuple(v.GpuFacts(uuid, "H100", 1) for uuid in GPUS)
        self.handle(m.Opened(tuple(self.processes), HOST, facts))

    def handle(self, event: m.Event) -> None:
        self.now_ms += 1
        self.note(event)
        now = s.Instant(self.now_ms, self.now_ms)
        effects = self.core.handle(now, event)
        assert self.twin.handle(now, event) == effects
        assert self.twin.next_wake_ms() == self.core.next_wake_ms()
        records = [effect for effect in effects if isinstance(effect, s.Record)]
        for record in records:
            self.check(record)
        self.journal.commit(records)
        for effect in effects[len(records) :]:
            if self.doomed_after == 0:
                self.doomed_after = None
                self.boot()
                return
            if self.doomed_after is not None:
                self.doomed_after -= 1
            assert not isinstance(effect, s.Record)
            self.act(effect)

    def note(self, event: m.Event) -> None:
        """What an event says of captures and ends."""
        if isinstance(event, m.FromTrainer) and isinstance(event.message, t.TrainerCheckpoint):
            self.note_offer(event.attempt, event.message.path)
        if isinstance(event, m.ProcessEnded):
            attempt = event.exit.attempt_id
            self.ended_ms[attempt] = self.now_ms
            if attempt in self.slabs and attempt in self.captures:
                self.due.setdefault(attempt, self.captures[attempt][0])
        if isinstance(event, m.StoreDone | m.StoreFailed):
            live = self.core.state.attempts.get(event.attempt)
            if live is not None and live.storing is not None:
                path, done = live.storing.path, isinstance(event, m.StoreDone)
                if t.is_capture(path):
                    (self.captures_stored if done else self.captures_failed).add(path)
                elif done:
                    self.captures_past.add(self.since.get(path, ""))

    def note_offer(self, attempt: str, path: str) -> None:
        """In the order in which this agent hears of them; one that has come back hears again."""
        said = self.said.get(attempt, "")
        if not t.is_capture(path):
            self.since.setdefault(path, said)
        elif not said or t.capture_place(said) < t.capture_place(path):
            self.said[attempt] = path

    def check(self, record: s.Record) -> None:
        match record:
            case s.PutAttempt():
                self.accepted.add(record.record.id)
                if record.record.stop_reason:
                    self.stopped.add(record.record.id)
                if record.record.pending is not None:
                    self.stored.add(record.record.pending.digest)
            case s.PutFence():
                self.stopped.add(f"{record.job_id}.{record.epoch}")
            case s.DropSpooled():
                assert record.sequence <= self.acknowledged
            case s.SpoolEvent():
                event = record.event
                assert event.sequence == self.last_sequence + 1
                self.last_sequence = event.sequence
                assert event.attempt not in self.ends, "something after the end"
                if isinstance(event.body, ENDS):
                    self.ends.add(event.attempt)
                    due = self.due.pop(event.attempt, "")
                    told = self.captures_stored | self.captures_failed | self.captures_past
                    waited_ms = self.now_ms - self.ended_ms.get(event.attempt, 0)
                    left = due and due not in told and waited_ms < SETTLE_MS_MAX
                    assert not left, "a capture was left behind"
                if isinstance(event.body, m.CheckpointProposed):
                    self.check_proposal(event.attempt, event.body)

    def check_proposal(self, attempt: str, body: m.CheckpointProposed) -> None:
        live, before = self.journal.attempts[attempt], self.proposals.setdefault(attempt, [])
        assert body.parent in (before[-1] if before else "", live.committed)
        if body.digest in before:
            assert (before[-1], len(body.replicas)) == (body.digest, 2), "again, with a copy"
        before.append(body.digest)
        assert live.spec.replication != "required" or len(body.replicas) == 2

    def act(self, command: m.Command) -> None:
        match command:
            case m.Send() if self.connected:
                self.up.append(command.message)
            case m.CloseLink():
                self.cut()
            case m.RestoreCheckpoint():
                self.tasks.append(m.RestoreDone(command.attempt, v.Restored("", 0, "")))
            case InspectGpus():
                self.handle(inspected(command))
            case m.StartProcess():
                self.start_process(command.launch.attempt_id)
            case m.DumpStacks():
                assert command.attempt in self.in_sections, "it never said where it is"
            case m.KillProcess() if self.processes.get(command.attempt):
                self.end_process(command.attempt)
            case m.ForgetAttempt():
                assert not self.processes.pop(command.attempt, False), "it still runs"
                self.forgotten.add(command.attempt)
                self.offered.pop(command.attempt, None)
            case m.FindCapture():
                known = self.captures if command.attempt in self.slabs else {}
                name, step = known.get(command.attempt, ("", 0))
                self.tasks.append(m.CaptureFound(command.attempt, name, step))
            case m.ReleaseSlab():
                self.slabs.discard(command.attempt)
            case m.StoreCheckpoint():
                self.tasks.append(self.store(command))
            case m.DiscardSource():
                self.directories.discard(command.path)
            case m.ReplicateCheckpoint():
                self.tasks.append(m.ReplicationDone(command.attempt, command.digest, "n2"))
            case m.TellTrainer():
                self.tell(command.attempt, dict(command.message))
            case m.Log(event="checkpoint.abandoned"):
                self.abandoned.add(str(dict(command.fields)["digest"]))

    def start_process(self, attempt: str) -> None:
        if attempt not in self.processes:
            assert attempt not in self.forgotten | self.stopped | self.ends
            for other in [other for other, running in self.processes.items() if running]:
                assert other.split(".")[0] != attempt.split(".")[0], "two of one job"
                assert not set(self.gpus[other]) & set(self.gpus[attempt]), "two on one GPU"
            self.processes[attempt] = True
        self.tasks.append(m.ProcessStarted(attempt, 100))

    def end_process(self, attempt: str) -> None:
        self.processes[attempt] = False
        self.tasks.append(m.ProcessEnded(v.ProcessExit(attempt, 0, None)))

    def store(self, command: m.StoreCheckpoint) -> m.Event:
        if t.is_capture(command.path):
            assert command.path not in self.captures_stored, "stored twice"
            assert command.path not in self.captures_past, "progress goes back"
            held = command.attempt in self.slabs
            if not held or self.captures[command.attempt][0] != command.path:
                return m.StoreFailed(command.attempt, "overwritten")
        elif command.path not in self.directories:
            return m.StoreFailed(command.attempt, "no such directory")
        digest = f"{command.path}<{command.parent}"
        return m.StoreDone(command.attempt, v.StoredCheckpoint(digest, command.step, 1, 1))

    def tell(self, attempt: str, message: dict[str, str | int]) -> None:
        if message["type"] in ("stored", "refused") and self.processes.get(attempt):
            self.offered.get(attempt, {}).pop(int(message["id"]), None)

    # --- what may happen --------------------------------------------------------------------------

    @rule(
        job_id=st.integers(1, 3),
        uuids=st.sampled_from([("A",), ("B",), ("A", "B"), ()]),
        replication=st.sampled_from(["automatic", "required", "none"]),
        near=st.booleans(),
    )
    def place(self, job_id: int, uuids: tuple[str, ...], replication: str, near: bool) -> None:
        epoch = self.epochs[job_id] = self.epochs.get(job_id, 0) + 1
        spec = m.JobSpec(command=("x",), replication=replication)
        target = PEER if near else None
        order = m.StartAttempt(f"{job_id}.{epoch}", spec, uuids, (), target)
        self.gpus[order.attempt] = uuids
        self.starts.append(order)
        self.order(order)

    @precondition(lambda self: self.starts)
    @rule(data=st.data())
    def place_again(self, data: st.DataObject) -> None:
        self.order(data.draw(st.sampled_from(self.starts)))

    @precondition(lambda self: self.starts)
    @rule(data=st.data(), grace_ms=st.sampled_from([None, 0, 1_000]), lost=st.booleans())
    def stop(self, data: st.DataObject, grace_ms: int | None, lost: bool) -> None:
        """Also for one whose start never arrived, or arrives later."""
        order = data.draw(st.sampled_from(self.starts))
        if lost:
            self.down = [other for other in self.down if other != order]
        self.order(m.StopAttempt(order.attempt, grace_ms, "why not"))

    @precondition(lambda self: self.starts)
    @rule(data=st.data(), near=st.booleans(), lost=st.booleans())
    def retarget(self, data: st.DataObject, near: bool, lost: bool) -> None:
        order = data.draw(st.sampled_from(self.starts))
        required = order.spec.replication == "required"
        record, target = self.journal.attempts.get(order.attempt), PEER if near else None
        lone = v.LoneCheckpoint(record.committed, 1, 1) if record and record.committed else None
        self.order(m.SetReplicaTarget(order.attempt, target, required, lone, lost))

    def order(self, order: m.Order) -> None:
        if self.connected:
            self.down.append(order)

    @rule()
    def connect(self) -> None:
        if not self.connected:
            self.connected = True
            self.handle(m.Connected(()))

    @rule(accept=st.booleans(), tasks=st.integers(0, 3))
    def all_flows(self, accept: bool, tasks: int) -> None:
        """Many small steps at once, or few histories would come far."""
        self.connect()
        while self.up or self.down:
            if self.up:
                self.coordinator_hears(accept)
            if self.down:
                self.agent_hears()
            if self.tasks and tasks:
                tasks -= 1
                self.handle(self.tasks.pop(0))

    @rule()
    def cut(self) -> None:
        if self.connected:
            self.connected = False
            self.up, self.down = [], []
            now, lost = s.Instant(self.now_ms, self.now_ms), m.Disconnected("cut")
            assert self.core.handle(now, lost) == self.twin.handle(now, lost)

    @precondition(lambda self: self.up)
    @rule(accept=st.booleans())
    def coordinator_hears(self, accept: bool) -> None:
        message = self.up.pop(0)
        match message:
            case m.Hello():
                assert message.acknowledged_sequence <= self.heard
                self.down.append(m.Welcome(1, 1_000, 8_000, self.heard))
            case m.Heartbeat():
                self.down.append(m.LeaseRenewal(message.sequence))
            case m.AgentEvent() if message.sequence <= self.heard + 1:
                if message.sequence == self.heard + 1:
                    self.heard += 1
                    self.apply(message, accept)
                self.down.append(m.EventAck(self.heard))

    def apply(self, event: m.AgentEvent, accept: bool) -> None:
        if isinstance(event.body, ENDS):
            self.ended[event.attempt] = self.ended.get(event.attempt, 0) + 1
        if isinstance(event.body, m.CheckpointProposed):
            head = self.heads.get(event.attempt, "")
            if accept := accept and event.body.parent == head:
                self.heads[event.attempt] = event.body.digest
            self.down.append(m.CommitResult(event.attempt, event.body.digest, accept, "no"))

    @precondition(lambda self: self.down)
    @rule()
    def agent_hears(self) -> None:
        order = self.down.pop(0)
        if isinstance(order, m.EventAck):
            self.acknowledged = max(self.acknowledged, order.sequence)
        if isinstance(order, m.Welcome):
            self.acknowledged = max(self.acknowledged, order.acknowledged_sequence)
        self.handle(m.FromCoordinator(order, "token"))

    @precondition(lambda self: self.tasks)
    @rule(fails=st.booleans(), data=st.data())
    def task_ends(self, fails: bool, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tasks) - 1))
        event = self.tasks[index]
        kinds = [(type(e), getattr(e, "attempt", "")) for e in self.tasks[:index]]
        if isinstance(event, m.ProcessEnded):
            if (m.ProcessStarted, event.exit.attempt_id) in kinds:
                return  # the supervisor tells an exit after the start
        del self.tasks[index]
        self.handle(self.failed(event) if fails else event)

    def failed(self, event: m.Event) -> m.Event:
        match event:
            case m.RestoreDone():
                return m.RestoreFailed(event.attempt, "unlucky")
            case m.StoreDone():
                return m.StoreFailed(event.attempt, "unlucky")
            case m.ReplicationDone():
                return m.ReplicationFailed(event.attempt, event.digest, "unlucky")
        return event

    def running(self) -> list[str]:
        return [attempt for attempt, running in self.processes.items() if running]

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def trainer_offers(self, data: st.DataObject) -> None:
        attempt = data.draw(st.sampled_from(self.running()))
        self.offers += 1
        path = f"{attempt}/c{self.offers}"
        self.directories.add(path)
        message = t.TrainerCheckpoint(self.offers, path, self.offers)
        self.offered.setdefault(attempt, {})[self.offers] = message
        self.handle(m.FromTrainer(attempt, message))

    @precondition(lambda self: self.running())
    @rule(data=st.data(), said=st.booleans())
    def trainer_captures(self, data: st.DataObject, said: bool) -> None:
        """Into its slab; whether it lives to say so is another matter."""
        attempt = data.draw(st.sampled_from(self.running()))
        if attempt not in self.slabs:
            self.slabs.add(attempt)
            self.handle(m.FromTrainer(attempt, t.TrainerSlab(1_000, 2)))
        if attempt not in self.slabs or not self.processes.get(attempt):
            return  # the agent was killed meanwhile
        self.offers += 1
        name = t.capture_name(list(self.gpus).index(attempt) + 1, self.offers)
        self.captures[attempt] = (name, self.offers)
        if said:
            message = t.TrainerCheckpoint(self.offers, name, self.offers)
            self.offered.setdefault(attempt, {})[self.offers] = message
            self.handle(m.FromTrainer(attempt, message))

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def trainer_reconnects(self, data: st.DataObject) -> None:
        attempt = data.draw(st.sampled_from(self.running()))
        self.handle(m.FromTrainer(attempt, t.TrainerHello(100)))
        if attempt in self.captures:
            self.slabs.add(attempt)
            self.handle(m.FromTrainer(attempt, t.TrainerSlab(1_000, 2)))
        for message in list(self.offered.get(attempt, {}).values()):
            self.handle(m.FromTrainer(attempt, message))

    @precondition(lambda self: self.running())
    @rule(data=st.data(), name=st.sampled_from(["step", ""]), silent_ms=st.integers(0, 8_000))
    def trainer_enters(self, data: st.DataObject, name: str, silent_ms: int) -> None:
        """After steps that were short; then it says nothing for a while."""
        attempt = data.draw(st.sampled_from(self.running()))
        self.in_sections.add(attempt)
        for said in ("step", name):
            ended = not name and silent_ms == 0
            self.handle(m.FromTrainer(attempt, t.TrainerSection(1, said, 9, ended)))
        for passed_ms in (silent_ms, silent_ms // 2):
            self.time_passes(passed_ms)

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def process_ends(self, data: st.DataObject) -> None:
        self.end_process(data.draw(st.sampled_from(self.running())))

    @rule(count=st.integers(0, 4))
    def agent_is_killed_soon(self, count: int) -> None:
        self.doomed_after = count

    @rule()
    def agent_is_killed(self) -> None:
        self.doomed_after = None
        self.boot()

    @rule(forward_ms=st.sampled_from([10, 1_000, 9_000, 130_000]))
    def time_passes(self, forward_ms: int) -> None:
        self.now_ms += forward_ms
        before = self.core
        self.handle(m.Tick())
        wake_ms = self.core.next_wake_ms()
        assert wake_ms is None or wake_ms > self.now_ms or self.core is not before, "it spins"

    # --- in the end -------------------------------------------------------------------------------

    def teardown(self) -> None:
        self.doomed_after = None
        for _ in range(ROUNDS_MAX):
            self.connect()
            while self.up or self.down or self.tasks:
                if self.up:
                    self.coordinator_hears(True)
                if self.down:
                    self.agent_hears()
                if self.tasks:
                    self.handle(self.tasks.pop(0))
            waiting = self.offered and any(self.offered.get(a) for a in self.running())
            if waiting:
                self.check_offers()
            for attempt in self.running():
                self.end_process(attempt)
            if not self.core.state.attempts and not self.core.state.spool and not self.tasks:
                break
            self.time_passes(1_000)
            for order in self.starts:
                if order.attempt in self.core.state.attempts:
                    required = order.spec.replication == "required"
                    self.order(m.SetReplicaTarget(order.attempt, PEER, required))
        self.check_all_settled()

    def check_offers(self) -> None:
        """Whoever asks again is answered, once everything that runs has run its way."""
        for attempt in self.running():
            for message in list(self.offered.get(attempt, {}).values()):
                self.handle(m.FromTrainer(attempt, message))
                while self.tasks or self.up or self.down:
                    if self.tasks:
                        self.handle(self.tasks.pop(0))
                    if self.up:
                        self.coordinator_hears(True)
                    if self.down:
                        self.agent_hears()
            live = self.core.state.attempts.get(attempt)
            blocked = live is not None and live.record.pending is not None
            assert blocked or not self.offered.get(attempt), "an offer without an answer"

    def check_all_settled(self) -> None:
        assert not self.core.state.attempts
        assert not self.core.state.spool
        assert not self.processes
        assert self.heard == self.last_sequence
        assert set(self.ended) == self.ends >= self.accepted
        assert all(count == 1 for count in self.ended.values())
        proposed = {digest for digests in self.proposals.values() for digest in digests}
        assert self.stored <= proposed | self.abandoned


@pytest.mark.long
def test_every_invariant_holds_in_every_history() -> None:
    options = settings(max_examples=400, stateful_step_count=60)
    run_state_machine_as_test(AgentMachine, settings=options)
