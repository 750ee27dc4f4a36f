"""`baton simulate`: its table, its JSON, and what it says of files that cannot be used."""

import asyncio
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from coordinator.cli.main import cli
from coordinator.cli.simulate import POLICIES
from coordinator.core.messages import PutAttempt, PutJob, PutNode
from coordinator.core.model import (
    Attempt,
    AttemptTimes,
    GpuFacts,
    HostFacts,
    Job,
    JobSpec,
    Node,
    TrainerTime,
)
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.store.sqlite import SqliteStore
from tests.cli.conftest import Progress

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


def test_the_files_that_the_help_shows_run(files: tuple[Path, Path]) -> None:
    paragraphs = CliRunner().invoke(cli, ["simulate", "--help"]).stdout.split("\n\n")
    shown = {words[0]: words for text in paragraphs if (words := text.split("\n"))}
    for path, first in zip(files, ("    job,arrival", "    restart_s"), strict=True):
        (lines,) = [words for word, words in shown.items() if word.startswith(first)]
        path.write_text("\n".join(line.strip() for line in lines))
    ran = baton(files, "--policy", "fifo")
    assert ran.exit_code == 0, ran.stderr


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
    (again,) = (line for line in result.stderr.splitlines() if "again: " in line)
    assert again.endswith("fleet.toml --policy baton --policy max-min --seed 7")
    words = shlex.split(again.partition("again: ")[2])
    assert CliRunner().invoke(cli, words[1:]).stdout == result.stdout


