"""What the fleet's users have asked for lately, as the mix that fragmentation is measured against.

Problem: which piece of a GPU is worth keeping depends on who comes next, and nobody knows that.
What came lately is the best guess: a window of the last `REQUESTS_MAX` ranks that were submitted,
held and cancelled ones as well, for each was somebody's request.

A mix remembers what it has computed, and a new one knows nothing. So it is made anew only when an
eighth of the window is new, and then at the next pass: a burst of submissions costs one mix.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from coordinator.core import shares
from coordinator.core.fragmentation import PARTS, Ask, Kind, Mix
from coordinator.core.model import GpuFacts, Job, JobSpec
from coordinator.core.validate import suits

# A day or a week of most fleets; of one that is busier, what it does now.
REQUESTS_MAX = 1_024
RENEWALS = 8  # of a window


class _Wants(NamedTuple):
    """Of which GPU, and what of it, as a job's specification says."""

    gpu_types: tuple[str, ...]
    gpu_memory_bytes_min: int
    shared_gpu_memory_bytes: int


class Demand:
    """The last requests. `parts` says what of a GPU a request takes (`Mix`)."""

    def __init__(self, parts: Callable[[Ask, Kind], int] | None = None) -> None:
        self._parts = parts or parts_of
        self._recent: deque[Ask] = deque(maxlen=REQUESTS_MAX)
        self._unseen = 0
        self._mix = Mix({}, self._parts)

    def note(self, ask: Ask, ranks: int = 1) -> None:
        """A request, of as many ranks as count."""
        self._recent.extend([ask] * min(ranks, REQUESTS_MAX))
        self._unseen += ranks

    def note_jobs(self, jobs: Iterable[Job]) -> None:
        """In the order of their submission."""
        for job in sorted(jobs, key=lambda job: job.id)[-REQUESTS_MAX:]:
            self.note(ask_of(job.spec), job.spec.ranks)

    @property
    def last_mix(self) -> Mix:
        """As it was when it was last used, for those who only look."""
        return self._mix

    def mix(self) -> Mix:
        """Of the requests up to now, but for the last few."""
        if self._unseen * RENEWALS > len(self._recent):
            self._mix = Mix(Counter(self._recent), self._parts)
            self._unseen = 0
        return self._mix


def ask_of(spec: JobSpec) -> Ask:
    """What one rank asks for. Nothing else of a job matters here, and so equal asks are one."""
    wants = _Wants(spec.gpu_types, spec.gpu_memory_bytes_min, spec.shared_gpu_memory_bytes)
    return Ask(spec.gpus, (spec.memory_bytes,), wants)


def parts_of(ask: Ask, kind: Kind) -> int:
    """What of such a GPU a job takes; 0 where it does not do."""
    wants = ask.wants
    assert isinstance(wants, _Wants), "asks of jobs are made of their specifications"
    memory_bytes, name = kind
    gpu = GpuFacts("", name, memory_bytes)
    if not suits(wants, gpu):
        return 0
    share_bytes = wants.shared_gpu_memory_bytes
    return -(-share_bytes * PARTS // max(1, shares.shareable_bytes(gpu))) if share_bytes else PARTS
