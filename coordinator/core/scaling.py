"""How many nodes are on, which ones, and when capacity is rented by the hour: the plan of a minute.

Problem: a fleet that is always on pays for nodes that nobody uses, and one that switches off what
was idle for an hour lets work wait for a boot each time demand rises. What should be on is known
only as a quantile, and a wrong decision must cost no guaranteed job anything.

How, for each GPU type:
1. `need`: the guaranteed demand, what runs and waits now, or the quantile of the *maximum* demand
   until a node that is started now would be there, whichever is most. The quantile is where one GPU
   more costs as much in idling as it saves in waiting: wait / (wait + idle).
2. What is missing comes up at once, in bounded steps; if no node is left to start, and waiting for
   one to free costs more than renting one, or a deadline would be missed, capacity is rented.
3. What is neither needed nor likely to be needed for as long as a node has to stay off to be worth
   it (`keep`, with a margin) takes no new work: the emptiest first, so that work gathers on the
   others. Likely is where a cycle costs as much as idling would. It goes off once it has been idle
   for longer than an hour and than what a cycle costs; until then it is back as soon as it is
   needed.
4. `guard_rails.py` bounds it all, and every change, and every bound that held one back, leaves a
   decision that says why, with what else could have been done at which expected cost.

A plan is a value. What it has to know of earlier ones is its `Memory`; it has no clock, and the
same words replay a year of demand (`coordinator/sim/capacity_replay.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from coordinator.core import bursts, guard_rails, odds, which_nodes
from coordinator.core.boot_times import BootTimes
from coordinator.core.bursts import MS_PER_H, Burst
from coordinator.core.capacity_model import Box, Outlook, Power, Source
from coordinator.core.capacity_orders import Verb
from coordinator.core.guard_rails import Bounds, Rail, Switched
from coordinator.core.sentences import quantity, some

NAMED_MAX: Final = 3  # of the nodes of a sentence


class Mode(Enum):
    """`observe`: decisions are recorded. `advise`: and proposed. `act`: and carried out."""

    OBSERVE = "observe"
    ADVISE = "advise"
    ACT = "act"


@dataclass(frozen=True, slots=True)
class Rules:
    """What an operator sets. A GPU-hour of work that waits costs `wait_usd_per_gpu_h`, one of a GPU
    that is on and idle `idle_usd_per_gpu_h` (their ratio is the quantile: 0.95), and to switch off
    and on again `cycle_usd_per_gpu`. A node goes off after `idle_ms_min` at the earliest.
    `margin_ratio`: so much more than what is likely stays on. `later_ms`: what `later_gpus` are
    about. `bursts` by GPU type; without `spends_alone` a person agrees to each."""

    mode: Mode = Mode.OBSERVE
    wait_usd_per_gpu_h: float = 0.95
    idle_usd_per_gpu_h: float = 0.05
    cycle_usd_per_gpu: float = 0.05
    idle_ms_min: int = 3_600_000
    margin_ratio: float = 0.0
    later_ms: int = 7_200_000
    boots: BootTimes = field(default_factory=BootTimes)
    bounds: Bounds = field(default_factory=Bounds)
    bursts: Mapping[str, Burst] = field(default_factory=dict)
    budget_usd_per_day: float = 0.0
    spends_alone: bool = False

    @property
    def level(self) -> float:
        """The quantile at which one GPU more costs as much as it saves."""
        return self.wait_usd_per_gpu_h / (self.wait_usd_per_gpu_h + self.idle_usd_per_gpu_h)

    @property
    def keep_level(self) -> float:
        """The quantile at which one node less saves as much as having it back so soon costs: it is
        not work that would wait, since `need` brings it back in time, but a cycle."""
        idle_usd = self.idle_usd_per_gpu_h * self.later_ms / MS_PER_H
        return self.cycle_usd_per_gpu / (self.cycle_usd_per_gpu + idle_usd)

    @property
    def idle_ms(self) -> int:
        """After which a node may go off."""
        break_even_h = self.cycle_usd_per_gpu / self.idle_usd_per_gpu_h
        return max(self.idle_ms_min, math.ceil(break_even_h * MS_PER_H))


@dataclass(frozen=True, slots=True)
class Action:
    """`decision` is the id of the one that wants it. `asks`: a person has to agree."""

    verb: Verb
    nodes: tuple[str, ...]
    gpu_type: str
    decision: str
    asks: bool = False


@dataclass(frozen=True, slots=True)
class Alternative:
    """What could be done instead, the GPUs that are there then, and what the time until `later_ms`
    is expected to cost by it: work that waits, GPUs that idle, and, whatever comes, cycles and rent
    (`fixed_usd`)."""

    name: str
    gpus: int
    usd: float
    fixed_usd: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Of one GPU type at one moment. `level`: the quantile that `need_gpus` follows from.
    `there_gpus` before it, those that boot included. The last alternative is what was chosen.
    `rail` is the bound that held it back first, if one did."""

    id: str
    gpu_type: str
    outlook: Outlook
    level: float
    there_gpus: int
    need_gpus: int
    keep_gpus: int
    alternatives: tuple[Alternative, ...]
    rail: Rail | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Memory:
    """What the next plan has to know of this one. `at_ms`: when it was made. `off` and `on`: nodes
    within the last ten minutes. `spent_usd` on rented capacity by hour, of the last day. `said`:
    what the last decision of a GPU type was about, so that it is not repeated each minute."""

    at_ms: int | None = None
    off: tuple[Switched, ...] = ()
    on: tuple[Switched, ...] = ()
    spent_usd: tuple[tuple[int, float], ...] = ()
    said: tuple[tuple[str, str], ...] = ()
    decisions: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """`actions` are to be carried out, `proposed` wait for a person. `leaving`: all nodes that are
    to take no new work, those that do so already included; every other one is open to it. `failed`:
    nodes that are to be left alone until a person has looked at them."""

    actions: tuple[Action, ...]
    proposed: tuple[Action, ...]
    leaving: tuple[str, ...]
    failed: tuple[str, ...]
    decisions: tuple[Decision, ...]
    memory: Memory


