"""Weights as safetensors files, moved from one to another without being loaded.

Problem: an export that loads a model to save it again needs the model's class, its memory, and
care that nothing is cast on the way. A safetensors file is a JSON header (names, types, shapes,
offsets) and the tensors' plain bytes behind it. So weights that lie in one or several such files
are written as one by making a new header and copying bytes: nothing is interpreted, every bit stays
as it is, and a file of any size passes through one buffer.

The header is read as the format demands (no hole, no overlap, nothing outside of the file), since a
file may come from anybody. Tensors are written with the larger types first and then by name, so
that each lies at a multiple of its size, and the same weights give the same bytes.

Format: https://github.com/huggingface/safetensors#format. Standard library only, but for what makes
tensors, and for checkpoints of several ranks, whose manifest says where the rows are.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch

HEADER_BYTES_MAX = 100_000_000
"""The format's own limit."""

COPY_BYTES = 1 << 20
"""Copied at once: large for the system, small for memory."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

TORCH_TYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3":
    "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64",
    "U64": "uint64", "F64": "float64", "C64": "complex64",
}  # fmt: skip

CHECKPOINT_FILES = ("frozen.safetensors", "model.safetensors")
"""Where a checkpoint's weights are: those that are not trained, then the others and buffers."""

FIRST_PART = "rank-00000"
"""The directory of rank 0's part, where several ranks wrote a part each (``ranges``)."""

EXTRA_PREFIX = "extra/"
"""Of tensors in the second file that are no weights: what else a user keeps (``extra``)."""

INDEX_FILE = "model.safetensors.index.json"
"""Of a model in several files: which tensor is in which."""

METADATA_KEY = "__metadata__"


class WeightsError(ValueError):
    """These files do not hold usable weights; the sentence says which and why."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file, from `start` on."""

    file: Path
    start: int
    size_bytes: int


@dataclass(frozen=True)
class Entry:
    """A tensor: type by the format's name, and where its bytes lie, one span after another."""

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def size_bytes(self) -> int:
        return sum(span.size_bytes for span in self.spans)


Entries = dict[str, Entry]


def entries(file: Path) -> Entries:
    """What is in a safetensors file. Raises WeightsError."""
    try:
        with file.open("rb") as stream:
            header, begin = _header(stream, file)
            end = stream.seek(0, 2)
    except OSError as error:
        raise WeightsError(f"cannot read {file}: {error.strerror}") from error
    found: Entries = {}
    spans = []
    for name, value in header.items():
        if name == METADATA_KEY:
            continue
        try:
            dtype, shape = str(value["dtype"]), tuple(map(int, value["shape"]))
            first, last = value["data_offsets"]
            size_bytes = math.prod(shape) * BITS[dtype] // 8
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{file}: tensor '{name}' has no usable header ({error})") from error
        if last - first != size_bytes:
            raise WeightsError(
                f"{file}: tensor '{name}' has {last - first} bytes, and its shape {size_bytes}"
            )
        spans.append((first, last))
        found[name] = Entry(dtype, shape, (Span(file, begin + first, size_bytes),))
    place = 0
    for first, last in sorted(spans):
        if first != place:
            raise WeightsError(f"{file}: tensors overlap or leave a hole at byte {place}")
        place = last
    if begin + place != end:
        raise WeightsError(f"{file}: {end - begin} bytes of tensors, and {place} are described")
    return found


def _header(stream: BinaryIO, file: Path) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= HEADER_BYTES_MAX:
        raise WeightsError(f"{file} is no safetensors file: a header of {length} bytes")
    text = stream.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{file} is no safetensors file: {error}") from error
    if len(text) < length or not isinstance(header, dict):
        raise WeightsError(f"{file} is no safetensors file, or is cut off")
    return header, 8 + length


def of_checkpoint(directory: Path) -> Entries:
    """All weights of a checkpoint directory, also of one that several ranks wrote. Raises
    WeightsError."""
    if (directory / FIRST_PART).is_dir():
        found = _of_ranks(directory)
    else:
        found = merged(directory / name for name in CHECKPOINT_FILES)
    return {name: entry for name, entry in found.items() if not name.startswith(EXTRA_PREFIX)}


