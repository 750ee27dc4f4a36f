"""The agent's core: `handle(now, event) -> effects`, and nothing else.

What a node must get right: never run an attempt twice, never let a stopped one start, never forget
an ending, go on training when the coordinator is away, and keep the trainers when it is itself
restarted. All of that is decided here, from values; the shell journals the records and then does
the commands. `next_wake_ms` says when time alone will matter next.
"""

from dataclasses import replace

from agent.core import clean, copies, endings, gpus, hangs, link, pipeline, precopy, shares, stuck
from agent.core.admission import is_past, why_not
from agent.core.attempt import AttemptRecord, LiveAttempt, Phase
from agent.core.gpu_messages import GpusInspected, Sampled
from agent.core.ids import parse_attempt_id
from agent.core.launch import compose
from agent.core.messages import (
    AttemptExited,
    AttemptMilestone,
    AttemptRefused,
    AttemptStarted,
    CaptureFound,
    ComeLater,
    CommitResult,
    Connected,
    Disconnected,
    Event,
    EventAck,
    ForgetAttempt,
    FromCoordinator,
    FromTrainer,
    KeepCheckpoints,
    KillProcess,
    LeaseRenewal,
    Leaving,
    Opened,
    Order,
    ProcessEnded,
    ProcessStarted,
    Progress,
    RegisterTrainer,
    ReplicationDone,
    ReplicationFailed,
    RestoreCheckpoint,
    RestoreDone,
    RestoreFailed,
    SetReplicaTarget,
    SignalProcess,
    StartAttempt,
    StartFailed,
    StartProcess,
    StopAttempt,
    StoreDone,
    StoreFailed,
    Tick,
    Welcome,
)
from agent.core.state import (
    MILESTONES_MAX,
    SPOOL_MAX,
    Effect,
    Instant,
    Memory,
    Options,
    State,
    sentence,
)
from agent.core.trainer_messages import (
    TrainerCheckpoint,
    TrainerHeedsSaves,
    TrainerHello,
    TrainerLeaving,
    TrainerMilestone,
    TrainerProgress,
    TrainerSection,
    TrainerSlab,
)
from agent.core.values import DriverLoaded, ProcessesStuck, ProcessExit, Restored, XidSeen

# The last millisecond of a protobuf Timestamp (timestamp.proto); a trainer may say anything.
UNIX_MS_MAX = 253_402_300_799_999


class NodeCore:
    """One node's decisions. Made from what the journal held; driven by `handle`."""

    def __init__(self, options: Options, memory: Memory) -> None:
        self.state = State(options, memory)

    def handle(self, now: Instant, event: Event) -> list[Effect]:
        """What follows from one event. Raises only for bugs of our own."""
        hangs.check_own_lateness(self.state, now)
        _dispatch(self.state, now, event)
        return self.state.take()

    def next_wake_ms(self) -> int | None:
        """When a `Tick` is due, if nothing else happens; `None`: not until something does."""
        state = self.state
        times = [state.heartbeat_due_ms, state.resend_due_ms, state.section_check_ms]
        times.append(clean.next_check_ms(state))
        if state.connected:
            times.append(state.heard_ms + state.lease_ms)
        for live in state.attempts.values():
            times += [live.kill_ms, live.settle_ms, live.replica_retry_ms, live.precopy_until_ms]
        return min((time for time in times if time is not None), default=None)


def _dispatch(state: State, now: Instant, event: Event) -> None:
    match event:
        case Opened():
            _opened(state, now, event)
        case Connected():
            link.connected(state, now, event)
        case Disconnected():
            link.disconnected(state, event)
        case FromCoordinator():
            state.heard_ms = now.now_ms
            _order(state, now, event.order, event.chance)
        case Sampled():
            state.sample, state.sample_ms = event.sample, now.now_ms
            state.window.add(event.sample)
            gpus.sampled(state, now, event.sample)
        case GpusInspected():
            for waiting, restored in clean.inspected(state, now, event):
                _restored(state, now, waiting, restored)
        case Leaving():
            link.leaving(state, event)
        case Tick():
            _tick(state, now)
        case ProcessEnded():
            _ended(state, now, event.exit)
            gpus.released(state, now)
        case ProcessesStuck():
            stuck.told(state, event)
        case XidSeen():
            gpus.xid_seen(state, now, event)
        case DriverLoaded():
            gpus.loaded(state, now)
        case _:
            live = state.attempts.get(event.attempt)
            if live is not None:
                _of_attempt(state, now, live, event)


