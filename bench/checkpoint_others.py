"""What `bench.checkpoint` saves, and the well-known ways to save it.

Problem: a way of saving is fast or slow with a state, and a state that no training has made is
none: sizes, numbers of tensors, and what changes from step to step decide. So the state is that of
a training by AdamW, of layers as large as those of a small model, of which one half is frozen.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from trainers import checkpoint

WIDTH = 1408  # of each layer: 8 MB

State = dict[str, torch.Tensor]


class Pool:
    """A training: its state, and its steps."""

    def __init__(self, size_gb: float, directory: Path, device: str = "cpu") -> None:
        self.directory = directory
        self.device = device
        count = max(8, round(size_gb * 1e9 / (4 * WIDTH**2)))
        trained = max(1, count // 6)  # and two moments for each
        weights = [
            torch.nn.Parameter(torch.randn(WIDTH, WIDTH, device=device) / WIDTH**0.5)
            for _ in range(count - 2 * trained)
        ]
        self._layers = weights
        for weight in weights[:-trained]:
            weight.requires_grad_(False)
        self.frozen = {f"frozen.{i:04d}": w for i, w in enumerate(weights[:-trained])}
        self.model = {f"layer.{i:04d}": w for i, w in enumerate(weights[-trained:])}
        self._adam = torch.optim.AdamW(self.model.values(), lr=1e-6)
        self.step = 0
        self.compute(1)
        self.advance()
        self.optimizer = {
            f"{name}|{key}": value
            for name, weight in self.model.items()
            for key, value in self._adam.state[weight].items()
        }

    @property
    def whole(self) -> State:
        found = {**self.frozen, **self.model, **self.optimizer}
        return {name: tensor.detach() for name, tensor in found.items()}

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.whole.values())

    def live(self) -> checkpoint.Snapshot:
        state = {"format": 1, "step": self.step}
        random = {"torch_cpu": torch.get_rng_state()}
        frozen: State = {**self.frozen}
        return checkpoint.Snapshot(frozen, {**self.model}, self.optimizer, random, state)

    def compute(self, batch: int) -> None:
        """Forward and backward."""
        x = torch.ones(batch, WIDTH, device=self.device)
        for weight in self._layers:
            x = torch.relu(x @ weight)
        self._adam.zero_grad(set_to_none=True)
        x.square().mean().backward()  # type: ignore[no-untyped-call]

    def advance(self) -> None:
        """The update: everything but the frozen part is another one now."""
        self.step += 1
        self._adam.step()

    def synchronize(self) -> None:
        """Until the device has done what it was told."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def recover(self) -> None:
        """After a way that failed: what the CUDA runtime refused stays as an error that torch takes
        for its next kernel's. This one does not count."""
        if self.device != "cpu":
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self.device).add_(1)


def durable(path: Path) -> None:
    """Sync a file, or all files of a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in (*files, path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """What was saved, whole or not, or nothing."""
    if path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


FAILURES = (RuntimeError, ValueError, AssertionError, OSError, CheckpointException)
"""Of a way that does not run on this machine; the others do."""

SAFETENSORS = "safetensors.save_file"
"""The reference."""

Save = Callable[[Path], Callable[[], object] | None]
"""Begins to save below a path; returns what waits for the rest of it, if there is a rest."""


def others(pool: Pool) -> dict[str, Save]:
    """The well-known ways."""

    def torch_save(path: Path) -> None:
        torch.save(pool.whole, path)

    def safetensors(path: Path) -> None:
        save_file(pool.whole, path)

    def dcp_save(path: Path) -> None:
        dcp.state_dict_saver.save(pool.whole, checkpoint_id=path, no_dist=True)

    def dcp_async(path: Path) -> Callable[[], object]:
        future: Any = dcp.state_dict_saver.async_save(
            pool.whole,
            checkpoint_id=path,
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
            no_dist=True,
        )
        return future.result  # type: ignore[no-any-return]

    def dcp_process(path: Path) -> Callable[[], object]:
        future: Any = dcp.state_dict_saver.async_save(
            pool.whole,
            checkpoint_id=path,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        return future.result  # type: ignore[no-any-return]

    stager = dcp.staging.DefaultStager(
        dcp.staging.StagingOptions(
            use_pinned_memory=torch.cuda.is_available(),
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=torch.cuda.is_available(),
        )
    )

    def dcp_cached(path: Path) -> Callable[[], object]:
        future: Any = dcp.state_dict_saver.async_save(
            pool.whole,
            checkpoint_id=path,
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
            async_stager=stager,
            no_dist=True,
        )
        return getattr(future, "upload_completion", future).result  # type: ignore[no-any-return]

    return {
        "torch.save": torch_save,
        SAFETENSORS: safetensors,
        "dcp.save": dcp_save,
        "dcp.async_save (thread)": dcp_async,
        "dcp.async_save (process)": dcp_process,
        "dcp.async_save (cached stager)": dcp_cached,
    }
