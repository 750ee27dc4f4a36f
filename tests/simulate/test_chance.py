"""What goes wrong in a simulation, and what it costs to be prepared, by hand; and that one option
leaves what the others drew as it was."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from coordinator.sim import checks
from coordinator.sim.engine import BrokenPolicy, simulate
from coordinator.sim.model import Chance, Fleet, Line, Outcome, PairRates, Placement, SimJob, View
from coordinator.sim.ours import Ours
from coordinator.sim.policies import Fifo, Packing, PerDollar
from coordinator.sim.rounds import Goal, Rounds
from coordinator.solver import solve

HOUR_MS = 3_600_000
ONE = Fleet({"A100": 1}, {"A100": 2.0})


def job(job_id: int, hours: float = 1.0, **more: object) -> SimJob:
    made = SimJob(job_id=job_id, gpus=1, steps=hours * 3600, rates={"A100": 1.0}, model="m")
    return replace(made, **more)  # type: ignore[arg-type]


def ends_h(outcome: Outcome) -> dict[int, float]:
    return {n: round(ms / HOUR_MS, 4) for n, ms in sorted(outcome.finished_ms.items())}


def failures(outcome: Outcome) -> list[Line]:
    return [line for line in outcome.lines if line.what in ("fail", "mend")]


def test_saves_stop_a_training_and_the_last_is_not_waited_for() -> None:
    """An hour is six stretches of ten minutes with five saves of a minute in between."""
    chance = Chance(checkpoint_s=600, save_s=60)
    jobs = [job(1)]
    outcome = simulate(jobs, ONE, Fifo(), chance)
    assert ends_h(outcome) == {1: round(65 / 60, 4)}
    assert checks.check_work(outcome, {1: jobs[0]}, chance=chance) == []
    assert checks.check_work(outcome, {1: jobs[0]}), "a judge that is not told finds too few steps"


def test_what_boots_takes_no_work_before_it_has() -> None:
    fleet = Fleet({"A100": 2}, booting={"A100": 1})
    jobs = [job(1), job(2)]
    outcome = simulate(jobs, fleet, Fifo(), Chance(boot_s=1800))
    assert ends_h(outcome) == {1: 1, 2: 1.5}
    assert checks.check_capacity(outcome, fleet) == []
    assert ends_h(simulate(jobs, fleet, Fifo())) == {1: 1, 2: 1}, "without a time to boot"


def test_a_mended_node_boots_before_it_is_back() -> None:
    chance = Chance(seed=1, node_mtbf_h=20, node_gpus=1, mend_h=0.5)
    jobs = [job(1, hours=100)]
    quick = failures(simulate(jobs, ONE, Fifo(), chance))
    slow = failures(simulate(jobs, ONE, Fifo(), replace(chance, boot_s=360)))
    assert quick[0] == slow[0]
    assert quick[1].at_ms - quick[0].at_ms == 0.5 * HOUR_MS
    assert slow[1].at_ms - slow[0].at_ms == 0.6 * HOUR_MS


def test_a_failure_takes_back_to_the_last_save_and_no_further() -> None:
    """Saved every quarter of an hour: each failure costs less than that, and what is lost is lost
    from the checkpoint that was made while the job shared its GPU, too."""
    pairs: PairRates = {("A100", "m", "m"): 0.6}
    chance = Chance(seed=2, node_mtbf_h=1.5, node_gpus=1, mend_h=0.1, checkpoint_s=900, save_s=30)
    jobs = [job(n, hours=3 + n / 7, arrival_ms=n * 1_000_000) for n in range(1, 5)]
    fleet = Fleet({"A100": 2})
    outcome = simulate(jobs, fleet, Packing(pairs), chance, pairs)
    assert any(line.what == "kill" and line.partner is not None for line in outcome.lines)
    known = {each.job_id: each for each in jobs}
    assert checks.check_work(outcome, known, pairs, chance) == []
    assert checks.check_capacity(outcome, fleet) == []


def test_a_failure_that_costs_what_was_saved_is_found() -> None:
    known = {1: job(1)}
    lines = [
        Line(0, "arrive", 1),
        Line(0, "start", 1, "A100", 1),
        Line(1_000_000, "stop", 1, "A100", 1, None, 1000.0),
        Line(1_000_000, "start", 1, "A100", 1, None, 1000.0),
        Line(1_500_000, "kill", 1, "A100", 1, None, 900.0),
    ]
    found = checks.check_work(Outcome(lines, {}, "", 0), known)
    assert found == ["job 1 lost 600 steps to a failure, and had saved 1000"]
    lines[-1] = lines[-1]._replace(steps=1000.0)
    assert checks.check_work(Outcome(lines, {}, "", 0), known) == []
    found = checks.check_work(Outcome(lines, {}, "", 0), known, chance=Chance(checkpoint_s=300))
    assert found == ["job 1 lost 500 steps to a failure, and had saved 1200"]


def test_who_fails_does_not_depend_on_the_policy_or_on_who_is_wrong() -> None:
    fleet = Fleet({"A100": 8})
    jobs = [job(n, hours=5 + n % 4) for n in range(1, 30)]
    chance = Chance(seed=4, node_mtbf_h=8, node_gpus=4, mend_h=1)
    seen = failures(simulate(jobs, fleet, Fifo(), chance))
    for policy in (Ours(tick_ms=600_000), PerDollar()):
        outcome = simulate(jobs, fleet, policy, replace(chance, rate_error=0.5))
        others = failures(outcome)
        shared = min(len(seen), len(others))
        assert shared > 4
        assert others[:shared] == seen[:shared]


def test_a_node_that_fails_takes_its_own_jobs_and_nobody_elses() -> None:
    fleet = Fleet({"A100": 8})
    jobs = [job(n, hours=40) for n in range(1, 9)]
    chance = Chance(seed=3, node_mtbf_h=30, node_gpus=4, mend_h=1)
    outcome = simulate(jobs, fleet, Fifo(), chance)
    killed: dict[int, list[int]] = {}
    for line in outcome.lines:
        if line.what == "kill":
            killed.setdefault(line.at_ms, []).append(line.job_id)
    assert killed
    assert all(len(group) <= 4 for group in killed.values())


@pytest.mark.parametrize("goal", list(Goal))
def test_a_fleet_that_is_all_down_is_waited_for(goal: Goal) -> None:
    jobs = [job(1, hours=6)]
    chance = Chance(seed=1, node_mtbf_h=4, node_gpus=1, mend_h=1)
    outcome = simulate(jobs, ONE, Rounds(goal), chance)
    assert "kill" in [line.what for line in outcome.lines]
    assert checks.check_work(outcome, {1: jobs[0]}) == []


def test_a_long_repair_is_no_policy_s_fault() -> None:
    """More ticks than a policy is given that leaves jobs waiting beside free GPUs."""
    chance = Chance(seed=1, node_mtbf_h=4, node_gpus=1, mend_h=200)
    outcome = simulate([job(1, hours=6)], ONE, Fifo(tick_ms=60_000), chance)
    assert "kill" in [line.what for line in outcome.lines]


class Spy:
    """What a policy is told of lengths, decided by FIFO."""

    name = "spy"
    tick_ms = 0

    def __init__(self) -> None:
        self.told: set[float] = set()

    def decide(self, view: View) -> Mapping[int, Placement]:
        self.told |= {seen.job.steps for seen in view.jobs}
        assert all(seen.steps_left is None for seen in view.jobs)
        return Fifo().decide(view)


def test_who_is_blind_is_told_no_length_by_any_way() -> None:
    jobs = [job(n, hours=n) for n in (1, 3, 8)]
    spy = Spy()
    simulate(jobs, ONE, spy, Chance(blind=True))
    assert spy.told == {3 * 3600.0}, "the one in the middle"


def test_who_is_blind_is_told_no_length_by_news_either() -> None:
    """A short and a long job come while the GPU is taken, and between two ticks it is free."""
    jobs = [job(1), job(2, hours=3, arrival_ms=1000), job(3, hours=0.1, arrival_ms=2000)]

    def order(chance: Chance) -> list[int]:
        policy = Ours(solve=solve, few_max=0, tick_ms=8 * HOUR_MS)
        outcome = simulate(jobs, ONE, policy, chance)
        return [line.job_id for line in outcome.lines if line.what == "start"]

    assert order(Chance()) == [1, 3, 2]
    assert order(Chance(blind=True)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("place", "complaint"),
    [(Placement("K80", 1), "the fleet has no K80"), (Placement("T4", 1), "cannot run on")],
)
def test_a_type_that_is_not_there_is_refused(place: Placement, complaint: str) -> None:
    class Says(Spy):
        def decide(self, view: View) -> Mapping[int, Placement]:
            return {1: place}

    with pytest.raises(BrokenPolicy, match=complaint):
        simulate([job(1, rates={"A100": 1.0, "K80": 1.0, "T4": 0.0})], ONE, Says())
