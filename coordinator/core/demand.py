"""What the fleet's users have asked for lately, as the mix that fragmentation is measured against.

Problem: which piece of a GPU is worth keeping depends on who comes next, and nobody knows that.
What came lately is the best guess: a window of the last `REQUESTS_MAX` ranks that were submitted,
held and cancelled ones as well, for each was somebody's request.

A mix remembers what it has computed, and a new one knows nothing. So it is made anew only when an
eighth of the window is new, and then at the next pass: a burst of submissions costs one mix.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from coordinator.core import shares
from coordinator.core.fragmentation import PARTS, Ask, Box, Kind, Mix
from coordinator.core.model import GpuFacts, Job, JobSpec
from coordinator.core.rooms import Room
from coordinator.core.shares import Hold
from coordinator.core.validate import suits

# A day or a week of most fleets; of one that is busier, what it does now.
REQUESTS_MAX = 1_024
RENEWALS = 8  # of a window


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

    def mix(self) -> Mix:
        """Of the requests up to now, but for the last few."""
        if self._unseen * RENEWALS > len(self._recent):
            self._mix = Mix(Counter(self._recent), self._parts)
            self._unseen = 0
        return self._mix


def ask_of(spec: JobSpec) -> Ask:
    """What one rank asks for. Nothing else of a job matters here, and so equal asks are one."""
    wants = JobSpec(
        gpus=spec.gpus,
        gpu_types=spec.gpu_types,
        gpu_memory_bytes_min=spec.gpu_memory_bytes_min,
        shared_gpu_memory_bytes=spec.shared_gpu_memory_bytes,
    )
    return Ask(spec.gpus, (spec.memory_bytes,), wants)


def parts_of(ask: Ask, kind: Kind) -> int:
    """What of such a GPU a job takes; 0 where it does not do."""
    wants = ask.wants
    assert isinstance(wants, JobSpec), "asks of jobs are made of their specifications"
    memory_bytes, name = kind
    gpu = GpuFacts("", name, memory_bytes)
    if not suits(wants, gpu):
        return 0
    share_bytes = wants.shared_gpu_memory_bytes
    return -(-share_bytes * PARTS // shares.shareable_bytes(gpu)) if share_bytes else PARTS


def box_of(room: Room, spec: JobSpec | None = None, ranks: Sequence[tuple[str, ...]] = ()) -> Box:
    """What is left of a node; with a job, what would be if its ranks had these GPUs as well."""
    taken = [uuid for gpu_uuids in ranks for uuid in gpu_uuids]
    share_bytes = spec.shared_gpu_memory_bytes if spec is not None else 0
    gpus = []
    for gpu in room.offer.gpus:
        parts = PARTS if gpu.uuid in room.free else 0
        holds = room.holds.get(gpu.uuid, ())
        if gpu.uuid in taken:
            holds, parts = (*holds, Hold("", share_bytes)), 0
        if holds and room.offer.shares:
            room_bytes = shares.left_bytes(gpu, holds)
            parts = room_bytes * PARTS // shares.shareable_bytes(gpu) if room_bytes else 0
        if parts:
            gpus.append(((gpu.memory_bytes, gpu.name), parts))
    need_bytes = spec.memory_bytes * len(ranks) if spec is not None else 0
    return Box((max(0, room.memory_bytes - need_bytes),), tuple(sorted(gpus)))
