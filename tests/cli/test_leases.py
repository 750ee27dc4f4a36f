"""`baton leases`: from a file, and from what the attempts of a coordinator were."""

import json
from pathlib import Path

import msgspec
import pytest

from coordinator import cost_rpc
from coordinator.core import bills
from coordinator.core.cost_requests import CostPage, GetCosts, Grouping
from coordinator.core.demand_history import MINUTE_MS
from coordinator.core.lease_advice import PAST_DAYS, advise
from coordinator.core.messages import Reply, Request, Tick
from coordinator.lease_solver import solve
from protos.baton.v1 import costs_pb2 as pb
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator
from tests.core.test_lease_days import asked, rig_of
from tests.core.test_past_demand import PAST_HOURS, busy, hours

DAY_S = 86_400


@pytest.fixture
def demand(tmp_path: Path) -> Path:
    """Thirty days of a hundred GPUs."""
    path = tmp_path / "demand.csv"
    lines = [f"2026-11-{1 + hour // 24:02}T{hour % 24:02}:00,100" for hour in range(30 * 24)]
    path.write_text("\n".join(["time,demand", *lines]) + "\n", encoding="utf-8")
    return path


def test_from_a_file(baton: Baton, demand: Path) -> None:
    result = baton("leases", "--demand", str(demand), "--owned", "40")
    assert result.exit_code == 0
    assert "lease 10 of the 60 that are missing, for 30 days at $2.79 an hour" in result.stdout
    assert "nothing was leased" in result.stderr


def test_a_type_that_nobody_knows_is_wrong_usage(baton: Baton, demand: Path) -> None:
    """And no empty answer; with both prices any type will do."""
    result = baton("leases", "--demand", str(demand), "--gpu-type", "Foo")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--gpu-type Foo: there is no such type; known are B200, H200 NVL, H200" in result.stderr
    asked = baton("leases", "--gpu-type", "Foo")
    assert (asked.exit_code, "known are B200" in asked.stderr) == (2, True)
    prices = ("--lease-usd", "1", "--burst-usd", "2")
    other = baton("leases", "--demand", str(demand), "--gpu-type", "Foo", *prices)
    assert (other.exit_code, "Foo: lease 10 of the 100" in other.stdout) == (0, True)


def test_a_known_type_without_a_public_price_asks_for_yours(baton: Baton, demand: Path) -> None:
    result = baton("leases", "--demand", str(demand), "--gpu-type", "l40s")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "L40S: no price" in result.stderr
    assert "--lease-usd and --burst-usd" in result.stderr


def test_a_lease_that_is_dearer_than_burst_is_said_to_be(baton: Baton, demand: Path) -> None:
    prices = ("--lease-usd", "3", "--burst-usd", "2")
    said = baton("leases", "--demand", str(demand), *prices).stdout
    assert "a lease at $3.00 an hour is no cheaper than burst at $2.00" in said


@pytest.mark.parametrize("option", [("--owned", "3"), ("--column", "gpus")])
def test_what_is_about_a_file_says_nothing_without_one(
    baton: Baton, option: tuple[str, str]
) -> None:
    result = baton("leases", *option)
    assert (result.exit_code, "nothing without --demand" in result.stderr) == (2, True)


def test_the_document(baton: Baton, demand: Path) -> None:
    said = ("--lease-usd", "1", "--burst-usd", "2", "--node-gpus", "8", "--flexible", "0.5")
    (found,) = json.loads(baton("leases", "--json", "--demand", str(demand), *said).stdout)
    assert (found["lease_gpus"], found["level_gpus"], found["flexible_ratio"]) == (8, 100, 0.5)
    assert found["worth_usd"] == pytest.approx(2.0)
    assert {each["name"] for each in found["alternatives"]} >= {"all burst", "nothing new"}
    assert len(found["quantiles"]) == 9


@pytest.mark.parametrize("amount", ["nan", "inf", "0", "-1"])
@pytest.mark.parametrize("option", ["--lease-usd", "--burst-usd"])
def test_a_price_that_is_none_is_refused(
    baton: Baton, demand: Path, option: str, amount: str
) -> None:
    """And not replaced: a recommendation by another price than was said is worse than none."""
    result = baton("leases", "--demand", str(demand), option, amount)
    assert (result.exit_code, result.stdout) == (2, "")
    assert option in result.stderr


@pytest.mark.parametrize("part", ["nan", "inf", "1.5"])
def test_a_part_that_is_none_is_refused(baton: Baton, demand: Path, part: str) -> None:
    result = baton("leases", "--demand", str(demand), "--flexible", part)
    assert (result.exit_code, "--flexible" in result.stderr) == (2, True)


