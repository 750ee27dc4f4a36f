"""Rented nodes in the live coordinator: what is paid for is known, bounded, and given back."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from coordinator.core import bills, rentals
from coordinator.core.bursts import Burst
from coordinator.core.capacity_model import Power, Source
from coordinator.core.capacity_orders import Verb
from coordinator.core.census import census
from coordinator.core.cost_requests import CostPage, GetCosts, Grouping
from coordinator.core.messages import (
    AgentEvent,
    AttemptExited,
    CancelJob,
    CordonNode,
    Effect,
    FromAgent,
    GpuHealthChanged,
    ListNodes,
    Log,
    NodePage,
    Refusal,
    Submit,
    UncordonNode,
)
from coordinator.core.model import GpuHealth, GpuVerdict, JobSpec
from coordinator.core.node_power import DAY_MS, POSTPONED_MAX, REFUSED_MS, NodePower, Rent
from coordinator.core.phases import NodeIntent
from coordinator.core.scale_requests import ApproveScaling, ScalePage
from coordinator.core.scaler import ScalingOptions
from coordinator.core.scaling import Mode
from coordinator.core.state import Instant, Options
from tests.core.switched_fleet import ACTS, TICK_MS
from tests.core.test_fleet_scaling import RULES, ScaledRig

HOUR_MS = 3_600_000
USD = 2.0
POOL = ("r1", "r2", "r3")
BURST = Burst(USD, gpus_per_node=2, idle_ms=120_000)


class RentingRig(ScaledRig):
    """One own node with one H100, and names for rented ones with two. Nodes that are deleted fall
    silent."""

    @classmethod
    def renting(
        cls, mode: Mode = Mode.ACT, *, budget_usd: float = 100.0, alone: bool = True
    ) -> "RentingRig":
        rules = replace(
            RULES, bursts={"H100": BURST}, budget_usd_per_day=budget_usd, spends_alone=alone,
            wait_usd_per_gpu_h=100.0, idle_usd_per_gpu_h=5.0,
        )  # fmt: skip
        scaling = ScalingOptions(rules, mode, names={"H100": dict.fromkeys(POOL)})
        made = cls.new(Options(power=ACTS, scaling=scaling, burst_nodes=POOL))
        assert isinstance(made, RentingRig)
        made.hello("n1")
        made.soon = made.later = 1.0
        made.forecast()
        return made

    def live(self, seconds: int) -> list[Effect]:
        effects: list[Effect] = []
        for _ in range(seconds):
            effects += super().live(1)
            for name in POOL:
                if name in self.rig.disk.nodes and self.power(name) is Power.STOPPING:
                    self.obey(name)
        return effects

    def queue(self, *jobs: int, **spec: object) -> None:
        for _ in jobs:
            self.submit(gpu_types=("H100",), **spec)

    def verbs(self, names: Iterable[str] = POOL) -> list[tuple[str, str]]:
        return [
            (order.nodes[0], order.verb.value) for order in self.orders if order.nodes[0] in names
        ]

    def nodes_shown(self) -> list[str]:
        found = self.ask(ListNodes())
        assert isinstance(found, NodePage)
        return [view.node.id for view in found.nodes]


@pytest.fixture(autouse=True)
def _only_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.core.test_fleet_scaling.NAMES", ("n1",))


def rented(mode: Mode = Mode.ACT) -> RentingRig:
    """`r1` is up, for three jobs in front of one own GPU."""
    fleet = RentingRig.renting(mode)
    fleet.queue(1, 2, 3)
    fleet.live(61)
    assert fleet.verbs() == [("r1", "create")]
    fleet.answer("r1")
    fleet.hello("r1", "2xH100")
    assert fleet.power("r1") is Power.ON
    return fleet


def end_all(fleet: RentingRig) -> None:
    """Every job is over; its attempt's node says so."""
    state = fleet.rig.core.state
    for job_id in list(state.jobs):
        fleet.ask(CancelJob(job_id))
    for attempt_id in list(state.indices.open_attempts):
        exit_of(fleet, attempt_id)


