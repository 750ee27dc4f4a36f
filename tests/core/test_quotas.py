"""Whose turn it is by quota: the arithmetic by hand, and what must hold of drawn claims.

What follows for a fleet is in `test_projects.py` and, over whole histories, in `tests/simulate`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import gpu_types
from coordinator.core.ledger import MS_PER_H, Ledger, Stay
from coordinator.core.options import Options
from coordinator.core.quotas import (
    AHEAD_H,
    HALF_LIFE_H,
    MEAN_LIFE_H,
    PARTS,
    WEIGHTS,
    Claim,
    Quota,
    entitled_gpus,
    lending_weights,
    lent,
    weight_parts,
)
from tests.core.training_fleet import Fleet

NOW_MS = 500_000 * MS_PER_H + 1_234_567
DAY = Quota(24.0)  # one GPU of weight 1, without a pause


def claim(job_id: int, gpus: float = 1.0, project: str = "a", **more: object) -> Claim:
    made = Claim(job_id, project, 1, job_id, gpus, runs=False)
    return replace(made, **more)  # type: ignore[arg-type]


def used(*stays: Stay, now_ms: int = NOW_MS) -> Mapping[str, float]:
    ledger = Ledger()
    for number, stay in enumerate(stays):
        ledger.note(str(number), stay)
    return ledger.used_h(now_ms)


# --- what a type counts ---------------------------------------------------------------------------


def test_what_is_faster_in_public_counts_for_more() -> None:
    assert weight_parts("NVIDIA H100 80GB HBM3") == 1_000
    order = ["B200", "H200", "H100", "A100 80GB", "A100 40GB", "RTX 4090", "RTX 3090", "K80"]
    weights = [WEIGHTS[key] for key in order]
    assert weights == sorted(weights, reverse=True)
    assert len({*weights}) == len(weights)
    assert min(WEIGHTS.values()) > 0
    assert list(WEIGHTS) == [known.key for known in gpu_types.TYPES]


def test_the_page_for_operators_has_the_weights() -> None:
    page = (Path(__file__).parents[2] / "docs/quotas.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert {row[0]: row[1] for row in rows[1:]} == {
        key: f"{parts / PARTS:.3f}" for key, parts in WEIGHTS.items()
    }
    assert f"after {HALF_LIFE_H:.1f} hours" in page


def test_an_unknown_type_counts_as_an_h100() -> None:
    assert weight_parts("NVIDIA Made-up 9000") == 1_000


# --- what was used --------------------------------------------------------------------------------


def test_steady_use_comes_to_as_much_as_a_day_of_it() -> None:
    """Whatever it began with: after a week of half a GPU, twelve GPU-hours."""
    week = Stay("a", 500, NOW_MS - 400 * MS_PER_H)
    assert used(week)["a"] == pytest.approx(12, rel=1e-3)
    ended = replace(week, end_ms=NOW_MS)
    assert used(ended)["a"] == pytest.approx(12, rel=2e-3)


def test_half_is_forgotten_after_a_half_life() -> None:
    stay = Stay("a", 1_000, NOW_MS - 2 * MS_PER_H, NOW_MS)
    later_ms = NOW_MS + round(HALF_LIFE_H * MS_PER_H)
    now, later = used(stay)["a"], used(stay, now_ms=later_ms)["a"]
    assert now == pytest.approx(MEAN_LIFE_H * -math.expm1(-2 / MEAN_LIFE_H), rel=1e-2)
    assert later == pytest.approx(now / 2, rel=1e-2)


def test_the_end_of_a_stay_changes_little_of_what_it_has_used() -> None:
    for minutes in (1, 59, 60, 61, 600):
        going = Stay("a", 700, NOW_MS - minutes * 60_000)
        ended = replace(going, end_ms=NOW_MS)
        assert used(ended)["a"] == pytest.approx(used(going)["a"], rel=0.01)


STAYS = st.builds(
    Stay,
    st.sampled_from("ab"),
    st.integers(0, 16_000),
    st.integers(NOW_MS - 300 * MS_PER_H, NOW_MS + MS_PER_H),
)


@given(
    st.lists(st.tuples(STAYS, st.none() | st.integers(0, 400 * MS_PER_H)), max_size=12), st.data()
)
def test_what_is_kept_is_all_that_counts(
    drawn: list[tuple[Stay, int | None]], data: st.DataObject
) -> None:
    """To the last digit: in whichever order it came, and whatever was forgotten in between."""
    stays = {
        str(number): stay if ms is None else replace(stay, end_ms=stay.begin_ms + ms)
        for number, (stay, ms) in enumerate(drawn)
    }
    busy = Ledger()
    for name in data.draw(st.permutations(sorted(stays))):
        busy.note(name, replace(stays[name], end_ms=None))
    for name in data.draw(st.permutations(sorted(stays))):
        busy.note(name, stays[name])
    gone = [name for name in sorted(stays) if data.draw(st.booleans())]
    for name in gone:
        busy.forget(name)
    plain = Ledger()
    for name, stay in stays.items():
        if name not in gone:
            plain.note(name, stay)
    assert busy == plain
    assert busy.used_h(NOW_MS) == plain.used_h(NOW_MS)
    for project, hours in busy.used_h(NOW_MS).items():
        held = [stay.parts for stay in plain.stays.values() if stay.project == project]
        assert 0 <= hours <= sum(held) / 1_000 * MEAN_LIFE_H * 1.01


# --- what that entitles to ------------------------------------------------------------------------


def test_entitlement_takes_a_project_to_its_quota_in_the_time_ahead() -> None:
    kept = math.exp(-AHEAD_H / MEAN_LIFE_H)
    for used_h in (0.0, 10.0, 24.0):
        gpus = entitled_gpus(DAY, used_h)
        then_h = used_h * kept + gpus * MEAN_LIFE_H * (1 - kept)
        assert then_h == pytest.approx(DAY.gpu_hours)
    assert entitled_gpus(DAY, DAY.gpu_hours) == pytest.approx(1), "it may go on as it is"
    assert entitled_gpus(DAY, 2 * DAY.gpu_hours) == 0


def test_without_quotas_nothing_is_lent() -> None:
    assert lent([claim(1), claim(2, project="b")], {}, {"a": 1e9}) == {}
    assert lending_weights({}, {"a": 1e9}) == {}


def test_who_has_no_quota_borrows_and_what_takes_no_gpu_does_not() -> None:
    claims = [claim(1), claim(2, project="b"), claim(3, 0.0, "b")]
    assert list(lent(claims, {"a": DAY}, {})) == [2]


def test_of_one_project_who_runs_comes_before_who_waits_and_the_oldest_first() -> None:
    """At its quota one GPU is left to it."""
    at = {"a": 24.0}
    assert list(lent([claim(1), claim(2), claim(3, runs=True)], {"a": DAY}, at)) == [1, 2]
    assert list(lent([claim(2), claim(1)], {"a": DAY}, at)) == [2]
    assert list(lent([claim(1), claim(2, rank=0)], {"a": DAY}, at)) == [1], "by class first"


def test_who_runs_stays_while_anything_is_left_and_who_waits_needs_room_for_all() -> None:
    at = {"a": 24.0}
    assert list(lent([claim(1, 0.5), claim(2, 4.0)], {"a": DAY}, at)) == [2]
    assert list(lent([claim(1, 0.5), claim(2, 4.0, runs=True)], {"a": DAY}, at)) == [1]


def test_a_gang_that_is_larger_than_all_entitlement_starts_below_the_quota() -> None:
    large = claim(1, 64.0)
    assert lent([large], {"a": DAY}, {"a": 23.9}) == {}
    assert list(lent([large], {"a": DAY}, {"a": 24.1})) == [1]
    assert lent([replace(large, runs=True)], {"a": DAY}, {"a": 27.0}) == {}, "and stays for a while"
    assert list(lent([replace(large, runs=True)], {"a": DAY}, {"a": 30.0})) == [1]


CLAIMS = st.builds(
    Claim,
    st.integers(1, 99),
    st.sampled_from("abc"),
    st.integers(0, 2),
    st.integers(0, 5),
    st.integers(0, 20_000).map(lambda parts: parts / 1_000),
    st.booleans(),
)
USED = st.fixed_dictionaries({name: st.floats(0, 300) for name in "abc"})


@given(st.lists(CLAIMS, max_size=12, unique_by=lambda c: c.job_id), USED, st.data())
def test_who_is_within_fits_into_what_the_project_is_entitled_to(
    claims: list[Claim], used_h: dict[str, float], data: st.DataObject
) -> None:
    """But for one that is larger than what is left, or than all; and the order of the question does
    not matter."""
    quotas = {"a": DAY, "b": Quota(300.0, 2.0)}
    found = lent(claims, quotas, used_h)
    assert lent(data.draw(st.permutations(claims)), quotas, used_h) == found
    for project, quota in quotas.items():
        limit = entitled_gpus(quota, used_h[project])
        within = [c for c in claims if c.project == project and c.job_id not in found]
        sizes = [c.gpus for c in within]
        assert sum(sizes) - max(sizes, default=0) <= limit + 1e-6
        beyond = [c for c in claims if c.project == project and c.job_id in found]
        for each in beyond:
            before = [c.gpus for c in within if (c.rank, not c.runs) <= (each.rank, not each.runs)]
            assert sum(before) + each.gpus > limit - 1e-6 or (each.runs and sum(before) >= limit)
    assert all(c.job_id in found for c in claims if c.project == "c" and c.gpus > 0)


def test_who_has_borrowed_more_weighs_less_and_never_nothing() -> None:
    quotas = {"a": DAY, "b": Quota(24.0, 3.0), "c": Quota(0.0)}
    found = lending_weights(quotas, {"a": 10.0, "b": 48.0, "c": 24.0, "d": 1e6})
    assert found == {"a": 1.0, "b": 1.5, "c": 0.5, "d": 0.1}


def test_who_is_told_of_a_quota_is_told_of_older_jobs_that_count_before_it() -> None:
    fleet = Fleet("8xA100:80", options=Options(projects={"a": Quota(gpu_hours=24.0)}))
    fleet.submit(gpus=4, project="a")
    fleet.submit(gpus=8, project="a")
    last = fleet.submit(gpus=8, project="a")
    told = fleet.state.waits[last]
    assert "leaves it now, of which 3.3 are for an older job of it that waits: jobs within" in told
    fleet.submit(gpus=8, project="b")
    assert "of which" not in fleet.state.waits[fleet.state.last_job_id]
