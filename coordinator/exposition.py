"""Figures as Prometheus reads them: `GET /metrics`, over HTTP on loopback and HTTPS elsewhere.

Problem: a library's ready-made endpoint has a thread of its own, which reads what the loop is just
changing; and counters that are sprinkled over a program make every decision depend on that library.
So nothing counts here: whoever scrapes causes one look at the program's state, in the loop's thread
and therefore consistent, which becomes text at once.

A scraper must not hold the loop. A request is a few hundred bytes with a deadline, the answer is
made at most once a second however often it is asked for, a connection takes one request, and those
that do not read are cut off. The rest of HTTP is not here on purpose.

The loop's lag is measured here too, since nobody else wants it: a task sleeps a while, and what it
sleeps longer than that, everything else in the loop has waited as well.

Coordinator and agent each have this file, the same but for whose histogram it imports (a test
compares them), because neither may import the other.
"""

import asyncio
import ssl
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.transport import system_says

if TYPE_CHECKING:
    from coordinator.histogram import Histogram

PATH: Final = "/metrics"
REQUEST_BYTES_MAX: Final = 8_192  # what web servers allow for all headers together
DEADLINE_S: Final = 10.0  # from connection to last byte; a scraper gives up then (scrape_timeout)
# Two scrapers, and somebody who looks; beyond that a connection is closed unanswered.
CONNECTIONS_MAX: Final = 8
# How long an answer is given again; scrapers come every ten seconds or so. One that took long is
# given for twenty times as long, so that five per cent of the loop's time is the most.
TEXT_AGE_S: Final = 1.0
TEXT_AGE_PER_COST: Final = 20.0
LAG_EVERY_S: Final = 0.25  # as often as the coordinator's tick; costs nothing measurable

Kind = Literal["gauge", "counter", "histogram", "unknown"]
# One sample: its labels' values, and what was measured; `None` is not known, and left out.
Sample = tuple[tuple[str, ...], float | None]


@dataclass(frozen=True, slots=True)
class Described:
    """One metric: its whole name with the unit last, what it says, and the names of its labels."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()

    def of(self, samples: Iterable[Sample]) -> Iterator[Metric]:
        """The metric with those samples that have a value; nothing at all without one."""
        known = [(labels, value) for labels, value in samples if value is not None]
        if known:
            # The library puts the suffix back.
            metric = Metric(self.name.removesuffix("_total"), self.help, self.kind)
            for labels, value in known:
                metric.add_sample(self.name, dict(zip(self.labels, labels, strict=True)), value)
            yield metric

    def one(self, value: float | None) -> Iterator[Metric]:
        """The same for a metric without labels."""
        return self.of([((), value)])

    def spread(self, histogram: "Histogram") -> Iterator[Metric]:
        """The same for a histogram."""
        yield HistogramMetricFamily(
            self.name, self.help, buckets=histogram.buckets(), sum_value=histogram.total
        )


class _Look(Collector):
    """Asks for the figures whenever the registry wants them."""

    def __init__(self, figures: Callable[[], Iterable[Metric]]) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        return self._figures()


def exposed(figures: Callable[[], Iterable[Metric]]) -> bytes:
    """The figures in Prometheus' text format, and after them this process' CPU time, memory and
    open files under the names that every program has them by (`process_...`)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Look(figures))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class Exporter:
    """Serves `figures`, which is called in the loop's thread, at host and port of `address` (port
    0: a free one). With `tls` callers need a certificate. `lag` gets how late the loop is, in
    seconds, four times a second while this is open."""

    def __init__(
        self,
        address: str,
        figures: Callable[[], Iterable[Metric]],
        lag: "Histogram",
        tls: ssl.SSLContext | None,
    ) -> None:
        self._address = address
        self._figures = figures
        self._lag = lag
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._watching: asyncio.Task[None] | None = None
        self._serving: dict[asyncio.Task[None], None] = {}
        self._text = b""
        self._text_until_s: float | None = None

    async def open(self) -> str:
        """Listen; returns the URL. Raises `OSError` with a sentence."""
        host, _, port = self._address.rpartition(":")
        try:
            self._server = await asyncio.start_server(
                self._connected,
                host.strip("[]"),
                int(port),
                limit=REQUEST_BYTES_MAX,
                ssl=self._tls,
                # Left to itself a handshake, or a goodbye, may take half a minute and more.
                ssl_handshake_timeout=DEADLINE_S if self._tls else None,
                ssl_shutdown_timeout=DEADLINE_S if self._tls else None,
            )
        except OSError as error:
            where = f"cannot listen on {self._address} for metrics"
            raise OSError(error.errno, f"{where}: {system_says(error)}") from error
        self._watching = asyncio.create_task(self._watch())
        bound = self._server.sockets[0].getsockname()[1]
        return f"{'https' if self._tls else 'http'}://{host}:{bound}{PATH}"

    async def close(self) -> None:
        """Stop listening, and cut off whoever still reads."""
        if self._server is not None:
            self._server.close()
        tasks = [*self._serving, *([self._watching] if self._watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            begun_s = loop.time()
            await asyncio.sleep(LAG_EVERY_S)
            self._lag.observe(max(0.0, loop.time() - begun_s - LAG_EVERY_S))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._serving) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._serving[task] = None
        try:
            async with asyncio.timeout(DEADLINE_S):
                request = await reader.readuntil(b"\r\n\r\n")
                # So that `drain` waits for the last byte, and what is left unread is not kept.
                writer.transport.set_write_buffer_limits(0)
                writer.write(self._answer(request))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the scraper's affair: it went, dawdled, or did not speak HTTP
        finally:
            writer.transport.abort()
            del self._serving[task]

    def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b" ")
        target = rest.partition(b" ")[0].partition(b"?")[0].decode("ascii", "replace")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"only GET and HEAD are answered\n")
        if target != PATH:
            return _response("404 Not Found", f"there is {PATH} here and nothing else\n".encode())
        whole = _response("200 OK", self._fresh_text(), CONTENT_TYPE_LATEST)
        return whole if method == b"GET" else whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"

    def _fresh_text(self) -> bytes:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        if self._text_until_s is None or begun_s >= self._text_until_s:
            self._text = exposed(self._figures)
            now_s = loop.time()
            self._text_until_s = now_s + max(TEXT_AGE_S, TEXT_AGE_PER_COST * (now_s - begun_s))
        return self._text


def _response(status: str, body: bytes, content_type: str = "text/plain; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
