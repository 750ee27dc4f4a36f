"""Batches that are on the device before the training asks for them.

Problem: between two steps a naive loop decodes, collates and copies while the GPU has nothing to
do. Moving that to a second stream is easy to write and easy to write wrong: see
``trainers.prefetch_slots``, which holds the state machine of a slot and what it must order.

How: a *feeder* thread makes batch after batch and puts each into the next slot of a small ring. A
slot is two flat pieces of memory, pinned on the host and on the device, allocated once and reused;
all tensors of a batch are packed into them, so a batch of any nesting is **one** copy. (Issuing a
copy for each of hundreds of tensors keeps a CPU busy for longer than the copies take, see
meta-pytorch/torchrec #3780.) The copy runs on a stream of its own. The compute stream waits for it
by an event, and before a slot's memory is used again the copy stream waits for the compute stream
by another one. The training thread itself takes a batch out of the ring and does nothing else.

On a CPU the same code runs without streams: host and device memory of a slot are then one, and one
``memcpy`` into it is all that is copied. Slots are reused there as well, so a consumer that keeps a
batch for too long is wrong everywhere and not only where it is hard to find. Autograd helps: the
tensors of a batch share the slot's memory, and ``backward`` through a graph that saved one refuses
to run when the slot has been filled again in between.

Deadlines and dead ends. ``next`` waits as long as ``make`` takes. ``close`` waits ``CLOSE_WAIT_S``
for the feeder and no longer: a ``make`` that never returns cannot be ended from outside, so its
thread, a daemon, is left behind with a RuntimeWarning, and whatever it returns later is dropped.
"""

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from trainers import prefetch_slots
from trainers.prefetch_slots import Action, Order, Ring

DEPTH_MAX = 16
"""More slots hide no jitter that 16 do not, and each costs pinned memory and GPU memory."""

ALIGNMENT_BYTES = 256
"""Of each tensor in a slot: what CUDA's own allocations have at least (CUDA C++ Programming Guide,
Device Memory Accesses), so that kernels vectorize as they do for a tensor of its own."""

GROWTH_RATIO = 1.25
"""A slot grows to this much more than was asked, so that batches which creep up cost a handful of
allocations and not one each."""

CLOSE_WAIT_S = 5.0
"""For the feeder to finish the batch it is at. Decoding one takes well under a second; a hung
file server may take forever, and a trainer that was asked to stop has a grace to keep."""

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Fetched:
    """A batch, valid until ``Prefetcher`` is asked for the next one or closed: then its memory is
    used again."""

    batch: Any
    """The nesting of the host batch, tensors on the device."""

    input_wait_s: float
    """How long the training thread waited for it, in seconds of the host's clock; 0.0 when it was
    there. On CUDA a batch is there when its copy is queued: the GPU may still wait for the copy."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A slot's: flat bytes on the host and on the device, of the same length; on a CPU one."""

    host: torch.Tensor
    device: torch.Tensor


class Lanes(Protocol):
    """The streams of one ring, or what stands for them."""

    def allocate(self, size_bytes: int) -> Memory:
        """Memory for a slot. Called by the feeder."""
        ...

    def carry_out(self, order: Order, slot: int, memory: Memory, used_bytes: int) -> None:
        """Do, queue or await what the order says; ``used_bytes`` of the memory hold a batch."""
        ...

    def retire(self, memories: Sequence[Memory]) -> None:
        """The ring is closed; the consumer's stream may still be reading. Called by it."""
        ...


