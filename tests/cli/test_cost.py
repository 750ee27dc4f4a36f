"""`baton cost`: the table, the document, the plot, and savings beside the rule they are against."""

import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from coordinator.cli import savings
from protos.baton.v1 import costs_pb2 as pb
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator

DAY_S = 86_400
NOVEMBER = 1_793_491_200  # the first, at midnight UTC
SPAN = ("--from", "2026-11-01", "--to", "2026-11-03")


def money(**said: float) -> pb.Money:
    return pb.Money(**said)


def answer(**more: object) -> pb.GetCostsResponse:
    total = money(
        gpu_hours=30, lease_usd=40, burst_usd=20, energy_usd=2, energy_kwh=10, tokens=4e6,
        token_usd=50,
    )  # fmt: skip
    found = pb.GetCostsResponse(
        lines=[
            pb.CostLine(key="7", name="train", money=total),
            pb.CostLine(key="8", money=money(gpu_hours=1, owned_usd=0.5)),
        ],
        total=total,
        idle_lease_usd=12.5,
        prices_source="a table",
        energy_source="watts",
        **more,  # type: ignore[arg-type]
    )
    for day in range(2):
        part = found.days.add(money=money(lease_usd=20, burst_usd=10), idle_lease_usd=6.25)
        part.begin_time.seconds = NOVEMBER + day * DAY_S
    return found


def with_uses(answered: pb.GetCostsResponse) -> pb.GetCostsResponse:
    """A month of ten GPUs before, then two days of four with an hour of eight."""
    use = answered.uses.add(gpu_type="H100", lease_usd=1.0, burst_usd=2.0)
    use.begin_time.seconds = NOVEMBER - 30 * DAY_S
    use.gpus.extend([10.0] * 720 + [4.0] * 24 + [8.0] + [4.0] * 23)
    answered.kept_since_time.seconds = NOVEMBER - 40 * DAY_S
    return answered


def rows_of(stdout: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in stdout.splitlines() if line.strip()]


