"""The Grafana dashboards of docs/dashboards, from a table of panels.

Problem: a dashboard's JSON is some hundred lines of layout for each line of meaning, so written by
hand nobody reads it, and a panel whose query has rotted goes unseen until the night it is needed.
Here a panel is a title, a unit and its queries; layout and the rest are the same for all.
`python -m tests.metrics.dashboards` writes the files, a test compares them, and the end-to-end test
executes every query on a real Prometheus.

The JSON is Grafana's classic model (grafana.com/docs/grafana/latest/dashboards, "Dashboard JSON
model"), which all its versions since 8 import. The data source is a variable, so nothing has to be
edited on import; `$__rate_interval` is Grafana's, four scrapes at least.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

DIRECTORY: Final = Path(__file__).resolve().parents[2] / "docs/dashboards"
SCHEMA_VERSION: Final = 36  # of Grafana 9: later ones migrate it when they read it
COLUMNS: Final = 24  # how wide Grafana's grid is
PANEL_ROWS: Final = 8
STAT_ROWS: Final = 4
SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}

Query = tuple[str, str]  # expression, legend


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over time, or with `stat` one number. `unit` is one of Grafana's unit ids; `top` is the
    end of the axis where there is one."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    stat: bool = False
    top: float | None = None
    about: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one headline."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One file. `variable` is a (name, query) that picks which instances are shown, if any."""

    uid: str
    title: str
    rows: tuple[Row, ...]
    variable: Query | None = None

    def panels(self) -> Iterator[Panel]:
        """All of them, in their order."""
        for row in self.rows:
            yield from row.panels


def _lines(title: str, unit: str, *queries: Query, top: float | None = None) -> Panel:
    return Panel(title, unit, queries, top=top)


def _number(title: str, unit: str, query: str, about: str = "") -> Panel:
    return Panel(title, unit, ((query, ""),), stat=True, about=about)


def _quantiles(metric: str, where: str = "") -> tuple[Query, ...]:
    inner = f"sum by (le) (rate({metric}_bucket{where}[$__rate_interval]))"
    return tuple((f"histogram_quantile({q}, {inner})", f"p{q * 100:g}") for q in (0.5, 0.99))


def _rate(metric: str, where: str = "") -> str:
    return f"sum(rate({metric}{where}[$__rate_interval]))"