class Prefetcher:
    """Hands out ``make(first)``, ``make(first + 1)``, ... up to ``stop`` (not included; None: for
    ever), with the tensors on ``device``, cpu or cuda, and up to ``depth`` batches ahead.

    ``make`` returns any nesting of dicts, lists and tuples with dense CPU tensors; other leaves
    come through as they are, and a Mapping that is not a dict arrives as a dict. It runs on a
    thread of its own, one call at a time, in the order of the indices, and at most ``depth + 1``
    of them ahead of the consumer. It must depend on the index alone: in particular it draws nothing
    from the global random generators, which belong to the training thread. And it shares the
    interpreter with that thread, so what is heavy in it should be done outside of the interpreter's
    lock: by tensor operations, by a decoder in C, or by processes that it asks.

    Use it from one thread, with that thread's current CUDA stream as the stream that reads the
    batches. ``on_grow`` gets a sentence, on the feeder's thread, each time that a batch is larger
    than the slots. Raises ValueError for a device or depth (1 to DEPTH_MAX) that cannot be.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        *,
        device: torch.device,
        depth: int = 2,
        first: int = 0,
        stop: int | None = None,
        on_grow: Callable[[str], None] | None = None,
    ) -> None:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"batches go to a cpu or cuda device, not to {device}")
        if not 1 <= depth <= DEPTH_MAX:
            raise ValueError(f"a depth of {depth} is not between 1 and {DEPTH_MAX}")
        self.input_wait_s_total = 0.0
        self._make = make
        self._device = device
        self._first = first
        self._stop = stop
        self._on_grow = on_grow
        self._ring = Ring(depth, prefetch_slots.TABLE)
        self._memories: list[Memory] = []  # one a slot, from the first batch on
        self._slot_bytes = 0  # what each slot has, or gets before it is filled again
        self._used_bytes = [0] * depth
        self._batches: list[Any] = [None] * depth
        self._taken = 0  # batches that the consumer got
        self._in_use: int | None = None
        self._end: _End | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._lanes: Lanes
        self._feeder: threading.Thread | None = None

    def open(self) -> None:
        """Start making batches. Raises RuntimeError when it was opened before."""
        if self._feeder is not None or self._closing:
            raise RuntimeError("a prefetcher is opened once")
        self._lanes = self._open_lanes()
        self._feeder = threading.Thread(target=self._feed, name="baton-prefetch", daemon=True)
        self._feeder.start()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self) -> Fetched:
        """The next batch, in the order of the indices; the one before is given back.

        Raises StopIteration after the last one; what ``make`` raised, with its own traceback, at
        the index where it did, and again on every later call; RuntimeError when not open.
        """
        if self._feeder is None:
            raise RuntimeError("the prefetcher is not open")
        self._give_back()
        slot = self._taken % self._ring.depth
        waited_s = self._await_input(slot)
        self.input_wait_s_total += waited_s
        if self._closing:
            raise RuntimeError("the prefetcher is closed")
        if not self._ring.allows(slot, Action.TAKE):
            assert self._end is not None
            raise self._end.error or StopIteration
        self._advance(slot, Action.TAKE)
        batch, self._batches[slot] = self._batches[slot], None
        self._in_use = slot
        self._taken += 1
        return Fetched(batch, waited_s)

    def close(self) -> None:
        """Stop making batches and let go of the slots. Waits CLOSE_WAIT_S for a batch in the making
        and warns (RuntimeWarning) when that was not enough. Closing again does nothing."""
        with self._changed:
            already, self._closing = self._closing, True
            self._changed.notify_all()
        if already or self._feeder is None:
            return
        self._feeder.join(CLOSE_WAIT_S)
        self._give_back()
        self._lanes.retire(self._memories)
        if self._feeder.is_alive():
            warnings.warn(
                f"the batch in the making did not come in {CLOSE_WAIT_S:g} s; its thread is left",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._memories.clear()
        self._batches.clear()

    def _open_lanes(self) -> Lanes:
        if self._device.type == "cpu":
            return HostLanes()
        return CudaLanes(self._device, self._ring.depth)

    def _await_input(self, slot: int) -> float:
        """Seconds until there is a batch in the slot, or never will be."""

        def settled() -> bool:
            if self._closing or self._ring.allows(slot, Action.TAKE):
                return True
            return self._end is not None and self._end.made == self._taken

        with self._changed:
            if settled():
                return 0.0
            began_s = time.perf_counter()
            self._changed.wait_for(settled)
            return time.perf_counter() - began_s

    def _give_back(self) -> None:
        if self._in_use is not None:
            slot, self._in_use = self._in_use, None
            self._advance(slot, Action.GIVE_BACK)

    def _advance(self, slot: int, action: Action) -> None:
        for order in self._ring.orders(slot, action):
            self._lanes.carry_out(order, slot, self._memories[slot], self._used_bytes[slot])
        self._ring.settle(slot, action)
        with self._changed:
            self._changed.notify_all()

    # What follows runs on the feeder's thread.

    def _feed(self) -> None:
        made = 0
        error: BaseException | None = None
        try:
            while self._stop is None or self._first + made < self._stop:
                if not self._feed_one(made):
                    break
                made += 1
        except BaseException as raised:  # the user's: it is raised where the user waits
            error = raised
        with self._changed:
            self._end = _End(made, error)
            self._changed.notify_all()

    def _feed_one(self, number: int) -> bool:
        """Make a batch and put it into its slot. False: the ring is closing."""
        slot = number % self._ring.depth
        index = self._first + number
        tensors: list[torch.Tensor] = []
        skeleton = map_nested(self._made(index), lambda leaf: _lift(leaf, tensors))
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._ring.allows(slot, Action.FILL),
            )
        if self._closing:
            return False
        places, needed_bytes = lay_out(tensors)
        self._advance(slot, Action.FILL)
        self._make_room(slot, index, needed_bytes)
        memory = self._memories[slot]
        with torch.no_grad():
            for tensor, place in zip(tensors, places, strict=True):
                place.view_of(memory.host).copy_(tensor)
        self._used_bytes[slot] = needed_bytes
        self._advance(slot, Action.STAGE)
        self._advance(slot, Action.COPY)
        self._batches[slot] = map_nested(skeleton, lambda leaf: _lower(leaf, places, memory.device))
        self._advance(slot, Action.HAND_OVER)
        return True

    def _made(self, index: int) -> Any:
        try:
            return self._make(index)
        except StopIteration as error:
            # It would end the training as if there were no more data (PEP 479 is about the same).
            raise RuntimeError(f"making batch {index} raised StopIteration") from error

    def _make_room(self, slot: int, index: int, needed_bytes: int) -> None:
        if not self._memories:
            self._slot_bytes = needed_bytes
            self._memories.extend(
                self._lanes.allocate(needed_bytes) for _ in range(self._ring.depth)
            )
        elif needed_bytes > self._slot_bytes:
            before_bytes, self._slot_bytes = self._slot_bytes, int(needed_bytes * GROWTH_RATIO)
            if self._on_grow is not None:
                self._on_grow(
                    f"batch {index} needs {needed_bytes / MIB:.2f} MiB: the {self._ring.depth}"
                    f" prefetch slots grow from {before_bytes / MIB:.2f} to"
                    f" {self._slot_bytes / MIB:.2f} MiB"
                )
        if self._memories[slot].host.numel() < self._slot_bytes:
            self._memories[slot] = self._lanes.allocate(self._slot_bytes)


class HostLanes:
    """No streams: work is done when it is called, so nothing is left to order."""

    def allocate(self, size_bytes: int) -> Memory:
        both = torch.empty(size_bytes, dtype=torch.uint8)
        return Memory(both, both)

    def carry_out(self, order: Order, slot: int, memory: Memory, used_bytes: int) -> None:
        pass  # no copy either: the batch was written where it is read

    def retire(self, memories: Sequence[Memory]) -> None:
        pass  # who still reads, holds a reference


class CudaLanes:
    """A copy stream, and two events for each slot. The compute stream is the current one of the
    thread that calls."""

    def __init__(self, device: torch.device, depth: int) -> None:
        self._copy = torch.cuda.Stream(device)
        self._device = self._copy.device
        # blocking: the feeder sleeps while it waits for *ready*, and leaves the core to others.
        self._ready = [torch.cuda.Event(blocking=True) for _ in range(depth)]
        self._free = [torch.cuda.Event() for _ in range(depth)]

    def allocate(self, size_bytes: int) -> Memory:
        # On the copy stream, so the allocator thinks of it as that stream's: memory that is dropped
        # when a slot grows is used again behind that stream's wait for *free*.
        with torch.cuda.stream(self._copy):
            return Memory(
                torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True),
                torch.empty(size_bytes, dtype=torch.uint8, device=self._device),
            )

    def carry_out(self, order: Order, slot: int, memory: Memory, used_bytes: int) -> None:
        match order:
            case Order.HOST_AFTER_READY:
                self._ready[slot].synchronize()
            case Order.COPY_AFTER_FREE:
                self._copy.wait_event(self._free[slot])
            case Order.COPY_BATCH:
                with torch.cuda.stream(self._copy):
                    target, source = memory.device[:used_bytes], memory.host[:used_bytes]
                    target.copy_(source, non_blocking=True)
            case Order.RECORD_READY:
                self._ready[slot].record(self._copy)
            case Order.COMPUTE_AFTER_READY:
                torch.cuda.current_stream(self._device).wait_event(self._ready[slot])
            case Order.RECORD_FREE:
                self._free[slot].record(torch.cuda.current_stream(self._device))

    def retire(self, memories: Sequence[Memory]) -> None:
        # Deallocation is what record_stream is for: the memory goes back to the allocator when the
        # consumer's last reference is gone, and is used again when its stream is past that point.
        for memory in memories:
            memory.device.record_stream(torch.cuda.current_stream(self._device))


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a slot a tensor lies, and how."""

    offset_bytes: int
    size_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements: channels-last stays channels-last

    def view_of(self, memory: torch.Tensor) -> torch.Tensor:
        flat = memory[self.offset_bytes : self.offset_bytes + self.size_bytes].view(self.dtype)
        # Detached: a tensor of its own for autograd (one may write into it), that still counts
        # writes together with the slot.
        return flat.as_strided(self.shape, self.strides).detach()


