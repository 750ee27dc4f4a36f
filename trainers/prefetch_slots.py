"""The life of a prefetch slot, as a table: which state follows which, and what must be ordered.

Problem: a slot is memory that several parties use in turn, and none of them sees the others. The
feeder writes host memory; the copy stream carries it to the device; the compute stream reads it
there; the host queues work long before any of it runs. The order of the *calls* therefore says
nothing about the order of the *work*, and a prefetcher that looks right by its calls hands out
batches that are overwritten while they are read. It happens to good people:
huggingface/pytorch-image-models #2784 had to make the prefetch stream wait for the consumer's
before a batch's storage was written again, and meta-pytorch/torchrec #4191 describes two streams
that raced on one cache until one waited for the other. ``Tensor.record_stream`` does not order a
slot's reuse: by its documentation it holds back memory that is *deallocated*, and a slot never is.

So every state change here names the orders that must be carried out for it, first the orders and
then the change. The orders are data, so a test can take one out and show what breaks. Two of them
are the edges of a slot: *ready*, from the copy stream to the compute stream, and *free*, from the
compute stream back. Both are events; to wait for an event means to wait for its latest recording at
the time of the call, and a wait for an event that was never recorded waits for nothing (CUDA driver
API, cuEventRecord). That is why a slot can be filled again only once its *free* is recorded.

Nothing here knows torch, threads or clocks; ``trainers.prefetch`` carries out the orders.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """Where a slot is in its life."""

    FREE = "free"
    """Never used."""
    FILLING = "filling"
    """The feeder writes its host memory."""
    STAGED = "staged"
    """The host memory holds a whole batch."""
    COPYING = "copying"
    """The copy to the device is queued."""
    READY = "ready"
    """*Ready* is recorded behind the copy: it can be handed out."""
    IN_USE = "in use"
    """The compute stream waits for *ready*; the consumer queues work that reads it."""
    RETURNED = "returned"
    """*Free* is recorded behind that work: it can be filled again."""


class Action(Enum):
    """What the feeder (the first four) and the consumer (the last two) do to a slot."""

    FILL = "fill"
    STAGE = "stage"
    COPY = "copy"
    HAND_OVER = "hand over"
    TAKE = "take"
    GIVE_BACK = "give back"


class Order(Enum):
    """What a state change asks of the streams. Without streams each of them is nothing to do."""

    HOST_AFTER_READY = "the feeder waits until ready has happened: the host memory was read"
    COPY_AFTER_FREE = "the copy stream waits for free: the device memory was read"
    COPY_BATCH = "the copy stream copies host memory to device memory"
    RECORD_READY = "ready is recorded on the copy stream"
    COMPUTE_AFTER_READY = "the compute stream waits for ready"
    RECORD_FREE = "free is recorded on the compute stream"


@dataclass(frozen=True, slots=True)
class Step:
    """The state that follows, and what is carried out before anybody may see it."""

    state: State
    orders: tuple[Order, ...] = ()


Table = Mapping[tuple[State, Action], Step]

TABLE: Table = {
    (State.FREE, Action.FILL): Step(State.FILLING),
    # Both memories of the slot are about to be used again, so both waits stand here; a slot that
    # grows drops its memory behind them.
    (State.RETURNED, Action.FILL): Step(
        State.FILLING, (Order.HOST_AFTER_READY, Order.COPY_AFTER_FREE)
    ),
    (State.FILLING, Action.STAGE): Step(State.STAGED),
    (State.STAGED, Action.COPY): Step(State.COPYING, (Order.COPY_BATCH,)),
    (State.COPYING, Action.HAND_OVER): Step(State.READY, (Order.RECORD_READY,)),
    (State.READY, Action.TAKE): Step(State.IN_USE, (Order.COMPUTE_AFTER_READY,)),
    (State.IN_USE, Action.GIVE_BACK): Step(State.RETURNED, (Order.RECORD_FREE,)),
}


class IllegalActionError(Exception):
    """A bug: nobody may do this to a slot in this state."""


class Ring:
    """The slots, used in turn. Of the two sides, each action has one; so a slot's state is
    changed by one thread at a time, and reading it needs no lock."""

    def __init__(self, depth: int, table: Table) -> None:
        self.depth = depth
        self._table = table
        self._states = [State.FREE] * depth

    def allows(self, slot: int, action: Action) -> bool:
        """Is this action legal now?"""
        return (self._states[slot], action) in self._table

    def orders(self, slot: int, action: Action) -> tuple[Order, ...]:
        """What to carry out before ``settle``. Raises IllegalActionError."""
        return self._step(slot, action).orders

    def settle(self, slot: int, action: Action) -> None:
        """The orders are carried out: the other side may see the new state."""
        self._states[slot] = self._step(slot, action).state

    def _step(self, slot: int, action: Action) -> Step:
        state = self._states[slot]
        if (state, action) not in self._table:
            raise IllegalActionError(f"cannot {action.value} slot {slot}: it is {state.value}")
        return self._table[state, action]
