"""Rooms that are kept from pass to pass are those that would be made anew: what random histories
(`test_coordinator_machine.py`) do not come to, and what a pass leaves behind.
"""

from dataclasses import replace

import pytest

from coordinator.core import fleet_scaling, offers, placement
from coordinator.core.capacity_model import Box
from coordinator.core.demand import RENEWALS
from coordinator.core.kept_rooms import KeptRooms
from coordinator.core.messages import CordonNode, FromAgent, Hello, Request, Submit
from coordinator.core.model import GpuFacts, HostFacts, JobSpec
from coordinator.core.offers import open_rooms
from coordinator.core.placement import Need, place, place_in
from coordinator.core.power import Takers
from coordinator.core.rooms import Offer, Tenant, open_room
from coordinator.core.scaling import Mode
from coordinator.core.state import Instant, LiveNode, State
from tests.core.coordinator_checks import check_rooms
from tests.core.coordinator_harness import GIGABYTE, Rig, gpus_of
from tests.core.test_fleet_scaling import NAMES, ScaledRig
from tests.core.test_placement import _mix_of
from tests.core.test_readings import Read

ONE = JobSpec(command=("train",), gpus=1)
MIX = _mix_of([ONE])


def _offer(node: str, *tenants: Tenant) -> Offer:
    gpus = tuple(GpuFacts(f"{node}-g{index}", "H100", 80 * GIGABYTE) for index in range(2))
    held = [uuid for tenant in tenants for uuid in tenant.gpu_uuids]
    free = tuple(gpu.uuid for gpu in gpus if gpu.uuid not in held)
    return Offer(node, gpus, free, 100 * GIGABYTE, 4, tenants)


def test_a_gpu_that_is_not_read_leaves_its_room_and_comes_back() -> None:
    fleet = Read({"n1": 1, "n2": 1})
    state = fleet.rig.core.state
    assert [len(room.free) for room in open_rooms(state)] == [1, 1]
    fleet.wait("n1-g0")
    assert [len(room.free) for room in open_rooms(state)] == [0, 1]
    fleet.beat()
    assert [len(room.free) for room in open_rooms(state)] == [1, 1]


def test_a_plan_looks_again_at_nodes_alone_that_have_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All were looked at before their first plan, a few in each tick."""
    looked: list[str] = []
    box_of = fleet_scaling.box_of

    def look(state: State, now: Instant, live: LiveNode, takers: Takers | None = None) -> Box:
        looked.append(live.node.id)
        return box_of(state, now, live, takers)

    monkeypatch.setattr(fleet_scaling, "box_of", look)
    fleet = ScaledRig.of(Mode.OBSERVE)
    fleet.live(50)
    assert sorted(looked) == sorted(NAMES)
    fleet.live(80)
    assert len(looked) == len(NAMES), "and two plans were made since"
    fleet.submit()
    fleet.ask(CordonNode("n4"))
    fleet.live(70)
    (held,) = fleet.rig.core.state.attempts.values()
    # What is there of a node that takes copies depends on others, and is looked at each time.
    assert {held.node, held.replica_node, "n4"} == {*looked[len(NAMES) :]} < {*NAMES}
    boxes = fleet_scaling.boxes_of(fleet.rig.core.state, fleet.rig.now)
    assert [box.node for box in boxes if box.closed] == ["n4"]
    assert [box.node for box in boxes if box.held_gpus] == [held.node]


def test_where_many_have_changed_the_next_pass_has_few_of_them_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offers, "CHANGED_MAX", 2)
    monkeypatch.setattr(offers, "AHEAD_MAX", 3)
    fleet = Read({f"n{number}": 1 for number in range(8)})
    state = fleet.rig.core.state
    for name in state.nodes:
        state.rooms.touch(name)
    left = []
    for _ in range(4):
        offers.tick(state)
        left.append(len(state.rooms.stale))
    assert left == [5, 2, 2, 2]
    check_rooms(state)
    assert not state.rooms.stale


def test_an_agent_that_comes_back_as_an_older_one_is_offered_less() -> None:
    rig = Rig()
    hello = Hello("n1", "j", "n1:1", HostFacts(cpu_count=4), gpus_of("n1", "1xH100"))
    rig.handle(FromAgent(1, hello))
    check_rooms(rig.core.state)
    rig.handle(FromAgent(2, replace(hello, gangs=False, shares=False)))
    check_rooms(rig.core.state)
    assert not open_rooms(rig.core.state)[0].offer.gangs


def test_who_looks_at_the_rooms_between_two_passes_changes_nothing_that_the_next_one_says() -> None:
    rig = Rig()
    gpus = gpus_of("n1", "2xH100")
    rig.handle(FromAgent(1, Hello("n1", "j", "n1:1", HostFacts(cpu_count=4), gpus)))
    for _ in range(RENEWALS + 1):
        rig.handle(Request(1, Submit(replace(ONE, gpus=2, hold=True))))
    check_rooms(rig.core.state)
    rig.handle(Request(1, Submit(ONE)))
    assert rig.disk.jobs[RENEWALS + 2].reason.endswith("of use to 10% of recent requests")
    for then, again in rig.replayed():
        assert then == again


def test_the_next_pass_sees_nothing_of_what_the_last_one_took_and_kept() -> None:
    spare = Tenant("1.1", 2, 0, ("n1-g0", "n1-g1"), 0, False)
    kept = KeptRooms()
    for offer in (_offer("n2"), _offer("n1", spare)):
        kept.put(offer)
    both = replace(ONE, gpus=2, ranks=2)
    first = place_in([Need(2, both)], kept.open(MIX))
    assert first.displacements, "it has to wait for the spare one, and keeps the other node"
    assert place_in([Need(2, both)], kept.open(MIX)) == first
    anew = [open_room(_offer("n1", spare), MIX), open_room(_offer("n2"), MIX)]
    assert kept.open(MIX) == anew


def test_a_room_that_is_gone_is_in_no_pass_and_one_that_comes_is_in_its_place() -> None:
    kept = KeptRooms()
    for node in ("n2", "n4", "n3"):
        kept.put(_offer(node))
    kept.open(MIX)
    kept.drop("n3")
    kept.put(_offer("n1"))
    assert [room.offer.node for room in kept.open(MIX)] == ["n1", "n2", "n4"]
    kept.put(_offer("n2", Tenant("1.1", 1, 0, ("n2-g0",), 0, False)))
    assert [len(room.free) for room in kept.open(MIX)] == [2, 1, 2]


def test_what_others_lose_is_asked_anew_when_other_things_are_asked_for() -> None:
    kept = KeptRooms()
    kept.put(_offer("n1"))
    few = kept.open(MIX)[0].increase(ONE, [("n1-g0",)])
    pairs = _mix_of([replace(ONE, gpus=2)])
    many = kept.open(pairs)[0].increase(ONE, [("n1-g0",)])
    assert many == open_room(_offer("n1"), pairs).increase(ONE, [("n1-g0",)]) != few


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_where_nobody_comes_next_who_weighs_one_node_chooses_as_who_weighs_all(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = [
        _offer(
            f"n{index}", *[Tenant(f"{index}.1", 1, 0, (f"n{index}-g0",), 0, False)] * (index % 2)
        )
        for index in range(9)
    ]
    needs = [Need(job_id, replace(ONE, ranks=ranks), near=("n4",)) for job_id in (1, 2)]
    plan = place(needs, busy)
    monkeypatch.setattr(placement, "WEIGHED_MAX", 1)
    assert place(needs, busy) == plan
    assert plan.starts
