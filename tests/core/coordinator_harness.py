"""A coordinator's core with a disk and a clock, for tests that drive it by hand.

Problem: every test of the core needs the same three things around it: a clock that only the test
moves, a store that keeps exactly what was recorded, and a restart that begins from that store. They
stand here once. `Rig.handle` does what the shell must do (records first, then commands, then a
decision) and checks on the way that the core kept its side: no record after a command.

`trace` turns effects into the compact lines of the golden files. What the history says is not said
again by the log line of the same event.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from coordinator.core.capacity_model import Power
from coordinator.core.coordinator import Coordinator
from coordinator.core.cost_requests import CostPage
from coordinator.core.demand_history import KEPT_STEPS, DemandLog, DemandRow
from coordinator.core.demand_messages import DemandSeries
from coordinator.core.fit_requests import FitPage
from coordinator.core.launch import Gang
from coordinator.core.lease_messages import with_day
from coordinator.core.messages import (
    Actuate,
    Answer,
    AppendEvent,
    CheckpointPage,
    CloseSession,
    CommitResult,
    Decide,
    DropCheckpoint,
    DropDemand,
    DropJob,
    DropNode,
    DropPart,
    Effect,
    Event,
    EventAck,
    Explanation,
    JobPage,
    KeepCheckpoints,
    LeaseRenewal,
    Log,
    MakeAllocation,
    MakeForecast,
    MakeLeases,
    NodePage,
    PublishLeases,
    PutAttempt,
    PutCheckpoint,
    PutDemand,
    PutDemandSeries,
    PutJob,
    PutLeaseDay,
    PutNode,
    PutPart,
    PutScaleRecord,
    Record,
    Refusal,
    Reply,
    Send,
    SetReplicaTarget,
    StartAttempt,
    StopAttempt,
    Submitted,
    Welcome,
)
from coordinator.core.model import (
    Attempt,
    Checkpoint,
    CheckpointView,
    GpuFacts,
    Job,
    JobEvent,
    JobView,
    Node,
    NodeView,
    Snapshot,
    WaitingPart,
)
from coordinator.core.project_requests import ProjectPage, ProjectView
from coordinator.core.scale_records import ScaleRecord
from coordinator.core.scale_requests import PlanPage, ScalePage
from coordinator.core.state import Instant, Options
from coordinator.core.weighing import answer

UNIX_MS_AT_START = 1_790_000_000_000
GIGABYTE = 10**9

_RECORDS = (
    PutJob, DropJob, PutAttempt, PutCheckpoint, DropCheckpoint, PutPart, DropPart, PutNode,
    DropNode, AppendEvent, PutDemandSeries, PutDemand, DropDemand, PutScaleRecord,
    PutLeaseDay,
)  # fmt: skip


@dataclass
class Disk:
    """What a store would hold: the records, folded."""

    leader_epoch: int = 0
    last_job_id: int = 0
    jobs: dict[int, Job] = field(default_factory=dict)
    attempts: dict[str, Attempt] = field(default_factory=dict)
    checkpoints: dict[tuple[int, str], Checkpoint] = field(default_factory=dict)
    parts: dict[tuple[int, int, str], WaitingPart] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    events: list[JobEvent] = field(default_factory=list)
    series: dict[int, PutDemandSeries] = field(default_factory=dict)
    demand: dict[tuple[int, int], DemandRow] = field(default_factory=dict)
    scaled: dict[int, ScaleRecord] = field(default_factory=dict)
    lease_days: tuple[int, ...] = ()

    def write(self, record: Record) -> None:
        match record:
            case PutJob(job):
                self.jobs[job.id] = job
                self.last_job_id = max(self.last_job_id, job.id)
            case PutAttempt(attempt):
                self.attempts[attempt.id] = attempt
            case PutCheckpoint(checkpoint):
                self.checkpoints[checkpoint.job_id, checkpoint.digest] = checkpoint
            case DropCheckpoint(job_id, digest):
                self.checkpoints.pop((job_id, digest))
            case PutPart(part):
                self.parts[part.job_id, part.rank, part.digest] = part
            case DropPart(job_id, rank, digest):
                self.parts.pop((job_id, rank, digest))
            case PutNode(node):
                self.nodes[node.id] = node
            case DropNode(name):
                self.nodes.pop(name)
            case AppendEvent(event):
                self.events.append(event)
            case DropJob(job_id):
                self._drop(job_id)
            case PutScaleRecord(record_of_plan):
                self.scaled[record_of_plan.number] = record_of_plan
            case PutLeaseDay(day):
                self.lease_days = with_day(self.lease_days, day)
            case PutDemandSeries(number):
                self.series[number] = record
            case PutDemand(row):
                self.demand[row.period_min, row.step] = row
                self.demand.pop((row.period_min, row.step - KEPT_STEPS[row.period_min]), None)
            case DropDemand(minute):
                for period_min, step in list(self.demand):
                    if (step + 1) * period_min > minute + 1:
                        del self.demand[period_min, step]

    def _drop(self, job_id: int) -> None:
        self.jobs.pop(job_id)
        self.attempts = {k: v for k, v in self.attempts.items() if v.job_id != job_id}
        self.checkpoints = {k: v for k, v in self.checkpoints.items() if v.job_id != job_id}
        self.parts = {k: v for k, v in self.parts.items() if v.job_id != job_id}
        self.events = [event for event in self.events if event.job_id != job_id]

    def snapshot(self) -> Snapshot:
        """Sorted by keys, as a database gives it back: the order of writing is lost."""
        return Snapshot(
            self.leader_epoch,
            self.last_job_id,
            tuple(self.jobs[key] for key in sorted(self.jobs)),
            tuple(self.attempts[key] for key in sorted(self.attempts)),
            tuple(self.checkpoints[key] for key in sorted(self.checkpoints)),
            tuple(self.nodes[key] for key in sorted(self.nodes)),
            tuple(self.parts[key] for key in sorted(self.parts)),
            DemandLog(
                tuple(self.series[number] for number in sorted(self.series)),
                tuple(self.demand[key] for key in sorted(self.demand)),
            ),
            tuple(self.scaled[number] for number in sorted(self.scaled)),
            self.lease_days,
        )


class Rig:
    """One coordinator after another on one disk, under a clock that the test moves."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.disk = Disk()
        self.now_ms = 0
        self.answers_at_once = True
        self.unanswered: list[MakeAllocation] = []  # also by a coordinator that is no more
        self.restart()

    def restart(self) -> None:
        """A new coordinator, from what is durable."""
        self.disk.leader_epoch += 1
        self.began = self.disk.snapshot(), self.now_ms
        self.handled: list[tuple[Instant, Event, list[Effect]]] = []
        self.core = Coordinator(self.options)
        self.core.load(*self.began)

    def keep(self, jobs: int) -> None:
        """So few of those that have ended, as no operator may say."""
        self.options = replace(self.options, jobs_kept=jobs)
        self.core.state.options = self.options

    @property
    def now(self) -> Instant:
        return Instant(self.now_ms, UNIX_MS_AT_START + self.now_ms)

    def handle(self, event: Event, decide: bool = True) -> list[Effect]:
        """One batch of one event: make durable what must be, and return all of it."""
        effects = self._one(event)
        for asked in [effect for effect in effects if isinstance(effect, MakeAllocation)]:
            effects += self.weigh(asked)
        if decide:
            effects += self._one(Decide())
        rounds = 0
        while decide and self.core.state.undecided:
            effects += self._one(Decide())
            rounds += 1
            assert rounds < 100, "the decision does not come to rest"
        return effects

    def weigh(self, asked: MakeAllocation) -> list[Effect]:
        """Who decides over all jobs answers at once, or when the test says so."""
        if self.answers_at_once:
            return self._one(answer(asked))
        self.unanswered.append(asked)
        return []

    def crash_on(self, event: Event) -> None:
        """The coordinator dies after it has decided and before anything was written or sent."""
        self.core.handle(self.now, event)
        self.restart()

    def _one(self, event: Event) -> list[Effect]:
        effects = self.ask_core(self.core, self.now, event)
        self.handled.append((self.now, event, list(effects)))
        commanded = False
        for effect in effects:
            if isinstance(effect, _RECORDS):
                assert not commanded, f"{effect} comes after a command"
                self.disk.write(effect)
            else:
                commanded = True
        return effects

    def replayed(self) -> Iterator[tuple[list[Effect], list[Effect]]]:
        """Every batch since the last restart: what it gave then, and what it gives a fresh core."""
        fresh = Coordinator(self.options)
        fresh.load(*self.began)
        for now, event, effects in self.handled:
            yield effects, self.ask_core(fresh, now, event)

    def ask_core(self, core: Coordinator, now: Instant, event: Event) -> list[Effect]:
        """Where a test may have events that no shell has."""
        return core.handle(now, event)


