"""The exact state of a training, as a directory of files, and back.

Problem: after a handoff the loss curve must continue as if nothing had happened, bit for bit on a
CPU. The obvious way, ``torch.save`` of two state dicts, loses the random state and the position in
the data; it is pickle, which runs code from whoever wrote it; it has other bytes each time; and
it is one file, so a frozen backbone travels again with every new head.

Here a checkpoint is five files. Four hold tensors in the safetensors format (plain bytes behind a
JSON header), one is JSON:

    frozen.safetensors      parameters that are not trained: the same bytes every time
    model.safetensors       trained parameters, all buffers, and "extra/...": what else a user keeps
    optimizer.safetensors   "<parameter name>|<key>": the tensors of the optimizer's state
    random.safetensors      torch (CPU, CUDA), numpy and Python generators
    state.json              step, samples, schedule, hyper-parameters of the optimizer

Of a model that is spread over ranks each has a directory of its own, where its rows are in further
files, ``of-this-rank-model.safetensors`` and so on; what all have the same is in rank 0's.

The same state gives the same bytes: tensors in the order that safetensors defines, JSON keys
sorted, no clock, no path. Tied weights are one parameter and are stored once. The directory gets
its name last, after every file is on disk, so that a name means a whole checkpoint. Reading
checks everything against the model before the first value is assigned.

Formats: https://github.com/huggingface/safetensors#format, version 1 of our own layout below.
"""

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import safetensors
import torch
from safetensors.torch import load_file, save_file

from trainers import extra, manifest, sharding

FORMAT_VERSION = 1
STATE_FILE = "state.json"
TENSOR_FILES = ("frozen", "model", "optimizer", "random")

RANDOM_TENSORS = ("torch_cpu", "numpy_words", "numpy_position", "numpy_gauss", "python_words")

Tensors = dict[str, torch.Tensor]


class CheckpointError(ValueError):
    """The checkpoint cannot be used for this model; the sentence says which part and why."""


@dataclass(frozen=True)
class Snapshot:
    """A whole training state: on the CPU, sharing no memory with the live one, unless it is made
    by ``live``."""

    frozen: Tensors
    model: Tensors
    optimizer: Tensors
    random: Tensors
    state: dict[str, Any]
    """JSON values: ``format``, ``optimizer`` (groups and scalars), ``progress`` (the loop's),
    ``extra`` (what belongs to the objects of ``extra.py``)."""

    rows: frozenset[str] = frozenset()
    """Which tensors, as ``<part>/<name>``, are this rank's rows of one that is spread."""

    def files(self) -> list["TensorFile"]:
        """What is written, in that order; of rows only where there are any."""
        found = []
        for part in TENSOR_FILES:
            tensors: Tensors = getattr(self, part)
            own = {n: tensor for n, tensor in tensors.items() if f"{part}/{n}" in self.rows}
            others = {n: tensor for n, tensor in tensors.items() if n not in own}
            found.append(TensorFile(manifest.file_name(part), part, others))
            if own:
                found.append(TensorFile(manifest.file_name(part, rows=True), part, own))
        return found


class TensorFile(NamedTuple):
    """A file of a checkpoint, and what it has of which part."""

    name: str
    part: str
    tensors: Tensors


def live(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    objects: Mapping[str, extra.Object] | None = None,
) -> Snapshot:
    """Everything that decides how the training goes on. ``progress`` is JSON of the loop;
    ``objects`` are schedulers, scalers, generators and the like, by names of the caller's. The
    tensors are those of the model and the optimizer, and change with the next step: for whoever
    copies them at once."""
    frozen, trained = _model_tensors(model)
    tensors, described = _capture_optimizer(model, optimizer)
    extra_tensors, extra_described = extra.describe(objects or {})
    trained.update(extra_tensors)
    state = {
        "format": FORMAT_VERSION,
        "optimizer": described,
        "progress": dict(progress),
        "extra": extra_described,
    }
    return Snapshot(
        frozen=frozen, model=trained, optimizer=tensors, random=_capture_random(), state=state
    )


def copied(snapshot: Snapshot) -> Snapshot:
    """With tensors of its own, on the CPU."""
    return Snapshot(
        frozen=_copies(snapshot.frozen),
        model=_copies(snapshot.model),
        optimizer=_copies(snapshot.optimizer),
        random=snapshot.random,
        # Through JSON and back: a copy, and the same value as the one that is read from a file.
        state=json.loads(json.dumps(snapshot.state)),
        rows=snapshot.rows,
    )


def encode_state(state: Mapping[str, Any]) -> bytes:
    """The bytes of ``state.json``. On one line: the library's indenting encoder is a slow one."""
    return json.dumps(state, sort_keys=True).encode() + b"\n"


