"""Recommendations on their way out of the coordinator: a file, a webhook, and neither holds it up.

The servers are real ones on loopback; what passes between two tries is virtual time.
"""

import asyncio
import errno
import json
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from coordinator import lease_advisor
from coordinator.core.demand_history import MINUTE_MS
from coordinator.core.lease_messages import LeasesMade, PublishLeases
from coordinator.core.leasing import Fleet, Recommendation, Terms, recommend
from coordinator.core.messages import Tick
from coordinator.lease_advisor import RETRY_MS, TRIES_MAX, LeaseAdvisor, Outlets
from tests.core.test_lease_days import asked, rig_of

FOUND = (
    recommend(20_000 * 86_400_000, [float(50 + n % 24) for n in range(720)], Fleet("H100"),
              Terms(1.0, 2.0)),
)  # fmt: skip
SECRET = "T0KEN"


@dataclass
class Receiver:
    """Answers with what stands in `statuses`, one after the other, then with 200."""

    statuses: list[int] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    hangs: bool = False
    url: str = ""
    came: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.read())
        self.types.append(request.content_type)
        self.came.set()
        if self.hangs:
            await self.released.wait()
        status = self.statuses.pop(0) if self.statuses else 200
        return web.Response(status=status, headers={"Location": "/elsewhere"})


@asynccontextmanager
async def receiving(receiver: Receiver) -> AsyncIterator[Receiver]:
    app = web.Application()
    app.router.add_post("/{path:.*}", receiver.answer)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    receiver.url = f"http://127.0.0.1:{port}/hooks/{SECRET}"
    try:
        yield receiver
    finally:
        receiver.released.set()
        await runner.cleanup()


