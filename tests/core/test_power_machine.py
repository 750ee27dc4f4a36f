"""The histories of `test_coordinator_machine.py`, in which nodes are switched off and on as well.

Problem: an order to switch a node off is the one that can cost everything: a job that runs there, a
checkpoint that lies nowhere else. So a plan without any sense chooses here whom to empty and whom
to start, at any moment, among all the other faults; and its driver does what it was told, or
nothing, or does it without a word, or says so without doing it. All invariants of the other
machine hold, every job ends, and those that are named here. The same with a node that is rented:
it is made and deleted, and what lay there is gone with it.
"""

from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from coordinator.core import costs, power, rentals
from coordinator.core.bursts import Burst
from coordinator.core.capacity_messages import Actuate, Actuated
from coordinator.core.capacity_model import Power, Source
from coordinator.core.capacity_orders import CapacityOrder, CapacityOutcome, Verb
from coordinator.core.coordinator import Coordinator
from coordinator.core.messages import AttemptExited, Effect, Event, SessionClosed, Tick
from coordinator.core.model import SHARED
from coordinator.core.node_power import (
    DARK,
    POSTPONED_MAX,
    STARTS_MAX,
    UNANSWERED_RATIO,
    PowerOptions,
    is_gone,
)
from coordinator.core.phases import JOB_ENDED, NodeIntent, NodePhase
from coordinator.core.scaler import ScalingOptions
from coordinator.core.scaling import Rules
from coordinator.core.state import Instant
from tests.core.coordinator_fleet import FakeNode
from tests.core.coordinator_harness import Rig
from tests.core.test_coordinator_machine import NODES, OPTIONS, Fleet

pytestmark = pytest.mark.long

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
        live = core.state.nodes.get(event.node)
        if live is None or (event.on and is_gone(live.node.power)):
            rentals.rent(core.state, now, event.node, "a plan")
        elif event.on:
            power.start(core.state, now, live, "a plan")
        else:
            power.go(core.state, now, live, "a plan")
        return core.state.take()


class SwitchedFleet(Fleet):
    def __init__(self) -> None:
        self.orders: dict[str, CapacityOrder] = {}  # the last one to each node
        self.given: dict[str, CapacityOrder] = {}  # all, by key
        self.given_ms: dict[str, int] = {}  # when first, by key
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
        fate=st.sampled_from(["do", "do", "do", "lie", "refuse", "silent", "again", "postpone"]),
        seconds=st.sampled_from([0, 0, 9, 13]),
    )
    def drive(self, name: str, fate: str, seconds: int) -> None:
        """The driver takes the node's last order; `again` is another time, and to `postpone` is not
        to begin it."""
        order = self.orders.get(name)
        if order is None:
            return
        node = self.nodes[name]
        if fate in ("do", "silent", "again"):
            session = node.session
            if order.verb in (Verb.RESUME, Verb.CREATE):
                if session is None:
                    self.dial(node)
            else:
                node.die()
                if order.verb is Verb.DELETE:
                    node.wipe()
                self.close(session, SessionClosed())
        if fate not in ("silent", "again"):
            done, postponed = fate in ("do", "lie"), fate == "postpone"
            outcome = CapacityOutcome(order.key, name, done, "no" * (not done), postponed)
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
            rented = {Verb.DELETE: Power.STOPPING, Verb.CREATE: Power.STARTING}
            phases = {Verb.SUSPEND: Power.STOPPING, Verb.RESUME: Power.STARTING, **rented}
            assert (effect.order.verb in rented) is (its.source is Source.BURST)
            if its.phase is phases[effect.order.verb]:  # it may have been over in the same batch
                assert effect.order.key == f"{name}.{its.changes}", "ordered, and not recorded"
            again = effect.order.key in self.given  # a successor's, of what may be done already
            same = self.given.setdefault(effect.order.key, effect.order)
            assert same == effect.order, "one key, two deeds"
            self.given_ms.setdefault(effect.order.key, self.rig.now_ms)
            if effect.order.verb in (Verb.SUSPEND, Verb.DELETE) and not again:
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
    def nobody_works_where_an_order_off_may_still_be_carried_out(self) -> None:
        dead_ms = UNANSWERED_RATIO * SWITCHED.stop_deadline_ms
        for name, order in self.orders.items():
            off = order.verb in (Verb.SUSPEND, Verb.DELETE)
            if off and self.rig.now_ms - self.given_ms[order.key] < dead_ms:
                assert self.state.nodes[name].node.power.phase is Power.STOPPING

    @invariant()
    def what_is_remembered_of_power_is_bounded(self) -> None:
        switching = self.state.switching
        assert all(len(found) <= STARTS_MAX + 1 for found in switching.at_ms.values())
        for name, times in switching.postponed.items():
            assert self.state.nodes[name].node.power.phase in (Power.STOPPING, Power.STARTING)
            assert 0 < times <= POSTPONED_MAX + 1
        for name in switching.refused:
            assert self.state.nodes[name].node.power.phase is not Power.OFF

    @invariant()
    def the_store_knows_the_power(self) -> None:
        kept = {n: node for n, node in self.rig.disk.nodes.items() if not node.forgotten}
        assert {n: node.power for n, node in kept.items()} == {
            n: live.node.power for n, live in self.state.nodes.items()
        }


def test_nothing_that_anybody_needs_is_switched_off() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "RESTART_S_DEFAULT", 0.1)
        run_state_machine_as_test(
            SwitchedFleet, settings=settings(max_examples=60, stateful_step_count=50)
        )


RENTED = "n2"


class RentingFleet(SwitchedFleet):
    """One of the nodes is rented before it is heard first."""

    def new_rig(self) -> Rig:
        rules = Rules(bursts={"A100 40GB": Burst(2.0, gpus_per_node=2)}, budget_usd_per_day=100.0)
        scaling = ScalingOptions(rules, names={"A100 40GB": {RENTED: None}})
        return WishedRig(replace(OPTIONS, power=SWITCHED, scaling=scaling))

    def dial(self, node: FakeNode) -> None:
        if node.name == RENTED and RENTED not in self.state.nodes:
            self.apply(Wish(RENTED, on=True))  # type: ignore[arg-type]  # for this rig alone
        super().dial(node)

    @invariant()
    def it_is_paid_for_while_it_may_be_there(self) -> None:
        node = self.rig.disk.nodes[RENTED]
        assert node.power.source is Source.BURST
        assert node.power.rents
        ended = [each.end_unix_ms is not None for each in node.power.rents]
        assert ended[:-1] == [True] * len(ended[:-1])
        assert ended[-1] is is_gone(node.power)

    @invariant()
    def nothing_is_left_of_who_is_gone(self) -> None:
        node = self.rig.disk.nodes[RENTED]
        if not is_gone(node.power):
            return
        assert not node.gpus
        for job_id in self.state.jobs:
            for kept in self.state.checkpoints.get(job_id, ()):
                assert all(RENTED not in piece.replicas for piece in kept.pieces)


def test_a_rented_node_is_paid_for_until_it_is_gone_and_nothing_is_lost_with_it() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "RESTART_S_DEFAULT", 0.1)
        run_state_machine_as_test(
            RentingFleet, settings=settings(max_examples=20, stateful_step_count=40)
        )
