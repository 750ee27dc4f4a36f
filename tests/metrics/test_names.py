"""Every name and text of both programs, by our rules and by Prometheus' own linter."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import agent.exposition
import agent.metrics
import coordinator.exposition
import coordinator.metrics
from agent.exposition import Described
from tests.metrics.names import findings, unit
from tests.metrics.test_coordinator_metrics import SNAPSHOT
from tests.metrics.views import (
    FULL,
    LOST,
    SILENT,
    agent_lag,
    agent_view,
    coordinator_lag,
    coordinator_view,
)

ROOT = Path(__file__).parents[2]
DESCRIBED = {
    "agent": (*agent.metrics.METRICS, *agent.metrics.DCGM_METRICS),
    "coordinator": coordinator.metrics.METRICS,
}
TYPES = {"unknown": "untyped"}  # as the text format has it
EVERYTHING = {
    "agent": agent.exposition.exposed(
        lambda: agent.metrics.figures(agent_view(FULL, SILENT, LOST), agent_lag(), dcgm_names=True)
    ).decode(),
    "coordinator": coordinator.exposition.exposed(
        lambda: coordinator.metrics.figures(
            coordinator_view(SNAPSHOT, 10_000), coordinator_lag(), 4_096
        )
    ).decode(),
}


def test_names_and_texts_keep_the_rules() -> None:
    assert list(findings((*agent.metrics.METRICS, *coordinator.metrics.METRICS))) == []


@pytest.mark.parametrize(
    ("metric", "finding"),
    [
        (Described("baton_things", "counter", "Things."), "_total"),
        (Described("baton_things_total", "gauge", "Things."), "_total"),
        (Described("baton_wait_ms", "gauge", "A wait."), "base unit"),
        (Described("baton_seconds_waited", "gauge", "A wait."), "comes last"),
        (Described("things", "gauge", "Things."), "baton_"),
        (Described("baton_gpuLoad", "gauge", "Load."), "baton_"),
        (Described("baton_things", "gauge", ""), "sentence"),
        (Described("baton_things_count", "gauge", "Things."), "histogram"),
        (Described("baton_things", "gauge", "Things.", ("job",)), "label"),
    ],
)
def test_each_rule_bites(metric: Described, finding: str) -> None:
    (sentence,) = findings([metric])
    assert finding in sentence


def test_a_name_that_is_there_twice_is_found() -> None:
    metric = Described("baton_things", "gauge", "Things.")
    assert list(findings([metric, metric])) == ["baton_things is there twice"]


def test_units_are_read_off_the_name() -> None:
    assert unit("baton_gpu_energy_joules_total") == "joules"
    assert unit("baton_gpu_clock_hertz") == "hertz"
    assert unit("baton_jobs") == ""


@pytest.mark.parametrize(("program", "metrics"), DESCRIBED.items())
def test_what_is_described_is_what_is_exposed(program: str, metrics: tuple[Described, ...]) -> None:
    """The tables that the documents are made of, and the wire, have the same metrics."""
    shown = dict(re.findall(r"^# TYPE (\S+) (\w+)$", EVERYTHING[program], re.MULTILINE))
    own = {name: kind for name, kind in shown.items() if not name.startswith("process_")}
    assert own == {one.name: TYPES.get(one.kind, one.kind) for one in metrics}
    texts = dict(re.findall(r"^# HELP (\S+) (.+)$", EVERYTHING[program], re.MULTILINE))
    assert {one.name: one.help for one in metrics}.items() <= texts.items()


@pytest.mark.parametrize("program", DESCRIBED)
def test_promtool_finds_nothing_of_ours(program: str) -> None:
    """Of NVIDIA's names it dislikes one label, which dashboards ask for."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed here (sudo apt-get install prometheus)")
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=EVERYTHING[program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 3), done.stderr  # 1: not to be parsed; 3: findings
    said = (done.stdout + done.stderr).splitlines()
    assert all(line.startswith("DCGM_") and "camelCase" in line for line in said), said


@pytest.mark.parametrize("module", ["exposition.py", "histogram.py", "https.py"])
def test_both_programs_have_the_same_text(module: str) -> None:
    theirs = (ROOT / "coordinator" / module).read_text("utf-8")
    ours = (ROOT / "agent" / module).read_text("utf-8")
    assert theirs == ours.replace("from agent.", "from coordinator.")
