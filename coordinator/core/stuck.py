"""Processes that outlive a kill on some node, and what a person can do about it.

Problem: a process that waits in the kernel for a broken device takes no signal, so its attempt does
not end and its GPUs stay held. Nothing here can mend that; but whoever looks at the fleet must see
why a node has fewer GPUs, and that only a reboot helps.

How: a node lists such processes with each attempt that it holds (`HeldAttempt.stuck`). What it
lists is what counts: a set that is new is logged, one that is listed no longer is gone. One of
which it does not know is as it was: its agent has been restarted, and nobody has looked yet.
`baton nodes` shows the sentence for as long as there is one. The node is not cordoned for it, since
its other GPUs may be well: that is a person's to say.
"""

from coordinator.core.messages import HeldAttempt
from coordinator.core.phases import NodeIntent
from coordinator.core.state import LiveNode, State


def heard(state: State, live: LiveNode, held: tuple[HeldAttempt, ...]) -> None:
    """A hello or a heartbeat has listed what the node holds."""
    before, live.stuck = live.stuck, {}
    for item in held:
        pids = before.get(item.attempt, ()) if item.stuck is None else item.stuck
        if pids:
            live.stuck[item.attempt] = pids
    for attempt_id, pids in live.stuck.items():
        if before.get(attempt_id) != pids:
            state.log(
                "error", "process.unkillable", node=live.node.id, attempt=attempt_id,
                pids=list(pids), reason=_advice(live),
            )  # fmt: skip
    for attempt_id in before:
        if attempt_id not in live.stuck:
            state.log("info", "process.gone", node=live.node.id, attempt=attempt_id)


def describe(live: LiveNode) -> str:
    """What does not die on this node, in one line; empty: everything does."""
    if not live.stuck:
        return ""
    named = ", ".join(
        f"{' '.join(str(pid) for pid in pids)} of attempt {attempt_id}"
        for attempt_id, pids in live.stuck.items()
    )
    return f"processes outlive their kill (pid {named}): {_advice(live)}"


def _advice(live: LiveNode) -> str:
    reboot = "reboot it: no signal reaches them in the kernel"
    if live.node.intent is NodeIntent.OPEN:
        return f"cordon {live.node.id} and {reboot}"
    return reboot
