"""Host lists are written as Slurm writes them, and read back as what they were."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.capacity.hostlist import HOSTS_MAX, read, written

NAMES = st.lists(
    st.from_regex(r"[a-c]{1,2}(-)?[0-9]{0,3}", fullmatch=True), min_size=1, max_size=30
)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("n07", "n07"),
        ("n01 n02 n03 n07", "n[01-03,07]"),
        ("n3 n1 n2", "n[1-3]"),
        ("n8 n9 n10", "n[8-10]"),
        ("n08 n09 n10 n100", "n[08-10],n100"),
        ("gpu1 login gpu2 gpu1", "gpu[1-2],login"),
        ("r1n1 r1n2 r2n1", "r1n[1-2],r2n1"),
        ("1 2", "[1-2]"),
    ],
)
def test_names_as_slurm_writes_them(names: str, text: str) -> None:
    assert written(names.split()) == text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n[01-03,07]", "n01 n02 n03 n07"),
        ("a1,b[1-2],a1", "a1 b1 b2"),
        ("rack[0-1]n[1-2]", "rack0n1 rack0n2 rack1n1 rack1n2"),
        ("n[1-2]-ib", "n1-ib n2-ib"),
        ("", ""),
    ],
)
def test_lists_of_others_are_read(text: str, names: str) -> None:
    assert read(text) == names.split()


@pytest.mark.parametrize(
    "text", ["n[", "n]", "n[]", "n[2-1]", "n[a]", "a,", ",a", "a b", "n[1-2", f"n[0-{HOSTS_MAX}]"]
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"list|range|brackets|comma|without its"):
        read(text)


def test_brackets_that_multiply_are_bounded() -> None:
    with pytest.raises(ValueError, match="more than"):
        read("n[1-1000]m[1-1000]")


@given(NAMES)
def test_what_is_written_reads_the_same(names: list[str]) -> None:
    assert sorted(read(written(names))) == sorted(set(names))
