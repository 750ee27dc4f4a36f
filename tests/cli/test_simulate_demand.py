"""`baton simulate --demand`: its rows, its plot, and what it says of what cannot be."""

import json
import math
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from coordinator.cli.main import cli
from coordinator.cli.simulate_demand import OURS, POWER_POLICIES
from coordinator.forecast.demand_file import read_series
from protos.baton.v1 import demand_pb2
from tests.cli.conftest import Baton, Progress
from tests.cli.fake_coordinator import FakeCoordinator

FLEET = "nodes = 12\ngpus_per_node = 8\nbusy_w = 1000\nidle_w = 400\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A week of demand that breathes with the day, and a fleet."""
    lines = ["time,demand"]
    for step in range(7 * 144):
        day, minute = divmod(step * 10, 1440)
        gpus = 48 - 32 * math.cos(2 * math.pi * minute / 1440)
        lines.append(f"2026-03-{day + 1:02}T{minute // 60:02}:{minute % 60:02},{gpus:.0f}")
    (tmp_path / "demand.csv").write_text("\n".join(lines))
    (tmp_path / "fleet.toml").write_text(FLEET)
    return tmp_path


def asked(folder: Path, *arguments: str) -> Result:
    named = [
        str(folder / each) if each.endswith((".csv", ".toml", ".svg")) else each
        for each in arguments
    ]
    return CliRunner().invoke(cli, ["simulate", *named])


def test_rows_of_all_policies_and_the_command_that_replays_them(folder: Path) -> None:
    common = ("--demand", "demand.csv", "--fleet", "fleet.toml", "--warm-up", "72")
    found = asked(folder, *common, "--plot", "out.svg")
    assert found.exit_code == 0, found.output
    for name in (OURS, *POWER_POLICIES):
        assert f"{name} " in found.output
    assert "no policy can have more than that off" in found.output
    (again,) = (line for line in found.stderr.splitlines() if "again: " in line)
    words = shlex.split(again.partition("again: ")[2])
    plot = str(folder / "out.svg")
    assert words[-4:] == ["--warm-up", "72", "--plot", plot], "nothing that was not typed"
    assert CliRunner().invoke(cli, words[1:]).stdout == found.stdout
    root = ElementTree.parse(folder / "out.svg").getroot()  # noqa: S314 (our own)
    titles = [each.text for each in root.iter() if each.get("font-weight") == "bold"]
    assert titles == ["Demand", "Nodes on or booting", "Energy of nodes"]
    of_nodes, of_money = map(_colours, root[1:])
    for name in (OURS, *POWER_POLICIES):
        assert of_nodes[f"on, {name}"] == of_money[name], "a policy has one colour"
    assert _colours(root[0])["running and waiting"] == of_nodes["needed"]
    assert len(set(of_money.values())) == len(of_money)


def _colours(panel: ElementTree.Element) -> dict[str, str]:
    """By the legend, in which a sample stands before its name."""
    found, colour = {}, ""
    for each in panel[0]:
        if each.tag.endswith("polyline"):
            colour = each.attrib["stroke"]
        elif colour:
            found[str(each.text)], colour = colour, ""
    return found


