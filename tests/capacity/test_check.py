"""`python -m coordinator.capacity_check`: states and plans, and nothing is switched."""

from pathlib import Path

import pytest

from coordinator.capacity_check import main
from tests.capacity.site import Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folder = tmp_path / "site"
    folder.mkdir()
    return Site(folder)


def test_states_and_plans_are_shown(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    resume, suspend, states = (site.program(name) for name in ("resume", "suspend", "states"))
    table = (
        f"rack1={{nodes='n[01-02]', driver='programs', resume_program='{resume}',"
        f" suspend_program='{suspend}', state_program='{states}'}}"
    )
    assert main(["n01", "--config=", f"--capacity={table}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "n01 (rack1): off",
        f"  resume: run {resume} n01",
        f"  suspend: run {suspend} n01",
    ]
    assert site.calls() == []


def test_what_is_rented_is_made_and_deleted(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    create, delete = (site.program(name) for name in ("create", "delete"))
    table = (
        f"cloud={{nodes='c1', driver='burst', create_program='{create}',"
        f" delete_program='{delete}', gpu_type='H100', gpus_per_node=8}}"
    )
    assert main(["c1", "--config=", f"--capacity={table}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "c1 (cloud): unknown: there is no 'state_program', so its agent's word alone counts",
        f"  create: run {create} c1",
        f"  delete: run {delete} c1",
    ]


def test_a_program_that_cannot_be_started_is_1(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "suspend"
    plain.write_text("#!/bin/sh\n")
    states = site.program("states")
    table = (
        f"rack1={{nodes='n1', driver='programs', resume_program='{tmp_path}/resum',"
        f" suspend_program='{plain}', resume_fail_program='{tmp_path}', state_program='{states}'}}"
    )
    assert main(["n1", "--config=", f"--capacity={table}"]) == 1
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"  resume_program: '{tmp_path}/resum' does not exist",
        f"  suspend_program: '{plain}' is not executable",
        f"  resume_fail_program: '{tmp_path}' is not executable",
    ]
    assert site.calls() == []


def test_what_cannot_be_seen_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    table = "rack1={nodes='n1', driver='ipmi', address='bmc', credentials_file='/nowhere/bmc.toml'}"
    assert main(["n[1-2]", "--config=", f"--capacity={table}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "n1 (rack1): /nowhere/bmc.toml cannot be read: No such file or directory"
    assert lines[-1] == "n2: in no group of 'capacity'"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "NODES comes first"),
        (["--config="], "NODES comes first"),
        (["n[01-02", "--config="], "'n[01-02' has a '[' without its ']'"),
        (["n1]", "--config="], "'n1]' has a ']' without its '['"),
    ],
)
def test_wrong_usage_is_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["n1", "--help"]])
def test_help_is_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert ("--config PATH" in said.out, "Exit status" in said.out, said.err) == (True, True, "")


def test_the_configuration_that_was_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text("log_level = 'info'\n")
    assert main(["n1", "--config", str(path)]) == 1
    assert f"there is no 'capacity': file {path} was read" in capsys.readouterr().err
    path.write_text("[capacity.all]\nnodes = 'n1'\ndriver = 'simulated'\n")
    assert main(["n1", "--config", str(path)]) == 0
    assert f"'capacity' is from file {path}\n" in capsys.readouterr().err
    assert main(["n1", "--config="]) == 1
    assert "no file was read" in capsys.readouterr().err
