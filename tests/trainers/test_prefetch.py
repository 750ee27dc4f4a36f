"""A prefetcher hands out what was made, in order, from memory that it uses again.

All of it runs on the CPU; the race test at the end needs a CUDA device. The state machine and its
edges are in ``test_prefetch_machine``.
"""

import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers.test_prefetch_machine import without
from trainers import prefetch, prefetch_slots
from trainers.prefetch import Prefetcher
from trainers.prefetch_slots import Order

CPU = torch.device("cpu")
DEADLINE_S = 120.0
"""For what another thread does at once; reached only where something is broken."""

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class Pair(NamedTuple):
    left: Any
    right: Any


def numbered(index: int) -> torch.Tensor:
    return torch.full((4,), float(index))


def values(prefetcher: Prefetcher) -> Iterator[float]:
    while True:
        try:
            yield float(prefetcher.next().batch[0])
        except StopIteration:
            return


def same(one: Any, other: Any) -> bool:
    """The same nesting with the same leaves: types, shapes and content."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and torch.equal(one, other)
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 0, 4), (2, 3, 4, 5)])
DTYPES = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
TENSORS = st.builds(
    lambda shape, dtype, seed: (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(9).to(dtype)
    ),
    SHAPES,
    DTYPES,
    st.integers(0, 99),
)
LEAVES = TENSORS | st.none() | st.integers() | st.text(max_size=3)
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=40)
@given(st.lists(NESTED, min_size=1, max_size=5), st.integers(1, 3))
def test_any_nesting_comes_through_in_order(batches: list[Any], depth: int) -> None:
    with Prefetcher(batches.__getitem__, device=CPU, depth=depth, stop=len(batches)) as prefetcher:
        for batch in batches:
            assert same(batch, prefetcher.next().batch)
        with pytest.raises(StopIteration):
            prefetcher.next()
        with pytest.raises(StopIteration):
            prefetcher.next()


def test_indices_start_at_first_and_end_before_stop() -> None:
    with Prefetcher(numbered, device=CPU, first=7, stop=12) as prefetcher:
        assert list(values(prefetcher)) == [7, 8, 9, 10, 11]
    with Prefetcher(numbered, device=CPU, first=7, stop=7) as prefetcher:
        assert list(values(prefetcher)) == []


def test_layouts_are_kept_where_a_copy_would_keep_them() -> None:
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    gaps = torch.arange(24.0).reshape(4, 6)[:, ::2]
    wide = torch.ones(1).expand(3, 4)
    grown = torch.ones(3, requires_grad=True) * 2
    with Prefetcher(lambda _: [images, gaps, wide, grown], device=CPU) as prefetcher:
        batch = prefetcher.next().batch
        assert batch[0].is_contiguous(memory_format=torch.channels_last)
        assert batch[1].stride() == (3, 1)
        assert same(batch[:3], [images, gaps, wide])
        assert not batch[3].requires_grad
        steps_bytes = [tensor.data_ptr() - batch[0].data_ptr() for tensor in batch]
        assert [step % prefetch.ALIGNMENT_BYTES for step in steps_bytes] == [0] * 4


def test_other_mappings_arrive_as_dicts() -> None:
    made = OrderedDict(b=torch.ones(1), a=torch.zeros(1))
    with Prefetcher(lambda _: made, device=CPU) as prefetcher:
        assert same(dict(made), prefetcher.next().batch)


def test_what_is_no_dense_cpu_tensor_is_refused() -> None:
    with (
        Prefetcher(lambda _: torch.eye(3).to_sparse(), device=CPU) as prefetcher,
        pytest.raises(TypeError, match=r"layout torch\.sparse_coo on cpu"),
    ):
        prefetcher.next()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_batch_is_whole_until_the_next_and_then_its_memory_is_used_again(depth: int) -> None:
    made = threading.Semaphore(0)

    def make(index: int) -> torch.Tensor:
        made.release()  # the batch before this one is in its slot
        return numbered(index)

    with Prefetcher(make, device=CPU, depth=depth) as prefetcher:
        first = prefetcher.next().batch
        for _ in range(depth + 1):
            assert made.acquire(timeout=DEADLINE_S)
        # Everything that can be made ahead is made, and what is in use is as it was.
        assert first.tolist() == [0.0] * 4
        places = {first.data_ptr()}
        for _ in range(4 * depth):
            places.add(prefetcher.next().batch.data_ptr())
        assert len(places) == depth
        assert first.tolist() != [0.0] * 4, "the one who keeps a batch reads another"


def test_autograd_refuses_a_batch_that_was_kept() -> None:
    weight = torch.ones(4, requires_grad=True)
    with Prefetcher(numbered, device=CPU, depth=1) as prefetcher:
        kept = (prefetcher.next().batch * weight).sum()
        fresh = (prefetcher.next().batch * weight).sum()
        fresh.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward()


def test_a_batch_may_be_written_and_differentiated() -> None:
    weight = torch.full((4,), 3.0, requires_grad=True)
    with Prefetcher(numbered, device=CPU, first=2, stop=6) as prefetcher:
        for expected in (2.0, 3.0, 4.0, 5.0):
            batch = prefetcher.next().batch
            assert batch.tolist() == [expected] * 4
            batch.requires_grad_()
            (batch * 2).sum().backward()
            assert batch.grad.tolist() == [2.0] * 4
            batch.detach().mul_(weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [14.0] * 4


def test_ragged_batches_grow_the_slots_and_say_so_once_a_growth() -> None:
    lengths = [100, 50, 100, 300, 310, 375, 2, 2000, 2000, 2000]
    said: list[str] = []

    def make(index: int) -> torch.Tensor:
        return torch.full((lengths[index] * prefetch.ALIGNMENT_BYTES,), index, dtype=torch.uint8)

    with Prefetcher(
        make, device=CPU, depth=3, stop=len(lengths), on_grow=said.append
    ) as prefetcher:
        for index, length in enumerate(lengths):
            batch = prefetcher.next().batch
            assert batch.numel() == length * prefetch.ALIGNMENT_BYTES
            assert bool((batch == index).all())
    assert said == [
        "batch 3 needs 0.07 MiB: the 3 prefetch slots grow from 0.02 to 0.09 MiB",
        "batch 7 needs 0.49 MiB: the 3 prefetch slots grow from 0.09 to 0.61 MiB",
    ]


def test_growing_needs_nobody_to_listen() -> None:
    with Prefetcher(lambda index: torch.ones(9**index), device=CPU, stop=5) as prefetcher:
        assert [prefetcher.next().batch.numel() for _ in range(5)] == [1, 9, 81, 729, 6561]


def spoiled(index: int) -> torch.Tensor:
    if index == 5:
        raise OSError("no such image")
    return numbered(index)


def test_an_error_is_raised_at_its_index_with_its_own_traceback() -> None:
    with Prefetcher(spoiled, device=CPU, first=2, depth=3) as prefetcher:
        assert [float(prefetcher.next().batch[0]) for _ in range(3)] == [2, 3, 4]
        for _ in range(2):
            with pytest.raises(OSError, match="no such image") as caught:
                prefetcher.next()
            frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
            assert "spoiled" in frames


def test_stop_iteration_from_make_is_not_the_end_of_the_data() -> None:
    empty: Iterator[int] = iter(())
    with (
        Prefetcher(lambda _: next(empty), device=CPU) as prefetcher,
        pytest.raises(RuntimeError, match="batch 0 raised StopIteration"),
    ):
        prefetcher.next()


def test_make_runs_on_one_other_thread() -> None:
    threads: list[int] = []

    def make(index: int) -> torch.Tensor:
        threads.append(threading.get_ident())
        return numbered(index)

    with Prefetcher(make, device=CPU, stop=20) as prefetcher:
        assert len(list(values(prefetcher))) == 20
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads


def test_no_more_than_a_ring_and_one_are_made_ahead() -> None:
    made: list[int] = []
    taken = 0
    ahead: list[int] = []

    def make(index: int) -> torch.Tensor:
        made.append(index)
        ahead.append(index - taken)
        return numbered(index)

    with Prefetcher(make, device=CPU, depth=3, stop=50) as prefetcher:
        for _ in values(prefetcher):
            taken += 1
    assert made == list(range(50))
    assert max(ahead) <= 3


def test_a_batch_that_is_there_is_not_waited_for() -> None:
    third = threading.Event()

    def make(index: int) -> torch.Tensor:
        if index == 2:
            third.set()  # 0 and 1 are in their slots
        return numbered(index)

    with Prefetcher(make, device=CPU, depth=2) as prefetcher:
        assert third.wait(DEADLINE_S)
        assert prefetcher.next().input_wait_s == 0.0
        assert prefetcher.next().input_wait_s == 0.0
        assert prefetcher.input_wait_s_total == 0.0


def test_waiting_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def make(index: int) -> torch.Tensor:
        assert gate.wait(DEADLINE_S)
        return numbered(index)

    with Prefetcher(make, device=CPU, stop=1) as prefetcher:
        plain = prefetcher._changed.wait_for

        def wait_for(predicate: Callable[[], bool]) -> bool:
            if threading.current_thread() is threading.main_thread():
                gate.set()  # only now can there be a batch: the training thread is waiting
            return plain(predicate)

        monkeypatch.setattr(prefetcher._changed, "wait_for", wait_for)
        waited_s = prefetcher.next().input_wait_s
        assert waited_s > 0.0
        assert prefetcher.input_wait_s_total == waited_s


def test_closing_ends_the_thread_wherever_it_is() -> None:
    for taken in range(5):
        prefetcher = Prefetcher(numbered, device=CPU)
        prefetcher.open()
        for _ in range(taken):
            prefetcher.next()
        prefetcher.close()
        assert prefetcher._feeder is not None
        assert not prefetcher._feeder.is_alive()
        prefetcher.close()
        with pytest.raises(RuntimeError, match="closed"):
            prefetcher.next()
        with pytest.raises(RuntimeError, match="opened once"):
            prefetcher.open()


def test_closing_after_an_error_of_the_training_leaves_no_thread() -> None:
    prefetcher = Prefetcher(numbered, device=CPU)

    def train() -> None:
        with prefetcher:
            prefetcher.next()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert prefetcher._feeder is not None
    assert not prefetcher._feeder.is_alive()


def test_closing_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "CLOSE_WAIT_S", 0.05)
    gate = threading.Event()

    def make(index: int) -> torch.Tensor:
        if index == 1:
            gate.wait()
        return numbered(index)

    prefetcher = Prefetcher(make, device=CPU)
    prefetcher.open()
    assert float(prefetcher.next().batch[0]) == 0
    with pytest.warns(RuntimeWarning, match="did not come in 0.05 s"):
        prefetcher.close()
    gate.set()
    assert prefetcher._feeder is not None
    prefetcher._feeder.join(DEADLINE_S)
    assert not prefetcher._feeder.is_alive(), "what came too late is dropped, and the thread ends"


def test_a_waiting_next_is_woken_by_close() -> None:
    gate = threading.Event()
    raised: list[BaseException] = []

    def make(index: int) -> torch.Tensor:
        gate.wait()
        return numbered(index)

    def consume() -> None:
        try:
            prefetcher.next()
        except RuntimeError as error:
            raised.append(error)

    prefetcher = Prefetcher(make, device=CPU)
    prefetcher.open()
    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=prefetcher.close)
    closer.start()
    consumer.join(DEADLINE_S)
    gate.set()
    closer.join(DEADLINE_S)
    assert [str(error) for error in raised] == ["the prefetcher is closed"]


def test_what_cannot_be_is_refused() -> None:
    for depth in (0, prefetch.DEPTH_MAX + 1):
        with pytest.raises(ValueError, match="is not between 1 and 16"):
            Prefetcher(numbered, device=CPU, depth=depth)
    with pytest.raises(ValueError, match="not to meta"):
        Prefetcher(numbered, device=torch.device("meta"))
    unopened = Prefetcher(numbered, device=CPU)
    with pytest.raises(RuntimeError, match="not open"):
        unopened.next()
    unopened.close()


# On a GPU.

RACE_BATCHES = 24
RACE_SHAPE = (1 << 20,)  # 4 MiB: the copy takes longer than starting it
LONG_KERNEL_CYCLES = 20_000_000  # about 10 ms at 2 GHz: the host is far ahead


def race(depth: int) -> list[int]:
    """The indices of the batches that were another's when a kernel behind a long one read them."""
    device = torch.device("cuda")

    def make(index: int) -> dict[str, Any]:
        return {"x": torch.full(RACE_SHAPE, index, dtype=torch.int32), "index": index}

    seen = torch.zeros(RACE_BATCHES, dtype=torch.int64, device=device)
    with Prefetcher(make, device=device, depth=depth, stop=RACE_BATCHES) as prefetcher:
        for index in range(RACE_BATCHES):
            batch = prefetcher.next().batch
            assert batch["index"] == index
            assert batch["x"].is_cuda
            torch.cuda._sleep(LONG_KERNEL_CYCLES)  # type: ignore[no-untyped-call]
            seen[index] = (batch["x"] == index).sum()
    return [index for index, count in enumerate(seen.tolist()) if count != RACE_SHAPE[0]]


@NEEDS_CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("depth", [2, 3])
def test_no_batch_is_overwritten_behind_a_long_kernel(depth: int) -> None:
    assert race(depth) == []


@NEEDS_CUDA
@pytest.mark.gpu
def test_the_race_test_sees_a_missing_free_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_slots, "TABLE", without(Order.COPY_AFTER_FREE))
    assert race(2) != []


@NEEDS_CUDA
@pytest.mark.gpu
def test_slots_grow_on_a_gpu_while_they_are_read() -> None:
    device = torch.device("cuda")
    sizes = [1 << (8 + index) for index in range(12)]

    def make(index: int) -> torch.Tensor:
        return torch.full((sizes[index],), index, dtype=torch.int32)

    counts = torch.zeros(len(sizes), dtype=torch.int64, device=device)
    with Prefetcher(make, device=device, depth=3, stop=len(sizes)) as prefetcher:
        for index in range(len(sizes)):
            batch = prefetcher.next().batch
            torch.cuda._sleep(LONG_KERNEL_CYCLES // 10)  # type: ignore[no-untyped-call]
            counts[index] = (batch == index).sum()
    assert counts.tolist() == sizes
