"""The plan in the live coordinator: what it sees of nodes, and what follows in each mode.

Problem: `test_scaling.py` knows that a plan is right about boxes. Here it is nodes with jobs, and
people, and drivers: whatever is translated wrongly switches off what is needed.
"""

from dataclasses import dataclass, field, replace

import pytest

from coordinator.core import fleet_scaling
from coordinator.core.capacity_model import LEVELS, Power
from coordinator.core.capacity_orders import Verb
from coordinator.core.demand_messages import ForecastMade, TypeForecast
from coordinator.core.guard_rails import Bounds
from coordinator.core.messages import (
    AgentEvent,
    AttemptExited,
    AttemptStarted,
    CheckpointProposed,
    CordonNode,
    Effect,
    ExplainJob,
    Explanation,
    FromAgent,
    Heartbeat,
    HoldJob,
    Refusal,
    ReleaseJob,
    Reply,
    Request,
    RequestBody,
    Submit,
)
from coordinator.core.model import GpuReading, JobClass, JobSpec
from coordinator.core.phases import NodeIntent
from coordinator.core.scale_requests import (
    ApproveScaling,
    GetPlan,
    GetScaleRecord,
    ListScaleRecords,
    PlanPage,
    ScalePage,
)
from coordinator.core.scaler import ScalingOptions
from coordinator.core.scaling import Mode, Rules
from coordinator.core.state import Options
from tests.core import coordinator_harness
from tests.core.switched_fleet import ACTS, SwitchedRig

NAMES = ("n1", "n2", "n3", "n4")
RULES = Rules(idle_ms_min=60_000, cycle_usd_per_gpu=0.0, bounds=Bounds(spares_min=0, up_ms_min=0))


@dataclass
class ScaledRig(SwitchedRig):
    """Everybody who is not dark is heard each second, a forecast comes each minute, and the driver
    switches off whom it is told to."""

    beats: int = 0
    soon: float = 0.0
    later: float = 0.0
    deaf: str = ""  # the node of whom the driver knows nothing
    used: dict[str, float] = field(default_factory=dict)  # by nobody of ours; the part of the time

    @classmethod
    def of(cls, mode: Mode | None, **power: object) -> "ScaledRig":
        scaling = ScalingOptions(RULES, mode)
        options = Options(power=replace(ACTS, **power), scaling=scaling)  # type: ignore[arg-type]
        made = cls.new(options)
        assert isinstance(made, ScaledRig)
        for name in NAMES:
            made.hello(name)
        return made

    def live(self, seconds: int) -> list[Effect]:
        effects: list[Effect] = []
        for _ in range(seconds):
            self.beats += 1
            for live in list(self.rig.core.state.nodes.values()):
                if live.session is not None:
                    read = tuple(
                        GpuReading(uuid, used_ratio=self.used[live.node.id])
                        for uuid in live.gpus
                        if live.node.id in self.used
                    )
                    self.handle(FromAgent(live.session, Heartbeat(self.beats, gpus=read)))
            effects += self.wait(1_000)
            for name in NAMES:
                if self.power(name) is Power.STOPPING:
                    self.obey(name)
            if self.rig.now_ms % 60_000 == 0:
                self.forecast()
        return effects

    def forecast(self) -> None:
        soon, later = ((value,) * len(LEVELS) for value in (self.soon, self.later))
        minute = self.rig.now.unix_ms // 60_000
        self.handle(ForecastMade(minute, (TypeForecast("H100", soon, later),)))

    def obey(self, name: str) -> None:
        """The driver switches the node off."""
        session = self.rig.core.state.nodes[name].session
        if name == self.deaf:
            self.answer(name, done=False, reason="no group has the node")
        elif session is not None:
            self.answer(name)
            self.hang_up(session)

    def ask(self, body: RequestBody) -> object:
        effects = self.handle(Request(1, body))
        return next(effect.answer for effect in effects if isinstance(effect, Reply))

    def page(self) -> PlanPage:
        page = self.ask(GetPlan())
        assert isinstance(page, PlanPage)
        return page

    def submit(self, **spec: object) -> int:
        self.ask(Submit(JobSpec(command=("train",), gpus=1, **spec)))  # type: ignore[arg-type]
        return self.rig.core.state.last_job_id

    def powers(self) -> dict[str, str]:
        return {name: self.power(name).value for name in NAMES}


