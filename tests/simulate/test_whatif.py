"""Questions: what is changed, what is not, and what cannot be asked."""

from dataclasses import replace

import pytest

from coordinator.sim.engine import simulate
from coordinator.sim.guesses import known_as, with_types
from coordinator.sim.model import Chance, Fleet, SimJob
from coordinator.sim.ours import Ours
from coordinator.sim.policies import Fifo
from coordinator.sim.whatif import (
    BadQuestion,
    Case,
    Gpus,
    Question,
    asked,
    fitting,
    read_gpus,
    read_weight,
    with_prices,
)
from coordinator.solver import solve

FLEET = Fleet({"A100": 2, "K80": 4}, {"A100": 2.0, "K80": 0.5})
JOBS = [
    SimJob(
        job_id=n, gpus=1, steps=36_000, rates={"A100": 10.0, "K80": 1.0},
        project="demo" if n % 2 else "rest",
    )
    for n in range(1, 13)
]  # fmt: skip
CASE = Case(JOBS, FLEET)


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [("4xH200", 4, "H200"), ("2x8xH200", 16, "H200"), ("1xRTX 4090", 1, "RTX 4090")],
)
def test_gpus_as_people_write_them(text: str, count: int, name: str) -> None:
    assert read_gpus(text) == Gpus(count, name)


@pytest.mark.parametrize("text", ["H200", "0xH200", "4x", "x4", "-1xH200", "4 H200", ""])
def test_what_is_no_number_of_gpus_is_refused(text: str) -> None:
    with pytest.raises(BadQuestion, match="is no number of GPUs"):
        read_gpus(text)


@pytest.mark.parametrize("text", ["demo", "demo=2", "demo=x0", "=x2", "demo=x-1", "demo=xnan"])
def test_what_is_no_weight_is_refused(text: str) -> None:
    with pytest.raises(BadQuestion, match="like demo=x2"):
        read_weight(text)


def test_a_type_that_nobody_has_gets_rates_a_price_and_time_to_boot() -> None:
    case = asked(CASE, Question(added=[Gpus(4, "H200")]), {})
    assert case.fleet.gpus == {"A100": 2, "K80": 4, "H200": 4}
    assert case.fleet.booting == {"H200": 4}
    assert case.fleet.prices_per_h["H200"] == 4.59
    assert case.jobs[0].rates["H200"] > case.jobs[0].rates["A100"]
    before, after = simulate(JOBS, FLEET, Fifo()), simulate(case.jobs, case.fleet, Fifo())
    assert sum(after.finished_ms.values()) < sum(before.finished_ms.values())
    slow = simulate(case.jobs, case.fleet, Fifo(), Chance(boot_s=7200))
    late = [line.at_ms for line in slow.lines if (line.what, line.gpu_type) == ("mend", "H200")]
    assert late == [7_200_000]


def test_more_of_a_type_is_more_of_it_whatever_it_is_called() -> None:
    question = Question(added=[Gpus(2, "k80"), Gpus(1, "NVIDIA A100-SXM4-80GB")])
    case = asked(CASE, question, {})
    assert case.fleet.gpus == {"A100": 3, "K80": 6}
    assert case.jobs == JOBS


def test_what_is_removed_is_gone_with_its_rates() -> None:
    case = asked(CASE, Question(removed=[Gpus(4, "K80"), Gpus(1, "A100")]), {})
    assert case.fleet.gpus == {"A100": 1}
    assert all(job.rates == {"A100": 10.0} for job in case.jobs)


def test_a_given_rate_is_not_guessed() -> None:
    jobs = [replace(job, rates={**job.rates, "H200": 33.0}) for job in JOBS]
    case = asked(replace(CASE, jobs=jobs), Question(added=[Gpus(1, "H200")]), {})
    assert case.jobs[0].rates["H200"] == 33.0
    assert "H200" not in fitting(jobs, FLEET)[0].rates, "and is not there before"


def test_a_project_that_counts_more_is_done_sooner() -> None:
    def ends(weights: dict[str, float]) -> float:
        case = asked(CASE, Question(weights=weights), {})
        outcome = simulate(case.jobs, case.fleet, Ours(solve=solve, tenants=case.weights))
        demo = [job.job_id for job in JOBS if job.project == "demo"]
        return sum(outcome.finished_ms[n] for n in demo)

    assert ends({"demo": 4.0}) < ends({"rest": 4.0})


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        (Question(removed=[Gpus(5, "K80")]), "5 x K80 cannot be removed: there are 4 x K80"),
        (Question(removed=[Gpus(1, "H200")]), "there are none, but A100, K80"),
        (Question(added=[Gpus(1, "H900")]), "nothing says how fast jobs are on H900"),
        (Question(weights={"nobody": 2.0}), "no job is of project 'nobody'; there are demo, rest"),
        (
            Question(removed=[Gpus(2, "A100"), Gpus(4, "K80")]),
            "no job could run: job 1 could never",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(question: Question, sentence: str) -> None:
    with pytest.raises(BadQuestion) as caught:
        asked(CASE, question, {})
    assert sentence in str(caught.value)


def test_a_job_that_fits_nowhere_then_is_named_and_left_out() -> None:
    large = replace(JOBS[0], job_id=99, gpus=4)
    case = asked(replace(CASE, jobs=[*JOBS, large]), Question(removed=[Gpus(2, "K80")]), {})
    assert [job.job_id for job in case.jobs] == [job.job_id for job in JOBS]
    (why,) = case.left_out.values()
    assert why.startswith("job 99 could never run: it needs 4 GPUs of one type")
    assert why.endswith("and there would be 2")


def test_the_longest_part_of_a_name_has_the_price() -> None:
    fleet = Fleet({"A100 80GB": 1, "A100 40GB": 1, "K80": 1}, {"K80": 0.5})
    prices = with_prices(fleet, {"a100": 1.0, "A100 80": 2.0}).prices_per_h
    assert prices == {"A100 80GB": 2.0, "A100 40GB": 1.0, "K80": 0.5}


def test_a_key_of_the_table_is_its_own_type() -> None:
    """By the rules for NVML's names it would be the 80 GB one."""
    assert known_as("A100 40GB") == "A100 40GB"
    assert known_as("NVIDIA H100 80GB HBM3") == "H100"
    assert known_as("something else") == "something else"


def test_a_guess_keeps_to_what_the_job_does_elsewhere() -> None:
    """Twice as fast on what is known: about twice as fast on what is not."""
    slow, fast = with_types(
        [replace(JOBS[0], rates={"A100": 1.0}), replace(JOBS[0], rates={"A100": 2.0})], ["H100"]
    )
    assert fast.rates["H100"] == pytest.approx(2 * slow.rates["H100"], rel=1e-3)
    assert 1.5 < slow.rates["H100"] < 4


def test_a_job_of_old_gpus_is_not_taken_to_compute_in_what_they_cannot() -> None:
    """In 16 bits an H200 has sixty times the arithmetic of a V100 in 32, in 32 bits four times."""
    (old,) = with_types([replace(JOBS[0], rates={"V100": 1.0})], ["H200"])
    assert 3 < old.rates["H200"] < 8
