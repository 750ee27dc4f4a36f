"""This rank's part of a training's state, and what this rank needs of a checkpoint.

Problem: gathering a model to one rank to write it costs memory that no rank has, and one disk's
time. So each rank writes what it has: its rows of every parameter and of the optimizer's averages,
and its random generators. It is a checkpoint directory as ever, with fewer rows in it, and is
captured, hashed and sent like any other.

What all ranks have the same (buffers, step counters, the objects of ``extra``) is in rank 0's part
alone: the ranks' parts lie on different nodes, so that equal chunks would be stored once a node,
and be copied to a slab once a rank, and each rank's standby would be sent them. So a node that was
not rank 0's fetches them after a stop (of ``transfer``, whose ranks share no rows, that is all of
the state): once a handoff, where the other would be at every checkpoint. The small JSON state is in
all of them, so that each part says what it belongs to.

Rows are in files of their own (``manifest.file_name``), for what only this rank reads again is not
sent to the nodes of the others.

Back, each rank reads its rows of the world that there is now, whatever the world that wrote them,
and what is common from rank 0's part. Random generators go on where they were if the world is the
same. Otherwise there is nothing to go on from, and the loop seeds them anew.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainers import checkpoint, manifest, ranges, sharding
from trainers.ranks import World


def part_of(live: checkpoint.Snapshot, world: World) -> tuple[checkpoint.Snapshot, manifest.Layout]:
    """Of a live state this rank's part, and where its rows belong. In a world of one all of it."""
    held: dict[str, checkpoint.Tensors] = {}
    places: dict[str, manifest.Place] = {}
    for part in checkpoint.TENSOR_FILES:
        held[part] = {}
        for name, tensor in getattr(live, part).items():
            if sharding.is_spread(tensor):
                rows = sharding.local(tensor)
                start, stop = manifest.split_rows(tensor.shape[0], world.rank, world.size)
                assert len(rows) == stop - start, "FSDP2 cuts as split_rows does"
                if len(rows):
                    held[part][name] = rows
                    places[f"{part}/{name}"] = (start, tuple(tensor.shape))
            elif world.first or part == "random":
                held[part][name] = tensor
    own = replace(live, rows=frozenset(places), **held)
    return own, manifest.layout(held, places)


def read(directory: Path, world: World, model: torch.nn.Module) -> checkpoint.Snapshot:
    """What this rank needs of a checkpoint, in parts or whole, for a model that is spread over this
    world. Raises CheckpointError."""
    if world.alone and not ranges.in_parts(directory):
        return checkpoint.read(directory)
    try:
        return _read(directory, world, model)
    except manifest.ManifestError as error:
        raise checkpoint.CheckpointError(str(error)) from error


def _read(directory: Path, world: World, model: torch.nn.Module) -> checkpoint.Snapshot:
    if ranges.in_parts(directory):
        found, documents = ranges.load_parts(directory)
        own = world.rank if found.world_size == world.size else 0
        random = checkpoint.read_tensors(directory / ranges.name_of_part(own), "random")
        state = documents[own]
    else:
        found, state = manifest.load(directory)
        random = checkpoint.read_tensors(directory, "random")
    checkpoint.check_format(state)
    # Each rank looks at its share of the files: what one finds, all hear of.
    share = sorted(found.files)[world.rank :: world.size]
    manifest.check_files(directory, {name: found.files[name] for name in share})
    shapes = {name: p.shape for name, p in model.named_parameters() if sharding.is_spread(p)}
    tensors: dict[str, Any] = {part: {} for part in checkpoint.TENSOR_FILES}
    with ranges.Reader(directory, found) as reader:
        for full_name, tensor in found.tensors.items():
            part, _, name = full_name.partition("/")
            if f"{part}/" == ranges.OF_EACH_RANK or part not in tensors:
                continue
            parameter = name.rpartition("|")[0] if part == "optimizer" else name
            start, stop = 0, tensor.rows
            if shapes.get(parameter) == tensor.shape:
                start, stop = manifest.split_rows(tensor.rows, world.rank, world.size)
            tensors[part][name] = reader.range(full_name, start, stop)
    return checkpoint.Snapshot(**{**tensors, "random": random}, state=state)
