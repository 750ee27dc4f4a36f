"""The manifest says what a checkpoint is; any number of ranks load what any number wrote."""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from trainers import exactness, manifest, ranges
from trainers.exactness import Level
from trainers.manifest import LogicalTensor, ManifestError, Shard

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
STATE = {"format": 1, "progress": {"step": 4, "rate": 0.1}, "optimizer": {"groups": []}}


def tensors() -> dict[str, torch.Tensor]:
    """Of several types; one with fewer rows than some worlds have ranks, one scalar, one empty."""
    torch.manual_seed(0)
    return {
        "model/weight": torch.rand(7, 3),
        "model/bias": torch.rand(5).to(torch.bfloat16),
        "model/counts": torch.arange(2),
        "model/empty": torch.empty(0, 4),
        "optimizer/weight|step": torch.tensor(9.0),
    }


def described(
    tensors: Mapping[str, manifest.LogicalTensor], world_size: int = 1, rank: int | None = None
) -> manifest.Manifest:
    return manifest.Manifest(
        job=12,
        epoch=3,
        step=4,
        samples=32,
        parent="ab" * 32,
        world_size=world_size,
        rank=rank,
        fingerprint=replace(FINGERPRINT, world_size=world_size),
        level=Level.E1,
        tensors=manifest.Layout(tensors),
        files={},
    )


def written(directory: Path, world_size: int) -> Path:
    """As that many ranks write it, each its rows and a generator; the scalar by rank 0."""
    for rank in range(world_size):
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
        places: dict[str, manifest.Place] = {}
        for full_name, tensor in tensors().items():
            part, _, name = full_name.partition("/")
            start, stop = manifest.split_rows(manifest.rows_of(tensor.shape), rank, world_size)
            if tensor.shape and (stop > start or (rank == 0 and not len(tensor))):
                parts[part][name] = tensor[start:stop].clone()
                places[full_name] = (start, tuple(tensor.shape))
            elif not tensor.shape and rank == 0:
                parts[part][name] = tensor
        parts["random"] = {"torch_cpu": torch.tensor([rank])}
        place = directory / ranges.name_of_part(rank)
        place.mkdir()
        for part, held in parts.items():
            own = {n: tensor for n, tensor in held.items() if f"{part}/{n}" in places}
            rest = {n: tensor for n, tensor in held.items() if n not in own}
            save_file(own, place / f"of-this-rank-{part}.safetensors")
            save_file(rest, place / f"{part}.safetensors")
        seal(place, described(manifest.layout(parts, places), world_size, rank))
    return directory


def seal(place: Path, whole: manifest.Manifest) -> None:
    (place / manifest.FILE).write_text(json.dumps(manifest.seal(whole, STATE)))


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


# --- the document ---------------------------------------------------------------------------------


def test_the_document_survives_json_and_keeps_the_state_beside_it() -> None:
    whole = manifest.layout({"part": tensors()}, {})
    before = described(whole)
    document = json.loads(json.dumps(manifest.seal(before, STATE)))
    manifest.check_hash(document)
    assert manifest.parse(document) == before
    assert {key: document[key] for key in STATE} == STATE
    assert document["manifest"]["version"] == manifest.VERSION


def test_the_hash_depends_on_the_content_and_on_nothing_else() -> None:
    document = manifest.seal(described({}), STATE)
    backwards = dict(reversed(document.items()))
    assert manifest.hash_of(backwards) == document["hash"]
    assert manifest.seal(described({}), document)["hash"] == document["hash"], "sealed again"
    assert manifest.seal(replace(described({}), step=5), STATE)["hash"] != document["hash"]


def test_what_json_changes_is_changed_before_it_is_hashed() -> None:
    """Keys that are numbers sort as numbers, and as text when they were read."""
    state = {"counts": {9: (1, 2), 10: float("nan")}}
    document = manifest.seal(described({}), state)
    manifest.check_hash(json.loads(json.dumps(document)))
    assert document["counts"]["9"] == [1, 2]
    assert state["counts"][9] == (1, 2)


def changed(value: Any) -> Any:
    """Another value, of the same JSON type where that is easy."""
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, bool | int | float):
        return value + 1
    return [*value, 0]