def test_a_plan_with_shorter_minutes_is_the_same_plan_sooner() -> None:
    """An hour of it is a minute here: idle for that long, and one of four in a sixth of it."""
    rules = Rules(idle_ms_min=3_600_000, bounds=Bounds(spares_min=0, up_ms_min=7_200_000))
    fleet = ScaledRig.of(Mode.ACT)
    fleet.rig.options = replace(
        fleet.rig.options, demand_minute_ms=1_000, scaling=ScalingOptions(rules, Mode.ACT, 5_000)
    )
    fleet.rig.restart()
    for name in NAMES:
        fleet.hello(name)
    fleet.forecast()
    fleet.live(64)
    assert not fleet.orders
    fleet.live(9)
    assert [order.verb for order in fleet.orders] == [Verb.SUSPEND]
    fleet.live(12)
    assert [order.verb for order in fleet.orders] == [Verb.SUSPEND] * 2
    (record, *_) = fleet.rig.disk.scaled.values()
    assert record.minutes == 120


def test_idle_nodes_go_off_one_by_one_and_come_back_ahead_of_need() -> None:
    fleet = ScaledRig.of(Mode.ACT)
    fleet.submit()
    fleet.forecast()
    fleet.soon = fleet.later = 2.0
    fleet.live(300)
    assert [order.verb for order in fleet.orders] == [Verb.SUSPEND], "one of four in ten minutes"
    gone = fleet.orders[0].nodes[0]
    assert fleet.power(gone) is Power.OFF
    leaving = [name for name, power in fleet.powers().items() if power == "leaving"]
    assert len(leaving) == 1, "two are kept for what may come"
    assert fleet.node(leaving[0]).intent is NodeIntent.CORDONED
    fleet.soon = fleet.later = 4.0
    fleet.live(120)
    assert fleet.orders[-1].verb is Verb.RESUME
    assert fleet.orders[-1].nodes == (gone,)
    assert fleet.power(leaving[0]) is Power.ON
    fleet.hello(gone)
    fleet.live(61)
    assert set(fleet.powers().values()) == {"on"}
    records = list(fleet.rig.disk.scaled.values())
    assert records[0].deeds[0].verb == "suspend" or records[0].rail
    assert any(deed.nodes == (gone,) for record in records for deed in record.deeds)


def test_a_node_that_somebody_uses_past_us_is_not_idle() -> None:
    """By hand, or by another scheduler: his work is lost with the power as ours would be."""
    fleet = ScaledRig.of(Mode.ACT)
    fleet.used = {"n1": 0.9, "n2": 0.02}  # a screen takes a percent or two
    fleet.live(900)
    powers = fleet.powers()
    assert powers["n1"] in ("on", "leaving")
    assert powers["n2"] == "off"
    assert "off" in (powers["n3"], powers["n4"])
    fleet.used = {}
    fleet.live(1_500)
    assert powers["n1"] != fleet.powers()["n1"] == "off"


def test_who_comes_while_nodes_are_closed_for_going_waits_a_moment() -> None:
    fleet = ScaledRig.of(Mode.ACT)
    fleet.forecast()
    fleet.live(70)
    assert list(fleet.powers().values()).count("leaving") >= 3
    jobs = [fleet.submit() for _ in range(3)]
    fleet.live(3)
    assert not fleet.rig.core.state.queued, "none of them waits for the next minute"
    assert len({fleet.rig.core.state.attempts[f"{job}.1"].node for job in jobs}) == 3


def test_a_guaranteed_job_keeps_its_node_whatever_is_forecast() -> None:
    fleet = ScaledRig.of(Mode.ACT)
    job = fleet.submit(job_class=JobClass.GUARANTEED)
    name = fleet.rig.core.state.attempts[f"{job}.1"].node
    fleet.forecast()
    for _ in range(20):
        fleet.live(60)
    assert fleet.power(name) is Power.ON
    assert name not in [node for order in fleet.orders for node in order.nodes]
    assert any(power is Power.OFF for power in map(fleet.power, NAMES))


