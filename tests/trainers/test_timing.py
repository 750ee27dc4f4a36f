"""The trainer's own clock: whatever is nested in whatever, the totals are the time that passed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.timing import CAPTURE_S, INPUT_WAIT_S, STEP_S, Timing


class Hand:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_what_is_inside_does_not_count_twice() -> None:
    hand = Hand()
    timing = Timing(hand)
    with timing.measure(STEP_S):
        hand.now_s += 2
        hand.now_s += 1
        timing.add(INPUT_WAIT_S, 1)
        with timing.measure(CAPTURE_S):
            hand.now_s += 4
        hand.now_s += 3
        assert timing.totals() == {INPUT_WAIT_S: 1, CAPTURE_S: 4}
    assert timing.totals() == {INPUT_WAIT_S: 1, CAPTURE_S: 4, STEP_S: 5}


def test_a_block_that_fails_has_taken_its_time() -> None:
    hand = Hand()
    timing = Timing(hand)

    def fill() -> None:
        with timing.measure(CAPTURE_S):
            hand.now_s += 4
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill()
    with timing.measure(STEP_S):
        hand.now_s += 1
    assert timing.totals() == {CAPTURE_S: 4, STEP_S: 1}


def test_somebody_with_a_faster_clock_makes_nothing_negative() -> None:
    timing = Timing(Hand())
    with timing.measure(STEP_S):
        timing.add(INPUT_WAIT_S, 1)
    assert timing.totals() == {INPUT_WAIT_S: 1, STEP_S: 0}


NAMES = st.sampled_from(["a", "b", "c"])
BLOCKS = st.recursive(
    st.tuples(NAMES, st.integers(0, 9), st.just(())),
    lambda inner: st.tuples(NAMES, st.integers(0, 9), st.lists(inner, max_size=3).map(tuple)),
    max_leaves=20,
)


@given(st.lists(BLOCKS, max_size=5))
def test_totals_are_the_time_that_passed(blocks: list[tuple[str, int, tuple[object, ...]]]) -> None:
    hand = Hand()
    timing = Timing(hand)

    def run(block: tuple[str, int, tuple[object, ...]]) -> None:
        name, seconds, inner = block
        with timing.measure(name):
            hand.now_s += seconds
            for one in inner:
                run(one)  # type: ignore[arg-type]

    for block in blocks:
        run(block)
    assert sum(timing.totals().values()) == hand.now_s - 100