def lay_out(tensors: Sequence[torch.Tensor]) -> tuple[list[Place], int]:
    """A place for each tensor, one behind the other, and the bytes that all of them need. Raises
    TypeError for what cannot be packed: a tensor that is sparse, or is not on the CPU."""
    places = []
    end_bytes = 0
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise TypeError(
                "a batch is made of dense CPU tensors, and this one has a tensor with layout"
                f" {tensor.layout} on {tensor.device}"
            )
        # What torch itself would give a copy: the same order of dimensions, without gaps.
        strides = torch.empty_like(tensor, device="meta").stride()
        size_bytes = tensor.numel() * tensor.element_size()
        places.append(Place(end_bytes, size_bytes, tensor.dtype, tuple(tensor.shape), strides))
        end_bytes += -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return places, end_bytes


def map_nested(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same nesting of dicts, lists and tuples (named ones too) with each leaf mapped."""
    if isinstance(value, Mapping):
        return {key: map_nested(inner, function) for key, inner in value.items()}
    if isinstance(value, list):
        return [map_nested(inner, function) for inner in value]
    if isinstance(value, tuple):
        mapped = tuple(map_nested(inner, function) for inner in value)
        return type(value)(*mapped) if hasattr(value, "_fields") else mapped
    return function(value)


@dataclass(frozen=True, slots=True)
class _End:
    """Of the feeder: after how many batches, and why, if not because there are no more."""

    made: int
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class _Hole:
    """Stands in a skeleton for the tensor of this number."""

    number: int


def _lift(leaf: Any, tensors: list[torch.Tensor]) -> Any:
    """A tensor goes into the list, and a hole into its place."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    tensors.append(leaf)
    return _Hole(len(tensors) - 1)


def _lower(leaf: Any, places: Sequence[Place], memory: torch.Tensor) -> Any:
    """A hole gets its tensor."""
    return places[leaf.number].view_of(memory) if isinstance(leaf, _Hole) else leaf