def test_what_a_person_has_closed_is_no_capacity_and_is_not_touched() -> None:
    fleet = ScaledRig.of(Mode.ACT)
    fleet.ask(CordonNode("n4"))
    fleet.forecast()
    fleet.live(900)
    assert fleet.power("n4") is Power.ON
    assert fleet.node("n4").intent is NodeIntent.CORDONED
    (plan,) = fleet.page().types
    assert plan.closed_gpus == 1


@pytest.mark.parametrize("mode", [Mode.OBSERVE, Mode.ADVISE])
def test_nothing_is_switched_but_in_act_mode(mode: Mode) -> None:
    fleet = ScaledRig.of(mode)
    fleet.forecast()
    fleet.live(900)
    assert not fleet.orders
    assert set(fleet.powers().values()) == {"on"}
    assert all(fleet.node(name).intent is NodeIntent.OPEN for name in NAMES)
    assert fleet.rig.disk.scaled, "what it would have done is written down"
    assert bool(fleet.page().proposed) is (mode is Mode.ADVISE)


def test_what_is_proposed_is_done_when_a_person_agrees_and_once() -> None:
    fleet = ScaledRig.of(Mode.ADVISE)
    fleet.forecast()
    fleet.live(300)
    (record,) = fleet.page().proposed
    answer = fleet.ask(ApproveScaling(record.number))
    assert isinstance(answer, ScalePage)
    (deed,) = answer.records[0].deeds
    assert deed.state == "approved"
    fleet.live(1)
    assert [order.nodes for order in fleet.orders] == [deed.nodes]
    again = fleet.ask(ApproveScaling(record.number))
    assert isinstance(again, Refusal)
    assert "proposes nothing that is still to be done" in again.sentence
    assert isinstance(fleet.ask(GetScaleRecord(99)), Refusal)


def test_consent_to_what_has_become_wrong_meanwhile_does_nothing() -> None:
    fleet = ScaledRig.of(Mode.ADVISE)
    fleet.forecast()
    fleet.live(300)
    (record,) = fleet.page().proposed
    for _ in NAMES:
        fleet.submit(job_class=JobClass.GUARANTEED)
    answer = fleet.ask(ApproveScaling(record.number))
    assert isinstance(answer, Refusal)
    assert "the fleet has changed since" in answer.sentence
    fleet.live(2)
    assert not fleet.orders
    assert set(fleet.powers().values()) == {"on"}