def test_a_queue_in_front_of_a_full_fleet_rents_and_an_idle_one_is_given_back() -> None:
    fleet = rented()
    (order,) = [order for order in fleet.orders if order.verb is Verb.CREATE]
    assert order.gpu_type == "H100"
    assert order.key == f"r1.{fleet.node('r1').power.changes - 1}"
    assert fleet.node("r1").intent is NodeIntent.OPEN
    assert fleet.page().types[0].rented_gpus == 2
    (record, *_) = [r for r in fleet.rig.disk.scaled.values() if r.deeds]
    assert ("create", ("r1",)) in [(deed.verb, deed.nodes) for deed in record.deeds]
    price = fleet.rig.options.scaling.rules.bursts["H100"]
    assert record.rent_usd == price.usd_per_gpu_h, "all that it went by can be read in it"
    assert record.frees_ms is not None
    assert record.soon_ms > 0


def test_who_is_not_rented_is_nowhere_in_the_fleet() -> None:
    fleet = RentingRig.renting()
    assert fleet.nodes_shown() == ["n1"]
    assert rentals.rent(fleet.rig.core.state, fleet.rig.now, "r1", "a test")
    fleet.wait(1_000)
    assert fleet.nodes_shown() == ["n1", "r1"]
    fleet.answer("r1", done=False, reason="sold out")
    fleet.wait(1_000)
    fleet.answer("r1")
    assert fleet.power("r1") is Power.OFF
    assert fleet.nodes_shown() == ["n1"]
    state = fleet.rig.core.state
    counts = dict(census(state, fleet.rig.now.unix_ms).powers)
    assert counts[Power.OFF] == 0
    assert counts[Power.ON] == 1
    assert fleet.page().types[0].off_gpus == 0
    assert fleet.page().types[0].rented_gpus == 0
    refused = fleet.ask(UncordonNode("r1"))
    assert isinstance(refused, Refusal)
    assert "r1 is not rented" in refused.sentence


def test_a_creation_that_fails_is_deleted_and_not_tried_again_at_once() -> None:
    fleet = RentingRig.renting()
    fleet.queue(1, 2, 3)
    fleet.live(61)
    fleet.answer("r1", done=False, reason="sold out")
    fleet.wait(1_000)
    assert fleet.verbs() == [("r1", "create"), ("r1", "delete")]
    keys = [order.key for order in fleet.orders]
    assert len(set(keys)) == 2
    fleet.answer("r1")
    fleet.live(500)
    assert len(fleet.verbs()) == 2, "not within ten minutes"
    fleet.live(240)
    assert fleet.verbs()[2:3] == [("r2", "create")], "who was never there comes first"


def test_a_node_that_never_enrols_is_deleted() -> None:
    fleet = RentingRig.renting()
    fleet.queue(1, 2, 3)
    fleet.live(61)
    fleet.answer("r1")
    effects = fleet.wait(ACTS.boot_deadline_ms + 1_000)
    assert fleet.verbs() == [("r1", "create"), ("r1", "delete")]
    assert any(isinstance(e, Log) and e.event == "node.power_failed" for e in effects)
    fleet.answer("r1")
    assert fleet.power("r1") is Power.OFF


@pytest.mark.parametrize("says", ["no", "nothing"])
def test_who_is_not_known_to_be_gone_is_paid_for_until_a_person_has_looked(says: str) -> None:
    fleet = RentingRig.renting()
    state = fleet.rig.core.state
    rentals.rent(state, fleet.rig.now, "r1", "a test")
    fleet.wait(1_000)
    fleet.answer("r1", done=False, reason="sold out")
    for _ in range(80):
        if says == "no" and fleet.power("r1") is Power.STOPPING:
            fleet.answer("r1", done=False, reason="no such token")
        fleet.wait(5_000)
    assert fleet.power("r1") is Power.FAILED
    assert "may still be paid for" in fleet.node("r1").power.reason
    assert [verb for _, verb in fleet.verbs()] == ["create", "delete", "delete", "delete"]
    assert fleet.page().types[0].rented_gpus == 2
    assert fleet.node("r1").power.rents[-1].end_unix_ms is None
    fleet.ask(UncordonNode("r1"))
    fleet.wait(1_000)
    assert fleet.verbs()[-1] == ("r1", "delete")
    fleet.answer("r1")
    assert fleet.power("r1") is Power.OFF
    assert fleet.node("r1").power.rents[-1].end_unix_ms is not None


