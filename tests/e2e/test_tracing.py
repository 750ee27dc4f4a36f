"""Attempts in a real collector: a pipeline's trace goes on through Baton, also over a restart of
the coordinator; and a coordinator that exports nothing has not even loaded the libraries.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.e2e import work
from tests.e2e.cluster import ROOT, Cluster
from tests.e2e.collector import Collector, collector
from tests.e2e.work import Gate

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-tracing")]

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"TRACEPARENT": f"00-{TRACE}-{CALLER}-01"}
LEAVES = """
import os, signal, sys
from coordinator import main

class Leaves(main.Notifier):
    def ready(self):
        os.kill(os.getpid(), signal.SIGTERM)

main.Notifier = Leaves
assert main.main(sys.argv[1:]) == 0
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


@pytest.fixture
def away() -> Iterator[Collector]:
    with collector() as made:
        yield made


def wait_whole(cluster: Cluster, seen: Collector, count: int = 1) -> list[Span]:
    """The spans of attempts, once there are so many."""

    def look() -> list[Span]:
        found = [span for span in seen.spans if span.name == "attempt"]
        return found if len(found) >= count else []

    return cluster.wait_until(look, work.DEADLINE_S, f"{count} attempts in the collector")


def test_a_callers_trace_goes_on_through_an_attempt_and_a_restart(
    cluster: Cluster, gate: Gate, away: Collector
) -> None:
    """The attempt ends while the coordinator is down, and is in the trace all the same."""
    cluster.start_coordinator(otel_endpoint=away.endpoint)
    cluster.start_agent("n1", ())
    cluster.wait_for_nodes("n1")
    gate.open_to(2)
    job_id = work.submit(cluster, gate.job(steps=3), environment=TRACEPARENT)
    work.wait_committed(cluster, job_id, 2)
    cluster.stop_coordinator()
    assert [span.name for span in away.spans] == ["checkpoint"] * 2, "sent before it left"
    gate.open_to(3)
    work.wait_log(cluster, "n1", "attempt.exited")
    assert not [span for span in away.spans if span.name == "attempt"]
    cluster.start_coordinator(otel_endpoint=away.endpoint)
    work.wait_succeeded(cluster, job_id)
    (whole,) = wait_whole(cluster, away)
    spans = {span.name: span for span in away.spans}
    assert {*spans} >= {"attempt", "schedule", "start", "run", "checkpoint"}
    assert {span.trace_id.hex() for span in away.spans} == {TRACE}
    assert whole.parent_span_id.hex() == CALLER
    assert whole.status.code == Status.STATUS_CODE_OK
    for name in ("schedule", "start", "run", "checkpoint"):
        assert spans[name].parent_span_id == whole.span_id
        assert whole.start_time_unix_nano <= spans[name].start_time_unix_nano
    steps = [
        one.value.int_value
        for span in away.spans
        for one in span.attributes
        if one.key == "baton.checkpoint.step"
    ]
    assert steps == [1, 2, 3]
    assert {*away.services} == {"baton-coordinator"}


def test_a_collector_that_is_away_costs_no_job_anything(
    cluster: Cluster, gate: Gate, away: Collector
) -> None:
    """It hangs: jobs go on, the log says so once, and the coordinator leaves in time."""
    away.hanging.set()
    cluster.start_coordinator(otel_endpoint=away.endpoint)
    cluster.start_agent("n1", ())
    cluster.wait_for_nodes("n1")
    gate.open_to(3)
    for _ in range(2):
        work.wait_succeeded(cluster, work.submit(cluster, gate.job(steps=3)))
    work.wait_log(cluster, "coordinator", "tracing.away")
    cluster.stop_coordinator()
    events = [line["event"] for line in cluster.log_lines("coordinator")]
    assert events.count("tracing.away") == 1
    assert events[-1] == "coordinator.stopped"
    assert "library" not in events


def test_without_an_endpoint_nothing_is_loaded(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVES, "--listen", "127.0.0.1:0"]
    command += ["--state-directory", str(tmp_path / "state")]
    environment = {name: value for name, value in os.environ.items() if "BATON" not in name}
    loaded = []
    for more in ([], ["--otel-endpoint", "http://127.0.0.1:9"]):
        done = subprocess.run(
            [*command, *more],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=work.DEADLINE_S,
        )
        loaded.append(done.stdout.strip() != "[]")
    assert loaded == [False, True]
