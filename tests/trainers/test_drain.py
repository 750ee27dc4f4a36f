"""What is copied out of tensors is their bytes, all of them, into memory that is given."""

import mmap
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers import drain
from trainers.drain import HostMemory, copy_out

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (1000,), (7, 3, 5)]


def content(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(50).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)), max_size=4),
    st.sampled_from([1, 3, 64, 1 << 20]),
    st.booleans(),
)
def test_every_byte_arrives(
    kinds: list[tuple[tuple[int, ...], torch.dtype]], piece_bytes: int, views: bool
) -> None:
    sources = [made(shape, dtype, seed) for seed, (shape, dtype) in enumerate(kinds)]
    kept = [bytearray(source.nbytes) for source in sources]
    tensors = [torch.empty_like(source) for source in sources]
    targets: list[HostMemory] = [memoryview(area) for area in kept] if views else [*tensors]
    copies = copy_out(list(zip(sources, targets, strict=True)), piece_bytes=piece_bytes)
    copies.wait()
    copies.wait()
    arrived = [bytes(area) for area in kept] if views else [content(each) for each in tensors]
    assert arrived == [content(source) for source in sources]


def test_strides_and_gradients_are_left_behind() -> None:
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    weight = torch.randn(6, 4, requires_grad=True)
    pairs = [(source, torch.empty(source.shape)) for source in (images, weight, weight.t())]
    copy_out(pairs).wait()
    for source, target in pairs:
        assert torch.equal(source, target)
    assert not pairs[1][1].requires_grad


def test_a_mapping_can_be_closed_afterwards() -> None:
    source = torch.arange(3000, dtype=torch.int32)
    area = mmap.mmap(-1, source.nbytes + 8)
    view = memoryview(area)
    copy_out([(source, view[8:])], piece_bytes=1024).wait()
    assert view[8:].tobytes() == content(source)
    assert view[:8].tobytes() == bytes(8)
    view.release()
    area.close()  # BufferError while anybody looks at it


def test_what_does_not_fit_is_refused_before_anything_is_copied() -> None:
    source, first = torch.ones(4), torch.zeros(4)
    cases: list[tuple[HostMemory, str]] = [
        (torch.zeros(5), "tensor of 16 bytes does not fit host memory of 20"),
        (memoryview(bytearray(12)), "tensor of 16 bytes does not fit host memory of 12"),
        (memoryview(bytes(16)), "writable"),
        (memoryview(bytearray(32))[::2], "contiguous"),
        (torch.zeros(8)[::2], "contiguous CPU tensor"),
    ]
    for target, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            copy_out([(source, first), (source, target)])
    assert first.tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="never end"):
        copy_out([], piece_bytes=0)


class InstantStream:
    """A stream that has always done what it was given."""

    device = torch.device("cpu")

    def __init__(self, *_: object, **__: object) -> None:
        self.synchronized = 0

    def wait_stream(self, stream: "InstantStream") -> None:
        assert stream is not self

    def record(self, stream: "InstantStream") -> None:
        assert stream is not self

    def synchronize(self) -> None:
        self.synchronized += 1


@pytest.mark.parametrize("sizes", [[], [10], [64], [65], [0, 300, 64, 7]])
def test_two_buffers_in_turn_carry_every_piece(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    """The way of a device's memory into memory that is not pinned, with instant streams."""
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, InstantStream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    buffers: list[torch.Tensor] = []

    def pinned(size_bytes: int) -> torch.Tensor:
        buffers.append(torch.empty(size_bytes, dtype=torch.uint8))
        return buffers[-1]

    monkeypatch.setattr(drain, "_pinned", pinned)
    lane = drain._DeviceLane(torch.device("cuda"))
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    targets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    for source, target in zip(sources, targets, strict=True):
        for begin in range(0, source.numel(), 64):
            piece, place = source[begin : begin + 64], target[begin : begin + 64]
            lane.pieces.append(drain._Piece(piece, place))
    lane.start()
    lane.finish()
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source, target)
    assert len(buffers) == (2 if sum(sizes) else 0)
    assert all(buffer.numel() <= 64 for buffer in buffers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_a_gpu_is_drained_in_pieces_behind_what_was_queued(pinned: bool) -> None:
    sources = [torch.zeros(size, device="cuda") for size in (5, 100_000, 1_000_003)]
    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
    for number, source in enumerate(sources):
        source.fill_(number + 1)
    targets = [torch.empty(source.shape, pin_memory=pinned) for source in sources]
    copy_out(list(zip(sources, targets, strict=True)), piece_bytes=1 << 18).wait()
    for number, target in enumerate(targets):
        assert bool((target == number + 1).all())
