"""Estimates of speed: rules that hold for any history, and answers that are known.

Problem: a wrong variance is worse than a wrong mean, since it is what a scheduler would believe. So
the rules are properties over drawn histories: every measurement narrows, the order does not count,
and the unit of work does not either.
"""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import estimates, gpu_types
from coordinator.core.estimates import (
    NOTHING,
    Estimate,
    Knowledge,
    Measurement,
    Observation,
    Place,
    estimate,
    learn,
)
from coordinator.core.rates import Work, place_prior

TYPES = ("H100", "A100 80GB", "RTX 4090", "V100", "a type of its own")
PLACES = st.builds(Place, st.sampled_from(TYPES), st.sampled_from((1, 2, 8)))
WORK = Work(flops=1e14, traffic_bytes=1e11, half=True)


def measured(place: Place, rate: float, seconds: float, work: Work | None = None) -> Measurement:
    return Measurement(place, place_prior(place, work), rate, seconds)


MEASUREMENTS = st.builds(measured, PLACES, st.floats(1e-3, 1e3), st.floats(5, 1e5))
HISTORIES = st.lists(
    st.builds(Observation, st.sampled_from(("a", "b", "c", "d")), MEASUREMENTS), max_size=12
)
KIN = st.lists(
    st.builds(Observation, st.sampled_from(("own", "own", "sibling")), MEASUREMENTS), max_size=8
)


def said(knowledge: Knowledge, kin: list[Observation], place: Place) -> Estimate | None:
    return estimate(knowledge, kin, "own", place, place_prior(place))


@pytest.mark.long
@settings(deadline=None)
@given(HISTORIES, KIN, MEASUREMENTS, PLACES)
def test_what_is_measured_narrows(
    history: list[Observation], kin: list[Observation], more: Measurement, place: Place
) -> None:
    knowledge = learn(history)
    before = said(knowledge, kin, place)
    after = said(knowledge, [*kin, Observation("own", more)], place)
    if before is not None:
        assert after is not None
        assert after.variance <= before.variance * (1 + 1e-6) + 1e-9
    if after is not None:
        assert after.variance > 0
        low, high = after.band
        assert 0 <= low <= after.steps_per_s <= high


@pytest.mark.long
@settings(deadline=None)
@given(HISTORIES, KIN, PLACES, st.randoms(use_true_random=False))
def test_the_order_does_not_count(
    history: list[Observation], kin: list[Observation], place: Place, chance: object
) -> None:
    mixed_history, mixed_kin = list(history), list(kin)
    chance.shuffle(mixed_history)  # type: ignore[attr-defined]
    chance.shuffle(mixed_kin)  # type: ignore[attr-defined]
    one = said(learn(history), kin, place)
    other = said(learn(mixed_history), mixed_kin, place)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.mean == pytest.approx(other.mean, abs=1e-6)
        assert one.variance == pytest.approx(other.variance, rel=1e-6)


@pytest.mark.long
@settings(deadline=None)
@given(HISTORIES, KIN, PLACES, st.floats(1e-3, 1e3))
def test_another_unit_of_work_is_another_rate_and_nothing_else(
    history: list[Observation], kin: list[Observation], place: Place, factor: float
) -> None:
    def scaled(one: Observation) -> Observation:
        told = one.measurement
        return replace(one, measurement=replace(told, steps_per_s=told.steps_per_s * factor))

    knowledge = learn(history)
    one = said(knowledge, kin, place)
    other = said(knowledge, [scaled(found) for found in kin], place)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert other.mean - one.mean == pytest.approx(math.log(factor), abs=1e-2)
        assert other.variance == pytest.approx(one.variance, rel=1e-6)


def test_of_what_nothing_is_known_nothing_is_said() -> None:
    own = Observation("own", measured(Place("V100", 1), 5.0, 60))
    assert said(NOTHING, [], Place("H100", 1)) is None
    assert said(NOTHING, [own], Place("a type of its own", 1)) is None
    assert said(NOTHING, [own], Place("H100", 1)) is not None


def test_known_work_is_judged_by_facts_alone() -> None:
    place = Place("H100", 1)
    found = estimate(NOTHING, [], "own", place, place_prior(place, WORK))
    assert found is not None
    # 1e14 operations at 40% of 989 TFLOP/s, and 1e11 bytes at 70% of 3,350 GB/s.
    assert found.steps_per_s == pytest.approx(1 / (1e14 / 395.6e12 + 1e11 / 2345e9))
    low, high = found.band
    assert 1.5 < found.steps_per_s / low < 2.5
    assert high / found.steps_per_s == pytest.approx(found.steps_per_s / low)


def test_an_unknown_type_that_was_measured_is_what_was_measured() -> None:
    place = Place("a type of its own", 1)
    long = Observation("own", measured(place, 7.0, 36_000))
    found = said(NOTHING, [long], place)
    assert found is not None
    assert found.steps_per_s == pytest.approx(7.0, rel=0.01)
    assert math.sqrt(found.variance) < 0.03


