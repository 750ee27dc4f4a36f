"""The exporter beside a real collector that is away, comes back, or never takes anything."""

import asyncio
from collections.abc import Iterator

import pytest

from coordinator import otel
from coordinator.core.model import Attempt, Job, JobEvent, JobSpec
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.spans import attempt_spans
from tests.e2e.collector import Collector, collector
from tests.held_port import held_port

JOB = Job(7, JobSpec(command=("train",)), JobPhase.SUCCEEDED, 1_000, request_id="r")
ATTEMPT = Attempt(7, 1, "n1", (), AttemptPhase.SUCCEEDED, 2_000, 3_000, 9_000)
SPANS = len(attempt_spans(JOB, ATTEMPT, ()))


@pytest.fixture
def beside() -> Iterator[Collector]:
    with collector() as made:
        yield made


class Bench:
    """An exporter, and what it has logged."""

    def __init__(self, endpoint: str) -> None:
        self.events: list[str] = []
        self._logged = asyncio.Event()
        self.exporter = otel.SpanExporter(endpoint, self._history, self._log, retry_s=0.0)

    async def _history(self, job_id: int, after_sequence: int, limit: int) -> list[JobEvent]:
        return []

    def _log(self, level: str, event: str, fields: tuple[tuple[str, object], ...]) -> None:
        self.events.append(event)
        self._logged.set()

    async def wait_logged(self, event: str) -> None:
        while event not in self.events:
            self._logged.clear()
            await self._logged.wait()


async def test_what_waits_is_sent_at_the_end(beside: Collector) -> None:
    bench = Bench(beside.endpoint)
    bench.exporter.open()
    bench.exporter.ended(JOB, ATTEMPT)
    await bench.exporter.close()
    assert [span.name for span in beside.spans] == ["attempt", "schedule", "start", "run"]
    assert bench.exporter.counts.spans_exported == SPANS
    assert bench.exporter.counts.spans_dropped == 0
    assert bench.events == []


async def test_a_collector_that_comes_back_in_time_gets_all(
    beside: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otel, "TRIES_MAX", 1_000)
    beside.refusing = True
    bench = Bench(beside.endpoint)
    bench.exporter.open()
    bench.exporter.ended(JOB, ATTEMPT)
    await bench.wait_logged("tracing.away")
    beside.refusing = False
    await bench.wait_logged("tracing.back")
    await bench.exporter.close()
    assert len(beside.spans) == SPANS
    assert bench.exporter.counts.spans_dropped == 0
    assert bench.events == ["tracing.away", "tracing.back"]


async def test_a_queue_that_is_full_drops_and_counts(
    beside: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otel, "QUEUE_MAX", 2)
    bench = Bench(beside.endpoint)
    for _ in range(5):
        bench.exporter.ended(JOB, ATTEMPT)
    assert bench.exporter.counts.spans_dropped == 3 * SPANS
    bench.exporter.open()
    await bench.exporter.close()
    assert bench.exporter.counts.spans_exported == 2 * SPANS


async def test_one_that_never_takes_anything_is_said_once_and_counted() -> None:
    with held_port() as port:
        bench = Bench(f"http://127.0.0.1:{port}")
        bench.exporter.open()
        for _ in range(3):
            bench.exporter.ended(JOB, ATTEMPT)
        await bench.exporter.close()
    assert bench.exporter.counts.spans_dropped == 3 * SPANS
    assert bench.events == ["tracing.away"]
