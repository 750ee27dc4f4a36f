"""Compiled steps: the same names, the same bits after a resume, and no need of a compiler.

A node that has never seen a model compiles it, which a training that goes on there does for real;
the others find what the first has compiled, as jobs of one node do. The model is a head on features
that are known, so that compiling takes seconds.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import utils as inductor

import baton_sdk
from tests.trainers import tasks
from tests.trainers.gang import Host
from trainers import checkpoint, compiling, exactness, loop

COMPILED = replace(tasks.OPTIONS, compile=True, steps=7)
CPU = torch.device("cpu")
STOP_AT = 3

# Compilers get what other tests leave of the machine; nothing here waits for anything.
RANKS_S_MAX = 250
COMPILING_TIMEOUT_S = 2 * RANKS_S_MAX + 20
# One worker compiles for all.
pytestmark = [pytest.mark.xdist_group("compiling"), pytest.mark.timeout(COMPILING_TIMEOUT_S)]
needs_compiler = pytest.mark.skipif(
    not compiling.found(CPU), reason="there is no C++ compiler, which torch.compile needs on a CPU"
)


class Told(baton_sdk.Session):
    """Outside Baton; keeps the sections that it is told of."""

    def __init__(self) -> None:
        super().__init__({})
        self.sections: list[str] = []

    def enter(self, name: str) -> None:
        self.sections.append(name)


def started(session: baton_sdk.Session, *, compile: bool = True) -> loop.Trainer:
    made = loop.Trainer(
        tasks.transfer_task(keep_features=True), replace(COMPILED, compile=compile), session
    )
    loop.seed_everything(COMPILED.seed)
    made.prepare()
    return made


def advance_to(trainer: loop.Trainer, step: int) -> list[float]:
    """Evaluations included, as ``run`` does."""
    losses = []
    while trainer.step < step:
        losses.append(trainer.advance())
        if trainer.step % COMPILED.evaluate_every == 0:
            trainer.evaluate()
    trainer.close()
    return losses


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests of this file have compiled."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def on_node(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A process that begins there has compiled nothing; returns where its node keeps that."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # helpers would import torch

    def move(name: str) -> Path:
        inductor.clear_caches()
        torch.compiler.reset()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(kept / name))
        return kept / name

    return move


@needs_compiler
def test_a_compiled_training_goes_on_bit_for_bit(
    on_node: Callable[[str], Path], tmp_path: Path
) -> None:
    on_node("first")
    session = Told()
    straight = started(session)
    expected = advance_to(straight, STOP_AT)
    saved = tasks.as_read(tmp_path / "checkpoint", straight.snapshot())
    expected += advance_to(straight, COMPILED.steps)
    assert [name for name in session.sections if name != "eval"] == ["compile"] + ["step"] * 6
    cache = on_node("second")
    second = started(Told())
    second.resume(saved)
    assert second.resumed is not None
    assert second.resumed.level is exactness.Level.E0, second.resumed.why
    assert expected[STOP_AT:] == advance_to(second, COMPILED.steps)
    assert tasks.differences(straight.snapshot(), second.snapshot()) == []
    assert list(cache.rglob("*.so")), "nothing was compiled"


@needs_compiler
def test_a_checkpoint_of_compiled_steps_is_one_like_any_other(
    on_node: Callable[[str], Path], tmp_path: Path
) -> None:
    on_node("first")
    compiled = started(Told())
    advance_to(compiled, STOP_AT)
    saved = tasks.as_read(tmp_path / "checkpoint", compiled.snapshot())
    plain = started(Told(), compile=False)
    advance_to(plain, STOP_AT)
    for part in checkpoint.TENSOR_FILES:
        assert getattr(saved, part).keys() == getattr(plain.snapshot(), part).keys()
    plain.resume(saved)
    assert plain.resumed is not None
    assert plain.resumed.level is exactness.Level.E1
    assert f"the compiler was {compiling.found(CPU)} and is none" in plain.resumed.why
    advance_to(plain, COMPILED.steps)


@needs_compiler
def test_smaller_pieces_are_compiled_anew_and_said_to_be(
    on_node: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_node("first")
    session = Told()
    trainer = started(session)
    whole: Any = trainer.task.loss
    pieces: list[int] = []

    def too_large(batch: Any) -> torch.Tensor:
        pieces.append(len(batch["labels"]))
        if pieces[-1] > 2:
            raise torch.OutOfMemoryError("no room")
        loss: torch.Tensor = whole(batch)
        return loss

    monkeypatch.setattr(trainer.task, "loss", too_large)
    advance_to(trainer, 2)
    assert session.sections == ["eval", "compile", "compile", "step"]
    assert pieces == [4] + [2] * 8


@needs_compiler
def test_ranks_compile_what_is_spread_over_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no helpers, which import torch too
    chosen: dict[str, Any] = {
        "compile": True,
        "steps": 4,
        "batch_size": 8,
        "log_every": 1,
        "checkpoint_every_steps": 2,
        "checkpoint_every_s": 0,
        "dropout": 0.2,
        "noisy": True,
    }
    kept, again = tmp_path / "kept", tmp_path / "again"
    with Host(tmp_path, RANKS_S_MAX) as host:
        straight = host.run(2, **chosen, checkpoint_directory=str(kept))
        assert [rank.status for rank in straight] == [0, 0], straight[0].err
        again.mkdir()
        (kept / "checkpoint-000000002").rename(again / "checkpoint-000000002")
        resumed = host.run(2, **chosen, checkpoint_directory=str(again))
    assert resumed[0].event("resumed")["level"] == "E0", resumed[0].event("resumed")
    assert resumed[0].losses == straight[0].losses[2:]


@needs_compiler
def test_another_model_is_compiled_like_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that ran out of memory go on with one that has never been in the middle of a pass."""
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **_: compiled.append(model))
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    made = compiling.Compiling(first, wanted=True)
    made.follow(second)
    assert compiled == [], "nothing is compiled before it is opened"
    made = compiling.Compiling(first, wanted=True)
    made.open(torch.device("cpu"), lambda *_, **__: None)
    assert [made.section(), made.section()] == ["compile", "step"]
    made.follow(first)
    assert made.section() == "step"
    made.follow(second)
    assert [made.section(), made.section()] == ["compile", "step"]
    assert made.again(first)
    assert made.section() == "step", "the step that is taken again was announced"
    assert [model is first for model in compiled] == [True, False, True]