def test_a_deletion_that_has_no_turn_is_tried_more_and_more_seldom_and_then_told() -> None:
    fleet = RentingRig.renting()
    rentals.rent(fleet.rig.core.state, fleet.rig.now, "r1", "a test")
    fleet.wait(1_000)
    fleet.answer("r1", done=False, reason="sold out")
    said: list[str] = []
    waits_ms = []
    for _ in range(POSTPONED_MAX):
        fleet.wait(1_000)
        effects = fleet.answer("r1", done=False, reason="it waited for its turn", postponed=True)
        begun_ms, orders = fleet.rig.now_ms, len(fleet.orders)
        while len(fleet.orders) == orders:
            effects += fleet.wait(TICK_MS)
        waits_ms.append(fleet.rig.now_ms - begun_ms)
        said += [effect.event for effect in effects if isinstance(effect, Log)]
        assert fleet.power("r1") is Power.STOPPING
    assert waits_ms == [ACTS.boot_retry_ms << times for times in range(POSTPONED_MAX)]
    assert said.count("node.power_failed") == 1, "not with each"
    assert "node.rent_failed" not in said
    assert fleet.node("r1").power.boot_failures == 0
    assert len({order.key for order in fleet.orders}) == len(fleet.orders)
    fleet.wait(1_000)
    effects = fleet.answer("r1", done=False, reason="it waited for its turn", postponed=True)
    assert fleet.power("r1") is Power.FAILED
    (told,) = [e for e in effects if isinstance(e, Log) and e.event == "node.rent_failed"]
    assert "`baton uncordon r1` has it deleted again" in str(dict(told.fields)["reason"])
    fleet.wait(600_000)
    assert fleet.power("r1") is Power.FAILED
    fleet.ask(UncordonNode("r1"))
    assert fleet.power("r1") is Power.STOPPING
    fleet.wait(1_000)
    fleet.answer("r1")
    assert fleet.power("r1") is Power.OFF


def test_a_successor_gives_the_same_order_and_knows_what_was_spent() -> None:
    fleet = RentingRig.renting()
    state = fleet.rig.core.state
    rentals.rent(state, fleet.rig.now, "r1", "a test")
    fleet.wait(1_000)
    (order,) = fleet.orders
    fleet.wait(20_000)
    fleet.rig.restart()
    fleet.wait(1_000)
    assert fleet.orders == [order, order]
    state = fleet.rig.core.state
    memory = rentals.remembered(state, fleet.rig.now, state.scaler.memory)
    ((_, usd),) = memory.spent_usd
    assert usd == pytest.approx(2 * USD * 22_000 / HOUR_MS)


def test_rent_of_a_day_is_counted_and_a_short_one_as_a_whole_hour() -> None:
    state = RentingRig.renting().rig.core.state
    now = Instant(0, 10 * DAY_MS)
    short = Rent(now.unix_ms - 60_000, 4.0, now.unix_ms)
    long = Rent(now.unix_ms - 2 * DAY_MS, 4.0, now.unix_ms - 23 * HOUR_MS)
    going_on = Rent(now.unix_ms - HOUR_MS, 4.0)
    its = NodePower(source=Source.BURST, gpu_type="H100", gpus=2, rents=(long, short, going_on))
    assert rentals.spent_usd(state, its, now, 0) == pytest.approx(4.0 + 4.0 + 4.0)
    assert rentals.spent_usd(state, its, now, HOUR_MS) == pytest.approx(4.0 + 4.0)


@pytest.mark.parametrize("budget_usd", [0.0, 3.9])
def test_nothing_is_rented_beyond_the_budget(budget_usd: float) -> None:
    fleet = RentingRig.renting(budget_usd=budget_usd)
    fleet.queue(1, 2, 3)
    fleet.live(300)
    assert not fleet.verbs()
    assert "budget" in {record.rail for record in fleet.rig.disk.scaled.values()}


def test_no_more_is_rented_than_there_are_names() -> None:
    fleet = RentingRig.renting(budget_usd=10_000.0)
    state = fleet.rig.core.state
    for name in POOL:
        assert rentals.rent(state, fleet.rig.now, name, "a test")
        assert not rentals.rent(state, fleet.rig.now, name, "a test"), "it is not free any more"
    fleet.wait(1_000)
    for name in POOL:
        fleet.answer(name)
        fleet.hello(name, "2xH100")
    fleet.queue(*range(20))
    fleet.live(700)
    assert fleet.verbs() == [(name, "create") for name in POOL]
    assert "names" in {record.rail for record in fleet.rig.disk.scaled.values()}


