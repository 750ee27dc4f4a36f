"""Nodes: who is there, until when we believe it, and what the operator wants of them.

Problem: a silent node is either dead or cut off, and nobody can tell which (the "two generals" of
every cluster). So silence only ever starts a clock. A node is *suspect* when its connection closes
or its heartbeats are late, and *lost* when its lease ends; then its jobs may go elsewhere, and
whoever comes first, the node with its attempt or a new attempt with a higher epoch, has the job.
What a returning node still runs that is not its own any more, it is told to kill.

Everything here is level-triggered: a hello or a heartbeat lists what the node has, the difference
to what it should have is ordered again. Lost, repeated and reordered messages therefore cost time
and nothing else.
"""

from dataclasses import replace

from coordinator.core import (
    attempts,
    checkpoints,
    coruns,
    found,
    gangs,
    leases,
    parts,
    precopy,
    readings,
    restored,
    stuck,
    taken_back,
)
from coordinator.core.live import FOREIGN_SAID_MAX
from coordinator.core.messages import (
    CloseSession,
    Goodbye,
    Heartbeat,
    HeldAttempt,
    Hello,
    LeaseRenewal,
    StopAttempt,
    Welcome,
)
from coordinator.core.model import Attempt, Node, TelemetryRate
from coordinator.core.node_power import NodePower, silent
from coordinator.core.phases import (
    ATTEMPT_ENDED,
    INTENT_TRANSITIONS,
    AttemptPhase,
    GpuPhase,
    NodeIntent,
    NodePhase,
    advance,
)
from coordinator.core.sentences import quantity
from coordinator.core.state import Instant, LiveGpu, LiveNode, State, cut

ABSENCE_MS_MAX = 600_000  # a polite agent may announce ten minutes of absence; longer is a drain
# A tick that comes this late means that we were away (suspended, swapped out), not that every node
# was.
TICK_GAP_MS = 2_000


def hello(state: State, now: Instant, session: int, body: Hello) -> None:
    """A session begins, or says again what its node has; `arrivals.py` has let it in. Believe what
    the node says of itself, then order what differs from what it should have."""
    known = state.nodes.get(body.node)
    moved = known is not None and known.node.peer_address != body.peer_address
    # Not after our own restart, when all come.
    back = known is not None and known.session is None and known.newest_session >= 0
    live = _join(state, now, session, body)
    _welcome(state, live, taken_back.asked(state, body))
    present = dict.fromkeys(body.checkpoints)
    # Of a node that is new here nothing says which copies it was believed to hold.
    pieces = state.indices.pieces if known is None else {**live.digests, **present}
    job_ids = state.indices.jobs_of(pieces)
    live.unlisted, live.parts_found = found.unlisted(state, present), {}
    checkpoints.reconcile_copies(state, live.node.id, present, job_ids)
    parts.reconcile(state, live.node.id, present, job_ids)
    _reconcile(state, now, live, body.attempts, whole=True)
    _settle_gpus(state, live, body.attempts)
    stuck.heard(state, live, body.attempts)
    precopy.heard(live, body.attempts)
    checkpoints.retarget(state, job_ids)
    if moved or back:
        checkpoints.tell_back(state, live.node.id)
    for attempt_id in list(live.attempts):
        attempt = state.attempts[attempt_id]
        job = state.jobs[attempt.job_id]
        state.send(live.node.id, checkpoints.target_order(state, job, attempt))
    state.indices.keep_changed[live.node.id] = None
    state.log("info", "node.up", node=live.node.id, gpus=len(live.gpus))


def _welcome(state: State, live: LiveNode, unknown: tuple[str, ...] = ()) -> None:
    state.send(
        live.node.id,
        Welcome(
            state.leader_epoch,
            state.options.heartbeat_interval_ms,
            state.options.lease_ms,
            live.node.acknowledged,
            live.node.telemetry_rate,
            state.options.report_interval_ms,
            unknown,
        ),
    )


def set_rate(state: State, live: LiveNode, rate: TelemetryRate) -> None:
    """An operator's word on how often its GPUs are read; a node that is away hears it later."""
    if rate is live.node.telemetry_rate:
        return
    state.put_node(replace(live.node, telemetry_rate=rate))
    state.log("info", "node.telemetry_rate", node=live.node.id, rate=rate.value)
    if live.session is not None:
        _welcome(state, live)


