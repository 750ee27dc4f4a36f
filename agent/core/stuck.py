"""Processes that outlive a kill, and that the coordinator hears of them.

Problem: a process that waits in the kernel for a device that does not answer takes no signal. Its
attempt cannot end and keeps its GPUs, as it must; a fleet's operator, who could cordon and reboot
the node, reads no node's log.

How: it is a state and no event. While there are such processes each hello and each heartbeat lists
them with their attempt, so nothing has to be kept, repeated or taken back: an agent that is
restarted sees them again a minute after it has repeated the kill, says until then that it does not
know, and a list without them says that they are gone. The log has each new set of them once.
"""

from typing import TYPE_CHECKING

from agent.core.values import ProcessesStuck

if TYPE_CHECKING:
    from agent.core.state import State

PIDS_MAX = 16  # what a person looks at; a node that has more needs the same reboot
REASON = "they wait in the kernel (state D), where no signal reaches them"
SUGGESTION = "cordon the node (baton cordon) and reboot it"


def told(state: "State", event: ProcessesStuck) -> None:
    """Somebody has looked at what a kill has left of an attempt."""
    live = state.attempts.get(event.attempt_id)
    pids = event.pids[:PIDS_MAX]
    if live is None or not live.live or pids == live.stuck:
        return
    before, live.stuck = live.stuck, pids
    if not pids:
        if before:
            state.log("info", "process.movable", attempt=live.record.id)
        return
    state.log(
        "error",
        "process.unkillable",
        attempt=live.record.id,
        pids=list(pids),
        gpus=list(live.record.gpu_uuids),
        reason=f"{REASON}; {SUGGESTION}",
    )