def test_the_fleet_teaches_by_how_much_facts_are_wrong_of_a_type() -> None:
    """Every job is a third of what facts say on an A100, against an H100."""
    fast, slow = Place("H100", 1), Place("A100 80GB", 1)
    ratio = math.exp(place_prior(slow).log_rate - place_prior(fast).log_rate)
    history = []
    for index in range(12):
        rate = 2.0 + index
        history.append(Observation(str(index), measured(fast, rate, 3600)))
        history.append(Observation(str(index), measured(slow, rate * ratio / 3, 3600)))
    own = [Observation("own", measured(fast, 100.0, 3600))]
    by_facts, by_fleet = said(NOTHING, own, slow), said(learn(history), own, slow)
    assert by_facts is not None
    assert by_fleet is not None
    assert by_facts.steps_per_s == pytest.approx(100 * ratio, rel=0.05)
    assert by_fleet.steps_per_s == pytest.approx(100 * ratio / 3, rel=0.1)
    assert by_fleet.variance < by_facts.variance


def test_a_job_that_gains_little_from_a_faster_type_gains_little_from_another() -> None:
    """That is completion: the log-additive model says the same for every job."""
    slow, middle, fast = Place("V100", 1), Place("A100 80GB", 1), Place("H100", 1)
    priors = {place: place_prior(place).log_rate for place in (slow, middle, fast)}
    history = []
    for index, gain in enumerate((0.4, 0.7, 1.0, 1.3) * 3):
        for place, log_rate in priors.items():
            rate = math.exp(gain * log_rate)
            history.append(Observation(str(index), measured(place, rate, 36_000)))
    own = [
        Observation("own", measured(slow, math.exp(0.4 * priors[slow]), 36_000)),
        Observation("own", measured(middle, math.exp(0.4 * priors[middle]), 36_000)),
    ]
    truth = 0.4 * priors[fast]
    completed = said(learn(history), own, fast)
    additive = said(learn(history, completes=False), own, fast)
    assert completed is not None
    assert additive is not None
    assert abs(completed.mean - truth) < 0.8 * abs(additive.mean - truth)


def test_siblings_teach_what_is_common() -> None:
    """Another batch size of the same model was slow on this type: so may this one be."""
    there, here = Place("H100", 1), Place("RTX 4090", 1)
    usual = math.exp(place_prior(here).log_rate - place_prior(there).log_rate)
    own = Observation("own", measured(there, 10.0, 3600))
    sibling = [
        Observation("sibling", measured(there, 40.0, 3600)),
        Observation("sibling", measured(here, 40.0 * usual / 2, 3600)),
    ]
    alone, together = said(NOTHING, [own], here), said(NOTHING, [own, *sibling], here)
    assert alone is not None
    assert together is not None
    assert together.steps_per_s < 0.75 * alone.steps_per_s
    assert together.variance < alone.variance


def test_a_family_without_bound_is_cut_and_the_own_job_stays() -> None:
    siblings = [
        Observation(f"sibling {index}", measured(Place("H100", 1), 3.0, 3600))
        for index in range(estimates.KIN_MAX * 2)
    ]
    own = Observation("own", measured(Place("V100", 1), 5.0, 36_000))
    found = said(NOTHING, [*siblings, own], Place("V100", 1))
    assert found is not None
    assert found.steps_per_s == pytest.approx(5.0, rel=0.02)


@pytest.mark.parametrize(
    ("name", "memory_gib", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 79, "H100"),
        ("NVIDIA H100 PCIe", 79, "H100 PCIe"),
        ("NVIDIA H200", 140, "H200"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", 40, "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", 24, "RTX 4090"),
        ("NVIDIA L40S", 45, "L40S"),
        ("NVIDIA L4", 22, "L4"),
        ("Tesla V100-SXM2-16GB", 16, "V100"),
        ("Tesla T4", 15, "T4"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10, "NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, "NVIDIA GeForce RTX 4090 Laptop GPU"),
        ("NVIDIA Jetson Orin", 8, "NVIDIA Jetson Orin"),
    ],
)
def test_names_as_drivers_say_them(name: str, memory_gib: int, key: str) -> None:
    assert gpu_types.key_of(name, memory_gib * gpu_types.GIB) == key


def test_faster_types_are_faster_and_16_bits_are_not_slower() -> None:
    for work_half in (False, True):
        order = ("T4", "V100", "A100 80GB", "H100", "H200", "B200")
        rates = [place_prior(Place(name, 1), half=work_half).log_rate for name in order]
        assert rates == sorted(rates)
    for known in gpu_types.TYPES:
        place = Place(known.key, 1)
        single = place_prior(place, replace(WORK, half=False)).log_rate
        assert place_prior(place, WORK).log_rate >= single - math.log(1.5)
