"""Between orders and drivers: keys that outlive a restart, order, bounds, drivers that break."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from coordinator.capacity import actuator as actuator_module
from coordinator.capacity import journal as journal_module
from coordinator.capacity.driver import CapacityError, State
from coordinator.capacity.journal import Deed, Journal, Stage
from coordinator.capacity.simulated import Fault, Simulated, Wrong
from coordinator.core.capacity_orders import CapacityOrder, CapacityOutcome, Verb
from tests.capacity.bench import Bench, VirtualClock

NODES = tuple(f"n{number:02d}" for number in range(40))


class Rig:
    """An actuator that can be restarted: a new one over the same driver and journal."""

    def __init__(self, path: Path, driver: Simulated) -> None:
        self.path = path
        self.driver = driver
        self.bench = self.restarted()

    def restarted(self) -> Bench:
        self.bench = Bench(self.driver, NODES, self.path, VirtualClock())
        return self.bench


@pytest.fixture
async def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "capacity.jsonl", Simulated())


async def hang(rig: Rig, verb: Verb, wrong: Wrong) -> None:
    """Give k1 for n01, and end the coordinator while its driver hangs."""
    rig.driver.faults = [Fault("n01", verb, wrong)]
    rig.bench.give("k1", verb, "n01")
    await rig.bench.clock.until(partial(rig.bench.clock.are_sleeping, 1))
    await rig.bench.actuator.close()
    assert rig.bench.outcomes == []


async def test_after_a_restart_an_outcome_is_reported_again(rig: Rig) -> None:
    rig.driver.faults = [Fault("n02", Verb.RESUME, Wrong.FAIL)]
    before = await rig.bench.ordered("k1", Verb.RESUME, "n01", "n02")
    after = await rig.restarted().ordered("k1", Verb.RESUME, "n01", "n02")
    assert sorted(before, key=lambda outcome: outcome.node) == after
    assert [outcome.done for outcome in after] == [True, False]
    assert rig.driver.deeds == [("n01", Verb.RESUME)]


async def test_after_a_restart_what_was_begun_is_looked_at(rig: Rig) -> None:
    await hang(rig, Verb.RESUME, Wrong.LATE)
    (outcome,) = await rig.restarted().ordered("k1", Verb.RESUME, "n01")
    assert outcome.done
    assert rig.driver.deeds == [("n01", Verb.RESUME)]


async def test_after_a_restart_what_was_not_done_is_done(rig: Rig) -> None:
    await hang(rig, Verb.SUSPEND, Wrong.HANG)
    rig.driver.states["n01"] = State.ON
    (outcome,) = await rig.restarted().ordered("k1", Verb.SUSPEND, "n01")
    assert outcome.done
    assert rig.driver.deeds == [("n01", Verb.SUSPEND)]


async def test_after_a_restart_one_that_hangs_again_has_failed(rig: Rig) -> None:
    await hang(rig, Verb.SUSPEND, Wrong.HANG)
    rig.driver.states["n01"] = State.ON
    rig.driver.faults = [Fault("n01", Verb.SUSPEND, Wrong.HANG)]
    bench = rig.restarted()
    bench.give("k1", Verb.SUSPEND, "n01")
    await bench.clock.until(partial(bench.clock.are_sleeping, 1))
    bench.clock.pass_deadlines()
    (outcome,) = await bench.reported(1)
    assert not outcome.done
    assert rig.driver.states["n01"] is State.ON


async def test_after_a_restart_nothing_is_created_twice(rig: Rig) -> None:
    await hang(rig, Verb.CREATE, Wrong.HANG)
    bench = rig.restarted()
    (outcome,) = await bench.ordered("k1", Verb.CREATE, "n01")
    assert not outcome.done
    assert outcome.reason == "its creation was begun before a restart, and it is not there"
    assert rig.driver.deeds == [("n01", Verb.DELETE)]
    assert bench.logged("capacity.rolled_back") == [{"key": "k1", "nodes": "n01"}]


async def test_after_a_restart_a_node_that_nobody_sees_is_not_deleted(rig: Rig) -> None:
    """It may be at work, and its agent on its way back to us."""
    await hang(rig, Verb.CREATE, Wrong.LATE)
    rig.driver.states["n01"] = State.UNKNOWN
    bench = rig.restarted()
    (outcome,) = await bench.ordered("k1", Verb.CREATE, "n01")
    assert not outcome.done
    assert outcome.reason.endswith("nobody can say whether it is there")
    assert rig.driver.deeds == [("n01", Verb.CREATE)]
    (fields,) = bench.logged("capacity.not_rolled_back")
    assert fields["reason"] == outcome.reason


async def test_a_node_that_is_up_is_there_whatever_its_driver_says(rig: Rig) -> None:
    rig.driver.faults = [Fault("n01", Verb.CREATE, Wrong.LATE)]
    rig.bench.up = ["n01"]
    rig.bench.give("k1", Verb.CREATE, "n01")
    await rig.bench.clock.until(partial(rig.bench.clock.are_sleeping, 1))
    rig.bench.clock.pass_deadlines()
    assert await rig.bench.reported(1) == [CapacityOutcome("k1", "n01", True)]
    assert rig.driver.deeds == [("n01", Verb.CREATE)]


async def test_of_a_creation_that_failed_nothing_is_left(rig: Rig) -> None:
    rig.driver.faults = [Fault("n01", Verb.CREATE, Wrong.LATE)]
    rig.bench.give("k1", Verb.CREATE, "n01")
    await rig.bench.clock.until(partial(rig.bench.clock.are_sleeping, 1))
    rig.bench.clock.pass_deadlines()
    (outcome,) = await rig.bench.reported(1)
    assert not outcome.done
    assert rig.driver.states["n01"] is State.OFF


async def test_a_rollback_that_fails_is_said_loudly(rig: Rig) -> None:
    rig.driver.faults = [
        Fault("n01", Verb.CREATE, Wrong.FAIL),
        Fault("n01", Verb.DELETE, Wrong.FAIL),
    ]
    await rig.bench.ordered("k1", Verb.CREATE, "n01")
    (fields,) = rig.bench.logged("capacity.not_rolled_back")
    assert fields["nodes"] == "n01"
    assert "does not delete" in str(fields["reason"])


async def test_a_late_success_after_the_deadline_harms_nothing(rig: Rig) -> None:
    rig.driver.faults = [Fault("n01", Verb.RESUME, Wrong.LATE)]
    rig.bench.give("k1", Verb.RESUME, "n01")
    await rig.bench.clock.until(partial(rig.bench.clock.are_sleeping, 1))
    rig.bench.clock.pass_deadlines()
    (outcome,) = await rig.bench.reported(1)
    assert not outcome.done
    assert rig.driver.states["n01"] is State.ON
    (outcome,) = await rig.bench.ordered("k2", Verb.RESUME, "n01")
    assert outcome.done


async def test_orders_for_one_node_keep_their_order(rig: Rig) -> None:
    rig.bench.give("k1", Verb.RESUME, "n01")
    rig.bench.give("k2", Verb.SUSPEND, "n01")
    rig.bench.give("k3", Verb.RESUME, "n01")
    outcomes = await rig.bench.reported(3)
    assert [outcome.key for outcome in outcomes] == ["k1", "k2", "k3"]
    assert [verb for _, verb in rig.driver.deeds] == [Verb.RESUME, Verb.SUSPEND, Verb.RESUME]


async def test_an_order_waits_for_the_one_before_it_at_its_node(rig: Rig) -> None:
    rig.driver.faults = [Fault("n01", Verb.RESUME, Wrong.HANG)]
    rig.bench.give("k1", Verb.RESUME, "n01")
    rig.bench.give("k2", Verb.SUSPEND, "n01")
    (outcome,) = await rig.bench.ordered("k3", Verb.SUSPEND, "n02")
    assert (outcome.key, outcome.done) == ("k3", True)
    rig.bench.clock.pass_deadlines()
    outcomes = await rig.bench.reported(3)
    assert [(outcome.key, outcome.done) for outcome in outcomes] == [("k1", False), ("k2", True)]


@pytest.mark.parametrize("verb", Verb)
async def test_an_order_off_that_has_waited_for_too_long_is_not_begun(rig: Rig, verb: Verb) -> None:
    """The node may have taken work again; one to switch it on harms nobody."""
    rig.driver.faults = [Fault("n01", Verb.RESUME, Wrong.HANG, times=3)]
    for key in ("k1", "k2", "k3"):
        rig.bench.give(key, Verb.RESUME, "n01")
    rig.bench.give("k4", verb, "n01")
    for count in (1, 2, 3):
        await rig.bench.clock.until(partial(rig.bench.clock.are_sleeping, 1))
        rig.bench.clock.pass_deadlines()
        await rig.bench.reported(count)
    await rig.bench.reported(4)
    (outcome,) = [each for each in rig.bench.outcomes if each.key == "k4"]
    begun = verb in (Verb.RESUME, Verb.CREATE)
    assert outcome.done is begun
    assert (("n01", verb) in rig.driver.deeds) is begun
    assert outcome.reason.endswith("is not begun any more") is not begun
    assert outcome.postponed is not begun
    await rig.restarted().ordered("k4", verb, "n01")
    assert rig.driver.deeds.count(("n01", verb)) == 1, "a successor that still wants it has it"


async def test_an_order_off_that_was_begun_before_a_restart_is_not_begun_again_so_late(
    rig: Rig,
) -> None:
    await hang(rig, Verb.SUSPEND, Wrong.HANG)
    bench = rig.restarted()
    rig.driver.states["n01"] = State.ON
    rig.driver.faults = [Fault("n01", Verb.RESUME, Wrong.HANG, times=3)]
    for key in ("k2", "k3", "k4"):
        bench.give(key, Verb.RESUME, "n01")
    bench.give("k1", Verb.SUSPEND, "n01")
    for count in (1, 2, 3):
        await bench.clock.until(partial(bench.clock.are_sleeping, 1))
        bench.clock.pass_deadlines()
        await bench.reported(count)
    await bench.reported(4)
    outcome = bench.outcomes[-1]
    assert outcome.reason.endswith("s after a restart, and is not begun again")
    assert not outcome.postponed, "it may have been done"
    assert ("n01", Verb.SUSPEND) not in rig.driver.deeds


async def test_one_that_hangs_does_not_hold_up_the_others(rig: Rig) -> None:
    rig.driver.faults = [Fault("n03", Verb.RESUME, Wrong.HANG)]
    rig.bench.give("k1", Verb.RESUME, *NODES)
    outcomes = await rig.bench.reported(len(NODES) - 1)
    assert all(outcome.done for outcome in outcomes)
    rig.bench.clock.pass_deadlines()
    (outcome,) = await rig.bench.reported(len(NODES))
    assert (outcome.node, outcome.done) == ("n03", False)


async def test_no_more_than_so_many_run_at_once(rig: Rig) -> None:
    rig.driver.faults = [Fault(node, Verb.RESUME, Wrong.HANG) for node in NODES]
    rig.bench.give("k1", Verb.RESUME, *NODES)
    for before, done in ((0, 16), (16, 32), (32, 40)):
        await rig.bench.clock.until(partial(rig.bench.clock.are_sleeping, done - before))
        assert sum(fault.fired for fault in rig.driver.faults) <= done
        rig.bench.clock.pass_deadlines()
        await rig.bench.reported(done)
    assert sum(fault.fired for fault in rig.driver.faults) == len(NODES)


async def test_a_group_that_hangs_takes_no_other_ones_places(tmp_path: Path) -> None:
    driver = Simulated(faults=[Fault(node, Verb.SUSPEND, Wrong.HANG) for node in NODES])
    bench = Bench(driver, NODES, tmp_path / "journal", VirtualClock(), others=("r1",))
    bench.give("k1", Verb.SUSPEND, *NODES)
    bench.give("k2", Verb.DELETE, "r1")
    (outcome,) = await bench.reported(1)
    assert (outcome.node, outcome.done) == ("r1", True)
    await bench.actuator.close()


async def test_more_than_can_wait_are_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actuator_module, "WAITING_MAX", 1)
    rig.driver.faults = [Fault("n00", Verb.RESUME, Wrong.HANG)]
    rig.bench.give("k1", Verb.RESUME, "n00")
    (outcome,) = await rig.bench.ordered("k2", Verb.RESUME, "n01")
    assert outcome.reason == "1 node waits for a driver"
    assert outcome.postponed
    await rig.bench.actuator.close()


async def test_a_node_of_no_group_is_refused(rig: Rig) -> None:
    (outcome,) = await rig.bench.ordered("k1", Verb.RESUME, "stranger")
    assert not outcome.done
    assert outcome.reason == "no group of 'capacity' in the configuration has the node stranger"
    assert not outcome.postponed


async def test_what_cannot_be_noted_is_not_begun(rig: Rig) -> None:
    rig.path.unlink()
    rig.path.mkdir()
    (outcome,) = await rig.bench.ordered("k1", Verb.CREATE, "n01")
    assert outcome.reason == "the journal of capacity orders cannot be written: Is a directory"
    assert outcome.postponed
    assert rig.driver.deeds == []


class Broken:
    """A driver with a bug."""

    takes_lists = True

    def plan(self, order: CapacityOrder) -> list[str]:
        return []

    async def state(self, nodes: Sequence[str]) -> Mapping[str, State]:
        raise CapacityError("nothing can be seen")

    async def apply(self, order: CapacityOrder) -> None:
        raise KeyError("boot")

    async def roll_back(self, order: CapacityOrder) -> None:
        raise KeyError("boot")


async def test_a_drivers_bug_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    bench = Bench(Broken(), NODES, tmp_path / "capacity.jsonl", VirtualClock())
    outcomes = await bench.ordered("k1", Verb.CREATE, "n01", "n02")
    assert {outcome.reason for outcome in outcomes} == {
        "the driver of 'rack' broke: KeyError('boot')"
    }
    assert len(bench.logged("capacity.not_rolled_back")) == 1


async def test_one_that_gives_up_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    class Weary(Simulated):
        async def apply(self, order: CapacityOrder) -> None:
            raise asyncio.CancelledError

    bench = Bench(Weary(), NODES, tmp_path / "capacity.jsonl", VirtualClock())
    (outcome,) = await bench.ordered("k1", Verb.RESUME, "n01")
    assert outcome.reason == "the driver of 'rack' broke: it has given up"


async def test_one_that_does_not_heed_its_cancellation_is_left_behind(tmp_path: Path) -> None:
    ended = asyncio.Event()

    class Deaf(Simulated):
        async def apply(self, order: CapacityOrder) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await ended.wait()
                await super().apply(order)

    driver = Deaf()
    bench = Bench(driver, NODES, tmp_path / "capacity.jsonl", VirtualClock())
    bench.give("k1", Verb.RESUME, "n01")
    await bench.clock.until(partial(bench.clock.are_sleeping, 1))
    bench.clock.pass_deadlines()
    (outcome,) = await bench.reported(1)
    assert not outcome.done
    ended.set()
    await bench.actuator.close()
    assert bench.outcomes == [outcome]


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_goes_wrong_each_order_has_one_outcome(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every order is answered once, and what was done is said to be done."""
    monkeypatch.setattr(actuator_module, "STALE_RATIO", 10**6)  # each step is a deadline here
    chance = random.Random(seed)
    faults = [
        Fault(node, verb, chance.choice(list(Wrong)))
        for node in NODES
        for verb in (Verb.RESUME, Verb.SUSPEND)
        if chance.random() < 0.4
    ]
    driver = Simulated(faults=faults)
    bench = Bench(driver, NODES, tmp_path / "capacity.jsonl", VirtualClock())
    bench.give("up", Verb.RESUME, *NODES)
    bench.give("down", Verb.SUSPEND, *NODES)
    while len(bench.outcomes) < 2 * len(NODES):
        bench.clock.pass_deadlines()
        await asyncio.sleep(0)
    await bench.actuator.close()
    assert sum(fault.fired for fault in faults) == len(faults) > 0, f"drawn by seed {seed}"
    assert sorted((outcome.key, outcome.node) for outcome in bench.outcomes) == sorted(
        (key, node) for key in ("up", "down") for node in NODES
    )
    for outcome in bench.outcomes:
        verb = Verb.RESUME if outcome.key == "up" else Verb.SUSPEND
        if outcome.done and verb is Verb.RESUME:
            assert (outcome.node, verb) in driver.deeds


def test_a_torn_line_is_dropped_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "capacity.jsonl"
    journal = Journal(path)
    journal.open()
    journal.note([Deed("k1", "n01", Stage.BEGUN), Deed("k1", "n02", Stage.BEGUN)])
    journal.note([Deed("k1", "n01", Stage.DONE)])
    path.write_bytes(path.read_bytes() + b'{"key":"k2","node":"n')
    again = Journal(path)
    again.open()
    assert again.seen("k1", "n01") == Deed("k1", "n01", Stage.DONE)
    assert again.seen("k1", "n02") == Deed("k1", "n02", Stage.BEGUN)
    assert again.seen("k2", "n") is None
    again.note([Deed("k3", "n01", Stage.BEGUN)])
    last = Journal(path)
    last.open()
    assert last.seen("k3", "n01") is not None


def test_the_journal_is_bounded_and_forgets_the_oldest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "DEEDS_MAX", 5)
    path = tmp_path / "capacity.jsonl"
    journal = Journal(path)
    journal.open()
    for number in range(50):
        journal.note([Deed(f"k{number}", "n01", Stage.DONE)])
        assert len(path.read_bytes().splitlines()) <= 10
    assert journal.seen("k44", "n01") is None
    assert journal.seen("k45", "n01") is not None
