"""Whether the ranks of a job send a checkpoint ahead of their stop, and when that has arrived.

Problem: of a job of one rank its agent decides alone (`agent/core/precopy.py`). Ranks cannot: the
first agent that finds no gain in it, or has done it, would stop its rank, and with that all others
in the middle of theirs.

How: each agent says with its heartbeats what a checkpoint sent ahead would gain for its rank, and
knows nothing of the others. Here, at the stop, it is decided for all: it pays where a rank's node
to be lacks its part of the last checkpoint, that rank would gain enough, and rank 0, which alone is
asked to save and tells the others, looks for such a request. Then the agents hold the stop back,
until they are told to go on with it, as soon as a commit lies where all parts should, or until the
limit that they were given. A part that cannot be sent is a wait for that limit.

Nothing is kept: a gain is what the last heartbeat said, and that a rank's stop is held back is
recorded with the attempt.
"""

from coordinator.core.messages import HeldAttempt
from coordinator.core.model import SHARED, Attempt, Job, Part
from coordinator.core.state import LiveNode, State

# As for one rank (GAIN_MS_MIN there): what one more capture costs those who wait for the GPUs.
GAIN_MS_MIN = 500


def heard(live: LiveNode, held: tuple[HeldAttempt, ...]) -> None:
    """A hello or a heartbeat has listed what the node holds."""
    live.precopy_gains = {
        item.attempt: item.precopy_gain_ms for item in held if item.precopy_gain_ms is not None
    }


def why_not(state: State, job: Job, gang: list[Attempt], targets: list[str]) -> str:
    """The sentence that says why its ranks, whose copies would go to these nodes, stop at once;
    empty where they send ahead."""
    gains_ms: list[int] = []
    for rank in gang:
        gain_ms = state.nodes[rank.node].precopy_gains.get(rank.id)
        if gain_ms is None:
            return f"the agent on {rank.node} does not wait for other ranks, or has just started"
        gains_ms.append(gain_ms)
    if not gains_ms or not gains_ms[0]:
        return "rank 0 does not look for a request to save, or has no large state"
    pieces = _pieces(state, job)
    lacking = [
        gain_ms
        for rank, target, gain_ms in zip(gang, targets, gains_ms, strict=True)
        if not _lies(pieces, rank, target)
    ]
    if not lacking:
        return "all parts of the last checkpoint lie where they should: only the change follows"
    most_ms = max(lacking)
    return "" if most_ms >= GAIN_MS_MIN else f"it would save {most_ms} ms: too little"


def arrived(state: State, job: Job, gang: list[Attempt]) -> bool:
    """Whether the last checkpoint lies where its ranks' copies go."""
    pieces = _pieces(state, job)
    return all(_lies(pieces, rank, rank.replica_node) for rank in gang)


def _pieces(state: State, job: Job) -> tuple[Part, ...]:
    good = state.good_checkpoints(job)
    return good[0].pieces if good else ()


def _lies(pieces: tuple[Part, ...], rank: Attempt, target: str) -> bool:
    """Of a whole checkpoint, rank 0's, the others have nothing to send; without a target likewise,
    but for those who have no checkpoint yet."""
    if not target or (pieces and rank.rank >= len(pieces)):
        return True
    replicas = pieces[rank.rank].replicas if pieces else ()
    return target in replicas or SHARED in replicas
