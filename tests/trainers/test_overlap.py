"""A capture that is copied while the next step runs is the state from before that step.

The copier here goes on only when the training lets it, piece by piece, at points that a seed
chooses in forward and backward passes: so every order of copying and computing can be had, and had
again. Safety: what is published is byte for byte the state of its step, and whatever is not
published leaves the capture before it as it was. Liveness: what was dropped is taken again.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch

import baton_sdk
from agent import slabs as agent_slabs
from tests.trainers import tasks
from tests.trainers.test_capture import (
    ATTEMPT,
    TASKS,
    DeskSession,
    desk,
    files_of,
    session,
)
from trainers import capture, checkpoint, loop, overlap, timing

__all__ = ["desk", "session"]

OPTIONS = replace(tasks.OPTIONS, checkpoint_every_steps=1)
DEADLINE_S = 120.0
PIECE_BYTES = 100
"""Most tensors here are larger."""

MakeTask = Callable[[], loop.Task]


class Copier:
    """Stands in for ``overlap._finish``: it takes a step only when it is let, and whoever lets it
    waits until the step is taken. ``free`` lets it run to its end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._allowed = 0
        self._taken = 0
        self._running = False
        self._free = False
        self.waits = 0

    def finish(self, pieces: overlap.Pieces, queued: Any) -> None:
        while (piece := pieces.take()) is not None:
            self._step()
            piece()
            self._told()
        queued.wait()
        with self._changed:
            self._running = False
            self._changed.notify_all()

    def began(self) -> None:
        """In the training's thread, before the work is handed over."""
        with self._changed:
            self._running, self._free, self._allowed, self._taken = True, False, 0, 0

    def let(self, steps: int) -> None:
        """So many pieces, or what there is."""
        with self._changed:
            self._allowed += steps
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._running or self._taken >= self._allowed, DEADLINE_S
            )

    def free(self) -> None:
        self.waits += 1
        with self._changed:
            self._free = True
            self._changed.notify_all()

    @property
    def running(self) -> bool:
        return self._running

    def _step(self) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: self._free or self._taken < self._allowed, DEADLINE_S
            )

    def _told(self) -> None:
        with self._changed:
            self._taken += 1
            self._changed.notify_all()


@pytest.fixture
def copier(monkeypatch: pytest.MonkeyPatch) -> Copier:
    made = Copier()
    monkeypatch.setattr(overlap, "PIECE_BYTES", PIECE_BYTES)
    begin, wait = overlap.Helper.begin, overlap.Copying.wait

    def beginning(helper: overlap.Helper, pairs: Sequence[overlap.Pair]) -> overlap.Copying:
        made.began()
        return begin(helper, pairs)

    def waiting(copying: overlap.Copying) -> None:
        made.free()
        wait(copying)

    monkeypatch.setattr(overlap, "_finish", made.finish)
    monkeypatch.setattr(overlap.Helper, "begin", beginning)
    monkeypatch.setattr(overlap.Copying, "wait", waiting)
    return made


class Letting(tasks.Around):
    """Lets the copier go on in every forward and every backward pass, as far as ``chance`` says."""

    def __init__(self, inner: loop.Task, copier: Copier, chance: random.Random) -> None:
        super().__init__(inner)
        self.copier = copier
        self.chance = chance

    def loss(self, batch: Any) -> torch.Tensor:
        self.some()
        found = self.inner.loss(batch)
        self.some()
        found.register_hook(self.backward)  # type: ignore[no-untyped-call]
        return found

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        self.some()
        return gradient

    def some(self) -> None:
        if self.copier.running:
            self.copier.let(self.chance.choice([0, 0, 1, 2, 7, 10_000]))


