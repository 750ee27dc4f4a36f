"""The node's side of its one stream to the coordinator.

A session begins with a hello that says everything; the welcome answers it. From then on heartbeats
say that the node lives, events are resent until acknowledged, and silence of a whole lease from the
other side ends the session, since a half-open connection looks exactly like a quiet one.

A heartbeat is small and often, since a lease hangs on it; telemetry is large and can wait. So a
heartbeat lists what runs and what trainers have said since the one before, and once in a report
interval a report of the GPUs is handed over beside it, for the shell to send with a heartbeat when
no event waits (`outbox.py`). Only what was read since the last report is reported; a stalled reader
makes telemetry old, never new again.

Ten thousand agents that were welcomed in one second must not speak in one millisecond ever after:
each has a phase within either interval, from its name, and keeps it however late it is once.

A coordinator with a lower leader epoch than one already obeyed is a ghost: it is not obeyed.

Where it has heard of more events than we can have sent, our journal is an older one that was put
back, and what we say next it would take for what it knows. Then it is another journal from here on,
under whose id it has heard nothing.
"""

from zlib import crc32

from agent.core import precopy
from agent.core.gpu_messages import OWN_RATE, FollowRate, Report
from agent.core.gpus import verdicts
from agent.core.messages import (
    CheckpointProposed,
    CloseLink,
    ComeLater,
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
from agent.core.state import Instant, PutJournalId, PutLeaderEpoch, State
from agent.core.values import HostFacts

# Told to wait longer, we look whether the coordinator that said so is still there.
WAIT_MS_MAX = 600_000
# Requests of up to 200 kB each, in one message of at most 16 MiB.
REQUESTS_TOLD_MAX = 64


def connected(state: State, now: Instant, event: Connected) -> None:
    state.connected, state.welcomed = True, False
    state.heartbeat_due_ms = state.resend_due_ms = None
    state.heard_ms = now.now_ms
    state.heartbeat_sequence = 0
    state.window.clear()
    host = state.host or HostFacts("", "", 0, 0, "", "")
    state.send(
        Hello(
            state.options.node,
            state.journal_id,
            state.options.peer_address,
            host,
            state.gpus,
            precopy.held(state),
            event.checkpoints,
            state.acknowledged_sequence,
            verdicts(state),
        )
    )


def disconnected(state: State, event: Disconnected) -> None:
    if state.welcomed:  # else there was none, and who dials has said why
        state.log("warning", "link.lost", reason=event.reason)
    state.connected = state.welcomed = False
    state.heartbeat_due_ms = state.resend_due_ms = None
    _follow_rate(state, OWN_RATE)


def _follow_rate(state: State, rate: str) -> None:
    if rate == state.ordered_rate:
        return
    state.ordered_rate = rate
    state.commands.append(FollowRate(rate))
    state.log("info", "telemetry.rate", rate=rate)


def _turn_away(state: State, reason: str) -> None:
    state.commands.append(CloseLink(reason))
    state.welcomed = False  # whatever else it says until the link is closed is not obeyed
    state.heartbeat_due_ms = state.resend_due_ms = None


def welcome(state: State, now: Instant, order: Welcome, chance: str) -> None:
    if order.leader_epoch < state.leader_epoch:
        reason = f"leader epoch {order.leader_epoch} is stale; {state.leader_epoch} was seen"
        state.log("error", "link.stale_leader", reason=reason)
        _turn_away(state, reason)
        return
    heard, sent = order.acknowledged_sequence, state.sent_before
    sent = state.next_sequence - 1 if sent is None else sent
    if heard > sent:
        state.journal_id = chance
        state.records.append(PutJournalId(chance))
        reason = f"the coordinator has heard event {heard} of this node, and {sent} is the last"
        state.log("error", "journal.older", reason=reason)
        _turn_away(state, reason)
        return
    if order.leader_epoch > state.leader_epoch:
        state.leader_epoch = order.leader_epoch
        state.records.append(PutLeaderEpoch(order.leader_epoch))
    state.heartbeat_interval_ms = order.heartbeat_interval_ms
    state.report_interval_ms = order.report_interval_ms or order.heartbeat_interval_ms
    state.lease_ms = order.lease_ms
    _follow_rate(state, order.telemetry_rate)
    if state.welcomed:
        return  # said again, since something of it has changed
    node = state.options.node
    state.heartbeat_due_ms = now.now_ms + phase_ms(node, state.heartbeat_interval_ms)
    state.report_due_ms = now.now_ms + phase_ms(node, state.report_interval_ms)
    for live in state.attempts.values():
        live.told = None
    state.log("info", "link.up", leader_epoch=order.leader_epoch, spooled=len(state.spool))
    state.acknowledge(now, order.acknowledged_sequence)
    state.welcomed, state.sent_before = True, None
    for first in range(0, len(order.unknown), REQUESTS_TOLD_MAX):
        # before it has to refuse what they have to say
        heartbeat(state, now, order.unknown[first : first + REQUESTS_TOLD_MAX])
    resend(state, now)
    forget_answers(state)


def come_later(state: State, now: Instant, order: ComeLater) -> None:
    """We stand in line: a silence of so long says nothing of the coordinator."""
    if state.welcomed:
        return
    wait_ms = min(order.wait_ms, WAIT_MS_MAX)
    state.heard_ms = now.now_ms + wait_ms
    state.log("info", "link.in_line", wait_ms=wait_ms)


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


def phase_ms(node: str, interval_ms: int) -> int:
    """Where in an interval this node speaks, 1 to the whole of it."""
    return 1 + crc32(node.encode()) % interval_ms


def _following(due_ms: int, interval_ms: int, now: Instant) -> int:
    """The next moment of the same phase, when this one has passed."""
    return due_ms + max(0, (now.now_ms - due_ms) // interval_ms + 1) * interval_ms


def heartbeat(state: State, now: Instant, asked: tuple[str, ...] = ()) -> None:
    if not state.welcomed or state.heartbeat_due_ms is None:
        return
    state.heartbeat_sequence += 1
    interval_ms = state.heartbeat_interval_ms
    state.heartbeat_due_ms = _following(state.heartbeat_due_ms, interval_ms, now)
    due = state.report_due_ms <= now.now_ms
    if due:
        _report(state, now)
    progress = _progress(state, whole=due)
    held = precopy.held(state, asked)
    state.send(Heartbeat(state.heartbeat_sequence, None, (), held, progress))


def _report(state: State, now: Instant) -> None:
    """It stays due until there is something to report."""
    taken = state.window.take()
    if taken is None:
        return
    state.report_due_ms = _following(state.report_due_ms, state.report_interval_ms, now)
    state.commands.append(Report(*taken, state.sample_ms))


def _progress(state: State, whole: bool) -> tuple[tuple[str, Progress], ...]:
    """What trainers have said since the heartbeat before, or, in case that one was lost, ever."""
    said: list[tuple[str, Progress]] = []
    for live in state.attempts.values():
        if live.progress is not None and (whole or live.progress is not live.told):
            live.told = live.progress
            said.append((live.record.id, live.progress))
    return tuple(said)


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