def test_the_table_in_a_pipe(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["GetCosts"] = [answer()]
    result = baton("cost", "--by", "job", *SPAN)
    assert result.exit_code == 0
    _, train, other, idle, total = rows_of(result.stdout)
    assert train == ["7 train", "30.00", "62.00", "0.00", "40.00", "20.00", "2.00", "10.00", "12.5"]
    assert other == ["8", "1.00", "0.50", "0.50", "0.00", "0.00", "0.00", "0.00", "-"]
    assert idle == ["(idle lease)", "-", "12.50", "-", "12.50", "-", "-", "-", "-"]
    assert total[:3] == ["(total)", "30.00", "74.50"]
    assert "baton: from 2026-11-01 00:00 to 2026-11-03 00:00 UTC\n" in result.stderr
    assert "prices: a table" in result.stderr
    (asked,) = fake.requests
    assert asked.grouping == pb.COST_GROUPING_JOB
    assert (asked.begin_time.seconds, asked.end_time.seconds) == (NOVEMBER, NOVEMBER + 2 * DAY_S)


def test_the_document(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["GetCosts"] = [answer()]
    document = json.loads(baton("cost", "--json", *SPAN).stdout)
    assert document["usd"] == 74.5
    assert (document["begin_time"], document["end_time"]) == (
        "2026-11-01T00:00:00Z",
        "2026-11-03T00:00:00Z",
    )
    assert document["lines"][0]["money"]["usd_per_million_tokens"] == 12.5
    assert document["lines"][1]["money"]["tokens"] is None, "none is not 0"
    assert document["baselines"] is None
    assert document["kept_since_time"] is None


def test_savings_stand_beside_the_rules_they_are_against(
    baton: Baton, fake: FakeCoordinator
) -> None:
    fake.answers["GetCosts"] = [with_uses(answer())]
    result = baton("cost", "--compare", *SPAN)
    assert result.exit_code == 0
    found = {row[0]: row[1:] for row in rows_of(result.stdout)}
    assert found["always-on peak"] == ["384.00", "311.50", "81.1%"]
    assert found["idle timeout 1 h"][0] == f"{2 * (10 + 8 + 8 + 45 * 4):.2f}"
    assert found["last month's peak + burst"][0] == "480.00"
    assert found["clairvoyant (nobody could)"][0] == f"{4 * 48 + 2 * 4:.2f}"
    assert "72.50 were paid" in result.stderr
    assert f"no more than {1 - (4 * 47 + 8) / (8 * 48):.1%} can be saved" in result.stderr
    assert "takes a solver" not in result.stderr


def test_without_a_solver_the_limit_that_is_missing_is_said(
    baton: Baton, fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(savings, "SOLVER_MODULE", "no_such_solver")
    fake.answers["GetCosts"] = [with_uses(answer())]
    result = baton("cost", "--compare", *SPAN)
    assert "clairvoyant" not in result.stdout
    assert "how far below one could go takes a solver" in result.stderr


def test_a_month_that_nobody_kept_is_no_baseline(baton: Baton, fake: FakeCoordinator) -> None:
    answered = with_uses(answer())
    answered.kept_since_time.seconds = NOVEMBER - 5 * DAY_S
    fake.answers["GetCosts"] = [answered]
    assert "last month" not in baton("cost", "--compare", *SPAN).stdout


@pytest.mark.parametrize("missing", ["lease_usd", "burst_usd"])
def test_without_a_price_nothing_is_compared(
    baton: Baton, fake: FakeCoordinator, missing: str
) -> None:
    answered = with_uses(answer())
    answered.uses[0].ClearField(missing)  # type: ignore[arg-type]
    fake.answers["GetCosts"] = [answered]
    result = baton("cost", "--compare", *SPAN)
    assert "BASELINE" not in result.stdout
    assert "no baselines: there is no price by the month and by the hour of H100" in result.stderr


def test_the_plot(baton: Baton, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.answers["GetCosts"] = [answer()]
    path = tmp_path / "out.svg"
    assert baton("cost", "--plot", str(path), *SPAN).exit_code == 0
    text = path.read_text(encoding="utf-8")
    for word in ("lease, used", "lease, idle", "burst", "US dollars"):
        assert word in text
    assert ">own<" not in text, "a curve of nothing is left out"


def test_a_plot_that_cannot_be_written(baton: Baton, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.answers["GetCosts"] = [answer()]
    result = baton("cost", "--plot", str(tmp_path / "no" / "out.svg"), *SPAN)
    assert (result.exit_code, "cannot be written" in result.stderr) == (1, True)


def test_a_span_that_cannot_be(baton: Baton) -> None:
    assert baton("cost", "--last", "12").exit_code == 2
    assert baton("cost", "--from", "2026-11-03", "--to", "2026-11-01").exit_code == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--last 0d", "--last: the span ends where it begins, or earlier"),
        ("--from yesterday", "'yesterday' is no day; write it like 2026-11-01"),
        ("--last 400d", "--last: a span is 366 days at most"),
        ("--from 2020-01-01 --to 2022-01-01", "--from: a span is 366 days at most"),
        ("--from 2026-11-01 --last 30d", "--from and --last both say where the span begins"),
    ],
)
def test_a_span_that_is_refused_says_why(
    baton: Baton, fake: FakeCoordinator, flags: str, said: str
) -> None:
    result = baton("cost", *flags.split())
    assert (result.exit_code, fake.requests) == (2, [])
    assert said in " ".join(result.stderr.split())
    assert "before" not in result.stderr


@pytest.mark.parametrize("told", [True, False], ids=["coordinator", "an older one"])
def test_where_a_span_ends_is_for_the_coordinator_to_say(
    baton: Baton, fake: FakeCoordinator, *, told: bool
) -> None:
    """A month's end that is years away is now; and what begins then has no bill yet."""
    now = Timestamp(seconds=NOVEMBER + 2 * DAY_S)
    fake.unix_ms = now.ToMilliseconds()
    for begin, end, code in (("2026-11-01", "2090-01-01", 0), ("2090-01-01", "2091-01-01", 2)):
        answered = answer()
        if told:
            answered.begin_time.FromDatetime(datetime.fromisoformat(begin))
            answered.end_time.CopyFrom(now if code == 0 else answered.begin_time)
        fake.answers["GetCosts"] = [answered]
        result = baton("cost", "--from", begin, *(("--to", end) if code == 0 else ()))
        assert result.exit_code == code, result.stderr
        assert ("later than it is by the coordinator's clock" in result.stderr) is bool(code)