def test_every_altered_value_is_recognised() -> None:
    document = manifest.seal(described(manifest.layout({"p": tensors()}, {})), STATE)
    places = 0
    stack: list[tuple[Any, ...]] = [(key,) for key in document]
    while stack:
        path = stack.pop()
        altered = copy.deepcopy(document)
        holder: Any = altered
        for key in path[:-1]:
            holder = holder[key]
        value = holder[path[-1]]
        if isinstance(value, dict | list):
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            stack += [(*path, key) for key in keys]
        holder[path[-1]] = changed(value)
        with pytest.raises(ManifestError, match="altered"):
            manifest.check_hash(altered)
        places += 1
    assert places > 50


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("version",), 2, "version 2; this one reads 1"),
        (("step",), -1, "'step' is -1"),
        (("job",), "12", "'job' is '12'"),
        (("world_size",), 0, "'world_size' is 0"),
        (("level",), "E9", "E9"),
        (("parent",), "xyz", "not 64 hexadecimal digits"),
        (("fingerprint", "device"), 4, "'device' of the fingerprint"),
        (("tensors", "p/w", "dtype"), "load", "unknown type 'load'"),
        (("tensors", "p/w", "shards", 0, "file"), "../w.safetensors", "not the name of a tensor"),
        (("tensors", "p/w", "shards", 0, "stop"), 1, "has 2 rows, its shards hold 1"),
        (("tensors", "p/w", "shards", 0, "start"), 1, "missing or twice at row 0"),
    ],
    ids=lambda value: "/".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_document_that_means_nothing_is_refused(path: Any, value: Any, why: str) -> None:
    whole = manifest.layout({"p": {"w": torch.ones(2)}}, {})
    document = manifest.seal(described(whole), STATE)
    document = copy.deepcopy(document)  # the tensors in it are those of every such layout
    holder = document["manifest"]
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(ManifestError, match=why):
        manifest.parse(document)


def test_who_writes_comes_from_the_environment() -> None:
    told = {"BATON_JOB_ID": "12", "BATON_EPOCH": "3", "WORLD_SIZE": "4"}
    assert manifest.attempt_of(told) == manifest.Attempt(12, 3, 4)
    assert manifest.attempt_of({}) == manifest.Attempt(0, 0, 1)


# --- reading by range -----------------------------------------------------------------------------


def read_range(directory: Path, name: str, start: int, stop: int) -> torch.Tensor:
    with ranges.Reader(directory, ranges.load_any(directory)) as reader:
        return reader.range(name, start, stop)


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (2, 3), (1, 4), (3, 2), (4, 4), (8, 3)])
def test_any_number_of_ranks_loads_what_any_number_wrote(
    writers: int, readers: int, tmp_path: Path
) -> None:
    directory = written(tmp_path, writers)
    ranges.verify(directory)
    for name, tensor in tensors().items():
        rows = manifest.rows_of(tensor.shape)
        if not tensor.shape:
            assert same(read_range(directory, name, 0, 1), tensor)
            continue
        parts = [
            read_range(directory, name, *manifest.split_rows(rows, rank, readers))
            for rank in range(readers)
        ]
        assert same(torch.cat(parts), tensor), name


def test_every_range_is_the_rows_it_names(tmp_path: Path) -> None:
    directory = written(tmp_path, 3)
    weight = tensors()["model/weight"]
    for start in range(8):
        for stop in range(start, 8):
            rows = read_range(directory, "model/weight", start, stop)
            assert same(rows, weight[start:stop])


@pytest.mark.parametrize(
    ("name", "start", "stop", "why"),
    [
        ("model/other", 0, 1, "no tensor 'model/other'"),
        ("model/weight", 0, 8, "has 7 rows"),
        ("model/weight", -1, 2, "has 7 rows"),
        ("model/weight", 3, 2, "there is no 3 to 2"),
    ],
)
def test_rows_that_are_not_there_are_refused(
    name: str, start: int, stop: int, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match=why):
        read_range(written(tmp_path, 2), name, start, stop)


@given(rows=st.integers(0, 500), world_size=st.integers(1, 40))
def test_ranks_split_rows_without_gap_or_overlap(rows: int, world_size: int) -> None:
    ranges = [manifest.split_rows(rows, rank, world_size) for rank in range(world_size)]
    assert [r for start, stop in ranges for r in range(start, stop)] == list(range(rows))
    chunks = torch.arange(rows).chunk(world_size) if rows else ()
    assert [len(chunk) for chunk in chunks] == [b - a for a, b in ranges if b > a]


