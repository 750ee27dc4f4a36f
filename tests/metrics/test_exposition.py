"""The endpoint itself: what it answers, and what scrapers cannot do to the loop behind it.

Safety: whatever a scraper does, the figures are asked for at most once a second, and neither
connections nor what they send pile up. Liveness: a good scraper is answered in the end.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

import pytest
from prometheus_client.metrics_core import Metric

import agent.exposition
from agent.exposition import CONNECTIONS_MAX, REQUEST_BYTES_MAX, Described, Exporter
from agent.histogram import SECONDS_BOUNDS, Histogram

ANSWER_BYTES = 64 << 20
ANSWER = Described("baton_answer", "gauge", "The answer.", ("of",))


class Source:
    """Figures that say how often they were asked for."""

    def __init__(self, lines: int = 1) -> None:
        self.asked = 0
        self.lines = lines

    def __call__(self) -> Iterable[Metric]:
        self.asked += 1
        return ANSWER.of(((f'"{line}"\n',), 42) for line in range(self.lines))


@asynccontextmanager
async def serving(source: Source) -> AsyncIterator[int]:
    """An exporter on a free port; yields the port."""
    exporter = Exporter("127.0.0.1:0", source, Histogram(SECONDS_BOUNDS), None)
    url = await exporter.open()
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/metrics")
    try:
        yield int(url.removesuffix("/metrics").rpartition(":")[2])
    finally:
        await exporter.close()


async def test_a_port_that_is_taken_is_named_with_what_it_was_for() -> None:
    async with serving(Source()) as port:
        other = Exporter(f"127.0.0.1:{port}", Source(), Histogram(SECONDS_BOUNDS), None)
        with pytest.raises(OSError, match=f"127.0.0.1:{port}") as caught:
            await other.open()
    said = f"cannot listen on 127.0.0.1:{port} for metrics: Address already in use"
    assert caught.value.strerror == said


async def ask(port: int, request: bytes) -> tuple[str, bytes]:
    """Status line and body; both empty when it hung up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    except ConnectionError:
        return "", b""
    finally:
        writer.close()
    return head.partition(b"\r\n")[0].decode(), body


async def answered(port: int, request: bytes) -> str:
    """The status line, once there is a place for us."""
    status = ""
    while not status:
        status, _ = await ask(port, request)
    return status


def get(target: str = "/metrics", method: str = "GET") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: here\r\n\r\n".encode()


async def test_a_scrape_is_answered() -> None:
    async with serving(Source()) as port:
        status, body = await ask(port, get())
        assert status == "HTTP/1.1 200 OK"
        assert b'baton_answer{of="\\"0\\"\\n"} 42.0\n' in body
        assert b"process_cpu_seconds_total " in body
        assert (await ask(port, get("/metrics?name=x")))[1] == body


async def test_other_requests_are_answered_with_a_sentence() -> None:
    async with serving(Source()) as port:
        assert (await ask(port, get("/")))[0] == "HTTP/1.1 404 Not Found"
        assert b"/metrics" in (await ask(port, get("/")))[1]
        assert (await ask(port, get(method="POST")))[0] == "HTTP/1.1 405 Method Not Allowed"
        assert await ask(port, get(method="HEAD")) == ("HTTP/1.1 200 OK", b"")
        assert (await ask(port, b"\xff\xfe\r\n\r\n"))[0].startswith("HTTP/1.1 405")


async def test_many_scrapes_are_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.exposition, "TEXT_AGE_S", 3_600.0)
    source = Source()
    async with serving(source) as port:
        for _ in range(5):
            assert (await ask(port, get()))[0] == "HTTP/1.1 200 OK"
        assert source.asked == 1


@pytest.mark.parametrize(("age_s", "per_cost", "looks"), [(0.0, 0.0, 3), (0.0, 1e12, 1)])
async def test_an_answer_has_an_age_and_a_costly_one_grows_older(
    age_s: float, per_cost: float, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.exposition, "TEXT_AGE_S", age_s)
    monkeypatch.setattr(agent.exposition, "TEXT_AGE_PER_COST", per_cost)
    source = Source()
    async with serving(source) as port:
        for _ in range(3):
            assert (await ask(port, get()))[0] == "HTTP/1.1 200 OK"
    assert source.asked == looks


async def test_a_request_without_an_end_is_cut_off() -> None:
    async with serving(Source()) as port:
        assert await ask(port, b"x" * (4 * REQUEST_BYTES_MAX)) == ("", b"")
        assert (await ask(port, get()))[0] == "HTTP/1.1 200 OK"


async def test_a_scraper_that_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.exposition, "DEADLINE_S", 0.05)
    async with serving(Source()) as port:
        assert await ask(port, b"GET /metrics HTTP/1.1\r\n") == ("", b"")


async def test_a_scraper_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the only place, and an answer larger than what kernels take in for a socket."""
    monkeypatch.setattr(agent.exposition, "DEADLINE_S", 0.2)
    monkeypatch.setattr(agent.exposition, "CONNECTIONS_MAX", 1)
    monkeypatch.setattr(agent.exposition, "exposed", lambda _: b"x" * ANSWER_BYTES)
    async with serving(Source()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(get())
        assert await reader.read(1) == b"H"
        assert await answered(port, get("/")) == "HTTP/1.1 404 Not Found"
        size = 0
        with suppress(ConnectionError):
            while piece := await reader.read(1 << 20):
                size += len(piece)
        assert size < ANSWER_BYTES
        writer.close()


async def test_connections_are_bounded() -> None:
    async with serving(Source()) as port:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS_MAX)]
        assert await ask(port, get()) == ("", b"")
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()
        assert await answered(port, get()) == "HTTP/1.1 200 OK"


async def test_closing_waits_for_nobody() -> None:
    async with serving(Source()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await ask(port, get()))[0] == "HTTP/1.1 200 OK"
    with suppress(ConnectionError):  # how it was cut off is the kernel's affair
        assert await reader.read() == b""
    writer.close()


class Told(Histogram):
    """Says when it has observed something."""

    def __init__(self) -> None:
        super().__init__(SECONDS_BOUNDS)
        self.observed = asyncio.Event()

    def observe(self, value: float) -> None:
        super().observe(value)
        self.observed.set()


async def test_a_loop_that_comes_late_shows_as_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer that was due a minute ago."""
    monkeypatch.setattr(agent.exposition, "LAG_EVERY_S", -60.0)
    lag = Told()
    exporter = Exporter("127.0.0.1:0", Source(), lag, None)
    await exporter.open()
    await lag.observed.wait()
    await exporter.close()
    assert lag.total >= 60.0
