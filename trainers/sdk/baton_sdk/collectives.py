"""What a hung rank waits for in torch's collectives, as lines for the job's log.

Problem: stacks say that a rank waits in `all_reduce`, and neither which one nor whether the others
have come that far. torch's flight recorder knows, but writes its dump as a pickle, on the node,
where nobody looks and which nobody should load unseen. Asked from within the process it says the
same as JSON (``_dump_nccl_trace_json`` of torch built for CUDA, ``_dump_fr_trace_json`` for gloo).
Nothing is imported here: a process that has not loaded torch's collectives has nothing to say, and
neither has a torch that lacks these calls.

Of each group the counters come first, as they show who is behind when ranks are compared; then what
is not over yet, the oldest first.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

MODULE = "torch._C._distributed_c10d"
RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")

ENTRIES_MAX = 32
"""A rank waits for one collective and has a few more queued behind it."""

LINE_CHARACTERS_MAX = 2_000
"""Sizes of a coalesced collective's inputs are long lists; the beginning tells which one it is."""


def write(descriptor: int, rank: int) -> None:
    """What there is to say, in one piece: other ranks write to the same log. A recorder that fails
    is quoted, as nobody could tell otherwise why there are no lines."""
    try:
        lines = list(_lines(_recorded()))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        lines = [f"torch's flight recorder could not be read: {error!r}"]
    said = "".join(f"baton: rank {rank}: {line[:LINE_CHARACTERS_MAX]}\n" for line in lines)
    if said:
        os.write(descriptor, said.encode(errors="replace"))


def _recorded() -> Mapping[str, Any]:
    """By the first recorder that has seen anything; empty where none has."""
    module = sys.modules.get(MODULE)
    for name in RECORDERS:
        recorder = getattr(module, name, None)
        # All fields, and only what is not over.
        found = json.loads(recorder(True, True)) if recorder is not None else {}
        if found.get("pg_status") or found.get("entries"):
            return dict(found)
    return {}


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    groups = found.get("pg_config", {})
    for key, status in found.get("pg_status", {}).items():
        described = groups.get(key, {}).get("desc") or key
        yield f"collectives of group {described}: {json.dumps(status)}"
    # gloo leaves what is over as it was, but for this word.
    waiting = [entry for entry in found.get("entries", ()) if not entry.get("retired")]
    for entry in waiting[:ENTRIES_MAX]:
        yield f"waits in {entry['profiling_name']}: {json.dumps(entry)}"
    if len(waiting) > ENTRIES_MAX:
        yield f"and {len(waiting) - ENTRIES_MAX} more collectives"
