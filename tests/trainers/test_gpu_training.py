"""A whole training on a GPU: captured, resumed, in 16 bits, and out of memory for real.

What the rest of these tests proves on a CPU holds on a GPU only if every tensor is where torch
wants it: the step counters of AdamW on the host, the scale of the loss on the device, a generator's
state in neither place twice. One case runs on the CPU as well, so that the test itself is tried.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agent import slabs as agent_slabs
from tests.trainers import tasks
from tests.trainers.test_capture import PLENTY, DeskSession, files_of
from trainers import checkpoint, compiling, exactness, loop

NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
)
CASES = [
    pytest.param("cpu", tasks.finetune_task, "float32"),
    *(
        pytest.param("cuda", make_task, precision, marks=NEEDS_GPU)
        for make_task in (tasks.finetune_task, tasks.lora_task, tasks.transfer_task)
        for precision in ("float32", "bfloat16", "float16")
    ),
]
ROUNDING = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}
"""Of a loss: kernels with atomic additions sum in the order in which they happen to finish."""

SAMPLE_BYTES = 256 << 20


@pytest.fixture
def desk() -> Iterator[agent_slabs.Slabs]:
    made = agent_slabs.Slabs(1.0, lambda: PLENTY)
    yield made
    made.close()


@pytest.mark.parametrize(("device", "make_task", "precision"), CASES)
def test_a_training_goes_on_from_its_capture(
    device: str,
    make_task: Callable[[], loop.Task],
    precision: str,
    desk: agent_slabs.Slabs,
    tmp_path: Path,
) -> None:
    options = replace(tasks.OPTIONS, precision=precision)
    session = DeskSession(desk, tmp_path / "staging")
    session.answers = True
    first = loop.Trainer(make_task(), options, session)
    loop.seed_everything(options.seed)
    first.prepare()
    assert first.device.type == device
    tasks.advance(first, 3)
    first.save()  # beside the next step
    tasks.advance(first, 1)
    first.save(last=True)
    assert [ticket.step for ticket in session.tickets] == [3, 4], "both went into the slab"
    kept = first.snapshot()
    stored = tmp_path / "stored"
    stored.mkdir()
    for name, data in files_of(desk).items():
        (stored / name).write_bytes(data)
    losses = tasks.advance(first, 4)  # before the second one has the generators, which are global
    first.close()
    second = tasks.started(make_task(), options)
    second.resume(checkpoint.read(stored))
    assert tasks.differences(kept, second.snapshot()) == []
    assert second.resumed is not None
    expected = exactness.Level.E0 if device == "cpu" else exactness.Level.E1
    assert second.resumed.level is expected
    rounding = 0.0 if device == "cpu" else ROUNDING[precision]
    assert tasks.advance(second, 4) == pytest.approx(losses, rel=rounding)
    second.close()


@pytest.fixture
def bits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `deterministic` switches on in this process is off again afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("bits")
def test_deterministic_steps_resume_bitwise_also_on_a_gpu(tmp_path: Path) -> None:
    options = replace(tasks.OPTIONS, deterministic=True)
    first = tasks.started(tasks.finetune_task(), options)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == exactness.CUBLAS_WORKSPACE
    assert not torch.backends.cudnn.benchmark
    tasks.advance(first, 3)
    kept = tasks.as_read(tmp_path / "one", first.snapshot())
    assert kept.state["manifest"]["fingerprint"]["deterministic"]
    losses, ended = tasks.advance(first, 4), first.snapshot()
    first.close()
    second = tasks.started(tasks.finetune_task(), options)
    second.resume(kept)
    assert second.resumed is not None
    assert second.resumed.level is exactness.Level.E0
    assert tasks.advance(second, 4) == losses
    assert tasks.differences(ended, second.snapshot()) == []
    second.close()


class Hungry(tasks.Around):
    """Takes so much of the device's memory for each sample."""

    def loss(self, batch: Any) -> torch.Tensor:
        scratch = torch.zeros(len(batch), SAMPLE_BYTES, dtype=torch.uint8, device=batch.device)
        return super().loss(batch) + 0.0 * scratch[:, 0].float().sum()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_full_gpu_makes_pieces_smaller() -> None:
    """Room for five samples of eight: half of them fit."""
    torch.cuda.empty_cache()
    whole_bytes = torch.cuda.get_device_properties(0).total_memory
    room_bytes = torch.cuda.memory_reserved() + 5 * SAMPLE_BYTES + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(room_bytes / whole_bytes)
    try:
        options = replace(tasks.OPTIONS, batch_size=8, accumulate=1)
        full = tasks.started(Hungry(tasks.finetune_task()), options)
        losses = tasks.advance(full, 3)
        full.close()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert full.micro_batch == 4
    small = tasks.started(tasks.finetune_task(), replace(options, batch_size=4, accumulate=2))
    assert tasks.advance(small, 3) == pytest.approx(losses, rel=ROUNDING["float32"])
    small.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_compiled_steps_on_a_gpu() -> None:
    if not compiling.found(torch.device("cuda")):
        pytest.skip("no compiler for a GPU here")
    plain = tasks.started(tasks.finetune_task(), tasks.OPTIONS)
    losses = tasks.advance(plain, 3)
    compiled = tasks.started(tasks.finetune_task(), replace(tasks.OPTIONS, compile=True))
    assert tasks.advance(compiled, 3) == pytest.approx(losses, rel=1e-2)
    plain.close()
    compiled.close()
