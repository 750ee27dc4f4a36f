"""What starts between two decisions over all jobs: cases known by hand, and what holds of any."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.allocation import Aims, Allocation, Contender, Option, allocate
from coordinator.core.backlog import Backlog, backlog_of

AIMS = Aims(balance=0)
FLEET = {"H100": 2, "K80": 1}


def job(job_id: int, gpus: int = 1, hours: float = 1.0, rank: int = 0) -> Contender:
    """Four times as fast on an H100, where it needs so many hours."""
    options = (Option("H100", gpus, 4.0), Option("K80", gpus, 1.0))
    return Contender(job_id=job_id, options=options, steps_left=hours * 14_400, rank=rank)


def backlog(jobs: list[Contender], fleet: dict[str, int] = FLEET) -> tuple[Backlog, Allocation]:
    decided = allocate(jobs, fleet, 0, AIMS)
    return backlog_of(jobs, fleet, decided, AIMS, {}), decided


def test_who_comes_takes_the_best_of_what_is_free() -> None:
    found, _ = backlog([job(1)])
    assert found.happened([], [job(2)], 0) == {2: Option("H100", 1, 4.0)}
    assert found.happened([], [job(3)], 0) == {3: Option("K80", 1, 1.0)}
    assert found.happened([], [job(4)], 0) == {}
    assert list(found.waiting) == [4]


def test_who_comes_leaves_what_is_dear_to_others() -> None:
    """An H100 is worth so much by the last decision that the K80 serves this one better."""
    found, _ = backlog([job(1)])
    found.prices = {"H100": 1.0, "K80": 0.0}
    assert found.happened([], [job(2)], 0) == {2: Option("K80", 1, 1.0)}


def test_what_comes_free_goes_to_the_most_worth_for_a_gpu() -> None:
    found, decided = backlog([job(1), job(2), job(3), job(4, hours=9), job(5, hours=2)])
    assert sorted(decided.grants) == [1, 2, 3]
    freed = next(n for n, grant in decided.grants.items() if grant.option.gpu_type == "H100")
    assert found.happened([freed], [], 0) == {5: Option("H100", 1, 4.0)}


def test_who_waits_comes_before_who_has_just_come() -> None:
    found, decided = backlog([job(1), job(2), job(3), job(4, hours=9)])
    freed = next(n for n, grant in decided.grants.items() if grant.option.gpu_type == "H100")
    assert list(found.happened([freed], [job(5, hours=0.1)], 0) or {}) == [4]


def test_a_gang_waits_for_all_its_gpus() -> None:
    fleet = {"H100": 2}
    found, decided = backlog([job(1), job(2), job(3, gpus=2)], fleet)
    first, second = sorted(decided.grants)
    assert (first, second) == (1, 2)
    assert found.happened([1], [], 0) == {}
    assert found.happened([2], [], 0) == {3: Option("H100", 2, 4.0)}


def test_an_earlier_class_that_could_have_a_later_ones_gpus_is_decided_over_all() -> None:
    found, _ = backlog([job(1, rank=1), job(2, rank=1), job(3, rank=1)])
    assert found.happened([], [job(4, rank=1)], 0) == {}
    assert found.happened([], [job(5)], 0) is None


@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 1)), min_size=1, max_size=12),
    later=st.lists(st.tuples(st.booleans(), st.integers(1, 3)), max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_no_gpu_is_promised_twice_and_none_idles(
    sizes: list[tuple[int, int]], later: list[tuple[bool, int]]
) -> None:
    fleet = {"H100": 4, "K80": 3}
    jobs = [job(n, gpus, rank=rank) for n, (gpus, rank) in enumerate(sizes, start=1)]
    found, _ = backlog(jobs, fleet)
    for number, (ends, gpus) in enumerate(later, start=100):
        ended = list(found.running)[:1] if ends else []
        came = [] if ends else [replace(job(number, gpus), submitted_ms=number)]
        if found.happened(ended, came, number) is None:
            return
        used = dict.fromkeys(fleet, 0)
        for _, name, count in found.running.values():
            used[name] += count
        assert found.free == {name: fleet[name] - used[name] for name in fleet}
        assert min(found.free.values()) >= 0
        for waiting in found.waiting.values():
            assert all(option.gpus > found.free[option.gpu_type] for option in waiting.options)