def _join(state: State, now: Instant, session: int, body: Hello) -> LiveNode:
    live = state.nodes.get(body.node)
    host = replace(body.host, gpu_absence=cut(body.host.gpu_absence))
    node = Node(
        body.node, body.journal_id, body.peer_address, host, body.gpus,
        acknowledged=body.acknowledged,
    )  # fmt: skip
    if live is None:
        past = state.forgotten.get(body.node)
        if past is not None:
            node = replace(node, power=NodePower(changes=past.node.power.changes))
        if past is not None and past.node.journal_id == body.journal_id:
            # What it did was counted before somebody took it out of the fleet.
            heard = max(body.acknowledged, past.node.acknowledged)
            node = replace(node, acknowledged=heard)
        live = LiveNode(node, NodePhase.SUSPECT, 0)
        state.nodes[body.node] = live
        _count_copies(state, live)
        state.put_node(node)
    else:
        if live.session is not None and live.session != session:
            state.sessions.pop(live.session, None)
            state.commands.append(CloseSession(live.session, "a newer session took its place"))
        if live.phase is NodePhase.LOST or live.newest_session < 0:
            live.back_ms = now.now_ms
        if live.session is None:
            live.joined_ms = now.now_ms
        same_journal = live.node.journal_id == body.journal_id
        # A coordinator whose store is older than the agent's journal waits for no event that the
        # agent has dropped.
        known = live.node.acknowledged if same_journal else 0
        acknowledged = max(known, body.acknowledged)
        restored_once = state.proven.remembered_job_id is not None
        if same_journal and body.acknowledged > known and not restored_once:
            restored.tell_behind(state, live)
        node = replace(
            live.node,
            journal_id=node.journal_id,
            peer_address=node.peer_address,
            host=node.host,
            gpus=node.gpus,
            acknowledged=acknowledged,
        )
        if node != live.node:
            state.put_node(node)
        if not same_journal:
            _forgotten(state, now, live, body)
        if not (body.gangs and body.shares):
            _give_up_unknown(state, now, live, body)
    state.sessions[session] = body.node
    live.session = live.newest_session = session
    live.gangs, live.shares = body.gangs, body.shares
    state.rooms.touch(live.node.id)
    live.heartbeat_sequence = live.foreign = 0
    leases.heard(state, now, live)
    if live.phase is not NodePhase.UP:
        state.set_node_phase(live, NodePhase.UP, "")
    leases.watch(state, live)
    return live


def _count_copies(state: State, live: LiveNode) -> None:
    """What was said to lie on a node while it was forgotten; else it would not be told to keep
    it."""
    for job_id in state.indices.jobs_of(state.indices.pieces):
        kept = [piece for one in state.checkpoints.get(job_id, ()) for piece in one.pieces]
        for piece in (*kept, *state.parts.get(job_id, ())):
            if live.node.id in piece.replicas:
                live.digests[piece.digest] = live.digests.get(piece.digest, 0) + 1


def _forgotten(state: State, now: Instant, live: LiveNode, body: Hello) -> None:
    """A new journal: the node remembers nothing, so what it ran for us is over."""
    listed = {held.attempt: True for held in body.attempts}
    for attempt_id in list(live.attempts):
        if attempt_id not in listed:
            reason = f"{body.node} came back without its memory"
            attempts.lost(state, now, state.attempts[attempt_id], reason)


def _give_up_unknown(state: State, now: Instant, live: LiveNode, body: Hello) -> None:
    """Its agent has become an older one, or was one all along and was offered more by an older
    coordinator. One from before gangs would end the session at each order for a rank, for ever; one
    from before shares would start the job with no limit."""
    listed = {held.attempt: True for held in body.attempts}
    for attempt_id in list(live.attempts):
        attempt = state.attempts[attempt_id]
        if attempt_id in listed:
            continue
        if attempt.ranks > 1 and not body.gangs:
            attempts.lost(state, now, attempt, f"{body.node} runs an agent from before gangs")
        elif state.share_bytes(attempt_id) and not body.shares:
            attempts.lost(state, now, attempt, f"{body.node} runs an agent that cannot share GPUs")