def restore(
    snapshot: Snapshot,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    objects: Mapping[str, extra.Object] | None = None,
) -> dict[str, Any]:
    """Put a snapshot into a model and optimizer (and ``objects``) that were built the same way;
    returns the loop's ``progress``. Raises CheckpointError, with nothing assigned, if anything does
    not fit.

    Of a model that is spread over ranks, the snapshot holds this rank's rows."""
    frozen, trained = (
        {name: sharding.local(tensor) for name, tensor in tensors.items()}
        for tensors in _model_tensors(model)
    )
    _check("frozen", snapshot.frozen, frozen)
    of_model = {k: v for k, v in snapshot.model.items() if not k.startswith(extra.PREFIX)}
    _check("model", of_model, trained)
    extra_described = snapshot.state.get("extra", {})
    try:
        extra.check(objects or {}, snapshot.model, extra_described)
    except extra.ExtraError as error:
        raise CheckpointError(str(error)) from error
    _check_optimizer(snapshot, model, optimizer)
    for name in RANDOM_TENSORS:
        if name not in snapshot.random:
            raise CheckpointError(f"tensor '{name}' is missing in random.safetensors")
    with torch.no_grad():
        for name, live in (frozen | trained).items():
            live.copy_(snapshot.frozen[name] if name in frozen else snapshot.model[name])
    _restore_optimizer(snapshot, model, optimizer)
    extra.apply(objects or {}, snapshot.model, extra_described)
    _restore_random(snapshot.random)
    progress = snapshot.state["progress"]
    assert isinstance(progress, dict)
    return progress


def write(snapshot: Snapshot, directory: Path, *, hashed: bool = False) -> dict[str, Any]:
    """Make ``directory`` the snapshot's files. It appears whole or not at all, and durable. Returns
    the state in it: the snapshot's, and with the hashes of all files where it is to be ``hashed``,
    which is for those whom no agent hashes.

    An older directory of that name is replaced. Raises OSError (a full disk, say) and leaves
    nothing behind then.
    """
    state = snapshot.state
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for made in snapshot.files():
            save_file(made.tensors, partial / made.name)
        if hashed:
            state = manifest.with_files(state, partial)
        (partial / STATE_FILE).write_bytes(encode_state(state))
        for file in (*partial.iterdir(), partial):
            _sync(file)
        # Set aside whole: half removed under its name it would be taken for the newest.
        replaced = directory.with_name(f".{directory.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if directory.exists():
            directory.rename(replaced)
        partial.rename(directory)
        _sync(directory.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except safetensors.SafetensorError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"cannot write checkpoint {directory.name}: {error}") from error
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return state


def read(directory: Path) -> Snapshot:
    """The snapshot in a directory. Raises CheckpointError for a missing or damaged file."""
    tensors: dict[str, Any] = {part: read_tensors(directory, part) for part in TENSOR_FILES}
    rows: set[str] = set()
    for part in TENSOR_FILES:
        if (directory / manifest.file_name(part, rows=True)).exists():
            own = read_tensors(directory, part, rows=True)
            tensors[part] |= own
            rows |= {f"{part}/{name}" for name in own}
    try:
        state = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{STATE_FILE} is missing in {directory}") from None
    except ValueError as error:
        raise CheckpointError(f"{STATE_FILE} in {directory} is damaged: {error}") from error
    check_format(state)
    if manifest.HASH_KEY in state:
        try:
            manifest.check_hash(state)
        except manifest.ManifestError as error:
            raise CheckpointError(f"{STATE_FILE} in {directory} is damaged: {error}") from error
        try:
            manifest.check_files(directory, manifest.parse(state).files)
        except manifest.ManifestError as error:
            raise CheckpointError(str(error)) from error
    return Snapshot(state=state, rows=frozenset(rows), **tensors)


def read_tensors(directory: Path, part: str, *, rows: bool = False) -> Tensors:
    """One of the four files of tensors, or of one rank's ``rows``. Raises CheckpointError."""
    file = directory / manifest.file_name(part, rows=rows)
    try:
        return load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file.name} is missing in {directory}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file.name} in {directory} is damaged: {error}") from error


def check_format(state: Any) -> None:
    """Raises CheckpointError unless it is a state of ours."""
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT_VERSION:
        raise CheckpointError(
            f"{STATE_FILE} has format {found}; this trainer reads format {FORMAT_VERSION}"
        )


def _model_tensors(model: torch.nn.Module) -> tuple[Tensors, Tensors]:
    """Live tensors by name, (frozen, trained and buffers); a tied one once, by its first name."""
    frozen: Tensors = {}
    trained: Tensors = {}
    for name, parameter in model.named_parameters():
        (trained if parameter.requires_grad else frozen)[name] = parameter
    trained.update(model.named_buffers())
    return frozen, trained


