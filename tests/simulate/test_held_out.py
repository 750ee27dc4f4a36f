"""The settings that nothing was tuned on: each is one by its seed, and what stands in its table."""

import random
from pathlib import Path

import pytest

from bench import scheduling_held_out
from bench.scheduling_held_out import COLUMNS, SETTINGS, Data, Setting, best, fleet_of, ratios, run
from bench.scheduling_modern import Composed
from coordinator.sim.gavel import Rates
from coordinator.sim.model import SimJob

ALONE = {
    (f"m{gpus}", gpus): {"v100": 4.0 * gpus, "p100": 2.0 * gpus, "k80": 1.0 * gpus}
    for gpus in (1, 2, 4, 8)
}
RATES = Rates(ALONE, {})


def data() -> Data:
    jobs = [
        SimJob(job_id=gpus, gpus=gpus, steps=3600.0, rates=ALONE[f"m{gpus}", gpus], model="m")
        for gpus in (1, 2, 4)
    ]
    line = {"model": "m1", "gpus": "1", "total_steps": "100", "arrival_s": "5"}
    return Data(jobs, jobs, RATES, RATES, [line] * 101)


def test_a_setting_is_one_by_its_seed_and_its_jobs_fit_its_fleet() -> None:
    for name, make in SETTINGS.items():
        made = make(data(), random.Random(1))
        assert made == make(data(), random.Random(1)), name
        assert made != make(data(), random.Random(2)) or name.startswith("Philly")
        assert len(made.made.jobs) >= 60, name
        for job in made.made.jobs.values():
            assert set(job.rates) <= set(made.fleet.gpus)
            assert max(made.fleet.gpus[each] for each in job.rates) >= job.gpus


def test_ratios_are_ours_over_the_best_of_the_others() -> None:
    """An hour's job first in the line for one GPU, and one of half an hour: 1.25 h on average in
    turn, and 1 h the other way round."""
    jobs = {
        number: SimJob(job_id=number, gpus=1, steps=hours * 3600, rates={"v100": 1.0}, model="m")
        for number, hours in ((1, 1.0), (2, 0.5))
    }
    ran = run(Setting(Composed(jobs, {}), fleet_of(1, 0, 0)))
    assert len(ran) == 10
    assert best(ran, "mean")[0] == min(
        each.completion_h.mean for name, each in ran.items() if name != "Baton"
    )
    assert ratios([ran], "mean") == [ran["Baton"].completion_h.mean / best(ran, "mean")[0]]
    assert ran["Baton"].completion_h.mean == pytest.approx(1.0)
    assert ran["FIFO, type-blind"].completion_h.mean == pytest.approx(1.25)
    assert ratios([ran], "busy*") == [1.0]
    assert set(COLUMNS) == {"mean", "p99", "makespan", "busy*", "used $", "fairness"}


def test_without_its_data_it_says_so(tmp_path: Path) -> None:
    assert scheduling_held_out.main(["--gavel", str(tmp_path)]) == 1
