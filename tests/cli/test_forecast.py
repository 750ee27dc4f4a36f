"""`baton forecast` of what the coordinator has seen: the question, the file, the plot."""

import io
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest

from bench import forecast_ages
from coordinator.cli import render
from coordinator.core.demand_history import STILL_MIN
from coordinator.forecast.backtest import backtest
from coordinator.forecast.demand_file import read_series
from coordinator.forecast.forecaster import KINDS, Forecaster
from coordinator.forecast.survival import held_on_average
from protos.baton.v1 import demand_pb2, types_pb2
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator, Refusal

BEGIN = datetime(2026, 11, 1, 6, tzinfo=UTC)
SVG = "{http://www.w3.org/2000/svg}"


def told(*gpus: float, period_min: int = 10) -> demand_pb2.GetDemandResponse:
    message = demand_pb2.GetDemandResponse(period_minutes=period_min, gpus=gpus)
    if gpus:
        message.begin_time.FromDatetime(BEGIN)
    return message


def days(count: int) -> list[float]:
    """A fleet that breathes, with an outage of an hour and a half on the second day."""
    found = [40 + 20 * math.sin(step / 144 * math.tau) + step % 3 for step in range(144 * count)]
    found[150:159] = [math.nan] * 9
    return found


def test_without_a_file_the_coordinator_is_asked(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["GetDemand"] = [told(*days(3))]
    result = baton("forecast", "--gpu-type", "h100", "--class", "spare", "--ahead", "1", "--json")
    assert result.exit_code == 0
    (request,) = fake.requests
    assert (request.gpu_type, request.project, request.period_minutes) == ("h100", "", 10)
    assert request.job_class == types_pb2.JOB_CLASS_SPARE
    (hour,) = json.loads(result.stdout)
    assert 20 < hour["gpus"]["0.5"] < 70
    assert (list(request.ahead_minutes), hour["held"]) == ([60], None)


def test_what_is_known_of_the_future_stands_below(baton: Baton, fake: FakeCoordinator) -> None:
    answer = told(*days(3))
    answer.held_gpus = 40
    answer.held_ahead.add(ahead_minutes=360, certain_gpus=11, expected_gpus=23.4)
    fake.answers["GetDemand"] = [answer]
    assert baton("forecast", "--ahead", "6").stderr.splitlines()[-1] == (
        "baton: 40 GPUs are held now; of these in 6 h 11 for certain and 23 as expected"
    )
    (told_of,) = json.loads(baton("forecast", "--ahead", "6", "--json").stdout)
    assert told_of["held"] == {"ahead_h": 6, "certain_gpus": 11.0, "expected_gpus": 23.4}


def with_holds(hours: int) -> demand_pb2.GetDemandResponse:
    """Of the benchmark's made-up jobs, by the hour."""
    holds = forecast_ages.holds_of(forecast_ages.drawn(3), hours)
    answer = told(*held_on_average(holds, hours, 1), period_min=60)
    answer.holds.gpus.extend(holds.gpus)
    answer.holds.begin_minutes.extend(60 * holds.begin_h)
    answer.holds.end_minutes.extend(
        60 * end_h if end_h < hours else math.nan for end_h in holds.end_h
    )
    return answer


def test_ages_of_jobs_are_heard_as_in_the_benchmark(
    baton: Baton, fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "TOLD_EVERY_S", math.inf)
    count = 24 * 12
    answer = with_holds(count)
    fake.answers["GetDemand"] = [answer]
    result = baton("forecast", "--ahead", "1", "--warm-up", "264", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    (request,) = fake.requests
    assert request.with_holds
    forecaster = Forecaster(1, 1, BEGIN.hour)
    hours = forecast_ages.hours(forecast_ages.drawn(3), count + 1, (1,))
    stays = np.array([hour.stays[0] for hour in hours])
    score = backtest(forecaster, answer.gpus, 264, told={"ages": stays})
    (hour,) = json.loads(result.stdout)
    assert hour["backtest"]["loss"] == pytest.approx(score.loss, rel=1e-3)  # float32 on the wire
    assert hour["weights"]["ages"] == pytest.approx(forecaster.weights()["ages"], abs=0.01)
    assert hour["weights"]["ages"] > 0.05


def test_what_jobs_said_of_their_end_is_heard(
    baton: Baton, fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(render, "TOLD_EVERY_S", math.inf)
    count = 24 * 12
    holds = forecast_ages.holds_of(forecast_ages.drawn(3), count)
    answer = told(*held_on_average(holds, count, 1), period_min=60)
    said = forecast_ages.said(holds, count, tuple(minutes // 60 for minutes in STILL_MIN), 1, 1)
    answer.still_wanted.minutes.extend(60.0 * hour for hour in range(1, count + 1))
    answer.still_wanted.said_gpus.extend([1.0] * count)
    answer.still_wanted.ahead_minutes.extend(STILL_MIN)
    answer.still_wanted.gpus.extend(said.T.reshape(-1))
    fake.answers["GetDemand"] = [answer]
    plot = str(tmp_path / "plot.svg")
    result = baton("forecast", "--ahead", "1", "--warm-up", "264", "--plot", plot, "--json")
    assert (result.exit_code, "Traceback" in result.stderr) == (0, False)
    (request,) = fake.requests
    assert request.with_still_wanted
    forecaster = Forecaster(1, 1, BEGIN.hour)
    score = backtest(forecaster, answer.gpus, 264, told={"known ends": said[0]})
    (hour,) = json.loads(result.stdout)
    assert hour["backtest"]["loss"] == pytest.approx(score.loss, rel=1e-3)  # float32 on the wire
    assert hour["weights"]["known ends"] > 0.3


def test_ages_of_jobs_that_are_not_kept_for_long_are_not_heard(
    baton: Baton, fake: FakeCoordinator, tmp_path: Path
) -> None:
    answer = with_holds(24 * 10)
    answer.holds.since_minutes = 60 * (24 * 10 - 100)
    fake.answers["GetDemand"] = [answer]
    plot = str(tmp_path / "plot.svg")
    result = baton("forecast", "--ahead", "1", "--warm-up", "230", "--plot", plot, "--json")
    assert result.exit_code == 0
    assert "the coordinator no longer keeps all that ended more than 100 h ago" in result.stderr
    assert "ages" not in json.loads(result.stdout)[0]["weights"]


def test_one_that_has_not_seen_much_is_asked_for_minutes(
    baton: Baton, fake: FakeCoordinator
) -> None:
    fake.answers["GetDemand"] = [told(4, 4, 5), told(4, 4, 4, 6, 5, period_min=1)]
    result = baton("forecast", "--ahead", "1", "--json")
    assert [request.period_minutes for request in fake.requests] == [10, 1]
    assert json.loads(result.stdout)[0]["gpus"]["0.5"] == 5
    fake.answers["GetDemand"] = [told()]
    result = baton("forecast")
    assert result.exit_code == 1
    assert "once a minute and has seen 0 so far" in result.stderr


@pytest.mark.parametrize("steps", [3, 40, 59, 60, 61])
def test_a_series_shorter_than_the_horizon_is_too_short_to_be_judged(
    baton: Baton, fake: FakeCoordinator, steps: int
) -> None:
    """By the minute an hour is sixty steps; a coordinator of its first hour has fewer."""
    fake.answers["GetDemand"] = [told(*[4.0] * steps, period_min=1)]
    result = baton("forecast", "--ahead", "1")
    assert result.exit_code == 0, result.output
    assert "forecasts of 1 h ahead are not judged: the series is too short" in result.stderr


def test_what_is_so_for_several_horizons_is_said_once(
    baton: Baton, fake: FakeCoordinator, tmp_path: Path
) -> None:
    fake.answers["GetDemand"] = [told(*days(2))]
    assert baton("forecast").stderr.splitlines() == [
        "baton: forecasts of 1 h, 6 h, 24 h ahead are not judged: the series is too short: it has"
        " 48 h, and the first 336 h are only learned from"
    ]
    (first, *_) = json.loads(baton("forecast", "--json").stdout)
    assert first["unjudged"].startswith("the series is too short")


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (
            [told(*days(2))],
            "288 steps of 10 min in {}, each the mean of its minutes: only a series of less than"
            " 12 h has those",
        ),
        ([told(4, 4, 5), told(4, 4, 4, 6, 5, period_min=1)], "5 steps of 1 min in {}"),
    ],
)
def test_what_is_saved_says_how_fine_it_is(
    baton: Baton,
    fake: FakeCoordinator,
    tmp_path: Path,
    answers: list[demand_pb2.GetDemandResponse],
    said: str,
) -> None:
    fake.answers["GetDemand"] = answers
    path = tmp_path / "demand.csv"
    lines = baton("forecast", "--save", str(path)).stderr.splitlines()
    assert lines[0] == f"baton: {said.format(path)}"


def test_what_is_saved_is_read_again(baton: Baton, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.answers["GetDemand"] = [told(*days(3))]
    path = tmp_path / "demand.csv"
    asked = baton("forecast", "--ahead", "6", "--json", "--save", str(path))
    assert asked.exit_code == 0
    series = read_series(path)
    assert (series.begin, series.per_hour) == (BEGIN.replace(tzinfo=None), 6)
    assert series.values == pytest.approx(days(3), abs=1e-3, nan_ok=True)
    again = baton("forecast", "--demand", str(path), "--ahead", "6", "--json")
    (first,), (second,) = json.loads(asked.stdout), json.loads(again.stdout)
    assert first["gpus"] == pytest.approx(second["gpus"], abs=0.2)
    assert baton("forecast", "--save", str(tmp_path)).exit_code == 2
    lost = baton("forecast", "--save", str(tmp_path / "none" / "demand.csv"))
    assert (lost.exit_code, "cannot be written" in lost.stderr) == (1, True)


def test_the_plot_has_bands_what_came_and_no_line_through_the_outage(
    baton: Baton, fake: FakeCoordinator, tmp_path: Path
) -> None:
    fake.answers["GetDemand"] = [told(*days(4))]
    path = tmp_path / "demand.svg"
    assert baton("forecast", "--ahead", "6", "--plot", str(path)).exit_code == 0
    root = ElementTree.parse(path).getroot()  # noqa: S314 (we have written it)
    words = [each.text for each in root.iter(f"{SVG}text")]
    for word in ("90% said before", "50% said before", "what came", "median, 6 h before"):
        assert word in words
    assert "hours after 2026-11-05 05:50 UTC" in words
    wide, narrow = (each.attrib["points"].split() for each in root.iter(f"{SVG}polygon"))
    assert len(wide) == len(narrow) > 100
    heights = [[float(pair.split(",")[1]) for pair in band] for band in (wide, narrow)]
    assert min(heights[0]) < min(heights[1])
    lines = [each.attrib["points"] for each in root.iter(f"{SVG}polyline")]
    assert len(lines) == 2 + 2 + 1  # a legend of each, and what came in two parts


def test_a_refusal_and_a_mixture_of_both_are_said(
    baton: Baton, fake: FakeCoordinator, tmp_path: Path
) -> None:
    sentence = "nothing of GPU type 'B200' was ever wanted; of these something was: H100"
    fake.answers["GetDemand"] = [Refusal(grpc.StatusCode.NOT_FOUND, sentence)]
    result = baton("forecast", "--gpu-type", "B200")
    assert (result.exit_code, sentence in result.stderr) == (1, True)
    both = baton("forecast", "--gpu-type", "B200", "--demand", str(tmp_path / "x.csv"))
    assert (both.exit_code, "asked of the coordinator" in both.stderr) == (2, True)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (None, ""),
        ("lightgbm", ""),
        ("coordinator.forecast.boosted", "lightgbm cannot be loaded, and is not heard"),
    ],
)
def test_the_extra_is_one_model_more_and_nothing_needs_it(
    tmp_path: Path, baton: Baton, monkeypatch: pytest.MonkeyPatch, missing: str | None, said: str
) -> None:
    """There, not installed, and installed without the libraries that it needs."""
    monkeypatch.setattr("coordinator.forecast.forecaster.KINDS", KINDS[:1])
    monkeypatch.setattr(render, "TOLD_EVERY_S", math.inf)
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    path = tmp_path / "demand.csv"
    lines = (
        f"{BEGIN + timedelta(hours=hour):%Y-%m-%dT%H:%M},{40 + hour % 24}" for hour in range(552)
    )
    path.write_text("time,demand\n" + "\n".join(lines) + "\n", encoding="utf-8")
    result = baton("forecast", "--demand", str(path), "--ahead", "1", "--json")
    (told_of,) = json.loads(result.stdout)
    assert set(told_of["weights"]) == {"persistence", *["boosted trees"] * (missing is None)}
    assert said in result.stderr
    assert bool(said) == bool(result.stderr)


@pytest.mark.parametrize("terminal", [True, False])
def test_who_waits_at_a_terminal_sees_how_far_it_is(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    values = days(3)
    with render.progress(len(values), "judging forecasts") as passed:
        backtest(Forecaster(1, 6, 0), values, 24, passed)
    shown = stderr.getvalue()
    assert ("judging forecasts" in shown, "100%" in shown) == (terminal, terminal)


def test_who_reads_a_log_is_told_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter(range(0, 100, 2))
    monkeypatch.setattr("time.monotonic", lambda: float(next(seconds)))
    with render.progress(20, "judging forecasts") as passed:
        for _ in range(10):
            passed(2)
    assert capsys.readouterr().err.splitlines() == [
        f"baton: judging forecasts: {percent}% done" for percent in (50, 100)
    ]
