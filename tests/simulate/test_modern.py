"""The composed modern fleet: a trace by its seed that follows the series, and jobs that fit."""

from pathlib import Path

import pytest

from bench.scheduling_modern import (
    BIN_S,
    BINS,
    COUNTS,
    compose,
    main,
    modern_fleet,
    policies,
    read_series,
    rows,
    run,
)

# A night without arrivals, and a morning.
SERIES = [0.0] * 40 + [5.0] * 60


def test_a_composed_trace_is_one_by_its_seed_and_comes_when_the_series_says() -> None:
    fleet = modern_fleet()
    made = compose(SERIES, 1, fleet)
    assert made == compose(SERIES, 1, fleet)
    assert made != compose(SERIES, 2, fleet)
    assert len(made.jobs) > 50
    first = min(job.arrival_ms for job in made.jobs.values())
    assert first >= (40 - (len(SERIES) - BINS)) * BIN_S * 1000, "nobody came in the night"
    kinds = {job.model: job.rates for job in made.jobs.values()}
    assert "RTX 4090" not in kinds["full-8B"], "it has too little memory"
    assert set(kinds["gpt2"]) == set(COUNTS)


def test_no_pair_is_as_fast_as_both_alone() -> None:
    made = compose(SERIES, 1, modern_fleet())
    alone = {job.model: job.rates for job in made.jobs.values()}
    assert made.pairs
    for (name, one, _), rate in made.pairs.items():
        if one in alone:
            assert 0.4 * alone[one][name] < rate < alone[one][name]


def test_its_judges_find_nothing_and_rows_say_against_whom() -> None:
    made, fleet = compose(SERIES, 3, modern_fleet()), modern_fleet()
    chosen = ("FIFO, type-blind", "static partition", "packing", "throughput per dollar")
    makers = policies(made.pairs)
    ran = {name: [run(made, fleet, name, makers[name]())] for name in (*chosen, "Baton, greedy")}
    ran["Baton"] = ran.pop("Baton, greedy")
    found = rows(ran)
    assert {row.name for row in found} == {
        "modern, mean completion", "modern, provisioned cost", "modern, cost of what was used",
    }  # fmt: skip
    assert any("best of the others" in row.reference_source for row in found)


@pytest.mark.parametrize("text", [None, "time,demand\n1,2\n"])
def test_without_a_series_it_says_so(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "philly_jobs_10min.csv").write_text(text)
    assert main(["--demand", str(tmp_path)]) == 1


def test_a_gap_in_a_series_is_nobody(tmp_path: Path) -> None:
    path = tmp_path / "series.csv"
    path.write_text("time,submitted\na,3\nb,\nc,-1\n")
    assert read_series(path) == [3.0, 0.0, 0.0]