def test_ranks_that_disagree_or_leave_rows_out_are_refused() -> None:
    one = {"w": LogicalTensor("float32", (4,), (Shard("a.safetensors", "w", 0, 2),))}
    gap = {"w": LogicalTensor("float32", (4,), (Shard("b.safetensors", "w", 3, 4),))}
    other = {"w": LogicalTensor("float16", (4,), (Shard("b.safetensors", "w", 2, 4),))}
    with pytest.raises(ManifestError, match="missing or twice at row 2"):
        ranges.merge([one, gap])
    with pytest.raises(ManifestError, match="missing or twice at row 2"):
        ranges.merge([one, one])
    with pytest.raises(ManifestError, match="disagree"):
        ranges.merge([one, other])


def test_the_parts_of_twice_the_ranks_are_twice_the_work() -> None:
    """Sorting a tensor's shards anew for each rank that has some of it would be four times as much.
    Counted in the looks at a shard, which no busy machine changes."""
    looks = 0

    class Seen(Shard):
        def __getattribute__(self, name: str) -> Any:
            nonlocal looks
            looks += name == "start"
            return super().__getattribute__(name)

    def merged(ranks: int) -> int:
        nonlocal looks
        looks = 0
        shards = [Seen("model.safetensors", "weight", rank, rank + 1) for rank in range(ranks)]
        layouts = [{"model/weight": LogicalTensor("float32", (ranks,), (s,))} for s in shards]
        layout = ranges.merge(reversed(layouts))
        assert layout["model/weight"].shards == tuple(shards)
        return looks

    assert merged(32) <= 2 * merged(16)


# --- files that are not what the manifest says ----------------------------------------------------


def test_verify_names_what_is_wrong(tmp_path: Path) -> None:
    directory = written(tmp_path, 2)
    name = "of-this-rank-model.safetensors"
    first, second = (directory / f"rank-0000{rank}" / name for rank in range(2))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(ManifestError, match=f"0/{name}.* (is .3, 3.|does not hold)"):
        ranges.verify(directory)
    first.write_bytes(kept[:-1])
    with pytest.raises(ManifestError, match=f"rank-00000/{name} does not hold"):
        ranges.verify(directory)
    first.unlink()
    with pytest.raises(ManifestError, match=f"rank-00000/{name} does not hold"):
        ranges.verify(directory)


def test_a_hashed_file_with_another_bit_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "p.safetensors")
    file = tmp_path / "p.safetensors"
    plain = described(manifest.layout({"p": {"w": torch.ones(2)}}, {}))
    seal(tmp_path, replace(plain, files={file.name: manifest.file_hash(file)}))
    ranges.verify(tmp_path)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ManifestError, match=r"p\.safetensors in .* is altered"):
        ranges.verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"step": 5}, r"rank-00001 in .* another checkpoint: its 'step' is 5, and that of .* is 4"),
        ({"samples": 40}, "its 'samples' is 40"),
        ({"job": 13}, "its 'job' is 13"),
        ({"epoch": 4}, "its 'epoch' is 4"),
        ({"world_size": 4}, "its 'world_size' is 4"),
        ({"rank": 2}, "rank-00001 in .* is the part of rank 2"),
        ({"rank": None}, "rank-00001 in .* is the part of rank None"),
    ],
)
def test_a_part_of_something_else_is_refused(
    change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    place = written(tmp_path, 3) / "rank-00001"
    found, _ = manifest.load(place)
    whole = change == {"rank": None}
    changed = replace(found, tensors=manifest.Layout({})) if whole else found
    seal(place, replace(changed, **change))
    with pytest.raises(ManifestError, match=why):
        ranges.load_parts(tmp_path)


def test_a_part_that_is_missing_or_altered_is_named(tmp_path: Path) -> None:
    directory = written(tmp_path, 3)
    state = directory / "rank-00002" / manifest.FILE
    kept = state.read_text()
    state.write_text(kept.replace('"step": 4', '"step": 3'))
    with pytest.raises(ManifestError, match="altered"):
        ranges.load_parts(directory)
    state.unlink()
    with pytest.raises(ManifestError, match=r"cannot read .*rank-00002"):
        ranges.load_parts(directory)


def test_a_rank_outside_of_its_world_is_refused() -> None:
    document = manifest.seal(described({}, 2, 1), STATE)
    assert manifest.parse(document).rank == 1
    document["manifest"]["rank"] = 2
    with pytest.raises(ManifestError, match="'rank' is 2 of 2"):
        manifest.parse(document)


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "not JSON"), ("[]", "does not hold an object"), ('{"format": 1}', "is altered")],
)
def test_a_file_that_is_no_manifest_is_refused(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot read"):
        manifest.load(tmp_path)
    (tmp_path / manifest.FILE).write_text(text)
    with pytest.raises(ManifestError, match=why):
        manifest.load(tmp_path)
