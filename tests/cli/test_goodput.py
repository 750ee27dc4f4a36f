"""The bar and its legend: what a person sees of an account, with colour and without."""

import json
from collections.abc import Callable

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from coordinator.cli import goodput
from coordinator.cli.decoding import decode
from coordinator.cli.values import Accounting
from protos.baton.v1 import jobs_pb2, types_pb2
from tests.cli import samples
from tests.cli.fake_coordinator import FakeCoordinator

Baton = Callable[..., Result]

SHOWN = """\
goodput 77.8% of 1h00m
  [#######################################rrrrrqsf...]
  #  productive  46m40s   77.8%
  c  capture       0.3s   <0.1%
  r  recompute    5m40s    9.4%
  d  detect         10s    0.3%
  q  schedule     1m41s    2.8%
  s  start        1m15s    2.1%
  f  restore        34s    0.9%
  .  idle         4m00s    6.7%
  (a trainer's own times were 1.25 times as long as the time that there was; they are divided by \
that)
"""


def values(**seconds: float) -> Accounting:
    """An account with these parts."""
    said = types_pb2.Accounting(**seconds, overstated_ratio=1)  # type: ignore[arg-type]
    return decode(said, Accounting)


def test_the_bar_in_a_pipe(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=samples.active_job())]
    shown = baton("job", "12").stdout
    assert "\n\n" + SHOWN + "\nAttempts, oldest first\n" in shown


def test_the_numbers_are_in_the_document(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=samples.active_job())]
    document = json.loads(baton("job", "12", "--json").stdout)
    account = document["accounting"]
    assert (account["wall_seconds"], account["productive_seconds"]) == (3600, 2800)
    assert (account["input_wait_seconds"], account["measured"]) == (0, True)
    assert document["attempts"][0]["accounting"]["detect_seconds"] == 10
    assert document["attempts"][1]["accounting"] is None


def test_no_account_no_bar(baton: Baton, fake: FakeCoordinator) -> None:
    job = samples.queued_job()
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=job)]
    assert "goodput" not in baton("job", str(job.id)).stdout
    assert json.loads(baton("job", str(job.id), "--json").stdout)["accounting"] is None


@pytest.mark.parametrize("no_color", [False, True])
def test_the_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_color: bool
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLORTERM", "")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    goodput.write_goodput(decode(samples.account(), Accounting))
    shown = capsys.readouterr().out
    assert "goodput 77.8% of 1h00m" in shown
    bar = shown.splitlines()[1]
    if no_color:
        assert bar == "  " + "#" * 39 + "rrrrrqsf..."
    else:
        assert bar.count("█") == goodput.BAR_CELLS
        assert "\x1b[32m" + "█" * 39 + "\x1b[0m" in bar


def test_a_program_that_says_nothing_is_taken_at_its_word() -> None:
    (sentence,) = goodput.remarks(values(wall_seconds=10, productive_seconds=10))
    assert sentence.startswith("a trainer does not say its times")


@given(st.lists(st.floats(0, 1e9), min_size=9, max_size=9).filter(lambda found: sum(found) > 0))
def test_the_bar_is_always_full(found: list[float]) -> None:
    parts = {part.field: value for part, value in zip(goodput.PARTS, found, strict=True)}
    account = values(wall_seconds=sum(found), **parts)
    given_cells = goodput.cells(account, goodput.BAR_CELLS)
    assert sum(count for _, count in given_cells) == goodput.BAR_CELLS
    for part, count in given_cells:
        exact = parts[part.field] / account.wall_seconds * goodput.BAR_CELLS
        assert abs(count - exact) <= 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "40ms"),
        (0.0996, "0.1s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (3_599, "59m59s"),
        (3_600, "1h00m"),
        (86_399, "23h59m"),
        (200_000, "2d07h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert goodput.duration(seconds) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (None, ""),
        (0, "0.0%"),
        (0.0001, "<0.1%"),
        (0.934, "93.4%"),
        (0.9999, ">99.9%"),
        (1, "100.0%"),
    ],
)
def test_percentages(ratio: float | None, text: str) -> None:
    assert goodput.percent(ratio) == text
