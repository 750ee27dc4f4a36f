"""Dashboards and alerts speak of metrics that there are, and each alert rings when it must."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import agent.exposition
import agent.metrics
import coordinator.exposition
import coordinator.metrics
from tests.metrics import dashboards
from tests.metrics.dashboards import DASHBOARDS, Dashboard

ALERTS = dashboards.DIRECTORY / "baton-alerts.yml"
ALERT_TESTS = Path(__file__).with_name("alerts_test.yml")
METRICS: tuple[agent.exposition.Described | coordinator.exposition.Described, ...] = (
    *agent.metrics.METRICS,
    *coordinator.metrics.METRICS,
)
DESCRIBED = {one.name: one for one in METRICS}
LABELS = {label for one in DESCRIBED.values() for label in one.labels}
LABELS_OF_PROMETHEUS = {"instance", "job", "le"}
ALERT_NAMES = re.findall(r"- alert: (\w+)", ALERTS.read_text("utf-8"))


def metrics_in(expression: str) -> Iterator[str]:
    """Our metrics that a query names, a histogram's parts as the histogram."""
    for name in re.findall(r"\bbaton_[a-z0-9_]+", expression):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        yield base if base in DESCRIBED else name


def expressions() -> Iterator[str]:
    for dashboard in DASHBOARDS:
        for panel in dashboard.panels():
            for expression, _ in panel.queries:
                yield expression
    yield from re.findall(r"expr: (.*)", ALERTS.read_text("utf-8"))


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda it: it.uid)
def test_the_files_are_the_table(dashboard: Dashboard) -> None:
    held = dashboards.path(dashboard).read_text("utf-8")
    assert held == dashboards.text(dashboard), "run: python -m tests.metrics.dashboards"


def test_every_metric_and_label_exists() -> None:
    for expression in expressions():
        unknown = [name for name in metrics_in(expression) if name not in DESCRIBED]
        assert unknown == [], expression
        words = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
        for group in re.findall(r"by \(([^)]*)\)", expression):
            words += re.findall(r"\w+", group)
        assert set(words) <= LABELS | LABELS_OF_PROMETHEUS, expression


def test_a_metric_that_is_gone_is_noticed() -> None:
    assert list(metrics_in("sum(rate(baton_gone_total[5m]))")) == ["baton_gone_total"]
    assert "baton_gone_total" not in DESCRIBED


def test_panels_lie_beside_one_another() -> None:
    for dashboard in DASHBOARDS:
        cells: set[tuple[int, int]] = set()
        for panel in dashboards.placed(dashboard):
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= dashboards.COLUMNS
            mine = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & mine, panel["title"]
            cells |= mine


def test_every_alert_has_figures_that_ring_it() -> None:
    tested = ALERT_TESTS.read_text("utf-8")
    assert ALERT_NAMES
    for name in ALERT_NAMES:
        assert f"alertname: {name}, exp_alerts: []" in tested, f"{name} is never seen to be quiet"
        assert re.search(rf"alertname: {name}\n\s+exp_alerts:\n\s+- ", tested), (
            f"{name} never rings"
        )


def test_alerts_ring_when_they_must() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed here (sudo apt-get install prometheus)")
    for arguments in (("check", "rules", ALERTS), ("test", "rules", ALERT_TESTS)):
        done = subprocess.run(
            [promtool, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
