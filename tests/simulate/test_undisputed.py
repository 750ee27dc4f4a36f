"""What nobody disputes is found without a decision over all jobs, and is what that decides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.allocation import Aims, Allocation, Contender, Option, Solve, allocate
from coordinator.sim.engine import simulate
from coordinator.sim.model import Chance, Fleet, Outcome, Placement, SimJob, View
from coordinator.sim.ours import Ours
from coordinator.sim.undisputed import undisputed
from coordinator.solver import solve

FLEET = Fleet({"A100": 4, "K80": 6})
HOUR_MS = 3_600_000
NOW_MS = 50 * HOUR_MS


@dataclass
class Whole:
    """Ours, deciding over all jobs each time."""

    ours: Ours
    name: str = "whole"
    tick_ms: int = 600_000

    def decide(self, view: View) -> Mapping[int, Placement]:
        contenders = [self.ours.contender(seen) for seen in view.jobs]
        grants = self.ours.allocation(view, contenders, self.ours.tenants or {}).grants
        return {n: Placement(one.option.gpu_type, one.option.gpus) for n, one in grants.items()}


@dataclass(slots=True)
class Counted(Ours):
    """How often it was asked, and how often that took a decision over all jobs."""

    asked: int = 0
    whole: list[int] = field(default_factory=list)

    def decide(self, view: View) -> Mapping[int, Placement]:
        self.asked += 1
        return Ours.decide(self, view)

    def allocation(
        self, view: View, contenders: Sequence[Contender], tenants: Mapping[str, float]
    ) -> Allocation:
        self.whole.append(view.now_ms)
        return Ours.allocation(self, view, contenders, tenants)


def jobs_of(gaps_s: list[int], draws: list[int]) -> list[SimJob]:
    """Some fast on one type, some on the other, some equally on both, with gangs and classes."""
    ratios = [1.0, 1.002, 1.1, 1.3, 2.0, 4.0, 0.5]
    found, at_s = [], 0
    for number, (gap_s, draw) in enumerate(zip(gaps_s, draws, strict=False), start=1):
        at_s += gap_s
        ratio = ratios[draw % len(ratios)]
        found.append(
            SimJob(
                job_id=number, gpus=1 + draw % 3, steps=600.0 * (1 + draw % 17), rank=draw % 2,
                rates={"A100": ratio, "K80": 1.0}, arrival_ms=1000 * at_s, restart_s=60.0,
                project="light" if draw % 7 == 0 else "",
                deadline_ms=1000 * at_s + 3 * HOUR_MS if draw % 5 == 0 else None,
            )
        )  # fmt: skip
    return found


def test_a_fleet_with_room_is_decided_once_for_each_thing_that_happens() -> None:
    """Five jobs of days on their best type: of a thousand ticks none asks for anything."""
    jobs = [
        SimJob(job_id=n, gpus=1, steps=40.0 * 3600 * n, rates={"A100": 2.0, "K80": 1.0},
               arrival_ms=n * HOUR_MS) for n in range(1, 5)
    ]  # fmt: skip
    policy = Counted(solve=solve)
    outcome = simulate(jobs, FLEET, policy)
    assert outcome.events > 4_000, "ticks are there"
    assert policy.asked < 30
    assert policy.whole == []


def test_a_queue_is_decided_over_all() -> None:
    jobs = [
        SimJob(job_id=n, gpus=2, steps=7200.0, rates={"A100": 2.0, "K80": 1.0}) for n in range(9)
    ]
    policy = Counted(solve=solve)
    simulate(jobs, FLEET, policy)
    assert 0 in policy.whole


@given(
    gaps_s=st.lists(st.integers(0, 4_000), min_size=1, max_size=8),
    draws=st.lists(st.integers(0, 1_000), min_size=8, max_size=8),
    balance=st.sampled_from([0.0, 0.3, 1.0]),
    solved=st.booleans(),
    failing=st.booleans(),
    known=st.sampled_from([{}, {"blind": True}, {"rate_error": 0.3}]),
    light=st.sampled_from([1e-6, 0.5, 100.0]),
)
@settings(max_examples=12, deadline=None)
def test_every_trace_is_decided_as_without_it(
    gaps_s: list[int],
    draws: list[int],
    balance: float,
    *,
    solved: bool,
    failing: bool,
    known: dict[str, Any],
    light: float,
) -> None:
    jobs = jobs_of(gaps_s, draws)
    chance = Chance(node_mtbf_h=20.0, node_gpus=2, mend_h=1.0) if failing else Chance(save_s=7.0)
    chance = replace(chance, **known)
    aims, solver = Aims(balance=balance), solve if solved else None

    def run(whole: bool) -> Outcome:
        ours = Ours(aims, solver, 600_000, {"light": light})
        return simulate(jobs, FLEET, Whole(ours) if whole else ours, chance)

    assert run(whole=False) == run(whole=True)


def contender(number: int, at: str | None = None, **more: object) -> Contender:
    options = (Option("A100", 1, 4.0), Option("K80", 1, 1.0))
    made = Contender(
        job_id=number, options=options, steps_left=9e4, restart_s=60.0,
        at=next((each for each in options if each.gpu_type == at), None),
    )  # fmt: skip
    return replace(made, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", [solve, None])
def test_who_has_just_started_stays_and_who_must_start_does_not(solver: Solve | None) -> None:
    """A young one on the slow type is left there, but not if only the fast one is in time."""
    young = contender(1, "K80", since_ms=NOW_MS - 1000)
    hurried = replace(young, deadline_ms=NOW_MS + 22_500_000)
    for asked, name in ((young, "K80"), (hurried, "A100")):
        found = undisputed([asked], FLEET.gpus, NOW_MS, Aims(), {})
        grants = allocate([asked], FLEET.gpus, NOW_MS, Aims(), solve=solver).grants
        assert found == {1: grants[1].option}
        assert grants[1].option.gpu_type == name


def test_nothing_is_undisputed_where_types_are_equal_room_is_short_or_nobody_counts() -> None:
    same = (Option("A100", 1, 1.0), Option("K80", 1, 1.0))
    one = Fleet({"A100": 1, "K80": 6})
    for asked, fleet, tenants in (
        ([contender(1, options=same)], FLEET, {}),
        ([contender(1), contender(2)], one, {}),
        ([contender(1, project="p")], FLEET, {"p": 0.0}),
    ):
        assert undisputed(asked, fleet.gpus, NOW_MS, Aims(), tenants) is None
