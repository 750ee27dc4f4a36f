"""A checkpoint in the time of a copy: the state goes into the agent's slab, and training goes on.

Problem: writing a checkpoint to disk stops the training for as long as the disk takes, and an
asynchronous one still takes a copy first, into fresh memory, which costs several times as much as
the copy itself (every page is a fault), and is lost when the process is killed.

So the state is copied once, straight into a slab that the agent owns and that was mapped and
touched long before (``baton_sdk.slab``). What lies there are the very files that ``checkpoint``
writes, byte for byte: the headers of the safetensors format are made by us and kept, the tensors
are copied behind them. The agent hashes, stores and copies them from there, in another process at a
low priority; restoring and exporting know no difference, and unchanged chunks are kept once.

1. What is small, and whatever a forward pass may change, goes first, at once: the loop's place,
   random generators, buffers, and the states of other objects.
2. Parameters and the optimizer's moments, which stay as they are until the next update: one copy
   each, into views of the slab that are made once. A helper copies them while the next forward and
   backward passes run (``overlap``), and the training waits for it right before its update.
3. Frozen parameters: once for each slot. They are copied again when one of them was written to or
   exchanged (else the header says that they lie there as before, and the agent does not read them
   again), which autograd's version counter tells (``Tensor._version``; what goes past it, by
   ``.data``, is not seen until the last capture of the process, which copies everything).
4. The slot's header, last of all, and the word to the agent. Not before the training's thread has
   seen that nothing was written to while it was copied. Where something was, this capture is
   dropped, and from there on the training waits for all of every copy: such a model writes to its
   parameters in each of its passes.

Whoever is killed before 4. has the capture before this one: in the other slot, or where there is
only one, on the agent's disk, for a slot is free only when what it held is there.

On a GPU the slab is page-locked (``pagelock``) and ``drain`` copies into it, in pieces. The last
capture of a process has no next step to hide behind, and is copied at once.

How often: with a stall of C for each checkpoint and a mean time M between failures, the time lost
to both is least at sqrt(2 C M) between checkpoints (J. W. Young, "A first order approximation to
the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly, FGCS 22(3), 2006, who shows that it
holds as long as C is small beside M). A small state is captured once a minute at least: the rule
knows nothing of the person who looks at the result.
"""

import json
import math
import secrets
import time
from dataclasses import dataclass

import torch

import baton_sdk
from trainers import checkpoint, overlap, pagelock

ALIGNMENT_BYTES = 4096
"""Of each file in a slot: tensors of any type can be viewed there, and pages are not shared."""

INTERVAL_MIN_S = 5.0
"""A checkpoint costs the agent a hash of all of it and a disk; below this nothing is gained that a
person or a scheduler would notice."""

INTERVAL_SMALL_S = 60.0
INTERVAL_MAX_S = 3600.0
"""However rarely things fail, and however slow a disk is: an hour of work is a lot to lose."""

SMALL_STATE_BYTES = 1_000_000_000

