"""What is worth leasing, beside the coordinator's loop: found in a thread, written, posted.

Problem: the numbers of a day take up to a second of a core, a folder may be on a disk that is full
or away, and whoever listens at a webhook is somebody else's program, which is restarted, is slow,
or hangs; none of them may hold up who schedules a fleet. So the loop only notes what it wants, and
two tasks do it:

1. One takes the newest question, has a thread answer it, and hands the answer back through the
   inbox; only when that is durable does the loop say what is to be published.
2. The other takes the newest answer. The file is written whole or not at all, in the same thread;
   what goes wrong is a warning. Then the webhook is called, with a deadline for the whole call,
   again after a while that doubles, and at most `TRIES_MAX` times; a new day's answer takes the
   place of one that still waits. Redirects are not followed: they would carry the numbers to
   somebody whom nobody has named.

The path of the webhook may be what lets one in, so the log has its host alone, and never the text
of an error that may quote more.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final
from urllib.parse import urlsplit

import msgspec

from coordinator.core.lease_advice import advise
from coordinator.core.linear import SolveLinear
from coordinator.core.messages import LeasesMade, MakeLeases, PublishLeases
from coordinator.crew import crew
from coordinator.ports import Clock

TIMEOUT_S: Final = 10.0  # of one call, from the name's look-up to the answer
TRIES_MAX: Final = 8
RETRY_MS: Final = 5_000  # doubled each time: all tries take some ten minutes, as a restart may
FILE_MODE: Final = 0o600  # what a fleet costs is its owner's business
# Answers that may change if one asks again; any other that is no success is a mistake of ours.
BUSY: Final = frozenset({408, 425, 429})
SERVER_ERROR: Final = 500

Log = Callable[[str, str, tuple[tuple[str, object], ...]], None]


@dataclass(frozen=True, slots=True)
class Outlets:
    """Where answers go; empty: nowhere."""

    file: str = ""
    webhook: str = ""
    timeout_s: float = TIMEOUT_S


@dataclass(frozen=True, slots=True)
class _Failed:
    reason: str
    may_pass: bool = True


class LeaseAdvisor:
    """`coordinator.ports.Leasing`. `post` is called in the loop's thread, `solve` in another."""

    def __init__(
        self,
        post: Callable[[LeasesMade], None],
        outlets: Outlets,
        clock: Clock,
        log: Log,
        *,
        solve: SolveLinear | None = None,
    ) -> None:
        self._post = post
        self._advise = partial(advise, solve=solve)
        self._outlets = outlets
        self._clock = clock
        self._log = log
        self._asked: MakeLeases | None = None
        self._told: PublishLeases | None = None
        self._ask = asyncio.Event()
        self._tell = asyncio.Event()

    def make(self, asked: MakeLeases) -> None:
        self._asked = asked
        self._ask.set()

    def publish(self, told: PublishLeases) -> None:
        self._told = told
        self._tell.set()

    async def run(self) -> None:
        """Until it is cancelled. What goes wrong in the rule is a bug of ours and is raised."""
        thread = crew(1, "leases")
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._make(thread))
                both.create_task(self._publish(thread))
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    async def _make(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._ask.wait()
            self._ask.clear()
            asked, self._asked = self._asked, None
            if asked is not None:
                self._post(await loop.run_in_executor(thread, self._advise, asked))

    async def _publish(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._tell.wait()
            self._tell.clear()
            told = self._told
            assert told is not None, "it is set before the event"
            document = msgspec.json.encode(told.found) + b"\n"
            file = self._outlets.file
            if file:
                try:
                    await loop.run_in_executor(thread, _write, file, document)
                except OSError as error:
                    reason = error.strerror or type(error).__name__
                    fields = (("file", file), ("reason", reason))
                    self._log("warning", "leases.not_written", fields)
            if self._outlets.webhook:
                await self._deliver(told, document)

    async def _deliver(self, told: PublishLeases, document: bytes) -> None:
        """Until it is taken, refused for good, or older than another one."""
        url = _shown(self._outlets.webhook)
        for attempted in range(1, TRIES_MAX + 1):
            failed = await _call(self._outlets.webhook, document, self._outlets.timeout_s)
            if failed is None:
                self._log("info", "leases.posted", (("url", url),))
                return
            if not failed.may_pass or attempted == TRIES_MAX:
                times = "once" if attempted == 1 else f"{attempted} times"
                reason = f"{failed.reason} (tried {times})"
                self._log("warning", "leases.not_posted", (("url", url), ("reason", reason)))
                return
            await self._clock.sleep_ms(RETRY_MS * 2 ** (attempted - 1))
            if self._told is not told:
                return


async def _call(url: str, document: bytes, timeout_s: float) -> _Failed | None:
    """One try; `None` when it was taken."""
    import aiohttp  # a tenth of a second, which a coordinator without a webhook does not pay for

    headers = {"Content-Type": "application/json", "User-Agent": "baton-coordinator"}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
            session.post(url, data=document, headers=headers, allow_redirects=False) as answer,
        ):
            status = answer.status
    except TimeoutError:
        return _Failed(f"no answer within {timeout_s:g} s")
    except aiohttp.ClientConnectorCertificateError as error:
        return _Failed(f"its certificate is refused: {error.certificate_error}")
    except aiohttp.ClientConnectorError as error:
        return _Failed(error.os_error.strerror or type(error.os_error).__name__)
    except (aiohttp.ClientError, OSError) as error:
        return _Failed(type(error).__name__)
    if answer.ok and status < 300:
        return None
    return _Failed(f"it answered {status}", status in BUSY or status >= SERVER_ERROR)


def _shown(url: str) -> str:
    """Whom it names, without what lets one in."""
    parts = urlsplit(url)
    port = "" if parts.port is None else f":{parts.port}"
    host = parts.hostname or ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}"


def _write(path: str, document: bytes) -> None:
    """Whole or not at all, also after a power cut. Raises `OSError`."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        opened = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, FILE_MODE
        )
        with open(opened, "wb") as file:
            os.fchmod(opened, FILE_MODE)
            file.write(document)
            file.flush()
            os.fsync(opened)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
