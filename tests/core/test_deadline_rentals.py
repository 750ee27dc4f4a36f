"""Nodes that are rented so that a deadline is kept, in the live coordinator, over virtual hours.

Problem: a plan that says the right number rents nothing by itself: the node has to be ordered soon
enough, come, and be taken by the job that it was ordered for. And what would have been free in time
must cost nothing.
"""

from dataclasses import dataclass, field, replace

import pytest

from coordinator.core import messages as m
from coordinator.core import power
from coordinator.core.bursts import Burst
from coordinator.core.capacity_messages import Actuated
from coordinator.core.capacity_model import LEVELS, Power, Source
from coordinator.core.capacity_orders import CapacityOutcome
from coordinator.core.demand_messages import ForecastMade, TypeForecast
from coordinator.core.explain import explain
from coordinator.core.guard_rails import Bounds
from coordinator.core.messages import Reply, RequestBody
from coordinator.core.model import JobClass
from coordinator.core.node_power import is_gone
from coordinator.core.phases import JobPhase
from coordinator.core.scale_requests import ApproveScaling, ScalePage
from coordinator.core.scaler import ScalingOptions
from coordinator.core.scaling import Mode, Rules
from coordinator.core.state import Options
from tests.core.coordinator_harness import gpus_of
from tests.core.switched_fleet import ACTS
from tests.core.training_fleet import HOST, Fleet, training

MEASURED_S, STEPS, STEP_S = 60, 2_000, 10
H100 = "H100"
# Nobody is rented for by what his waiting costs.
RULES = Rules(
    wait_usd_per_gpu_h=0.001,
    idle_usd_per_gpu_h=0.00005,
    bounds=Bounds(spares_min=9),
    bursts={H100: Burst(2.0, gpus_per_node=1)},
    budget_usd_per_day=50.0,
    spends_alone=True,
)


@dataclass
class Told:
    """What a test asks for beside the rule."""

    mode: Mode = Mode.ACT
    names: tuple[str, ...] = ("r1", "r2")
    rules: dict[str, object] = field(default_factory=dict)