FLEET: Final = Dashboard(
    "baton-fleet",
    "Baton: the fleet",
    (
        Row(
            "Now",
            (
                _number("Jobs that run", "short", 'sum(baton_jobs{phase="active"})'),
                _number("Jobs that wait", "short", "sum(baton_queue_length)"),
                _number("Longest wait", "s", "max(baton_queue_wait_seconds) or vector(0)"),
                _number(
                    "GPUs in use",
                    "percentunit",
                    'sum(baton_gpus{phase="held"}) / sum(baton_gpus{phase!="absent"})',
                    "Of the GPUs on nodes that are there. While work waits this should be near 1.",
                ),
                _number("Nodes lost", "short", 'sum(baton_nodes{phase="lost"})'),
                _number("GPUs that do not answer", "short", "sum(baton_gpu_up == bool 0)"),
            ),
        ),
        Row(
            "Work",
            (
                _lines("Jobs", "short", ("sum by (phase) (baton_jobs)", "{{phase}}")),
                _lines("Queue", "short", ("sum by (class) (baton_queue_length)", "{{class}}")),
                _lines("Attempts", "short", ("sum by (phase) (baton_attempts)", "{{phase}}")),
            ),
        ),
        Row(
            "GPUs",
            (
                _lines(
                    "GPUs by type",
                    "short",
                    ("sum by (type, phase) (baton_gpus)", "{{type}} {{phase}}"),
                ),
                _lines(
                    "Utilization by type",
                    "percentunit",
                    ("avg by (name) (baton_gpu_utilization_ratio)", "{{name}}"),
                    top=1,
                ),
                _lines(
                    "Power by type", "watt", ("sum by (name) (baton_gpu_power_watts)", "{{name}}")
                ),
            ),
        ),
        Row(
            "Health of GPUs",
            (
                _lines(
                    "GPUs without work for their health",
                    "short",
                    ("sum by (reaction) (baton_gpus_ill)", "{{reaction}}"),
                ),
                _lines(
                    "GPUs with a verdict that is not healthy",
                    "short",
                    ("sum by (name) (baton_gpu_healthy == bool 0)", "{{name}}"),
                ),
                _lines(
                    "XIDs that are not over",
                    "short",
                    ("sum(baton_gpu_xid_errors) or vector(0)", "all GPUs"),
                ),
            ),
        ),
        Row(
            "Nodes",
            (
                _lines("Nodes", "short", ("sum by (phase) (baton_nodes)", "{{phase}}")),
                _lines("Intents", "short", ("sum by (intent) (baton_nodes)", "{{intent}}")),
                _lines(
                    "Agents that are connected",
                    "short",
                    ("sum(baton_sessions)", "coordinator's count"),
                    ("sum(baton_agent_link_up)", "agents' count"),
                    ("sum(baton_sessions_in_line)", "in line"),
                ),
                _lines(
                    "GPUs that jobs share",
                    "short",
                    ("sum(baton_gpus_shared)", "GPUs"),
                    ("sum(baton_gpu_shares)", "shares"),
                ),
                _lines(
                    "GPU memory of all shares",
                    "bytes",
                    ("sum(baton_gpu_shares_bytes)", "bytes"),
                ),
            ),
        ),
        Row(
            "Checkpoints",
            (
                _lines(
                    "Checkpoints a second",
                    "short",
                    (_rate("baton_agent_checkpoints_stored_total"), "stored"),
                    (_rate("baton_agent_checkpoints_replicated_total"), "copied off the node"),
                    (
                        "sum by (answer) "
                        "(rate(baton_coordinator_checkpoint_answers_total[$__rate_interval]))",
                        "{{answer}}",
                    ),
                ),
                _lines(
                    "Written",
                    "Bps",
                    (_rate("baton_agent_checkpoint_stored_bytes_total"), "new bytes"),
                ),
                _lines(
                    "Failures a second",
                    "short",
                    (_rate("baton_agent_checkpoint_store_failures_total"), "store"),
                    (_rate("baton_agent_checkpoint_replication_failures_total"), "copy"),
                ),
            ),
        ),
        Row(
            "Coordinator",
            (
                _lines(
                    "Time to make a batch durable",
                    "s",
                    *_quantiles("baton_coordinator_batch_commit_seconds"),
                ),
                _lines("Loop lag", "s", *_quantiles("baton_coordinator_loop_lag_seconds")),
                _lines("Events in a batch", "short", *_quantiles("baton_coordinator_batch_events")),
                _lines(
                    "Traffic a second",
                    "short",
                    (_rate("baton_coordinator_messages_total"), "messages of agents"),
                    (_rate("baton_coordinator_orders_total"), "orders to agents"),
                    (_rate("baton_coordinator_requests_total"), "requests"),
                    (_rate("baton_coordinator_messages_lost_total"), "messages without room"),
                    (_rate("baton_coordinator_requests_refused_total"), "requests refused"),
                ),
                _lines(
                    "Waiting",
                    "short",
                    ("sum(baton_coordinator_inbox_length)", "events"),
                    ("sum(baton_coordinator_requests_waiting)", "requests"),
                ),
                _lines("Store", "bytes", ("sum(baton_coordinator_store_size_bytes)", "size")),
            ),
        ),
    ),
)

_HERE: Final = '{instance=~"$instance"}'


def _here(metric: str) -> str:
    return metric + _HERE


