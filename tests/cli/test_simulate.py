"""`baton simulate`: its table, its JSON, and what it says of files that cannot be used."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from coordinator.cli.main import cli

TRACE = """\
job,arrival_s,gpus,steps,class,project,A100,K80
1,0,1,7200,standard,a,2,1
2,0,1,3600,standard,b,2,
3,1800,2,3600,guaranteed,a,,4
"""
FLEET = """\
restart_s = 0
[gpus.A100]
count = 1
price_per_h = 2.0
[gpus.K80]
count = 2
price_per_h = 0.5
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    trace, fleet = tmp_path / "jobs.csv", tmp_path / "fleet.toml"
    trace.write_text(TRACE)
    fleet.write_text(FLEET)
    return trace, fleet


def baton(files: tuple[Path, Path], *more: str) -> Result:
    trace, fleet = files
    return CliRunner().invoke(cli, ["simulate", str(trace), "--fleet", str(fleet), *more])


def test_fifo_by_hand(files: tuple[Path, Path]) -> None:
    """The first takes a K80 (most are free) for two hours, the second the A100 for half of one; the
    third waits for both K80, its class notwithstanding, and takes them for a quarter."""
    result = baton(files, "--policy", "fifo", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["policy"] == "fifo"
    assert row["makespan_h"] == pytest.approx(2.25)
    assert row["completion_h"]["mean"] == pytest.approx((2 + 0.5 + 1.75) / 3)
    assert row["provisioned_cost"] == pytest.approx(2.25 * 3.0)


def test_a_table_and_the_command_that_makes_it_again(files: tuple[Path, Path]) -> None:
    result = baton(files, "--policy", "baton", "--policy", "max-min", "--seed", "7")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["POLICY", "baton", "max-min"]
    assert "--policy baton --policy max-min --seed 7 --balance 0.3" in result.stderr
    assert baton(files, "--policy", "baton", "--policy", "max-min", "--seed", "7").stdout == (
        result.stdout
    )


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("jobs.csv", "project,A100", "projcet,A100", "'projcet' is no column and no GPU type"),
        ("jobs.csv", "steps", "K80", "the column steps is missing"),
        ("jobs.csv", "1,0,1,7200", "1,0,1,many", "line 2: steps is 'many', not a number"),
        ("jobs.csv", "1,0,1,7200", "1,0,0,7200", "line 2: gpus is '0', not 1 or more"),
        ("jobs.csv", "guaranteed", "golden", "line 4: class is 'golden', not one of guaranteed"),
        ("jobs.csv", "3,1800,2", "3,1800,4", "line 4: no GPU type of the fleet can run it on 4"),
        ("jobs.csv", "2,0,1", "1,0,1", "line 3: job 1 is there twice"),
        ("jobs.csv", "1,0,1,7200", "1,0,1.5,7200", "line 2: gpus is '1.5', not a whole number"),
        ("jobs.csv", "1,0,1,7200", "1.5,0,1,7200", "line 2: job is '1.5', not a whole number"),
        ("jobs.csv", "b,2,", "b,2,,7", "line 3: there are more cells than columns"),
        ("jobs.csv", "A100,K80", "A100,A100", "the column A100 is there twice"),
        ("jobs.csv", "7200", "1e14", "line 2: it takes 1.39e+10 hours where it is fastest"),
        ("fleet.toml", "[gpus.K80]", "[gpus.model]", "cannot be called 'model', as a column is"),
        ("fleet.toml", "restart_s = 0", "restart_s = nan", "restart_s is not negative"),
        ("fleet.toml", "count = 1", "cuont = 1", "unknown field `cuont`"),
        ("fleet.toml", "count = 1", "count = 0", "needs a count of 1 or more"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    files: tuple[Path, Path], name: str, old: str, new: str, sentence: str
) -> None:
    path = files[0].parent / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    result = baton(files)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert name in result.stderr


def test_a_spreadsheet_s_first_byte_is_no_column(files: tuple[Path, Path]) -> None:
    files[0].write_text("\ufeff" + TRACE)
    assert baton(files, "--policy", "fifo").exit_code == 0


def test_without_prices_the_fastest_type_is_the_cheapest(files: tuple[Path, Path]) -> None:
    files[1].write_text(FLEET.replace("price_per_h = 2.0", "").replace("price_per_h = 0.5", ""))
    result = baton(files, "--policy", "per-dollar", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["provisioned_cost"] == 0


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = baton((tmp_path / "none.csv", tmp_path / "none.toml"))
    assert result.exit_code == 2
    assert "none.toml cannot be read (No such file or directory)" in result.stderr


def test_without_the_solver_the_greedy_is_there_and_the_rest_says_what_to_do(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("coordinator.solver", "coordinator.sim.rounds"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "highspy", None)
    assert baton(files, "--policy", "baton-greedy", "--policy", "fifo").exit_code == 0
    result = baton(files, "--policy", "baton")
    assert result.exit_code == 1
    assert "highspy is not installed: pip install 'gpu-baton[scheduling]'" in result.stderr
    assert "--policy baton-greedy" in result.stderr