@pytest.mark.parametrize(
    "spec", [{"flexible_ms": DAY_MS}, {"ranks": 1, "gpus": 4}, {"gpu_memory_bytes_min": 10**12}]
)
def test_who_can_wait_or_would_not_fit_is_no_reason_to_rent(spec: dict[str, object]) -> None:
    fleet = RentingRig.renting()
    fleet.queue(1)
    wanted = {"gpus": 1, "gpu_types": ("H100",), **spec}
    for _ in range(3):
        fleet.ask(Submit(JobSpec(command=("train",), **wanted)))  # type: ignore[arg-type]
    fleet.live(300)
    assert not fleet.verbs()


@pytest.mark.parametrize("mode", [Mode.ACT, Mode.ADVISE])
def test_a_person_agrees_to_what_raises_spend(mode: Mode) -> None:
    fleet = RentingRig.renting(mode, alone=False)
    fleet.queue(1, 2, 3)
    fleet.live(200)
    assert not fleet.verbs()
    (record,) = fleet.page().proposed
    first = [deed for deed in record.deeds if deed.verb == "create"]
    assert [deed.nodes for deed in first] == [("r1",)]
    answer = fleet.ask(ApproveScaling(record.number))
    assert isinstance(answer, ScalePage)
    fleet.wait(1_000)
    assert fleet.verbs() == [("r1", "create")]


def test_an_idle_one_is_given_back_and_its_name_is_free_again() -> None:
    fleet = rented()
    fleet.live(30)
    end_all(fleet)
    state = fleet.rig.core.state
    fleet.live(600)
    assert ("r1", "delete") in fleet.verbs()
    assert fleet.power("r1") is Power.OFF
    assert fleet.node("r1").gpus == ()
    assert "r1" in rentals.free_names(state, fleet.rig.now, "H100")
    assert fleet.nodes_shown() == ["n1"]
    page = bills.answer(
        state,
        fleet.rig.now,
        GetCosts(fleet.rig.now.unix_ms - DAY_MS, fleet.rig.now.unix_ms, by=Grouping.GPU_TYPE),
    )
    assert isinstance(page, CostPage)
    assert [line.key for line in page.lines] == ["H100"], "its type is known when it is gone"
    assert page.total.burst_usd > 0


def exit_of(fleet: RentingRig, attempt_id: str) -> None:
    attempt = fleet.rig.core.state.attempts[attempt_id]
    live = fleet.rig.core.state.nodes[attempt.node]
    assert live.session is not None
    number = live.node.acknowledged + 1
    event = AgentEvent(number, fleet.rig.now.unix_ms, attempt_id, AttemptExited(0))
    fleet.handle(FromAgent(live.session, event))


def test_a_rented_node_that_is_lost_is_deleted_and_an_own_one_is_not() -> None:
    fleet = RentingRig.renting()
    state = fleet.rig.core.state
    rentals.rent(state, fleet.rig.now, "r1", "a test")
    fleet.wait(1_000)
    fleet.answer("r1")
    for session in (fleet.hello("r1", "2xH100"), state.nodes["n1"].session):
        assert session is not None
        fleet.hang_up(session)
    fleet.wait(ACTS.boot_deadline_ms - 10_000)
    assert [verb for _, verb in fleet.verbs()] == ["create"]
    fleet.wait(80_000)
    assert [verb for _, verb in fleet.verbs()][:2] == ["create", "delete"]
    assert fleet.power("n1") is Power.ON


def _judge(fleet: RentingRig, name: str, verdict: GpuVerdict) -> None:
    live = fleet.rig.core.state.nodes[name]
    assert live.session is not None
    said = tuple(GpuHealth(gpu.uuid, verdict, "as it is") for gpu in live.node.gpus)
    number = live.node.acknowledged + 1
    event = AgentEvent(number, fleet.rig.now.unix_ms, "", GpuHealthChanged(said))
    fleet.handle(FromAgent(live.session, event))


def ill_and_refused() -> RentingRig:
    """`r1` wants a reboot, has been ordered off, and its provider has said no."""
    fleet = rented()
    end_all(fleet)
    _judge(fleet, "r1", GpuVerdict.NEEDS_REBOOT)
    fleet.wait(1_000)
    assert fleet.node("r1").intent is NodeIntent.DRAINED
    rentals.look(fleet.rig.core.state, fleet.rig.now)
    fleet.wait(1_000)
    assert fleet.verbs() == [("r1", "create"), ("r1", "delete")]
    fleet.answer("r1", done=False, reason="the provider says no")
    return fleet


