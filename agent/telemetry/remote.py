"""The GPUs of this box, as the sampler process tells of them: the agent's side of the socket.

Problem: whoever waits for a driver waits for ever. Here nobody waits longer than a deadline: every
answer comes over a socket with a time-out, and what is not answered by then is unknown, with a
sentence that says whom to look at. A reading that comes late is thrown away, since it would be
passed off as new.

How: one request is under way at most. While an old one is still unanswered, the next reading first
waits for its end and then asks anew, all within one deadline; so a blocked sampler gets no heap of
requests to answer, and one that is released is used again at once. `watch.py` decides when it is
killed and replaced. A process that does not die (state D) is left behind, and reaped when it has
ended; nobody waits for that.

Which sentence: when no GPU answers, the driver, or the access to it, is at fault; when one blocks
after others have answered, that one is. A GPU whose turn did not come is neither.
"""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import structlog

from agent.core.values import (
    GpuFacts,
    GpuInventory,
    GpuOccupancy,
    GpuSample,
    GpuUsage,
    Reading,
)
from agent.telemetry import MESSAGE_BYTES_MAX
from agent.telemetry.details import Details
from agent.telemetry.schedule import INVENTORY, PERIODS_MS, SAMPLE, USAGE, Schedule
from agent.telemetry.watch import Notice, Watch

SAMPLER: Final = (sys.executable, "-P", "-m", "agent.telemetry.sampler")
OCCUPANCY: Final = "occupancy"
NO_DRIVER_AGAIN_MS: Final = 60_000  # the library is looked for on disk each time
GONE_AGAIN_MS: Final = 10_000  # an instance that does not answer may have been destroyed
UNANSWERED_AGAIN_MS: Final = 86_400_000  # who hangs without a name ends a sampler each time
# It has 20 MiB beside the stand-in, and real drivers map more: far above what any should need, and
# far below a box's memory, so that a library that leaks has its own process to lose.
SAMPLER_BYTES_MAX: Final = 1024**3
PIPE_BYTES: Final = 65_536
SAID_BYTES: Final = 1_024  # the end of what it said before its end
CLOSE_S_MAX: Final = 1.0  # what is killed ends within milliseconds, or not at all

log = structlog.get_logger()


def monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Deadlines:
    """`first_ms` is for a driver that nothing is known of yet: without persistence mode it
    initialises every GPU when it is opened, some seconds for each."""

    fast_ms: int = 2_000
    slow_ms: int = 5_000
    first_ms: int = 60_000


class Answer(msgspec.Struct, frozen=True):
    """What the sampler says; see there."""

    id: int
    facts: GpuFacts | None = None
    sample: GpuSample | None = None
    usage: GpuUsage | None = None
    inventory: GpuInventory | None = None
    occupancy: GpuOccupancy | None = None
    failures: tuple[tuple[str, str, int], ...] = ()
    driver_version: str | None = None
    absence: str = ""
    listed: tuple[str, ...] = ()
    ends: str = ""
    done: bool = False


class _SamplerEnded(Exception):
    """The text says how."""


@dataclass(slots=True)
class _UnderWay:
    """A request without its end. `waiting` are the GPUs that it asks for, those to come; before
    `is_open` the driver itself is waited for."""

    id: int
    asked_ms: int
    waiting: list[str]
    is_open: bool
    enumerates: bool = False
    anybody: bool = False  # some GPU has answered
    named: dict[str, None] = field(default_factory=dict)
    samples: dict[str, GpuSample] = field(default_factory=dict)
    occupancies: dict[str, GpuOccupancy] = field(default_factory=dict)


