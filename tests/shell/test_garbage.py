"""When the coordinator looks for garbage, and that a fleet at work leaves none to be found."""

import asyncio
import gc
import sys
from collections.abc import Iterator

import pytest

from coordinator import garbage
from coordinator.core.messages import AttemptMilestone, FromAgent, Heartbeat
from coordinator.core.model import GpuReading
from tests.core.test_gpu_health import Fleet


@pytest.fixture(autouse=True)
def python_as_before() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize(
    ("new", "left", "since_s", "due"),
    [
        (0, 0, 0.0, False),
        (garbage.NEW_MIN, 0, 10.0, False),
        (garbage.NEW_MIN + 1, 0, 10.0, True),
        (garbage.NEW_MIN + 1, 1_300_000, 10.0, False),
        (650_001, 1_300_000, 10.0, True),
        (0, 1_300_000, garbage.SECONDS_MAX, True),
    ],
)
def test_everything_is_walked_when_half_as_much_is_new(
    new: int, left: int, since_s: float, due: bool
) -> None:
    assert garbage.is_due(new, left, since_s) is due


class _Knot:
    def __init__(self) -> None:
        self.own = self


async def test_old_cycles_that_add_up_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "YOUNG_INTERVAL_S", 0.0)
    monkeypatch.setattr(garbage, "LOOK_INTERVAL_S", 0.0)
    monkeypatch.setattr(garbage, "NEW_MIN", 100)
    monkeypatch.setattr(garbage, "_collect", found := _Collections())
    collecting = asyncio.create_task(garbage.collect_seldom())
    await asyncio.sleep(0)
    assert found.left == [0], "once at the start"
    while len(found.left) == 1:
        grown = [_Knot() for _ in range(100)]
        gc.collect(1)  # they are old now
        del grown
        await asyncio.sleep(0)
    assert found.left[1] >= 100
    collecting.cancel()
    await asyncio.gather(collecting, return_exceptions=True)
    assert gc.isenabled(), "Python's own rule holds again"


async def test_young_cycles_do_not_wait_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that was refused holds its request."""
    monkeypatch.setattr(garbage, "YOUNG_INTERVAL_S", 0.0)
    collecting = asyncio.create_task(garbage.collect_seldom())
    await asyncio.sleep(0)
    for _ in range(100):
        _Knot()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not any(isinstance(one, _Knot) for one in gc.get_objects())
    collecting.cancel()
    await asyncio.gather(collecting, return_exceptions=True)


async def test_what_is_replaced_all_the_time_does_not_add_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many go as come, so Python's own rule would never look through them."""
    monkeypatch.setattr(garbage, "YOUNG_INTERVAL_S", 0.0)
    collecting = asyncio.create_task(garbage.collect_seldom())
    await asyncio.sleep(0)
    kept: list[list[int]] = [[] for _ in range(500)]
    for _ in range(5):
        for place in range(len(kept)):
            kept[place] = [place]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        young = {id(one) for one in gc.get_objects(generation=0)}
        assert not any(id(one) in young for one in kept)
    collecting.cancel()
    await asyncio.gather(collecting, return_exceptions=True)


class _Collections:
    """What each found of our knots."""

    def __init__(self) -> None:
        self.left: list[int] = []

    def __call__(self) -> int:
        self.left.append(sum(isinstance(one, _Knot) for one in gc.get_objects()))
        gc.collect()
        return sys.getallocatedblocks()


def test_reports_and_events_leave_nothing_to_be_found() -> None:
    fleet = Fleet({"n1": 2, "n2": 2})
    job = fleet.submit()
    node = fleet.rig.disk.attempts[f"{job}.1"].node
    gc.collect()
    gc.disable()
    for number in range(1, 20):
        for name, session in fleet.sessions.items():
            read = tuple(
                GpuReading(f"{name}-g{index}", used_ratio=number / 20) for index in range(2)
            )
            beat = Heartbeat(number, gpus=read, attempts=fleet.held(name))
            fleet.rig.handle(FromAgent(session, beat))
        fleet.event(node, f"{job}.1", AttemptMilestone(f"m{number}"))
    assert gc.collect() == 0
