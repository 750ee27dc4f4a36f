"""The coordinator's core: `handle(now, event) -> effects`, and nothing else.

The shell hands over everything that happened, one event at a time, then says `Decide` once for the
batch. What comes back is records, which must be durable before any command of the batch leaves the
process, and commands. The core asks no clock, opens no socket and throws no dice, so a journal of
events replayed gives the same effects, byte for byte.
"""

from dataclasses import replace

from coordinator.core import (
    arrivals,
    attempts,
    bills,
    checkpoints,
    clocks,
    coming,
    decisions,
    defragment,
    demand_forecast,
    demand_reading,
    demand_samples,
    fit,
    fleet_scaling,
    forgetting,
    found,
    gangs,
    health,
    jobs,
    lease_days,
    leases,
    lifetimes,
    node_power,
    nodes,
    offers,
    outcomes,
    parts,
    past_demand,
    power,
    projects,
    readings,
    reservations,
    restored,
    retention,
    rounds,
    scale_answers,
    stuck,
)
from coordinator.core.capacity_model import Power
from coordinator.core.checkpoint_requests import (
    FindCheckpoint,
    ListCheckpoints,
    NoteManifests,
    PinCheckpoint,
    UnpinCheckpoint,
)
from coordinator.core.cost_requests import GetCosts
from coordinator.core.demand_messages import DemandSeries, GetDemand
from coordinator.core.fit_requests import FitJob
from coordinator.core.messages import (
    Actuated,
    AgentEvent,
    AllocationMade,
    Answer,
    AttemptExited,
    AttemptMilestone,
    AttemptRefused,
    AttemptStarted,
    CancelJob,
    CheckpointProposed,
    CommitResult,
    CordonNode,
    DrainNode,
    Effect,
    Event,
    EventAck,
    ExplainJob,
    ForecastMade,
    FromAgent,
    GetJob,
    Goodbye,
    GpuHealthChanged,
    Heartbeat,
    Hello,
    HoldJob,
    LeasesMade,
    ListJobs,
    ListNodes,
    NodePage,
    Refusal,
    RefusalKind,
    ReleaseJob,
    Reply,
    Request,
    RequestBody,
    RequeueJob,
    SessionClosed,
    Submit,
    Tick,
    UncordonNode,
)
from coordinator.core.model import GpuView, NodeView, Snapshot
from coordinator.core.node_requests import ForgetNode, SetTelemetryRate
from coordinator.core.phases import ATTEMPT_ENDED, NodeIntent
from coordinator.core.project_requests import ListProjects
from coordinator.core.scale_requests import (
    ApproveScaling,
    GetPlan,
    GetScaleRecord,
    ListScaleRecords,
)
from coordinator.core.state import Instant, LiveNode, Options, State


class Coordinator:
    """The fleet's decisions. Made from what the store held; driven by `handle`."""

    def __init__(self, options: Options) -> None:
        self.state = State(options)
        self._loaded_ms = 0

    def load(self, snapshot: Snapshot, now_ms: int) -> None:
        """Take over what is durable; call once, before the first event."""
        self._loaded_ms = now_ms
        self.state.load(snapshot, now_ms)
        self.state.demand.note_jobs(snapshot.jobs)
        demand_samples.resume(self.state)
        leases.resume(self.state)
        gangs.resume(self.state, now_ms)
        health.resume(self.state, now_ms)

    def begin(self, now_ms: int) -> None:
        """Events may come. To take over a hundred thousand jobs takes longer than a lease, and
        nobody was heard meanwhile: nobody is blamed for that time."""
        leases.put_off(self.state, now_ms - self._loaded_ms)

    def handle(self, now: Instant, event: Event) -> list[Effect]:
        """What follows from one event. Raises only for bugs of our own."""
        state = self.state
        if isinstance(event, Request):
            answer = jobs.accounted(state, now, _answer(state, now, event.body))
            state.commands.append(Reply(event.reply_to, answer))
        elif isinstance(event, FromAgent):
            _from_agent(state, now, event)
        elif isinstance(event, Actuated):
            power.actuated(state, now, event)
        elif isinstance(event, Tick):
            nodes.tick(state, now)
            power.tick(state, now)
            health.tick(state, now)
            projects.tick(state, now)
            arrivals.tick(state, now)
            offers.tick(state)
            outcomes.tick(state, now)
            decisions.tick(state, now)
            reservations.tick(state, now)
            demand_forecast.tick(state, now)
            lifetimes.tick(state, now)
            jobs.tick(state)
            fleet_scaling.tick(state, now)
        elif isinstance(event, AllocationMade):
            if decisions.made(state, now, event):
                defragment.make_room(state, now)
        elif isinstance(event, ForecastMade):
            demand_forecast.made(state, now, event)
        elif isinstance(event, LeasesMade):
            lease_days.made(state, event)
        else:  # Decide
            arrivals.let_in(state, now)
            if state.undecided:
                rounds.decide(state, now)
        return state.take()


