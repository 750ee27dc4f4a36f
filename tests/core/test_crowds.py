"""Crowds: twice as many who come at once cost about twice as much, in calls and not in time.

Problem: a decision in which each of those who came asks all others is right, passes all tests of
what it says, and stops a coordinator for ten seconds on the day when five hundred come. Seconds are
no test; how many functions are called is the same on every machine. The crowds and their fleets are
those of `bench/crowds.py`.
"""

import sys
from collections.abc import Sequence
from types import FrameType

import pytest

from bench import crowds
from coordinator.core.messages import Event, Tick

pytestmark = pytest.mark.long

SIZE = 160
# Twice as much, and what else grows: a sort, and up to 64 nodes that are weighed for each of them,
# of which a small fleet has not as many. Where each asked each it would be four.
GROWTH_MAX = 2.3


def calls_of(name: str, size: int) -> int:
    """Of the batch that calls the most functions."""
    crowd = crowds.CROWDS[name]
    crowded = crowds.joined(crowd, size)
    most = 0

    def batch(events: Sequence[Event]) -> None:
        nonlocal most
        calls = 0

        def count(_: FrameType, what: str, __: object) -> None:
            nonlocal calls
            calls += what in ("call", "c_call")

        sys.setprofile(count)
        try:
            crowded.fleet.batch(*events)
        finally:
            sys.setprofile(None)
        most = max(most, calls)

    for events in crowd.coming(crowded, size):
        batch(events)
    batch([])
    crowded.pass_ms(60_000)
    batch([Tick()])
    return most


@pytest.mark.parametrize("name", crowds.CROWDS)
def test_twice_as_many_cost_twice_as_much(name: str) -> None:
    assert calls_of(name, 2 * SIZE) <= GROWTH_MAX * calls_of(name, SIZE)