class Writing(tasks.Around):
    """A model that writes to one of its parameters in its forward pass, from a step on."""

    def __init__(self, inner: loop.Task, from_call: int = 0, *, frozen: bool = False) -> None:
        super().__init__(inner)
        self.calls = 0
        self.from_call = from_call
        self.frozen = frozen

    def loss(self, batch: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.from_call:
            written = next(p for p in self.model.parameters() if p.requires_grad is not self.frozen)
            with torch.no_grad():
                written.mul_(0.5)
        return self.inner.loss(batch)


def trainer(task: loop.Task, session: DeskSession, **options: Any) -> loop.Trainer:
    made = loop.Trainer(task, replace(OPTIONS, **options), session)
    loop.seed_everything(OPTIONS.seed)
    made.prepare()
    return made


def state_of(live: loop.Trainer) -> dict[str, bytes]:
    """The files of the state as it is now, made by the format's own library."""
    snapshot = live.snapshot()
    found = {
        f"{part}.safetensors": safetensors.torch.save(getattr(snapshot, part))
        for part in checkpoint.TENSOR_FILES
    }
    return {**found, checkpoint.STATE_FILE: checkpoint.encode_state(snapshot.state)}


@TASKS
@pytest.mark.parametrize("seed", range(25))
def test_every_order_of_copying_and_computing_gives_the_state_of_the_step(
    make_task: MakeTask, seed: int, desk: agent_slabs.Slabs, session: DeskSession, copier: Copier
) -> None:
    """Some 550 captures, each during the step after it, component by component."""
    live = trainer(Letting(make_task(), copier, random.Random(seed)), session)
    live.advance()
    for number in range(1, OPTIONS.steps):
        expected = state_of(live)
        live.save()
        assert len(session.tickets) == number - 1, "not before it is copied and looked at"
        live.advance()
        assert len(session.tickets) == number, "the update waits for the copy"
        found = files_of(desk)
        assert sorted(found) == sorted(expected)
        assert [name for name in found if found[name] != expected[name]] == []
        assert session.tickets[-1].step == live.step - 1
        session.answer(session.tickets[-1])
    assert copier.waits == OPTIONS.steps - 1


def test_what_the_helper_has_not_begun_the_training_copies(
    desk: agent_slabs.Slabs, session: DeskSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine where the helper does not get its turn; and it waits for what it has begun."""
    helped, held = threading.Event(), threading.Event()

    def slow(pieces: overlap.Pieces, queued: Any) -> None:
        piece = pieces.take()
        assert piece is not None
        helped.set()
        assert held.wait(DEADLINE_S)
        assert pieces.take() is None, "the training has taken them all"
        piece()
        queued.wait()

    monkeypatch.setattr(overlap, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(overlap, "_finish", slow)
    copy = overlap.Pieces.copy

    def copying(pieces: overlap.Pieces) -> None:
        copy(pieces)
        held.set()

    monkeypatch.setattr(overlap.Pieces, "copy", copying)
    live = trainer(tasks.finetune_task(), session)
    live.advance()
    expected = state_of(live)
    live.save()
    assert helped.wait(DEADLINE_S)
    live.advance()
    assert len(session.tickets) == 1
    assert files_of(desk) == expected


def test_until_it_is_published_the_capture_before_it_counts(
    desk: agent_slabs.Slabs, session: DeskSession, copier: Copier
) -> None:
    """At whichever piece its process is killed."""
    live = trainer(tasks.finetune_task(), session)
    live.advance()
    live.save()
    live.advance()
    before = files_of(desk)
    expected = state_of(live)
    live.save()
    pieces = 0
    while copier.running:
        assert files_of(desk) == before
        copier.let(1)
        pieces += 1
    assert pieces > 100
    assert files_of(desk) == before, "copied, but nobody has looked yet"
    live.settle()  # and waits: the last piece is copied a moment before its thread has returned
    assert files_of(desk) == expected
    newest = desk.newest(ATTEMPT)
    assert newest is not None
    assert newest.step == live.step


def test_a_process_killed_in_the_midst_of_a_copy_leaves_the_one_before(
    desk: agent_slabs.Slabs,
) -> None:
    granted = desk.grant(ATTEMPT, 1 << 20)
    assert not isinstance(granted, str)
    words = [granted.descriptor, granted.slot_bytes, granted.slots]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.trainers.killed_capture", *map(str, words)],
        pass_fds=[granted.descriptor],
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    newest = desk.newest(ATTEMPT)
    assert newest is not None
    assert newest.step == 1
    model = safetensors.torch.load(files_of(desk)["model.safetensors"])
    assert all(torch.equal(tensor, torch.ones(1000)) for tensor in model.values())
    slot = os.pread(granted.descriptor, granted.slot_bytes, 1 << 16)
    slot += os.pread(granted.descriptor, granted.slot_bytes, (1 << 16) + granted.slot_bytes)
    assert torch.full((1000,), 2.0).numpy().tobytes() in slot, "it was killed in the midst"


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_writes_to_its_parameters_is_captured_at_once_from_then_on(
    frozen: bool,
    desk: agent_slabs.Slabs,
    session: DeskSession,
    copier: Copier,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One capture is dropped, the next one is whole, and it is said once."""
    live = trainer(Writing(tasks.transfer_task(), frozen=frozen), session)
    live.advance()
    live.save()
    live.advance()
    assert session.tickets == []
    assert desk.newest(ATTEMPT) is None
    assert live.checkpoint_due()
    for number in range(1, 4):
        expected = state_of(live)
        live.save()
        assert len(session.tickets) == number
        assert files_of(desk) == expected
        live.advance()
        assert files_of(desk) == expected
        session.answer(session.tickets[-1])
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert len(warnings) == 1
    assert "writes to its parameters" in warnings[0]


def test_frozen_parameters_of_a_dropped_capture_are_copied_again(
    desk: agent_slabs.Slabs, session: DeskSession, copier: Copier
) -> None:
    """And so are those that are written to between two captures, without any harm to the first."""
    live = trainer(Writing(tasks.transfer_task(), from_call=2, frozen=True), session)
    live.advance()
    live.save()
    live.settle()
    first = files_of(desk)
    session.answer(session.tickets[-1])
    live.advance()
    assert files_of(desk) == first
    for _ in range(3):
        expected = state_of(live)
        live.save()
        live.settle()
        assert files_of(desk) == expected
        session.answer(session.tickets[-1])
        live.advance()


def test_an_update_that_does_not_wait_drops_the_capture(
    desk: agent_slabs.Slabs,
    session: DeskSession,
    copier: Copier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the edge before the update nothing wrong is published: torch counts the writes."""
    live = trainer(tasks.finetune_task(), session)
    live.advance()
    live.save()
    with monkeypatch.context() as without:
        without.setattr(loop.Trainer, "settle", lambda *_, **__: None)
        live.advance()
    live.settle()
    assert session.tickets == []
    assert desk.newest(ATTEMPT) is None


@pytest.mark.parametrize("end", ["leave", "finish", "close"])
def test_whoever_leaves_waits_for_the_copy(
    end: str, desk: agent_slabs.Slabs, session: DeskSession, copier: Copier
) -> None:
    live = trainer(tasks.transfer_task(), session)
    live.advance()
    expected = state_of(live)
    live.save()
    assert session.tickets == []
    if end == "leave":
        assert live.leave(baton_sdk.StopRequest("test", 0, 0.0)) == baton_sdk.EXIT_RUN_AGAIN
    elif end == "finish":
        session.answers = True
        assert live.finish() == 0
    else:
        live.close()
    assert len(session.tickets) == 1, "and no second one of the same step"
    assert files_of(desk) == expected


def test_a_step_that_is_taken_again_in_smaller_pieces_changes_no_capture(
    desk: agent_slabs.Slabs, session: DeskSession, copier: Copier
) -> None:
    """Out of memory in the midst of a copy: buffers and generators are put back, and the capture
    has those from before the step either way."""

    class Full(Letting):
        def loss(self, batch: Any) -> torch.Tensor:
            found = super().loss(batch)
            if len(batch["labels"]) > 2 and live.step == 1:
                raise torch.OutOfMemoryError("as if")
            return found

    live = trainer(Full(tasks.transfer_task(), copier, random.Random(3)), session)
    live.advance()
    expected = state_of(live)
    live.save()
    live.advance()
    assert live.micro_batch == 2
    assert files_of(desk) == expected


def test_what_goes_wrong_in_the_helper_is_raised_in_the_training(
    desk: agent_slabs.Slabs, session: DeskSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = trainer(tasks.transfer_task(), session)
    live.advance()

    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patched:
        patched.setattr(overlap, "move", broken)
        live._saver._capturer.begin(live._live(), live.step)
        with pytest.raises(RuntimeError, match="the device is gone"):
            live.advance()
    assert session.tickets == []
    expected = state_of(live)
    live.save()
    live.settle()
    assert files_of(desk) == expected


def test_memory_that_went_away_meanwhile_holds_no_capture(
    desk: agent_slabs.Slabs, session: DeskSession, copier: Copier
) -> None:
    live = trainer(tasks.transfer_task(), session)
    live.advance()
    live.save()
    session.granted = None  # the agent that has come took another one
    live.advance()
    assert session.tickets == []
    assert live.checkpoint_due()
    live.save()
    live.settle()
    assert len(session.tickets) == 1


def test_the_stall_is_both_waits(
    session: DeskSession, copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy at once, and what was left of the other one before the update; not what lies
    between the two."""
    now_s = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    copy, wait = overlap.copy, overlap.Copying.wait

    def slow_copy(pairs: Sequence[overlap.Pair]) -> None:
        now_s[0] += 1.0
        copy(pairs)

    def slow_wait(copying: overlap.Copying) -> None:
        now_s[0] += 2.0
        wait(copying)

    monkeypatch.setattr(overlap, "copy", slow_copy)
    monkeypatch.setattr(overlap.Copying, "wait", slow_wait)
    capturer = capture.Capturer(session)
    weight = torch.nn.Parameter(torch.ones(7))
    state = checkpoint.Snapshot({}, {"w": weight}, {}, {}, {})
    assert capturer.begin(state, 1)
    now_s[0] += 50.0
    assert capturer.settle() is not None
    assert capturer.stall_s == 3.0
    assert capturer.take(state, 2) is not None
    assert capturer.stall_s == 1.0


def test_the_training_accounts_for_both_waits(session: DeskSession, copier: Copier) -> None:
    live = trainer(tasks.transfer_task(), session)
    clock = [0.0]
    live.timing = timing.Timing(lambda: clock[0])
    live.advance()
    saved, settled = live._saver.save, live._saver.settle

    def save(*arguments: Any, **named: Any) -> Any:
        clock[0] += 1.0
        return saved(*arguments, **named)

    def settle(*, wait: bool = True) -> Any:
        clock[0] += 2.0 if wait and live._saver._capturer.begun else 0.0
        return settled(wait=wait)

    live._saver.save, live._saver.settle = save, settle  # type: ignore[method-assign]
    live.save()
    live.advance()
    assert live.timing.totals()[timing.CAPTURE_S] == 3.0
    assert live.timing.totals()[timing.STEP_S] == 0.0
