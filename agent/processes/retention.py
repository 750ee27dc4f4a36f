"""Which logs are kept of attempts that are over, and for how long.

Problem: an attempt's log is bounded by rotation, but attempts are not: a node that runs for a year
has had tens of thousands of them, and a full disk ends training. People look at the newest ones.

How: all logs of the node share one cap. What the running ones take counts first and is never
touched beyond their own rotation; in what is left the logs of finished attempts stay, and the
oldest go first. Each gets a number when it is settled, which is kept beside its log: the times of
files would be those of a clock that may have been wrong. Looked at when an attempt is settled, and
once a minute, since those that run go on writing.
"""

import asyncio
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from agent.processes import records

# 64 attempts that filled their log; a small share of any GPU box's disk
LOG_BYTES_MAX = 4 * 1024**3
# a directory costs inodes even when its log is empty; hours of trivial jobs
FINISHED_ATTEMPTS_MAX = 4096
# between two looks those that run add no more than rotation leaves them, 64 MiB each
LOOK_S = 60.0

log = structlog.get_logger()


class Retention:
    """The finished attempts below `root`, oldest first. `running` gives the directories of those
    that are not settled."""

    def __init__(
        self, root: Path, running: Callable[[], Iterable[Path]], *, log_bytes_max: int
    ) -> None:
        self._root = root
        self._running = running
        self._log_bytes_max = log_bytes_max
        self._finished: dict[str, int] = {}  # the bytes of their logs, which do not change any more
        self._newest = 0  # the number of the attempt that was settled last
        self._timer: asyncio.TimerHandle | None = None

    def open(self, settled: Iterable[Path]) -> None:
        """Begin with what lies there, in the order in which it was settled. What has no number is
        of an older agent, or found a full disk: it goes before the others, by job and epoch."""
        ended = sorted(settled, key=lambda path: (records.settled_as(path), _ids(path)))
        self._finished = {path.name: records.log_bytes(path) for path in ended}
        self._newest = max(map(records.settled_as, ended), default=0)
        self._look_regularly()

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def add(self, directory: Path) -> None:
        """This attempt is settled; what is left of it may be dropped from now on."""
        self._newest += 1
        records.write_settled(directory, self._newest)
        self._finished[directory.name] = records.log_bytes(directory)
        self.prune()

    def prune(self) -> None:
        """Drop the oldest finished attempts until all logs together are within the cap."""
        total_bytes = sum(map(records.log_bytes, self._running())) + sum(self._finished.values())
        dropped, freed_bytes = 0, 0
        while self._finished and (
            total_bytes - freed_bytes > self._log_bytes_max
            or len(self._finished) > FINISHED_ATTEMPTS_MAX
        ):
            oldest = next(iter(self._finished))
            freed_bytes += self._finished.pop(oldest)
            dropped += 1
            shutil.rmtree(self._root / oldest, ignore_errors=True)
        if dropped:
            log.debug("process.logs_dropped", attempts=dropped, freed_bytes=freed_bytes)

    def _look_regularly(self) -> None:
        self.prune()
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look_regularly)


def _ids(directory: Path) -> tuple[int, ...]:
    """Job, epoch and rank as numbers: the later of two attempts of a job comes after the other."""
    return tuple(int(number) for number in directory.name.split(".") if number.isdigit())
