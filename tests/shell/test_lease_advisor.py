"""Recommendations on their way out of the coordinator: a file, a webhook, and neither holds it up.

The servers are real ones on loopback; what passes between two tries is virtual time.
"""

import asyncio
import errno
import json
import os
import ssl
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from coordinator import lease_advisor
from coordinator.core import bills
from coordinator.core.coordinator import Coordinator
from coordinator.core.demand_history import MINUTE_MS
from coordinator.core.lease_messages import LeasesMade, PublishLeases
from coordinator.core.leasing import Fleet, Recommendation, Terms, recommend
from coordinator.core.linear import Linear
from coordinator.core.messages import PutAttempt, PutJob, PutNode, Tick
from coordinator.core.model import Attempt, HostFacts, Job, JobSpec, Node
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.state import Options
from coordinator.lease_advisor import RETRY_MS, TRIES_MAX, LeaseAdvisor, Outlets
from coordinator.shell import CoordinatorShell
from coordinator.store.memory import MemoryDisk, MemoryStore
from tests.core.test_lease_days import HELD_GPUS, asked, rig_of
from tests.e2e.certificates import Authority
from tests.held_port import held_port
from tests.shell.test_demand_shell import GPUS, VirtualClock

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
async def receiving(
    receiver: Receiver, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Receiver]:
    app = web.Application()
    app.router.add_post("/{path:.*}", receiver.answer)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    port = runner.addresses[0][1]
    receiver.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/hooks/{SECRET}"
    try:
        yield receiver
    finally:
        receiver.released.set()
        await runner.cleanup()


class Bench:
    """An advisor, what it has logged and how long it waited between tries, in virtual time, and
    the programs that it had solved (none was)."""

    def __init__(self, outlets: Outlets) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []
        self.made: list[LeasesMade] = []
        self.waits_ms: list[int] = []
        self._changed = asyncio.Event()
        self.programs: list[Linear] = []
        self.advisor = LeaseAdvisor(self._post, outlets, self, self._log, solve=self._solve)

    def _solve(self, program: Linear) -> None:
        self.programs.append(program)

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


@pytest.mark.parametrize("flexible_ms", [0, bills.MS_PER_DAY])
async def test_a_question_is_answered_in_a_thread_and_comes_back(flexible_ms: int) -> None:
    """The solver is asked where work may wait, and one that finds nothing harms nothing."""
    rig = rig_of(days=20, flexible_ms=flexible_ms)
    rig.now_ms += MINUTE_MS
    (question,) = asked(rig.handle(Tick()))
    async with advising(Outlets()) as bench:
        bench.advisor.make(question)
        await bench.until(lambda: bench.made)
    (made,) = bench.made
    assert (made.day, [each.gpu_type for each in made.found]) == (question.day, ["H100"])
    assert bool(bench.programs) == bool(flexible_ms)
    assert [each.level_gpus for each in made.found] == [HELD_GPUS]


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


async def test_one_that_hangs_is_given_up_within_bounds_and_no_secret_is_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A minute passes once it has heard what it does not answer to."""
    loop = asyncio.get_running_loop()
    clock_s = loop.time
    async with (
        receiving(Receiver(hangs=True)) as receiver,
        advising(Outlets(webhook=receiver.url, timeout_s=60.0)) as bench,
    ):
        monkeypatch.setattr(loop, "time", lambda: clock_s() + 61.0 * len(receiver.bodies))
        bench.advisor.publish(PublishLeases(FOUND))
        event, fields = await bench.logged()
    assert event == "leases.not_posted"
    assert fields["reason"] == f"no answer within 60 s (tried {TRIES_MAX} times)"
    assert len(receiver.bodies) == TRIES_MAX
    assert bench.waits_ms == [RETRY_MS * 2**n for n in range(TRIES_MAX - 1)]
    assert SECRET not in str(bench.lines)


async def test_one_that_is_not_there_is_named_without_its_path() -> None:
    with held_port() as port:
        address = f"http://127.0.0.1:{port}"
        async with advising(Outlets(webhook=f"{address}/hooks/{SECRET}")) as bench:
            bench.advisor.publish(PublishLeases(FOUND))
            event, fields = await bench.logged()
    assert event == "leases.not_posted"
    assert str(fields["reason"]).endswith(f"(tried {TRIES_MAX} times)")
    assert fields["url"] == address
    assert SECRET not in str(bench.lines)


async def test_one_that_nobody_vouches_for_gets_nothing(tmp_path: Path) -> None:
    files = Authority(tmp_path / "ca").issue("n1")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files.cert, files.key)
    async with (
        receiving(Receiver(), tls) as receiver,
        advising(Outlets(webhook=receiver.url)) as bench,
    ):
        bench.advisor.publish(PublishLeases(FOUND))
        event, fields = await bench.logged()
    assert (event, receiver.bodies) == ("leases.not_posted", [])
    assert str(fields["reason"]).startswith("its certificate is refused")
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


async def test_the_coordinator_writes_it_once_a_day_also_over_a_restart(tmp_path: Path) -> None:
    """The real loop, its store and its advisor, over virtual minutes."""
    file, clock, disk = tmp_path / "leases.json", VirtualClock(), MemoryDisk()
    begun_ms = clock.unix_ms() - 20 * bills.MS_PER_DAY
    uuids = tuple(gpu.uuid for gpu in GPUS[:3])
    disk.commit(
        [
            PutNode(Node("n1", "j", "a", HostFacts(), GPUS)),
            PutJob(Job(1, JobSpec(command=("x",), gpus=3), JobPhase.ACTIVE, begun_ms, epoch=1)),
            PutAttempt(Attempt(1, 1, "n1", uuids, AttemptPhase.RUNNING, begun_ms)),
        ]
    )
    async with deciding(disk, clock, file) as logged:
        while "leases.recommended" not in logged or not file.exists():
            await clock.run_to(clock.passed_ms // MINUTE_MS + 1)
    (found,) = json.loads(file.read_bytes())
    assert (found["gpu_type"], found["level_gpus"]) == ("H100", 3)
    file.unlink()
    async with deciding(disk, clock, file) as logged:
        await clock.run_to(clock.passed_ms // MINUTE_MS + 5)
        assert (logged.count("leases.recommended"), file.exists()) == (0, False)


@asynccontextmanager
async def deciding(disk: MemoryDisk, clock: VirtualClock, file: Path) -> AsyncIterator[list[str]]:
    """As `main.py` puts it together; the names of what is logged."""
    store, core, logged = MemoryStore(disk), Coordinator(Options()), list[str]()
    core.load(await store.open(), clock.now_ms())

    def log(level: str, event: str, fields: tuple[tuple[str, object], ...]) -> None:
        logged.append(event)

    shell = CoordinatorShell(core, store, clock, log)
    advisor = LeaseAdvisor(shell.leases_made, Outlets(str(file)), clock, log)
    shell.lease_by(advisor)
    beside = [asyncio.create_task(shell.run()), asyncio.create_task(advisor.run())]
    try:
        yield logged
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await store.close()
