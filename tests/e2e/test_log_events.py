"""The log lines of real programs: whole, numbered without a gap, registered, and read by lnav."""

import itertools
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protos.baton.v1 import jobs_pb2, types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.events.test_code import PROGRAMS
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-log-events")]

ROOT = Path(__file__).resolve().parents[2]
LNAV_FORMAT = ROOT / "systemd/baton.lnav.json"
LNAV_DEADLINE_S = 60
GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
JOB_ID = 1  # of the first job of a store
HEADS = {
    "coordinator": ["ts", "level", "event", "msg", "seq", "boot_id"],
    "n1": ["ts", "level", "event", "msg", "seq", "node", "boot_id"],
}


@dataclass(frozen=True)
class Ended:
    """A coordinator and an agent that have left; their logs stay. `environment` is what the first
    job found, `jobs` are the documents of both: the second was submitted in the trace `GIVEN`."""

    cluster: Cluster
    environment: str
    jobs: list[Any]

    def log_lines(self, name: str) -> list[dict[str, Any]]:
        return self.cluster.log_lines(name)

    def log_path(self, name: str) -> Path:
        return self.cluster.log_path(name)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    with Cluster(tmp_path_factory.mktemp("events") / "cluster") as made:
        made.start_coordinator()
        made.start_agent("n1", h100(1))
        made.wait_for_nodes("n1")
        assert work.submit(made, ["env"], gpus=1) == JOB_ID
        spec = types_pb2.JobSpec(command=["true"])
        request = jobs_pb2.SubmitRequest(request_id="in a trace", spec=spec)
        second = made.jobs.Submit(request, metadata=(("traceparent", GIVEN),)).job_id
        jobs = []
        for job_id in (JOB_ID, second):
            work.wait_succeeded(made, job_id)
            jobs.append(made.baton_json("job", str(job_id)))
        environment = work.output(made, JOB_ID)
        # What is true already may not have been logged yet.
        made.stop_agent("n1")
        made.stop_coordinator()
    return Ended(made, environment, jobs)


@pytest.mark.parametrize("name", HEADS)
def test_every_line_is_whole_and_none_is_missing(ended: Ended, name: str) -> None:
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


def test_both_programs_tell_of_the_attempt_by_the_same_fields(ended: Ended) -> None:
    for name in HEADS:
        exits = [line for line in ended.log_lines(name) if line["event"] == "attempt.exited"]
        told = [(line["job"], line["attempt"], line["epoch"], line["trace_id"]) for line in exits]
        assert sorted(told) == [
            (job["id"], attempt["id"], attempt["epoch"], attempt["trace_id"])
            for job in ended.jobs
            for attempt in job["attempts"]
        ]


def test_an_attempt_has_one_trace_or_continues_its_submitter_s(ended: Ended) -> None:
    first, second = ([one["trace_id"] for one in job["attempts"]] for job in ended.jobs)
    assert second == [GIVEN.split("-")[1]]
    (found,) = re.findall(r"^TRACEPARENT=00-(.{32})-.{16}-01$", ended.environment, re.MULTILINE)
    assert first == [found]


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


def test_lnav_asks_the_logs_of_both_programs(ended: Ended, tmp_path: Path) -> None:
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


def test_lnav_shows_the_sentence(ended: Ended, tmp_path: Path) -> None:
    shown = lnav(tmp_path, ended.log_path("n1"))
    lines = ended.log_lines("n1")
    exited = next(line["msg"] for line in lines if line["event"] == "attempt.exited")
    assert re.search(rf"info +attempt\.exited +{re.escape(exited)}$", shown, re.MULTILINE)