def _answer(state: State, now: Instant, body: RequestBody) -> Answer:
    match body:
        case Submit():
            return jobs.submit(state, now, body)
        case GetJob():
            return jobs.get(state, body)
        case ListJobs():
            return jobs.list_jobs(state, body)
        case CancelJob():
            return jobs.cancel(state, now, body)
        case HoldJob():
            return jobs.hold(state, now, body)
        case ReleaseJob():
            return jobs.release(state, now, body)
        case RequeueJob():
            return jobs.requeue(state, now, body)
        case ExplainJob():
            return jobs.explain_job(state, now, body)
        case FitJob():
            return fit.answer(state, now, body)
        case GetCosts():
            past = past_demand.read(state, min(body.end_unix_ms, now.unix_ms))
            return bills.answer(state, now, body, past)
        case GetDemand():
            return _demand(state, now, body)
        case ListProjects():
            return projects.list_projects(state, now)
        case ListCheckpoints():
            return retention.list_checkpoints(state, body)
        case PinCheckpoint():
            return retention.pin(state, now, body)
        case UnpinCheckpoint():
            return retention.unpin(state, now, body)
        case NoteManifests():
            return _note_manifests(state, now, body)
        case FindCheckpoint():
            return retention.find(state, body)
        case GetPlan() | ListScaleRecords() | GetScaleRecord() | ApproveScaling():
            return scale_answers.answer(state, now, body)
        case SetTelemetryRate():
            return _set_rate(state, now, body)
        case ForgetNode():
            return _forget(state, now, body)
        case ListNodes():
            return _list_nodes(state, now, body)
        case CordonNode():
            return _intend(state, now, body.node, NodeIntent.CORDONED)
        case DrainNode():
            return _intend(state, now, body.node, NodeIntent.DRAINING)
        case UncordonNode():
            return _intend(state, now, body.node, NodeIntent.OPEN)


def _demand(state: State, now: Instant, body: GetDemand) -> DemandSeries | Refusal:
    try:
        return demand_reading.read(state, now, body)
    except demand_reading.UnknownDemand as error:
        return Refusal(RefusalKind.NOT_FOUND, str(error))


def _list_nodes(state: State, now: Instant, body: ListNodes) -> NodePage | Refusal:
    """What is shown of a node costs some fifty microseconds, so no more of them are looked at than
    are asked for."""
    if not 0 <= body.page_size <= jobs.PAGE_MAX:
        sentence = f"page_size is {body.page_size}; it must be between 1 and {jobs.PAGE_MAX}, or 0"
        return Refusal(RefusalKind.INVALID, sentence)
    asked = body.nodes or state.nodes
    page: list[NodeView] = []
    left_bytes = jobs.PAGE_BYTES_MAX
    for node_id in sorted(known for known in asked if known > body.after_node):
        live = state.nodes.get(node_id)
        if live is None or node_power.is_gone(live.node.power):
            continue
        if body.page_size and len(page) == body.page_size:
            return NodePage(tuple(page), page[-1].node.id)
        view = _node_view(state, now, live)
        left_bytes -= _bytes(view)
        if body.page_size and page and left_bytes < 0:
            return NodePage(tuple(page), page[-1].node.id)
        page.append(view)
    return NodePage(tuple(page))


def _bytes(view: NodeView) -> int:
    """About as many as it has on the wire."""
    gpus = sum(300 + len(gpu.figures) + 50 * len(gpu.shares) for gpu in view.gpus)
    return 600 + len(view.reason) + 20 * len(view.attempts) + gpus


def _intend(state: State, now: Instant, node_id: str, intent: NodeIntent) -> Answer:
    live = state.nodes.get(node_id)
    if live is None:
        return Refusal(RefusalKind.NOT_FOUND, f"there is no node {node_id!r}")
    said = power.person_says(state, now, live, intent)
    if isinstance(said, Refusal):
        return said
    if intent is NodeIntent.DRAINING and live.node.intent is NodeIntent.DRAINED:
        return _node_view(state, now, live)
    health.person_says(state, live, intent)
    if said is not None:
        nodes.set_intent(state, now, live, said)
    return _node_view(state, now, live)


def _set_rate(state: State, now: Instant, body: SetTelemetryRate) -> NodeView | Refusal:
    live = state.nodes.get(body.node)
    if live is None:
        return Refusal(RefusalKind.NOT_FOUND, f"there is no node {body.node!r}")
    nodes.set_rate(state, live, body.rate)
    return _node_view(state, now, live)


def _note_manifests(state: State, now: Instant, body: NoteManifests) -> NodeView | Refusal:
    live = state.nodes.get(body.node)
    if live is None:
        return Refusal(RefusalKind.NOT_FOUND, f"there is no node {body.node!r}")
    found.note(state, now, live, body)
    return _node_view(state, now, live)