def test_without_a_compiler_it_trains_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    session = Told()
    trainer = started(session)
    losses = advance_to(trainer, COMPILED.steps)
    assert compiling.NO_COMPILER in capsys.readouterr().out
    assert "compile" not in session.sections
    assert losses == advance_to(started(Told(), compile=False), COMPILED.steps)


def test_what_says_no_version_is_no_compiler() -> None:
    assert compiling.version_of("false") == ""
    assert compiling.version_of("/") == ""


def test_a_gpu_wants_triton_a_compiler_and_pythons_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "Python.h").touch()
    there = {"triton": True, "CC": "gcc", "headers": str(tmp_path)}

    def found(**lacking: Any) -> str:
        now = {**there, **lacking}
        with monkeypatch.context() as patched:
            patched.setattr("importlib.util.find_spec", lambda _: now["triton"] or None)
            patched.setattr("importlib.metadata.version", lambda _: "3.9.0")
            patched.setattr("shutil.which", lambda _: now["CC"])
            patched.setattr("sysconfig.get_path", lambda _: now["headers"])
            patched.delenv("CC", raising=False)
            return compiling.found(torch.device("cuda"))

    assert found() == "triton 3.9.0"
    assert found(triton=None) == found(CC=None) == found(headers=str(tmp_path / "none")) == ""