def plan(
    now_ms: int,
    boxes: Sequence[Box],
    outlooks: Sequence[Outlook],
    rules: Rules,
    memory: Memory,
) -> Plan:
    """What to switch now. `boxes` are all of the fleet; of a GPU type without an outlook nothing is
    switched, and what is closed to new work there is opened."""
    draft = _Draft.begun(now_ms, boxes, rules, memory)
    for outlook in outlooks:
        _of_type(draft, outlook, [box for box in boxes if box.gpu_type == outlook.gpu_type])
    return draft.ended(boxes)


@dataclass(slots=True)
class _Draft:
    """A plan in the making; `downs` and `ups` are how many nodes may still go and come."""

    now_ms: int
    rules: Rules
    memory: Memory
    downs: int
    ups: int
    spent_usd: tuple[tuple[int, float], ...]
    rented_usd_per_h: float
    actions: list[Action] = field(default_factory=list)
    proposed: list[Action] = field(default_factory=list)
    leaving: list[str] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)

    @classmethod
    def begun(cls, now_ms: int, boxes: Sequence[Box], rules: Rules, memory: Memory) -> "_Draft":
        rate = sum(
            bursts.usd_per_h([box for box in boxes if box.gpu_type == name], burst)
            for name, burst in rules.bursts.items()
        )
        since_ms = 0 if memory.at_ms is None else max(0, now_ms - memory.at_ms)
        nodes = len(boxes)
        return cls(
            now_ms,
            rules,
            memory,
            downs=guard_rails.down_max(nodes, memory.off, now_ms, rules.bounds),
            ups=guard_rails.up_max(nodes, memory.on, now_ms, rules.bounds),
            spent_usd=bursts.spent(memory.spent_usd, now_ms, rate * since_ms / MS_PER_H),
            rented_usd_per_h=rate,
            said=dict(memory.said),
        )

    @property
    def next_id(self) -> str:
        return f"scale-{self.memory.decisions + len(self.decisions) + 1}"

    def add(self, verb: Verb, nodes: tuple[str, ...], gpu_type: str, *, asks: bool = False) -> None:
        """To what is carried out, proposed, or, in observe mode, neither."""
        if not nodes or self.rules.mode is Mode.OBSERVE:
            return
        action = Action(verb, nodes, gpu_type, self.next_id, asks)
        acts = self.rules.mode is Mode.ACT and not asks
        (self.actions if acts else self.proposed).append(action)

    def ended(self, boxes: Sequence[Box]) -> Plan:
        switched = {
            verb: sum(len(a.nodes) for a in self.actions if a.verb is verb) for verb in Verb
        }
        off = switched[Verb.SUSPEND] + switched[Verb.DELETE]
        on = switched[Verb.RESUME] + switched[Verb.CREATE]
        memory = Memory(
            at_ms=self.now_ms,
            off=_with(self.memory.off, self.now_ms, off),
            on=_with(self.memory.on, self.now_ms, on),
            spent_usd=self.spent_usd,
            said=tuple(sorted(self.said.items())),
            decisions=self.memory.decisions + len(self.decisions),
        )
        bounds = self.rules.bounds
        failed = tuple(
            box.node
            for box in boxes
            if guard_rails.exhausted(box, bounds) and box.power is Power.OFF and not box.closed
        )
        return Plan(
            tuple(self.actions),
            tuple(self.proposed),
            tuple(self.leaving),
            failed,
            tuple(self.decisions),
            memory,
        )