def _of_attempt(state: State, now: Instant, live: LiveAttempt, event: Event) -> None:
    match event:
        case FromTrainer():
            _from_trainer(state, now, live, event)
        case RestoreDone():
            _restored(state, now, live, event.restored)
        case RestoreFailed():
            _refuse(state, now, live, event.reason, permanent=False)
        case ProcessStarted():
            _started(state, now, live, event)
        case StartFailed():
            # After an agent restart the failure may be the restart's, and not the program's.
            permanent = event.permanent and not live.again
            _refuse(state, now, live, event.reason, permanent=permanent)
        case StoreDone():
            pipeline.stored(state, now, live, event)
        case StoreFailed():
            pipeline.store_failed(state, now, live, event)
        case CaptureFound():
            pipeline.capture_found(state, now, live, event)
        case ReplicationDone():
            pipeline.replicated(state, now, live, event)
        case ReplicationFailed():
            pipeline.replication_failed(state, now, live, event)
    if precopy.is_over(state, live, event):
        live.precopy_until_ms = None
        _carry_out_stop(state, now, live)


# --- orders ---------------------------------------------------------------------------------------


def _order(state: State, now: Instant, order: Order, chance: str) -> None:
    if not state.welcomed and not isinstance(order, Welcome | ComeLater):
        return  # from nobody whose leader epoch is known to be good
    match order:
        case Welcome():
            link.welcome(state, now, order, chance)
            _forget_settled(state)
        case EventAck():
            state.acknowledge(now, order.sequence)
            _forget_settled(state)
        case StartAttempt():
            _start(state, now, order, chance)
        case StopAttempt():
            _stop(state, now, order)
        case KeepCheckpoints():
            pipeline.keep(state, order)
        case SetReplicaTarget():
            live = state.attempts.get(order.attempt)
            if live is not None:
                pipeline.retarget(state, now, live, order)
        case CommitResult():
            live = state.attempts.get(order.attempt)
            if live is not None:
                pipeline.answered(state, live, order)
        case ComeLater():
            link.come_later(state, now, order)
        case LeaseRenewal():
            pass  # being heard from is all that it says


def _start(state: State, now: Instant, order: StartAttempt, chance: str) -> None:
    """Accept, or refuse with a sentence. Twice is once, and what was stopped never starts."""
    named = parse_attempt_id(order.attempt)
    if is_past(state, named):
        return
    record = AttemptRecord(
        order.attempt,
        named.job_id,
        named.epoch,
        order.spec,
        order.gpu_uuids,
        copies.reachable(state, order.candidates),
        order.replica_target,
        order.spec.replication == "required",
        order.restart_count,
        token=chance,
        gang=order.gang,
        traceparent=order.traceparent,
        gpus_before=clean.before(state, order.gpu_uuids),
        gpu_memory_ratio=shares.ratio(state.gpus, order.gpu_uuids, order.spec),
    )
    live = state.add(record)
    live.accepted_ms = now.now_ms
    refusal = why_not(state, record)
    if refusal:
        _refuse(state, now, live, refusal, permanent=False)
        return
    state.log("info", "attempt.accepted", attempt=record.id, gpus=list(record.gpu_uuids))
    state.commands.append(RestoreCheckpoint(record.id, record.candidates, record.gang))


def _refuse(state: State, now: Instant, live: LiveAttempt, reason: str, permanent: bool) -> None:
    """It never ran here. Say why, once."""
    if live.record.phase not in (Phase.ACCEPTED, Phase.STARTING):
        return
    if live.record.stop_reason:
        body: AttemptExited | AttemptRefused = AttemptExited(reason="stopped before it started")
    else:
        body = AttemptRefused(sentence(reason), permanent)
    sequence = state.spool_event(now, live.record.id, body)
    state.put(live, Phase.ENDED, last_sequence=sequence)
    state.log("warning", "attempt.refused", attempt=live.record.id, reason=reason)


def _stop(state: State, now: Instant, order: StopAttempt) -> None:
    """Ask for a checkpoint and a leave, or kill at once. Asking again does not restart the
    grace."""
    live = state.attempts.get(order.attempt)
    if live is None:
        named = parse_attempt_id(order.attempt)
        if not state.is_fenced(named):
            state.fence(named)
            state.spool_event(now, order.attempt, AttemptExited(reason="it never started here"))
        return
    if not live.live:
        return
    kill_now = order.grace_ms is None
    known = live.record.stop_reason
    urgent = live.precopy_until_ms is not None and order.precopy_ms is None
    if known and not urgent and not (kill_now and live.record.stop_grace_ms is not None):
        return
    reason = order.reason or "the coordinator gave no reason"
    state.put(live, stop_reason=reason, stop_grace_ms=order.grace_ms)
    state.log("info", "attempt.stopping", attempt=live.record.id, reason=reason)
    precopy.begin(state, now, live, None if kill_now else order.precopy_ms)
    _carry_out_stop(state, now, live)
    pipeline.advance_pipeline(state, live)
    pipeline.hurry(state, now, live)


