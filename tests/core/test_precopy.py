"""When a node saves once before it asks an attempt to leave: never for less than it costs."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from agent.core.precopy import GAIN_MS_MIN, Known, decide

MEGABYTE = 1_000_000
FROZEN = Known(
    heeds=True,
    captures=True,
    target="n2",
    size_bytes=400 * MEGABYTE,
    change_bytes=2 * MEGABYTE,
    copied=False,
    bytes_per_ms=100_000,
)
ANY = st.builds(
    Known,
    heeds=st.booleans(),
    captures=st.booleans(),
    target=st.sampled_from(["", "n2"]),
    size_bytes=st.integers(0, 10**12),
    change_bytes=st.integers(0, 10**12),
    copied=st.booleans(),
    bytes_per_ms=st.integers(0, 10**8),
)


@given(ANY)
def test_a_precopy_saves_more_than_it_costs(known: Known) -> None:
    decision = decide(known)
    assert decision.why
    if decision.first:
        assert known.heeds
        assert known.target
        assert not known.copied
        spared_bytes = known.size_bytes - known.change_bytes
        assert spared_bytes >= GAIN_MS_MIN * known.bytes_per_ms


@given(ANY, st.integers(1, 10**12))
def test_more_to_spare_is_no_reason_against_it(known: Known, more_bytes: int) -> None:
    if known.captures and decide(known).first:
        assert decide(replace(known, size_bytes=known.size_bytes + more_bytes)).first


def test_a_frozen_backbone_that_the_standby_lacks_goes_first() -> None:
    decision = decide(FROZEN)
    assert decision.first
    assert decision.why == "398 MB of 400 MB can go to n2 before the stop, about 3980 ms"


def test_a_state_that_changes_everywhere_is_sent_once() -> None:
    decision = decide(replace(FROZEN, change_bytes=400 * MEGABYTE))
    assert (decision.first, decision.why) == (
        False,
        "0 MB of 400 MB can go to n2 before the stop, which would save 0 ms: too little",
    )


def test_a_fast_link_needs_no_precopy() -> None:
    assert not decide(replace(FROZEN, bytes_per_ms=5_000_000)).first


def test_a_directory_costs_the_training_a_pause() -> None:
    """A capture does not, which is why the same gain is enough there."""
    slower = replace(FROZEN, bytes_per_ms=400_000)
    assert decide(slower).first
    assert not decide(replace(slower, captures=False)).first
