"""Which GPUs of an open node get no work, and of whom nothing is read.

Problem: a GPU that its agent cannot read may be well behind a slow driver, or about to fall off the
bus. Whoever places a job there bets the job; whoever closes it at the first late reading closes
half a fleet while drivers are loaded. And a GPU that is cordoned is no place for a standby either:
a handoff would wait there for a reset.

How: a heartbeat says of each GPU whether it was read. After `UNREAD_MS` of errors alone it gets no
new work, and what runs there goes on; with the next reading it is open again, by itself. A GPU that
is not read by order has no error and stays open.
"""

from coordinator.core.model import GpuTelemetry
from coordinator.core.state import Instant, LiveNode, State, cut

# Ten missed deadlines: a driver that was busy with one GPU, or loaded anew, has answered by then.
UNREAD_MS = 30_000


def heard(state: State, now: Instant, live: LiveNode, telemetry: GpuTelemetry) -> None:
    """What a heartbeat says of a GPU of this node."""
    gpu = live.gpus[telemetry.uuid]
    gpu.telemetry = telemetry
    if not telemetry.error:
        gpu.unread_since_ms = None
        if gpu.unread:
            gpu.unread = ""
            state.dirty = True
            state.log("info", "gpu.read_again", node=live.node.id, gpu=telemetry.uuid)
        return
    if gpu.unread_since_ms is None:
        gpu.unread_since_ms = now.now_ms
    silent_ms = now.now_ms - gpu.unread_since_ms
    if silent_ms < UNREAD_MS:
        return
    fresh = not gpu.unread
    gpu.unread = (
        f"gpu {telemetry.uuid} has not been read for {silent_ms // 1000} s, "
        f"{UNREAD_MS // 1000} s is the limit: {cut(telemetry.error)}"
    )
    if fresh:
        state.dirty = True  # who waits for it hears why
        state.log("warning", "gpu.unread", node=live.node.id, gpu=telemetry.uuid, reason=gpu.unread)


def closed(live: LiveNode) -> dict[str, str]:
    """The GPUs of a node that get no work, and why."""
    unread = {uuid: gpu.unread for uuid, gpu in live.gpus.items() if gpu.unread}
    return unread | {cordon.uuid: cordon.reason for cordon in live.node.gpu_cordons}


def shortage(state: State) -> str:
    """For who waits for a GPU."""
    cordoned = sum(len(live.node.gpu_cordons) for live in state.nodes.values())
    unread = sum(bool(gpu.unread) for live in state.nodes.values() for gpu in live.gpus.values())
    some = ""
    if cordoned:
        counted = "1 is cordoned for its" if cordoned == 1 else f"{cordoned} are cordoned for their"
        some = f"; {counted} health"
    if unread:
        some += f"; {unread} cannot be read"
    return some
