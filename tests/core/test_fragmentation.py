"""Expected fragmentation, counted again the slow way; and that the least of it is chosen.

Problem: tables that are looked up instead of summed are right until one index is off by one, and a
placement that is slightly wrong looks like any other. So random mixes and nodes are drawn, and each
figure is compared with its definition, request by request and GPU by GPU.
"""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.fragmentation import (
    PARTS,
    STARVED_TENTHS,
    Ask,
    Box,
    Kind,
    Mix,
    afters_of,
)

SMALL, LARGE = (24, "RTX 4090"), (80, "H100")
KINDS = st.sampled_from([SMALL, LARGE])
HOSTS = st.tuples(st.integers(0, 16), st.sampled_from([0, 10, 40]))
ASKS = st.builds(
    Ask,
    gpus=st.sampled_from([0, 1, 1, 2, 4]),
    host=HOSTS,
    wants=st.sampled_from([(PARTS, ""), (PARTS, "H100")]),
) | st.builds(
    Ask,
    gpus=st.just(1),
    host=HOSTS,
    wants=st.sampled_from([(100, ""), (470, ""), (810, ""), (500, "RTX 4090")]),
)
COUNTS = st.dictionaries(ASKS, st.integers(1, 50), max_size=8)


def _parts(ask: Ask, kind: Kind) -> int:
    assert isinstance(ask.wants, tuple)
    parts, name = ask.wants
    return int(parts) if name in ("", kind[1]) else 0


def _placed(mix: Mix, box: Box, ask: Ask) -> tuple[int, Box] | None:
    """The least increase, and what is then left; `None` where it does not fit."""
    ways = [(mix.increase(box, after), after) for after in afters_of(box, ask, _parts)]
    return min(ways, default=None)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    lefts = st.sampled_from([PARTS, PARTS, PARTS, 530, 190, 60])
    gpus = draw(st.lists(st.tuples(KINDS, lefts), max_size=6))
    return Box((draw(st.integers(0, 40)), draw(st.integers(0, 100))), tuple(sorted(gpus)))


def _lost_slowly(counts: dict[Ask, int], box: Box) -> int:
    """The paper's definition."""
    lost = 0
    for ask, count in counts.items():
        if not ask.gpus:
            continue
        able = [left for kind, left in box.gpus if 0 < _parts(ask, kind) <= left]
        fits = len(able) >= ask.gpus
        fits = fits and all(need <= have for need, have in zip(ask.host, box.host, strict=True))
        lost += count * (box.left - (sum(able) if fits else 0))
    return lost


@given(COUNTS, boxes())
def test_fragmentation_is_what_the_paper_says(counts: dict[Ask, int], box: Box) -> None:
    assert Mix(counts, _parts).lost(box) == _lost_slowly(counts, box)


@pytest.mark.long
@given(COUNTS, st.lists(boxes(), max_size=8))
def test_what_is_remembered_is_what_a_new_mix_says(
    counts: dict[Ask, int], drawn: list[Box]
) -> None:
    """In whatever order nodes were looked at before."""
    mix = Mix(counts, _parts)
    for box in [*drawn, *reversed(drawn)]:
        assert mix.cost(box) == Mix(dict(reversed(counts.items())), _parts).cost(box)


@given(boxes(), ASKS)
def test_a_request_takes_what_it_asks_for_and_nothing_more(box: Box, ask: Ask) -> None:
    for after in afters_of(box, ask, _parts):
        assert after.host == tuple(a - b for a, b in zip(box.host, ask.host, strict=True))
        assert min(after.host) >= 0
        before, then = Counter(box.gpus), Counter(after.gpus)
        taken = list((before - then).elements())
        assert len(taken) == ask.gpus
        assert box.left - after.left == sum(_parts(ask, kind) for kind, _ in taken)
        assert all(left >= _parts(ask, kind) > 0 for kind, left in taken)


@pytest.mark.long
@given(COUNTS, boxes(), st.lists(ASKS, max_size=12))
def test_no_gpu_is_given_twice_in_any_history(
    counts: dict[Ask, int], box: Box, asks: list[Ask]
) -> None:
    mix = Mix(counts, _parts)
    given_parts, left = 0, box
    for ask in asks:
        chosen = _placed(mix, left, ask)
        if chosen is not None:
            given_parts += left.left - chosen[1].left
            left = chosen[1]
    assert given_parts + left.left == box.left
    assert all(0 < parts <= PARTS for _, parts in left.gpus)


def _mix(*counts: tuple[Ask, int]) -> Mix:
    return Mix(dict(counts), _parts)


def test_a_gap_that_nobody_can_use_is_lost() -> None:
    share = Ask(1, (0, 0), (810, ""))
    mix = _mix((share, 3))
    assert mix.lost(Box((8, 0), ((LARGE, PARTS),))) == 0
    assert mix.lost(Box((8, 0), ((LARGE, 190),))) == 3 * 190


def test_a_share_goes_into_the_gap_that_nobody_else_can_use() -> None:
    """Though another one fits as well, and a whole GPU is free."""
    mix = _mix((Ask(1, (0, 0), (810, "")), 5), (Ask(1, (0, 0), (100, "")), 1))
    box = Box((8, 0), ((LARGE, 190), (LARGE, 810), (LARGE, PARTS)))
    chosen = _placed(mix, box, Ask(1, (0, 0), (100, "")))
    assert chosen is not None
    assert chosen[1].gpus == ((LARGE, 90), (LARGE, 810), (LARGE, PARTS))


def test_pairs_of_gpus_are_kept_for_those_who_want_pairs() -> None:
    """Of two nodes the one with three, of which a pair stays; the tightest fit breaks the pair."""
    single, pair = Ask(1, (0, 0), (PARTS, "")), Ask(2, (0, 0), (PARTS, ""))
    mix = _mix((single, 1), (pair, 1))
    three, two = (Box((8, 0), ((LARGE, PARTS),) * count) for count in (3, 2))
    of_three, of_two = _placed(mix, three, single), _placed(mix, two, single)
    assert of_three is not None
    assert of_two is not None
    assert of_three[0] < of_two[0]


def test_gpus_that_a_host_cannot_feed_count_before_the_last_request_fails() -> None:
    """Eight cores a GPU is what they take. Four GPUs with sixteen cores feed two, though one more
    request fits."""
    ask = Ask(1, (8, 0), (PARTS, ""))
    mix = _mix((ask, 2))
    box = Box((16, 0), ((LARGE, PARTS),) * 4)
    assert mix.lost(box) == 0
    assert mix.starved(box) == 2 * PARTS
    assert mix.cost(box) == STARVED_TENTHS * 2 * 2 * PARTS


def test_requests_without_gpus_have_no_say() -> None:
    mix = _mix((Ask(0, (16, 0), (PARTS, "")), 9))
    assert mix.total == 0
    assert mix.cost(Box((16, 0), ((LARGE, 190),))) == 0


def test_how_many_requests_fit() -> None:
    pair, share = Ask(2, (0, 0), (PARTS, "")), Ask(1, (0, 0), (100, ""))
    mix = _mix((pair, 3), (share, 4))
    assert mix.fitting(Box((0, 0), ((LARGE, PARTS),))) == 4
    assert mix.fitting(Box((0, 0), ((LARGE, PARTS),) * 2)) == mix.total == 7
