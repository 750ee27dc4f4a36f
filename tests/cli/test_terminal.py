"""Tables on a narrow terminal: what is too wide gives way, and nothing is lost."""

import contextlib
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len

from agent.processes import shim
from coordinator.cli.main import cli
from coordinator.cli.render import Column, write_fields, write_notice, write_sentence, write_table
from protos.baton.v1 import jobs_pb2, types_pb2
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator
from tests.cli.test_simulate import FLEET, TRACE

SENTENCE = "needs 8 GPUs on one node; the largest free block is 6 on n14, which is kept for job 7"


Shown = Callable[[Callable[[], object]], list[str]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """What somebody writes on a terminal of 80 columns, by lines."""

    def lines(write: Callable[[], object]) -> list[str]:
        terminal = io.StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stdout", terminal)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TERM", "dumb")
        write()
        found = terminal.getvalue().splitlines()
        assert max(map(len, found)) <= 80, found
        return found

    return lines


def words(lines: list[str]) -> list[str]:
    return " ".join(lines).split()


def test_a_sentence_goes_on_below_and_is_whole(shown: Shown) -> None:
    columns = (Column("NODE"), Column("POWER", right=True), Column("REASON", wrap=True))
    rows = [("n1", "310 W", SENTENCE), ("n2", "12 W", "")]
    title, *lines = shown(lambda: write_table(columns, rows))
    assert title == "NODE  POWER  REASON"
    assert lines[0].startswith("n1    310 W  needs 8 GPUs")
    assert lines[1].startswith(" " * 13)
    assert words(lines[:2]) == ["n1", "310", "W", *SENTENCE.split()]
    assert lines[2] == "n2     12 W  -"


def test_a_column_without_a_place_in_which_nothing_is_known_is_left_out(shown: Shown) -> None:
    columns = (Column("NODE"), Column("GPUS"), Column("REASON", wrap=True), Column("NOTE"))
    rows = [(f"n{n}", "x" * 70, "", "m") for n in range(2)]
    lines = shown(lambda: write_table(columns, rows))
    assert [line.split() for line in lines] == [
        ["NODE", "GPUS"], ["n0", "x" * 70], ["n1", "x" * 70], [],
        ["NODE", "NOTE"], ["n0", "m"], ["n1", "m"],
    ]  # fmt: skip