def _reconcile(
    state: State, now: Instant, live: LiveNode, held: tuple[HeldAttempt, ...], whole: bool
) -> None:
    """Compare what the node has with what it should have. `whole`: a hello, whose list is complete
    and final."""
    listed = {item.attempt: item for item in held}
    strays: dict[str, int] = {}
    if whole:
        live.unknown = {}
    for attempt_id, item in listed.items():
        attempt = state.attempts.get(attempt_id)
        if attempt is not None and attempt_id in live.attempts:
            attempts.returned(state, now, attempt)
            restored.confirm(state, state.jobs[attempt.job_id])
            taken_back.heard(state, attempt, item)
        elif item.live and restored.is_newer(state, live.node.id, item):
            if not taken_back.take_back(state, now, live, item):
                strays[attempt_id] = restored.leave_alone(state, now, live, attempt_id)
        elif item.live:
            strays[attempt_id] = _stop_stray(state, now, live, attempt_id)
    for attempt_id in live.strays:
        if attempt_id not in strays and attempt_id not in live.attempts:
            state.release_gpus(live, attempt_id)
    live.strays = {known: at_ms for known, at_ms in strays.items() if known not in live.attempts}
    live.unknown = {known: item for known, item in live.unknown.items() if known in live.strays}
    for attempt_id in list(live.attempts):
        attempt = state.attempts[attempt_id]
        if attempt.phase in ATTEMPT_ENDED:
            continue  # given up with its gang, meanwhile
        if attempt_id not in listed:
            _missing(state, now, attempt, whole)
        elif attempt.phase is AttemptPhase.STOPPING and _due(state, now, attempt_id, whole):
            attempts.order_stop(state, now, attempt)


def _missing(state: State, now: Instant, attempt: Attempt, whole: bool) -> None:
    """The node does not list an attempt that it should have."""
    unsure = restored.is_unsure(state.jobs[attempt.job_id])
    if attempt.phase is AttemptPhase.ASSIGNED and not unsure:
        if _due(state, now, attempt.id, whole):
            attempts.order_start(state, now, attempt)
    elif attempt.phase is AttemptPhase.STOPPING and attempt.started_unix_ms is None:
        # The node may never have heard of it; the order makes it answer either way.
        if _due(state, now, attempt.id, whole):
            attempts.order_stop(state, now, attempt)
    elif whole:
        reason = f"{attempt.node} does not know it any more"
        attempts.lost(state, now, attempt, reason)


def _due(state: State, now: Instant, attempt_id: str, whole: bool) -> bool:
    """Orders are repeated once a heartbeat, and at once in a new session."""
    ordered_ms = state.ordered_ms.get(attempt_id)
    if whole or ordered_ms is None:
        return True
    return now.now_ms - ordered_ms >= state.options.heartbeat_interval_ms


def _stop_stray(state: State, now: Instant, live: LiveNode, attempt_id: str) -> int:
    ordered_ms = live.strays.get(attempt_id)
    interval_ms = state.options.heartbeat_interval_ms
    if ordered_ms is not None and now.now_ms - ordered_ms < interval_ms:
        return ordered_ms
    reason = "it is not this node's to run any more"
    state.log("warning", "attempt.stray", node=live.node.id, attempt=attempt_id, reason=reason)
    state.send(live.node.id, StopAttempt(attempt_id, None, reason))
    return now.now_ms


def _settle_gpus(state: State, live: LiveNode, held: tuple[HeldAttempt, ...]) -> None:
    """Who holds which GPU, from the node's own list and from what is assigned to it."""
    facts = {gpu.uuid: gpu for gpu in live.node.gpus}
    having = {attempt_id: state.attempts[attempt_id].gpu_uuids for attempt_id in live.attempts}
    for item in held:
        if item.live:
            having.setdefault(item.attempt, item.gpu_uuids)
    holders: dict[str, tuple[str, ...]] = {}
    for attempt_id, gpu_uuids in having.items():
        for uuid in gpu_uuids:
            holders[uuid] = (*holders.get(uuid, ()), attempt_id)
    for uuid in list(live.gpus):
        if uuid not in facts:
            # A GPU that the node no longer lists; its attempt finds out by itself.
            state.set_gpu(live, uuid, GpuPhase.ABSENT, holders.get(uuid, ()))
    for uuid, fact in facts.items():
        gpu = live.gpus.setdefault(uuid, LiveGpu(fact, GpuPhase.ABSENT))
        gpu.facts = fact
        who = holders.get(uuid, ())
        state.set_gpu(live, uuid, GpuPhase.HELD if who else GpuPhase.FREE, who)


