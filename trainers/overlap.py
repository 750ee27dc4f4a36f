"""Copies that run beside the next forward and backward passes, and end before the next update.

Problem: a copy of gigabytes takes as long as the memory takes, and a training that waits for it
stands still. But parameters and the optimizer's moments do not change between one update and the
next: that is most of the time of a step, and all of it can be the copy's. CheckFreq (Mohan et al.,
"CheckFreq: Frequent, Fine-Grained DNN Checkpointing", FAST 2021) overlaps its snapshot in the same
way. There are two edges, as in the prefetcher's ring: a copy begins when the update before it is
done (*ready*), and the update after it waits until the copy has ended (*free*).

1. ``Helper.begin`` notes the address and the write counter (``Tensor._version``) of each source and
   returns; one long-lived thread copies. Copies of a device's memory are queued by ``drain``, on a
   stream of low priority behind what was computed before, and the thread waits for them.
2. The training thread asks ``done`` where it passes by, and calls ``wait`` before its update. What
   nobody has begun to copy by then it copies itself, piece by piece, beside the helper: a step
   that is shorter than the copy waits for half of the rest, and where other programs keep the
   helper from running, the training does not wait for its turn.
3. Then it asks ``unchanged``: a forward pass may write to a parameter after all (an embedding with
   ``max_norm``, say), and what was copied is then of no single moment.

The question is asked in the training thread, between two operations, and not by the copier when it
ends: torch counts a write when it is over, so another thread may see the counter from before it
and the bytes from the midst of it. For the same reason nothing may be made of a copy before that
answer. What goes past the counter, by ``.data``, goes unseen.

The pieces are plain memory copies. torch's own copies would bring a second team of threads, which
would take the cores of the training's.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from trainers import drain

Pair = tuple[torch.Tensor, torch.Tensor]
"""A source, on any device, and the view of host memory with its type and shape that it goes to."""

PIECE_BYTES = 4 << 20
"""Copied in less than a millisecond, which is what one thread waits for the other at most."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor as it was. Holding its storage keeps the address from being used for another one."""

    tensor: torch.Tensor
    address: int
    version: int

    def is_still(self, now: torch.Tensor) -> bool:
        """Whether this is the same memory, and nothing was written to it since."""
        return (
            self.address == now.data_ptr()
            and self.version == now._version
            and self.tensor.dtype == now.dtype
            and self.tensor.shape == now.shape
            and self.tensor.stride() == now.stride()
        )


def seen(tensor: torch.Tensor) -> Seen:
    """As it is now."""
    return Seen(tensor.detach(), tensor.data_ptr(), tensor._version)


class Pieces:
    """What is left to copy of the host's memory, for any thread to take from."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        # A parameter may be given other memory meanwhile; this holds what the addresses are of.
        self._held = [(source.detach(), target) for source, target in pairs]
        self._left = deque(piece for pair in self._held for piece in _cut(*pair))

    def take(self) -> Callable[[], object] | None:
        """One of them, to be called; None when all are taken. Nobody gets it twice."""
        try:
            return self._left.popleft()
        except IndexError:
            return None

    def copy(self) -> None:
        """Those that are left, by the calling thread alone."""
        while (piece := self.take()) is not None:
            piece()


class Copying:
    """Copies under way; made by ``Helper.begin``. For the training's thread."""

    def __init__(
        self, sources: Sequence[torch.Tensor], pieces: Pieces, work: "Future[None]"
    ) -> None:
        self._marks = [(source, seen(source)) for source in sources]
        self._pieces = pieces
        self._work = work

    @property
    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._work.done()

    def wait(self) -> None:
        """Until every byte is there; helps. Raises what went wrong in the copying."""
        try:
            self._pieces.copy()
        finally:  # also then nobody may be writing any more
            self._work.result()

    @property
    def unchanged(self) -> bool:
        """Whether no source was written to or exchanged since the beginning; ask when ``done``."""
        return all(mark.is_still(source) for source, mark in self._marks)


class Helper:
    """The thread. It is made with the first copy and ends with the process, or with this object."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "baton-capture")

    def begin(self, pairs: Sequence[Pair]) -> Copying:
        """Copy each source to its target. Neither may go away before the end."""
        near, distant = _by_memory(pairs)
        queued = drain.copy_out(distant)
        pieces = Pieces(near)
        work = self._executor.submit(_finish, pieces, queued)
        return Copying([source for source, _ in pairs], pieces, work)


def copy(pairs: Sequence[Pair]) -> None:
    """The same by the calling thread, and at once."""
    near, distant = _by_memory(pairs)
    queued = drain.copy_out(distant)
    with torch.no_grad():
        for source, target in near:
            target.copy_(source)
    queued.wait()


def move(target: int, source: int, size_bytes: int) -> None:
    """Between two addresses; through ctypes, which lets other threads run meanwhile."""
    ctypes.memmove(target, source, size_bytes)


def _cut(source: torch.Tensor, target: torch.Tensor) -> Iterator[Callable[[], object]]:
    if source.is_contiguous() and not source.is_neg() and not source.is_conj():
        to, of, whole_bytes = target.data_ptr(), source.data_ptr(), source.nbytes
        for begin in range(0, whole_bytes, PIECE_BYTES):
            yield partial(move, to + begin, of + begin, min(PIECE_BYTES, whole_bytes - begin))
    else:
        yield partial(_arrange, source, target)


def _arrange(source: torch.Tensor, target: torch.Tensor) -> None:
    """One whose bytes are not those of its elements in their order."""
    with torch.no_grad():
        target.copy_(source)


def _finish(pieces: Pieces, queued: drain.Drain) -> None:
    pieces.copy()
    queued.wait()


def _by_memory(
    pairs: Sequence[Pair],
) -> tuple[list[Pair], list[tuple[torch.Tensor, drain.HostMemory]]]:
    """Those of the host's memory, and those of a device's."""
    near = [pair for pair in pairs if not pair[0].is_cuda]
    return near, [(source, target) for source, target in pairs if source.is_cuda]