def gpus_of(node: str, text: str) -> tuple[GpuFacts, ...]:
    """`2xH100:80,1xA100:40`: count, name and gigabytes (80 where none are given)."""
    facts: list[GpuFacts] = []
    for part in [part for part in text.split(",") if part]:
        count, _, name = part.partition("x")
        name, _, gigabytes = name.partition(":")
        for _ in range(int(count)):
            uuid = f"{node}-g{len(facts)}"
            facts.append(GpuFacts(uuid, name, int(gigabytes or 80) * GIGABYTE))
    return tuple(facts)


# --- traces ---------------------------------------------------------------------------------------


def trace(effects: Iterable[Effect]) -> list[str]:
    """One line an effect; acknowledgements and renewals, which follow from their cause, are left
    out."""
    effects = list(effects)
    # A node's record after each of its events says only that the event has been counted.
    counted = any(isinstance(e, Send) and isinstance(e.order, EventAck) for e in effects)
    told = {
        (effect.event.name, effect.event.message): True
        for effect in effects
        if isinstance(effect, AppendEvent)
    }
    lines = []
    for effect in effects:
        line = _line(effect, told)
        if line and not (counted and isinstance(effect, PutNode)):
            lines.append(line)
    return lines


def _line(effect: Effect, told: dict[tuple[str, str], bool]) -> str:
    match effect:
        case PutJob() | PutAttempt() | PutCheckpoint() | DropCheckpoint() | PutNode() | DropJob():
            return f"put  {_record(effect)}"
        case PutPart() | DropPart() | DropNode():
            return f"put  {_record(effect)}"
        case PutScaleRecord():
            return ""  # its decision is logged
        case MakeLeases() | PublishLeases() | PutLeaseDay():
            return ""  # once a day: tests/core/test_lease_days.py
        case MakeAllocation():
            return ""  # once a minute and after what happens: tests/core/test_decisions.py
        case PutDemandSeries() | PutDemand() | DropDemand() | MakeForecast():
            return ""  # once a minute, whatever happens: tests/core/test_demand_history.py
        case AppendEvent(event):
            where = f" {event.attempt}@{event.node}" if event.attempt else ""
            return f"tell {event.job_id} {event.name}{where}: {event.message}"
        case Send(_, order):
            text = _order(order)
            return f"send {effect.session} {text}" if text else ""
        case CloseSession(session, reason):
            return f"close {session}: {reason}"
        case Reply(_, answer):
            return f"reply {_answer(answer)}"
        case Actuate(order):
            return f"power {order.key} {order.verb.value} {','.join(order.nodes)}"
        case Log(level, name, fields):
            values = dict(fields)
            values.pop("trace_id", None)  # tests/core/test_traces.py; here it would be noise
            if (name, values.get("reason")) in told:
                return ""
            return f"log  {level} {name} " + " ".join(f"{k}={v}" for k, v in values.items())