@pytest.mark.long
@pytest.mark.parametrize("hours", [-3, 3])
def test_a_clock_that_jumps_revokes_no_consent(hours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = ScaledRig.of(Mode.ADVISE)
    fleet.soon = fleet.later = float(len(NAMES))
    fleet.forecast()
    fleet.submit()
    (attempt,) = fleet.rig.core.state.attempts.values()
    fleet.leave(attempt.node, "a person has agreed")
    jumped = coordinator_harness.UNIX_MS_AT_START + hours * 3_600_000
    monkeypatch.setattr(coordinator_harness, "UNIX_MS_AT_START", jumped)
    fleet.live(fleet_scaling.LEAVE_MS_MAX // 1_000 - 120)
    assert fleet.power(attempt.node) is Power.LEAVING
    fleet.live(240)
    assert fleet.power(attempt.node) is Power.ON, "it cannot get away"


def test_what_no_plan_wants_any_more_is_not_proposed_any_more() -> None:
    fleet = ScaledRig.of(Mode.ADVISE)
    fleet.forecast()
    fleet.live(300)
    (record,) = fleet.page().proposed
    fleet.soon = fleet.later = float(len(NAMES))
    fleet.live(180)
    assert not fleet.page().proposed
    assert isinstance(fleet.ask(ApproveScaling(record.number)), Refusal)
    fleet.live(2)
    assert not fleet.orders


def test_who_has_agreed_once_is_asked_again() -> None:
    fleet = ScaledRig.of(Mode.ADVISE)
    fleet.forecast()
    fleet.live(300)
    for _ in range(3):
        (record,) = fleet.page().proposed
        assert isinstance(fleet.ask(ApproveScaling(record.number)), ScalePage)
        fleet.live(180)
        assert not fleet.page().proposed, "what was agreed to counts: one of four in ten minutes"
        fleet.live(540)
    assert len(fleet.orders) == 3


def test_a_person_who_has_closed_a_node_meanwhile_is_not_overruled_by_his_consent() -> None:
    fleet = ScaledRig.of(Mode.ADVISE)
    fleet.forecast()
    fleet.live(60)
    fleet.off("n4")
    for name in NAMES[:3]:
        fleet.hello(name)
    fleet.soon = fleet.later = float(len(NAMES))
    fleet.live(180)
    (record,) = fleet.page().proposed
    assert record.deeds[0].nodes == ("n4",)
    fleet.ask(CordonNode("n4"))
    answer = fleet.ask(ApproveScaling(record.number))
    assert isinstance(answer, Refusal)
    assert fleet.power("n4") is Power.OFF


def test_a_node_that_cannot_be_switched_off_takes_no_other_ones_place() -> None:
    fleet = ScaledRig.of(Mode.ACT)
    fleet.deaf = "n1"
    fleet.forecast()
    fleet.live(2_600)
    assert list(fleet.powers().values()) == ["on", "off", "off", "off"]
    assert [order.nodes for order in fleet.orders].count(("n1",)) == 1
    fleet.live(1_500)
    assert [order.nodes for order in fleet.orders].count(("n1",)) == 2, "after an hour once more"


def test_without_a_driver_the_mode_is_never_act() -> None:
    fleet = ScaledRig.of(Mode.ACT, acts=False)
    fleet.forecast()
    fleet.live(300)
    assert fleet.page().mode == "advise"
    assert set(fleet.powers().values()) == {"on"}
    (record,) = fleet.page().proposed
    assert isinstance(fleet.ask(ApproveScaling(record.number)), Refusal)


def test_two_weeks_are_observed_before_anything_is_said() -> None:
    fleet = ScaledRig.of(None)
    fleet.live(120)
    page = fleet.page()
    assert page.mode == "observe"
    assert "there are 0.0 days of demand, and 14 are wanted first" in page.why


def test_a_forecast_that_is_too_old_leaves_everything_as_it_is() -> None:
    fleet = ScaledRig.of(Mode.ACT)
    fleet.wait(0)
    for _ in range(900):
        fleet.beats += 1
        for live in fleet.rig.core.state.nodes.values():
            assert live.session is not None
            fleet.handle(FromAgent(live.session, Heartbeat(fleet.beats)))
        fleet.wait(1_000)
    assert not fleet.orders
    assert all(fleet.node(name).intent is NodeIntent.OPEN for name in NAMES)


def test_a_dead_node_is_no_capacity() -> None:
    fleet = ScaledRig.of(Mode.ACT)
    state = fleet.rig.core.state
    fleet.wait(20_000)
    boxes = [fleet_scaling.box_of(state, fleet.rig.now, live) for live in state.nodes.values()]
    assert all(box.closed for box in boxes)


def test_a_job_whose_checkpoint_lies_on_nodes_that_are_off_gets_one_back() -> None:
    fleet = ScaledRig.of(Mode.OBSERVE)
    job = fleet.submit()
    attempt = fleet.rig.core.state.attempts[f"{job}.1"]
    live = fleet.rig.core.state.nodes[attempt.node]
    assert live.session is not None
    other = attempt.replica_node
    proposal = CheckpointProposed("aa", "", 10, 100, (attempt.node, other))
    fleet.handle(FromAgent(live.session, AgentEvent(1, 0, attempt.id, AttemptStarted(7))))
    fleet.handle(FromAgent(live.session, AgentEvent(2, 0, attempt.id, proposal)))
    fleet.leave(other)
    fleet.live(20)
    assert fleet.power(other) is Power.OFF
    fleet.hang_up(live.session)  # it dies, with the other copy
    fleet.live(90)
    assert fleet.power(other) is Power.STARTING
    assert "lies on no node that is on" in fleet.node(other).power.reason
    told = fleet.ask(ExplainJob(job))
    assert isinstance(told, Explanation)
    assert f"{other} is starting" in told.sentence


def test_a_trial_with_a_place_gets_the_node_of_its_checkpoint_back() -> None:
    """It was held, and is not among those who wait for room when its turn has come."""
    fleet = ScaledRig.of(Mode.OBSERVE)
    fleet.submit(array="0-1%1")
    nodes, attempts = fleet.rig.core.state.nodes, fleet.rig.core.state.attempts
    home, other = attempts["1.1"].node, attempts["1.1"].replica_node
    session = nodes[home].session
    assert session is not None
    proposal = CheckpointProposed("aa", "", 10, 100, (home, other))
    fleet.handle(FromAgent(session, AgentEvent(1, 0, "1.1", AttemptStarted(7))))
    fleet.handle(FromAgent(session, AgentEvent(2, 0, "1.1", proposal)))
    fleet.leave(other)
    fleet.ask(CordonNode(home))  # so that the second trial goes elsewhere
    fleet.ask(HoldJob(1))
    fleet.handle(FromAgent(session, AgentEvent(3, 0, "1.1", AttemptExited(75))))
    fleet.live(20)
    fleet.hang_up(session)  # it dies, with the other copy
    fleet.ask(ReleaseJob(1))
    fleet.live(60)
    assert fleet.power(other) is Power.OFF, "the place is the second trial's"
    session = nodes[attempts["2.1"].node].session
    assert session is not None
    fleet.handle(FromAgent(session, AgentEvent(1, 0, "2.1", AttemptStarted(7))))
    fleet.handle(FromAgent(session, AgentEvent(2, 0, "2.1", AttemptExited(0))))
    fleet.live(60)
    assert fleet.power(other) is Power.STARTING
    assert "last checkpoint of job 1 lies on no node that is on" in fleet.node(other).power.reason


@pytest.mark.parametrize(
    ("gpus", "phase"), [(4, Power.STARTING), (2, Power.STARTING), (8, Power.OFF)]
)
def test_who_fits_no_node_that_is_on_gets_one_back(gpus: int, phase: Power) -> None:
    """GPUs are counted by type: those of small nodes are none to who wants them on one."""
    fleet = ScaledRig.of(Mode.OBSERVE)
    fleet.hello("n4", "4xH100")
    fleet.off("n4")
    fleet.live(61)
    assert fleet.power("n4") is Power.OFF
    fleet.ask(Submit(JobSpec(command=("train",), gpus=gpus, job_class=JobClass.GUARANTEED)))
    fleet.live(61)
    assert fleet.power("n4") is phase, "eight of them are nowhere"


def test_records_outlive_the_coordinator() -> None:
    fleet = ScaledRig.of(Mode.ADVISE)
    fleet.forecast()
    fleet.live(300)
    before = fleet.ask(ListScaleRecords())
    fleet.rig.restart()
    assert fleet.ask(ListScaleRecords()) == before
    assert isinstance(before, ScalePage)
    fleet.live(1)
    assert max(fleet.rig.disk.scaled) >= len(before.records)


def test_a_decision_is_judged_when_its_time_is_over() -> None:
    fleet = ScaledRig.of(Mode.ADVISE)
    fleet.rig.options = replace(
        fleet.rig.options, scaling=ScalingOptions(replace(RULES, later_ms=120_000), Mode.ADVISE)
    )
    fleet.rig.restart()
    for name in NAMES:
        fleet.hello(name)
    fleet.submit()
    fleet.forecast()
    fleet.live(600)
    judged = [record for record in fleet.rig.disk.scaled.values() if record.hindsight]
    assert judged
    assert judged[0].hindsight is not None
    assert judged[0].hindsight.mean_gpus == 1.0
