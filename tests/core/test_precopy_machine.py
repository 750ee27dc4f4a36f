"""The agent's core with stops that wait for a copy, in the same hostile world.

Problem: a stop that is put off is one more thing that a kill, a cut link or a death may fall into.
The world of `test_agent_machine.py` knows all of these; here its trainers look for requests to
save, their states are large, and drains come for those that run. Beside what must hold there:

Safety. Nobody is told to stop, or signalled, while the stop waits. A stop never waits for longer
than its order allows, nor for a process that is gone.
Liveness. Whoever was told to save first is told to stop, or has ended.
"""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from agent.core import messages as m
from agent.core import trainer_messages as t
from tests.core.test_agent_machine import AgentMachine

pytestmark = pytest.mark.long

LIMIT_MS = 500
STATE_BYTES = 10**9


class PrecopyMachine(AgentMachine):
    def boot(self) -> None:
        self.asked: dict[str, int] = {}  # who was asked to save first, and when
        super().boot()

    def handle(self, event: m.Event) -> None:
        late = isinstance(event, m.Tick)
        super().handle(event)
        for live in self.core.state.attempts.values():
            if live.precopy_until_ms is not None:
                assert live.live, "it waits for a process that is gone"
                assert not late or live.precopy_until_ms > self.now_ms
                assert live.record.stop_reason

    def act(self, command: m.Command) -> None:
        if isinstance(command, m.SignalProcess):
            live = self.core.state.attempts[command.attempt]
            assert live.precopy_until_ms is None, "a signal before the copy"
            self.asked.pop(command.attempt, None)
        if isinstance(command, m.KillProcess):
            self.asked.pop(command.attempt, None)
        super().act(command)

    def tell(self, attempt: str, message: dict[str, str | int]) -> None:
        live = self.core.state.attempts[attempt]
        waits = live.precopy_until_ms is not None
        assert not (waits and message["type"] == "stop"), "a stop before the copy"
        if message["type"] == "save":
            assert live.heeds_saves
            self.asked.setdefault(attempt, self.now_ms)
        super().tell(attempt, message)

    def store(self, command: m.StoreCheckpoint) -> m.Event:
        done = super().store(command)
        if isinstance(done, m.StoreDone):
            done = replace(done, stored=replace(done.stored, size_bytes=STATE_BYTES))
        return done

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def trainer_heeds(self, data: st.DataObject) -> None:
        attempt = data.draw(st.sampled_from(self.running()))
        self.slabs.add(attempt)
        self.handle(m.FromTrainer(attempt, t.TrainerSlab(STATE_BYTES, 2)))
        self.handle(m.FromTrainer(attempt, t.TrainerHeedsSaves()))

    @precondition(lambda self: self.running())
    @rule(data=st.data(), urgent=st.booleans(), twice=st.booleans())
    def drain(self, data: st.DataObject, urgent: bool, twice: bool) -> None:
        attempt = data.draw(st.sampled_from(self.running()))
        order = m.StopAttempt(attempt, 1_000, "drained", LIMIT_MS)
        for said in (order, *[order] * twice, *[replace(order, precopy_ms=None)] * urgent):
            self.order(said)

    @rule(job_id=st.integers(1, 3), drained=st.booleans())
    def train(self, job_id: int, drained: bool) -> None:
        """Further than the other rules get by themselves: one that runs, and could be copied."""
        self.settle()
        self.place(job_id, (), "automatic", True)
        self.settle()
        attempt = f"{job_id}.{self.epochs[job_id]}"
        if self.processes.get(attempt):
            self.slabs.add(attempt)
            self.handle(m.FromTrainer(attempt, t.TrainerSlab(STATE_BYTES, 2)))
            self.handle(m.FromTrainer(attempt, t.TrainerHeedsSaves()))
        if drained:
            self.order(m.StopAttempt(attempt, 1_000, "drained", LIMIT_MS))
            self.all_flows(True, 0)

    def settle(self) -> None:
        """Everything that is under way arrives, and nothing of it fails."""
        self.connect()
        while self.up or self.down or self.tasks:
            if self.tasks:
                self.handle(self.tasks.pop(0))
            if self.up:
                self.coordinator_hears(True)
            if self.down:
                self.agent_hears()

    def check_all_settled(self) -> None:
        super().check_all_settled()
        left = [attempt for attempt in self.asked if attempt not in self.ends]
        assert not left, "asked to save, and never to stop"


def test_a_stop_that_waits_for_a_copy_comes_in_every_history() -> None:
    run_state_machine_as_test(
        PrecopyMachine, settings=settings(max_examples=200, stateful_step_count=50)
    )


def test_some_histories_do_wait() -> None:
    """A machine in which nothing is ever copied first would pass all of it."""
    machine = PrecopyMachine()
    machine.train(1, True)
    live = machine.core.state.attempts["1.1"]
    assert "1.1" in machine.asked
    assert live.kill_ms is None
    name = t.capture_name(11, 1)
    machine.captures["1.1"] = (name, 1)
    machine.handle(m.FromTrainer("1.1", t.TrainerCheckpoint(1, name, 1)))
    while machine.tasks:
        machine.handle(machine.tasks.pop(0))
    assert "1.1" not in machine.asked
    assert live.kill_ms == machine.now_ms + 1_000
