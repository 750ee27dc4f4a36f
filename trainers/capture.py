"""A checkpoint in the time of a copy: the state goes into the agent's slab, and training goes on.

Problem: writing a checkpoint to disk stops the training for as long as the disk takes, and an
asynchronous one still takes a copy first, into fresh memory, which costs several times as much as
the copy itself (every page is a fault), and is lost when the process is killed.

So the state is copied once, straight into a slab that the agent owns and that was mapped and
touched long before (``baton_sdk.slab``). What lies there are the very files that ``checkpoint``
writes, byte for byte: the headers of the safetensors format are made by us and kept, the tensors
are copied behind them. The agent hashes, stores and copies them from there, in another process at a
low priority; restoring and exporting know no difference, and unchanged chunks are kept once.

1. What is small and changes while anybody looks (random generators, the loop's place) goes first.
2. Optimizer, model: one copy each, into views of the slab that are made once.
3. Frozen parameters: once for each slot. They are copied again when one of them was written to or
   exchanged, which autograd's version counter tells (``Tensor._version``; what goes past it, by
   ``.data``, is not seen until the last capture of the process, which copies everything).
4. The slot's header, last of all.

On a GPU the slab is registered as page-locked memory and ``drain`` copies into it, in pieces; the
training waits for the last one.

How often: with a stall of C for each checkpoint and a mean time M between failures, the time lost
to both is least at sqrt(2 C M) between checkpoints (J. W. Young, "A first order approximation to
the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly, FGCS 22(3), 2006, who shows that it
holds as long as C is small beside M). A small state is captured once a minute at least: the rule
knows nothing of the person who looks at the result.
"""

import json
import math
import time
from dataclasses import dataclass

import torch

import baton_sdk
from trainers import checkpoint, drain

ALIGNMENT_BYTES = 4096
"""Of each file in a slot: tensors of any type can be viewed there, and pages are not shared."""

INTERVAL_MIN_S = 5.0
"""A checkpoint costs the agent a hash of all of it and a disk; below this nothing is gained that a
person or a scheduler would notice."""

INTERVAL_SMALL_S = 60.0
INTERVAL_MAX_S = 3600.0
"""However rarely things fail, and however slow a disk is: an hour of work is a lot to lose."""

SMALL_STATE_BYTES = 1_000_000_000

# safetensors' names of the types, in the order in which the format's own writer puts tensors into
# a file, backwards (https://github.com/huggingface/safetensors, `Dtype` in tensor.rs: alignment).
_TYPES: tuple[tuple[torch.dtype, str], ...] = (
    (torch.bool, "BOOL"),
    (torch.uint8, "U8"),
    (torch.int8, "I8"),
    (torch.float8_e5m2, "F8_E5M2"),
    (torch.float8_e4m3fn, "F8_E4M3"),
    (torch.int16, "I16"),
    (torch.uint16, "U16"),
    (torch.float16, "F16"),
    (torch.bfloat16, "BF16"),
    (torch.int32, "I32"),
    (torch.uint32, "U32"),
    (torch.float32, "F32"),
    (torch.complex64, "C64"),
    (torch.float64, "F64"),
    (torch.int64, "I64"),
    (torch.uint64, "U64"),
)
_RANKS = {dtype: rank for rank, (dtype, _) in enumerate(_TYPES)}
_NAMES = dict(_TYPES)

_Key = tuple[tuple[str, torch.dtype, torch.Size], ...]


def interval_s(
    stall_s: float | None, state_bytes: int, mean_time_between_failures_s: float
) -> float:
    """Seconds between checkpoints by Young's rule, within bounds. ``stall_s`` is what the last one
    cost; None before the first."""
    longest_s = INTERVAL_SMALL_S if state_bytes < SMALL_STATE_BYTES else INTERVAL_MAX_S
    if stall_s is None:
        return INTERVAL_SMALL_S
    best_s = math.sqrt(2 * stall_s * mean_time_between_failures_s)
    return min(longest_s, max(INTERVAL_MIN_S, best_s))


@dataclass(frozen=True)
class Layout:
    """One file of tensors: its header, and where each tensor's bytes go."""

    key: _Key
    header: bytes
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    """Of each name's first byte in the file."""

    size_bytes: int


