"""The log lines of real programs: whole, numbered without a gap, registered, and read by lnav."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.events.test_code import PROGRAMS
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-log-events")]

ROOT = Path(__file__).resolve().parents[2]
LNAV_FORMAT = ROOT / "systemd/baton.lnav.json"
LNAV_DEADLINE_S = 60
JOB_ID = 1  # of the first job of a store
HEADS = {
    "coordinator": ["ts", "level", "event", "msg", "seq", "boot_id"],
    "n1": ["ts", "level", "event", "msg", "seq", "node", "boot_id"],
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A coordinator and an agent that have run a job and left; their logs stay."""
    made = Cluster(tmp_path_factory.mktemp("events") / "cluster")
    with made:
        made.start_coordinator()
        made.start_agent("n1", h100(1))
        made.wait_for_nodes("n1")
        assert work.submit(made, ["true"], gpus=1) == JOB_ID
        work.wait_succeeded(made, JOB_ID)
    return made


@pytest.mark.parametrize("name", HEADS)
def test_every_line_is_whole_and_none_is_missing(ended: Cluster, name: str) -> None:
    lines = ended.log_lines(name)
    assert len(lines) == len(ended.log_path(name).read_text("utf-8").splitlines())
    for before, line in itertools.pairwise(lines):
        assert line["seq"] == before["seq"] + 1
    events = PROGRAMS["coordinator" if name == "coordinator" else "agent"][0]
    for line in lines:
        assert list(line)[: len(HEADS[name])] == HEADS[name]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["ts"])
        assert line["event"] in events
        assert "{" not in line["msg"], line  # every sentence had its fields


def test_both_programs_tell_of_the_attempt_by_the_same_fields(ended: Cluster) -> None:
    for name in HEADS:
        exits = [line for line in ended.log_lines(name) if line["event"] == "attempt.exited"]
        assert [(line["job"], line["attempt"], line["epoch"]) for line in exits] == [
            (JOB_ID, f"{JOB_ID}.1", 1)
        ]


def lnav(home: Path, *words: object) -> str:
    """What lnav prints without a terminal, with our format and nobody's settings."""
    program = shutil.which("lnav")
    if program is None:
        pytest.skip("lnav is not installed here (sudo apt-get install lnav)")
    folder = home / "formats/baton"
    folder.mkdir(parents=True)
    shutil.copy(LNAV_FORMAT, folder)
    done = subprocess.run(
        [program, "-n", "-I", home, *(str(word) for word in words)],
        env={"HOME": str(home), "TZ": "UTC", "TERM": "dumb", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=LNAV_DEADLINE_S,
    )
    assert done.stderr == ""
    return done.stdout


def test_lnav_asks_the_logs_of_both_programs(ended: Cluster, tmp_path: Path) -> None:
    query = "SELECT log_level, event, attempt, log_body FROM baton_log WHERE job = 1"
    paths = [ended.log_path(name) for name in HEADS]
    found = json.loads(lnav(tmp_path, "-c", f";{query}", "-c", ":write-json-to -", *paths))
    assert sorted(map(_key, found)) == sorted(
        (line["level"], line["event"], line.get("attempt") or "", line["msg"])
        for name in HEADS
        for line in ended.log_lines(name)
        if line.get("job") == JOB_ID
    )


def _key(row: dict[str, Any]) -> tuple[object, ...]:
    return tuple(row[name] or "" for name in ("log_level", "event", "attempt", "log_body"))


def test_lnav_shows_the_sentence(ended: Cluster, tmp_path: Path) -> None:
    shown = lnav(tmp_path, ended.log_path("n1"))
    (exited,) = [line["msg"] for line in ended.log_lines("n1") if line["event"] == "attempt.exited"]
    assert re.search(rf"info +attempt\.exited +{re.escape(exited)}$", shown, re.MULTILINE)
