"""Why a job runs where it runs: the sentence of its start.

Problem: who has a place wants to know what was chosen there, and by what: its checkpoint, what is
left for others, or how fast it is on that type. That is said where it is known, as it starts.
"""

from collections.abc import Collection, Sequence

from coordinator.core.displacement import Spread
from coordinator.core.model import JobSpec
from coordinator.core.sentences import listed, quantity
from coordinator.core.validate import gigabytes


def where(spec: JobSpec, replicas: Collection[str], near: Collection[str], spread: Spread) -> str:
    """On what it runs, and why there: `replicas` hold its last checkpoint, those `near` most of
    it."""
    if len(spread) > 1:
        first, *rest = [(len(shares), room.offer.node) for room, shares in spread]
        parts = [f"{first[0]} of its {spec.ranks} ranks on {first[1]}"]
        parts += [f"{count} on {node}" for count, node in rest]
        return f"runs with {listed(parts)}, the fewest nodes that have room"
    room, shares = spread[0]
    node = room.offer.node
    gpu_uuids = [uuid for share in shares for uuid in share]
    names = sorted({gpu.name for gpu in room.offer.gpus if gpu.uuid in gpu_uuids})
    place = f"{len(gpu_uuids)} x {', '.join(names)} on {node}" if names else node
    if spec.shared_gpu_memory_bytes:
        cap = gigabytes(spec.shared_gpu_memory_bytes)
        others = len(room.holds.get(gpu_uuids[0], ()))
        beside = f" beside {quantity(others, 'other')}" if others else ""
        place = f"{cap} of a shared {', '.join(names)} on {node}{beside}"
    if node in replicas:
        return f"runs on {place}, where its last checkpoint lies"
    if node in near:
        return f"runs on {place}, where most of its last checkpoint lies"
    if spec.gpus == 0 and not (spec.memory_bytes and room.mix and room.mix.total):
        return f"runs on {place}, which has the most free places"
    leaves = room.describe_rest(spec, shares)
    if leaves:
        return f"runs on {place} and leaves {leaves}"
    if spec.gpus == 0:
        return f"runs on {place}, where no GPU is free that could need its memory"
    return f"runs on {place}, the tightest fit"


def faster(types: Sequence[tuple[str, float]], spread: Spread) -> str:
    """What the choice of its type means for its speed; empty where nothing is known of that, or
    where it runs on several."""
    speeds = dict(types)
    taken = [uuid for _, shares in spread for gpu_uuids in shares for uuid in gpu_uuids]
    held = [name for room, _ in spread for name in room.types_of(taken)]
    mine = [name for name in speeds if name in held]
    if len(mine) != 1 or len(set(speeds.values())) == 1:
        return ""
    here = speeds.pop(mine[0])
    best = max(speeds, key=lambda name: speeds[name])
    slower = [name for name in speeds if speeds[name] < here]
    if speeds[best] > here:
        return f"; on {best} it would be about {speeds[best] / here:.1f} times as fast"
    than = max(slower, key=lambda name: speeds[name])
    return f"; it is about {here / speeds[than]:.1f} times as fast there as on {than}"
