"""How long all work takes at least, and what it costs where: cases known by hand, and bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.horizon import PRICED_MAX, QUIET_MAX, Horizon, Work, horizon

FLEET = {"H100": 2, "K80": 6}


def works(*hours_and_slowdowns: tuple[float, float]) -> list[Work]:
    """GPU-hours on an H100 of each, and how many times as long it takes on a K80."""
    return [Work(hours, 1, {"H100": 1.0, "K80": 1 / slow}) for hours, slow in hours_and_slowdowns]


def test_types_that_are_alike_cost_the_same() -> None:
    found = horizon(works(*[(4.0, 1.0)] * 10), 0.0, FLEET)
    assert found.hours == pytest.approx(5.0)
    assert found.prices == pytest.approx({"H100": 1.0, "K80": 1.0})


def test_a_type_that_is_faster_for_everybody_costs_as_much_more() -> None:
    """Two H100 do as much as six, and six K80 as much as six: 40 hours of an H100 take ten."""
    found = horizon(works(*[(10.0, 3.0)] * 4), 0.0, FLEET)
    assert found.hours == pytest.approx(10.0, rel=0.03)
    assert found.prices["H100"] / found.prices["K80"] == pytest.approx(3.0, rel=0.1)


def test_work_goes_where_it_loses_least() -> None:
    """Each half of the work on the type that suits it: two H100 need five hours, six K80 five."""
    found = horizon(works(*[(1.0, 20.0)] * 10, *[(3.0, 1.0)] * 10), 0.0, FLEET)
    assert found.hours == pytest.approx(5.0, rel=0.02)


def test_a_job_that_takes_longer_than_all_work_sets_the_end() -> None:
    assert horizon(works((7.0, 1.0)), 7.0, FLEET).hours == 7.0


def test_a_gang_does_not_fit_on_a_type_with_fewer_gpus() -> None:
    gang = Work(40.0, 4, {"H100": 1.0, "K80": 0.5})
    assert horizon([gang], 0.0, FLEET).hours > 40.0 / 8
    assert horizon([gang], 3.0, {"H100": 2}) == Horizon(3.0, mean_gpu_h=40.0)


def test_nothing_to_do_has_no_prices() -> None:
    assert horizon([], 0.0, FLEET).cost({"H100": 1.0}) == 1.0
    assert horizon(works((1.0, 1.0)), 0.5, {"H100": 0}) == Horizon(0.5, mean_gpu_h=1.0)


def test_many_jobs_are_priced_by_some_and_counted_all() -> None:
    few = horizon(works(*[(1.0, 3.0)] * PRICED_MAX), 0.0, FLEET)
    many = horizon(works(*[(1.0, 3.0)] * (5 * PRICED_MAX)), 0.0, FLEET)
    assert many.hours == pytest.approx(5 * few.hours)


def test_the_longer_nobody_comes_the_less_likely_somebody_does() -> None:
    """Before ten hours of work are done: after ten without a job the chance is three quarters."""
    quiet = [horizon(works((9.0, 1.0)), 10.0, FLEET, h).quiet for h in (-1.0, 0.0, 10.0, 20.0)]
    assert quiet == pytest.approx([0, 0, 1 / 4, 4 / 9])
    assert horizon(works((9.0, 1.0)), 10.0, FLEET, 1e9).quiet == QUIET_MAX
    assert horizon([], 10.0, FLEET, 10.0).quiet == pytest.approx(1 / 4)


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.1, 10)), min_size=1, max_size=20),
    st.integers(0, 2),
    st.integers(1, 6),
)
def test_it_is_never_more_than_some_plan_takes(
    hours_and_slowdowns: list[tuple[float, float]], fast: int, slow: int
) -> None:
    """A bound: all work spread over the fleet in equal parts takes as long or longer."""
    capacity = {"H100": fast, "K80": slow}
    found = horizon(works(*hours_and_slowdowns), 0.0, capacity)
    takes_h = sum(hours / (fast + slow / slower) for hours, slower in hours_and_slowdowns)
    assert 0 < found.hours <= takes_h * (1 + 1e-9)
