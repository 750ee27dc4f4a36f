"""When something happened on a node, by our clock where its own is wrong.

Problem: a node with a dead battery begins in 1970, or a day ahead, until a time server is found.
What it says of when a trainer began is set against when we ordered that: a day of loading, or of
silence, would be in the job's account, and such a job would look as if a stop cost it nothing.

How: the agent says beside its time for how long it has been so, by a clock that nobody sets. A
message is on its way for less than `APART_MS`; how long it has waited here, for a disk that was
full, we know. Where both differ by more its time is not believed; within that it is the better one,
for it does not depend on the way. Nothing of an attempt was before we ordered it: where an agent
has been started anew its wall clock alone tells for how long, and one that lies may say that it has
been so since before there were calendars.
"""

from dataclasses import replace

from coordinator.core.live import LiveNode
from coordinator.core.messages import AgentEvent
from coordinator.core.sentences import quantity
from coordinator.core.state import Instant, State

APART_MS = 3_000
# From here on people hear of it: less may have been a slow link.
SAID_MS = 30_000


def ours(
    state: State, now: Instant, live: LiveNode, event: AgentEvent, came_ms: int | None
) -> AgentEvent:
    """The event, which came at `came_ms`, with a time that can be set against ours."""
    if event.age_ms is None:
        return event
    waited_ms = 0 if came_ms is None else now.now_ms - came_ms
    attempt = state.attempts.get(event.attempt)
    ordered_ms = 0 if attempt is None else min(attempt.assigned_unix_ms, now.unix_ms)
    unix_ms = max(ordered_ms, now.unix_ms - event.age_ms - waited_ms)
    ahead_ms = event.unix_ms - unix_ms
    wrong = abs(ahead_ms) > SAID_MS
    if wrong and not live.clock_wrong:
        side = "ahead of" if ahead_ms > 0 else "behind"
        reason = f"it is {quantity(abs(ahead_ms) // 1_000, 'second')} {side} ours"
        state.log("warning", "node.clock", node=live.node.id, reason=reason)
    live.clock_wrong = wrong
    return event if abs(ahead_ms) <= APART_MS else replace(event, unix_ms=unix_ms)