def _record(record: Record) -> str:
    match record:
        case PutJob(job):
            head = f" head={job.head}@{job.head_step}" if job.head else ""
            intent = f" intent={job.intent.value}" if job.intent.value != "run" else ""
            counts = f" failures={job.failures}" if job.failures else ""
            counts += f" yields={job.yields}" if job.yields else ""
            return f"job {job.id} {job.phase.value} epoch={job.epoch}{head}{intent}{counts}"
        case PutAttempt(attempt):
            replica = f" copies to {attempt.replica_node}" if attempt.replica_node else ""
            return f"attempt {attempt.id} {attempt.phase.value} on {attempt.node}{replica}"
        case PutCheckpoint(kept):
            bad = " pinned" if kept.pinned else ""
            bad += f" bad: {kept.bad}" if kept.bad else ""
            holders = ",".join(kept.replicas) or "nowhere"
            several = [f" + {p.digest} on {','.join(p.replicas) or 'nowhere'}" for p in kept.parts]
            holders += "".join(several)
            return f"checkpoint {kept.job_id} {kept.digest}@{kept.step} on {holders}{bad}"
        case DropCheckpoint(job_id, digest):
            return f"drop checkpoint {job_id} {digest}"
        case PutPart(part):
            what = f"{part.job_id} {part.digest}@{part.step} of rank {part.rank}"
            return f"part {what} on {','.join(part.replicas)}"
        case DropPart(job_id, rank, digest):
            return f"drop part {job_id} {digest} of rank {rank}"
        case PutNode(node):
            power = "" if node.power.phase is Power.ON else f" power={node.power.phase.value}"
            return f"node {node.id} {node.intent.value}{power} acknowledged={node.acknowledged}"
        case DropJob(job_id):
            return f"drop job {job_id}"
        case DropNode(name):
            return f"drop node {name}"
        case AppendEvent() | PutDemandSeries() | PutDemand() | DropDemand() | PutScaleRecord():
            raise AssertionError("told elsewhere")
        case PutLeaseDay():
            raise AssertionError("told elsewhere")


