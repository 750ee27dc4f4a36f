"""Recognising a Hugging Face checkpoint that a crash left half written, from its files alone.

Problem: `Trainer` writes `checkpoint-N/` in place: model, optimizer, scheduler, random states,
`trainer_state.json` last. A process killed in between leaves a directory that
`get_last_checkpoint` takes for the newest, and resuming from it raises. A machine that loses power
leaves one with all its names and short or empty files, as nothing was synced. Loading everything
to find out costs minutes, and would mean to unpickle; so only the containers are looked at:

- `trainer_state.json` is there, is JSON and knows its step;
- a safetensors file is exactly as long as its header says;
- a file of `torch.save` is a ZIP archive, whose directory is at its end: a short one has none;
- an index names only files that are there, and there are weights at all;
- so does `.metadata` beside shards of `torch.distributed.checkpoint`, which ends its folder's save.
  It is a pickle, whose strings are plain bytes in it: they are searched for, and nothing is loaded.

Bytes that changed in the middle of a file are not seen here; Baton's own copies carry digests.

Sources: the format's description in the README of huggingface/safetensors; APPNOTE.TXT of PKWARE,
4.3.6 (the end of central directory record).
"""

import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STATE_NAME = "trainer_state.json"
SHARDS_INDEX_NAME = ".metadata"
PART_NAME = ".baton-part"
"""A file beside what one node has of a checkpoint that several have written."""

NAME = re.compile(r"checkpoint-(\d+)")

HEADER_BYTES_MAX = 100_000_000
"""safetensors' own limit on its header: more is not a header."""

JSON_BYTES_MAX = 256 * 1024 * 1024
"""A trainer_state.json holds one line per logged step; a quarter of a gigabyte is a mistake."""

_ASIDE_NAME = re.compile(r"torn-checkpoint-\d+(-\d+)?")
_LENGTH_BYTES = 8
_PICKLE_FIRST = b"\x80"
_ZIP_FIRST = b"PK"

# Files of torch.save, by Trainer's names for them. Others that end in .bin are somebody else's.
_TORCH_FILE = re.compile(
    r"(pytorch_model|adapter_model|training_args|optimizer|pytorch_model_fsdp)"
    r"(-\d+-of-\d+)?\.bin|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth"
)
_SHARD = re.compile(rb"__\d+_\d+\.distcp")
_SHARDS = "*.distcp"
_DEEPSPEED = "global_step*/*"
_WEIGHTS = re.compile(r"(model|adapter_model|pytorch_model).*\.(safetensors|bin)")


class Torn(ValueError):
    """The sentence names the file and says what is wrong with it."""


def step_of(directory: Path) -> int:
    """The step that a checkpoint has reached, by its own account. Raises `Torn`."""
    state = _json_object(directory / STATE_NAME)
    step = state.get("global_step")
    if not isinstance(step, int):
        raise Torn(f"{STATE_NAME} does not say its step")
    return step


def problem(directory: Path) -> str:
    """What is wrong with `checkpoint-N`, or an empty string. Raises OSError when it cannot be
    read."""
    try:
        step_of(directory)
        names = sorted(entry.name for entry in os.scandir(directory))
        for name in names:
            _check(directory / name)
        # FSDP, DeepSpeed and several adapters keep their weights in folders of their own.
        folders = any(entry.is_dir() for entry in os.scandir(directory))
        if not folders and not any(_WEIGHTS.fullmatch(name) for name in names):
            raise Torn("there are no weights")
    except Torn as error:
        return str(error)
    return ""


def is_part(directory: Path) -> bool:
    """Whether the rest of it lies on other nodes: by its shape it may be whole."""
    return (directory / PART_NAME).exists()


def numbered(directory: Path) -> Iterator[Path]:
    """The directories `checkpoint-N` in `directory`, highest number first."""
    if not directory.is_dir():
        return
    found = [
        (int(match.group(1)), entry.name)
        for entry in os.scandir(directory)
        if (match := NAME.fullmatch(entry.name)) and entry.is_dir()
    ]
    for _, name in sorted(found, reverse=True):
        yield directory / name


