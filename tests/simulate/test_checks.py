"""The judges bite: each is shown a history with one thing in it that must not be."""

from dataclasses import replace

import pytest

from coordinator.sim import checks
from coordinator.sim.engine import simulate
from coordinator.sim.model import Fleet, Line, Outcome, SimJob
from coordinator.sim.policies import Fifo

FLEET = Fleet({"A100": 2})
JOBS = {
    n: SimJob(job_id=n, gpus=1, steps=100.0, rates={"A100": 1.0}, rank=n - 1, restart_s=10.0)
    for n in (1, 2, 3)
}


def history() -> Outcome:
    """Two at once, then the third."""
    return simulate(JOBS.values(), FLEET, Fifo())


def altered(what: str, job_id: int, at_ms: int) -> Outcome:
    """A history with one line that says another time."""
    true = history()
    lines = [
        line._replace(at_ms=at_ms) if (line.what, line.job_id) == (what, job_id) else line
        for line in true.lines
    ]
    return true._replace(lines=sorted(lines, key=lambda line: line.at_ms))


def test_a_true_history_is_left_alone() -> None:
    true = history()
    assert checks.check_capacity(true, FLEET) == []
    assert checks.check_work(true, JOBS) == []
    assert checks.check_completions(true, JOBS) == []
    assert checks.check_classes(true, JOBS, FLEET) == []


def test_a_gpu_that_is_promised_twice_is_found() -> None:
    found = checks.check_capacity(altered("start", 3, 0), FLEET)
    assert found == ["at 0 ms 1 x A100 too many are promised"]


def test_a_gpu_that_has_failed_is_not_there() -> None:
    true = history()
    failed = [*true.lines[:3], Line(0, "fail", 0, "A100", 1), *true.lines[3:]]
    assert checks.check_capacity(true._replace(lines=failed), FLEET)


def test_work_that_was_not_done_is_found() -> None:
    found = checks.check_work(altered("finish", 1, 90_000), JOBS)
    assert found == ["job 1 says 100 at its finish, made 90 of 100 steps"]


def test_work_in_a_restart_is_found() -> None:
    """It was stopped for a moment, and says that it came back without a restart."""
    true = history()
    place = true.lines.index(next(line for line in true.lines if line.what == "finish"))
    stop = Line(50_000, "stop", 1, "A100", 1, None, 50.0)
    again = Line(50_000, "start", 1, "A100", 1, None, 50.0)
    lines = [*true.lines[:place], stop, again, *true.lines[place:]]
    found = checks.check_work(true._replace(lines=lines), JOBS)
    assert found == ["job 1 says 100 at its finish, made 90 of 100 steps"]


def test_steps_that_a_failure_gives_are_found() -> None:
    true = history()
    killed = Line(50_000, "kill", 1, "A100", 1, None, 60.0)
    found = checks.check_work(true._replace(lines=[*true.lines[:5], killed]), JOBS)
    assert found == ["job 1 gained steps by a failure"]


@pytest.mark.parametrize("at_ms", [99_000, 101_000])
def test_a_completion_that_is_not_in_the_lines_is_found(at_ms: int) -> None:
    true = history()
    said = true._replace(finished_ms={**true.finished_ms, 1: at_ms})
    found = checks.check_completions(said, JOBS)
    assert found == [f"job 1 is reported done at {at_ms} ms, and was at 100000"]


def test_a_job_that_is_forgotten_is_found() -> None:
    more = {**JOBS, 4: replace(JOBS[1], job_id=4)}
    assert checks.check_completions(history(), more) == ["job 4 never ends"]


def test_an_inversion_of_classes_is_found() -> None:
    """The third job is made the first class's, and waits behind the others."""
    first = {**JOBS, 3: replace(JOBS[3], rank=-1)}
    found = checks.check_classes(history(), first, FLEET)
    assert found == ["at 0 ms job 3 waits for 1 x A100 with 0 free and 2 of later classes"]


def test_a_gpu_that_idles_beside_a_queue_is_found() -> None:
    found = checks.check_classes(altered("start", 2, 1), JOBS, FLEET)
    assert found[0] == "at 0 ms job 2 waits for 1 x A100 with 1 free and 0 of later classes"
