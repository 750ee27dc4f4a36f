"""The state machine of a prefetch slot, with every order of things that streams are free to choose.

Streams run what is queued on them one after the other and know nothing of each other, but for
events. The stand-in here has just that: queues, events, and somebody else who says which queue goes
on next. Hypothesis says it, for the ring alone; and for the real ``Prefetcher`` a policy does that
is as unkind as a long kernel: copies run as soon as they can, what reads them as late as it can.

Safety: whoever reads a batch, while it reads, finds that batch and all of it. Liveness: it ends.
Then each order is taken out of the table, one at a time, and must be missed.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from trainers import prefetch_slots
from trainers.prefetch import CudaLanes, Memory, Prefetcher
from trainers.prefetch_slots import (
    TABLE,
    Action,
    IllegalActionError,
    Order,
    Ring,
    State,
    Step,
    Table,
)

BATCHES = 6
"""Three rounds of a ring of two: what goes wrong in the first reuse, and in a later one."""

COPY, COMPUTE = "copy", "compute"
ORDERS = [order for step in TABLE.values() for order in step.orders]


@dataclass
class Streams:
    """Two queues, and events: an event is the ticket of its latest recording."""

    queues: dict[str, deque[Callable[[], None] | int]] = field(
        default_factory=lambda: {COPY: deque(), COMPUTE: deque()}
    )
    numbers: Iterator[int] = field(default_factory=itertools.count)
    tickets: dict[tuple[str, int], int] = field(default_factory=dict)
    happened: set[int] = field(default_factory=set)

    def launch(self, queue: str, work: Callable[[], None]) -> None:
        self.queues[queue].append(work)

    def record(self, queue: str, event: tuple[str, int]) -> None:
        ticket = self.tickets[event] = next(self.numbers)
        self.launch(queue, partial(self.happened.add, ticket))

    def wait(self, queue: str, event: tuple[str, int]) -> None:
        if event in self.tickets:
            self.queues[queue].append(self.tickets[event])

    def has_happened(self, event: tuple[str, int]) -> bool:
        """Or was never recorded."""
        return event not in self.tickets or self.tickets[event] in self.happened

    def can_go_on(self, queue: str) -> bool:
        waiting = self.queues[queue]
        if not waiting:
            return False
        return callable(waiting[0]) or waiting[0] in self.happened

    def go_on(self, queue: str) -> None:
        item = self.queues[queue].popleft()
        if callable(item):
            item()

    def carry_out(self, order: Order, slot: int, copy: Sequence[Callable[[], None]]) -> None:
        """All but HOST_AFTER_READY, which is the host's."""
        match order:
            case Order.COPY_AFTER_FREE:
                self.wait(COPY, ("free", slot))
            case Order.COPY_BATCH:
                for part in copy:
                    self.launch(COPY, part)
            case Order.RECORD_READY:
                self.record(COPY, ("ready", slot))
            case Order.COMPUTE_AFTER_READY:
                self.wait(COMPUTE, ("ready", slot))
            case Order.RECORD_FREE:
                self.record(COMPUTE, ("free", slot))


Condition = Callable[[], bool]


def at_once() -> bool:
    return True


@dataclass
class Machine:
    """Ring, streams, and memory whose halves are written and read one after the other."""

    ring: Ring
    streams: Streams = field(default_factory=Streams)
    read: list[tuple[int, int | None]] = field(default_factory=list)  # (expected, found)

    def __post_init__(self) -> None:
        self.host: list[list[int | None]] = [[None, None] for _ in range(self.ring.depth)]
        self.device: list[list[int | None]] = [[None, None] for _ in range(self.ring.depth)]

    def act(self, slot: int, action: Action) -> Iterator[Condition]:
        for order in self.ring.orders(slot, action):
            if order is Order.HOST_AFTER_READY:
                yield partial(self.streams.has_happened, ("ready", slot))
            else:
                parts = [partial(self.carry, slot, half) for half in (0, 1)]
                self.streams.carry_out(order, slot, parts)
                yield at_once
        self.ring.settle(slot, action)
        yield at_once

    def carry(self, slot: int, half: int) -> None:
        self.device[slot][half] = self.host[slot][half]

    def feeder(self) -> Iterator[Condition]:
        for index in range(BATCHES):
            slot = index % self.ring.depth
            yield partial(self.ring.allows, slot, Action.FILL)
            yield from self.act(slot, Action.FILL)
            for half in (0, 1):
                self.host[slot][half] = index
                yield at_once
            for action in (Action.STAGE, Action.COPY, Action.HAND_OVER):
                yield from self.act(slot, action)

    def consumer(self) -> Iterator[Condition]:
        for index in range(BATCHES):
            slot = index % self.ring.depth
            if index:
                yield from self.act((index - 1) % self.ring.depth, Action.GIVE_BACK)
            yield partial(self.ring.allows, slot, Action.TAKE)
            yield from self.act(slot, Action.TAKE)
            for half in (0, 1):
                self.streams.launch(COMPUTE, partial(self.look, index, slot, half))
                yield at_once

    def look(self, index: int, slot: int, half: int) -> None:
        self.read.append((index, self.device[slot][half]))


