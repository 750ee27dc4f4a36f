"""What a tick looks at, kept up to date by what changes it.

Problem: of ten thousand nodes a handful drain, and of their attempts a handful is out of reach, but
who asks all of them four times a second to find these pays for ten thousand. So the few are known
by name; in the order in which they came to be.
"""

from dataclasses import dataclass, field

from coordinator.core.model import Attempt, Node
from coordinator.core.phases import ATTEMPT_ENDED, AttemptPhase, NodeIntent


@dataclass(slots=True)
class Indices:
    """`draining` nodes, and those whose list of checkpoints to keep has changed; attempts that have
    not ended, and those of them that are out of reach."""

    draining: dict[str, None] = field(default_factory=dict)
    keep_changed: dict[str, None] = field(default_factory=dict)
    open_attempts: dict[str, None] = field(default_factory=dict)
    unreachable: dict[str, None] = field(default_factory=dict)

    def put_node(self, node: Node) -> None:
        """After its intent may have changed."""
        _put(self.draining, node.id, member=node.intent is NodeIntent.DRAINING)

    def put_attempt(self, attempt: Attempt) -> None:
        """After its phase may have changed."""
        _put(self.open_attempts, attempt.id, member=attempt.phase not in ATTEMPT_ENDED)
        _put(self.unreachable, attempt.id, member=attempt.phase is AttemptPhase.UNREACHABLE)

    def forget_attempt(self, attempt_id: str) -> None:
        self.open_attempts.pop(attempt_id, None)
        self.unreachable.pop(attempt_id, None)


def _put(index: dict[str, None], name: str, *, member: bool) -> None:
    if member:
        index[name] = None
    else:
        index.pop(name, None)