def test_who_waits_is_told_how_far_it_is(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job of each policy, as the fleet is and as it would be."""
    shown = Progress()
    monkeypatch.setattr("coordinator.cli.simulate.progress", shown.bar)
    assert baton(files, "--add-nodes", "1xA100").exit_code == 0
    assert shown.bars == [sum(shown.told)] == [2 * 2 * 3]


def test_who_is_late_is_counted_where_there_are_deadlines(files: tuple[Path, Path]) -> None:
    """By hand: they end after 2, .5 and 2.25 h."""
    lines = TRACE.splitlines()
    due = [f"{line},{s}" for line, s in zip(lines, ("deadline_s", "7000", "", "9000"), strict=True)]
    assert "LATE" not in baton(files, "--policy", "fifo").stdout
    files[0].write_text("\n".join(due))
    titles, row = (
        re.split(r"\s{2,}", line) for line in baton(files, "--policy", "fifo").stdout.splitlines()
    )
    assert row[titles.index("LATE")] == "1 of 2"
    (figures,) = json.loads(baton(files, "--policy", "fifo", "--json").stdout)
    assert (figures["late"], figures["deadlines"]) == (1, 2)
    change = baton(files, "--policy", "fifo", "--add-nodes", "1xA100").stdout.splitlines()[-1]
    assert re.split(r"\s{2,}", change)[titles.index("LATE") + 1] == "-1"


def test_a_project_within_its_quota_comes_first(files: tuple[Path, Path]) -> None:
    """On one GPU: of two jobs that come together the one with a quota, though the other is the
    shorter one."""
    trace, fleet = files
    trace.write_text("job,arrival_s,gpus,steps,project,A100\n1,0,1,3600,a,1\n2,0,1,7200,b,1\n")
    plain = json.loads(baton(files, "--policy", "baton-greedy", "--json").stdout)
    fleet.write_text(FLEET + "[projects.b]\ngpu_hours_per_day = 24\n")
    quotas = json.loads(baton(files, "--policy", "baton-greedy", "--json").stdout)
    assert plain[0]["completion_h"]["mean"] == pytest.approx((1 + 3) / 2)
    assert quotas[0]["completion_h"]["mean"] == pytest.approx((3 + 2) / 2)


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        (
            "fleet.toml",
            "[gpus.K80]",
            "[projects.a]\nweight = 0\n[gpus.K80]",
            "projects.a.weight is 0; it must be above 0",
        ),
        (
            "fleet.toml",
            "[gpus.K80]",
            "[projects.a]\nwaight = 1\n[gpus.K80]",
            "unknown key 'projects.a.waight'; did you mean 'weight'?",
        ),
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
        ("jobs.csv", TRACE, "", "jobs.csv is empty; its first line names the columns"),
        ("jobs.csv", TRACE, TRACE.splitlines(True)[0], "jobs.csv has no jobs"),
        ("jobs.csv", TRACE, TRACE.replace(",", ";"), "semicolons separate its columns; write"),
        ("jobs.csv", "job,", "Job,", "'Job' is no column and no GPU type of the fleet; did you"),
        (
            "jobs.csv",
            "K80",
            "H100,K80",
            "'H100' is no column and no GPU type of the fleet; did you",
        ),
        (
            "jobs.csv",
            "project,A",
            "user,A",
            "'user' is no column and no GPU type of the fleet; lea",
        ),
        (
            "jobs.csv",
            TRACE,
            "job_id,num_gpus\n1,1\n",
            "line names none of the columns job, arrival_s",
        ),
        ("jobs.csv", "1,0,1,7200,standard,a,2,1", "1,0,1", "line 2: steps is '', not a number"),
        ("jobs.csv", "3,1800,2", "3,1800,4", "run it on 4; it has a rate on 2 x K80"),
        ("jobs.csv", "A100,K80", "model", "no column of a GPU type of the fleet (A100, K80)"),
        ("jobs.csv", "1,0,1,", "a,0,1,", "line 2: job is 'a', not a number of 0 or more; number"),
        ("jobs.csv", "1,0,1,", "1,2026-03-01T00:00,1,", "not a number of 0 or more; seconds since"),
        ("jobs.csv", "2,0,1,3600", "\n\n2,0,1,x", "line 5: steps is 'x', not a number"),
        ("fleet.toml", "[gpus.K80]", "[gpus.model]", "cannot be called 'model', as a column is"),
        (
            "fleet.toml",
            "restart_s = 0",
            "restart_s = nan",
            "restart_s is nan; it must be 0 or more",
        ),
        (
            "fleet.toml",
            "count = 1",
            "cuont = 1",
            "unknown key 'gpus.A100.cuont'; did you mean 'count'?",
        ),
        ("fleet.toml", "count = 1", "count = 0", "gpus.A100.count is 0; it must be above 0"),
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


def test_a_file_is_read_as_it_is_meant(files: tuple[Path, Path]) -> None:
    """A spreadsheet's first byte and ends of lines, spaces, columns and jobs in another order."""
    plain = baton(files, "--policy", "fifo", "--json").stdout
    lines = [line.split(",") for line in TRACE.splitlines()]
    turned = [", ".join(reversed(line)) for line in (lines[0], *reversed(lines[1:]))]
    files[0].write_bytes(("\ufeff" + "\r\n".join(turned) + "\r\n,,,,\r\n").encode())
    assert baton(files, "--policy", "fifo", "--json").stdout == plain
    files[0].write_text(TRACE, encoding="utf-16")
    assert "is not text in UTF-8; save it as CSV in UTF-8" in baton(files).stderr


def test_a_clock_that_began_long_ago_and_jobs_of_nothing_are_as_good(
    files: tuple[Path, Path],
) -> None:
    """Seconds of Unix time; nodes that fail do so from the first job on."""
    more = ("--policy", "fifo", "--policy", "baton-greedy", "--node-mtbf-h", "1", "--json")
    text = TRACE.replace("1,0,1,7200", "1,0,1,0")
    files[0].write_text(text)
    early = json.loads(baton(files, *more).stdout)
    files[0].write_text(text.replace(",0,1,", ",1800000000,1,").replace(",1800,2", ",1800001800,2"))
    late = json.loads(baton(files, *more).stdout)
    for one, other in zip(early, late, strict=True):
        assert other["makespan_h"] == pytest.approx(one["makespan_h"])
        assert other["restarts"] == one["restarts"]
        assert one["fairness"]["worst"] < 10, "what takes no time is not late"


def test_a_gpu_type_on_which_nobody_runs_is_said(files: tuple[Path, Path]) -> None:
    files[0].write_text("job,arrival_s,gpus,steps,A100\n1,0,1,3600,1\n")
    assert "K80: nobody runs there, since no job" in baton(files, "--policy", "fifo").stderr


def test_alone_it_says_all_that_it_can_be_given() -> None:
    result = CliRunner().invoke(cli, ["simulate"], prog_name="baton")
    assert result.exit_code == 2
    assert result.stderr == "baton: give TRACE and --fleet, or --journal, or --demand\n"


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


def test_what_if_there_were_more_stands_beside_what_is(files: tuple[Path, Path]) -> None:
    result = baton(files, "--policy", "fifo", "--add-nodes", "2xK80", "--price", "K80=0.25")
    assert result.exit_code == 0, result.output
    lines = [line.split("  ") for line in result.stdout.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert [row[:2] for row in cells] == [
        ["POLICY", "FLEET"], ["fifo", "as it is"], ["fifo", "as asked"], ["fifo", "change"],
    ]  # fmt: skip
    assert cells[1][5] == "2.25"
    assert cells[2][5] == "2.00", "the third job has two K80 of its own"
    assert cells[3][5] == "-11.1%"
    assert [row[10] for row in cells[1:3]] == ["6", "6"], "2.25 x 2.5 and 2.0 x 3.0 dollars"
    assert "--add-nodes 2xK80 --price K80=0.25\n" in result.stderr
    fewer = baton(files, "--policy", "fifo", "--remove", "1xk80", "--json")
    assert [row["fleet"] for row in json.loads(fewer.stdout)] == ["as it is", "as asked"]
    assert "job 3 could never run: it needs 2 GPUs of one type" in fewer.stderr
    assert "; it is left out of both" in fewer.stderr


def test_a_quota_says_who_gains_and_who_loses(files: tuple[Path, Path]) -> None:
    files[0].write_text(
        "job,arrival_s,gpus,steps,project,A100\n1,0,1,7200,a,2\n2,0,1,7200,b,2\n3,0,1,7200,b,2\n"
    )
    result = baton(files, "--policy", "baton-greedy", "--quota", "b=x3")
    assert result.exit_code == 0, result.output
    table = [line.split() for line in result.stdout.splitlines()[-2:]]
    assert table == [
        ["baton-greedy", "a", "1", "1.00", "3.00", "+200.0%"],
        ["baton-greedy", "b", "2", "2.50", "1.50", "-40.0%"],
    ]


def test_a_question_that_cannot_be_asked_is_said(files: tuple[Path, Path]) -> None:
    for option, text, sentence in (
        ("--remove", "9xK80", "9 x K80 cannot be removed: there are"),
        ("--add-nodes", "K80", "is no number of GPUs of one type, like 4xH200"),
        ("--quota", "c=x2", "no job is of project 'c'; there are a, b"),
        ("--policy", "packing", "--pairs FILE.csv"),
        ("--balance", "nan", "nan is not a finite number"),
        ("--rate-error", "nan", "nan is not a finite number"),
        ("--journal", "some.sqlite3", "give TRACE or --journal, not both"),
    ):
        result = baton(files, option, text)
        assert result.exit_code == 2, text
        assert sentence in result.stderr


def test_an_empty_cell_under_a_type_that_is_added_is_estimated(files: tuple[Path, Path]) -> None:
    files[0].write_text(
        "job,arrival_s,gpus,steps,A100,K80,H200\n1,0,1,7200,2,1,50\n2,0,1,7200,2,1,\n"
    )
    assert baton(files).exit_code == 2, "a column of no type"
    result = baton(files, "--policy", "fifo-aware", "--add-nodes", "2xH200", "--json")
    before, after = json.loads(result.stdout)
    assert (before["fleet"], after["fleet"]) == ("as it is", "as asked")
    assert before["completion_h"]["mean"] == pytest.approx(1.5)
    quick, slow = 7200 / 50 / 3600, 2 * after["completion_h"]["mean"] - 7200 / 50 / 3600
    assert quick < slow < 1.0


def test_every_key_of_chance_is_an_option_and_the_seed_decides(files: tuple[Path, Path]) -> None:
    def hashed(*more: str) -> str:
        result = baton(files, "--policy", "fifo", "--json", *more)
        assert result.exit_code == 0, result.output
        return str(json.loads(result.stdout)[0]["trace_hash"])

    plain = hashed()
    for words in (
        "--node-mtbf-h 1 --node-gpus 1 --mend-h 0.2", "--checkpoint-s 600 --save-s 30",
        "--node-mtbf-h 1 --node-gpus 1 --boot-s 600",
    ):  # fmt: skip
        options = words.split()
        assert hashed(*options) != plain
        assert hashed(*options, "--seed", "3") == hashed(*options, "--seed", "3")
    failing = "--node-mtbf-h 0.5 --node-gpus 1 --mend-h 0.2".split()
    assert hashed(*failing, "--seed", "1") != hashed(*failing, "--seed", "2")
    said = files[1].read_text() + "[chance]\nnode_mtbf_h = 0.5\nnode_gpus = 1\nmend_h = 0.2\n"
    expected = hashed(*failing, "--seed", "1")
    files[1].write_text(said)
    assert hashed("--seed", "1") == expected, "in the file it means the same"


def test_what_it_would_be_if_all_shared_where_that_pays(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two jobs of an hour on one GPU: together at 0.8 of their speeds they end after 1 h 15."""
    trace, fleet = files
    trace.write_text("job,arrival_s,gpus,steps,model,A100\n1,0,1,3600,m,1\n2,0,1,3600,m,1\n")
    fleet.write_text("restart_s = 0\n[gpus.A100]\ncount = 1\n")
    pairs = tmp_path / "pairs.csv"
    asks = ("--policy", "baton", "--policy", "baton-pairs", "--pairs", str(pairs), "--json")
    for kept, makespan_h in ((0.8, 1.25), (0.5, 2.0)):
        pairs.write_text(f"gpu_type,model,beside,steps_per_s\nA100,m,m,{kept}\n")
        result = baton(files, *asks)
        assert result.exit_code == 0, result.output
        alone, paired = json.loads(result.stdout)
        assert alone["makespan_h"] == pytest.approx(2.0)
        assert paired["makespan_h"] == pytest.approx(makespan_h, abs=0.05)
    fleet.write_text(f"{fleet.read_text()}[projects.a]\ngpu_hours_per_day = 24\n")
    assert "knows no quotas" in baton(files, *asks).stderr


def test_pairs_that_say_nothing_here_are_said(files: tuple[Path, Path], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    columns = "gpu_type,model,beside,steps_per_s\n"
    files[0].write_text("job,arrival_s,gpus,steps,model,A100\n1,0,1,60,m,2\n2,0,1,60,m,2\n")
    more = ("--policy", "packing", "--pairs", str(pairs))
    pairs.write_text(f"{columns}V100,m,m,1.5\n")
    result = baton(files, *more)
    assert result.exit_code == 2
    assert "has pairs on V100, and the fleet has A100, K80: none of them would be" in (
        result.stderr
    )
    pairs.write_text(f"{columns}A100,m,n,1.5\n")
    result = baton(files, *more)
    assert result.exit_code == 2
    assert "has no pair of two models of the jobs, which are m" in result.stderr
    pairs.write_text(f"{columns}A100,m,m,1.5\nV100,m,m,1.5\n")
    result = baton(files, *more)
    assert result.exit_code == 0
    assert "has no pairs on K80: none of these is shared" in result.stderr
    assert "has pairs on V100, of which the fleet has none" in result.stderr


def test_pairs_are_packed(files: tuple[Path, Path], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("gpu_type,model,beside,steps_per_s\nA100,m,m,1.5\n")
    files[0].write_text("job,arrival_s,gpus,steps,model,A100\n1,0,1,7200,m,2\n2,0,1,7200,m,2\n")
    more = ("--policy", "packing", "--policy", "fifo", "--pairs", str(pairs), "--json")
    packed, queued = json.loads(baton(files, *more).stdout)
    assert packed["makespan_h"] == pytest.approx(7200 / 1.5 / 3600)
    assert queued["makespan_h"] == pytest.approx(2.0)
    pairs.write_text("gpu_type,model,beside,steps_per_s\nA100,m,m,fast\n")
    assert "line 2: steps_per_s is no number" in baton(files, *more).stderr
    pairs.write_text("steps_per_s,gpu_type,model,beside\n1,A100,m,m\n1,A100,m,m\n")
    assert "line 3: m beside m on A100 is there twice" in baton(files, *more).stderr
    pairs.write_text("type,model\n")
    assert "the columns are not gpu_type, model, beside" in baton(files, *more).stderr


def test_quotas_are_those_of_the_coordinator(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Two jobs at once on one GPU: the project with a quota is first, whoever came first."""
    config = tmp_path / "coordinator.toml"
    config.write_text('listen = "127.0.0.1:1"\n[projects.b]\ngpu_hours_per_day = 48\n')
    files[0].write_text(
        "job,arrival_s,gpus,steps,project,A100\n1,0,1,7200,a,2\n2,0,1,7200,b,2\n3,0,1,60,a,2\n"
    )
    asks = ("--policy", "baton-greedy", "--quota", "b=x2")

    def mean_h(*more: str) -> float:
        result = baton(files, *asks, *more)
        assert result.exit_code == 0, result.output
        (line,) = [line for line in result.stdout.splitlines() if " b " in line]
        return float(line.split()[-2])

    assert mean_h("--config", str(config)) < mean_h()
    config.write_text("[projects.b]\ngpu_hours_a_day = 48\n")
    result = baton(files, *asks, "--config", str(config))
    assert result.exit_code == 2
    assert "unknown key 'projects.b.gpu_hours_a_day'; did you mean 'gpu_hours_per_day'?" in (
        result.stderr
    )
    assert baton(files, "--config", str(tmp_path / "none.toml")).exit_code == 2


def test_every_policy_is_in_the_help() -> None:
    shown = CliRunner().invoke(cli, ["simulate", "--help"]).output
    assert all(f"\n    {name} " in shown for name in POLICIES)


def test_a_coordinator_s_own_journal_is_the_trace(tmp_path: Path) -> None:
    """Two jobs took half an hour each on its one H100; four H200 beside it take one at once."""
    path = tmp_path / "baton.sqlite3"
    facts = (GpuFacts("u1", "NVIDIA H100 80GB HBM3", 80 * 1024**3),)

    async def write() -> None:
        store = SqliteStore(path)
        await store.open()
        await store.commit([PutNode(Node("n1", "j", "", HostFacts(), facts))])
        for number in (1, 2):
            spec = JobSpec(command=("train",), gpus=1, project="demo")
            begin = 1_700_000_000_000 + (number - 1) * 1_800_000
            told = TrainerTime(step_s=1800)
            attempt = Attempt(
                number, 1, "n1", ("u1",), AttemptPhase.SUCCEEDED, begin, begin, begin + 1_800_000,
                times=AttemptTimes(ready_ms=0, speaks=True, trainer=told, step=900),
            )  # fmt: skip
            job = Job(number, spec, JobPhase.SUCCEEDED, 1_700_000_000_000)
            await store.commit([PutJob(job), PutAttempt(attempt)])
        await store.close()

    asyncio.run(write())
    run = ["simulate", "--journal", str(path), "--policy", "fifo", "--json"]
    result = CliRunner().invoke(cli, [*run, "--add-nodes", "4xH200"])
    assert result.exit_code == 0, result.output
    before, after = json.loads(result.stdout)
    assert before["makespan_h"] == pytest.approx(1.0)
    assert 0.3 < after["makespan_h"] < 0.5
    assert before["provisioned_cost"] == pytest.approx(3.99)
    assert "journal: 2 jobs on 1 x H100; 2 rates measured, 2 estimated" in result.stderr
    result = CliRunner().invoke(cli, ["simulate", "--journal", str(tmp_path / "none.sqlite3")])
    assert result.exit_code == 2
    assert "none.sqlite3 cannot be read (No such file or directory)" in result.stderr
    assert CliRunner().invoke(cli, ["simulate"]).exit_code == 2
