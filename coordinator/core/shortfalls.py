"""What a job lacks that fits nowhere: the sentence of a wait, with numbers.

Problem: "waiting for resources" helps nobody. Who waits wants to know what is free, what is taken
and what of his request is in the way, and the log, the CLI and the page must say the same. So the
sentence is made here, from the same rooms that the job was refused by.
"""

from collections.abc import Iterable, Sequence

from coordinator.core.displacement import Spread
from coordinator.core.model import JobSpec
from coordinator.core.rooms import Room, able, most_left_bytes
from coordinator.core.sentences import listed, quantity
from coordinator.core.shares import SHARERS_MAX
from coordinator.core.validate import could_hold, describe_need, describe_ranks, gigabytes, suits

# Of the nodes that have places for a gang; a sentence that names all of a large fleet is not read.
NODES_NAMED_MAX = 4


def why_not(spec: JobSpec, rooms: Sequence[Room]) -> str:
    if spec.ranks > 1:
        return _why_not_all(spec, rooms)
    if spec.shared_gpu_memory_bytes and rooms:
        return _why_no_share(spec, rooms)
    need = f"needs {describe_need(spec)} on one node"
    if not rooms:
        return f"{need}; no node takes work at present"
    if spec.gpus == 0:
        slots = sum(max(0, room.slots) for room in rooms)
        most = _most_memory(room for room in rooms if room.slots > 0)
        free = quantity(slots, "place is", "places are")
        return f"{need}; {free} free, and at most {most} of memory beside one"
    counts = [(*room.suiting(spec), room) for room in rooms]
    largest, _, where = max(counts, key=lambda one: one[0])
    total = sum(there for _, there, _ in counts)
    if largest >= spec.gpus:
        most = _most_memory(room for free, _, room in counts if free >= spec.gpus)
        return f"{need}; the GPUs are free, but at most {most} of memory is where they are"
    if total == 0:
        return f"{need}; no node that takes work at present has any"
    if largest == 0:
        taken = (
            "the only one that fits is taken" if total == 1 else f"all {total} that fit are taken"
        )
        return f"{need}; {taken}"
    return f"{need}; the largest free block is {largest} on {where.offer.node}, of {total} that fit"


def kept_for(spec: JobSpec, held: Iterable[tuple[int, Spread]]) -> str:
    """What is kept for whom of that which it could use; empty for nothing."""
    sentence = ""
    for job_id, spread in held:
        uuids = {uuid: None for _, shares in spread for share in shares for uuid in share}
        count = sum(
            1 for room, _ in spread for gpu in room.offer.gpus
            if gpu.uuid in uuids and suits(spec, gpu)
        )  # fmt: skip
        if spec.gpus and count:
            nodes = [room.offer.node for room, _ in spread][:NODES_NAMED_MAX]
            noun, verb = ("GPU", "is") if count == 1 else ("GPUs", "are")
            sentence += f"; {count} {noun} on {listed(nodes)} {verb} kept for job {job_id}"
    return sentence


def _why_no_share(spec: JobSpec, rooms: Sequence[Room]) -> str:
    need = f"needs {describe_need(spec)}"
    knowing = [room for room in rooms if room.offer.shares]
    outdated = len(rooms) - len(knowing)
    which, them = quantity(outdated, "node runs", "nodes run"), "it" if outdated == 1 else "them"
    tail = f"; {which} an agent that cannot share GPUs: upgrade {them}" if outdated else ""
    total = sum(room.suiting(spec)[1] for room in knowing)
    if total == 0:
        return f"{need}; no node that takes work at present has one{tail}"
    left_bytes, jobs, node = most_left_bytes(spec, knowing)
    if left_bytes >= spec.shared_gpu_memory_bytes:
        most = _most_memory(room for room in knowing if room.has_share(spec))
        return f"{need}; the share is free, but at most {most} of memory is where it is"
    if not jobs:
        taken = "the only one that fits is" if total == 1 else f"all {total} that fit are"
        return f"{need}; {taken} taken{tail}"
    beside = f"beside {quantity(jobs, 'job')} ({SHARERS_MAX} at most)"
    left = gigabytes(left_bytes)
    return f"{need}; the most that is left of one is {left}, on {node} {beside}{tail}"


def _why_not_all(spec: JobSpec, rooms: Sequence[Room]) -> str:
    outdated = [room.offer for room in rooms if not room.offer.gangs]
    count = sum(1 for offer in outdated if could_hold(spec, offer.gpus, offer.memory_bytes))
    which, them = quantity(count, "node runs", "nodes run"), "it" if count == 1 else "them"
    tail = f"; {which} an agent from before gangs: upgrade {them}" if count else ""
    return _which_places(spec, rooms) + tail


def _which_places(spec: JobSpec, rooms: Sequence[Room]) -> str:
    need = f"needs {describe_ranks(spec)}"
    if not rooms:
        return f"{need}; no node takes work at present"
    counts = [(len(answer.ranks), room.offer.node) for room, answer in able(rooms, spec)]
    free = sorted(counts, key=lambda pair: (-pair[0], pair[1]))
    total = sum(count for count, _ in free)
    if not total:
        return f"{need}; a place for none of them is free"
    if len(free) == 1:
        some = "a place for 1 is" if total == 1 else f"places for {total} are"
        return f"{need}; {some} free, on {free[0][1]}"
    where = [f"{count} on {node}" for count, node in free[:NODES_NAMED_MAX]]
    if len(free) > NODES_NAMED_MAX:
        rest = free[NODES_NAMED_MAX:]
        where.append(f"{sum(count for count, _ in rest)} on {len(rest)} more")
    return f"{need}; places for {total} are free, {listed(where)}"


def _most_memory(rooms: Iterable[Room]) -> str:
    return gigabytes(max((max(0, room.memory_bytes) for room in rooms), default=0))