def test_in_a_pipe_columns_stand_below_one_another_whatever_the_letters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wide ones take two places where they are looked at, and a mark on a letter none."""
    names = ("abcdef", "名前", "ü", "e\u0301")
    write_table((Column("NAME"), Column("N", right=True)), [(name, 1) for name in names])
    lines = capsys.readouterr().out.splitlines()
    assert [cell_len(line) for line in lines] == [9] * 5


def test_titles_break_before_a_figure_would(shown: Shown) -> None:
    columns = (Column("POLICY"), *(Column(f"WHILE ONE WAITS {n}", right=True) for n in range(6)))
    row = ("baton", *(f"{n}00.0%" for n in range(1, 7)))
    lines = shown(lambda: write_table(columns, [row]))
    assert [line.split()[0] for line in lines] == ["WHILE", "ONE", "WAITS", "POLICY", "baton"]
    assert lines[-1].split() == list(row)


def test_columns_without_a_place_stand_below_beside_their_row(
    shown: Shown,
) -> None:
    figures = [f"{n}234567.89" for n in range(1, 10)]
    columns = [Column("POLICY"), Column("FLEET", key=True)]
    columns += [Column(f"F{n}", right=True) for n in range(1, 10)]
    table = [("baton", "as it is", *figures), ("fifo", "as asked", *figures)]
    lines = shown(lambda: write_table(columns, table))
    between = lines.index("")
    assert lines[0].split()[:3] == ["POLICY", "FLEET", "F1"]
    assert lines[between + 1].split()[:2] == ["POLICY", "FLEET"]
    rows = [line for line in lines if line.startswith("baton")]
    assert [
        word for row in rows for word in row.removeprefix("baton   as it is").split()
    ] == figures


def test_a_name_loses_its_end_with_a_sign(shown: Shown) -> None:
    columns = (Column("NAME", shorten=True), Column("JOBS", right=True))
    lines = shown(lambda: write_table(columns, [("x" * 200, 3)]))
    assert lines[1].split() == ["x" * 73 + "…", "3"]


def test_a_sentence_breaks_between_words_and_in_no_command(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"job 3 waits: {SENTENCE}; or `baton submit --gpus 4 --class guaranteed` once more"
    lines = shown(lambda: write_sentence(said))
    assert words(lines) == said.split()
    assert all(line.count("`") % 2 == 0 for line in lines), lines
    assert [line.startswith("  ") for line in lines] == [False, *[True] * (len(lines) - 1)]
    notices = io.StringIO()
    monkeypatch.setattr("sys.stderr", notices)
    write_notice(said)
    assert notices.getvalue() == f"baton: {said}\n", "a pipe gets one line"
    monkeypatch.setattr(notices, "isatty", lambda: True, raising=False)
    write_notice(said)
    write_notice(f"again: {said}", whole=True)
    assert max(map(len, notices.getvalue().splitlines()[1:-1])) <= 80
    assert notices.getvalue().splitlines()[-1] == f"baton: again: {said}"


def test_what_is_said_of_a_job_breaks_between_words_and_a_command_nowhere(
    shown: Shown,
) -> None:
    command = "python train.py --data /data/a"
    lines = shown(lambda: write_fields([("reason", SENTENCE), ("command", command)], ["command"]))
    assert lines[0].startswith("  reason   needs 8 GPUs on one node; ")
    assert lines[1].startswith(" " * 11 + "is kept")
    assert words(lines[:2]) == ["reason", *SENTENCE.split()]
    lines = shown(lambda: write_fields([("reason", "x"), ("command", command * 2)], ["command"]))
    assert lines[1] == f"  command  {command * 2}"


def test_what_is_asked_of_jobs_fits(tmp_path: Path, shown: Shown) -> None:
    (tmp_path / "jobs.csv").write_text(TRACE)
    (tmp_path / "fleet.toml").write_text(FLEET)
    files = [str(tmp_path / "jobs.csv"), "--fleet", str(tmp_path / "fleet.toml")]
    asked = [*files, "--policy", "fifo", "--add-nodes", "1xA100"]
    lines = shown(lambda: cli.main(["simulate", *asked], standalone_mode=False))
    assert sum(line.startswith("fifo") for line in lines) == 6
    assert "RESTARTS" in words(lines)


def test_a_forecast_fits(tmp_path: Path, shown: Shown) -> None:
    lines = ["time,demand"]
    for hour in range(24 * 21):
        day, rest = divmod(hour, 24)
        gpus = 800 - 400 * math.cos(2 * math.pi * rest / 24)
        lines.append(f"2026-03-{day + 1:02}T{rest:02}:00,{gpus:.0f}")
    (tmp_path / "demand.csv").write_text("\n".join(lines))
    asked = ["forecast", "--demand", str(tmp_path / "demand.csv"), "--ahead", "24"]
    lines = shown(lambda: cli.main(asked, standalone_mode=False))
    assert sum(line.lstrip().startswith("24 h") for line in lines) == 2


@pytest.mark.parametrize(("there", "hint"), [("", ""), ("train.py", " (there is ./train.py)")])
def test_a_list_leaves_out_where_a_command_was_looked_for(
    baton: Baton, fake: FakeCoordinator, tmp_path: Path, there: str, hint: str
) -> None:
    """The directories of PATH are wider than a screen; `baton job` has them all."""
    (tmp_path / there).touch()
    path = b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    wanted = shim.Launch(b"\0".join((os.fsencode(tmp_path), b"1", b"train.py", path)))
    missing = FileNotFoundError(2, "not on the path", b"train.py")
    with contextlib.chdir(tmp_path):
        said = shim.explain(missing, wanted)
    reason = f"n1 could not start it: {said}; tried again after 5 s"
    job = types_pb2.Job(id=12, phase=types_pb2.JOB_PHASE_QUEUED, reason=reason)
    fake.answers["ListJobs"] = [jobs_pb2.ListJobsResponse(jobs=[job])]
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=job)]
    short = f"n1 could not start it: no such file: train.py{hint}; tried again after 5 s"
    assert baton("jobs").stdout.splitlines()[1].endswith(f"  {short}")
    assert json.loads(baton("jobs", "--json").stdout)[0]["reason"] == reason
    assert reason in baton("job", "12").stdout


def test_of_a_job_that_leaves_it_is_said_why(baton: Baton, fake: FakeCoordinator) -> None:
    """And not any more why it was started where it still is."""
    job = types_pb2.Job(id=12, phase=types_pb2.JOB_PHASE_CANCELLING, reason="runs on n1 and n2")
    stopping = types_pb2.ATTEMPT_PHASE_STOPPING
    for rank, node in enumerate(("n1", "n2")):
        job.attempts.add(
            id=f"12.1.{rank}", epoch=1, rank=rank, node=node, phase=stopping, reason="cancelled"
        )
    fake.answers["ListJobs"] = [jobs_pb2.ListJobsResponse(jobs=[job])]
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=job)]
    assert baton("jobs").stdout.splitlines()[1].endswith("  leaves n1, n2: cancelled")
    assert "leaves n1, n2: cancelled" in baton("job", "12").stdout
    for attempt in job.attempts:
        attempt.phase = types_pb2.ATTEMPT_PHASE_RUNNING
    fake.answers["ListJobs"] = [jobs_pb2.ListJobsResponse(jobs=[job])]
    assert baton("jobs").stdout.splitlines()[1].endswith("  runs on n1 and n2")
