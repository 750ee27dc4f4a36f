"""Spans of attempts go to an OpenTelemetry collector: OTLP over HTTP, the extra `otel`.

Problem: a collector is somebody else's program. It is restarted, it is slow, it hangs; and who
schedules a fleet must not notice. So what has ended is only noted, in a queue with a bound; a task
of its own makes spans of it (`core/spans.py`) and has a thread send them, a batch at a time, with a
deadline. A batch that is not taken is tried again for half a minute; then it is dropped and
counted. The log says once that the collector is away, and once that it is back. At exit there is
one try more, within a bound.

Nothing is kept on disk: what waited when a coordinator was killed is not exported. An attempt that
ended while it was down is, as soon as its agent has told.

The SDK's tracer is not used: it draws ids and reads clocks, and both are settled here when an
attempt ends. Its finished spans and its exporter are; the latter takes headers and certificates
from the variables that every OpenTelemetry program knows (`OTEL_EXPORTER_OTLP_HEADERS`, ...).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from coordinator.core.model import Attempt, Checkpoint, Job, JobEvent
from coordinator.core.spans import Span, SpanStatus, attempt_spans, checkpoint_span
from coordinator.counts import Counts
from coordinator.ports import StoreUnavailable

PATH: Final = "/v1/traces"
SERVICE: Final = "baton-coordinator"
QUEUE_MAX: Final = 10_000  # ends and commits that wait; some minutes of a large fleet, 50 MB
BATCH_MAX: Final = 100  # of these at once: some hundred spans, as the SDK's own processor sends
HISTORY_MAX: Final = 500  # lines of a job that are read: all that a store keeps of one
TIMEOUT_S: Final = 2.0  # for a batch; a collector that needs longer is overloaded
RETRY_S: Final = 5.0
TRIES_MAX: Final = 6  # with RETRY_S between them a collector's restart costs nothing
CLOSE_S: Final = 3.0  # a stop must not wait for somebody else's program
STATUS: Final = {
    SpanStatus.UNSET: StatusCode.UNSET,
    SpanStatus.OK: StatusCode.OK,
    SpanStatus.ERROR: StatusCode.ERROR,
}
NS_PER_MS: Final = 1_000_000

History = Callable[[int, int, int], Awaitable[list[JobEvent]]]
Log = Callable[[str, str, tuple[tuple[str, object], ...]], None]


class SpanExporter:
    """Exports to the collector at `endpoint` (http://HOST:PORT). `history` reads a job's lines."""

    def __init__(self, endpoint: str, history: History, log: Log, retry_s: float = RETRY_S) -> None:
        self.counts = Counts()
        self.url = endpoint + PATH
        self._history = history
        self._log = log
        self._retry_s = retry_s
        self._client = OTLPSpanExporter(endpoint=self.url, timeout=TIMEOUT_S)
        self._resource = Resource.create({"service.name": SERVICE})
        self._queue: deque[tuple[Job, Attempt | Checkpoint]] = deque()
        self._wake = asyncio.Event()
        self._leaving = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        self._away = False
        self._dropped = 0  # since the collector is away
        # What it says of each failure is said here once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    def open(self) -> None:
        self._working = asyncio.create_task(self._work())

    async def close(self) -> None:
        """Send what waits, as far as `CLOSE_S` goes."""
        self._leaving.set()
        self._wake.set()
        if self._working is not None:
            await asyncio.wait([self._working], timeout=CLOSE_S)
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)
        self._client.shutdown()  # type: ignore[no-untyped-call]

    def ended(self, job: Job, attempt: Attempt) -> None:
        self._note(job, attempt)

    def committed(self, job: Job, checkpoint: Checkpoint) -> None:
        self._note(job, checkpoint)

    def _note(self, job: Job, what: Attempt | Checkpoint) -> None:
        if len(self._queue) >= QUEUE_MAX:
            self._drop(len(_spans(job, what, ())))
            return
        self._queue.append((job, what))
        self._wake.set()

    def _drop(self, count: int) -> None:
        self.counts.spans_dropped += count
        self._dropped += count

    async def _work(self) -> None:
        while self._queue or not self._leaving.is_set():
            if not self._queue:
                self._wake.clear()
                await self._wake.wait()
                continue
            spans: list[Span] = []
            for _ in range(min(BATCH_MAX, len(self._queue))):
                job, what = self._queue.popleft()
                spans += _spans(job, what, await self._lines(what))
            if spans:
                await self._send(spans)

    async def _lines(self, what: Attempt | Checkpoint) -> Sequence[JobEvent]:
        if isinstance(what, Checkpoint):
            return ()
        try:
            return await self._history(what.job_id, 0, HISTORY_MAX)
        except StoreUnavailable:
            return ()  # spans without a stop are better than none

    async def _send(self, spans: Sequence[Span]) -> None:
        """Until they are taken, or the patience with this batch has ended."""
        finished = [self._finished(span) for span in spans]
        for attempted in range(1, TRIES_MAX + 1):
            result = await asyncio.to_thread(self._client.export, finished)
            if result is SpanExportResult.SUCCESS:
                self.counts.spans_exported += len(spans)
                self._taken()
                return
            if not self._away:
                self._away = True
                reason = f"{len(spans)} were not taken within {TIMEOUT_S:g} s"
                self._log("warning", "tracing.away", (("url", self.url), ("reason", reason)))
            if self._leaving.is_set() or attempted == TRIES_MAX:
                break
            await asyncio.wait(
                [leaving := asyncio.ensure_future(self._leaving.wait())], timeout=self._retry_s
            )
            leaving.cancel()
        self._drop(len(spans))

    def _taken(self) -> None:
        if self._away:
            self._log("info", "tracing.back", (("url", self.url), ("spans", self._dropped)))
        self._away = False
        self._dropped = 0

    def _finished(self, span: Span) -> ReadableSpan:
        parent = None
        if span.parent_id:
            parent = _context(span.trace_id, span.parent_id, is_remote=span.is_parent_remote)
        return ReadableSpan(
            span.name,
            context=_context(span.trace_id, span.span_id, is_remote=False),
            parent=parent,
            resource=self._resource,
            attributes=dict(span.attributes),
            events=[
                Event(event.name, timestamp=event.unix_ms * NS_PER_MS) for event in span.events
            ],
            status=Status(STATUS[span.status], span.reason or None),
            start_time=span.begin_unix_ms * NS_PER_MS,
            end_time=span.end_unix_ms * NS_PER_MS,
            instrumentation_scope=InstrumentationScope("baton"),
        )


def _spans(job: Job, what: Attempt | Checkpoint, lines: Sequence[JobEvent]) -> tuple[Span, ...]:
    if isinstance(what, Attempt):
        return attempt_spans(job, what, lines)
    made = checkpoint_span(job, what)
    return () if made is None else (made,)


def _context(trace_id: str, span_id: str, *, is_remote: bool) -> SpanContext:
    return SpanContext(
        int(trace_id, 16), int(span_id, 16), is_remote, TraceFlags(TraceFlags.SAMPLED)
    )
