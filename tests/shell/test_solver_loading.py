"""A solver that is installed and cannot be loaded: the coordinator goes on, and says so once."""

import sys
from collections.abc import Iterator

import pytest

from coordinator import logs, main
from coordinator.core.allocation import Aims, Columns, Contender, Option, allocate


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    main._solver.cache_clear()
    yield
    main._solver.cache_clear()


def test_a_solver_that_cannot_be_loaded_leaves_the_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "coordinator.solver", None)
    monkeypatch.setattr(logs, "emit", lambda level, event, fields: said.append(event))
    jobs = [Contender(job_id=number, options=(Option("H100", 1, 1.0),)) for number in (1, 2, 3)]
    for _ in range(2):
        made = allocate(jobs, {"H100": 2}, 0, Aims(), solve=main._solve)
        assert len(made.grants) == 2
    assert said == ["solver.not_loaded"]


def test_one_that_can_is_asked() -> None:
    solved = main._solve(Columns([0], [0], [1], [2.0], 1, [1]))
    assert solved.shares == [1.0]