def test_json_has_the_figures_and_nobody_saves_more_than_who_knows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And who waits at a terminal is told of each step of each policy."""
    shown = Progress()
    monkeypatch.setattr("coordinator.cli.simulate_demand.progress", shown.bar)
    common = ("--demand", "demand.csv", "--fleet", "fleet.toml", "--warm-up", "72", "--json")
    rows = {row["policy"]: row for row in json.loads(asked(folder, *common).stdout)}
    assert shown.bars == [sum(shown.told)] == [4 * 7 * 144]
    assert rows["always-on"]["saved_ratio"] == 0
    assert 0 < rows["baton"]["saved_ratio"] <= rows["clairvoyant"]["saved_ratio"]
    assert rows["clairvoyant"]["waiting_ratio"] == 0
    assert rows["baton"]["waiting_ratio"] < rows["idle-timeout"]["waiting_ratio"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--demand", "demand.csv", "--policy", "fifo"), "decides over jobs"),
        (("--demand", "demand.csv", "--warm-up", "168"), "nothing is known after the first 168 h"),
        (("--demand", "demand.csv", "--column", "gpus"), "no column 'gpus'"),
        (("--demand", "demand.csv", "--add-nodes", "4xH200"), "--add-nodes says nothing"),
        (("jobs.csv", "--demand", "demand.csv"), "TRACE says nothing"),
        (("--demand", "demand.csv", "--seed", "0"), "--seed says nothing"),
        (("--demand", "demand.csv", "--balance", "0.3"), "--balance says nothing"),
        (("--demand", "demand.csv", "--blind"), "--blind says nothing"),
        (("--demand", "demand.csv", "--boot-s", "0"), "--boot-s says nothing"),
        (("--demand", "demand.csv", "--node-gpus", "8"), "--node-gpus says nothing"),
        (("jobs.csv", "--fleet", "fleet.toml", "--warm-up", "336"), "nothing without --demand"),
        (("jobs.csv", "--fleet", "fleet.toml", "--column", "demand"), "nothing without --demand"),
        (("jobs.csv", "--fleet", "fleet.toml", "--plot", "out.svg"), "nothing without --demand"),
        (("--demand", "none.csv"), "cannot be read (No such file or directory)"),
        (("--policy", "clairvoyant"), "needs --demand"),
        (("--demand", "demand.csv", "--own-demand", "H100"), "leave out --demand"),
        (("--own-demand", "H100", "--column", "gpus"), "leave out --demand and --column"),
    ],
)
def test_what_makes_no_sense_is_refused(
    folder: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    found = asked(folder, *arguments)
    assert found.exit_code == 2
    assert sentence in found.output


def test_the_fleets_own_history_is_replayed_as_its_file_is(
    folder: Path, baton: Baton, fake: FakeCoordinator
) -> None:
    series = read_series(folder / "demand.csv")
    answer = demand_pb2.GetDemandResponse(period_minutes=10, gpu_type="H100", gpus=series.values)
    answer.begin_time.FromDatetime(series.begin)
    fake.answers["GetDemand"] = [answer]
    common = ("--fleet", str(folder / "fleet.toml"), "--warm-up", "144", "--policy", "idle-timeout")
    own = baton("simulate", "--own-demand", "h100", *common)
    assert own.exit_code == 0, own.stderr
    assert fake.requests[-1].gpu_type == "h100"
    assert "`baton forecast --gpu-type h100 --save demand.csv`" in own.stderr
    filed = baton("simulate", "--demand", str(folder / "demand.csv"), *common)
    assert own.stdout == filed.stdout


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("boot = 3", "unknown key 'boot'; did you mean 'boot_s'?"),
        ("colour = 3", "unknown key 'colour'; the keys are nodes, gpus_per_node"),
        ("boot_s = 0", "boot_s is 0; it must be above 0"),
        ("boot_s = 90000", "boot_s is 90000; a node boots within a day"),
        ("idle_w = 2000", "takes most when busy"),
        ("wait_usd_per_gpu_h = 0", "wait_usd_per_gpu_h is 0; it must be above 0"),
        ("spares = -1", "spares is -1; it must be 0 or more"),
        ("spares = 1.5", "spares must be a whole number, not 1.5"),
        ("off_w = inf", "off_w is inf; it must be 0 or more, and finite"),
        ("gpu_type = 8", "gpu_type must be a string, not 8"),
        ('nodes = "twelve"', "nodes must be a whole number, not 'twelve'"),
        ("nodes = ", "is no TOML"),
    ],
)
def test_a_fleet_that_makes_no_sense_is_refused(folder: Path, line: str, sentence: str) -> None:
    key = line.split(" ")[0]
    kept = [each for each in FLEET.splitlines() if not each.startswith(key)]
    (folder / "fleet.toml").write_text("\n".join([*kept, line]))
    found = asked(folder, "--demand", "demand.csv", "--fleet", "fleet.toml", "--warm-up", "72")
    assert found.exit_code == 2
    assert sentence in found.output