def _carry_out_stop(state: State, now: Instant, live: LiveAttempt) -> None:
    """The ladder: the SDK's word and the signal at once, SIGKILL after the grace. While a pre-copy
    is on its way it waits."""
    record = live.record
    if record.phase is not Phase.RUNNING or not record.stop_reason:
        return  # nothing to signal yet; `_started` and `_restored` look again
    if live.precopy_until_ms is not None:
        return
    if record.stop_grace_ms is None:
        live.kill_ms = None
        state.commands.append(KillProcess(record.id))
        return
    state.tell(record.id, type="stop", reason=record.stop_reason, grace_ms=record.stop_grace_ms)
    state.commands.append(SignalProcess(record.id, record.spec.stop_signal))
    live.kill_ms = now.now_ms + record.stop_grace_ms


# --- what happens on the node ---------------------------------------------------------------------


def _opened(state: State, now: Instant, event: Opened) -> None:
    """After a restart: go on from the journal, with the trainers that are still there."""
    state.host, state.gpus = event.host, event.gpus
    gpus.opened(state)
    alive = dict.fromkeys(event.adopted, True)
    clean.begin_idle(state, now, tuple(gpu.uuid for gpu in state.gpus))
    for live in list(state.attempts.values()):
        record = live.record
        if record.phase is not Phase.ENDED:
            state.commands.append(RegisterTrainer(record.id, record.token))
        if record.phase is Phase.ACCEPTED:
            state.commands.append(RestoreCheckpoint(record.id, record.candidates, record.gang))
        elif record.phase is Phase.STARTING:
            _order_again(state, now, live, record.id in alive)
        elif record.phase is Phase.RUNNING:
            if record.id in alive:
                state.log("info", "attempt.adopted", attempt=record.id)
                _carry_out_stop(state, now, live)
            else:
                reason = "its process was gone when the agent came back"
                _ended(state, now, ProcessExit(record.id, None, None, reason))
        elif record.phase is Phase.SETTLING:
            live.settle_ms = now.now_ms + pipeline.SETTLE_MS_MAX
            pipeline.settle(state, now, live)
        if live.record.pending is not None:
            pipeline.replicate(state, now, live)
    for attempt_id in alive:
        if attempt_id not in state.attempts:
            # The journal was lost: nobody answers for it any more, and its GPUs are needed.
            state.log("error", "attempt.unknown", attempt=attempt_id)
            state.commands.append(KillProcess(attempt_id))


def _order_again(state: State, now: Instant, live: LiveAttempt, alive: bool) -> None:
    """It was ordered before the agent went; whether it began, only the supervisor knows."""
    if live.record.stop_reason and not alive:
        _refuse(state, now, live, "stopped before it started", permanent=False)
        return
    live.again = True
    _order_process(state, live)


def _restored(state: State, now: Instant, live: LiveAttempt, restored: Restored) -> None:
    if live.record.phase is not Phase.ACCEPTED:
        return
    if live.record.stop_reason:
        _refuse(state, now, live, "stopped before it started", permanent=False)
        return
    if clean.is_pending(state, live.record.gpu_uuids):
        live.restored = restored
        return
    if leak := clean.why_not(state, live.record.gpu_uuids):
        _refuse(state, now, live, leak, permanent=False)
        return
    skipped = tuple((digest, sentence(reason)) for digest, reason in restored.skipped)
    for digest, reason in skipped:
        state.log(
            "error", "checkpoint.skipped", attempt=live.record.id, digest=digest, reason=reason
        )
    if live.accepted_ms is not None and restored.digest:
        live.restore_ms = now.now_ms - live.accepted_ms
    state.put(
        live,
        Phase.STARTING,
        restored_digest=restored.digest,
        restored_step=restored.step,
        restored_directory=restored.directory,
        skipped=skipped,
        held_ranks=restored.held_ranks,
        head=restored.digest,
        committed=restored.digest,
    )
    state.commands.append(RegisterTrainer(live.record.id, live.record.token))
    _order_process(state, live)


def _order_process(state: State, live: LiveAttempt) -> None:
    mine = [gpu for gpu in state.gpus if gpu.place and gpu.uuid in live.record.gpu_uuids]
    places = tuple((gpu.uuid, gpu.place) for gpu in mine)
    launch = replace(compose(live.record, state.options.launch), places=places)
    config = live.record.spec.trainer_config_json if live.record.spec.trainer else ""
    state.commands.append(StartProcess(launch, config))