def layout_of(tensors: checkpoint.Tensors) -> Layout | None:
    """The file that safetensors would write for these; None for a type that it does not know."""
    key = key_of(tensors)
    if any(dtype not in _RANKS for _, dtype, _ in key):
        return None
    order = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name.encode()))
    described: dict[str, object] = {}
    begins = []
    end = 0
    for name in order:
        tensor = tensors[name]
        begins.append(end)
        end += tensor.numel() * tensor.element_size()
        described[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[-1], end],
        }
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = tuple(len(header) + begin for begin in begins)
    return Layout(key, header, tuple(order), offsets, len(header) + end)


def key_of(tensors: checkpoint.Tensors) -> _Key:
    """What a layout depends on."""
    return tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())


class Capturer:
    """Captures into the session's slab, of one training."""

    def __init__(self, session: baton_sdk.Session, *, parts: int = 1) -> None:
        self._session = session
        self._parts = parts
        self._layouts: dict[str, Layout] = {}
        self._memory: _Memory | None = None
        self.busy = False
        """Of the last capture that was not taken: the slots are being stored. Try again."""

        self.stall_s: float | None = None
        """What the last capture cost the training."""

        self.state_bytes = 0

    @property
    def blocked(self) -> bool:
        """Whether every slot is being stored: a look that costs nothing, before a state is put
        together in vain."""
        return self._memory is not None and self._memory.slab.free_slot() is None

    def prepare(self, live: checkpoint.Snapshot) -> None:
        """Ask for the memory before it is needed. Returns at once."""
        if self._plan(live):
            self._session.slab(self._slot_bytes(checkpoint.encode_state(live.state)))

    def take(
        self, live: checkpoint.Snapshot, step: int, *, wait_s: float = 0.0, whole: bool = False
    ) -> baton_sdk.Ticket | None:
        """Copy a state whose tensors are the live ones; returns when it is copied.

        None where there is no slab, or, with ``busy``, no free slot within ``wait_s`` seconds.
        ``whole`` copies frozen parameters whether they seem to have changed or not."""
        self.busy = False
        began_s = time.perf_counter()
        if not self._plan(live):
            return None
        text = checkpoint.encode_state(live.state)
        planned_s = time.perf_counter() - began_s
        slab = self._session.slab(self._slot_bytes(text))
        if slab is None:
            return None
        if self._memory is None or self._memory.slab is not slab:
            self._memory = _Memory(slab)
            self._memory.open()
        slot = slab.wait_free_slot(wait_s)
        if slot is None:
            self.busy = True
            return None
        began_s = time.perf_counter()
        files = self._copy(self._memory, slot, live, text, whole)
        ticket = self._session.capture(slab, slot, files, step, self._parts)
        self.stall_s = planned_s + time.perf_counter() - began_s
        return ticket

    def _plan(self, live: checkpoint.Snapshot) -> bool:
        """Bring the layouts up to date; False for a state that only files can hold."""
        for part in checkpoint.TENSOR_FILES:
            tensors: checkpoint.Tensors = getattr(live, part)
            known = self._layouts.get(part)
            if known is None or known.key != key_of(tensors):
                fresh = layout_of(tensors)
                if fresh is None:
                    return False
                self._layouts[part] = fresh
        return True

    def _slot_bytes(self, text: bytes) -> int:
        self.state_bytes = sum(layout.size_bytes for layout in self._layouts.values())
        return sum(_aligned(layout.size_bytes) for layout in self._layouts.values()) + len(text)

    def _copy(
        self,
        memory: "_Memory",
        slot: int,
        live: checkpoint.Snapshot,
        text: bytes,
        whole: bool,
    ) -> list[tuple[str, int, int]]:
        """Fill the slot, ``text`` being its JSON state; returns (name, offset, bytes) of each
        file."""
        memory.slab.begin(slot)
        offset = 0
        offsets = {}
        for part in checkpoint.TENSOR_FILES:
            offsets[part] = offset
            offset += _aligned(self._layouts[part].size_bytes)
        memory.write(slot, offset, text)
        for part in ("random", "optimizer", "model"):
            memory.fill(slot, offsets[part], self._layouts[part], getattr(live, part))
        if whole or not memory.holds(slot, offsets["frozen"], live.frozen):
            memory.forget(slot)
            memory.fill(slot, offsets["frozen"], self._layouts["frozen"], live.frozen)
        memory.finish()
        memory.remember(slot, offsets["frozen"], live.frozen)
        sizes = {part: self._layouts[part].size_bytes for part in checkpoint.TENSOR_FILES}
        files = [(f"{part}.safetensors", offsets[part], sizes[part]) for part in offsets]
        return [*files, (checkpoint.STATE_FILE, offset, len(text))]


