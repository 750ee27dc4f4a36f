"""Where copies of checkpoints are, and where those of an attempt go.

Problem: the coordinator names nodes, and says of a copy in the shared directory only that it is
shared. Where that directory is, each node knows for itself, and one that has none cannot read it.
"""

from dataclasses import replace

from agent.core.attempt import LiveAttempt
from agent.core.state import State
from agent.core.values import ReplicaSource, RestoreCandidate

SHARED = "shared"


def reachable(
    state: State, candidates: tuple[RestoreCandidate, ...]
) -> tuple[RestoreCandidate, ...]:
    """The coordinator knows that a copy is shared; where that directory is, each node knows."""
    here = state.options.shared_directory

    def known(sources: tuple[ReplicaSource, ...]) -> tuple[ReplicaSource, ...]:
        return tuple(
            replace(source, address=here) if source.node == SHARED else source
            for source in sources
            if source.node != SHARED or here
        )

    return tuple(
        replace(
            candidate,
            sources=known(candidate.sources),
            parts=tuple(replace(part, sources=known(part.sources)) for part in candidate.parts),
        )
        for candidate in candidates
    )


def target_of(state: State, live: LiveAttempt) -> ReplicaSource | None:
    """Where its copies go; `None`: nowhere."""
    if live.record.spec.replication == "none":
        return None
    if state.options.shared_directory:
        return ReplicaSource(SHARED, state.options.shared_directory)
    return live.record.replica_target