def run(machine: Machine, choose: Callable[[int], int]) -> None:
    """Everybody goes on, one step at a time, in the order that ``choose(count)`` chooses."""
    hosts = [machine.feeder(), machine.consumer()]
    conditions: list[Condition | None] = [next(host) for host in hosts]
    while True:
        moves: list[Callable[[], None]] = []

        def step(number: int) -> None:
            conditions[number] = next(hosts[number], None)

        for number, condition in enumerate(conditions):
            if condition is not None and condition():
                moves.append(partial(step, number))
        for queue in (COPY, COMPUTE):
            if machine.streams.can_go_on(queue):
                moves.append(partial(machine.streams.go_on, queue))
        if not moves:
            break
        moves[choose(len(moves))]()
    assert conditions == [None, None], "nobody can go on, and batches are missing"
    assert not any(machine.streams.queues.values()), "a stream waits for ever"
    assert [index for index, _ in machine.read] == [i for i in range(BATCHES) for _ in (0, 1)]
    wrong = [(index, found) for index, found in machine.read if index != found]
    assert not wrong, f"read (expected, found): {wrong}"


def without(removed: Order) -> Table:
    return {
        key: Step(step.state, tuple(order for order in step.orders if order is not removed))
        for key, step in TABLE.items()
    }


def explore(table: Table, *, examples: int, shrink: bool) -> None:
    """Raises the AssertionError of a run that goes wrong."""
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(1, 3), st.data())
    def explored(depth: int, data: st.DataObject) -> None:
        run(
            Machine(Ring(depth, table)),
            lambda count: data.draw(st.integers(0, count - 1)) if count > 1 else 0,
        )

    explored()


def test_every_order_of_things_is_right() -> None:
    explore(TABLE, examples=150, shrink=True)


@pytest.mark.parametrize("removed", ORDERS, ids=lambda order: order.name.lower())
def test_each_order_is_needed(removed: Order) -> None:
    with pytest.raises(AssertionError, match=r"read \(expected, found\)"):
        explore(without(removed), examples=400, shrink=False)


def test_each_order_stands_in_the_table_once() -> None:
    assert sorted(ORDERS, key=lambda order: order.name) == sorted(
        Order, key=lambda order: order.name
    )


def test_what_the_table_does_not_hold_is_refused() -> None:
    ring = Ring(2, TABLE)
    for state in State:
        reached = [key for key in TABLE if key[0] is state]
        assert len(reached) == 1, "one way on from each state"
    for action in set(Action) - {Action.FILL}:
        with pytest.raises(IllegalActionError, match="slot 0: it is free"):
            ring.orders(0, action)
        with pytest.raises(IllegalActionError):
            ring.settle(0, action)
    assert ring.allows(0, Action.FILL), "still free"


