"""The simulator: traces whose results are known by hand, chance with a seed, and answers that are
refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.scheduling_speed import rows, trace
from coordinator.core.allocation import Aims
from coordinator.sim import checks, policies
from coordinator.sim.engine import BrokenPolicy, simulate
from coordinator.sim.model import (
    Chance,
    Fleet,
    News,
    Outcome,
    PairRates,
    Placement,
    Policy,
    SimJob,
    View,
)
from coordinator.sim.ours import Ours
from coordinator.sim.policies import Fifo, Packing, PerDollar, StaticPartition
from coordinator.sim.report import figures, fluid_completions_ms, spread
from coordinator.sim.rounds import Goal, Rounds
from coordinator.solver import solve

HOUR_MS = 3_600_000
ONE = Fleet({"A100": 1}, {"A100": 2.0})
MIXED = Fleet({"A100": 1, "K80": 2}, {"A100": 2.0, "K80": 0.5})
SLOW_TICKS = Ours(solve=solve, tick_ms=600_000)
PAIRS: PairRates = {
    (name, one, other): 0.8 * rate
    for name, rate in (("A100", 4.0), ("K80", 1.0))
    for one in ("m", "n")
    for other in ("m", "n")
}


def job(job_id: int, rates: str = "A100:1", hours: float = 1.0, **more: object) -> SimJob:
    """A job with these steps a second that has so many hours to do on its first type."""
    pairs = [pair.split(":") for pair in rates.split()]
    known = {name: float(rate) for name, rate in pairs}
    steps = hours * 3600 * float(pairs[0][1])
    made = SimJob(job_id=job_id, gpus=1, steps=steps, rates=known, model="m")
    return replace(made, **more)  # type: ignore[arg-type]


def ends_h(outcome: Outcome) -> dict[int, float]:
    return {n: round(ms / HOUR_MS, 4) for n, ms in sorted(outcome.finished_ms.items())}


def all_policies() -> list[Policy]:
    return [
        Fifo(),
        Fifo(aware=True),
        StaticPartition(),
        Packing(PAIRS),
        PerDollar(),
        *(Rounds(goal) for goal in Goal),
        Ours(tick_ms=600_000),
        Ours(Aims(balance=1.0), solve, 600_000),
    ]


def findings(outcome: Outcome, jobs: list[SimJob], fleet: Fleet) -> list[str]:
    known = {each.job_id: each for each in jobs}
    return [
        *checks.check_capacity(outcome, fleet),
        *checks.check_work(outcome, known, PAIRS),
        *checks.check_completions(outcome, known),
    ]


def test_fifo_runs_one_after_the_other() -> None:
    jobs = [job(1, hours=2), job(2, hours=1), job(3, hours=1, arrival_ms=5 * HOUR_MS)]
    outcome = simulate(jobs, ONE, Fifo())
    assert ends_h(outcome) == {1: 2, 2: 3, 3: 6}
    found = figures(outcome, {each.job_id: each for each in jobs}, ONE)
    assert found.makespan_h == 6
    assert found.completion_h.mean == pytest.approx((2 + 3 + 1) / 3)
    assert found.busy_ratio == pytest.approx(4 / 6)
    assert found.busy_waiting_ratio == 1, "while the second waits the GPU is busy"
    assert found.provisioned_cost == pytest.approx(12)
    assert found.used_cost == pytest.approx(8)


def test_fifo_sees_the_type_only_if_it_is_told_to() -> None:
    jobs = [job(1, "A100:4 K80:1")]
    assert ends_h(simulate(jobs, MIXED, Fifo())) == {1: 4}, "most GPUs are free of K80"
    assert ends_h(simulate(jobs, MIXED, Fifo(aware=True))) == {1: 1}


def test_a_head_of_the_queue_that_does_not_fit_holds_it_up() -> None:
    fleet = Fleet({"A100": 2})
    jobs = [job(1, hours=2), job(2, gpus=2, hours=1), job(3, hours=1)]
    assert ends_h(simulate(jobs, fleet, Fifo())) == {1: 2, 2: 3, 3: 4}


def test_a_restart_is_charged_once_for_each_and_never_for_the_first() -> None:
    """The short job comes when the long one has run for an hour, and displaces it."""
    jobs = [
        job(1, hours=10, restart_s=360),
        job(2, hours=1, arrival_ms=HOUR_MS, restart_s=360),
    ]
    outcome = simulate(jobs, ONE, Ours(Aims(balance=0), solve))
    assert ends_h(outcome) == {1: 11.1, 2: 2}
    found = figures(outcome, {1: jobs[0], 2: jobs[1]}, ONE)
    assert found.restarts == 1
    assert found.busy_waiting_ratio == 1


def test_a_pair_has_one_gpu_and_its_own_rates() -> None:
    """Each runs at 0.8 beside the other; when the first is done the second has the GPU alone."""
    jobs = [job(1, "A100:4"), job(2, "A100:4", hours=2)]
    outcome = simulate(jobs, ONE, Packing(PAIRS), pairs=PAIRS)
    assert ends_h(outcome) == {1: 1.25, 2: 2.25}
    assert findings(outcome, jobs, ONE) == []
    assert "share" in [line.what for line in outcome.lines]


def test_a_partition_leaves_its_gpus_idle_beside_a_queue() -> None:
    jobs = [job(n, "A100:1 K80:1") for n in range(1, 7)]
    outcome = simulate(jobs, MIXED, StaticPartition())
    found = figures(outcome, {each.job_id: each for each in jobs}, MIXED)
    assert found.makespan_h == 2
    assert {line.gpu_type for line in outcome.lines if line.what == "start"} == {"A100", "K80"}


def test_dollars_decide_where_speed_does_not() -> None:
    cheap = simulate([job(1, "A100:3 K80:1")], MIXED, PerDollar())
    assert {line.gpu_type for line in cheap.lines if line.what == "start"} == {"K80"}
    dear = simulate([job(1, "A100:5 K80:1")], MIXED, PerDollar())
    assert {line.gpu_type for line in dear.lines if line.what == "start"} == {"A100"}


def test_rounds_share_time_equally() -> None:
    """Two equal jobs on one GPU in turns of six minutes end one turn apart."""
    outcome = simulate([job(1), job(2)], ONE, Rounds(Goal.MAX_MIN))
    assert ends_h(outcome) in ({1: 1.9, 2: 2}, {1: 2, 2: 1.9})


def test_makespan_gives_each_type_what_it_loses_least_on() -> None:
    jobs = [job(1, "A100:4 K80:1", hours=2), job(2, "A100:2 K80:2", hours=2)]
    outcome = simulate(jobs, Fleet({"A100": 1, "K80": 1}), Rounds(Goal.MAKESPAN))
    assert ends_h(outcome) == {1: 2, 2: 2}


def test_who_is_too_late_for_fairness_does_not_end_it_for_the_others() -> None:
    """A job of no steps waits for both GPUs: three others take turns all the same."""
    jobs = [job(1), job(2), job(3), job(4, hours=0, gpus=2)]
    outcome = simulate(jobs, Fleet({"A100": 2}), Rounds(Goal.FINISH_TIME_FAIRNESS))
    assert any(line.what == "stop" for line in outcome.lines)
    assert ends_h(outcome)[3] < 1.8, "in turn it would be 2"


def test_the_fluid_fleet_is_shared_equally() -> None:
    jobs = [job(1, hours=1), job(2, hours=2, arrival_ms=HOUR_MS // 2)]
    took = fluid_completions_ms(jobs, ONE)
    # The first has half of its hour alone, and the rest at half speed.
    assert took[1] == pytest.approx(1.5 * HOUR_MS)
    assert took[2] == pytest.approx(2.5 * HOUR_MS)


def test_the_fluid_fleet_gives_nobody_more_than_it_asks_for() -> None:
    """One of three has a GPU and no more; of two that ask for both, each has what half is."""
    two = Fleet({"A100": 2})
    jobs = [job(1), *(job(n, gpus=2) for n in (2, 3))]
    took = fluid_completions_ms(jobs, two)
    # A third of two GPUs each: jobs 2 and 3 at a third of their speed, job 1 at two thirds.
    assert took[1] == pytest.approx(1.5 * HOUR_MS)
    assert took[2] == took[3] == pytest.approx(2.5 * HOUR_MS)
    assert fluid_completions_ms([job(4)], two)[4] == pytest.approx(HOUR_MS), "not two GPUs"


def test_percentiles_are_those_of_numpy() -> None:
    found = spread([float(n) for n in range(1, 101)])
    assert [found.mean, found.p99, found.worst] == pytest.approx([50.5, 99.01, 100])


def test_a_failed_node_costs_what_was_not_saved() -> None:
    """Nodes fail about every two hours; what was lost is done again, and the judges agree."""
    jobs = [job(n, "A100:4 K80:1", hours=3, restart_s=60) for n in range(1, 5)]
    chance = Chance(seed=3, node_mtbf_h=2.0, node_gpus=1, mend_h=0.5)
    fleet = Fleet({"A100": 2, "K80": 3})
    outcome = simulate(jobs, fleet, Ours(solve=solve), chance)
    kinds = [line.what for line in outcome.lines]
    assert "kill" in kinds
    assert "mend" in kinds
    assert findings(outcome, jobs, fleet) == []


def test_the_same_seed_is_the_same_trace() -> None:
    jobs = [job(n, "A100:4 K80:1", hours=n % 5 + 1) for n in range(1, 12)]

    def run(seed: int) -> str:
        chance = Chance(seed=seed, node_mtbf_h=20, node_gpus=1, rate_error=0.3)
        return simulate(jobs, MIXED, SLOW_TICKS, chance).trace_hash

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_wrong_rates_mislead_the_policy_and_not_the_work() -> None:
    jobs = [job(n, "A100:4 K80:1", hours=n) for n in range(1, 9)]
    exact = simulate(jobs, MIXED, SLOW_TICKS)
    wrong = simulate(jobs, MIXED, SLOW_TICKS, Chance(seed=1, rate_error=1.0))
    assert exact.trace_hash != wrong.trace_hash
    assert findings(wrong, jobs, MIXED) == []


def test_who_is_blind_ends_all_jobs_too() -> None:
    jobs = [job(n, "A100:4 K80:1", hours=n) for n in range(1, 9)]
    outcome = simulate(jobs, MIXED, SLOW_TICKS, Chance(blind=True))
    assert len(outcome.finished_ms) == 8


@pytest.mark.parametrize("failing", [False, True])
def test_a_large_fleet_decides_in_between_by_news_alone(failing: bool) -> None:
    """Fewer decisions over all jobs; the judges find nothing, and the same seed is the same."""
    fleet = Fleet({"A100": 4, "K80": 6})
    rates = {"A100": 4.0, "K80": 1.0}
    jobs = [
        SimJob(
            job_id=n, gpus=1 + n % 3, steps=500.0 * (1 + n * 7 % 11), rates=rates, rank=n % 2,
            arrival_ms=n * 17_000, restart_s=60.0,
        )
        for n in range(1, 60)
    ]  # fmt: skip
    chance = Chance(seed=5, node_mtbf_h=1.0, node_gpus=2, mend_h=0.2) if failing else Chance()
    known = {each.job_id: each for each in jobs}

    def run(few_max: int) -> tuple[Outcome, int]:
        policy = Counted(Ours(solve=solve, few_max=few_max))
        return simulate(jobs, fleet, policy, chance), policy.decided

    outcome, decided = run(0)
    assert findings(outcome, jobs, fleet) == []
    assert checks.check_classes(outcome, known, fleet) == []
    assert run(0) == (outcome, decided)
    every, decided_each = run(10_000)
    assert decided < decided_each
    assert findings(every, jobs, fleet) == []


@dataclass
class Counted:
    """How often ours decides over all jobs."""

    ours: Ours
    decided: int = 0
    name: str = "counted"
    tick_ms: int = 60_000

    def decide(self, view: View) -> Mapping[int, Placement]:
        self.decided += 1
        return self.ours.decide(view)

    def hear(self, news: News) -> Mapping[int, Placement] | None:
        return self.ours.hear(news)


@dataclass
class Plain:
    """FIFO that looks through all jobs each time."""

    aware: bool
    name: str = "plain"
    tick_ms: int = 0

    def decide(self, view: View) -> Mapping[int, Placement]:
        placed = policies.running(view)
        free = policies.free_gpus(view, placed)
        return placed | policies.first_come(policies.waiting_jobs(view), free, self.aware)


@pytest.mark.parametrize("aware", [False, True])
def test_fifo_starts_by_news_whom_it_starts_when_it_sees_all(aware: bool) -> None:
    """With classes, gangs and failures, after which it does see all."""
    jobs = [
        job(n, "A100:4 K80:1", 0.3 + n % 5, gpus=1 + n % 2, rank=n % 3, arrival_ms=n // 4 * 999_000)
        for n in range(1, 60)
    ]
    fleet, chance = Fleet({"A100": 3, "K80": 4}), Chance(seed=2, node_mtbf_h=20.0, node_gpus=1)
    news, plain = (simulate(jobs, fleet, each, chance) for each in (Fifo(aware), Plain(aware)))
    assert any(line.what == "kill" for line in news.lines)
    assert news.finished_ms == plain.finished_ms
    assert sorted(line[:6] for line in news.lines) == sorted(line[:6] for line in plain.lines)


@dataclass
class Starts(Counted):
    """Says that one more starts whenever it hears anything."""

    placed: Mapping[int, Placement] = field(default_factory=dict)

    def hear(self, news: News) -> Mapping[int, Placement] | None:
        return self.placed


@pytest.mark.parametrize(
    ("placed", "complaint"),
    [
        ({2: Placement("A100", 1)}, "2 x A100 promised, 1 there"),
        ({1: Placement("A100", 1)}, "job 1 cannot start on"),
        ({2: Placement("A100", 2)}, "job 2 cannot run on"),
        ({3: Placement("A100", 1)}, "job 3 cannot start on"),
    ],
)
def test_a_start_that_cannot_be_carried_out_is_refused(
    placed: dict[int, Placement], complaint: str
) -> None:
    with pytest.raises(BrokenPolicy, match=complaint):
        simulate([job(1), job(2, arrival_ms=1000)], ONE, Starts(Ours(), placed=placed))


def test_a_composed_trace_of_a_large_fleet_is_one_by_its_seed() -> None:
    assert trace(50, 20, 1) == trace(50, 20, 1)
    assert trace(50, 20, 1) != trace(50, 20, 2)
    assert rows(80, 40)[0].value > 0, "its judges find nothing"


@dataclass(frozen=True)
class Says:
    """A policy that says the same whatever it sees."""

    placed: Mapping[int, Placement]
    name: str = "stubborn"
    tick_ms: int = 60_000

    def decide(self, view: View) -> Mapping[int, Placement]:
        return {
            n: place for n, place in self.placed.items() if n in {s.job.job_id for s in view.jobs}
        }


@pytest.mark.parametrize(
    ("placed", "complaint"),
    [
        ({1: Placement("A100", 1), 2: Placement("A100", 1)}, "2 x A100 promised, 1 there"),
        ({1: Placement("A100", 2)}, "job 1 cannot run on"),
        ({1: Placement("K80", 1)}, "job 1 cannot run on"),
        ({1: Placement("A100", 1, 2)}, "job 1 shares with nobody"),
        ({}, "leaves 2 jobs waiting"),
    ],
)
def test_an_answer_that_cannot_be_carried_out_is_refused(
    placed: dict[int, Placement], complaint: str
) -> None:
    with pytest.raises(BrokenPolicy, match=complaint):
        simulate([job(1), job(2)], ONE, Says(placed))


def test_a_job_that_no_type_can_run_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="job 2: no GPU type of the fleet can run it on 4"):
        simulate([job(1), job(2, gpus=4)], ONE, Fifo())


@st.composite
def traces(draw: st.DrawFn) -> list[SimJob]:
    count = draw(st.integers(1, 8))
    found = []
    for number in range(1, count + 1):
        rates = {"A100": draw(st.floats(0.5, 20)), "K80": draw(st.floats(0.1, 2))}
        found.append(
            SimJob(
                job_id=number,
                gpus=draw(st.sampled_from([1, 1, 2, 4])),
                steps=draw(st.floats(1, 50_000)),
                rates=rates,
                model=draw(st.sampled_from(["m", "n"])),
                rank=draw(st.integers(0, 2)),
                arrival_ms=draw(st.integers(0, 10_000_000)),
                restart_s=draw(st.sampled_from([0.0, 60.0, 300.0])),
            )
        )
    return found


@given(jobs=traces(), failing=st.booleans(), which=st.integers(0, 10))
@settings(max_examples=40, deadline=None)
def test_every_policy_ends_every_job_and_the_judges_find_nothing(
    jobs: list[SimJob], failing: bool, which: int
) -> None:
    fleet = Fleet({"A100": 4, "K80": 6}, {"A100": 2.0, "K80": 0.3})
    chance = Chance(node_mtbf_h=30.0, node_gpus=2, mend_h=1.0) if failing else Chance()
    policy = all_policies()[which]
    pairs = {
        (name, one.model, other.model): 0.6 * one.rates[name]
        for name in fleet.gpus for one in jobs for other in jobs
    }  # fmt: skip
    outcome = simulate(jobs, fleet, policy, chance, pairs)
    known = {each.job_id: each for each in jobs}
    assert checks.check_capacity(outcome, fleet) == []
    assert checks.check_work(outcome, known, pairs) == []
    assert checks.check_completions(outcome, known) == []
    if isinstance(policy, Ours):
        assert checks.check_classes(outcome, known, fleet) == []
    assert figures(outcome, known, fleet).busy_ratio <= 1 + 1e-9