def heartbeat(state: State, now: Instant, live: LiveNode, body: Heartbeat) -> None:
    if body.sequence <= live.heartbeat_sequence:
        return
    live.heartbeat_sequence = body.sequence
    leases.heard(state, now, live)
    if live.phase is NodePhase.SUSPECT:
        state.set_node_phase(live, NodePhase.UP, "")
        leases.watch(state, live)
    live.telemetry = body.host or live.telemetry
    for reading in body.gpus:
        if reading.uuid in live.gpus:
            readings.heard(state, now, live, reading)
    for attempt_id, progress in body.progress:
        if attempt_id in live.attempts:
            attempts.progressed(state, now, state.attempts[attempt_id], progress)
            coruns.heard(state, now, attempt_id, progress)
        elif (there := state.attempts.get(attempt_id)) and there.node != live.node.id:
            foreign(state, live, there)
    _reconcile(state, now, live, body.attempts, whole=False)
    _hold_stray_gpus(state, live, body.attempts)
    stuck.heard(state, live, body.attempts)
    precopy.heard(live, body.attempts)
    checkpoints.heard(state, now, live.node.id, body.attempts)
    if live.session is not None:
        state.send(live.node.id, LeaseRenewal(body.sequence))


def foreign(state: State, live: LiveNode, attempt: Attempt) -> None:
    """It speaks of what was given to another node, which no honest agent does, however late."""
    live.foreign += 1
    if live.foreign <= FOREIGN_SAID_MAX:
        reason = (
            f"it was given to {attempt.node}; what {live.node.id} says of it counts for nothing"
        )
        state.log(
            "warning", "attempt.foreign", node=live.node.id, attempt=attempt.id, reason=reason
        )


def _hold_stray_gpus(state: State, live: LiveNode, held: tuple[HeldAttempt, ...]) -> None:
    for item in held:
        if item.attempt not in live.strays:
            continue
        for uuid in item.gpu_uuids:
            gpu = live.gpus.get(uuid)
            if gpu is not None and gpu.phase is not GpuPhase.ABSENT:
                state.hold_gpu(live, uuid, item.attempt)


def goodbye(state: State, now: Instant, live: LiveNode, body: Goodbye) -> None:
    """A polite close: the agent restarts (its trainers go on), or it leaves for good (its jobs go
    elsewhere at once)."""
    live.expected_ms = 0
    if body.absence_ms is None:
        live.deadline_ms = now.now_ms
        _close(state, live, "its agent has left")
        expire(state, now, live, "its agent has left for good")
        checkpoints.retarget(state, state.indices.jobs_of(live.digests))
        return
    absence_ms = min(max(body.absence_ms, 0), ABSENCE_MS_MAX)
    live.deadline_ms = now.now_ms + absence_ms
    leases.watch(state, live)
    _close(state, live, f"its agent has stopped and asked for {absence_ms / 1000:g} s to come back")


def closed(state: State, now: Instant, session: int) -> None:
    """The stream broke. A dying process closes its connections, so this counts sooner than
    silence."""
    node_id = state.sessions.pop(session, None)
    live = state.nodes.get(node_id) if node_id is not None else None
    if live is None or live.session != session:
        return
    leases.closed(state, now, live)
    _close(state, live, "its connection has closed")


def _close(state: State, live: LiveNode, note: str) -> None:
    if live.session is not None:
        state.sessions.pop(live.session, None)
    live.session = None
    if live.phase is NodePhase.UP:
        state.set_node_phase(live, NodePhase.SUSPECT, note)
        if not silent(live.node.power):
            state.log("warning", "node.suspect", node=live.node.id, reason=note)