NODE: Final = Dashboard(
    "baton-node",
    "Baton: a node",
    (
        Row(
            "GPUs",
            (
                _lines(
                    "Utilization",
                    "percentunit",
                    (_here("baton_gpu_utilization_ratio"), "{{uuid}}"),
                    top=1,
                ),
                _lines(
                    "Memory",
                    "percentunit",
                    (
                        f"{_here('baton_gpu_memory_used_bytes')}"
                        f" / {_here('baton_gpu_memory_total_bytes')}",
                        "{{uuid}}",
                    ),
                    top=1,
                ),
                _lines(
                    "Temperature", "celsius", (_here("baton_gpu_temperature_celsius"), "{{uuid}}")
                ),
                _lines("Power", "watt", (_here("baton_gpu_power_watts"), "{{uuid}}")),
                _lines("Clocks", "hertz", (_here("baton_gpu_clock_hertz"), "{{uuid}} {{kind}}")),
                _lines("Answers", "short", (_here("baton_gpu_up"), "{{uuid}}"), top=1),
                _lines("Healthy", "short", (_here("baton_gpu_healthy"), "{{uuid}}"), top=1),
            ),
        ),
        Row(
            "Telemetry",
            (
                _lines(
                    "Age of the last sample",
                    "s",
                    (_here("baton_agent_sample_age_seconds"), "{{instance}}"),
                ),
                _lines(
                    "Duration of a sample",
                    "s",
                    (_here("baton_agent_sample_duration_seconds"), "{{instance}}"),
                ),
                _lines(
                    "Samples a second",
                    "short",
                    (_rate("baton_agent_samples_total", _HERE), "all"),
                    (_rate("baton_agent_samples_late_total", _HERE), "late"),
                ),
            ),
        ),
        Row(
            "Work",
            (
                _lines(
                    "Attempts",
                    "short",
                    (f"sum by (phase) ({_here('baton_agent_attempts')})", "{{phase}}"),
                ),
                _lines(
                    "Checkpoints written",
                    "Bps",
                    (_rate("baton_agent_checkpoint_stored_bytes_total", _HERE), "new bytes"),
                ),
                _lines(
                    "Time to make the journal durable",
                    "s",
                    *_quantiles("baton_agent_journal_commit_seconds", _HERE),
                ),
            ),
        ),
        Row(
            "Agent",
            (
                _lines("Link", "short", (_here("baton_agent_link_up"), "{{instance}}"), top=1),
                _lines(
                    "Waiting",
                    "short",
                    (_here("baton_agent_spool_length"), "events not acknowledged"),
                    (_here("baton_agent_outbox_length"), "messages"),
                    (_here("baton_agent_inbox_length"), "events"),
                ),
                _lines("Loop lag", "s", *_quantiles("baton_agent_loop_lag_seconds", _HERE)),
                _lines(
                    "CPU, of one core",
                    "percentunit",
                    (f"rate(process_cpu_seconds_total{_HERE}[$__rate_interval])", "{{instance}}"),
                ),
                _lines(
                    "Memory of the agent",
                    "bytes",
                    (_here("process_resident_memory_bytes"), "{{instance}}"),
                ),
                _lines(
                    "Open files",
                    "short",
                    (_here("process_open_fds"), "open"),
                    (_here("process_max_fds"), "most"),
                ),
            ),
        ),
    ),
    ("instance", "label_values(baton_agent_link_up, instance)"),
)

DASHBOARDS: Final = (FLEET, NODE)


def text(dashboard: Dashboard) -> str:
    """The file."""
    document = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["baton"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one cursor on all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables(dashboard)},
        "annotations": {"list": []},
        "panels": list(placed(dashboard)),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def path(dashboard: Dashboard) -> Path:
    """Where its file lies."""
    return DIRECTORY / f"{dashboard.uid}.json"


def _variables(dashboard: Dashboard) -> list[dict[str, Any]]:
    source = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
    }
    if dashboard.variable is None:
        return [source]
    name, query = dashboard.variable
    picked = {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "A"},
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
    return [source, picked]


def placed(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    """Rows and panels, each with its place on the grid."""
    y = number = 0
    for row in dashboard.rows:
        number += 1
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "gridPos": place, "panels": []}
        y += 1
        stat = row.panels[0].stat
        across = len(row.panels) if stat else 3
        width, height = COLUMNS // across, STAT_ROWS if stat else PANEL_ROWS
        for index, panel in enumerate(row.panels):
            number += 1
            line, column = divmod(index, across)
            place = {"x": column * width, "y": y + line * height, "w": width, "h": height}
            yield {"id": number, "gridPos": place, **_panel(panel)}
        y += -(-len(row.panels) // across) * height


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.top is not None:
        defaults["max"] = panel.top
    targets = [
        {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expression}
        | ({"legendFormat": legend} if legend else {})
        for index, (expression, legend) in enumerate(panel.queries)
    ]
    made: dict[str, Any] = {
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
    }
    if panel.about:
        made["description"] = panel.about
    return made


def main() -> None:
    """Write the files."""
    for dashboard in DASHBOARDS:
        path(dashboard).write_text(text(dashboard), "utf-8")


if __name__ == "__main__":
    main()