class RemoteGpus:
    """Not thread-safe: `probe.py` holds the lock. `known` are GPUs that were seen before, for when
    the driver does not answer; `None` for `allowed_uuids` means all. Samplers tell of the driver's
    errors on the socket `event_descriptor`."""

    def __init__(
        self,
        allowed_uuids: Collection[str] | None = None,
        *,
        deadlines: Deadlines | None = None,
        command: Sequence[str] = SAMPLER,
        now_ms: Callable[[], int] = monotonic_ms,
        event_descriptor: int | None = None,
        rate: str = "normal",
        pcie_throughput: bool = False,
    ) -> None:
        self._pcie_throughput = pcie_throughput
        self._event_descriptor = event_descriptor
        self._schedule = Schedule()
        self._details = Details(rate)
        self._allowed_uuids = None if allowed_uuids is None else tuple(allowed_uuids)
        self._deadlines = deadlines or Deadlines()
        self._command = tuple(command)
        self._now_ms = now_ms
        self._watch = Watch()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._left_behind: list[subprocess.Popen[bytes]] = []
        self._under_way: _UnderWay | None = None
        self._errors = -1  # what it says on its standard error
        self._said = b""
        self._requests_count = 0
        self._ended = "it was not started"
        self._looked_ms = now_ms()  # when it was last asked which GPUs there are
        self._missing = False  # an instance
        self._unanswered = False  # which GPUs there are, the last time
        self._facts: dict[str, GpuFacts] = {}
        self.driver_version = ""
        """Empty where there is no NVML, no driver, or no answer yet."""
        self.absence = "NVML was not opened"
        """Why there is no NVML, or a GPU less than the driver counts, as a sentence; else empty."""

    def open(self, known: Iterable[GpuFacts] = (), driver_version: str = "") -> None:
        """Start the sampler and learn the GPUs. `known` are those of before; they stay if the
        driver does not answer, since jobs may run on them."""
        remembered = {facts.uuid: facts for facts in known if self._is_allowed(facts.uuid)}
        # Jobs may run on what is remembered, and their leases run out while an agent is silent.
        deadline_ms = self._deadlines.fast_ms if remembered else self._deadlines.first_ms
        self._start(tuple(remembered))
        if self._channel is None or not self._until_done(self._end_s(deadline_ms)):
            self._facts = remembered | self._facts
            self.driver_version = self.driver_version or driver_version
            self.absence = f"the driver did not answer within {deadline_ms} ms"
            if self._channel is None:
                self.absence = f"the sampler ended: {self._ended}"
            if remembered:
                self.absence += "; its GPUs are those of before"

    def close(self) -> None:
        """End the sampler. Closing twice is closing once."""
        self._let_go()
        self._watch = Watch()
        self.driver_version = ""
        self.absence = "NVML was closed"
        self._facts.clear()
        end_s = time.monotonic() + CLOSE_S_MAX
        for process in self._left_behind:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end_s - time.monotonic()))
        self._left_behind.clear()

    def facts(self) -> tuple[GpuFacts, ...]:
        """Every allowed GPU seen since `open`, or known then, the lost ones among them, but no
        instance that its GPU has no longer."""
        return tuple(self._facts.values())

    def refresh(self, *, again: bool = False) -> None:
        """Enumerate; not while the driver owes an answer already. `again`: some time after."""
        if self._under_way is None:
            self._looked_ms = self._now_ms()
            request = {"ask": "facts", "again": again}
            self._ask(request, tuple(self._facts), self._deadlines.slow_ms)
        self._replace()

    def _look_again(self, rate: str) -> None:
        """A driver that was not there may have been loaded since; GPUs may have come, instances
        have gone, and one may say now how much memory it has. With the inventory, at its pace."""
        period_ms = PERIODS_MS[rate].get(INVENTORY) if self.driver_version else NO_DRIVER_AGAIN_MS
        if period_ms is None or self._channel is None or self._under_way is not None:
            return
        if any(uuid in self._facts for uuid in self._watch.suspects):
            return  # enumerating calls them first of all
        if self._unanswered and self._facts:
            period_ms = UNANSWERED_AGAIN_MS
        elif self._missing:
            period_ms = min(period_ms, GONE_AGAIN_MS)
        elif self.absence:
            period_ms = min(period_ms, NO_DRIVER_AGAIN_MS)  # however slow readings are by order
        if self._now_ms() >= self._looked_ms + period_ms:
            self.refresh(again=True)

    def set_rate(self, rate: str) -> None:
        """One of `PERIODS_MS`, from the next reading on. Safe from any thread; waits for none."""
        self._details.rate = rate

    def reading(self) -> Reading:
        """How it has gone."""
        return self._details.reading()

    def samples(self) -> tuple[GpuSample, ...]:
        """One reading of each GPU of `facts`, then of each allowed GPU that was never seen. One
        that is not answered in time says so, and has no values. What is due beside it is read
        first, so that the sample is new when it is handed out."""
        rate = self._details.rate
        owed = self._under_way
        self._look_again(rate)
        strangers = [uuid for uuid in self._allowed_uuids or () if uuid not in self._facts]
        known = tuple(self._facts)
        order = self._watch.order(self._now_ms(), (*known, *strangers))
        # A GPU that has blocked the driver first has to answer for a sample.
        trusted = [uuid for uuid in order if uuid not in self._watch.suspects]
        for kind in (INVENTORY, USAGE):
            # Not behind a request that a driver still owes: the samples need what time is left.
            if self._under_way is None:
                self._read(kind, rate, trusted, self._deadlines.slow_ms)
        due = self._schedule.due(rate, SAMPLE, self._now_ms(), order)
        read: dict[str, GpuSample] = {}
        if self._under_way is owed:  # else one deadline was missed just now, and counted
            read = self._read(SAMPLE, rate, order, self._deadlines.fast_ms)
        # A driver that was slow to open may have named some just now.
        strangers = [uuid for uuid in strangers if uuid not in self._facts]
        resting = [uuid for uuid in order if uuid not in due]
        now_ms = self._now_ms()
        made = {uuid: read.get(uuid) or self._unread(uuid) for uuid in (*self._facts, *strangers)}
        made |= {uuid: self._details.between(uuid, rate, now_ms) for uuid in resting}
        self._details.take_samples((made[uuid] for uuid in due), now_ms)
        self._missing = any(made[uuid].error and facts.place for uuid, facts in self._facts.items())
        self._replace()
        return tuple(self._details.beside(sample, rate, now_ms) for sample in made.values())

    def _unread(self, uuid: str) -> GpuSample:
        return GpuSample(uuid=uuid, error=f"{uuid} is unknown: {self._why(uuid)}")

    def _read(
        self, kind: str, rate: str, order: Sequence[str], deadline_ms: int
    ) -> dict[str, GpuSample]:
        """Ask for what is due of this class. Who has no GPU is asked for none, and shows that it
        answers."""
        begun_ms = self._now_ms()
        due = self._schedule.due(rate, kind, begun_ms, order)
        if not due and (order or kind != SAMPLE):
            if self._under_way is not None:
                self._until_done(self._end_s(deadline_ms))
            return {}
        self._schedule.read(kind, due, begun_ms)
        read = self._ask({"ask": kind, "uuids": due}, due, deadline_ms).samples
        in_time = self._under_way is None and self._channel is not None
        self._details.asked(kind, self._now_ms() - begun_ms, in_time=in_time)
        return read

    def occupancies(self, uuids: Collection[str]) -> tuple[GpuOccupancy, ...]:
        """Who uses each of these; of one that does not answer in time nothing is known."""
        order = self._watch.order(self._now_ms(), tuple(uuids))
        request = {"ask": OCCUPANCY, "uuids": order}
        read = self._ask(request, order, self._deadlines.fast_ms).occupancies
        self._replace()
        return tuple(read.get(uuid) or GpuOccupancy(uuid) for uuid in uuids)

    def pid(self) -> int:
        """Of the sampler; 0 when there is none."""
        return self._process.pid if self._process is not None else 0

    def _ask(
        self, request: Mapping[str, object], order: Sequence[str], deadline_ms: int
    ) -> "_UnderWay":
        """With what was read within the deadline."""
        end_s = self._end_s(deadline_ms)
        if self._channel is None or not self._until_done(end_s, last=False):
            return _UnderWay(0, self._now_ms(), [], is_open=False)
        asked = self._send(request, order)
        self._until_done(end_s)
        return asked

    def _until_done(self, end_s: float, *, last: bool = True) -> bool:
        """Hear out the request that is under way; whether it ended in time. Only the `last` one of
        a reading shows that the sampler keeps up."""
        try:
            while self._under_way is not None:
                self._take(self._hear(end_s), self._under_way)
        except TimeoutError:
            self._tell(self._watch.missed(self._suspect()))
            return False
        except _SamplerEnded as error:
            self._lose(str(error))
            return False
        if last:
            self._tell(self._watch.answered())
        return True

    def _hear(self, end_s: float) -> Answer:
        """The next message. Raises `TimeoutError`, `_SamplerEnded`."""
        assert self._channel is not None
        left_s = end_s - time.monotonic()
        if left_s <= 0.0:
            raise TimeoutError
        self._channel.settimeout(left_s)
        message = b""
        with contextlib.suppress(ConnectionError):
            message = self._channel.recv(MESSAGE_BYTES_MAX)
        if not message:
            raise _SamplerEnded(self._how_it_ended())
        try:
            return msgspec.json.decode(message, type=Answer)
        except msgspec.DecodeError as error:
            raise _SamplerEnded(f"it does not speak our language: {error}") from error

    def _take(self, answer: Answer, asked: _UnderWay) -> None:
        if answer.id != asked.id:
            raise _SamplerEnded(f"it answers request {answer.id}, and {asked.id} was asked")
        if answer.driver_version is not None:
            self.driver_version = answer.driver_version
            asked.is_open = True
        told = answer.facts or answer.sample or answer.usage or answer.inventory or answer.occupancy
        if told is not None:
            asked.anybody = True
            asked.waiting = [uuid for uuid in asked.waiting if uuid != told.uuid]
            self._tell(self._watch.heard(told.uuid))
        if answer.facts is not None and self._is_allowed(answer.facts.uuid):
            self._learn(answer.facts, asked)
        if answer.sample is not None:
            asked.samples[answer.sample.uuid] = answer.sample
        if answer.usage is not None:
            self._details.take_usage(answer.usage, self._now_ms())
        if answer.inventory is not None:
            self._details.take_inventory(answer.inventory, self._now_ms())
        if answer.occupancy is not None:
            asked.occupancies[answer.occupancy.uuid] = answer.occupancy
        if answer.done:
            self._details.failed(answer.failures)
            self.absence = answer.absence
            self._under_way = None
            self._unanswered = self._unanswered and not asked.enumerates
            self._drop_gone(asked, answer.listed)
            if answer.ends:
                raise _SamplerEnded(answer.ends)

    def _learn(self, facts: GpuFacts, asked: _UnderWay) -> None:
        """What is known stays where the driver fails to say it again."""
        asked.named[facts.uuid] = None
        known = self._facts.get(facts.uuid)
        if known is None or facts.memory_bytes not in (0, known.memory_bytes):
            self._facts[facts.uuid] = facts

    def _drop_gone(self, asked: _UnderWay, listed: Collection[str]) -> None:
        """Of whole GPUs that could say all that they are, what they are no longer: instances that
        were destroyed, one GPU where there are instances now; and a GPU on whose bus another one
        is. One that is only silent, or lost, stays."""
        named = [facts for uuid, facts in self._facts.items() if uuid in asked.named]
        buses = {facts.pci_bus_id: True for facts in named if facts.pci_bus_id}
        for uuid, facts in list(self._facts.items()):
            whole = facts.place.partition("/")[0] or uuid
            replaced = not facts.place and facts.pci_bus_id in buses
            if uuid not in asked.named and (whole in listed or replaced):
                del self._facts[uuid]

    def _send(self, request: Mapping[str, object], order: Sequence[str]) -> _UnderWay:
        assert self._channel is not None
        self._requests_count += 1
        is_open = request["ask"] in (SAMPLE, USAGE, INVENTORY, OCCUPANCY)
        enumerates = not is_open and not request.get("known")
        asked = _UnderWay(self._requests_count, self._now_ms(), list(order), is_open, enumerates)
        try:
            self._channel.send(msgspec.json.encode({"id": asked.id, **request}))
        except ConnectionError:
            asked.waiting.clear()  # it ended before it was asked: no GPU did that
        self._under_way = asked
        return asked

    def _start(self, order: Sequence[str]) -> None:
        """Start a sampler and have it open the driver; its answer comes with the next reading."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        events = () if self._event_descriptor is None else (self._event_descriptor,)
        # A library that floods its standard error is not blocked by that, and fills no log.
        self._errors, errors = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with theirs, open(errors, "wb", buffering=0) as said:
            try:
                self._process = subprocess.Popen(
                    [*self._command, *map(str, (theirs.fileno(), os.getpid(), *events))],
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    pass_fds=[theirs.fileno(), *events],
                    start_new_session=True,  # Ctrl-C in a terminal is for the agent
                )
            except OSError as error:
                ours.close()
                self._lose(str(error))
                return
        self._channel = ours
        with contextlib.suppress(OSError):  # it has ended, or this is not allowed
            limit = (SAMPLER_BYTES_MAX, SAMPLER_BYTES_MAX)
            resource.prlimit(self._process.pid, resource.RLIMIT_DATA, limit)
        # GPUs that are known need no call that could hang before they are read.
        request = {"ask": "open", "allowed": self._allowed_uuids, "known": tuple(self._facts)}
        self._send(request | {"pcie_throughput": self._pcie_throughput}, order)

    def _replace(self) -> None:
        """Kill it and start another one, if it is time."""
        self._hear_errors()
        self._left_behind = [process for process in self._left_behind if process.poll() is None]
        now_ms = self._now_ms()
        if not self._watch.replaces(now_ms, len(self._left_behind)):
            return
        self._let_go()
        self._watch.replaced(now_ms)
        self._start(())
        log.info("sampler.replaced", pid=self.pid())

    def _how_it_ended(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"it ended with status {self._process.wait(CLOSE_S_MAX)}"
        return "it has closed its socket"

    def _lose(self, reason: str) -> None:
        # Who is killed from outside was not stopped by a GPU; who crashes in a call was.
        killed = self._process is not None and self._process.returncode == -signal.SIGKILL
        suspect = "" if killed else self._suspect()
        self._hear_errors()
        if last := self._said.decode(errors="replace").strip().splitlines()[-1:]:
            reason = f"{reason}; it said: {last[0]}"
        self._tell(self._watch.lost(reason, suspect))
        self._ended = reason
        self._let_go()

    def _hear_errors(self) -> None:
        """As much as a pipe holds: what has no room in it is lost."""
        with contextlib.suppress(BlockingIOError):
            if self._errors >= 0:
                self._said = (self._said + os.read(self._errors, PIPE_BYTES))[-SAID_BYTES:]

    def _let_go(self) -> None:
        self._unanswered |= self._under_way is not None and self._under_way.enumerates
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._left_behind.append(self._process)
        if self._errors >= 0:
            os.close(self._errors)
        self._channel = self._process = self._under_way = None
        self._errors, self._said = -1, b""

    def _suspect(self) -> str:
        """The GPU that is waited for; empty when none is."""
        asked = self._under_way
        return asked.waiting[0] if asked is not None and asked.is_open and asked.waiting else ""

    def _why(self, uuid: str) -> str:
        """Nothing was read of this GPU."""
        asked, now_ms = self._under_way, self._now_ms()
        again_s = self._watch.wait_ms(now_ms) / 1000
        if self._channel is None:
            return f"the sampler ended ({self._ended}); another one starts in {again_s:.0f} s"
        if asked is None:
            if uuid not in self._watch.suspects:
                return "the driver has just named it"
            return f"it blocked the driver, and is asked again in {again_s:.0f} s"
        waited = f"for {(now_ms - asked.asked_ms) / 1000:.1f} s"
        if not asked.anybody:
            return f"no GPU has answered {waited}, which points to the driver or the access to it"
        if uuid == self._suspect():
            return f"it has not answered {waited}, others did, which points to this GPU"
        return (
            f"the driver has been blocked {waited} by {self._suspect() or 'a GPU without a name'}"
        )

    def _is_allowed(self, uuid: str) -> bool:
        return self._allowed_uuids is None or uuid in self._allowed_uuids

    @staticmethod
    def _end_s(duration_ms: int) -> float:
        return time.monotonic() + duration_ms / 1000

    @staticmethod
    def _tell(notices: Iterable[Notice]) -> None:
        for notice in notices:
            getattr(log, notice.level)(notice.event, **dict(notice.fields))
