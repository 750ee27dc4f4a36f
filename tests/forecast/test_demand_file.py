"""Demand as a file: what can be read is on a grid, and what cannot says where."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from coordinator.cli.main import cli
from coordinator.forecast.demand_file import BadDemand, read_series


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "demand.csv"
    path.write_text("\n".join(["time,demand", *lines, ""]))
    return path


def test_gaps_are_what_is_empty_and_what_is_missing(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "2026-03-01T06:00,10",
        "2026-03-01T06:10,",
        "2026-03-01T06:20,12",
        "2026-03-01T06:40,14",
    )
    series = read_series(path)
    assert series.per_hour == 6
    assert series.first_step == 36
    assert [None if math.isnan(gpus) else gpus for gpus in series.values] == [
        10,
        None,
        12,
        None,
        14,
    ]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["2026-03-01T06:00,1", "2026-03-01T07:00,x", "2026-03-01T08:00,1"], "line 3: 'x'"),
        (["2026-03-01T06:00,1", "soon,2", "2026-03-01T08:00,1"], "line 3: 'soon'"),
        (
            ["2026-03-01T06:00,1", "2026-03-01T05:00,2", "2026-03-01T08:00,1"],
            "line 3: .* come after",
        ),
        (["2026-03-01T06:00,1"], "has 1 lines"),
        (["2026-03-01T06:00,1", "2026-03-01T07:00,2", "2026-03-01T08:30,1"], "line 4"),
        (["2026-03-01T06:00,-1", "2026-03-01T07:00,2", "2026-03-01T08:00,1"], "line 2: '-1'"),
    ],
)
def test_what_cannot_be_used_says_where(tmp_path: Path, lines: list[str], sentence: str) -> None:
    with pytest.raises(BadDemand, match=sentence):
        read_series(written(tmp_path, *lines))


@pytest.mark.parametrize(
    ("head", "lines", "per_hour", "values"),
    [
        ("hour,demand", ["6,1", "7,2", "9,4"], 1, [1, 2, None, 4]),
        ("minute,demand", ["360,1", "370,2", "390,4"], 6, [1, 2, None, 4]),
        (
            "hour,time,demand",
            [f"{hour},2026-03-01T06:{minute},{minute}" for hour, minute in enumerate((10, 20, 30))],
            6,
            [10, 20, 30],
        ),
    ],
)
def test_a_trace_without_dates_counts_from_its_beginning(
    tmp_path: Path, head: str, lines: list[str], per_hour: int, values: list[float | None]
) -> None:
    path = tmp_path / "demand.csv"
    path.write_text("\n".join([head, *lines, ""]))
    series = read_series(path)
    assert (series.per_hour, series.first_step // per_hour) == (per_hour, 6)
    assert [None if math.isnan(gpus) else gpus for gpus in series.values] == values


def test_a_number_of_hours_that_is_none_says_where(tmp_path: Path) -> None:
    path = tmp_path / "demand.csv"
    for cell in ("soon", "nan", "1e300", ""):
        path.write_text(f"hour,demand\n0,1\n{cell},2\n2,3\n")
        with pytest.raises(BadDemand, match=f"line 3: '{cell}' is not a number of hours"):
            read_series(path)
    path.write_text("step,demand\n0,1\n1,2\n2,3\n")
    with pytest.raises(BadDemand, match="no column 'time'; its columns: step, demand; 'hour'"):
        read_series(path)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(BadDemand, match=r"no column 'gpus'; its columns: time, demand"):
        read_series(written(tmp_path, "2026-03-01T06:00,1"), "gpus")


def test_the_command_says_bands_and_record(tmp_path: Path) -> None:
    days = [(day, hour) for day in range(1, 29) for hour in range(24)]
    path = written(
        tmp_path,
        *(f"2026-02-{day:02d}T{hour:02d}:00,{100 + (day * hour) % 17}" for day, hour in days),
    )
    ran = CliRunner().invoke(cli, ["forecast", "--demand", str(path), "--ahead", "1", "--json"])
    assert ran.exit_code == 0, ran.output
    (told,) = json.loads(ran.stdout)
    assert told["ahead_h"] == 1
    gpus = list(told["gpus"].values())
    assert gpus == sorted(gpus)
    assert told["backtest"]["forecasts"] > 300
    assert sum(told["weights"].values()) == pytest.approx(1)
    ran = CliRunner().invoke(cli, ["forecast", "--demand", str(tmp_path / "none.csv")])
    assert ran.exit_code == 2
    assert (
        ran.output == f"baton: {tmp_path / 'none.csv'} cannot be read (No such file or directory)\n"
    )


def test_a_file_of_something_else_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "picture.csv"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(BadDemand, match=r"picture\.csv is no CSV file in UTF-8"):
        read_series(path)


def test_times_with_an_offset_are_those_of_utc(tmp_path: Path) -> None:
    """A day on which the clocks change has its hours, and no two of them are one."""
    path = written(
        tmp_path,
        "2026-10-25T02:00+02:00,1",
        "2026-10-25T02:00+01:00,2",
        "2026-10-25T02:00,3",
    )
    series = read_series(path)
    assert (series.values, series.begin.isoformat()) == ((1, 2, 3), "2026-10-25T00:00:00")
