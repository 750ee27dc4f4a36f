"""Device memory to host memory, in pieces, beside a training that goes on.

Problem: a checkpoint is gigabytes, and one copy of all of it holds the one engine that copies from
the device for as long as it takes: every ``loss.item()`` of the training waits behind it. And only
pinned memory can be the target of a copy that does not block the host (CUDA driver API, "API
synchronization behavior"), while a checkpoint often goes to memory that is not: a mapped file, say.

How: everything is cut into pieces. At tens of gigabytes a second a piece of 32 MiB takes about a
millisecond, which is the longest that another copy waits. The pieces go through a stream of the
lowest priority, behind one event on the caller's stream, so that they see what was computed before
``copy_out`` was called. Into pinned memory all of them are queued at once. Other memory is reached
through two pinned buffers in turn: while one is filled by the device, the host empties the other;
the host's part of that is done by ``wait``, in the thread that calls it. CPU tensors are plain
copies, in the same pieces, finished before ``copy_out`` returns.

The sources must stay as they are, and the targets where they are, until ``wait`` has returned;
nothing here makes a snapshot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

PIECE_BYTES = 32 << 20
"""Long enough that starting a copy (microseconds) does not count, short enough to wait for."""

LOWEST_PRIORITY = 0
"""In CUDA lower numbers go first, and 0 is the last of them (torch.cuda.Stream)."""

HostMemory = memoryview | torch.Tensor


class Drain:
    """Copies under way; made by ``copy_out``."""

    def __init__(self, lanes: "Sequence[_DeviceLane]") -> None:
        self._lanes = list(lanes)

    def wait(self) -> None:
        """Returns when every byte has arrived, and lets go of all the memory. Blocks, and without
        pinned memory works: call it where that does not hurt. Waiting again does nothing."""
        for lane in self._lanes:
            lane.finish()
        self._lanes.clear()


def copy_out(
    tensors: Sequence[tuple[torch.Tensor, HostMemory]], *, piece_bytes: int = PIECE_BYTES
) -> Drain:
    """Copy each tensor (of any shape and strides, its bytes are those of ``contiguous()``) into the
    host memory beside it: writable, contiguous, of exactly that many bytes. ``piece_bytes`` is 1 or
    more.

    Raises ValueError, before anything is copied, when a size does not fit or memory cannot be
    written. Nothing is complete before ``wait`` of the result returns.
    """
    if piece_bytes < 1:
        raise ValueError(f"pieces of {piece_bytes} bytes never end")
    pairs = [_bytes_of_both(source, target) for source, target in tensors]
    lanes: dict[torch.device, _DeviceLane] = {}
    for source, target in pairs:
        pieces = zip(source.split(piece_bytes), target.split(piece_bytes), strict=True)
        if source.device.type == "cpu":
            for piece, place in pieces:
                place.copy_(piece)
            continue
        if source.device not in lanes:
            lanes[source.device] = _DeviceLane(source.device)
        lanes[source.device].pieces += [_Piece(piece, place) for piece, place in pieces]
    for lane in lanes.values():
        lane.start()
    return Drain(list(lanes.values()))


@dataclass(frozen=True, slots=True)
class _Piece:
    source: torch.Tensor
    target: torch.Tensor


class _DeviceLane:
    """The pieces of one device, its stream, and two pinned buffers if they are needed."""

    def __init__(self, device: torch.device) -> None:
        self.pieces: list[_Piece] = []
        self._caller = torch.cuda.current_stream(device)
        self._stream = torch.cuda.Stream(device, priority=LOWEST_PRIORITY)
        self._staged: list[_Piece] = []  # whose targets are not pinned: by way of the buffers
        self._buffers: list[torch.Tensor] = []
        # blocking: who waits for a copy sleeps.
        self._filled = [torch.cuda.Event(blocking=True) for _ in range(2)]

    def start(self) -> None:
        """Queue what can be queued without waiting."""
        self._stream.wait_stream(self._caller)
        with torch.cuda.stream(self._stream):
            for piece in self.pieces:
                if piece.target.is_pinned():
                    piece.target.copy_(piece.source, non_blocking=True)
                else:
                    self._staged.append(piece)
        if self._staged:
            largest_bytes = max(piece.source.numel() for piece in self._staged)
            with torch.cuda.device(self._stream.device):
                self._buffers = [_pinned(largest_bytes) for _ in self._filled]
        for number in range(min(len(self._staged), len(self._buffers))):
            self._fill(number)

    def finish(self) -> None:
        """Empty the buffers in turn until nothing is left, and wait for the stream."""
        for number, piece in enumerate(self._staged):
            turn = number % len(self._buffers)
            self._filled[turn].synchronize()
            piece.target.copy_(self._buffers[turn][: piece.source.numel()])
            if number + len(self._buffers) < len(self._staged):
                self._fill(number + len(self._buffers))
        self._stream.synchronize()

    def _fill(self, number: int) -> None:
        turn = number % len(self._buffers)
        source = self._staged[number].source
        with torch.cuda.stream(self._stream):
            self._buffers[turn][: source.numel()].copy_(source, non_blocking=True)
            self._filled[turn].record(self._stream)


def _bytes_of_both(source: torch.Tensor, target: HostMemory) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as flat bytes. Raises ValueError when they do not fit each other."""
    if source.device.type not in ("cpu", "cuda"):
        raise ValueError(f"cannot copy from {source.device}")
    flat = source.detach().contiguous().view(-1).view(torch.uint8)
    target_bytes = target.nbytes
    if flat.numel() != target_bytes:
        raise ValueError(
            f"a tensor of {flat.numel()} bytes does not fit host memory of {target_bytes}"
        )
    return flat, _flat_target(target)


def _flat_target(target: HostMemory) -> torch.Tensor:
    if isinstance(target, torch.Tensor):
        if target.device.type != "cpu" or not target.is_contiguous():
            raise ValueError("host memory is a contiguous CPU tensor or a memoryview")
        return target.detach().view(-1).view(torch.uint8)
    if target.readonly or not target.c_contiguous:
        raise ValueError("host memory is writable and contiguous")
    if not target.nbytes:
        return torch.empty(0, dtype=torch.uint8)  # frombuffer refuses to look at nothing
    return torch.frombuffer(target, dtype=torch.uint8)


def _pinned(size_bytes: int) -> torch.Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