class RentingFleet(Fleet):
    """Own nodes, and rented ones that come as soon as they are ordered, unless they are sold out.
    The fleet has seen the training, and its first GPU is held by a job of unknown length."""

    def __init__(self, *gpus: str, told: Told | None = None) -> None:
        told = told or Told()
        rules = replace(RULES, **told.rules)  # type: ignore[arg-type]
        scaling = ScalingOptions(rules, told.mode, names={H100: dict.fromkeys(told.names)})
        super().__init__(*gpus, options=Options(power=ACTS, scaling=scaling))
        self.tick_ms, self.sessions, self.sold_out = 2_000, len(gpus), False
        first = self.submit(training(MEASURED_S))
        self.live(MEASURED_S)
        self.end(first)

    def live(self, seconds: int) -> None:
        for _ in range(seconds // STEP_S):
            self.forecast()
            self.run(STEP_S)
            for live in list(self.state.nodes.values()):
                given = self.state.switching.given.get(live.node.id)
                if given is not None and given.done is None:
                    self._obey(given.key, live.node.id, live.node.power.phase)

    def forecast(self) -> None:
        nothing = (0.0,) * len(LEVELS)
        minute = self.rig.now.unix_ms // 60_000
        self.rig.handle(ForecastMade(minute, (TypeForecast(H100, nothing, nothing),)))

    def _obey(self, key: str, name: str, phase: Power) -> None:
        """What is ordered comes, or is sold out; what is deleted, or switched off, is gone."""
        session = self.state.nodes[name].session
        comes = phase is Power.STARTING and not self.sold_out
        done = comes or phase is Power.STOPPING
        reason = "" if done else "sold out"
        self.rig.handle(Actuated(CapacityOutcome(key, name, done, reason)))
        if phase is Power.STOPPING and session is not None:
            self.rig.handle(m.FromAgent(session, m.SessionClosed()))
        if comes:
            self.sessions += 1
            hello = m.Hello(name, f"{name}-1", f"{name}:1", HOST, gpus_of(name, "1xH100"), ())
            self.rig.handle(m.FromAgent(self.sessions, hello))

    def rented(self) -> list[str]:
        """All that were ever ordered."""
        return [
            live.node.id
            for live in self.state.nodes.values()
            if live.node.power.source is Source.BURST and live.node.power.rents
        ]

    def due(self, seconds: int, **asks: object) -> int:
        """One that has to have made its steps within so many seconds."""
        deadline_unix_ms = self.rig.now.unix_ms + seconds * 1_000
        return self.submit(training(STEPS, deadline_unix_ms=deadline_unix_ms, **asks), STEPS)

    def node_of(self, job_id: int) -> str:
        attempt = self.state.current(self.job(job_id))
        return "" if attempt is None else attempt.node

    def steps_of(self, job_id: int) -> float:
        attempt = self.state.current(self.job(job_id))
        return 0.0 if attempt is None else self.steps.get(attempt.id, 0.0)

    def said(self) -> list[str]:
        return [record.sentence for record in self.rig.disk.scaled.values()]

    def ask(self, body: RequestBody) -> object:
        effects = self.rig.handle(m.Request(1, body))
        return next(effect.answer for effect in effects if isinstance(effect, Reply))


def full(told: Told | None = None) -> RentingFleet:
    """One own GPU, which somebody has for nobody knows how long."""
    fleet = RentingFleet("1xH100", told=told)
    fleet.submit(name="filler")
    fleet.live(20)
    return fleet


@pytest.mark.long
def test_a_node_is_rented_for_a_deadline_and_it_is_kept() -> None:
    fleet = full()
    job = fleet.due(5_000)
    fleet.live(600)
    assert fleet.rented() == [], "there is time: somebody may end by then"
    fleet.live(2_000)
    assert fleet.rented() == ["r1"]
    assert fleet.node_of(job) == "r1"
    (sentence,) = [one for one in fleet.said() if "rented" in one]
    assert sentence.startswith("1 GPU of H100 is rented by the hour: ")
    assert f"job {job} would miss its deadline by waiting, which 1 GPU more would keep" in sentence
    fleet.live(2_200)
    assert fleet.steps_of(job) >= STEPS, "before its deadline"


def test_nothing_is_rented_where_an_own_gpu_is_free_in_time() -> None:
    fleet = RentingFleet("1xH100")
    before = fleet.submit(training(1_500), 1_500)
    job = fleet.due(5_000)
    fleet.live(1_500)
    fleet.end(before)
    fleet.live(3_000)
    assert fleet.rented() == []
    assert fleet.node_of(job) == "n1"
    assert fleet.steps_of(job) >= STEPS


def test_nothing_is_rented_where_an_own_node_can_boot_in_time() -> None:
    fleet = RentingFleet("1xH100", "1xH100")
    power.go(fleet.state, fleet.rig.now, fleet.state.nodes["n2"], "a test")
    fleet.submit(name="filler")
    fleet.live(60)
    assert fleet.state.nodes["n2"].node.power.phase is Power.OFF
    job = fleet.due(3_500)
    fleet.live(300)
    assert fleet.rented() == []
    assert fleet.node_of(job) == "n2"


def test_what_is_rented_is_given_back_when_the_job_is_over() -> None:
    fleet = full()
    job = fleet.due(3_500)
    fleet.live(300)
    fleet.end(job)
    fleet.live(900)
    assert fleet.rented() == ["r1"]
    assert is_gone(fleet.state.nodes["r1"].node.power)


def test_nothing_is_rented_without_a_deadline_or_for_one_that_nobody_knows() -> None:
    fleet = full()
    fleet.submit(training(STEPS), STEPS)
    fleet.submit(gpus=1, deadline_unix_ms=fleet.rig.now.unix_ms + 2_500_000)
    fleet.live(2_000)
    assert fleet.rented() == []


def test_a_deadline_that_a_rented_node_would_miss_as_well_is_no_reason() -> None:
    fleet = full()
    job = fleet.due(STEPS + 60)
    fleet.live(600)
    assert fleet.rented() == []
    assert fleet.job(job).phase is JobPhase.QUEUED


def test_who_comes_before_it_in_the_queue_does_not_get_its_node() -> None:
    fleet = full()
    others = [fleet.submit() for _ in range(2)]
    job = fleet.due(3_500)
    fleet.live(600)
    assert fleet.rented() == ["r1"]
    assert fleet.node_of(job) == "r1"
    assert [fleet.job(one).phase for one in others] == [JobPhase.QUEUED] * 2


def test_it_is_rented_for_once_though_a_higher_class_takes_its_node() -> None:
    fleet = full()
    job = fleet.due(4_400)
    fleet.live(120)
    assert fleet.rented() == []
    first = fleet.submit(job_class=JobClass.GUARANTEED)
    second = fleet.submit(job_class=JobClass.GUARANTEED)
    fleet.live(1_800)
    assert fleet.rented() == ["r1"]
    assert fleet.job(job).phase is JobPhase.QUEUED
    assert "r1" in (fleet.node_of(first), fleet.node_of(second))


@pytest.mark.long
def test_one_that_did_not_come_is_tried_again_while_there_is_time() -> None:
    fleet = full()
    fleet.sold_out = True
    job = fleet.due(4_200)
    fleet.live(900)
    assert fleet.rented(), "it was tried"
    assert all(is_gone(fleet.state.nodes[name].node.power) for name in fleet.rented())
    fleet.sold_out = False
    fleet.live(1_000)
    assert fleet.node_of(job) in ("r1", "r2")
    fleet.live(2_200)
    assert fleet.steps_of(job) >= STEPS


@pytest.mark.parametrize("mode", [Mode.ACT, Mode.ADVISE])
def test_a_person_agrees_to_it_and_is_told_for_whom(mode: Mode) -> None:
    fleet = full(Told(mode=mode, rules={"spends_alone": False}))
    job = fleet.due(3_900)
    fleet.live(600)
    assert fleet.rented() == []
    (number,) = fleet.state.scaler.proposed.values()
    assert f"job {job} would miss its deadline" in fleet.rig.disk.scaled[number].sentence
    assert isinstance(fleet.ask(ApproveScaling(number)), ScalePage)
    fleet.live(60)
    assert fleet.node_of(job) == "r1"


def test_nothing_is_rented_for_it_in_observe_mode() -> None:
    fleet = full(Told(mode=Mode.OBSERVE))
    job = fleet.due(3_500)
    fleet.live(300)
    assert fleet.rented() == []
    assert any(f"job {job} would miss its deadline" in one for one in fleet.said())


@pytest.mark.parametrize(
    ("told", "rail"),
    [
        (Told(rules={"budget_usd_per_day": 1.9}), "budget"),
        (Told(rules={"bounds": Bounds(up_min=0, up_ratio=0.0)}), "up_rate"),
    ],
)
def test_no_deadline_breaks_a_bound(told: Told, rail: str) -> None:
    fleet = full(told)
    job = fleet.due(3_500)
    fleet.live(300)
    assert fleet.rented() == []
    held = [record for record in fleet.rig.disk.scaled.values() if record.rail == rail]
    assert f"job {job} would miss its deadline" in held[-1].sentence


def test_no_more_is_rented_than_there_are_names() -> None:
    fleet = full(Told(names=("r1",)))
    jobs = [fleet.due(3_500) for _ in range(3)]
    fleet.live(300)
    assert fleet.rented() == ["r1"]
    assert "r1" in [fleet.node_of(job) for job in jobs]


def test_a_flexible_job_with_a_deadline_is_rented_for() -> None:
    fleet = full()
    job = fleet.due(3_500, flexible_ms=36_000_000)
    fleet.live(300)
    assert fleet.node_of(job) == "r1"


def test_it_is_told_that_a_node_was_rented_for_it() -> None:
    fleet = full()
    job = fleet.due(3_900)
    while not fleet.rented():
        fleet.forecast()
        fleet.run(2)
    sentence = explain(fleet.state, fleet.rig.now, fleet.job(job)).sentence
    assert "; a node was rented by the hour for its deadline at " in sentence
