"""One suite for every driver: what it may do, and what becomes of an order when it does wrong."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from coordinator.capacity.driver import CapacityError, State, verify
from coordinator.core.capacity_orders import CapacityOrder, Verb
from tests.capacity.bench import Bench, VirtualClock
from tests.capacity.emulator import serving
from tests.capacity.worlds import (
    NODES,
    BurstWorld,
    IpmiWorld,
    ProgramsWorld,
    RedfishWorld,
    SimulatedWorld,
    WakeWorld,
    World,
)

SETTLED_MS = 60_000  # no emulated machine takes longer to be as it was told

Make = Callable[[Path, VirtualClock], AbstractContextManager[World]]


@contextmanager
def simulated(folder: Path, clock: VirtualClock) -> Iterator[World]:
    yield SimulatedWorld()


@contextmanager
def programs(folder: Path, clock: VirtualClock) -> Iterator[World]:
    yield ProgramsWorld(folder, can_see=True)


@contextmanager
def blind_programs(folder: Path, clock: VirtualClock) -> Iterator[World]:
    yield ProgramsWorld(folder, can_see=False)


@contextmanager
def burst(folder: Path, clock: VirtualClock) -> Iterator[World]:
    yield BurstWorld(folder)


@contextmanager
def ipmi(folder: Path, clock: VirtualClock) -> Iterator[World]:
    yield IpmiWorld(folder, clock)


@contextmanager
def wake(folder: Path, clock: VirtualClock) -> Iterator[World]:
    made = WakeWorld(folder)
    yield made
    made.close()


@contextmanager
def redfish(folder: Path, clock: VirtualClock) -> Iterator[World]:
    with serving(folder, NODES, clock.now_s) as service:
        yield RedfishWorld(folder, service, clock)


@contextmanager
def redfish_sessions(folder: Path, clock: VirtualClock) -> Iterator[World]:
    with serving(folder, NODES, clock.now_s, has_sessions=True) as service:
        yield RedfishWorld(folder, service, clock)
        assert service.sessions == 0 or service.wrong == "hang"


WORLDS: list[Make] = [
    simulated,
    programs,
    blind_programs,
    burst,
    ipmi,
    wake,
    redfish,
    redfish_sessions,
]


@pytest.fixture
async def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture(params=WORLDS, ids=lambda make: make.__name__)
def world(request: pytest.FixtureRequest, tmp_path: Path, clock: VirtualClock) -> Iterator[World]:
    folder = tmp_path / "world"
    folder.mkdir()
    with request.param(folder, clock) as made:
        yield made


@pytest.fixture
async def bench(world: World, tmp_path: Path, clock: VirtualClock) -> AsyncIterator[Bench]:
    made = Bench(world.driver, world.nodes, tmp_path / "capacity.jsonl", clock)
    yield made
    await made.actuator.close()


def pieces(world: World) -> int:
    """How many calls of the driver an order for all nodes takes."""
    return 1 if world.driver.takes_lists else len(world.nodes)


async def test_nodes_go_on_and_off(world: World, bench: Bench) -> None:
    outcomes = await bench.ordered("k1", world.up, *world.nodes)
    assert sorted((outcome.node, outcome.done) for outcome in outcomes) == [
        (node, True) for node in world.nodes
    ]
    assert all(world.is_on(node) for node in world.nodes)
    outcomes = await bench.ordered("k2", world.down, *world.nodes)
    assert all(outcome.done and not outcome.reason for outcome in outcomes)
    assert not any(world.is_on(node) for node in world.nodes)
    assert len(bench.logged("capacity.ordered")) == 2 * pieces(world)


async def test_states_are_seen(world: World, bench: Bench) -> None:
    node = world.nodes[0]
    await bench.ordered("k1", world.up, node)
    seen = await world.driver.state(world.nodes)
    if world.can_see:
        assert [seen[name] for name in world.nodes] == [State.ON, State.OFF]
    else:
        assert set(seen.values()) == {State.UNKNOWN}


async def test_one_key_is_one_deed(world: World, bench: Bench) -> None:
    node = world.nodes[0]
    bench.give("k1", world.up, node)
    bench.give("k1", world.up, node)
    (first,) = await bench.reported(1)
    (again,) = await bench.ordered("k1", world.up, node)
    assert first == again
    assert world.deeds() == 1


async def test_a_deed_that_is_done_twice_does_no_harm(world: World, clock: VirtualClock) -> None:
    order = CapacityOrder("k1", world.up, world.nodes[:1])
    await world.driver.apply(order)
    await clock.sleep_ms(SETTLED_MS)
    await world.driver.apply(order)
    await clock.sleep_ms(SETTLED_MS)
    assert world.is_on(world.nodes[0])
    assert await verify(world.driver, order) == {world.nodes[0]: ""}


async def test_one_that_hangs_is_abandoned_at_its_deadline(world: World, bench: Bench) -> None:
    node = world.nodes[0]
    await bench.ordered("k0", opposite(world), node)
    world.go_wrong("hang")
    bench.give("k1", world.faulty, node)
    await bench.clock.until(lambda: bench.clock.are_sleeping(1))
    bench.clock.pass_deadlines()
    if world.faulty is Verb.CREATE:  # its rollback hangs as well
        await bench.clock.until(lambda: bench.clock.are_sleeping(1))
        bench.clock.pass_deadlines()
    (outcome,) = await bench.reported(2)
    assert not outcome.done
    assert outcome.reason == "the driver of 'rack' was not done within 600 s"
    world.go_wrong("")
    (outcome,) = await bench.ordered("k2", world.faulty, node)
    assert outcome.done
    assert world.is_on(node) is (world.faulty is world.up)


async def test_one_that_lies_is_found_out_where_it_can_be_seen(world: World, bench: Bench) -> None:
    node = world.nodes[0]
    world.go_wrong("lie")
    bench.give("k1", world.faulty, node)
    if world.can_see:
        await bench.clock.until(lambda: bench.clock.slept >= 3)
        world.go_wrong("")
        bench.clock.pass_deadlines()
    (outcome,) = await bench.reported(1)
    assert outcome.done is not world.can_see
    if world.can_see:
        assert outcome.reason == f"{node} is off, although its driver has done what makes it on"


async def test_one_that_fails_says_why(world: World, bench: Bench) -> None:
    node = world.nodes[0]
    await bench.ordered("k0", opposite(world), node)
    world.go_wrong("fail")
    (outcome,) = await bench.ordered("k1", world.faulty, node)
    assert not outcome.done
    assert outcome.reason
    assert bench.logged("capacity.failed")[0]["reason"] == outcome.reason
    (again,) = await bench.ordered("k1", world.faulty, node)
    assert again == outcome


def opposite(world: World) -> Verb:
    """Of the verb that can go wrong, so that there is something to do for it."""
    return world.down if world.faulty is world.up else world.up


async def test_what_was_done_is_rolled_back(world: World, clock: VirtualClock) -> None:
    order = CapacityOrder("k1", world.up, world.nodes[:1])
    await world.driver.apply(order)
    await clock.sleep_ms(SETTLED_MS)
    assert world.is_on(world.nodes[0])
    await world.driver.roll_back(order)
    assert not world.is_on(world.nodes[0])


async def test_a_plan_names_the_node_and_does_nothing(world: World) -> None:
    for verb in (world.up, world.down):
        (sentence,) = world.driver.plan(CapacityOrder("k1", verb, world.nodes[:1]))
        assert world.nodes[0] in sentence
    assert world.deeds() == 0


async def test_verbs_of_others_are_refused(world: World) -> None:
    for verb in Verb:
        order = CapacityOrder("k1", verb, world.nodes[:1])
        if not knows(world, order):
            with pytest.raises(CapacityError, match=f"does not {verb.value} nodes"):
                await world.driver.apply(order)
    assert world.deeds() == 0


def knows(world: World, order: CapacityOrder) -> bool:
    try:
        world.driver.plan(order)
    except CapacityError:
        assert order.verb not in (world.up, world.down)
        return False
    return True
