"""Room for large jobs: after a wait the largest of a class gets GPUs reserved, until it starts or
the reservation expires.

Problem: backfill by fit lets every small job that fits go before a large one that does not, and
while small ones keep coming the large one never sees enough GPUs free at once. Holding GPUs back
for whoever is first costs more than it brings: they idle for hours.

How, in six lines:
1. A job of several GPUs that has waited `reservation_wait_ms` may have a reservation; of those of a
   class the one with most GPUs, then the one that has waited longest. A class has one at most.
2. It is made where it is expected to be free soonest (`foresight.py`). Where somebody has to leave
   who does not say when he ends, where least GPU-time has to: his is taken to be as long again as
   he has run. Who is of a lower class gives way, and costs nothing.
3. Others of the class do not see what is reserved (`keeps.py`), unless they are expected to end
   before it is free. Lower classes may use it and are displaced when the rest is free.
4. It is not made while it is known that its room comes free only after it would expire.
5. It expires after `reservation_ms`: no GPU idles for it any longer. Its job waits anew for the
   next one, others of its class have a round without, and another job has its turn.
6. Nothing of it is durable: a restarted coordinator makes it anew.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from coordinator.core import flexible, foresight, projects
from coordinator.core.keeps import Reservation
from coordinator.core.model import CLASS_RANK, Job, JobSpec
from coordinator.core.needs import blocked, need_of
from coordinator.core.offers import open_rooms
from coordinator.core.placement import Need, make_room, request_key
from coordinator.core.rooms import Place, Room, Tenant
from coordinator.core.state import Instant, State
from coordinator.core.validate import could_hold, suits

# How often it is looked whether somebody has waited long enough.
LOOK_MS = 5_000
# Of a class so many are tried, the largest first: for one that cannot have its room in time another
# may.
TRIED_MAX = 3
NODES_TRIED_MAX = 256  # for a job of one rank; some 100 us each


@dataclass(frozen=True, slots=True)
class _Choice:
    """The least is the best."""

    unknown: bool
    free_in_ms: int
    gpu_ms: int
    node: str
    places: tuple[Place, ...]

    @property
    def cost(self) -> tuple[bool, int, int, str]:
        return self.unknown, self.free_in_ms, self.gpu_ms, self.node


def tick(state: State, now: Instant) -> None:
    """A round is due when a reservation expires, or somebody may have one."""
    if any(kept.until_ms <= now.now_ms for kept in state.reservations.values()):
        state.dirty = True
    if now.now_ms < state.reservations_looked_ms + LOOK_MS:
        return
    state.reservations_looked_ms = now.now_ms
    limit_ms = state.options.reservation_wait_ms
    for job_id, since_ms in state.waiting_ms.items():
        job = state.jobs.get(job_id)
        late = limit_ms and now.now_ms - since_ms >= limit_ms and job is not None
        if (
            late
            and job is not None
            and _may_have(job, now)
            and (_rank(job) not in state.reservations)
        ):
            state.dirty = True
            return


def note(state: State, now: Instant, job_ids: Iterable[int]) -> None:
    """Their wait begins, if it has not begun."""
    for job_id in job_ids:
        if job_id in state.queued:
            state.waiting_ms.setdefault(job_id, now.now_ms)


def review(state: State, now: Instant) -> None:
    """Before a round over everybody: reservations end, and are made."""
    state.waiting_ms = {job_id: state.waiting_ms.get(job_id, now.now_ms) for job_id in state.queued}
    late = _late(state, now)
    rooms = open_rooms(state) if state.reservations or late else []
    resting: dict[int, None] = {}
    for rank, kept in list(state.reservations.items()):
        job = state.jobs.get(kept.job_id)
        waits = job is not None and job.id in state.queued and not blocked(state, now, job)
        if waits and kept.until_ms > now.now_ms and _stands(kept, rooms):
            continue
        del state.reservations[rank]
        if waits and kept.until_ms <= now.now_ms:
            state.waiting_ms[kept.job_id] = now.now_ms
            resting[rank] = None
        elif waits and job is not None:
            _make(state, now, job, rooms, until_ms=kept.until_ms)
    for rank in dict.fromkeys(map(_rank, late)):
        # Who could have none a moment ago cannot now: each look is one at all nodes.
        rests = rank in resting or now.now_ms < state.reservation_retry_ms.get(rank, now.now_ms)
        if rank not in state.reservations and not rests:
            for job in _in_line([job for job in late if _rank(job) == rank], rooms):
                if rank not in state.reservations:
                    _make(state, now, job, rooms, now.now_ms + state.options.reservation_ms)
            state.reservation_retry_ms[rank] = now.now_ms + LOOK_MS


def _may_have(job: Job, now: Instant) -> bool:
    """It is large, and no GPU idles for one that may wait."""
    return job.spec.gpus * job.spec.ranks > 1 and not flexible.left_ms(job, now.unix_ms)


def _rank(job: Job) -> int:
    return CLASS_RANK[job.spec.job_class]


def _stands(kept: Reservation, rooms: Sequence[Room]) -> bool:
    """Whether all of its GPUs are still in nodes that take work."""
    known = {gpu.uuid: None for room in rooms for gpu in room.offer.gpus}
    return all(uuid in known for place in kept.places for uuid in place.gpu_uuids)


def others_in_line(state: State, now: Instant, job: Job) -> bool:
    """Whether somebody else of its class or above may get a reservation where more room is."""
    return any(_rank(other) <= _rank(job) and other.id != job.id for other in _late(state, now))


def _late(state: State, now: Instant) -> list[Job]:
    """Who has waited long enough: of each class those within their projects' quotas first, the
    largest of them, and who has waited longest."""
    limit_ms = state.options.reservation_wait_ms
    late = [
        state.jobs[job_id]
        for job_id, since_ms in state.waiting_ms.items()
        if limit_ms and now.now_ms - since_ms >= limit_ms and _may_have(state.jobs[job_id], now)
    ]
    lent = projects.standing_of(state, now).lent if late else {}
    late.sort(
        key=lambda job: (
            _rank(job),
            job.id in lent,
            -job.spec.gpus * job.spec.ranks,
            state.waiting_ms[job.id],
            job.id,
        )
    )
    return [job for job in late if not blocked(state, now, job)]


def _in_line(late: Sequence[Job], rooms: Sequence[Room]) -> list[Job]:
    """The first few that the open nodes could hold at all, with nothing else on them."""
    fits: dict[tuple[object, ...], bool] = {}
    found: list[Job] = []
    for job in late:
        key = request_key(Need(job.id, job.spec))
        if key not in fits:
            fits[key] = sum(_ranks_held(job.spec, room) for room in rooms) >= job.spec.ranks
        if fits[key]:
            found.append(job)
        if len(found) == TRIED_MAX:
            break
    return found


def _ranks_held(spec: JobSpec, room: Room) -> int:
    """How many ranks of it the node would have room for, were it empty."""
    if not could_hold(spec, room.offer.gpus, room.offer.memory_bytes):
        return 0
    count = sum(1 for gpu in room.offer.gpus if suits(spec, gpu)) // spec.gpus
    if spec.memory_bytes:
        count = min(count, room.offer.memory_bytes // spec.memory_bytes)
    return count if spec.ranks == 1 or room.offer.gangs else 0


def _make(state: State, now: Instant, job: Job, rooms: Sequence[Room], until_ms: int) -> None:
    # A type that it was promised is not the only one that it may have.
    need = replace(need_of(state, now, job, {}), only="", on=())
    choice = choose(need, rooms, foresight.ends(state, now), now)
    if choice is None or (not choice.unknown and choice.free_in_ms > until_ms - now.now_ms):
        return
    state.reservations[_rank(job)] = Reservation(job.id, choice.places, until_ms)


def choose(
    need: Need, rooms: Sequence[Room], ends_ms: dict[str, int], now: Instant
) -> _Choice | None:
    """Where the job would have its room soonest; `None`: nowhere, whoever left."""
    able = [
        room
        for room in rooms
        if could_hold(need.spec, room.offer.gpus, room.offer.memory_bytes)
        and (need.spec.ranks == 1 or room.offer.gangs)
    ]
    places = [[room] for room in able[:NODES_TRIED_MAX]]
    if need.spec.ranks > 1:
        places += [[r for r in able if r.offer.node in nodes] for nodes in need.alike] or [able]
    found = [_look(need, within, ends_ms, now) for within in places if within]
    return min((one for one in found if one is not None), key=lambda one: one.cost, default=None)


def _look(
    need: Need, within: Sequence[Room], ends_ms: dict[str, int], now: Instant
) -> _Choice | None:
    """Those leave first who are gone first."""
    rank = CLASS_RANK[need.spec.job_class]
    sizes: dict[str, int] = {}
    wholes: dict[str, Tenant] = {}
    for room in within:
        for tenant in room.tenants.values():
            wholes.setdefault(tenant.whole, tenant)
            sizes[tenant.whole] = sizes.get(tenant.whole, 0) + max(1, len(tenant.gpu_uuids))

    def leaves(tenant: Tenant) -> tuple[bool, int]:
        """Whether nobody knows when, and in how long."""
        if tenant.rank > rank or tenant.stopping:
            return False, 0
        if tenant.whole in ends_ms:
            return False, ends_ms[tenant.whole] - now.now_ms
        return True, max(0, now.unix_ms - tenant.order)

    order = sorted(wholes.values(), key=lambda one: (*leaves(one), sizes[one.whole], one.whole))
    made = make_room(need, within, [one for one in order if not one.stopping])
    if made is None:
        return None
    victims, places = made
    left = [(leaves(one), sizes[one.whole]) for one in victims]
    unknown = any(who[0] for who, _ in left)
    latest_ms = 0 if unknown else max((who[1] for who, _ in left), default=0)
    gpu_ms = sum(who[1] * size for who, size in left)
    return _Choice(unknown, latest_ms, gpu_ms, within[0].offer.node, places)
