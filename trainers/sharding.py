"""A model spread over all ranks (FSDP2), and whole again.

Problem: what one GPU cannot hold, several can, each with some rows of every parameter, of its
gradient and of the optimizer's averages. ``fully_shard`` does that: before a layer computes, its
rows are collected from all ranks, and let go of after it; gradients are summed and dealt out. So a
rank holds its share of the whole and one layer.

Layers are the members of a model's lists of modules, outermost lists first: that is how every
transformer is written, and what lies beside them (embeddings, the last norm) is one more unit.

``fully_shard`` takes each rank's rows from the model that the rank has itself, and asks nobody
whether it is the same one. So it is looked at before, by a few numbers of each tensor.

A module that is frozen and asked out of turn (a backbone, for features that each rank makes of its
own samples) is in one piece on every rank: its collectives would meet nobody.

What is made in the end (a folder for transformers) needs the model in one piece and its class as it
was. So each rank keeps a skeleton, a copy without memory, and rank 0 fills it tensor by tensor: the
ranks never hold more than one whole tensor, and rank 0 holds the rest where it is wanted, in the
host's memory.

``fully_shard`` remembers how far a pass has come, and has no word for one that was given up
(``guard``). So after that the skeleton is spread anew and gets the rows, of each parameter's and
the optimizer's averages, that the old model had: nothing of the old pass is left.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from trainers.guard import Guard
from trainers.ranks import RankError


class Spread:
    """A model on its way: whole on every rank, then spread over them, then whole on rank 0. In a
    world of one it stays as it is."""

    def __init__(
        self, model: torch.nn.Module, guard: Guard, whole_modules: Sequence[str] = ()
    ) -> None:
        self.model = model
        self.world = guard.world
        self._guard = guard
        self._whole_modules = whole_modules
        self._device = torch.device("cpu")
        self._mesh: Any = None
        self._bare: torch.nn.Module

    def open(self, device: torch.device) -> None:
        """Put the model onto the device, of several ranks each its rows of it. Raises RankError
        when the ranks have different models, or would have. A collective."""
        if self.world.alone:
            self.model.to(device)
            return
        strayed = own_statistics(self.model, self._whole_modules)
        if strayed:
            raise RankError(
                f"'{strayed}' keeps statistics of the samples that it sees, and each rank sees"
                " others: train on one GPU, or with a model without batch normalisation"
            )
        from torch.distributed.device_mesh import init_device_mesh

        self.world.check_same("the model", summary(self.model))
        self._bare = skeleton(self.model)
        self._device = device
        for name in self._whole_modules:
            self.model.get_submodule(name).to(device)
        self._mesh = init_device_mesh(device.type, (self.world.size,))
        self._shard(self.model)

    def renew(self, optimizer: torch.optim.Optimizer) -> None:
        """After a pass that was given up: ``model`` is another one with the same values, and the
        optimizer goes on with it. No collective."""
        if self.world.alone:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # other streams may still read what is freed here
        for unit in units(self.model):
            # The parameters are the rows again, and not what was collected of them; the outermost
            # unit keeps that after a forward pass unless it is told otherwise.
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
        old = self.model
        old.zero_grad(set_to_none=True)
        self.model = copy.deepcopy(self._bare)
        self._shard(self.model)
        self.model.to_empty(device=self._device)
        pairs = list(zip(old.parameters(), self.model.parameters(), strict=True))
        with torch.no_grad():
            for before, after in pairs:
                local(after).copy_(local(before))
            for kept, buffer in zip(old.buffers(), self.model.buffers(), strict=True):
                buffer.copy_(kept)
        self.model.train(old.training)
        successors = {id(before): after for before, after in pairs}
        for group in optimizer.param_groups:
            group["params"] = [successors[id(parameter)] for parameter in group["params"]]
        for before, after in pairs:
            if before in optimizer.state:
                optimizer.state[after] = optimizer.state.pop(before)

    def _shard(self, model: torch.nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        kept = [model.get_submodule(name) for name in self._whole_modules]
        whole = {parameter for module in kept for parameter in module.parameters()}
        for layer in layers(model):
            if whole.isdisjoint(layer.parameters()):
                fully_shard(layer, mesh=self._mesh)
        fully_shard(model, mesh=self._mesh, ignored_params=whole)
        for unit in units(model):
            unit.set_custom_all_gather(GuardedAllGather(self._guard))
            unit.set_custom_reduce_scatter(GuardedReduceScatter(self._guard))

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
        if not self.world.first:
            for _ in parameters:
                pass  # the others take part
            return None
        fill(self._bare, parameters)
        return self._bare


class Guarded:
    """What ``fully_shard`` takes for its collectives, with memory from where it would have it."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class GuardedAllGather(Guarded):
    """The rows of a layer from all ranks."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: Any,
        async_op: bool = False,
    ) -> Any:
        self._guard.check()
        gather = renamed("all_gather_into_tensor", "all_gather_single")
        return gather(output_tensor, input_tensor, group=group, async_op=async_op)


class GuardedReduceScatter(Guarded):
    """The sum of a layer's gradients, of which each rank gets its rows."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        self._guard.check()
        scatter = renamed("reduce_scatter_tensor", "reduce_scatter_single")
        return scatter(output_tensor, input_tensor, group=group, op=op, async_op=async_op)


def renamed(before: str, after: str) -> Any:
    """A function of torch.distributed that has another name since 2.13, and warns of the old."""
    from torch import distributed

    return getattr(distributed, after, None) or getattr(distributed, before)


def units(model: torch.nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def layers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The members of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from layers(child)


def own_statistics(model: torch.nn.Module, whole_modules: Sequence[str]) -> str:
    """The name of a module that writes down what it sees of samples while it trains; empty for
    none."""
    inside = tuple(f"{name}." for name in whole_modules)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            if not name.startswith(inside):
                return str(name)
    return ""


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
