"""Whose deadlines waiting would miss, and what is rented for them: cases known by hand, and rules
over any."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.bursts import Burst
from coordinator.core.in_time import Claim, Late, Rentable, Room, late

MINUTE, HOUR = 60_000, 3_600_000
NOTICE = 30 * MINUTE
BOOT = 10 * MINUTE
RENTABLE = {"H100": Rentable(Burst(2.0), BOOT)}


def claim(job_id: int = 1, *, minutes: float = 30, gpus: int = 1, **more: object) -> Claim:
    """It has to run within so many minutes, and then for two hours."""
    latest_ms = {"H100": round(minutes * MINUTE)}
    made = Claim(job_id, gpus, 1, 1, round(minutes * MINUTE) + 2 * HOUR, latest_ms, "H100")
    return replace(made, **more)  # type: ignore[arg-type]


def never(gpu_type: str, gpus: int) -> float:
    return math.inf


def found(
    *claims: Claim,
    rooms: Sequence[Room] = (),
    frees: Mapping[str, Sequence[int]] | None = None,
    rentable: Mapping[str, Rentable] = RENTABLE,
) -> list[tuple[int, str, int]]:
    """`frees`: in how many minutes the first, the second, and so on of a type comes free."""

    def frees_ms(gpu_type: str, gpus: int) -> float:
        minutes = (frees or {}).get(gpu_type, ())
        return minutes[gpus - 1] * MINUTE if gpus <= len(minutes) else math.inf

    chosen = late(claims, rooms, frees_ms, rentable, NOTICE)
    return [(each.job_id, each.gpu_type, each.nodes) for each in chosen]


def test_who_would_have_to_run_before_anything_is_free_is_rented_for() -> None:
    assert found(claim()) == [(1, "H100", 1)]
    assert found(claim(), rooms=[Room("H100", 1)]) == []
    assert found(claim(), rooms=[Room("H100", 1, 29 * MINUTE)]) == []
    assert found(claim(), rooms=[Room("H100", 1, 31 * MINUTE)]) == [(1, "H100", 1)]
    assert found(claim(), frees={"H100": [29]}) == []
    assert found(claim(), frees={"H100": [31]}) == [(1, "H100", 1)]


@pytest.mark.parametrize(("minutes", "rented"), [(9, 0), (10, 1), (40, 1), (41, 0)])
def test_not_for_what_is_lost_anyway_nor_before_it_has_to_be(minutes: int, rented: int) -> None:
    assert len(found(claim(minutes=minutes))) == rented


def test_who_comes_before_it_takes_what_comes_free() -> None:
    waits = claim(ahead_gpus={"H100": 2})
    assert found(waits, frees={"H100": [1, 2]}) == [(1, "H100", 1)]
    assert found(waits, frees={"H100": [1, 2, 3]}) == []
    boots = Room("H100", 2, MINUTE)
    assert found(waits, rooms=[boots]) == [(1, "H100", 1)]
    assert found(waits, rooms=[replace(boots, gpus=3)]) == []
    assert found(waits, rooms=[replace(boots, ready_ms=0)]) == [], "those found no use for it"
    assert found(replace(waits, ordered=1, first=True), rooms=[boots]) == [], "it is rented for it"
    assert found(claim(), rooms=[replace(boots, rented=True)]) == [(1, "H100", 0)]


def test_what_one_has_another_has_not() -> None:
    two = [claim(1, minutes=20), claim(2, minutes=25)]
    assert found(*two, rooms=[Room("H100", 1)]) == [(2, "H100", 1)]
    assert found(*two, frees={"H100": [5, 22]}) == []
    assert found(*two, frees={"H100": [5, 26]}) == [(2, "H100", 1)]
    assert found(*two) == [(1, "H100", 1)], "on one node of eight there is room for both"
    higher = [claim(1, minutes=20), claim(2, minutes=25, rank=0)]
    assert found(*higher, rooms=[Room("H100", 1)]) == [(1, "H100", 1)]


def test_a_node_that_is_off_is_started_for_demand_of_its_own_type_alone() -> None:
    off = Room("H100", 8, BOOT, off=True)
    assert found(claim(), rooms=[off]) == []
    assert found(claim(home="A100"), rooms=[off]) == [(1, "H100", 1)]


def test_a_host_that_is_too_small_is_no_room() -> None:
    small = Room("H100", 1, memory_bytes=10)
    assert found(claim(memory_bytes=10), rooms=[small]) == []
    assert found(claim(memory_bytes=11), rooms=[small]) == [(1, "H100", 1)]


def test_only_a_type_whose_nodes_can_hold_it_counts() -> None:
    rentable = {"H100": Rentable(Burst(2.0, gpus_per_node=4), BOOT)}
    assert found(claim(gpus=4), rentable=rentable) == [(1, "H100", 1)]
    assert found(claim(gpus=5), rentable=rentable) == []
    assert found(claim(gpus=4, ranks=3), rentable=rentable) == [(1, "H100", 3)]
    assert found(claim(gpus=3, ranks=3), rentable=rentable) == [(1, "H100", 3)], "one on each"
    few = {"H100": Rentable(Burst(2.0, gpus_per_node=4, nodes_max=2), BOOT)}
    assert found(claim(gpus=4, ranks=3), rentable=few) == [], "two nodes are of no use to it"
    assert found(claim(gpus=4, ranks=3), rooms=[Room("H100", 4)], rentable=few) == [(1, "H100", 2)]


def test_of_two_types_it_is_its_own_and_else_the_cheapest_over_the_time_that_it_needs() -> None:
    both = {"A100": Rentable(Burst(1.0), BOOT), "H100": Rentable(Burst(2.0), BOOT)}
    waits = claim(latest_ms={"A100": 20 * MINUTE, "H100": 30 * MINUTE})
    assert found(waits, rentable=both) == [(1, "H100", 1)]
    assert found(replace(waits, home="L40"), rentable=both) == [(1, "A100", 1)]
    slow = replace(waits, home="L40", latest_ms={"A100": -3 * HOUR, "H100": 30 * MINUTE})
    assert found(slow, rentable=both) == [(1, "H100", 1)], "it would be too late there"
    lasts = replace(waits, home="L40", latest_ms={"A100": 15 * MINUTE, "H100": 2 * HOUR})
    soon = {**both, "H100": Rentable(Burst(2.0), 100 * MINUTE)}
    assert found(replace(lasts, deadline_ms=150 * MINUTE), rentable=soon) == [(1, "H100", 1)]


def test_what_was_rented_for_it_and_went_to_another_is_not_rented_again() -> None:
    assert found(claim(ordered=1)) == []
    assert found(claim(gpus=8, ranks=3, ordered=1)) == [(1, "H100", 2)]
    part = [Room("H100", 8, MINUTE)]
    assert found(claim(gpus=8, ranks=3, ordered=1), rooms=part) == [(1, "H100", 2)]


# --- rules ----------------------------------------------------------------------------------------

TYPES = ("A100", "H100", "L40")


def some_claim(job_id: int, chance: Random) -> Claim:
    latest_ms = {
        gpu_type: chance.randint(-10, 90) * MINUTE for gpu_type in TYPES if chance.random() < 0.6
    }
    deadline_ms = max(latest_ms.values(), default=0) + chance.randint(1, 300) * MINUTE
    return Claim(
        job_id, chance.choice((1, 1, 2, 4, 8)), chance.choice((1, 1, 2, 3)), chance.randint(0, 2),
        deadline_ms, latest_ms, chance.choice(TYPES), chance.choice((0, 5)),
        {gpu_type: chance.choice((0, 0, 3)) for gpu_type in TYPES}, chance.choice((0, 0, 1)),
        chance.random() < 0.3,
    )  # fmt: skip


def some_room(chance: Random) -> Room:
    off = chance.random() < 0.3
    ready_ms = chance.randint(1 if off else 0, 40) * MINUTE
    return Room(
        chance.choice(TYPES), chance.randint(1, 8), ready_ms, off, chance.choice((None, 3)), not off
    )


def some_rentable(chance: Random) -> dict[str, Rentable]:
    return {
        gpu_type: Rentable(
            Burst(chance.uniform(0.5, 9), chance.choice((1, 4, 8)), nodes_max=chance.randint(0, 4)),
            chance.randint(1, 30) * MINUTE,
        )
        for gpu_type in TYPES
        if chance.random() < 0.6
    }


def fits(one: Claim, gpu_type: str, rooms: Sequence[Room]) -> bool:
    """Whether it would fit in these rooms, if it had them alone."""
    usable = [
        room.gpus // one.gpus
        for room in rooms
        if room.gpu_type == gpu_type
        and room.ready_ms <= one.latest_ms.get(gpu_type, -1)
        and (not room.off or gpu_type == one.home)
        and (room.memory_bytes is None or room.memory_bytes >= one.memory_bytes)
    ]
    return sum(usable) >= one.ranks


@pytest.mark.long
@settings(deadline=None, max_examples=1_000)
@given(st.integers(0, 2**40))
def test_nothing_is_rented_that_keeps_no_deadline_or_that_nobody_needs(seed: int) -> None:
    """Safety, of any queue and any fleet; and who is alone and could be in time only so gets it."""
    chance = Random(seed)
    claims = [some_claim(number, chance) for number in range(1, chance.randint(2, 9))]
    rooms = [some_room(chance) for _ in range(chance.randint(0, 6))]
    rentable = some_rentable(chance)
    chosen = late(claims, rooms, never, rentable, NOTICE)
    by_job = {each.job_id: each for each in chosen}
    assert len(by_job) == len(chosen)
    for one in chosen:
        if one.nodes:
            _keeps_it(claims[one.job_id - 1], one, rentable)
    for gpu_type, offer in rentable.items():
        nodes = [each.nodes for each in chosen if each.gpu_type == gpu_type]
        assert sum(nodes) <= offer.burst.nodes_max
    for one_claim in claims:
        alone = late([replace(one_claim, ahead_gpus={})], rooms, never, rentable, NOTICE)
        if any(fits(one_claim, gpu_type, rooms) for gpu_type in TYPES):
            assert not any(each.nodes for each in alone)
        elif not one_claim.ordered and any(
            _could_keep(one_claim, gpu_type, offer) for gpu_type, offer in rentable.items()
        ):
            assert alone


def _per_node(one: Claim, offer: Rentable) -> int:
    return offer.burst.gpus_per_node // one.gpus


def _could_keep(one: Claim, gpu_type: str, offer: Rentable) -> bool:
    """With rented nodes alone."""
    left_ms = one.latest_ms.get(gpu_type, -1) - offer.boot_ms
    room = offer.burst.nodes_max * _per_node(one, offer)
    return 0 <= left_ms <= NOTICE and room >= one.ranks


def _keeps_it(one: Claim, chosen: Late, rentable: Mapping[str, Rentable]) -> None:
    offer = rentable[chosen.gpu_type]
    assert 0 <= one.latest_ms[chosen.gpu_type] - offer.boot_ms <= NOTICE
    assert 0 < chosen.nodes + one.ordered <= math.ceil(one.ranks / _per_node(one, offer))


@pytest.mark.long
@settings(deadline=None, max_examples=500)
@given(st.integers(0, 2**40))
def test_of_one_type_as_many_are_rented_as_cannot_be_in_time(seed: int) -> None:
    """Against the largest matching of jobs and rooms, of one GPU each."""
    chance = Random(seed)
    claims = [claim(n, minutes=chance.randint(10, 40)) for n in range(1, chance.randint(2, 12))]
    rooms = [Room("H100", 1, chance.randint(0, 45) * MINUTE) for _ in range(chance.randint(0, 9))]
    rentable = {"H100": Rentable(Burst(2.0, gpus_per_node=1), BOOT)}
    chosen = late(claims, rooms, never, rentable, NOTICE)
    assert len(chosen) == len(claims) - _matching(claims, rooms)


def _matching(claims: Sequence[Claim], rooms: Sequence[Room]) -> int:
    has: dict[int, int] = {}

    def finds(index: int, tried: dict[int, None]) -> bool:
        for place, room in enumerate(rooms):
            if room.ready_ms > claims[index].latest_ms["H100"] or place in tried:
                continue
            tried[place] = None
            if place not in has or finds(has[place], tried):
                has[place] = index
                return True
        return False

    return sum(finds(index, {}) for index in range(len(claims)))


@dataclass
class Machine:
    """A fleet that is full, minute by minute: what is ordered comes within its boot time, and who
    was rented for goes first, whoever has to run soonest before the others."""

    chance: Random
    now_ms: int = 0
    waits: dict[int, Claim] = field(default_factory=dict)
    began_ms: dict[int, int] = field(default_factory=dict)
    rooms: list[Room] = field(default_factory=list)
    ordered: dict[int, int] = field(default_factory=dict)

    def minute(self) -> None:
        if self.chance.random() < 0.3:
            number = len(self.waits) + len(self.began_ms) + 1
            latest_ms = {"H100": self.now_ms + self.chance.randint(5, 120) * MINUTE}
            deadline_ms = latest_ms["H100"] + HOUR
            gpus = self.chance.choice((1, 2, 4, 8))
            self.waits[number] = Claim(number, gpus, 1, 1, deadline_ms, latest_ms, "H100")
        self._start()
        for one in late(self._claims(), self._rooms(), never, RENTABLE, NOTICE):
            self.ordered[one.job_id] = self.ordered.get(one.job_id, 0) + one.nodes
            ready_ms = self.now_ms + self.chance.randint(1, BOOT)
            self.rooms += [Room("H100", 8, ready_ms, rented=True)] * one.nodes
        self.now_ms += MINUTE

    def _claims(self) -> list[Claim]:
        return [
            replace(
                each,
                latest_ms={"H100": each.latest_ms["H100"] - self.now_ms},
                deadline_ms=each.deadline_ms - self.now_ms,
                ordered=self.ordered.get(each.job_id, 0),
                first=each.job_id in self.ordered,
            )
            for each in self.waits.values()
        ]

    def _rooms(self) -> list[Room]:
        """As the plan sees them: what boots is there after the longest boot that is likely."""
        return [
            replace(
                room, ready_ms=0 if room.ready_ms <= self.now_ms else room.ready_ms - self.now_ms
            )
            for room in self.rooms
        ]

    def _start(self) -> None:
        order = sorted(
            self.waits.values(),
            key=lambda one: (one.job_id not in self.ordered, one.latest_ms["H100"], one.job_id),
        )
        for one in order:
            for place, room in enumerate(self.rooms):
                if room.ready_ms <= self.now_ms and room.gpus >= one.gpus:
                    self.rooms[place] = replace(room, gpus=room.gpus - one.gpus)
                    self.began_ms[one.job_id] = self.now_ms
                    del self.waits[one.job_id]
                    break


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**40))
def test_who_is_rented_for_runs_in_time_and_is_rented_for_once(seed: int) -> None:
    """Liveness, over hours of a full fleet: for whom there is time enough when he comes, the node
    is ordered, comes, and is his within a minute. Nobody is rented for twice."""
    machine = Machine(Random(seed))
    had_time: dict[int, int] = {}
    for _ in range(240):
        machine.minute()
        for job_id, one in machine.waits.items():
            came_ms = machine.now_ms - MINUTE
            if job_id not in had_time and one.latest_ms["H100"] - came_ms >= BOOT:
                had_time[job_id] = one.latest_ms["H100"]
    assert set(machine.ordered.values()) <= {0, 1}
    for job_id, latest_ms in had_time.items():
        assert machine.began_ms.get(job_id, machine.now_ms) <= latest_ms + MINUTE