class SlowLanes:
    """The stand-in streams under the real ``Prefetcher``. Copies run as soon as they can; the
    consumer's work runs when somebody cannot do without it, as if behind a long kernel."""

    def __init__(self) -> None:
        self.streams = Streams()
        self.lock = threading.Lock()
        self.retired = False

    def allocate(self, size_bytes: int) -> Memory:
        return Memory(
            torch.empty(size_bytes, dtype=torch.uint8), torch.empty(size_bytes, dtype=torch.uint8)
        )

    def carry_out(self, order: Order, slot: int, memory: Memory, used_bytes: int) -> None:
        with self.lock:
            if order is Order.HOST_AFTER_READY:
                self.drive(lambda: self.streams.has_happened(("ready", slot)))
                return
            self.streams.carry_out(order, slot, [partial(_copy, memory)])
            self.drive(at_once)

    def launch(self, work: Callable[[], None]) -> None:
        with self.lock:
            self.streams.launch(COMPUTE, work)

    def drive(self, enough: Condition) -> None:
        """Run what a kind machine would: copies, and other work only until it is enough."""
        while True:
            if self.streams.can_go_on(COPY):
                self.streams.go_on(COPY)
            elif enough():
                return
            else:
                assert self.streams.can_go_on(COMPUTE)
                self.streams.go_on(COMPUTE)

    def retire(self, memories: Sequence[Memory]) -> None:
        with self.lock:
            self.drive(lambda: not any(self.streams.queues.values()))
            self.retired = True


def _copy(memory: Memory) -> None:
    memory.device.copy_(memory.host)


def fetched_wrong(monkeypatch: pytest.MonkeyPatch, depth: int) -> list[tuple[int, float]]:
    """(index, what stood there) of each batch that was not its own when it was read."""
    lanes = SlowLanes()
    monkeypatch.setattr(Prefetcher, "_open_lanes", lambda _: lanes)
    handed_over = [threading.Event() for _ in range(BATCHES + depth + 1)]
    wrong: list[tuple[int, float]] = []

    def make(index: int) -> torch.Tensor:
        handed_over[index].set()  # the batch before this one is in its slot
        return torch.full((5,), float(index))

    def look(index: int, batch: torch.Tensor) -> None:
        wrong.extend((index, value) for value in batch.tolist() if value != index)

    with Prefetcher(make, device=torch.device("cpu"), depth=depth) as batches:
        for index in range(BATCHES):
            batch = batches.next().batch
            lanes.launch(partial(look, index, batch))
            # The feeder gets as far as it can, so the streams alone decide what is overwritten.
            assert handed_over[index + depth].wait(30)
    assert lanes.retired
    return wrong


@pytest.mark.parametrize("depth", [2, 3])
def test_a_prefetcher_over_slow_streams(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    assert fetched_wrong(monkeypatch, depth) == []


@pytest.mark.parametrize(
    "removed", [Order.COPY_AFTER_FREE, Order.RECORD_FREE], ids=["no wait", "no record"]
)
def test_a_prefetcher_without_the_free_edge_overwrites_what_is_read(
    monkeypatch: pytest.MonkeyPatch, removed: Order
) -> None:
    monkeypatch.setattr(prefetch_slots, "TABLE", without(removed))
    assert fetched_wrong(monkeypatch, 2) != []


class LoggedStream:
    """Says what it is asked to do."""

    device = torch.device("cpu")

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def wait_event(self, event: "LoggedEvent") -> None:
        self.log.append(f"{self.name} waits for {event.name}")


class LoggedEvent:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def record(self, stream: LoggedStream) -> None:
        self.log.append(f"{self.name} on {stream.name}")

    def synchronize(self) -> None:
        self.log.append(f"the host waits for {self.name}")


def test_the_orders_go_to_the_streams_and_events_that_they_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two lives of a slot on the CUDA lanes, with streams that only say what they were told."""
    log: list[str] = []
    copy, compute = LoggedStream(COPY, log), LoggedStream(COMPUTE, log)
    names = iter(["ready 0", "ready 1", "free 0", "free 1"])
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: copy)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_options: LoggedEvent(next(names), log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: compute)

    @contextmanager
    def entered(stream: LoggedStream) -> Iterator[None]:
        log.append(f"on {stream.name}:")
        yield

    monkeypatch.setattr(torch.cuda, "stream", entered)
    lanes = CudaLanes(torch.device("cuda"), 2)
    ring = Ring(2, TABLE)
    memory = Memory(torch.arange(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8))
    for _ in range(2):
        for action in Action:
            for order in ring.orders(1, action):
                lanes.carry_out(order, 1, memory, 5)
            ring.settle(1, action)
    once = ["on copy:", "ready 1 on copy", "compute waits for ready 1", "free 1 on compute"]
    assert log == [*once, "the host waits for ready 1", "copy waits for free 1", *once]
    assert memory.device.tolist() == [0, 1, 2, 3, 4, 0, 0, 0], "what is used is copied"
