"""A model spread over all ranks (FSDP2), and whole again.

Problem: what one GPU cannot hold, several can, each with some rows of every parameter, of its
gradient and of the optimizer's averages. ``fully_shard`` does that: before a layer computes, its
rows are collected from all ranks, and let go of after it; gradients are summed and dealt out. So a
rank holds its share of the whole and one layer.

Layers are the members of a model's lists of modules, outermost lists first: that is how every
transformer is written, and what lies beside them (embeddings, the last norm) is one more unit.

``fully_shard`` takes each rank's rows from the model that the rank has itself, and asks nobody
whether it is the same one. So it is looked at before, by a few numbers of each tensor.

What is made in the end (a folder for transformers) needs the model in one piece and its class as it
was. So rank 0 keeps a skeleton, a copy without memory, and fills it tensor by tensor: the ranks
never hold more than one whole tensor, and rank 0 holds the rest where it is wanted, in the host's
memory.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import copy
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

import torch

from trainers.ranks import World


class Spread:
    """A model on its way: whole on every rank, then spread over them, then whole on rank 0. In a
    world of one it stays as it is."""

    def __init__(self, model: torch.nn.Module, world: World) -> None:
        self.model = model
        self.world = world
        self._bare: torch.nn.Module | None = None

    def open(self, device: torch.device) -> None:
        """Put the model onto the device, of several ranks each its rows of it. Raises RankError
        when the ranks have different models. A collective."""
        if self.world.alone:
            self.model.to(device)
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.world.check_same("the model", summary(self.model))
        self._bare = skeleton(self.model) if self.world.first else None
        mesh = init_device_mesh(device.type, (self.world.size,))
        for layer in layers(self.model):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def settle(self) -> None:
        """After a forward pass without a backward one: what it has collected of the outermost unit
        stays for the backward pass otherwise, and its parameters are not the spread ones."""
        if not self.world.alone:
            reshard: Any = self.model
            reshard.reshard()

    def gather(self) -> torch.nn.Module | None:
        """The model in one piece: rank 0 gets it, on the CPU. A collective."""
        if self.world.alone:
            return self.model
        parameters = (local_copy(parameter) for parameter in self.model.parameters())
        if self._bare is None:
            for _ in parameters:
                pass  # the others take part
            return None
        fill(self._bare, parameters)
        return self._bare


def layers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The members of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from layers(child)


def summary(model: torch.nn.Module) -> str:
    """A digest of names, shapes and three values of each tensor, which tell two models apart."""
    digest = blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat, count = tensor.detach().reshape(-1), tensor.numel()
        if count:
            digest.update(repr(flat[[0, count // 2, count - 1]].tolist()).encode())
    return digest.hexdigest()


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether each rank has rows of it. (A DTensor, asked for without importing its module.)"""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> torch.Tensor:
    """This rank's rows, sharing memory with the tensor; all of one that is not spread."""
    with torch.no_grad():
        rows = tensor.to_local() if is_spread(tensor) else tensor
    assert isinstance(rows, torch.Tensor)
    return rows


def like(parameter: Any, rows: torch.Tensor) -> torch.Tensor:
    """A tensor spread as the parameter is, of which this rank has these rows."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def skeleton(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters have no memory; tied ones are tied in it. Of a whole model."""
    bare = {
        id(parameter): torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, dict(bare))


def local_copy(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A whole parameter on the CPU. A collective where it is spread."""
    whole: Any = parameter.detach()
    whole = whole.full_tensor() if is_spread(whole) else whole
    return torch.nn.Parameter(whole.to("cpu", copy=True), parameter.requires_grad)


def fill(bare: torch.nn.Module, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give a skeleton its parameters, in the order of ``parameters()``."""
    by_place = zip(list(bare.parameters()), parameters, strict=True)
    filled = {id(place): parameter for place, parameter in by_place}
    for module in bare.modules():
        for name, place in list(module.named_parameters(recurse=False)):
            setattr(module, name, filled[id(place)])