def test_from_the_coordinator(baton: Baton, fake: FakeCoordinator) -> None:
    """Before its first attempt it knows nothing, and that is not a demand of none."""
    answer = pb.GetCostsResponse()
    use = answer.uses.add(gpu_type="H100", lease_usd=1.0, burst_usd=2.0)
    use.begin_time.seconds = 1_000 * DAY_S
    use.gpus.extend([0.0] * 720)
    use.wanted_gpus.extend([0.0] * 240 + [50.0] * 480)
    answer.kept_since_time.seconds = 1_010 * DAY_S
    fleet = answer.fleets.add(gpu_type="H100", owned_gpus=10)
    fleet.lots.add(gpus=20).end_time.seconds = 4_000_000_000
    fleet.lots.add(gpus=99).end_time.seconds = 1_000
    answer.uses.add(gpu_type="Frobnicator")
    fake.answers["GetCosts"] = [answer]
    result = baton("leases", "--json")
    (found,) = json.loads(result.stdout)
    assert (found["owned_gpus"], found["leased_gpus"], found["level_gpus"]) == (10, 20, 50)
    assert found["lease_gpus"] == 5
    assert "Frobnicator: no price" in result.stderr
    (one,) = json.loads(baton("leases", "--json", "--gpu-type", "h100").stdout)
    assert one["gpu_type"] == "H100"
    other = baton("leases", "--gpu-type", "A10")
    assert "nothing is known of demand of A10 yet" in other.stderr


def test_before_anything_has_run(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["GetCosts"] = [pb.GetCostsResponse()]
    result = baton("leases")
    assert (result.exit_code, "nothing is known of demand yet" in result.stderr) == (0, True)
    assert result.stdout == "", "no table without a line"


def test_a_file_that_cannot_be_used(baton: Baton, tmp_path: Path) -> None:
    result = baton("leases", "--demand", str(tmp_path / "none.csv"))
    assert (result.exit_code, "cannot be read (No such file or directory)" in result.stderr) == (
        2,
        True,
    )


@pytest.mark.parametrize(("flexible_ms", "many_jobs"), [(0, 0), (3 * bills.MS_PER_H, 0), (0, 1)])
def test_by_hand_and_each_day_the_numbers_are_the_same(
    baton: Baton, fake: FakeCoordinator, flexible_ms: int, many_jobs: int
) -> None:
    """Of one history: asked for over the wire, and found by the coordinator itself; also where
    most of it is known from samples alone."""
    rig = rig_of(days=20, flexible_ms=flexible_ms)
    if many_jobs:
        busy(rig, hours(40, 1.5))
    rig.now_ms += MINUTE_MS
    (question,) = asked(rig.handle(Tick()))
    begin_ms = question.unix_ms - PAST_DAYS * bills.MS_PER_DAY
    body = GetCosts(begin_ms, question.unix_ms, Grouping.GPU_TYPE)
    (page,) = (one.answer for one in rig.handle(Request(1, body)) if isinstance(one, Reply))
    assert isinstance(page, CostPage)
    fake.answers["GetCosts"] = [cost_rpc.encode(page)]
    (by_hand,) = json.loads(baton("leases", "--json").stdout)
    (by_itself,) = json.loads(msgspec.json.encode(advise(question, solve).found))
    assert by_hand == by_itself, "and the moment is the coordinator's"
    assert by_hand["sampled_hours"] == (PAST_HOURS if many_jobs else 0)
    said = (by_hand["flexible_ratio"], by_hand["flexible_hours"])
    assert said == ((1.0, 3) if flexible_ms else (0.0, 0)), "as its jobs have said"


def test_what_jobs_say_of_waiting_makes_the_level_lower(
    baton: Baton, fake: FakeCoordinator
) -> None:
    """A hundred GPUs for half of each day; if all of it may wait, half as many do."""
    answer = pb.GetCostsResponse()
    use = answer.uses.add(gpu_type="H100", lease_usd=1.0, burst_usd=3.0)
    use.begin_time.seconds = 1_000 * DAY_S
    use.wanted_gpus.extend(([100.0] * 12 + [0.0] * 12) * 30)
    use.gpus.extend(use.wanted_gpus)
    answer.kept_since_time.seconds = 1_000 * DAY_S
    patient = pb.GetCostsResponse()
    patient.CopyFrom(answer)
    patient.uses[0].flexible_ratio, patient.uses[0].flexible_hours = 1.0, 24
    fake.answers["GetCosts"] = [answer, patient, patient]
    (urgent,) = json.loads(baton("leases", "--json").stdout)
    shown = baton("leases")
    (waits,) = json.loads(baton("leases", "--json", "--flexible", "0").stdout)
    assert (urgent["level_gpus"], waits["level_gpus"]) == (100, 100)
    assert shown.stdout.splitlines()[1].split()[3] == "50"
    assert "H100: 100% of the work may wait for 24 h" in shown.stderr