WRITTEN_BITS = 62
"""Of the number of a write: a header takes 63, and two are alike once in 10^9 numbers or so."""

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
    """Captures into the session's slab, of one training, by its thread."""

    def __init__(self, session: baton_sdk.Session, *, parts: int = 1) -> None:
        self._session = session
        self._parts = parts
        self._layouts: dict[str, Layout] = {}
        self._memory: _Memory | None = None
        self._helper = overlap.Helper()
        self._begun: _Begun | None = None
        self.busy = False
        """Of the last capture that was not taken: the slots are being stored. Try again."""

        self.changing = False
        """Whether the model writes to its parameters while it computes, as far as is known."""

        self.stall_s: float | None = None
        """How long the training stood still for the last capture, or for this one so far."""

        self.state_bytes = 0

    @property
    def blocked(self) -> bool:
        """Whether every slot is being stored: a look that costs nothing, before a state is put
        together in vain."""
        return self._memory is not None and self._memory.slab.free_slot() is None

    @property
    def begun(self) -> bool:
        """Whether a capture is under way that ``settle`` has not ended."""
        return self._begun is not None

    def prepare(self, live: checkpoint.Snapshot) -> None:
        """Ask for the memory before it is needed. Returns at once."""
        slot_bytes = self.measure(live)
        if slot_bytes:
            self._session.slab(slot_bytes)

    def measure(self, live: checkpoint.Snapshot) -> int:
        """How much memory that is, and how large the state; 0 for one that only files can hold."""
        if not self._plan(live):
            return 0
        return self._slot_bytes(checkpoint.encode_state(live.state))

    def take(
        self, live: checkpoint.Snapshot, step: int, *, wait_s: float = 0.0, whole: bool = False
    ) -> baton_sdk.Ticket | None:
        """Copy a state whose tensors are the live ones; returns when it is copied.

        None where there is no slab, or, with ``busy``, no free slot within ``wait_s`` seconds.
        ``whole`` copies frozen parameters whether they seem to have changed or not."""
        if not self._start(live, step, wait_s, whole=whole, later=False):
            return None
        return self.settle()

    def begin(self, live: checkpoint.Snapshot, step: int) -> bool:
        """The same beside what follows: returns when that may go on, up to the next update, before
        which comes ``settle``. False where ``take`` would return None."""
        return self._start(live, step, 0.0, whole=False, later=not self.changing)

    def settle(self, *, wait: bool = True) -> baton_sdk.Ticket | None:
        """End the capture that was begun, if there is one: from here on the parameters may change.
        Without ``wait`` only if it is copied by now. Call it between two operations of torch.

        None: there is none, it is not copied yet, or it was dropped (then ``begun`` is False), as
        the model has changed it meanwhile or the memory is not ours any more."""
        begun = self._begun
        if begun is None or not (wait or begun.copying is None or begun.copying.done):
            return None
        began_s = time.perf_counter()
        self._begun = None
        if begun.copying is not None:
            begun.copying.wait()
            if not begun.copying.unchanged:
                self.changing = True
                return None
        if self._session.slab(begun.slot_bytes) is not begun.memory.slab:
            return None
        begun.memory.remember(begun.slot, begun.frozen)
        ticket = self._session.capture(
            begun.memory.slab,
            begun.slot,
            begun.files,
            begun.step,
            parts=self._parts,
            written=begun.written,
        )
        self.stall_s = (self.stall_s or 0.0) + time.perf_counter() - began_s
        return ticket

    def _start(
        self, live: checkpoint.Snapshot, step: int, wait_s: float, *, whole: bool, later: bool
    ) -> bool:
        assert self._begun is None, "a capture was begun and not settled"
        self.busy = False
        began_s = time.perf_counter()
        if not self._plan(live):
            return False
        text = checkpoint.encode_state(live.state)
        planned_s = time.perf_counter() - began_s
        slot_bytes = self._slot_bytes(text)
        slab = self._session.slab(slot_bytes)
        if slab is None:
            return False
        if self._memory is None or self._memory.slab is not slab:
            self._memory = _Memory(slab)
            self._memory.open()
        slot = slab.wait_free_slot(wait_s)
        if slot is None:
            self.busy = True
            return False
        began_s = time.perf_counter()
        files = self._lay_out(len(text))
        self._memory.slab.begin(slot)
        self._memory.write(slot, files[-1][1], text)
        at_once, can_wait = self._pairs(self._memory, slot, live, whole)
        overlap.copy(at_once if later else at_once + can_wait)
        self._begun = _Begun(
            memory=self._memory,
            slot=slot,
            slot_bytes=slot_bytes,
            step=step,
            files=files,
            frozen=[overlap.seen(tensor) for tensor in live.frozen.values()],
            written={
                file.name: self._memory.written(slot)
                for file in live.files()
                if file.part == "frozen"
            },
            copying=self._helper.begin(can_wait) if later else None,
        )
        self.stall_s = planned_s + time.perf_counter() - began_s
        return True

    def _plan(self, live: checkpoint.Snapshot) -> bool:
        """Bring the layouts up to date; False for a state that only files can hold."""
        layouts = {}
        for file in live.files():
            layout = self._layouts.get(file.name)
            if layout is None or layout.key != key_of(file.tensors):
                layout = layout_of(file.tensors)
                if layout is None:
                    return False
            layouts[file.name] = layout
        self._layouts = layouts
        return True

    def _slot_bytes(self, text: bytes) -> int:
        self.state_bytes = sum(layout.size_bytes for layout in self._layouts.values())
        return sum(_aligned(layout.size_bytes) for layout in self._layouts.values()) + len(text)

    def _lay_out(self, text_bytes: int) -> list[tuple[str, int, int]]:
        """(name, offset in the slot, bytes) of each file; the JSON state, of so many bytes, is the
        last one."""
        files = []
        offset = 0
        for name, layout in self._layouts.items():
            files.append((name, offset, layout.size_bytes))
            offset += _aligned(layout.size_bytes)
        return [*files, (checkpoint.STATE_FILE, offset, text_bytes)]

    def _pairs(
        self, memory: "_Memory", slot: int, live: checkpoint.Snapshot, whole: bool
    ) -> tuple[list[overlap.Pair], list[overlap.Pair]]:
        """What is to be copied, at once and before the next update. ``whole``: also the frozen
        parameters that the slot seems to hold."""
        at_once: list[overlap.Pair] = []
        can_wait: list[overlap.Pair] = []
        offset = 0
        held = not whole and memory.holds(slot, live.frozen)
        for file in live.files():
            tensors, layout = file.tensors, self._layouts[file.name]
            if file.part != "frozen" or not held:
                if file.part == "frozen":
                    memory.forget(slot)
                views = memory.views((slot, offset), layout, tensors)
                for name, view in zip(layout.names, views, strict=True):
                    of_optimizer = file.part == "optimizer"
                    waits = of_optimizer or isinstance(tensors[name], torch.nn.Parameter)
                    (can_wait if waits else at_once).append((tensors[name], view))
            offset += _aligned(layout.size_bytes)
        return at_once, can_wait


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A capture between its first copy and its header."""

    memory: "_Memory"
    slot: int
    slot_bytes: int
    step: int
    files: list[tuple[str, int, int]]
    frozen: list[overlap.Seen]
    written: dict[str, int]
    copying: overlap.Copying | None
    """None: everything is copied."""


class _Memory:
    """The slab as tensors; one training thread uses it."""

    def __init__(self, slab: baton_sdk.Slab) -> None:
        self.slab = slab
        self._bytes: torch.Tensor
        self._lock: pagelock.PageLock | None = None
        self._views: dict[tuple[int, int], tuple[Layout, list[torch.Tensor]]] = {}
        self._frozen: dict[int, list[overlap.Seen]] = {}
        self._written: dict[int, int] = {}

    def open(self) -> None:
        """Page-lock it, where there is a GPU that copies into it."""
        self._bytes = torch.frombuffer(self.slab.mapping, dtype=torch.uint8)
        self._lock = pagelock.lock(self._bytes)

    def write(self, slot: int, offset: int, data: bytes) -> None:
        begin = self.slab.offset_bytes(slot) + offset
        self.slab.mapping[begin : begin + len(data)] = data

    def views(
        self, place: tuple[int, int], layout: Layout, tensors: checkpoint.Tensors
    ) -> list[torch.Tensor]:
        """Where the tensors of one file go, in the order of the layout; its header is there.
        ``place`` is its slot, and its offset in there."""
        # Each time: another file may have lain over it, when those before were larger for a while.
        self.write(*place, layout.header)
        known = self._views.get(place)
        if known is None or known[0] is not layout:
            known = (layout, self._viewed(place, layout, tensors))
            self._views[place] = known
        return known[1]

    def holds(self, slot: int, frozen: checkpoint.Tensors) -> bool:
        """Whether the slot has these tensors, as they are now."""
        seen = self._frozen.get(slot)
        return (
            seen is not None
            and len(seen) == len(frozen)
            and all(then.is_still(now) for then, now in zip(seen, frozen.values(), strict=True))
        )

    def remember(self, slot: int, frozen: list[overlap.Seen]) -> None:
        """The slot has these, whole."""
        self._frozen[slot] = frozen

    def forget(self, slot: int) -> None:
        """Before it is overwritten: a copy that fails half way is no copy."""
        self._frozen.pop(slot, None)
        # By chance, so that nobody gives one twice, whoever else has used this slab before.
        self._written[slot] = secrets.randbits(WRITTEN_BITS) + 1

    def written(self, slot: int) -> int:
        """Which of all writes of frozen parameters was the last one there: while that is the same,
        so are the bytes, whatever the parameters are by now."""
        return self._written[slot]

    def _viewed(
        self, place: tuple[int, int], layout: Layout, tensors: checkpoint.Tensors
    ) -> list[torch.Tensor]:
        begin = self.slab.offset_bytes(place[0]) + place[1]
        views = []
        for name, offset in zip(layout.names, layout.offsets, strict=True):
            tensor = tensors[name]
            size = tensor.numel() * tensor.element_size()
            at = self._bytes[begin + offset : begin + offset + size]
            views.append(at.view(tensor.dtype).view(tensor.shape))
        return views


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
