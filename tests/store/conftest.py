"""Every store under one roof: `make_world()` gives a fresh, empty world of each kind in turn."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.store.worlds import MemoryWorld, SqliteWorld, World


@pytest.fixture(params=["memory", "sqlite"])
def make_world(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], World]:
    numbers = count()

    def make() -> World:
        if request.param == "memory":
            return MemoryWorld()
        return SqliteWorld(tmp_path / f"world-{next(numbers)}" / "state.sqlite3")

    return make


@pytest.fixture
def world(make_world: Callable[[], World]) -> World:
    return make_world()