def tick(state: State, now: Instant) -> None:
    """Leases end, retries come due. If we were away ourselves, nobody is blamed for that time."""
    last_ms = state.last_tick_ms
    state.last_tick_ms = now.now_ms
    gap_ms = 0 if last_ms is None else now.now_ms - last_ms
    if gap_ms > TICK_GAP_MS:
        state.log("warning", "coordinator.away", gap_ms=gap_ms)
        leases.put_off(state, gap_ms)
        state.standing.put_off(gap_ms)
    # Where many are lost at once, those who send copies there are asked once, not for each.
    lost = [live for live in leases.due(state, now) if _look(state, now, live)]
    if lost:
        pieces = dict.fromkeys(digest for live in lost for digest in live.digests)
        checkpoints.retarget(state, state.indices.jobs_of(pieces))
    for node_id in list(state.indices.draining):
        settle_drain(state, state.nodes[node_id])
    changed, state.indices.keep_changed = state.indices.keep_changed, {}
    for node_id in changed:
        live = state.nodes[node_id]
        order = checkpoints.keep_order(live) if live.session is not None else None
        if order is not None:
            state.send(node_id, order)
    gangs.tick(state, now)
    checkpoints.move_standbys(state, now)
    for job_id, eligible_ms in list(state.eligible_ms.items()):
        if eligible_ms <= now.now_ms:
            state.eligible_ms.pop(job_id)
            state.dirty = True


def _look(state: State, now: Instant, live: LiveNode) -> bool:
    """Its silence may have lasted long enough to mean something; whether it is lost now."""
    if live.phase is NodePhase.LOST:
        return False
    quiet = f"it has not been heard for {now.now_ms - live.heard_ms} ms"
    if live.deadline_ms <= now.now_ms:
        expire(state, now, live, live.note if live.session is None and live.note else quiet)
        return True
    if live.phase is NodePhase.UP and live.suspect_ms <= now.now_ms:
        state.set_node_phase(live, NodePhase.SUSPECT, quiet)
        if not silent(live.node.power):
            state.log("warning", "node.suspect", node=live.node.id, reason=quiet)
    leases.watch(state, live)
    return False


def expire(state: State, now: Instant, live: LiveNode, why: str) -> None:
    """The lease has ended: the node is lost and its jobs return to the queue at their old place.
    Copies that went there are for the caller to send elsewhere."""
    reason = f"{live.node.id} is lost: {why}"
    if live.session is not None:
        state.commands.append(CloseSession(live.session, "the lease has ended"))
        state.sessions.pop(live.session, None)
        live.session = None
    state.set_node_phase(live, NodePhase.LOST, why)
    if not silent(live.node.power):
        state.log("error", "node.lost", node=live.node.id, reason=why)
    for attempt_id in list(live.attempts):
        attempts.unreachable(state, now, state.attempts[attempt_id], reason)
    live.strays = {}  # if it ever comes back, its hello lists them again
    for uuid, gpu in live.gpus.items():
        state.set_gpu(live, uuid, GpuPhase.ABSENT, gpu.holders)


def set_intent(
    state: State, now: Instant, live: LiveNode, intent: NodeIntent, why: str = ""
) -> None:
    present = advance(INTENT_TRANSITIONS, live.node.intent, intent, f"node {live.node.id}")
    if present is not live.node.intent:
        state.put_node(replace(live.node, intent=intent))
        state.log("info", f"node.{intent.value}", node=live.node.id)
    state.dirty = True
    if intent is NodeIntent.DRAINING:
        for attempt_id in list(live.attempts):
            reason = why or f"{live.node.id} is being drained"
            attempt = state.attempts[attempt_id]
            attempts.stop(state, now, attempt, reason, attempts.PRECOPY_DRAIN_MS)
        settle_drain(state, live)


def settle_drain(state: State, live: LiveNode) -> None:
    """A draining node is drained when nothing is left on it."""
    left = live.attempts or live.strays
    if live.node.intent is NodeIntent.DRAINING and not left:
        state.put_node(replace(live.node, intent=NodeIntent.DRAINED))
        state.log("info", "node.drained", node=live.node.id)


def why_closed(live: LiveNode) -> str:
    """Why the node takes no work, in one sentence; empty when it does."""
    if live.phase is not NodePhase.UP:
        return live.note
    if live.node.intent is NodeIntent.DRAINING:
        return "; ".join(filter(None, (live.node.closed_for, leaving(live))))
    if live.node.closed_for:
        return f"{live.node.closed_for}; `baton uncordon {live.node.id}` opens it all the same"
    if live.node.intent is not NodeIntent.OPEN:
        return f"closed by an operator; `baton uncordon {live.node.id}` opens it"
    return ""


def leaving(live: LiveNode) -> str:
    """What a draining node still has; empty: nothing, or it is not draining."""
    count = len(live.attempts) + len(live.strays)
    if live.node.intent is not NodeIntent.DRAINING or not count:
        return ""
    return f"{quantity(count, 'attempt is', 'attempts are')} still leaving"