def set_aside(directory: Path) -> Path:
    """Rename `checkpoint-N` to `torn-checkpoint-N` (`-2` behind it when that is taken). Raises
    OSError.

    Not to `checkpoint-N.torn`: Trainer's rotation takes every `checkpoint-*` for a checkpoint, that
    one even for a newer one than `checkpoint-N`, and would delete what has just been saved."""
    number = 1
    while (target := _torn_name(directory, number)).exists():
        number += 1
    directory.rename(target)
    return target


def was_set_aside(directory: Path) -> bool:
    """Whether this `checkpoint-N` was torn, in this attempt or in an earlier one."""
    return _torn_name(directory, 1).is_dir()


def any_set_aside(directory: Path) -> bool:
    """Whether any checkpoint in `directory` was."""
    return directory.is_dir() and any(
        _ASIDE_NAME.fullmatch(entry.name) and entry.is_dir() for entry in os.scandir(directory)
    )


def _torn_name(directory: Path, number: int) -> Path:
    return directory.with_name(f"torn-{directory.name}" + (f"-{number}" if number > 1 else ""))


def _check(path: Path) -> None:
    if path.name.endswith(".safetensors"):
        _check_safetensors(path)
    elif path.name.endswith(".index.json"):
        _check_index(path)
    elif path.is_dir():
        _check_shards(path)
    elif _TORCH_FILE.fullmatch(path.name) and path.is_file():
        _check_torch(path)


def named_shards(index: Path) -> list[str]:
    """What a `.metadata` names, in order. Raises OSError."""
    return sorted({name.decode() for name in _SHARD.findall(index.read_bytes())})


def _check_shards(folder: Path) -> None:
    index = folder / SHARDS_INDEX_NAME
    if not index.is_file():
        if any(folder.glob(_SHARDS)):
            raise Torn(f"{folder.name} has shards and no {SHARDS_INDEX_NAME}")
        return
    for name in named_shards(index):
        path = folder / name
        if not path.is_file():
            raise Torn(f"{folder.name}/{SHARDS_INDEX_NAME} names {name}, which is missing")
        _check_torch(path)


def lacking(directory: Path, other: Path) -> str:
    """What of DeepSpeed's `directory` lacks that `other` has, a checkpoint of the same training:
    whatever has been put together of parts may lack one, and DeepSpeed writes no list of them."""
    here = _deepspeed_names(directory)
    missing = [name for name in _deepspeed_names(other) if name not in here]
    return f"{missing[0]} is missing" if missing else ""


def _deepspeed_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob(_DEEPSPEED))


def _check_safetensors(path: Path) -> None:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size_bytes < _LENGTH_BYTES or length > min(HEADER_BYTES_MAX, size_bytes):
            raise Torn(f"{path.name} has {size_bytes} bytes, fewer than its header")
        header = _parsed(file.read(length), path.name)
    ends = [
        tensor["data_offsets"][1]
        for name, tensor in header.items()
        if name != "__metadata__" and isinstance(tensor, dict) and "data_offsets" in tensor
    ]
    whole_bytes = _LENGTH_BYTES + length + max(ends, default=0)
    if size_bytes != whole_bytes:
        raise Torn(f"{path.name} has {size_bytes} bytes, and its header says {whole_bytes}")


def _check_index(path: Path) -> None:
    names = _json_object(path).get("weight_map", {})
    missing = sorted({name for name in names.values() if not (path.parent / name).is_file()})
    if missing:
        raise Torn(f"{path.name} names {missing[0]}, which is missing")


def _check_torch(path: Path) -> None:
    with path.open("rb") as file:
        first = file.read(len(_ZIP_FIRST))
        if first == _ZIP_FIRST:
            try:
                zipfile.ZipFile(file).close()  # reads the directory at the end, and nothing else
            except zipfile.BadZipFile as error:
                raise Torn(f"{path.name} is cut short: {error}") from error
        elif not first.startswith(_PICKLE_FIRST):
            # The format before torch 1.6 is a bare pickle, which nobody can judge by its length.
            raise Torn(f"{path.name} is no file of torch.save")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return _parsed(file.read(JSON_BYTES_MAX), path.name)
    except FileNotFoundError as error:
        raise Torn(f"{path.name} is missing") from error


def _parsed(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise Torn(f"{name} is cut short or altered: {error}") from error
    if not isinstance(value, dict):
        raise Torn(f"{name} holds no JSON object")
    return value
