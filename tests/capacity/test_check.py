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
        f"  create: run {resume} n01",
        f"  delete: run {suspend} n01",
    ]
    assert site.calls() == []


def test_what_cannot_be_seen_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    table = "rack1={nodes='n1', driver='ipmi', address='bmc', credentials_file='/nowhere/bmc.toml'}"
    assert main(["n[1-2]", "--config=", f"--capacity={table}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "n1 (rack1): /nowhere/bmc.toml cannot be read: No such file or directory"
    assert lines[-1] == "n2: in no group of 'capacity'"


@pytest.mark.parametrize("arguments", [[], ["--config="], ["n[", "--config="]])
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert main(arguments) == 2
