"""One rank of a sharded training on CPUs, for `test_manifest.py`: started once per rank.

    python -m tests.trainers.fsdp_ranks DIRECTORY write|read

``write`` trains two steps of a small model under FSDP2, writes this rank's rows of every parameter
and of AdamW's moments, and rank 0 the whole ones, gathered by torch itself, as the answer to
compare with. ``read`` builds the same model sharded over another number of ranks, fills this rank's
part with ``read_range``, gathers it, and compares.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainers import exactness, manifest
from trainers.exactness import Level

ANSWERS = "answers.safetensors"

FINGERPRINT = exactness.Fingerprint(
    torch="2.13.0",
    cuda="",
    numpy="2.4.6",
    device="a processor",
    world_size=1,
    precision="float32",
    deterministic=False,
    tf32=False,
    threads=1,
    global_batch=8,
    micro_batch=8,
    data_seed=1,
)
Parts = dict[str, tuple[torch.Tensor, int, tuple[int, ...]]]


def described(
    tensors: Mapping[str, manifest.LogicalTensor], world_size: int = 1
) -> manifest.Manifest:
    return manifest.Manifest(
        job=12,
        epoch=3,
        step=4,
        samples=32,
        parent="ab" * 32,
        world_size=world_size,
        fingerprint=replace(FINGERPRINT, world_size=world_size),
        level=Level.E1,
        tensors=manifest.Layout(tensors),
        files={},
    )


def make(rank: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Odd sizes: no number of ranks divides them all. Weights differ from rank to rank until FSDP
    has what one of them says."""
    torch.manual_seed(3 + rank)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def sharded(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, DTensor]:
    """Parameters and moments by logical name."""
    found: dict[str, DTensor] = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        found[f"model/{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, DTensor):
                found[f"optimizer/{name}|{key}"] = value
    return found


def write(directory: Path, rank: int, world_size: int) -> None:
    model, optimizer = make(rank)
    for step in range(2):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.rand(4, 5)).square().mean().backward()
        optimizer.step()
    parts: Parts = {}
    answers: dict[str, torch.Tensor] = {}
    for name, tensor in sharded(model, optimizer).items():
        start, stop = manifest.split_rows(tensor.shape[0], rank, world_size)
        local = tensor.to_local()
        assert local.shape[0] == stop - start, "FSDP2 cuts as split_rows does"
        parts[name] = (local, start, tuple(tensor.shape))
        answers[name] = tensor.full_tensor().detach()
    held = manifest.write_shard(directory, rank, parts)
    gathered: list[dict[str, manifest.LogicalTensor]] = [{} for _ in range(world_size)]
    dist.all_gather_object(gathered, held)
    if rank == 0:
        document = manifest.seal(described(manifest.merge(gathered), world_size), {"format": 1})
        (directory / manifest.FILE).write_text(json.dumps(document))
        save_file(answers, directory / ANSWERS)


def read(directory: Path, rank: int, world_size: int) -> None:
    model, _ = make(rank)
    answers = load_file(directory / ANSWERS)
    loaded, _ = manifest.load(directory)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        start, stop = manifest.split_rows(parameter.shape[0], rank, world_size)
        with torch.no_grad():
            parameter.to_local().copy_(
                manifest.take_range(directory, loaded, f"model/{name}", start, stop)
            )
        full = parameter.full_tensor()
        assert torch.equal(full, answers[f"model/{name}"]), name


def main() -> None:
    dist.init_process_group("gloo")
    try:
        does = {"write": write, "read": read}[sys.argv[2]]
        does(Path(sys.argv[1]), dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