def _forget(state: State, now: Instant, body: ForgetNode) -> NodeView | Refusal:
    """Answers with the node as it was."""
    live = state.nodes.get(body.node)
    if live is None or node_power.is_gone(live.node.power):
        return Refusal(RefusalKind.NOT_FOUND, f"there is no node {body.node!r}")
    view = _node_view(state, now, live)
    why = forgetting.forget(state, live, lose_checkpoints=body.lose_checkpoints)
    return Refusal(RefusalKind.WRONG_PHASE, why) if why else view


def _node_view(state: State, now: Instant, live: LiveNode) -> NodeView:
    judged = {said.uuid: said for said in live.node.health}
    closed = readings.closed(live)
    gpus = tuple(
        GpuView(
            gpu.facts, gpu.phase, "" if shared else "".join(gpu.holders[:1]),
            gpu.figures, now.now_ms - gpu.read_ms, judged.get(uuid), closed.get(uuid, ""),
            state.held_back.get(uuid, ""), shared,
        )
        for uuid, gpu in sorted(live.gpus.items())
        for shared in [_shares(state, gpu.holders)]
    )  # fmt: skip
    held = tuple(sorted({*live.attempts, *live.strays}))
    reasons = (
        _why_closed(state, now, live) or health.describe(state, live),
        stuck.describe(live),
        arrivals.describe_rival(now, live),
        restored.describe(live),
    )
    reason = "; ".join(filter(None, reasons))
    return NodeView(live.node, live.phase, gpus, held, reason, live.telemetry)


def _why_closed(state: State, now: Instant, live: LiveNode) -> str:
    if live.node.power.phase is Power.ON:
        return nodes.why_closed(live)
    fails = coming.failed(state, now, live.node)
    reason = node_power.describe(live.node.power, power.boot_ms(state, live.node))
    reason = f"its start {fails}" if fails else reason
    return "; ".join(filter(None, (reason, nodes.leaving(live))))


def _shares(state: State, holders: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """Who shares a GPU, with the most that each may take; empty where one has it alone."""
    shares = tuple((holder, state.share_bytes(holder)) for holder in holders)
    return shares if any(share_bytes for _, share_bytes in shares) else ()


def _from_agent(state: State, now: Instant, event: FromAgent) -> None:
    session, message = event.session, event.message
    if isinstance(message, Hello):
        arrivals.hello(state, now, session, message)
        return
    if isinstance(message, SessionClosed):
        arrivals.closed(state, now, session)
        return
    live = state.nodes.get(state.sessions.get(session, ""))
    if live is None or live.session != session:
        if isinstance(message, Goodbye):
            arrivals.goodbye(state, now, session, message)
        return  # what a replaced session still had to say; its node says it again in the new one
    if isinstance(message, Heartbeat):
        nodes.heartbeat(state, now, live, message)
    elif isinstance(message, Goodbye):
        nodes.goodbye(state, now, live, message)
    else:
        _agent_event(state, now, live, message, event.came_ms)


def _agent_event(
    state: State, now: Instant, live: LiveNode, event: AgentEvent, came_ms: int | None
) -> None:
    """Each event counts once: its sequence is acknowledged in the same commit as what follows from
    it."""
    expected = live.node.acknowledged + 1
    if event.sequence > expected:
        return  # one before it was dropped; the agent sends them again in order
    if event.sequence == expected:
        state.put_node(replace(live.node, acknowledged=event.sequence))
        _apply(state, now, live, clocks.ours(state, now, live, event, came_ms))
        nodes.settle_drain(state, live)
    state.send(live.node.id, EventAck(live.node.acknowledged))


def _apply(state: State, now: Instant, live: LiveNode, event: AgentEvent) -> None:
    attempt = state.attempts.get(event.attempt)
    body = event.body
    if isinstance(body, GpuHealthChanged):
        health.reported(state, now, live, body.gpus)
        return
    if isinstance(body, AttemptExited) and event.attempt in live.strays:
        live.strays.pop(event.attempt)
        live.unknown.pop(event.attempt, None)
        state.release_gpus(live, event.attempt)
    if attempt is not None and attempt.node != live.node.id:
        nodes.foreign(state, live, attempt)
    if attempt is None or attempt.node != live.node.id:
        if isinstance(body, CheckpointProposed):
            reason = f"attempt {event.attempt} is not known"
            state.send(live.node.id, CommitResult(event.attempt, body.digest, False, reason))
        return
    if isinstance(body, CheckpointProposed):
        gang = attempt.ranks > 1
        (parts if gang else checkpoints).propose(state, now, attempt, body)
        gangs.committed(state, now, state.jobs[attempt.job_id])
        return
    if attempt.phase in ATTEMPT_ENDED:
        return  # its end was decided without it
    match body:
        case AttemptStarted():
            attempts.started(state, now, event.unix_ms, attempt, body)
        case AttemptExited():
            attempts.exited(state, now, event.unix_ms, attempt, body)
        case AttemptRefused():
            attempts.refused(state, now, attempt, body)
        case AttemptMilestone():
            attempts.milestone(state, event.unix_ms, attempt, body.name)
