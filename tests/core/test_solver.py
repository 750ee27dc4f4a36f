"""HiGHS behind the core's function type: prices, whole jobs, and nothing on standard output."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from coordinator.core.allocation import Columns
from coordinator.solver import EXHAUSTIVE, level, solve

ROOT = Path(__file__).resolve().parents[2]


def test_prices_are_what_one_more_gpu_would_be_worth() -> None:
    """Two jobs want the first type, which is worth 2.5 to the one that gets the second instead."""
    found = solve(Columns([0, 0, 1, 1], [0, 1, 0, 1], [1] * 4, [3.0, 1.0, 2.5, 2.0], 2, [1, 1]))
    assert found.shares == pytest.approx([1, 0, 0, 1])
    assert found.bound == pytest.approx(5.0)
    more = solve(Columns([0, 0, 1, 1], [0, 1, 0, 1], [1] * 4, [3.0, 1.0, 2.5, 2.0], 2, [2, 1]))
    assert more.bound - found.bound == pytest.approx(0.5)
    assert 0.5 <= found.prices[0] - found.prices[1] <= 2.0


def test_what_comes_out_in_part_is_decided_whole() -> None:
    """In parts: two jobs of two GPUs and half of the third. Whole, on five GPUs: the one of three
    with one of two is worth more than the two of two."""
    found = solve(Columns([0, 1, 2], [0, 0, 0], [2, 2, 3], [2.2, 2.1, 3.0], 3, [5]))
    assert found.shares == pytest.approx([1, 0, 1])
    assert found.bound == pytest.approx(2.2 + 2.1 + 1.0), "the bound is that of parts"


def test_an_exhaustive_search_also_takes_what_its_price_does_not_pay_for() -> None:
    """Three jobs of two GPUs each share five in parts, at 2 a GPU. The fifth goes to one that is
    worth less than that: which production leaves to the core's filling up."""
    columns = Columns([0, 1, 2, 3], [0] * 4, [2, 2, 2, 1], [4.0, 4.0, 4.0, 1.5], 4, [5])
    worth = [np.dot(solve(columns).shares, columns.values)]
    worth.append(np.dot(solve(columns, EXHAUSTIVE).shares, columns.values))
    assert worth == pytest.approx([8.0, 9.5])


def test_the_worst_off_is_as_well_off_as_can_be() -> None:
    """Each is twice as fast on a type of its own."""
    rates = np.array([[2.0, 1.0], [1.0, 2.0]])
    found = level(rates, np.ones(2), np.ones(2), np.ones(2))
    assert found is not None
    assert found[1] == pytest.approx(2.0)
    assert found[0] == pytest.approx(np.eye(2), abs=1e-6)


def test_nothing_is_printed() -> None:
    program = (
        "from coordinator.core.allocation import Columns; from coordinator.solver import solve;"
        "solve(Columns([0, 1, 2], [0, 0, 0], [2, 2, 3], [2.2, 2.1, 3.0], 3, [5]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True,
        env=dict(os.environ),
    )  # fmt: skip
    assert (said.stdout, said.stderr) == ("", "")