def _copies(live: Tensors) -> Tensors:
    """Each tensor gets memory of its own: safetensors refuses tensors that share it."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in live.items()
    }


def _check(part: str, stored: Tensors, live: Tensors) -> None:
    for name, tensor in live.items():
        if name not in stored:
            raise CheckpointError(f"tensor '{name}' is missing in {part}.safetensors")
        found = stored[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise CheckpointError(
                f"tensor '{name}' in {part}.safetensors is {found.dtype} {list(found.shape)}; "
                f"the model has {tensor.dtype} {list(tensor.shape)}"
            )
    for name in stored:
        if name not in live:
            raise CheckpointError(
                f"tensor '{name}' in {part}.safetensors has no place in the model"
            )


def _parameter_names(model: torch.nn.Module) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _capture_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Tensors, dict[str, Any]]:
    names = _parameter_names(model)
    tensors: Tensors = {}
    scalars: dict[str, Any] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            target: dict[str, Any] = tensors if isinstance(value, torch.Tensor) else scalars
            target[f"{names[parameter]}|{key}"] = value
    groups = []
    for group in optimizer.param_groups:
        described = {key: value for key, value in group.items() if key != "params"}
        described["params"] = [names[parameter] for parameter in group["params"]]
        groups.append(described)
    return tensors, {"groups": groups, "scalars": scalars, "tensors": sorted(tensors)}


def _check_optimizer(
    snapshot: Snapshot, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    names = _parameter_names(model)
    shapes = {name: sharding.local(parameter).shape for parameter, name in names.items()}
    stored = [group["params"] for group in snapshot.state["optimizer"]["groups"]]
    live = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if stored != live:
        raise CheckpointError(
            f"{STATE_FILE} describes an optimizer with {len(stored)} groups of "
            f"{[len(group) for group in stored]} parameters; this one has {len(live)} of "
            f"{[len(group) for group in live]}, or other names"
        )
    for full_name, tensor in snapshot.optimizer.items():
        name, _, _ = full_name.rpartition("|")
        if name not in shapes:
            raise CheckpointError(
                f"tensor '{full_name}' in optimizer.safetensors has no parameter in the model"
            )
        if tensor.dim() > 0 and tensor.shape != shapes[name]:
            raise CheckpointError(
                f"tensor '{full_name}' in optimizer.safetensors is {list(tensor.shape)}; "
                f"its parameter is {list(shapes[name])}"
            )
    for full_name in snapshot.state["optimizer"]["tensors"]:
        if full_name not in snapshot.optimizer:
            raise CheckpointError(f"tensor '{full_name}' is missing in optimizer.safetensors")


def _restore_optimizer(
    snapshot: Snapshot, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Assigned directly: ``load_state_dict`` would cast the state to the parameter's type."""
    described = snapshot.state["optimizer"]
    optimizer.state.clear()
    for live, stored in zip(optimizer.param_groups, described["groups"], strict=True):
        for key, value in stored.items():
            if key != "params":  # JSON has no tuples, and optimizers unpack betas
                live[key] = tuple(value) if isinstance(value, list) else value
    by_name = {name: parameter for parameter, name in _parameter_names(model).items()}
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    entries: dict[str, Any] = {**snapshot.optimizer, **described["scalars"]}
    for full_name, value in entries.items():
        name, _, key = full_name.rpartition("|")
        parameter = by_name[name]
        if isinstance(value, torch.Tensor):
            group = groups[id(parameter)]
            # torch keeps the step counter on the CPU unless the update runs as one kernel.
            on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
            value = value.clone() if on_host else value.to(parameter.device, copy=True)
            if sharding.is_spread(parameter) and value.dim() > 0:
                value = sharding.like(parameter, value)
        optimizer.state[parameter][key] = value


def _capture_random() -> Tensors:
    _, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    version, words, python_gauss = random.getstate()
    tensors = {
        "torch_cpu": torch.get_rng_state().clone(),
        "numpy_words": torch.from_numpy(numpy.asarray(keys).astype(numpy.int64)),
        "numpy_position": torch.tensor([int(position), int(has_gauss)]),
        "numpy_gauss": torch.tensor([float(gauss)], dtype=torch.float64),
        "python_words": torch.tensor([version, *words]),
    }
    if python_gauss is not None:
        tensors["python_gauss"] = torch.tensor([python_gauss], dtype=torch.float64)
    if torch.cuda.is_available():
        tensors["torch_cuda"] = torch.cuda.get_rng_state().clone()
    return tensors


def _restore_random(stored: Tensors) -> None:
    """A CUDA state is used where there is a device; one that began on a CPU goes on with the
    device's own, which no run there had used."""
    torch.set_rng_state(stored["torch_cpu"])
    position, has_gauss = stored["numpy_position"].tolist()
    words = stored["numpy_words"].numpy().astype(numpy.uint32)
    gauss = float(stored["numpy_gauss"].item())
    version, *python_words = stored["python_words"].tolist()
    numpy.random.set_state(("MT19937", words, position, has_gauss, gauss))
    python_gauss = stored["python_gauss"].item() if "python_gauss" in stored else None
    random.setstate((version, tuple(python_words), python_gauss))
    if "torch_cuda" in stored and torch.cuda.is_available():
        torch.cuda.set_rng_state(stored["torch_cuda"])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
