"""Each rank's random states, brought to the checkpoint that rank 0 hands over.

Problem: `Trainer` has every rank write its generators' states beside what rank 0 writes, as
`rng_state_RANK.pth`. On one machine they all lie in rank 0's directory. Where ranks run on several
nodes each has written into a directory of its own node, and a training that goes on from rank 0's
alone draws other numbers on all other ranks.

How: the files are small, so the ranks tell each other the bytes, where they meet after a save
anyway, and rank 0 hands over those. Nothing is unpickled. What ranks write besides (shards of
FSDP or DeepSpeed) is not small, and stays where it is (`shards`).
"""

import re
from pathlib import Path
from typing import Any

from baton_hook.guard import say

NAME = re.compile(r"rng_state_\d+\.pth")

_PARTIAL = ".baton-"

BYTES_MAX = 1 << 20
"""Of one rank: some kilobytes for the host and each of its GPUs."""


def name_of(rank: int) -> str:
    """What Trainer calls the file, where there are several ranks."""
    return f"rng_state_{rank}.pth"


def read(saved: Path, rank: int) -> bytes:
    """This rank's own, or nothing: whatever is wrong, the others wait for an answer."""
    try:
        data = (saved / name_of(rank)).read_bytes()
    except OSError:
        return b""
    if len(data) > BYTES_MAX:
        say(f"{name_of(rank)} has {len(data)} bytes and is left out of the checkpoint")
        return b""
    return data


def gather(torch: Any, device: Any, own: bytes) -> list[bytes]:
    """What each rank has, by rank. A collective of `torch.distributed`."""
    distributed = torch.distributed
    count = distributed.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(count)]
    distributed.all_gather(sizes, torch.tensor([len(own)], dtype=torch.int64, device=device))
    lengths = [int(size.item()) for size in sizes]
    room = max(1, *lengths)
    padded = torch.tensor(list(own.ljust(room, b"\0")), dtype=torch.uint8, device=device)
    parts = [torch.empty_like(padded) for _ in range(count)]
    distributed.all_gather(parts, padded)
    return [bytes(part[:length].tolist()) for part, length in zip(parts, lengths, strict=True)]


def of_first(torch: Any, device: Any, own: bytes) -> bytes:
    """What the first rank has, on all of them. A collective of `torch.distributed`."""
    distributed = torch.distributed
    size = torch.tensor([len(own)], dtype=torch.int64, device=device)
    distributed.broadcast(size, src=0)
    data = torch.zeros(int(size.item()), dtype=torch.uint8, device=device)
    if distributed.get_rank() == 0:
        data.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
    distributed.broadcast(data, src=0)
    return bytes(data.tolist())


def add(states: list[bytes], staged: Path) -> None:
    """Each as its rank has just sent it. Raises OSError.

    What lies there may be of an earlier attempt, whose rank ran on this node, and may be the
    script's own file under a second name: it is replaced, and never written into."""
    for rank, data in enumerate(states):
        if data:
            path = staged / name_of(rank)
            partial = path.with_name(_PARTIAL + path.name)
            partial.write_bytes(data)
            partial.replace(path)