def _started(state: State, now: Instant, live: LiveAttempt, event: ProcessStarted) -> None:
    record, pid = live.record, event.pid
    if record.phase is not Phase.STARTING:
        return
    state.put(live, Phase.RUNNING)
    age_ms, restore_ms, start_ms = event.age_ms, live.restore_ms, None
    if live.accepted_ms is not None:
        heard_ms = now.now_ms - live.accepted_ms - (restore_ms or 0)
        age_ms = min(age_ms, heard_ms)
        start_ms = heard_ms - age_ms
    restored = record.restored_digest, record.restored_step, record.skipped
    body = AttemptStarted(pid, *restored, restore_ms, start_ms, record.held_ranks)
    state.spool_event(Instant(now.now_ms, max(0, now.unix_ms - age_ms)), record.id, body)
    state.log("info", "attempt.started", attempt=record.id, pid=pid, step=record.restored_step)
    pipeline.copy_restored(state, now, live)
    _carry_out_stop(state, now, live)
    pipeline.advance_pipeline(state, live)


def _from_trainer(state: State, now: Instant, live: LiveAttempt, event: FromTrainer) -> None:
    match event.message:
        case TrainerHello():
            endings.begun(state, live)
            if live.precopy_until_ms is not None:
                precopy.ask(state, live)
            elif live.record.stop_reason:
                _carry_out_stop_again(state, live)
        case TrainerProgress(step=step, total_steps=total, metrics=metrics, time=time):
            hangs.advanced(state, now, live, step)
            live.progress = Progress(step, total or 0, metrics, time)
        case TrainerMilestone(name=name, unix_ms=unix_ms):
            if live.record.milestones < MILESTONES_MAX and len(state.spool) < SPOOL_MAX:
                state.put(live, milestones=live.record.milestones + 1)
                at = Instant(now.now_ms, min(unix_ms, UNIX_MS_MAX))
                state.spool_event(at, live.record.id, AttemptMilestone(name))
        case TrainerCheckpoint():
            pipeline.offer(state, live, event.message)
        case TrainerSlab():
            live.slab_bytes = event.message.slot_bytes
            pipeline.take_slab(state, live)
        case TrainerHeedsSaves():
            live.heeds_saves = True
        case TrainerSection():
            hangs.entered(state, now, live, event.message)
        case TrainerLeaving():
            endings.said(state, live, event.message)


def _carry_out_stop_again(state: State, live: LiveAttempt) -> None:
    """A trainer that connects late hears what it missed; the grace goes on as it began."""
    record = live.record
    grace_ms = record.stop_grace_ms or 0
    state.tell(record.id, type="stop", reason=record.stop_reason, grace_ms=grace_ms)


def _ended(state: State, now: Instant, ended: ProcessExit) -> None:
    live = state.attempts.get(ended.attempt_id)
    if live is None:
        state.commands.append(ForgetAttempt(ended.attempt_id))
        return
    if live.record.phase in (Phase.ACCEPTED, Phase.SETTLING, Phase.ENDED):
        return
    if live.progress is not None:
        link.heartbeat(state, now)  # its last progress, before its end is told
    ended = endings.exit_of(live.record, ended)
    live.kill_ms = live.precopy_until_ms = None
    live.settle_ms = now.now_ms + pipeline.SETTLE_MS_MAX
    state.put(
        live,
        Phase.SETTLING,
        exit_code=ended.exit_code,
        exit_signal=ended.signal,
        exit_reason=sentence(ended.reason),
    )
    state.log(
        "info",
        "attempt.exited",
        attempt=ended.attempt_id,
        exit_code=ended.exit_code,
        signal=ended.signal,
        reason=ended.reason or endings.plainly(ended),
    )
    clean.begin(state, now, live)
    pipeline.search_slab(state, live)
    pipeline.advance_pipeline(state, live)
    pipeline.settle(state, now, live)
    pipeline.hurry(state, now, live)


def _forget_settled(state: State) -> None:
    """What ended and has been acknowledged needs no memory; it stays fenced."""
    for live in list(state.attempts.values()):
        record = live.record
        if record.phase is Phase.ENDED and record.last_sequence not in state.spool:
            state.drop(live)
            state.commands.append(ForgetAttempt(record.id))


def _tick(state: State, now: Instant) -> None:
    for live in list(state.attempts.values()):
        if live.kill_ms is not None and live.kill_ms <= now.now_ms:
            live.kill_ms = None
            reason = live.record.exit_reason or "grace is over"
            state.log("warning", "attempt.killed", attempt=live.record.id, reason=reason)
            state.commands.append(KillProcess(live.record.id))
        if live.precopy_until_ms is not None and live.precopy_until_ms <= now.now_ms:
            live.precopy_until_ms = None
            _carry_out_stop(state, now, live)
        if live.replica_retry_ms is not None and live.replica_retry_ms <= now.now_ms:
            live.replica_retry_ms = None
            pipeline.replicate(state, now, live)
        if live.settle_ms is not None and live.settle_ms <= now.now_ms:
            live.settle_ms = None
            if live.record.phase is Phase.SETTLING:
                pipeline.give_up(state, now, live)
    hangs.check(state, now)
    for waiting, restored in clean.check_again(state, now):
        _restored(state, now, waiting, restored)
    link.order_tick(state, now)
