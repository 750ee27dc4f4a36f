"""What follows when the sampler does not answer: examples, and what holds in every history."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.telemetry.watch import LEFT_BEHIND_MAX, MISSES_MAX, REPLACEMENT_MS, Watch

GPUS = ("GPU-a", "GPU-b", "GPU-c")


def events(notices: tuple[Any, ...]) -> list[str]:
    return [notice.event for notice in notices]


def test_one_miss_warns_and_three_replace() -> None:
    watch = Watch()
    assert events(watch.missed("GPU-b")) == ["sampler.late"]
    assert events(watch.missed("GPU-b")) == []
    assert not watch.replaces(0, 0)
    assert events(watch.missed("GPU-b")) == ["gpu.driver_unresponsive"]
    assert watch.replaces(0, 0)


def test_an_answer_between_two_misses_begins_anew() -> None:
    watch = Watch()
    for _ in range(2 * MISSES_MAX):
        assert events(watch.missed("")) == ["sampler.late"]
        assert watch.answered() == ()
    assert not watch.replaces(0, 0)


def test_a_driver_that_stays_unresponsive_is_reported_once_and_its_return_too() -> None:
    watch = Watch()
    said = [event for _ in range(10) for event in events(watch.missed(""))]
    assert said == ["sampler.late", "gpu.driver_unresponsive"]
    assert events(watch.answered()) == ["gpu.driver_responsive"]
    assert watch.answered() == ()


def test_a_sampler_that_ended_is_replaced_at_once_and_then_not_for_five_minutes() -> None:
    watch = Watch()
    assert events(watch.lost("killed", "")) == ["sampler.ended"]
    assert watch.replaces(7, 0)
    watch.replaced(7)
    assert not watch.replaces(7, 0)
    watch.lost("killed", "")
    assert not watch.replaces(7 + REPLACEMENT_MS - 1, 0)
    assert watch.wait_ms(7 + REPLACEMENT_MS - 1) == 1
    assert watch.replaces(7 + REPLACEMENT_MS, 0)


def test_where_many_do_not_die_no_more_are_started() -> None:
    watch = Watch()
    watch.lost("killed", "")
    assert watch.replaces(0, LEFT_BEHIND_MAX - 1)
    assert not watch.replaces(0, LEFT_BEHIND_MAX)


def test_the_suspect_comes_last_and_is_left_out_while_it_could_not_be_survived() -> None:
    watch = Watch()
    watch.missed("GPU-a")
    assert watch.order(0, GPUS) == ("GPU-b", "GPU-c", "GPU-a")
    watch.replaced(0)
    assert watch.order(0, GPUS) == ("GPU-b", "GPU-c")
    assert watch.order(REPLACEMENT_MS, GPUS) == ("GPU-b", "GPU-c", "GPU-a")
    assert events(watch.heard("GPU-a")) == ["gpu.answers_again"]
    assert watch.order(0, GPUS) == GPUS


def test_where_all_are_suspects_all_are_asked() -> None:
    watch = Watch(suspects=("GPU-b", "GPU-a"))
    watch.replaced(0)
    assert watch.order(0, ("GPU-a", "GPU-b")) == ("GPU-b", "GPU-a")


@pytest.mark.parametrize("suspects", [(), ("GPU-gone",)])
def test_a_suspect_that_is_no_longer_known_is_not_asked(suspects: tuple[str, ...]) -> None:
    assert Watch(suspects=suspects).order(0, GPUS) == GPUS


happenings = st.tuples(
    st.sampled_from(["answered", "missed", "lost", "heard"]),
    st.sampled_from(["", *GPUS]),
    st.integers(0, REPLACEMENT_MS // 2),  # how long after the last one
    st.integers(0, LEFT_BEHIND_MAX + 1),  # how many do not die
)


@given(st.lists(happenings, max_size=60))
def test_in_every_history(history: list[tuple[str, str, int, int]]) -> None:
    """Safety: never two replacements within five minutes, none past the bound, none without a
    cause; nobody is asked twice, and somebody is asked. Liveness: a cause is never forgotten."""
    watch, now_ms, replacements, cause = Watch(), 0, [-REPLACEMENT_MS], 0
    for what, gpu, passed_ms, left_behind_count in history:
        now_ms += passed_ms
        match what:
            case "answered":
                watch.answered()
                cause = 0
            case "missed":
                watch.missed(gpu)
                cause += 1
            case "lost":
                watch.lost("killed", gpu)
                cause = MISSES_MAX
            case "heard":
                watch.heard(gpu)
                assert gpu not in watch.suspects
        due = cause >= MISSES_MAX or watch.ended
        allowed = now_ms - replacements[-1] >= REPLACEMENT_MS
        bounded = left_behind_count < LEFT_BEHIND_MAX
        assert watch.replaces(now_ms, left_behind_count) == (due and allowed and bounded)
        if watch.replaces(now_ms, left_behind_count):
            watch.replaced(now_ms)
            replacements.append(now_ms)
            cause = 0
        asked = watch.order(now_ms, GPUS)
        assert len(asked) == len(dict.fromkeys(asked)) > 0
        assert all(uuid in asked or uuid in watch.suspects for uuid in GPUS)
