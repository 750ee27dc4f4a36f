"""Policies in rounds: what follows from who is there is computed once for those who are."""

from collections.abc import Callable, Sequence

import pytest

from coordinator.sim import rounds
from coordinator.sim.engine import simulate
from coordinator.sim.model import Chance, Fleet, Outcome, SimJob, View
from coordinator.sim.rounds import Goal, Rounds
from coordinator.solver import Floats, level

FLEET = Fleet({"A100": 1, "K80": 2})


class Forgetful(Rounds):
    """Computes it in each round."""

    def _parts_of(self, view: View, names: Sequence[str]) -> Floats:
        return self._parts(view, names)


def jobs() -> list[SimJob]:
    """Six that come over two hours and take about five in all; the third asks for two GPUs."""
    return [
        SimJob(
            job_id=n, gpus=1 + (n == 3), steps=1800.0 * n, rates={"A100": 2.0, "K80": 0.5 + n / 9},
            arrival_ms=n * 1_200_000, restart_s=60.0,
        )
        for n in range(1, 7)
    ]  # fmt: skip


@pytest.mark.parametrize("goal", [Goal.MAX_MIN, Goal.MAX_MIN_BLIND])
@pytest.mark.parametrize("failing", [False, True])
def test_max_min_solves_when_somebody_comes_or_goes(
    goal: Goal, failing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or GPUs do; and decides as if it solved each time."""
    chance = Chance(node_mtbf_h=3.0, node_gpus=1, mend_h=1.0) if failing else Chance()
    solved: list[int] = []

    def counted(
        rates: Floats, needs: Floats, gpus: Floats, capacity: Floats
    ) -> tuple[Floats, float] | None:
        solved.append(len(rates))
        return level(rates, needs, gpus, capacity)

    monkeypatch.setattr(rounds, "level", counted)

    def run(made: Callable[[Goal], Rounds]) -> Outcome:
        solved.clear()
        return simulate(jobs(), FLEET, made(goal), chance)

    kept = run(Rounds)
    changes = sum(line.what in ("arrive", "finish", "fail", "mend") for line in kept.lines)
    few = len(solved)
    assert 0 < few <= changes
    assert run(Forgetful) == kept
    assert len(solved) > 2 * few
