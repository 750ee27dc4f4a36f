"""Room that is kept for a job over several rounds: who may not use it, and how it is hidden.

Problem: what a pass keeps for a job is forgotten with the pass, which is right for room that
somebody is about to leave, and too short for a gang that gathers GPUs while small jobs come and go.
So a *keep* names GPUs and host memory, and for whom. Jobs of the same class do not see them, unless
they are expected to be gone before the room is complete, were submitted before its job, have to run
now to keep a deadline, or are within their projects' quotas and it is not. Higher classes see
everything, since nobody waits for a lower class; lower ones may use it, since they give way.

Those with whom a job shall not share a GPU (`company.py`) count for it as having theirs alone,
until they leave. There may be as many of them as GPUs, and as many who ask: so nothing of a room is
changed for it but who counts as alone (`Room.alone`), and what it remembers stays true.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from coordinator.core.rooms import Place, Room
from coordinator.core.shares import Hold


@dataclass(frozen=True, slots=True)
class Reservation:
    """`places`, node and GPUs of each rank, are kept for a job (`reservations.py`)."""

    job_id: int
    places: tuple[Place, ...]
    until_ms: int


@dataclass(frozen=True, slots=True)
class Keep:
    """`rank` is that of the job's class; `places` are nodes with GPUs, and `memory_bytes` of the
    host by node. `free_in_ms`: all of it is expected to be free then; `None`: nobody knows. `until`
    is for a sentence. `lent`: the job is beyond its project's quota. `urgent` are jobs that
    have to run now. With `apart` it is nobody's: these attempts of each node count as having their
    GPUs alone, and `why` is the sentence."""

    job_id: int
    rank: int
    places: tuple[tuple[str, tuple[str, ...]], ...]
    memory_bytes: int
    free_in_ms: int | None
    until: str
    lent: bool = False
    urgent: tuple[int, ...] = ()
    apart: tuple[tuple[str, frozenset[str]], ...] = ()
    why: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """Equal where the same is hidden."""
        return self.job_id, self.apart

    def hides_from(self, rank: int, job_id: int, lasts_ms: int | None, *, lent: bool) -> bool:
        """`lasts_ms`: how long that job is expected to run. Who was there before sees all of it:
        those are few, and would never run behind large ones that keep coming."""
        if job_id <= self.job_id or rank != self.rank or (self.lent and not lent):
            return False
        if job_id in self.urgent:
            return False
        return lasts_ms is None or self.free_in_ms is None or lasts_ms > self.free_in_ms

    @property
    def note(self) -> str:
        """For who would fit otherwise."""
        if self.apart:
            return self.why
        return f"there is room on {self._on} that is reserved {self._for}"

    @property
    def note_of_way(self) -> str:
        """For who would be given way to otherwise."""
        return f"others would give way on {self._on}, where room is reserved {self._for}"

    @property
    def _on(self) -> str:
        nodes = list(dict.fromkeys(node for node, _ in self.places))
        return nodes[0] if len(nodes) == 1 else f"{nodes[0]} and {len(nodes) - 1} more"

    @property
    def _for(self) -> str:
        return f"for job {self.job_id} until {self.until}"


@contextmanager
def hidden(keeps: Sequence[Keep], rooms: Mapping[str, Room]) -> Iterator[None]:
    """As those see the rooms who may not use what is kept."""
    undo = [_hide(keep, rooms) for keep in keeps if not keep.apart]
    before = [each for keep in keeps for each in _set_alone(keep, rooms)]
    try:
        yield
    finally:
        for room, alone in reversed(before):
            room.alone = alone
        for changes in reversed(undo):
            for room, uuid, holds, was_free, memory_bytes in reversed(changes):
                _show(room, uuid, holds, was_free=was_free)
                room.memory_bytes += memory_bytes


_Change = tuple[Room, str, tuple[Hold, ...], bool, int]


def _hide(keep: Keep, rooms: Mapping[str, Room]) -> list[_Change]:
    changes: list[_Change] = []
    for node, gpu_uuids in keep.places:
        room = rooms.get(node)
        if room is None:
            continue
        room.forget()
        memory_bytes = min(keep.memory_bytes, max(0, room.memory_bytes))
        room.memory_bytes -= memory_bytes
        changes.append((room, "", (), False, memory_bytes))
        for uuid in gpu_uuids:
            holds = room.holds.get(uuid, ())
            was_free = room.free.pop(uuid, None) is not None
            room.holds[uuid] = (*holds, Hold(""))
            changes.append((room, uuid, holds, was_free, 0))
    return changes


def _set_alone(keep: Keep, rooms: Mapping[str, Room]) -> Iterator[tuple[Room, frozenset[str]]]:
    """With who had that before."""
    for node, attempts in keep.apart:
        room = rooms.get(node)
        if room is not None:
            yield room, room.alone
            room.alone = attempts | room.alone if room.alone else attempts


def _show(room: Room, uuid: str, holds: tuple[Hold, ...], *, was_free: bool) -> None:
    room.forget()
    if not uuid:
        return
    if holds:
        room.holds[uuid] = holds
    else:
        del room.holds[uuid]
    if was_free:
        room.free[uuid] = next(gpu for gpu in room.offer.gpus if gpu.uuid == uuid)
