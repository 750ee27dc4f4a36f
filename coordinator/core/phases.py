"""The phases of jobs, attempts, nodes, their power, and GPUs, each as one table.

Problem: phases that are assigned wherever it seems handy drift into combinations nobody thought of.
Here each thing has one table of legal transitions, `advance` is the only way from one phase to the
next, and an illegal step raises: it is a bug of ours, never a peer's fault. ARCHITECTURE.md's
diagrams are generated from these tables, so they cannot lie.
"""

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from coordinator.core.capacity_model import Power


class JobPhase(Enum):
    QUEUED = "queued"
    HELD = "held"
    ACTIVE = "active"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class AttemptPhase(Enum):
    ASSIGNED = "assigned"
    RUNNING = "running"
    STOPPING = "stopping"
    UNREACHABLE = "unreachable"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    YIELDED = "yielded"
    CANCELLED = "cancelled"
    LOST = "lost"
    REFUSED = "refused"


class NodePhase(Enum):
    UP = "up"
    SUSPECT = "suspect"
    LOST = "lost"


class NodeIntent(Enum):
    OPEN = "open"
    CORDONED = "cordoned"
    DRAINING = "draining"
    DRAINED = "drained"


class GpuPhase(Enum):
    FREE = "free"
    HELD = "held"
    ABSENT = "absent"


class IllegalTransition(AssertionError):
    """A core tried to take a step that its table does not have."""


Phase = TypeVar("Phase", bound=Enum)

J, A, N, W, G, P = JobPhase, AttemptPhase, NodePhase, NodeIntent, GpuPhase, Power

JOB_TRANSITIONS: Mapping[JobPhase, tuple[JobPhase, ...]] = {
    J.QUEUED: (J.ACTIVE, J.HELD, J.CANCELLED, J.FAILED),
    J.HELD: (J.QUEUED, J.CANCELLED),
    # Back to QUEUED: its attempt yielded, failed with restarts left, was refused, or its node is
    # out of reach.
    J.ACTIVE: (J.QUEUED, J.HELD, J.CANCELLING, J.SUCCEEDED, J.FAILED, J.CANCELLED),
    J.CANCELLING: (J.CANCELLED,),
    # An ended job runs again only when its owner says `requeue`.
    J.SUCCEEDED: (J.QUEUED,),
    J.FAILED: (J.QUEUED,),
    J.CANCELLED: (J.QUEUED,),
}

_ATTEMPT_ENDS = (A.SUCCEEDED, A.FAILED, A.YIELDED, A.CANCELLED, A.LOST, A.REFUSED)

ATTEMPT_TRANSITIONS: Mapping[AttemptPhase, tuple[AttemptPhase, ...]] = {
    A.ASSIGNED: (A.RUNNING, A.STOPPING, A.UNREACHABLE, *_ATTEMPT_ENDS),
    A.RUNNING: (A.STOPPING, A.UNREACHABLE, *_ATTEMPT_ENDS),
    A.STOPPING: (A.UNREACHABLE, *_ATTEMPT_ENDS),
    # Its node came back before another attempt took its place.
    A.UNREACHABLE: (A.ASSIGNED, A.RUNNING, A.STOPPING, A.LOST),
    A.SUCCEEDED: (),
    A.FAILED: (),
    A.YIELDED: (),
    A.CANCELLED: (),
    A.LOST: (),
    A.REFUSED: (),
}

NODE_TRANSITIONS: Mapping[NodePhase, tuple[NodePhase, ...]] = {
    N.UP: (N.SUSPECT, N.LOST),
    N.SUSPECT: (N.UP, N.LOST),
    N.LOST: (N.UP,),
}

INTENT_TRANSITIONS: Mapping[NodeIntent, tuple[NodeIntent, ...]] = {
    W.OPEN: (W.CORDONED, W.DRAINING),
    W.CORDONED: (W.OPEN, W.DRAINING),
    W.DRAINING: (W.DRAINED, W.OPEN, W.CORDONED),
    W.DRAINED: (W.OPEN, W.CORDONED, W.DRAINING),
}

GPU_TRANSITIONS: Mapping[GpuPhase, tuple[GpuPhase, ...]] = {
    G.FREE: (G.HELD, G.ABSENT),
    G.HELD: (G.FREE, G.ABSENT),
    G.ABSENT: (G.FREE, G.HELD),
}

POWER_TRANSITIONS: Mapping[Power, tuple[Power, ...]] = {
    P.ON: (P.LEAVING,),
    # Back to ON: it is wanted after all, a person says so, or it has died meanwhile.
    P.LEAVING: (P.STOPPING, P.ON),
    # Back to ON: it was ordered off and is heard all the same. FAILED: a rented one of which nobody
    # knows that it is gone.
    P.STOPPING: (P.OFF, P.ON, P.FAILED),
    # ON without STARTING: a person has pressed the button.
    P.OFF: (P.STARTING, P.ON),
    # To STOPPING: what there may be of a rented one that did not come is given back.
    P.STARTING: (P.ON, P.FAILED, P.STOPPING),
    P.FAILED: (P.STARTING, P.ON, P.STOPPING),
}

JOB_ENDED = (J.SUCCEEDED, J.FAILED, J.CANCELLED)
ATTEMPT_ENDED = _ATTEMPT_ENDS
# On a node that is in touch, as far as anybody knows.
ATTEMPT_LIVE = (A.ASSIGNED, A.RUNNING, A.STOPPING)
# Its room is taken already: nobody else can start for that, and where it has no GPUs nothing else
# that people are told changes either.
ATTEMPT_BEGINS = (A.ASSIGNED, A.RUNNING)


def advance(
    table: Mapping[Phase, tuple[Phase, ...]], present: Phase, following: Phase, thing: str
) -> Phase:
    """The next phase, if the table has that step; staying where one is always is legal. Raises
    `IllegalTransition`."""
    if following is not present and following not in table[present]:
        raise IllegalTransition(f"{thing} cannot go from {present.value} to {following.value}")
    return following


def diagram(table: Mapping[Phase, tuple[Phase, ...]]) -> str:
    """The table as a Mermaid state diagram, for ARCHITECTURE.md."""
    lines = ["stateDiagram-v2"]
    for present, following in table.items():
        lines += [f"    {present.value} --> {step.value}" for step in following]
        if not following:
            lines.append(f"    {present.value} --> [*]")
    return "\n".join(lines)