def counted(memory: Memory, now_ms: int, off: int, on: int) -> Memory:
    """With nodes that were switched, and not by a plan."""
    return replace(memory, off=_with(memory.off, now_ms, off), on=_with(memory.on, now_ms, on))


def _with(switched: tuple[Switched, ...], now_ms: int, nodes: int) -> tuple[Switched, ...]:
    kept = guard_rails.recent(switched, now_ms)
    return (*kept, Switched(now_ms, nodes)) if nodes else kept


@dataclass(frozen=True, slots=True)
class _Done:
    """What a plan does with one GPU type, whoever carries it out."""

    starts: tuple[Box, ...] = ()
    stops: tuple[Box, ...] = ()
    back: tuple[Box, ...] = ()
    rented_gpus: int = 0
    rail: Rail | None = None

    @property
    def boxes(self) -> tuple[tuple[Box, ...], ...]:
        return self.starts, self.stops, self.back

    @property
    def verbs(self) -> str:
        """What is switched, in short; empty where nothing is."""
        counts = (*(len(boxes) for boxes in self.boxes), self.rented_gpus)
        return " ".join(map(str, counts)) if any(counts) else ""


_NOTHING = _Done()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Of one GPU type, in GPUs on nodes that can be counted on; `trusted`: the forecast counts."""

    there: tuple[Box, ...]
    now_gpus: int
    need_gpus: int
    keep_gpus: int
    trusted: bool

    @property
    def there_gpus(self) -> int:
        return sum(box.gpus for box in self.there)


def wanted_of(
    outlook: Outlook, mine: Sequence[Box], now_ms: int, rules: Rules, *, trusted: bool
) -> Wanted:
    there = [box for box in mine if which_nodes.is_there(box, now_ms, rules.boots)]
    counted = {box.node for box in there}
    elsewhere = sum(box.held_gpus for box in mine if box.node not in counted)
    # What waits although so many GPUs are free beside others' work does not fit there.
    scattered = sum(box.gpus - box.held_gpus for box in there if box.held_gpus)
    unfit = min(scattered, outlook.queued_gpus)
    now_gpus = max(0, outlook.running_gpus - elsewhere) + outlook.queued_gpus + unfit
    guaranteed = outlook.guaranteed_gpus - elsewhere
    need = keep = max(guaranteed, now_gpus)
    if trusted:
        need = max(need, math.ceil(odds.at_level(outlook.soon_gpus, rules.level)) - elsewhere)
        likely = math.ceil(odds.at_level(outlook.later_gpus, rules.keep_level))
        later = max(need, likely - elsewhere - outlook.ended_later_gpus)
        keep = math.ceil(later * (1 + rules.margin_ratio))
        need = max(0, guaranteed, need - outlook.ending_gpus)
    return Wanted(tuple(there), now_gpus, need, keep, trusted)


def _of_type(draft: _Draft, outlook: Outlook, mine: Sequence[Box]) -> None:
    """The decision of one GPU type."""
    rules, now_ms = draft.rules, draft.now_ms
    unknown = guard_rails.of_knowledge(outlook, now_ms, draft.memory.at_ms, rules.bounds)
    wanted = wanted_of(outlook, mine, now_ms, rules, trusted=unknown is None)
    if unknown in (Rail.STALE, Rail.CLOCK):
        _decide(draft, outlook, wanted, _Done(rail=unknown))
        return
    missing = max(wanted.need_gpus - wanted.there_gpus, outlook.late_gpus)
    starts = which_nodes.to_start(
        mine, missing, draft.ups, now_ms, boots=rules.boots, bounds=rules.bounds
    )
    draft.ups -= len(starts.boxes)
    draft.add(Verb.RESUME, starts.names, outlook.gpu_type)
    rented = _NOTHING
    if starts.rail is not Rail.UP_RATE:
        rented = _rent(draft, outlook, missing - starts.gpus)
    stopped = _stop(draft, outlook, wanted)
    rail = unknown or starts.rail or rented.rail or stopped.rail
    done = replace(stopped, starts=starts.boxes, rented_gpus=rented.rented_gpus, rail=rail)
    _decide(draft, outlook, wanted, done)


def _rent(draft: _Draft, outlook: Outlook, missing_gpus: int) -> _Done:
    """Nodes by the hour, where no own one is left that could be started."""
    rules = draft.rules
    burst = rules.bursts.get(outlook.gpu_type)
    if burst is None or missing_gpus <= 0:
        return _NOTHING
    gpus, gangs = bursts.worth_gpus(outlook, missing_gpus, burst, rules.wait_usd_per_gpu_h)
    wanted = bursts.nodes_of(gpus, burst)
    spent_usd = sum(usd for _, usd in draft.spent_usd)
    affordable = bursts.affordable(
        burst, spent_usd, draft.rented_usd_per_h, rules.budget_usd_per_day
    )
    whole = bursts.whole(wanted, min(affordable, burst.nodes_max), gangs)
    nodes = min(whole, draft.ups)  # the others within minutes
    rail = None
    if nodes < wanted:
        rail = Rail.NAMES if affordable > burst.nodes_max else Rail.BUDGET
        rail = Rail.UP_RATE if nodes < whole else rail
    if nodes == 0:
        return _Done(rail=rail)
    names = tuple(f"burst-{draft.next_id}-{number}" for number in range(1, nodes + 1))
    draft.add(Verb.CREATE, names, outlook.gpu_type, asks=not rules.spends_alone)
    draft.ups -= nodes
    rented_gpus = nodes * burst.gpus_per_node
    draft.rented_usd_per_h += rented_gpus * burst.usd_per_gpu_h
    return _Done(rented_gpus=rented_gpus, rail=rail if rules.spends_alone else Rail.APPROVAL)


def _stop(draft: _Draft, outlook: Outlook, wanted: Wanted) -> _Done:
    """What goes off, and what takes no new work until it can. Rented nodes go as soon as nobody is
    there or waits, own ones only where the forecast says that they will not be missed."""
    rules, now_ms = draft.rules, draft.now_ms
    marked = rules.mode is Mode.ACT
    burst = rules.bursts.get(outlook.gpu_type)
    back: tuple[Box, ...] = ()
    if burst is not None:
        # Whoever waits, and is no reason to rent one, is no reason to keep one either.
        patient_gpus = outlook.queued_gpus - outlook.urgent_gpus
        spare_gpus = wanted.there_gpus - wanted.now_gpus + patient_gpus
        idle = bursts.unneeded(wanted.there, spare_gpus)
        chosen = which_nodes.to_stop(idle, draft.downs, now_ms, burst.idle_ms, marked=marked)
        draft.add(Verb.DELETE, chosen.names, outlook.gpu_type)
        draft.downs -= len(chosen.boxes)
        back = chosen.boxes
        draft.leaving += [box.node for box in idle] if marked else []
    if not wanted.trusted:
        return _Done(back=back)
    up = [box for box in wanted.there if box.power is not Power.STARTING]
    spare_gpus = sum(box.gpus for box in up if box.source is not Source.BURST) - wanted.keep_gpus
    leaving = which_nodes.to_leave(
        up,
        spare_gpus,
        now_ms,
        rules.idle_ms,
        queued_gpus=outlook.queued_gpus,
        bounds=rules.bounds,
    )
    stops = which_nodes.to_stop(leaving.boxes, draft.downs, now_ms, rules.idle_ms, marked=marked)
    draft.add(Verb.SUSPEND, stops.names, outlook.gpu_type)
    draft.downs -= len(stops.boxes)
    draft.leaving += leaving.names if marked else ()
    return _Done(stops=stops.boxes, back=back, rail=stops.rail or leaving.rail)


def _decide(draft: _Draft, outlook: Outlook, wanted: Wanted, done: _Done) -> None:
    """The record of it, where something changes or is held back, unless the last one says it."""
    name = outlook.gpu_type
    about = f"{done.verbs} {done.rail.name if done.rail else ''}".strip()
    repeats = draft.said.get(name, "") == about
    draft.said[name] = about
    acts = any(action.decision == draft.next_id for action in draft.actions)
    if not about or (repeats and not acts):
        return
    draft.decisions.append(
        Decision(
            id=draft.next_id,
            gpu_type=name,
            outlook=outlook,
            level=draft.rules.level,
            there_gpus=wanted.there_gpus,
            need_gpus=wanted.need_gpus,
            keep_gpus=wanted.keep_gpus,
            alternatives=_alternatives(draft, outlook, wanted, done),
            rail=done.rail,
            sentence=_sentence(draft, outlook, wanted, done),
        )
    )


def _alternatives(
    draft: _Draft, outlook: Outlook, wanted: Wanted, done: _Done
) -> tuple[Alternative, ...]:
    """Nothing, the idle-timeout rule, and what was chosen; none where nobody knows what comes."""
    rules, there = draft.rules, wanted.there_gpus
    if not outlook.later_gpus:
        return ()
    ripe = [box for box in wanted.there if which_nodes.is_ripe(box, draft.now_ms, rules.idle_ms)]
    idle_gpus = sum(box.gpus for box in ripe)
    asked_gpus = max(0, wanted.now_gpus - there)
    starts, stops, back = (sum(box.gpus for box in boxes) for boxes in done.boxes)
    hours = rules.later_ms / MS_PER_H
    burst = rules.bursts.get(outlook.gpu_type)
    rent_usd = done.rented_gpus * max(burst.usd_min, burst.usd_per_gpu_h * hours) if burst else 0.0

    def alternative(name: str, gpus: int, cycled_gpus: int, usd: float = 0.0) -> Alternative:
        short = odds.mean_short(outlook.later_gpus, gpus) * rules.wait_usd_per_gpu_h
        idle = odds.mean_idle(outlook.later_gpus, gpus) * rules.idle_usd_per_gpu_h
        fixed_usd = cycled_gpus * rules.cycle_usd_per_gpu + usd
        return Alternative(name, gpus, (short + idle) * hours + fixed_usd, fixed_usd)

    chosen = there + starts + done.rented_gpus - stops - back
    return (
        alternative("do nothing", there, 0),
        alternative("idle timeout", there + asked_gpus - idle_gpus, idle_gpus),
        alternative("chosen", chosen, stops, rent_usd),
    )


def _sentence(draft: _Draft, outlook: Outlook, wanted: Wanted, done: _Done) -> str:
    name, rules = outlook.gpu_type, draft.rules
    parts = []
    verbs = (("starts", "start"), ("goes off", "go off"), ("is given back", "are given back"))
    for boxes, (one, several) in zip(done.boxes, verbs, strict=True):
        if boxes:
            does = quantity(len(boxes), f"node of {name} {one}", f"nodes of {name} {several}")
            parts.append(f"{does} ({some([box.node for box in boxes], NAMED_MAX)})")
    if done.rented_gpus:
        rented = quantity(done.rented_gpus, f"GPU of {name} is", f"GPUs of {name} are")
        parts.append(f"{rented} rented by the hour")
    said = "; ".join(parts) or f"nothing of {name} is switched"
    wants = f"{quantity(wanted.need_gpus, 'GPU is', 'GPUs are')} needed"
    if wanted.trusted:
        stay = quantity(wanted.keep_gpus, "stays", "stay")
        wants += f" at {100 * rules.level:.3g}%, {stay} on"
    if outlook.patient_gpus:
        wants += f", {outlook.patient_gpus} more may wait"
    if wanted.trusted and outlook.ending_gpus:
        wants += f", {outlook.ending_gpus} more come free first"
    held = f"; held back: {done.rail.value}" if done.rail else ""
    return (
        f"{said}: {wants}, {quantity(wanted.there_gpus, 'is', 'are')} there{_late(outlook)}{held}"
    )


def _late(outlook: Outlook) -> str:
    """Whose deadlines are a reason; empty where nobody's is."""
    if not outlook.late_jobs:
        return ""
    whose = some([str(job_id) for job_id in outlook.late_jobs], NAMED_MAX)
    one = len(outlook.late_jobs) == 1
    does = f"job {whose} would miss its" if one else f"jobs {whose} would miss their"
    gpus = f"{quantity(outlook.late_gpus, 'GPU')} more"
    return f", and {does} deadline{'' if one else 's'} by waiting, which {gpus} would keep"
