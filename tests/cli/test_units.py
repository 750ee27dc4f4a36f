"""Sizes and durations: exact where they are clear, refused with a sentence where they are not."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.cli import units

POWERS = {"": 0, "B": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


@given(st.integers(0, 8191), st.sampled_from("KMGTP"), st.booleans(), st.sampled_from(["", " "]))
def test_a_size_is_its_number_times_its_unit(
    number: int, prefix: str, binary: bool, gap: str
) -> None:
    text = f"{number}{gap}{prefix}{'iB' if binary else 'B'}"
    expected = number * (1024 if binary else 1000) ** POWERS[prefix]
    assert units.parse_size(text) == expected
    assert units.parse_size(text.lower()) == expected


@given(st.integers(0, units.SIZE_BYTES_MAX))
def test_plain_bytes_are_bytes(size_bytes: int) -> None:
    assert units.parse_size(str(size_bytes)) == size_bytes


@given(st.decimals(0, 8000, places=3))
def test_a_fraction_is_exact_or_refused(number: Decimal) -> None:
    exact = number * 1024**2
    if exact == int(exact):
        assert units.parse_size(f"{number:f}MiB") == int(exact)
    else:
        with pytest.raises(ValueError, match="whole number of bytes"):
            units.parse_size(f"{number:f}MiB")


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_sentence(text: str) -> None:
    sentence = repr(text)
    try:
        amount = units.parse_size(text)
    except ValueError as error:
        amount, sentence = 0, str(error)
    assert 0 <= amount <= units.SIZE_BYTES_MAX
    assert repr(text) in sentence


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("40G", "'40G' is ambiguous; write 40GiB (powers of 1024) or 40GB (powers of 1000)"),
        ("40Q", "'40Q' has an unknown unit"),
        ("-1", "'-1' is not a size"),
        ("", "'' is not a size"),
        ("9223372036854775808", "more than 9223372036854775807 bytes"),
        ("99999999999999999999PB", "more than 9223372036854775807 bytes"),
    ],
)
def test_a_size_that_is_not_clear_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        units.parse_size(text)
    assert said in str(caught.value)


@given(st.integers(0, units.DURATION_MS_MAX))
def test_a_duration_survives_being_written_and_read(duration_ms: int) -> None:
    assert units.parse_duration(units.format_duration(duration_ms)) == duration_ms


@given(st.text(alphabet="0123456789dhms .-", max_size=10))
def test_any_text_is_a_duration_or_a_sentence(text: str) -> None:
    sentence = repr(text)
    try:
        amount = units.parse_duration(text)
    except ValueError as error:
        amount, sentence = 0, str(error)
    assert 0 <= amount <= units.DURATION_MS_MAX
    assert repr(text) in sentence


@pytest.mark.parametrize(
    ("text", "duration_ms"),
    [("120s", 120_000), ("5m", 300_000), ("2h", 7_200_000), ("1h30m", 5_400_000), ("500ms", 500)],
)
def test_durations(text: str, duration_ms: int) -> None:
    assert units.parse_duration(text) == duration_ms


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("120", "'120' has no unit; write 120s for seconds or 120m for minutes"),
        ("soon", "'soon' is not a duration"),
        ("1m1m", "'1m1m' names a unit twice"),
        ("999999999999999d", "is longer than"),
    ],
)
def test_a_duration_that_is_not_clear_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        units.parse_duration(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1_300_000_000, "1.21 GiB"),
        (40 * 10**9, "40 GB"),
        (40 * 2**30, "40 GiB"),
        (1023 * 2**30, "0.999 TiB"),
        (2**63 - 1, "8 EiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert units.format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (0, "0s"),
        (59.9, "59s"),
        (192, "3m12s"),
        (3600, "1h00m"),
        (7500, "2h05m"),
        (273_600, "3d04h"),
    ],
)
def test_spans_for_people(seconds: float, text: str) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    assert units.format_span(start, start + timedelta(seconds=seconds)) == text
    assert units.format_span(None, start) == "-"