class Bench:
    """An advisor, what it has logged and how long it waited between tries, in virtual time."""

    def __init__(self, outlets: Outlets) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []
        self.made: list[LeasesMade] = []
        self.waits_ms: list[int] = []
        self._changed = asyncio.Event()
        self.advisor = LeaseAdvisor(self._post, outlets, self, self._log)

    def now_ms(self) -> int:
        return sum(self.waits_ms)

    def unix_ms(self) -> int:
        return self.now_ms()

    async def sleep_ms(self, duration_ms: int) -> None:
        self.waits_ms.append(duration_ms)
        await asyncio.sleep(0)

    def _post(self, made: LeasesMade) -> None:
        self.made.append(made)
        self._changed.set()

    def _log(self, level: str, event: str, fields: tuple[tuple[str, object], ...]) -> None:
        self.lines.append((event, {"level": level, **dict(fields)}))
        self._changed.set()

    async def until(self, holds: Callable[[], object]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    async def logged(self) -> tuple[str, dict[str, object]]:
        await self.until(lambda: self.lines)
        return self.lines[-1]


@asynccontextmanager
async def advising(outlets: Outlets) -> AsyncIterator[Bench]:
    bench = Bench(outlets)
    running = asyncio.create_task(bench.advisor.run())
    try:
        yield bench
    finally:
        running.cancel()
        (ended,) = await asyncio.gather(running, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError), ended


def document(found: tuple[Recommendation, ...] = FOUND) -> list[str]:
    return [each.sentence for each in found]


async def test_a_question_is_answered_in_a_thread_and_comes_back() -> None:
    rig = rig_of(days=20)
    rig.now_ms += MINUTE_MS
    (question,) = asked(rig.handle(Tick()))
    async with advising(Outlets()) as bench:
        bench.advisor.make(question)
        await bench.until(lambda: bench.made)
    (made,) = bench.made
    assert (made.day, [each.gpu_type for each in made.found]) == (question.day, ["H100"])


async def test_the_file_is_whole_and_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "leases.json"
    file.write_text("yesterday")
    file.chmod(0o644)
    async with (
        receiving(Receiver()) as receiver,
        advising(Outlets(str(file), receiver.url)) as bench,
    ):
        bench.advisor.publish(PublishLeases(FOUND))
        assert await bench.logged() == (
            "leases.posted",
            {"level": "info", "url": receiver.url.removesuffix(f"/hooks/{SECRET}")},
        )
    assert [each["sentence"] for each in json.loads(file.read_bytes())] == document()
    assert receiver.bodies == [file.read_bytes()], "both get the same"
    assert receiver.types == ["application/json"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("full", [True, False])
async def test_a_file_that_cannot_be_written_is_a_warning_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """A full disk leaves what was there and no half of another; a folder that is not there is named
    with its file. The webhook is called all the same."""
    file = tmp_path / ("leases.json" if full else "missing/leases.json")
    if full:
        file.write_text("yesterday")

        def no_room(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("coordinator.lease_advisor.os.fsync", no_room)
    async with (
        receiving(Receiver()) as receiver,
        advising(Outlets(str(file), receiver.url)) as bench,
    ):
        bench.advisor.publish(PublishLeases(FOUND))
        await bench.until(lambda: len(bench.lines) == 2)
    reason = os.strerror(errno.ENOSPC if full else errno.ENOENT)
    warning = {"level": "warning", "file": str(file), "reason": reason}
    assert bench.lines[0] == ("leases.not_written", warning)
    assert bench.lines[1][0] == "leases.posted"
    assert os.listdir(tmp_path) == ([file.name] if full else [])
    assert not full or file.read_text() == "yesterday"


async def test_one_that_fails_and_then_takes_it_is_asked_again_after_a_while() -> None:
    async with (
        receiving(Receiver([500, 503])) as receiver,
        advising(Outlets(webhook=receiver.url)) as bench,
    ):
        bench.advisor.publish(PublishLeases(FOUND))
        assert (await bench.logged())[0] == "leases.posted"
    assert len(receiver.bodies) == 3
    assert bench.waits_ms == [RETRY_MS, 2 * RETRY_MS]


@pytest.mark.parametrize("status", [302, 404])
async def test_one_that_says_no_is_not_asked_again(status: int) -> None:
    """Nor is a redirect followed."""
    async with (
        receiving(Receiver([status])) as receiver,
        advising(Outlets(webhook=receiver.url)) as bench,
    ):
        bench.advisor.publish(PublishLeases(FOUND))
        event, fields = await bench.logged()
    assert (event, fields["reason"]) == ("leases.not_posted", f"it answered {status} (tried once)")
    assert (len(receiver.bodies), bench.waits_ms) == (1, [])


async def test_one_that_hangs_is_given_up_within_bounds_and_no_secret_is_logged() -> None:
    async with (
        receiving(Receiver(hangs=True)) as receiver,
        advising(Outlets(webhook=receiver.url, timeout_s=0.05)) as bench,
    ):
        bench.advisor.publish(PublishLeases(FOUND))
        event, fields = await bench.logged()
    assert event == "leases.not_posted"
    assert fields["reason"] == f"no answer within 0.05 s (tried {TRIES_MAX} times)"
    assert len(receiver.bodies) == TRIES_MAX
    assert bench.waits_ms == [RETRY_MS * 2**n for n in range(TRIES_MAX - 1)]
    assert SECRET not in str(bench.lines)


async def test_one_that_is_not_there_is_named_without_its_path() -> None:
    async with receiving(Receiver()) as gone:
        pass
    async with advising(Outlets(webhook=gone.url)) as bench:
        bench.advisor.publish(PublishLeases(FOUND))
        event, fields = await bench.logged()
    assert event == "leases.not_posted"
    assert str(fields["reason"]).endswith(f"(tried {TRIES_MAX} times)")
    assert fields["url"] == gone.url.removesuffix(f"/hooks/{SECRET}")
    assert SECRET not in str(bench.lines)


async def test_a_new_day_takes_the_place_of_one_that_still_waits() -> None:
    newer = (recommend(0, [7.0] * 720, Fleet("A100"), Terms(1.0, 2.0)),)
    async with (
        receiving(Receiver([500])) as receiver,
        advising(Outlets(webhook=receiver.url)) as bench,
    ):
        receiver.came.clear()
        bench.advisor.publish(PublishLeases(FOUND))
        await receiver.came.wait()
        bench.advisor.publish(PublishLeases(newer))
        await bench.logged()
    assert [json.loads(body)[0]["gpu_type"] for body in receiver.bodies] == ["H100", "A100"]


async def test_while_one_hangs_the_next_day_is_still_made() -> None:
    """Neither outlet is in the way of the answer, or of the loop that asks for it."""
    rig = rig_of(days=20)
    rig.now_ms += MINUTE_MS
    (question,) = asked(rig.handle(Tick()))
    async with (
        receiving(Receiver(hangs=True)) as receiver,
        advising(Outlets(webhook=receiver.url)) as bench,
    ):
        bench.advisor.publish(PublishLeases(FOUND))
        await receiver.came.wait()
        bench.advisor.make(question)
        await bench.until(lambda: bench.made)
        assert bench.lines == []


async def test_without_outlets_nothing_leaves() -> None:
    async with advising(Outlets()) as bench:
        bench.advisor.publish(PublishLeases(FOUND))
        for _ in range(3):
            await asyncio.sleep(0)
    assert bench.lines == []


def test_a_host_is_shown_without_what_lets_one_in() -> None:
    shown = lease_advisor._shown
    assert shown("https://hooks.example:8443/a/b?key=c") == "https://hooks.example:8443"
    assert shown("http://[::1]/x") == "http://[::1]"