def _order(order: object) -> str:
    match order:
        case Welcome():
            return f"welcome leader={order.leader_epoch} acknowledged={order.acknowledged_sequence}"
        case StartAttempt():
            sources = [
                f"{c.digest}@{c.step} from {','.join(s.node for s in c.sources)}"
                + "".join(
                    f" + {p.digest} from {','.join(s.node for s in p.sources)}" for p in c.parts
                )
                for c in order.candidates
            ]
            target = f" copies to {order.replica_target.node}" if order.replica_target else ""
            gpus = f" on {','.join(order.gpu_uuids)}" if order.gpu_uuids else ""
            what = f"{order.attempt}{_gang(order.gang)}{gpus}"
            return f"start {what}; {' or '.join(sources) or 'no checkpoint'}{target}"
        case StopAttempt():
            grace = "at once" if order.grace_ms is None else f"within {order.grace_ms} ms"
            first = (
                "" if order.precopy_ms is None else f", after a pre-copy of {order.precopy_ms} ms"
            )
            return f"stop {order.attempt} {grace}{first}: {order.reason}"
        case SetReplicaTarget():
            target = order.target.node if order.target else "nowhere"
            return f"copies of {order.attempt} go to {target}"
        case CommitResult():
            answer = "committed" if order.accepted else f"refused: {order.reason}"
            return f"commit {order.attempt} {order.digest} {answer}"
        case KeepCheckpoints():
            return f"keep {','.join(order.digests) or 'nothing'}"
        case LeaseRenewal() | EventAck():
            return ""
    raise AssertionError(f"an order without a line: {order}")


def _gang(gang: Gang | None) -> str:
    if gang is None:
        return ""
    local = f"{gang.local_rank} of {gang.local_world_size} on {gang.nodes[gang.node_rank]}"
    master = f"{gang.master_host}:{gang.master_port}"
    return f" ({gang.rank} of {gang.world_size}, {local}, master {master})"


def _answer(answer: Answer) -> str:
    match answer:
        case Refusal():
            return f"{answer.kind}: {answer.sentence}"
        case Submitted():
            return f"submitted {answer.job_id}" + (f": {answer.reason}" if answer.reason else "")
        case Explanation():
            return answer.sentence
        case JobView():
            return f"job {answer.job.id} {answer.job.phase.value}: {answer.job.reason}"
        case JobPage():
            shown = ", ".join(f"{view.job.id} {view.job.phase.value}" for view in answer.jobs)
            return f"jobs {shown or 'none'}; next {answer.next_before_job_id}"
        case FitPage():
            return f"fits {', '.join(fit.gpu_type for fit in answer.fits) or 'nothing'}"
        case CheckpointPage():
            shown = "; ".join(_kept(view) for view in answer.checkpoints)
            return f"checkpoints {shown or 'none'}"
        case NodeView():
            return f"node {_node(answer)}"
        case NodePage():
            return "nodes " + "; ".join(_node(view) for view in answer.nodes)
        case CostPage():
            shown = ", ".join(f"{line.key} ${line.money.usd:.2f}" for line in answer.lines)
            return f"costs {shown or 'nothing'}; ${answer.idle_lease_usd:.2f} for nothing"
        case PlanPage():
            return f"plan in mode {answer.mode}"
        case ScalePage():
            return f"decisions {', '.join(record.id for record in answer.records) or 'none'}"
        case DemandSeries():
            return f"demand in {len(answer.gpus)} steps of {answer.period_min} min"
        case ProjectPage():
            return "projects " + "; ".join(_project(view) for view in answer.projects)


def _project(view: ProjectView) -> str:
    quota = "no quota" if view.quota_hours is None else f"of {view.quota_hours:g} h"
    gpus = f"entitled to {view.entitled_gpus:.2f}, borrows {view.borrowed_gpus:g}"
    jobs = f"{view.running_jobs} run on {view.running_gpus:g}, {view.waiting_jobs} wait"
    return f"{view.name}: {view.used_hours:.3f} {quota}; {gpus}, lends {view.lent_gpus:g}; {jobs}"


def _kept(view: CheckpointView) -> str:
    kept = view.checkpoint
    words = [f"{kept.digest}@{kept.step}", *(["pinned"] if kept.pinned else []), *view.used_by]
    return " ".join([*words, *([kept.bad] if kept.bad else [])])


def _node(view: NodeView) -> str:
    gpus = [
        f"{gpu.facts.uuid}={gpu.phase.value}"
        + (f":{gpu.attempt}" if gpu.attempt else "")
        + "".join(f":{one}({share // GIGABYTE})" for one, share in gpu.shares)
        for gpu in view.gpus
    ]
    reason = f" ({view.reason})" if view.reason else ""
    return f"{view.node.id} {view.phase.value} {view.node.intent.value} {' '.join(gpus)}{reason}"