def _of_ranks(directory: Path) -> Entries:
    """Rows of a tensor follow one another in memory, so its shards do in the file to be made."""
    from trainers import manifest, ranges

    try:
        tensors = ranges.load_any(directory).tensors
    except manifest.ManifestError as error:
        raise WeightsError(str(error)) from error
    files: dict[str, Entries] = {}
    found: Entries = {}
    for full_name, tensor in tensors.items():
        part, _, name = full_name.partition("/")
        if f"{part}.safetensors" not in CHECKPOINT_FILES:
            continue
        spans: list[Span] = []
        dtype = ""
        for shard in tensor.shards:
            if shard.file not in files:
                files[shard.file] = entries(directory / shard.file)
            entry = files[shard.file].get(shard.key)
            if entry is None or entry.shape[1:] != tuple(tensor.shape[1:]):
                raise WeightsError(f"{shard.file} has not the rows of '{name}' that it should have")
            spans += entry.spans
            dtype = entry.dtype
        found[name] = Entry(dtype, tuple(tensor.shape), tuple(spans))
        if math.prod(tensor.shape) * BITS.get(dtype, 0) // 8 != found[name].size_bytes:
            raise WeightsError(f"the shards of '{name}' are not all of it")
    return found


def of_folder(directory: Path) -> Entries:
    """All weights of a folder: `model.safetensors`, or the files that an index names. Raises
    WeightsError."""
    index = directory / INDEX_FILE
    if not index.exists():
        return entries(directory / "model.safetensors")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"cannot use {index}: {error}") from error
    if any(Path(name).name != name for name in names):
        raise WeightsError(f"{index} names a file outside of its folder")
    return merged(directory / name for name in names)


def merged(files: Iterable[Path]) -> Entries:
    """What is in several files. Raises WeightsError for a name that two of them have."""
    found: Entries = {}
    for file in files:
        for name, entry in entries(file).items():
            if name in found:
                first = found[name].spans[0].file
                raise WeightsError(f"tensor '{name}' is in {first} and in {file}")
            found[name] = entry
    return found


def write(found: Mapping[str, Entry], target: Path, metadata: Mapping[str, str]) -> None:
    """One file of these tensors, their bytes copied as they are. Raises OSError, and WeightsError
    for a source that has been cut off since."""
    order = sorted(found, key=lambda name: (-BITS[found[name].dtype], found[name].dtype, name))
    header: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    place = 0
    for name in order:
        entry = found[name]
        span = [place, place + entry.size_bytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
        place += entry.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in order:
            for piece in _pieces(found[name]):
                stream.write(piece)


def _pieces(entry: Entry) -> Iterator[bytes]:
    for span in entry.spans:
        with span.file.open("rb") as source:
            source.seek(span.start)
            left = span.size_bytes
            while left:
                data = source.read(min(left, COPY_BYTES))
                if not data:
                    raise WeightsError(f"{span.file} ends {left} bytes too early")
                yield data
                left -= len(data)


def tensor_of(entry: Entry) -> "torch.Tensor":
    """The tensor itself. Raises WeightsError for a type that torch has not."""
    import torch

    name = TORCH_TYPES.get(entry.dtype, "")
    if not hasattr(torch, name):
        raise WeightsError(f"torch has no type {entry.dtype}")
    data = bytearray().join(_pieces(entry))
    if not data:
        return torch.empty(entry.shape, dtype=getattr(torch, name))
    return torch.frombuffer(data, dtype=getattr(torch, name)).reshape(entry.shape)


def load_into(model: "torch.nn.Module", directory: Path) -> int:
    """Give a model the weights of a checkpoint directory, which may come from elsewhere; returns
    how many tensors. Raises WeightsError, with nothing assigned, if anything does not fit.

    A tied parameter may come under any of its names; buffers that no file keeps may be missing.
    """
    import torch

    stored = {name: tensor_of(entry) for name, entry in of_checkpoint(directory).items()}
    names: dict[torch.Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    buffers = dict(model.named_buffers())
    chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for live, aliases in [*names.items(), *((buffer, [name]) for name, buffer in buffers.items())]:
        given = [name for name in aliases if name in stored]
        if not given and aliases[0] in buffers:
            continue
        if not given:
            raise WeightsError(f"tensor '{aliases[0]}' is missing in {directory}")
        tensor = stored[given[0]]
        if tensor.shape != live.shape:
            raise WeightsError(
                f"tensor '{given[0]}' in {directory} is {list(tensor.shape)}; the model has"
                f" {list(live.shape)}"
            )
        chosen.append((live, tensor))
        for name in given:
            del stored[name]
    if stored:
        name = next(iter(stored))
        raise WeightsError(f"tensor '{name}' in {directory} has no place in the model")
    with torch.no_grad():
        for live, tensor in chosen:
            live.copy_(tensor)
    return len(chosen)
