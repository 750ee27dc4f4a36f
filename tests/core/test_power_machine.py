"""The histories of `test_coordinator_machine.py`, in which nodes are switched off and on as well.

Problem: an order to switch a node off is the one that can cost everything: a job that runs there, a
checkpoint that lies nowhere else. So a plan without any sense chooses here whom to empty and whom
to start, at any moment, among all the other faults; and its driver does what it was told, or
nothing, or does it without a word, or says so without doing it. All invariants of the other
machine hold, every job ends, and those that are named here.
"""

from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from coordinator.core import costs, power
from coordinator.core.capacity_messages import Actuate, Actuated
from coordinator.core.capacity_model import Power
from coordinator.core.capacity_orders import CapacityOrder, CapacityOutcome, Verb
from coordinator.core.coordinator import Coordinator
from coordinator.core.messages import AttemptExited, Effect, Event, SessionClosed, Tick
from coordinator.core.model import SHARED
from coordinator.core.node_power import DARK, PowerOptions
from coordinator.core.phases import JOB_ENDED, NodeIntent, NodePhase
from coordinator.core.state import Instant
from tests.core.coordinator_harness import Rig
from tests.core.test_coordinator_machine import NODES, OPTIONS, Fleet

SWITCHED = PowerOptions(
    acts=True, boot_deadline_ms=12_000, boot_retry_ms=2_000, stop_deadline_ms=12_000
)


@dataclass(frozen=True)
class Wish:
    """What a plan says of a node: on, or off."""

    node: str
    on: bool


class WishedRig(Rig):
    def ask_core(self, core: Coordinator, now: Instant, event: Event) -> list[Effect]:
        if not isinstance(event, Wish):
            return super().ask_core(core, now, event)
        live = core.state.nodes[event.node]
        if event.on:
            power.start(core.state, now, live, "a plan")
        else:
            power.go(core.state, now, live, "a plan")
        return core.state.take()


class SwitchedFleet(Fleet):
    def __init__(self) -> None:
        self.orders: dict[str, CapacityOrder] = {}  # the last one to each node
        self.given: dict[str, CapacityOrder] = {}  # all, by key
        super().__init__()

    def new_rig(self) -> Rig:
        return WishedRig(replace(OPTIONS, power=SWITCHED))

    # --- what may happen --------------------------------------------------------------------------

    @rule(name=NODES, idle=st.booleans(), obeyed=st.booleans())
    def wish_off(self, name: str, idle: bool, obeyed: bool) -> None:
        """`obeyed`: whoever runs there saves, and leaves at once."""
        live = self.state.nodes.get(name)
        if live is None or live.node.power.phase is not Power.ON or (idle and live.attempts):
            return
        if live.node.intent is NodeIntent.OPEN:
            self.apply(Wish(name, on=False))  # type: ignore[arg-type]  # for this rig alone
            node = self.nodes[name]
            self.settle(node)
            for run in node.living() if obeyed else ():
                self._save(node, run, copied=False)
                node.end(run, AttemptExited(75))
            self.settle(node)
            self.apply(Tick())

    @rule(name=NODES)
    def wish_on(self, name: str) -> None:
        live = self.state.nodes.get(name)
        if live is not None and live.node.power.phase is Power.OFF:
            self.apply(Wish(name, on=True))  # type: ignore[arg-type]  # for this rig alone

    @rule(
        name=NODES,
        fate=st.sampled_from(["do", "do", "do", "lie", "refuse", "silent", "again"]),
        seconds=st.sampled_from([0, 0, 9, 13]),
    )
    def drive(self, name: str, fate: str, seconds: int) -> None:
        """The driver takes the node's last order; `again` is another time."""
        order = self.orders.get(name)
        if order is None:
            return
        node = self.nodes[name]
        if fate in ("do", "silent", "again"):
            session = node.session
            if order.verb is Verb.RESUME:
                if session is None:
                    self.dial(node)
            else:
                node.die()
                self.close(session, SessionClosed())
        if fate not in ("silent", "again"):
            outcome = CapacityOutcome(order.key, name, fate != "refuse", "no" * (fate == "refuse"))
            self.apply(Actuated(outcome))
        if fate != "again":
            self.orders.pop(name, None)
        self.pass_time(seconds, flowing=True)

    # --- safety -----------------------------------------------------------------------------------

    def judge(self, effects: list[Effect]) -> None:
        super().judge(effects)
        for effect in effects:
            if not isinstance(effect, Actuate):
                continue
            (name,) = effect.order.nodes
            its = self.rig.disk.nodes[name].power
            phases = {Verb.SUSPEND: Power.STOPPING, Verb.RESUME: Power.STARTING}
            if its.phase is phases[effect.order.verb]:  # it may have been over in the same batch
                assert effect.order.key == f"{name}.{its.changes}", "ordered, and not recorded"
            same = self.given.setdefault(effect.order.key, effect.order)
            assert same == effect.order, "one key, two deeds"
            if effect.order.verb is Verb.SUSPEND:
                self.check_nobody_needs(name)
            self.orders[name] = effect.order

    def check_nobody_needs(self, name: str) -> None:
        live = self.state.nodes[name]
        assert not live.attempts, "ordered off under a job"
        assert not live.strays
        for job in self.state.jobs.values():
            good = self.state.good_checkpoints(job)
            for piece in good[0].pieces if good and job.phase not in JOB_ENDED else ():
                if name in piece.replicas:
                    assert any(self.stays(other) for other in piece.replicas if other != name)

    def stays(self, name: str) -> bool:
        if name == SHARED:
            return True
        live = self.state.nodes[name]
        there = live.phase is not NodePhase.LOST
        return there and live.node.power.phase in (Power.ON, Power.LEAVING)

    @invariant()
    def what_is_dark_is_silent_and_closed(self) -> None:
        for live in self.state.nodes.values():
            phase = live.node.power.phase
            if phase in DARK:
                assert live.phase is NodePhase.LOST
            if phase is not Power.ON:
                assert live.node.intent is not NodeIntent.OPEN

    @invariant()
    def the_store_knows_the_power(self) -> None:
        for name, node in self.rig.disk.nodes.items():
            assert node.power == self.state.nodes[name].node.power


def test_nothing_that_anybody_needs_is_switched_off() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "RESTART_S_DEFAULT", 0.1)
        run_state_machine_as_test(
            SwitchedFleet, settings=settings(max_examples=60, stateful_step_count=50)
        )