@dataclass(frozen=True)
class _Seen:
    """A frozen tensor as it was copied. Holding its storage keeps the address from being used for
    another one."""

    tensor: torch.Tensor
    address: int
    version: int


class _Memory:
    """The slab as tensors; one training thread uses it."""

    def __init__(self, slab: baton_sdk.Slab) -> None:
        self.slab = slab
        self._bytes: torch.Tensor
        self._views: dict[tuple[int, int], tuple[Layout, list[torch.Tensor]]] = {}
        self._frozen: dict[int, tuple[int, list[_Seen]]] = {}
        self._drains: list[drain.Drain] = []

    def open(self) -> None:
        """Page-lock it, where there is a GPU that copies into it. One that does not is slower."""
        self._bytes = torch.frombuffer(self.slab.mapping, dtype=torch.uint8)
        if torch.cuda.is_available():
            torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self._bytes.numel(), 0)

    def write(self, slot: int, offset: int, data: bytes) -> None:
        begin = self.slab.offset_bytes(slot) + offset
        self.slab.mapping[begin : begin + len(data)] = data

    def fill(self, slot: int, offset: int, layout: Layout, tensors: checkpoint.Tensors) -> None:
        """Header and tensors of one file."""
        known = self._views.get((slot, offset))
        if known is None or known[0] is not layout:
            self.write(slot, offset, layout.header)
            known = (layout, self._viewed(slot, offset, layout, tensors))
            self._views[slot, offset] = known
        distant: list[tuple[torch.Tensor, drain.HostMemory]] = []
        with torch.no_grad():
            for view, name in zip(known[1], layout.names, strict=True):
                live = tensors[name]
                if live.is_cuda:
                    distant.append((live, view))
                else:
                    view.copy_(live)
        if distant:
            self._drains.append(drain.copy_out(distant))

    def finish(self) -> None:
        """Until every copy is there."""
        for copies in self._drains:
            copies.wait()
        self._drains.clear()

    def holds(self, slot: int, offset: int, frozen: checkpoint.Tensors) -> bool:
        """Whether the slot has these tensors, as they are now, in this place."""
        known_offset, seen = self._frozen.get(slot, (-1, []))
        return (
            known_offset == offset
            and len(seen) == len(frozen)
            and all(
                then.address == now.data_ptr()
                and then.version == now._version
                and then.tensor.dtype == now.dtype
                and then.tensor.shape == now.shape
                and then.tensor.stride() == now.stride()
                for then, now in zip(seen, frozen.values(), strict=True)
            )
        )

    def remember(self, slot: int, offset: int, frozen: checkpoint.Tensors) -> None:
        seen = [_Seen(t.detach(), t.data_ptr(), t._version) for t in frozen.values()]
        self._frozen[slot] = (offset, seen)

    def forget(self, slot: int) -> None:
        """Before it is overwritten: a copy that fails half way is no copy."""
        self._frozen.pop(slot, None)

    def _viewed(
        self, slot: int, offset: int, layout: Layout, tensors: checkpoint.Tensors
    ) -> list[torch.Tensor]:
        begin = self.slab.offset_bytes(slot) + offset
        views = []
        for name, place in zip(layout.names, layout.offsets, strict=True):
            tensor = tensors[name]
            size = tensor.numel() * tensor.element_size()
            at = self._bytes[begin + place : begin + place + size]
            views.append(at.view(tensor.dtype).view(tensor.shape))
        return views


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
