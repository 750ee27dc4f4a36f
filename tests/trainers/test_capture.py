"""A capture is the checkpoint's files, byte for byte, in memory that outlives its trainer.

The other end is the agent's own reader of slabs, so what these tests prove of the layout holds for
both programs, which may not import one another. Safety: what the reader takes for a capture is
whole, whatever the writer was doing when it ended; a slot that is being read is not written.
"""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

import baton_sdk
from agent import slabs as agent_slabs
from agent.ports import ChunkError
from baton_sdk import slab as sdk_slab
from tests.trainers import tasks
from trainers import capture, checkpoint, configuration, loop, pagelock, saving

ATTEMPT = "1.1"
PLENTY = 1 << 40
TASKS = pytest.mark.parametrize("make_task", [tasks.finetune_task, tasks.transfer_task])


class DeskSession(baton_sdk.Session):
    """A session whose slab comes from a desk in this process instead of over a socket."""

    def __init__(self, desk: agent_slabs.Slabs, staging: Path) -> None:
        super().__init__({"BATON_STAGING_DIR": str(staging), "BATON_SOCKET": "/nowhere"})
        self.desk = desk
        self.granted: sdk_slab.Slab | None = None
        self.tickets: list[baton_sdk.Ticket] = []
        self.answers = False
        """Whether every capture is answered at once."""

    def slab(self, slot_bytes: int, wait_s: float = 0.0) -> sdk_slab.Slab | None:
        if self.granted is None or self.granted.slot_bytes < slot_bytes:
            granted = self.desk.grant(ATTEMPT, slot_bytes)
            if isinstance(granted, str):
                return None
            self.granted = sdk_slab.Slab(
                os.dup(granted.descriptor), granted.slot_bytes, granted.slots
            )
            self.granted.open()
        return self.granted

    def capture(self, *arguments: Any, **named: Any) -> baton_sdk.Ticket:
        ticket = super().capture(*arguments, **named)
        self.tickets.append(ticket)
        if self.answers:
            self.answer(ticket)
        return ticket

    def answer(self, ticket: baton_sdk.Ticket) -> None:
        """As the agent does when it has stored it."""
        ticket.settle(baton_sdk.TicketState.STORED, digest="ab")


@pytest.fixture
def desk() -> Iterator[agent_slabs.Slabs]:
    made = agent_slabs.Slabs(1.0, lambda: PLENTY)
    yield made
    made.close()


@pytest.fixture
def session(desk: agent_slabs.Slabs, tmp_path: Path) -> DeskSession:
    (tmp_path / "staging").mkdir()
    return DeskSession(desk, tmp_path / "staging")


def trained(make_task: Callable[[], loop.Task], session: DeskSession, steps: int) -> loop.Trainer:
    made = loop.Trainer(make_task(), tasks.OPTIONS, session)
    loop.seed_everything(tasks.OPTIONS.seed)
    made.prepare()
    for _ in range(steps):
        made.advance()
    return made


def files_of(desk: agent_slabs.Slabs) -> dict[str, bytes]:
    """The newest capture, as the agent reads it."""
    found = desk.newest(ATTEMPT)
    assert found is not None
    with desk.reading(ATTEMPT, found.name) as source:
        read = {
            entry.path: source.read(entry.offset_bytes, entry.size_bytes) for entry in source.files
        }
        source.check()
    return read


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@TASKS
def test_a_capture_is_the_files_of_the_checkpoint(
    make_task: Callable[[], loop.Task],
    desk: agent_slabs.Slabs,
    session: DeskSession,
    tmp_path: Path,
) -> None:
    live = trained(make_task, session, 2)
    for number in range(4):  # both slots, and both once more
        checkpoint.write(live.snapshot(), tmp_path / str(number))
        live.save()
        live.settle()
        assert session.granted is not None
        assert files_of(desk) == bytes_of(tmp_path / str(number))
        found = desk.newest(ATTEMPT)
        assert found is not None
        assert found.step == live.step
        session.answer(session.tickets[-1])
        live.advance()
    assert list((tmp_path / "staging").iterdir()) == [], "no file was written"


@pytest.mark.parametrize("dtype", list(capture._NAMES))
def test_the_header_is_the_formats_own(dtype: torch.dtype) -> None:
    """For every type that the format knows, mixed with others, and for nothing at all."""
    tensors = {
        "b": torch.zeros(3, 2, dtype=dtype),
        "a": torch.ones(5),
        'ä"': torch.zeros(1, dtype=dtype),
        "z": torch.zeros((), dtype=torch.int64),
        "empty": torch.zeros(0, dtype=torch.bool),
    }
    for some in (tensors, {}):
        layout = capture.layout_of(some)
        assert layout is not None
        expected = save(some)
        assert expected.startswith(layout.header)
        assert len(expected) == layout.size_bytes


