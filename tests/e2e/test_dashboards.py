"""Every query of the dashboards and alerts, executed by a real Prometheus that scrapes real
programs while a job runs, stores checkpoints and is watched.
"""

import http
import json
import math
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.work import Gate
from tests.fakenvml.build import h100
from tests.metrics.dashboards import DASHBOARDS

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-dashboards")]

ON = {"metrics_listen": "127.0.0.1:0"}
# What Grafana puts in; four scrapes at least have to lie in it.
VARIABLES = {"$__rate_interval": "2m", "$instance": ".*"}
PROMETHEUS = """\
global: {scrape_interval: 500ms, evaluation_interval: 500ms}
rule_files: [ALERTS]
scrape_configs:
  - job_name: baton
    static_configs:
      - targets: TARGETS
"""
ALERTS = Path(__file__).parents[2] / "docs/dashboards/baton-alerts.yml"


class Prometheus:
    """One of its own, on a free port, with nothing in it yet."""

    def __init__(self, fleet: Cluster, directory: Path, targets: list[str]) -> None:
        program = shutil.which("prometheus")
        assert program is not None
        directory.mkdir()
        config = PROMETHEUS.replace("ALERTS", str(ALERTS)).replace("TARGETS", json.dumps(targets))
        (directory / "prometheus.yml").write_text(config, "utf-8")
        self._fleet = fleet
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    program,
                    f"--config.file={directory}/prometheus.yml",
                    f"--storage.tsdb.path={directory}/data",
                    "--web.listen-address=127.0.0.1:0",
                ],
                stdout=log,
                stderr=log,
            )
        self.url = fleet.wait_until(self._address, work.DEADLINE_S, "Prometheus listens")
        fleet.wait_until(self._is_ready, work.DEADLINE_S, "Prometheus has read its files")

    def _address(self) -> str:
        found = re.search(r"Listening on\" address=(\S+)", self._log.read_text("utf-8"))
        assert self.process.poll() is None, self._log.read_text("utf-8")
        return f"http://{found[1]}/api/v1/" if found else ""

    def _is_ready(self) -> bool:
        try:
            return self.ask("rules") is not None
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.SERVICE_UNAVAILABLE:
                raise
            return False

    def ask(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer; a query that Prometheus does not understand fails the test."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(  # noqa: S310 - our own, on loopback
            f"{self.url}{path}?{query}", timeout=work.DEADLINE_S
        ) as answer:
            return json.load(answer)["data"]

    def figures(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """What an expression is now: labels and numbers, those that are numbers."""
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        found = [
            (one["metric"], float(one["value"][1]))
            for one in self.ask("query", query=expression)["result"]
        ]
        return [(labels, number) for labels, number in found if not math.isnan(number)]

    def wait_figures(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """As soon as there are any."""
        return self._fleet.wait_until(
            lambda: self.figures(expression), work.DEADLINE_S, f"figures for {expression}"
        )


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Cluster]]:
    """Two nodes, a job that runs and has a checkpoint, and somebody who scrapes all of it."""
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed here (sudo apt-get install prometheus)")
    directory = tmp_path_factory.mktemp("dashboards")
    gate = Gate(directory / "gate", 2)
    with Cluster(directory / "cluster") as fleet:
        fleet.start_coordinator(heartbeat_interval_ms=100, **ON)
        for node in ("n1", "n2"):
            fleet.start_agent(node, h100(2, node=node), sample_interval_ms=100, **ON)
        fleet.wait_for_nodes("n1", "n2")
        urls = [
            str(work.wait_log(fleet, name, "metrics.serving")["url"])
            for name in ("coordinator", "n1", "n2")
        ]
        targets = [urllib.parse.urlsplit(url).netloc for url in urls]
        prometheus = Prometheus(fleet, directory / "prometheus", targets)
        try:
            # A rate is of what grows between two scrapes: all is scraped once before anything is.
            prometheus.wait_figures("count(baton_agent_link_up == 1) == 2")
            prometheus.wait_figures("baton_sessions == 2")
            job_id = work.submit(fleet, gate.job(steps=4, every=2), gpus=1)
            work.wait_committed(fleet, job_id, 2)
            prometheus.wait_figures('baton_jobs{phase="active"} == 1')
            yield prometheus, fleet
        finally:
            prometheus.process.terminate()
            prometheus.process.wait()


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda it: it.uid)
def test_every_panel_shows_something(dashboard: Any, watched: tuple[Prometheus, Cluster]) -> None:
    prometheus, _ = watched
    for panel in dashboard.panels():
        for expression, legend in panel.queries:
            figures = prometheus.wait_figures(expression)
            for label in re.findall(r"{{(\w+)}}", legend):
                assert all(label in labels for labels, _ in figures), (panel.title, label)
            if panel.stat:
                assert len(figures) == 1, panel.title
            if panel.unit == "percentunit":
                assert all(0 <= number <= 1 for _, number in figures), (panel.title, figures)


def test_a_variable_offers_every_node(watched: tuple[Prometheus, Cluster]) -> None:
    prometheus, _ = watched
    for dashboard in DASHBOARDS:
        if dashboard.variable is not None:
            found = re.fullmatch(r"label_values\((\w+), (\w+)\)", dashboard.variable[1])
            assert found is not None
            assert len({labels[found[2]] for labels, _ in prometheus.figures(found[1])}) == 2


def test_the_fleet_of_the_dashboard_is_the_fleet(watched: tuple[Prometheus, Cluster]) -> None:
    """Numbers that can be known beforehand, by the queries that people will look at."""
    prometheus, _ = watched
    shown = {
        panel.title: panel.queries[0][0]
        for one in DASHBOARDS
        for panel in one.panels()
        if panel.stat
    }
    numbers = {title: prometheus.figures(query)[0][1] for title, query in shown.items()}
    assert numbers["Jobs that run"] == 1
    assert numbers["Jobs that wait"] == 0
    assert numbers["GPUs in use"] == 0.25
    assert numbers["Nodes lost"] == 0
    assert numbers["GPUs that do not answer"] == 0


def test_alerts_are_loaded_and_quiet(watched: tuple[Prometheus, Cluster]) -> None:
    prometheus, fleet = watched
    # Before the first scrape there is no coordinator, and an alert may have begun to wait.
    fleet.wait_until(lambda: states(prometheus) == {"inactive"}, work.DEADLINE_S, "quiet alerts")
    (group,) = prometheus.ask("rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}


def states(prometheus: Prometheus) -> set[str]:
    """Of all alerts."""
    (group,) = prometheus.ask("rules")["groups"]
    return {rule["state"] for rule in group["rules"]}