def test_an_ill_one_that_its_provider_keeps_is_not_opened_and_deleted_again_later() -> None:
    fleet = ill_and_refused()
    ScaledRig.live(fleet, 60)
    assert fleet.power("r1") is Power.ON
    assert fleet.node("r1").intent is NodeIntent.DRAINED
    fleet.queue(1, 2, 3)
    ScaledRig.live(fleet, REFUSED_MS // 1000 - 180)
    assert not fleet.rig.core.state.nodes["r1"].attempts
    assert fleet.verbs().count(("r1", "delete")) == 1, "not each minute"
    end_all(fleet)
    ScaledRig.live(fleet, 240)
    assert fleet.verbs().count(("r1", "delete")) == 2


def test_an_ill_one_that_is_well_again_opens_once_it_is_known_to_stay() -> None:
    fleet = ill_and_refused()
    _judge(fleet, "r1", GpuVerdict.HEALTHY)
    assert fleet.power("r1") is Power.STOPPING
    assert fleet.node("r1").intent is NodeIntent.DRAINED, "it may still go"
    ScaledRig.live(fleet, 60)
    assert fleet.power("r1") is Power.ON
    assert fleet.node("r1").intent is NodeIntent.OPEN


def test_an_ill_one_that_is_heard_when_nobody_expects_it_is_still_ill() -> None:
    fleet = ill_and_refused()
    for _ in range(80):
        if fleet.power("r1") is Power.STOPPING:
            fleet.answer("r1", done=False, reason="the provider says no")
        fleet.wait(5_000)
    assert fleet.power("r1") is Power.FAILED
    fleet.hello("r1", "2xH100")
    assert fleet.power("r1") is Power.ON
    assert fleet.node("r1").intent is NodeIntent.DRAINED


def test_an_own_node_with_a_rented_ones_name_is_never_touched() -> None:
    fleet = RentingRig.renting()
    fleet.hello("r1", "2xH100")
    effects = fleet.live(1_200)
    said = [e for e in effects if isinstance(e, Log) and e.event == "node.unmanaged"]
    assert [dict(e.fields)["node"] for e in said] == ["r1"], "once"
    assert fleet.power("r1") is Power.ON
    assert not fleet.verbs()
    assert not rentals.rent(fleet.rig.core.state, fleet.rig.now, "r1", "a test")


def test_a_rented_one_that_left_the_configuration_is_said_and_left_alone() -> None:
    fleet = rented()
    fleet.rig.options = replace(
        fleet.rig.options, scaling=replace(fleet.rig.options.scaling, names={})
    )
    fleet.rig.restart()
    fleet.hello("n1")
    fleet.hello("r1", "2xH100")
    before = len(fleet.orders)
    effects = fleet.live(1_200)
    said = [e for e in effects if isinstance(e, Log) and e.event == "node.unmanaged"]
    assert ["nobody can give it back" in str(dict(e.fields)["reason"]) for e in said] == [True]
    assert not [order for order in fleet.orders[before:] if order.nodes == ("r1",)]


def test_a_name_that_a_person_closes_is_not_rented_again() -> None:
    fleet = RentingRig.renting()
    state = fleet.rig.core.state
    rentals.rent(state, fleet.rig.now, "r1", "a test")
    fleet.wait(1_000)
    fleet.answer("r1", done=False, reason="sold out")
    fleet.wait(1_000)
    fleet.answer("r1")
    fleet.ask(CordonNode("r1"))
    fleet.wait(rentals.AGAIN_MS + 1_000)
    assert rentals.free_names(state, fleet.rig.now, "H100") == ["r2", "r3"]


def test_a_machine_that_comes_too_late_is_rented_all_the_same() -> None:
    fleet = RentingRig.renting()
    state = fleet.rig.core.state
    rentals.rent(state, fleet.rig.now, "r1", "a test")
    fleet.wait(1_000)
    fleet.answer("r1", done=False, reason="sold out")
    fleet.wait(1_000)
    fleet.answer("r1")
    assert fleet.power("r1") is Power.OFF
    fleet.hello("r1", "2xH100")
    assert fleet.power("r1") is Power.ON
    assert fleet.node("r1").intent is NodeIntent.OPEN
    assert fleet.node("r1").power.rents[-1].end_unix_ms is None
    fleet.live(1_200)
    assert fleet.verbs()[-1] == ("r1", "delete")