def test_a_type_that_files_cannot_hold_is_no_capture() -> None:
    assert capture.layout_of({"q": torch.zeros(1, dtype=torch.complex128)}) is None


def test_frozen_parameters_are_copied_once_for_each_slot_until_they_change(
    desk: agent_slabs.Slabs, session: DeskSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = trained(tasks.transfer_task, session, 1)
    filled: list[capture.Layout] = []
    views = capture._Memory.views

    def counting(memory: capture._Memory, *arguments: Any) -> list[torch.Tensor]:
        filled.append(arguments[1])
        return views(memory, *arguments)

    monkeypatch.setattr(capture._Memory, "views", counting)

    def frozen_fills(last: bool = False) -> int:
        filled.clear()
        written = tmp_path / f"written-{len(session.tickets)}"
        checkpoint.write(live.snapshot(), written)
        live.save(last=last)
        live.settle()
        session.answer(session.tickets[-1])
        assert (files_of(desk) == bytes_of(written)) is last_counts
        frozen = live.snapshot().frozen
        return sum(layout.key == capture.key_of(frozen) for layout in filled)

    last_counts = True  # every capture is to be what the files are
    assert [frozen_fills() for _ in range(4)] == [1, 1, 0, 0], "there are two slots"
    frozen = next(p for p in live.task.model.parameters() if not p.requires_grad)
    with torch.no_grad():
        frozen.add_(1.0)
    assert [frozen_fills() for _ in range(3)] == [1, 1, 0], "it was written to"
    frozen.data = frozen.data.clone() + 1
    assert [frozen_fills() for _ in range(3)] == [1, 1, 0], "it was exchanged"
    frozen.data.add_(1.0)  # past autograd's counter
    last_counts = False
    assert frozen_fills() == 0, "as the module says: not seen"
    last_counts = True
    assert frozen_fills(last=True) == 1, "the last capture trusts nothing"


def test_without_a_free_slot_it_is_postponed_and_the_last_one_becomes_a_directory(
    desk: agent_slabs.Slabs, session: DeskSession, tmp_path: Path
) -> None:
    live = trained(tasks.transfer_task, session, 1)
    live.save()
    live.settle()
    first = files_of(desk)
    live.save()
    live.settle()
    assert files_of(desk) != {}
    kept = bytes_of_slots(session)
    live.advance()
    live.save()
    assert bytes_of_slots(session) == kept, "what is being read is not written"
    assert len(session.tickets) == 2
    assert not live.checkpoint_due(), "as long as both are read"
    session.answer(session.tickets[0])
    assert live.checkpoint_due(), "it was put off, not dropped"
    live.save()
    live.settle()
    session.answer(session.tickets[-1])
    assert not live.checkpoint_due()
    session.tickets[-1].state = baton_sdk.TicketState.PENDING
    assert len(session.tickets) == 3
    assert files_of(desk) != first
    live.advance()
    live.save(last=True)
    assert len(session.tickets) == 3
    assert [path.name for path in (tmp_path / "staging").iterdir()] == ["checkpoint-000000003"]


def bytes_of_slots(session: DeskSession) -> bytes:
    assert session.granted is not None
    return bytes(session.granted.mapping)


def test_the_last_capture_waits_for_a_slot(session: DeskSession) -> None:
    live = trained(tasks.transfer_task, session, 1)
    live.save()
    live.save()
    answering = threading.Timer(0.01, lambda: session.answer(session.tickets[0]))
    answering.start()
    live.save(wait_s=60.0, last=True)
    answering.join()
    assert len(session.tickets) == 3


def test_no_slab_no_difference(session: DeskSession, tmp_path: Path) -> None:
    session.desk = agent_slabs.Slabs(0.0)
    live = trained(tasks.transfer_task, session, 1)
    session.close()
    live.save()
    assert [path.name for path in (tmp_path / "staging").iterdir()] == ["checkpoint-000000001"]
    assert checkpoint.read(tmp_path / "staging" / "checkpoint-000000001").frozen


def put(slab: sdk_slab.Slab, slot: int, sequence: int, data: bytes) -> None:
    """A capture of one file."""
    slab.begin(slot)
    begin = slab.offset_bytes(slot)
    slab.mapping[begin : begin + len(data)] = data
    slab.publish(slot, [("data", 0, len(data))], sequence=sequence, step=sequence * 10)


@given(
    at=st.integers(0, 2 * sdk_slab.HEADER_BYTES - 1),
    found=st.binary(min_size=1, max_size=64),
)
def test_whatever_a_header_is_torn_to_the_reader_takes_a_whole_one_or_none(
    at: int, found: bytes
) -> None:
    desk = agent_slabs.Slabs(1.0, lambda: PLENTY)
    granted = desk.grant(ATTEMPT, 5000)
    assert not isinstance(granted, str)
    slab = sdk_slab.Slab(os.dup(granted.descriptor), granted.slot_bytes, granted.slots)
    slab.open()
    put(slab, 0, 1, b"one" * 1000)
    put(slab, 1, 2, b"two" * 1000)
    slab.mapping[at : at + len(found)] = found
    newest = desk.newest(ATTEMPT)
    if newest is not None:
        content = files_of(desk)["data"]
        assert content == {10: b"one" * 1000, 20: b"two" * 1000}[newest.step]
    slab.close()
    desk.close()


def test_the_highest_valid_header_wins_and_one_being_written_is_none(
    desk: agent_slabs.Slabs, session: DeskSession
) -> None:
    slab = session.slab(5000)
    assert slab is not None
    assert desk.newest(ATTEMPT) is None
    put(slab, 1, 1, b"one")
    put(slab, 0, 2, b"two")
    newest = desk.newest(ATTEMPT)
    assert newest is not None
    with desk.reading(ATTEMPT, newest.name) as source:
        slab.begin(0)  # from here the payload may be anything
        with pytest.raises(ChunkError, match="overwritten"):
            source.check()
    before = desk.newest(ATTEMPT)
    assert before is not None
    assert (newest.step, before.step) == (20, 10)
    put(slab, 0, 3, b"three")
    slab.mapping[slab.offset_bytes(0)] ^= 1  # behind its header's back
    newest = desk.newest(ATTEMPT)
    assert newest is not None
    altered = pytest.raises(ChunkError, match="not what its header describes")
    with desk.reading(ATTEMPT, newest.name) as source, altered:
        source.check()


def test_one_slot_where_two_do_not_fit(tmp_path: Path) -> None:
    desk = agent_slabs.Slabs(0.5, lambda: 1_000_000)
    session = DeskSession(desk, tmp_path)
    slab = session.slab(300_000)
    assert slab is not None
    assert slab.slots == 1
    live = capture.Capturer(session)
    state = checkpoint.Snapshot({}, {"w": torch.arange(7.0)}, {}, {}, {"a": 1})
    assert live.take(state, 1) is not None
    assert live.take(state, 2) is None
    assert live.busy
    session.answer(session.tickets[0])
    assert live.take(state, 3) is not None
    assert files_of(desk)["model.safetensors"] == save({"w": torch.arange(7.0)})
    desk.close()


def test_a_state_that_outgrows_its_slot_gets_another_slab(
    desk: agent_slabs.Slabs, session: DeskSession
) -> None:
    capturer = capture.Capturer(session)
    small = checkpoint.Snapshot({}, {"w": torch.zeros(7)}, {}, {}, {})
    assert capturer.take(small, 1) is not None
    large = checkpoint.Snapshot({}, {"w": torch.ones(50_000)}, {}, {}, {})
    assert capturer.take(large, 2) is not None
    assert files_of(desk)["model.safetensors"] == save({"w": torch.ones(50_000)})
    first, second = session.tickets
    assert (first.sequence, second.sequence) == (1, 2)


class RecordingDriver:
    """Of CUDA: which memory it was told to lock and to let go."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.told: list[tuple[str, int]] = []

    def cuMemHostRegister_v2(self, address: Any, size_bytes: Any, flags: Any) -> int:
        assert (size_bytes.value > 0, flags.value) == (True, pagelock.PORTABLE)
        self.told.append(("lock", address.value))
        return 304 if self.refuses else 0

    def cuMemHostUnregister(self, address: Any) -> int:
        # Unmapped while it is locked, it would be taken for locked when something else lies there.
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        assert f"\n{address.value:x}-" in maps
        self.told.append(("release", address.value))
        return 0


@pytest.mark.parametrize("refuses", [False, True])
def test_memory_is_locked_once_and_let_go_before_it_is_exchanged(
    refuses: bool, session: DeskSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = RecordingDriver(refuses=refuses)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(pagelock, "loaded_driver", lambda: driver)
    session.answers = True
    capturer = capture.Capturer(session)
    places = []
    for step, count in enumerate((7, 7, 50_000, 50_000)):
        state = checkpoint.Snapshot({}, {"w": torch.ones(count)}, {}, {}, {})
        assert capturer.take(state, step) is not None
        slab = session.granted
        assert slab is not None
        address = torch.frombuffer(slab.mapping, dtype=torch.uint8).data_ptr()
        if address not in places:
            places.append(address)
    first, second = places
    released = [] if refuses else [("release", first)]
    assert driver.told == [("lock", first), *released, ("lock", second)]
    driver.told.clear()
    del capturer
    assert driver.told == ([] if refuses else [("release", second)])


def test_youngs_rule_within_its_bounds() -> None:
    day_s = 86_400.0
    assert capture.interval_s(0.005, 500_000_000, day_s) == pytest.approx(29.39, abs=0.01)
    assert capture.interval_s(2.0, 2_000_000_000, day_s) == pytest.approx(587.88, abs=0.01)
    assert capture.interval_s(2.0, 999_999_999, day_s) == 60.0, "small: once a minute at least"
    assert capture.interval_s(0.0, 1, day_s) == capture.INTERVAL_MIN_S
    assert capture.interval_s(1e6, 2_000_000_000, day_s) == capture.INTERVAL_MAX_S
    assert capture.interval_s(None, 2_000_000_000, day_s) == 60.0


def test_the_operators_interval_counts(session: DeskSession) -> None:
    chosen = configuration.LoopOptions(steps=9, checkpoint_every_s=7.0)
    by_rule = configuration.LoopOptions(steps=9)
    never = configuration.LoopOptions(steps=9, checkpoint_every_s=0)
    dues = [saving.Saver(session, options).due(1, 30.0) for options in (chosen, by_rule, never)]
    assert dues == [True, False, False]
    assert saving.Saver(session, by_rule).due(1, 60.0)
    assert by_rule.problems() == []
    wrong = configuration.LoopOptions(steps=9, checkpoint_every_s=-3.0)
    assert wrong.problems() == [
        "'checkpoint_every_s' must be a number of at least 0, or -1, not -3.0"
    ]


def test_how_often_things_fail_is_the_fleets_unless_it_is_said(
    session: DeskSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def interval_s(stall_s: float | None, state_bytes: int, mean_s: float) -> float:
        asked.append(mean_s)
        return 60.0

    monkeypatch.setattr(capture, "interval_s", interval_s)
    variable = "BATON_MEAN_TIME_BETWEEN_FAILURES_S"
    unseen, seen = baton_sdk.Session({}), baton_sdk.Session({variable: "7200"})
    for chosen_s in (configuration.AUTOMATIC_S, 50.0):
        options = configuration.LoopOptions(steps=9, mean_time_between_failures_s=chosen_s)
        assert options.problems() == []
        for one in (unseen, seen):
            saving.Saver(one, options).due(1, 30.0)
    assert asked == [86_400.0, 7_200.0, 50.0, 50.0]


CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_capture_sees_what_was_queued_before_it(
    device: str, desk: agent_slabs.Slabs, session: DeskSession
) -> None:
    live = checkpoint.Snapshot(
        model={"weight": torch.zeros(1_000_003, device=device), "count": torch.tensor(3)},
        frozen={"base": torch.arange(100_000, device=device)},
        optimizer={},
        random={},
        state={},
    )
    if device == "cuda":
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
    live.model["weight"].fill_(7)
    assert capture.Capturer(session).take(live, 1, wait_s=10) is not None
    for part in ("model", "frozen"):
        on_host = {name: tensor.cpu() for name, tensor in getattr(live, part).items()}
        assert files_of(desk)[f"{part}.safetensors"] == save(on_host)


def test_a_file_that_grows_and_shrinks_again_leaves_the_one_behind_it_whole(tmp_path: Path) -> None:
    """What lies behind it moves and comes back, to where the larger one had lain meanwhile."""
    desk = agent_slabs.Slabs(1.0, lambda: PLENTY)
    session = DeskSession(desk, tmp_path)
    session.answers = True
    session.slab(1 << 22)
    capturer = capture.Capturer(session)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    for step, cached in enumerate((100, 100, 5_000, 5_000, 100, 100)):
        live = checkpoint.Snapshot(
            frozen={},
            model={"weight": weight, "cache": torch.full((cached,), 7.0)},
            optimizer={"weight|exp_avg": torch.randn(64, 64)},
            random={"torch_cpu": torch.zeros(8)},
            state={"step": step},
        )
        assert capturer.take(live, step) is not None
        found = files_of(desk)
        for part in checkpoint.TENSOR_FILES:
            assert found[f"{part}.safetensors"] == save(getattr(live, part)), (step, part)
