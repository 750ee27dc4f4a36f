"""When running jobs are expected to end, and hence when and where a waiting one would fit.

Problem: "it waits" is half an answer. Jobs say how many steps they have and are seen to make them
(`pace.py`), so the fleet's next hours are known as far as they say it, and a waiting job can be
told its hour.

How: those who are expected to leave do so in that order, one after the other. After each, whoever
waits before the job takes what fits (and is not expected to leave again), then the job itself is
tried. A job that says no total has no known end and never leaves here. One that is stopping has
left, at the latest, when its grace is over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.core.model import Attempt, JobSpec
from coordinator.core.phases import AttemptPhase
from coordinator.core.placement import Need, find, request_key
from coordinator.core.rooms import Place, Room
from coordinator.core.sentences import listed, quantity
from coordinator.core.shortfalls import NODES_NAMED_MAX
from coordinator.core.state import Instant, State
from coordinator.core.validate import gigabytes

# Rooms that one forecast may ask, some 10 us each: an answer that is later than this is of little
# use, and the coordinator has other things to do.
LOOKS_MAX = 20_000
DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Forecast:
    """A job would fit on `places` at `at_ms`, when `whole`, an attempt or a gang, has left."""

    at_ms: int
    places: tuple[Place, ...]
    whole: str


def forecast(
    need: Need, ahead: Sequence[Need], rooms: Sequence[Room], ends_ms: Mapping[str, int]
) -> Forecast | None:
    """`ahead` are those who wait before it, `ends_ms` says when who leaves. `rooms` are as they are
    now, and are used up; `None`: not as far as anybody can see."""
    homes: dict[str, list[int]] = {}
    for index, room in enumerate(rooms):
        for tenant in room.tenants.values():
            homes.setdefault(tenant.whole, []).append(index)
    views, gone = list(rooms), dict.fromkeys(homes, False)
    waiting = [*ahead, need]
    looks = 0
    for at_ms, whole in sorted((at_ms, whole) for whole, at_ms in ends_ms.items()):
        if whole not in homes:
            continue
        gone[whole] = True
        changed = list(dict.fromkeys(homes[whole]))
        _renew(views, rooms, changed, gone)
        refused: dict[tuple[object, ...], None] = {}
        for asking in list(waiting):
            # Where nobody has left, a job of one rank fits no more than before.
            asked = [views[i] for i in changed] if asking.spec.ranks == 1 else views
            key = request_key(asking)
            if key in refused:
                continue
            looks += len(asked)
            if looks > LOOKS_MAX:
                return None
            places = find(asking, asked)
            if places is None:
                refused[key] = None
            elif asking is need:
                return Forecast(at_ms, places, whole)
            else:
                waiting.remove(asking)
                _renew(views, rooms, _take(asking.spec, places, rooms), gone)
    return None


def _renew(
    views: list[Room], rooms: Sequence[Room], indexes: Sequence[int], gone: Mapping[str, bool]
) -> None:
    for index in indexes:
        views[index] = rooms[index].without(lambda tenant: gone[tenant.whole])


def _take(spec: JobSpec, places: Sequence[Place], rooms: Sequence[Room]) -> list[int]:
    """Which rooms have changed by it."""
    known = {room.offer.node: index for index, room in enumerate(rooms)}
    for place in places:
        rooms[known[place.node]].take(spec, place.gpu_uuids)
    return list(dict.fromkeys(known[place.node] for place in places))


def where(spec: JobSpec, places: Sequence[Place], rooms: Sequence[Room]) -> str:
    """For people: "4 x A100 on n07"."""
    gpus = {gpu.uuid: gpu.name for room in rooms for gpu in room.offer.gpus}
    by_node: dict[str, list[str]] = {}
    for place in places:
        by_node.setdefault(place.node, []).extend(gpus[uuid] for uuid in place.gpu_uuids)
    words = []
    for node, names in by_node.items():
        kinds = ", ".join(sorted(dict.fromkeys(names)))
        if spec.shared_gpu_memory_bytes:
            words.append(f"{gigabytes(spec.shared_gpu_memory_bytes)} of a shared {kinds} on {node}")
        else:
            words.append(f"{len(names)} x {kinds} on {node}" if names else node)
    if len(words) > NODES_NAMED_MAX:
        words = [*words[:NODES_NAMED_MAX], f"{quantity(len(words) - NODES_NAMED_MAX, 'node')} more"]
    return listed(words)


def clock(unix_ms: int) -> str:
    """The time of day."""
    minutes = unix_ms // 60_000 % 1_440
    return f"{minutes // 60:02}:{minutes % 60:02} UTC"


def moment(now: Instant, at_ms: int) -> str:
    """For a sentence: the time of day for what is less than a day away."""
    away_ms = at_ms - now.now_ms
    away = f"in {seconds(away_ms / 1000)}"
    return f"at {clock(now.unix_ms + away_ms)} ({away})" if away_ms < DAY_MS else away


def seconds(duration_s: float) -> str:
    """A duration for people: "42 s", "3 min", "5.2 h", "2.5 days", "2525 days"."""
    if duration_s < 120:
        return f"{max(0, duration_s):.0f} s"
    if duration_s < 7_200:
        return f"{duration_s / 60:.0f} min"
    days = duration_s / 86_400
    if days < 2:
        return f"{duration_s / 3600:.1f} h"
    return f"{days:.1f} days" if days < 100 else f"{days:.0f} days"


# --- of the state ---------------------------------------------------------------------------------


def end_ms(state: State, now: Instant, attempt: Attempt) -> int | None:
    """When an attempt, and with it its gang, is expected to leave; `None`: nobody knows. Rank 0
    speaks for all."""
    spec = state.jobs[attempt.job_id].spec
    if attempt.phase is AttemptPhase.STOPPING:
        asked_ms = state.ordered_ms.get(attempt.id, now.now_ms)
        return max(now.now_ms, asked_ms + (attempt.precopy_ms or 0) + spec.grace_ms)
    pace = state.paces.get(attempt.id)
    if attempt.phase is not AttemptPhase.RUNNING or pace is None:
        return None
    left_ms = pace.remaining_ms(pace.step)
    return None if left_ms is None else max(now.now_ms, pace.step_ms + round(left_ms))


def ends(state: State, now: Instant) -> dict[str, int]:
    """When who leaves, by what its ranks have in common; those of whom nobody knows are left
    out."""
    found: dict[str, int] = {}
    for attempt_id in state.indices.open_attempts:
        attempt = state.attempts[attempt_id]
        at_ms = end_ms(state, now, attempt) if attempt.rank == 0 else None
        if at_ms is not None:
            found[f"{attempt.job_id}.{attempt.epoch}"] = at_ms
    return found
