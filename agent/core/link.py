"""The node's side of its one stream to the coordinator.

A session begins with a hello that says everything; the welcome answers it. From then on heartbeats
say that the node lives, events are resent until acknowledged, and silence of a whole lease from the
other side ends the session, since a half-open connection looks exactly like a quiet one.

A coordinator with a lower leader epoch than one already obeyed is a ghost: it is not obeyed.
"""

from agent.core.gpus import verdicts
from agent.core.messages import (
    CheckpointProposed,
    CloseLink,
    Connected,
    Disconnected,
    Goodbye,
    Heartbeat,
    Hello,
    Leaving,
    Progress,
    Welcome,
)
from agent.core.pipeline import advance_pipeline
from agent.core.state import Instant, PutLeaderEpoch, State
from agent.core.values import GpuSample, HostFacts

# A reading older than this many heartbeats is not repeated as if it were new: unknown is honest.
STALE_HEARTBEATS = 3


def connected(state: State, now: Instant, event: Connected) -> None:
    state.connected, state.welcomed = True, False
    state.heartbeat_due_ms = state.resend_due_ms = None
    state.heard_ms = now.now_ms
    state.heartbeat_sequence = 0
    host = state.host or HostFacts("", "", 0, 0, "", "")
    state.send(
        Hello(
            state.options.node,
            state.journal_id,
            state.options.peer_address,
            host,
            state.gpus,
            state.held(),
            event.checkpoints,
            state.acknowledged_sequence,
            verdicts(state),
        )
    )


def disconnected(state: State, event: Disconnected) -> None:
    if state.connected:
        state.log("warning", "link.lost", reason=event.reason)
    state.connected = state.welcomed = False
    state.heartbeat_due_ms = state.resend_due_ms = None


def welcome(state: State, now: Instant, order: Welcome) -> None:
    if order.leader_epoch < state.leader_epoch:
        reason = f"leader epoch {order.leader_epoch} is stale; {state.leader_epoch} was seen"
        state.log("error", "link.stale_leader", reason=reason)
        state.commands.append(CloseLink(reason))
        state.welcomed = False  # whatever else it says until the link is closed is not obeyed
        state.heartbeat_due_ms = state.resend_due_ms = None
        return
    if order.leader_epoch > state.leader_epoch:
        state.leader_epoch = order.leader_epoch
        state.records.append(PutLeaderEpoch(order.leader_epoch))
    state.heartbeat_interval_ms = order.heartbeat_interval_ms
    state.lease_ms = order.lease_ms
    state.heartbeat_due_ms = now.now_ms + order.heartbeat_interval_ms
    state.log("info", "link.up", leader_epoch=order.leader_epoch, spooled=len(state.spool))
    state.acknowledge(now, order.acknowledged_sequence)
    state.welcomed = True
    resend(state, now)
    forget_answers(state)


def forget_answers(state: State) -> None:
    """Proposals that arrived while we were cut off were answered then; whether they were accepted
    shows in the coordinator's refusal of the next one, if at all."""
    waiting = {
        event.body.digest: True
        for event in state.spool.values()
        if isinstance(event.body, CheckpointProposed)
    }
    for live in state.attempts.values():
        for digest in [digest for digest in live.unanswered if digest not in waiting]:
            del live.unanswered[digest]
        advance_pipeline(state, live)


def resend(state: State, now: Instant) -> None:
    """From the oldest event that is not acknowledged, as if none had been sent."""
    state.sent_sequence = 0
    state.resend_due_ms = None
    state.flow(now)


def heartbeat(state: State, now: Instant) -> None:
    if not state.welcomed:
        return
    state.heartbeat_sequence += 1
    # Readings pace the heartbeats; this is for when they do not come.
    state.heartbeat_due_ms = now.now_ms + state.heartbeat_interval_ms * 3 // 2
    stale_ms = STALE_HEARTBEATS * state.heartbeat_interval_ms
    sample = state.sample
    fresh = sample is not None and now.now_ms - state.sample_ms <= stale_ms
    gpus: tuple[GpuSample, ...] = sample.gpus if sample is not None and fresh else ()
    state.send(
        Heartbeat(
            state.heartbeat_sequence,
            sample.host if sample is not None and fresh else None,
            gpus,
            state.held(),
            _progress(state),
        )
    )


def _progress(state: State) -> tuple[tuple[str, Progress], ...]:
    return tuple(
        (live.record.id, live.progress)
        for live in state.attempts.values()
        if live.progress is not None
    )


def leaving(state: State, event: Leaving) -> None:
    """Say goodbye while one can; the trainers go on."""
    state.send(Goodbye(event.absence_ms))
    state.commands.append(CloseLink("the agent is leaving"))


def order_tick(state: State, now: Instant) -> None:
    if state.heartbeat_due_ms is not None and state.heartbeat_due_ms <= now.now_ms:
        heartbeat(state, now)
    if state.resend_due_ms is not None and state.resend_due_ms <= now.now_ms:
        resend(state, now)
    if state.connected and now.now_ms - state.heard_ms >= state.lease_ms:
        reason = f"nothing was heard from the coordinator for {now.now_ms - state.heard_ms} ms"
        state.heard_ms = now.now_ms
        state.commands.append(CloseLink(reason))
