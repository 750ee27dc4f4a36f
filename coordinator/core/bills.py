"""What work has cost: a function of the attempts that are kept, and of what was agreed.

Problem: a sum that is carried along drifts from what a restart would find, and the answer to "what
did this cost" must be the same tomorrow. So nothing is added up on the way: each attempt has held
its GPUs from its promise to its return, both durable (`ledger.py` counts the same), and the bill
of a span is the sum of what these stays have in it. A bill of two days is the sum of both days'.

- A node is leased while a lease of the configuration names it, rented by the hour where
  `burst_nodes` names it, and owned otherwise. An hour on it costs what that costs by
  `tariffs.Prices`; a GPU that is shared counts by `shares.ratio`.
- A lease is paid for whether it is used or not: what its GPUs cost in the span less what was used
  of them is idle, and nobody's.
- Energy is counted for own GPUs, by the table of watts under load: what was measured is not kept.
  That of own GPUs that idle is not in it, since nobody writes down when they were on.
- Tokens are those of built-in language trainers, whose configuration says how many a step has:
  steps that nobody had made before, spread evenly over the attempt that made them, as far as a
  commit or its end has written them down. Programs do not say theirs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Final, Protocol

from coordinator.core import flexible, gpu_types, shares, workload
from coordinator.core.accounting import end_unix_ms
from coordinator.core.capacity_model import Source
from coordinator.core.cost_requests import (
    SPAN_DAYS_MAX,
    CostDay,
    CostLine,
    CostPage,
    GetCosts,
    Grouping,
    HourlyUse,
    Money,
    TypeFleet,
)
from coordinator.core.lease_messages import PastDemand
from coordinator.core.messages import Refusal, RefusalKind
from coordinator.core.model import Attempt, Job, Node
from coordinator.core.options import Options
from coordinator.core.sentences import some
from coordinator.core.state import Instant
from coordinator.core.tariffs import Lease, Prices

MS_PER_H: Final = 3_600_000
MS_PER_DAY: Final = 24 * MS_PER_H
SPAN_MS_MAX: Final = SPAN_DAYS_MAX * MS_PER_DAY
# Lines of an answer; what is cheaper is in the total alone.
LINES_MAX: Final = 1_000
NAMES_SHOWN_MAX: Final = 20
# Of use before the span, for those who would have leased by the month before.
BEFORE_MS: Final = 30 * MS_PER_DAY
UNKNOWN_TYPE: Final = "unknown"
WATTS_PER_KW: Final = 1_000.0
ENERGY_SOURCE: Final = "own GPUs under load by the table of watts; what was measured is not kept"


class KnownNode(Protocol):
    @property
    def node(self) -> Node: ...


class Books(Protocol):
    """What a bill is made of: the core's state, or a copy of these parts of it for another
    thread."""

    @property
    def options(self) -> Options: ...
    @property
    def jobs(self) -> Mapping[int, Job]: ...
    @property
    def attempts(self) -> Mapping[str, Attempt]: ...
    @property
    def job_attempts(self) -> Mapping[int, Sequence[str]]: ...
    @property
    def nodes(self) -> Mapping[str, KnownNode]: ...
    @property
    def forgotten(self) -> Mapping[str, KnownNode]: ...
    def attempts_of(self, job_id: int) -> list[Attempt]: ...


@dataclass(frozen=True, slots=True)
class Stay:
    """A part of an attempt's time on GPUs of one type, from one source. `gpus` counts shares; they
    were wanted since `wanted_ms`."""

    job: Job
    gpu_type: str
    gpus: float
    source: Source
    usd_per_hour: float | None
    begin_ms: int
    end_ms: int
    wanted_ms: int
    tokens_per_ms: float = 0.0
    lease: str = ""


def answer(
    state: Books, now: Instant, body: GetCosts, past: PastDemand | None = None
) -> CostPage | Refusal:
    """Ten thousand jobs of three attempts each take less than a second of a core. With a `past`
    some jobs that ended then are forgotten: what was held and paid is less than it was."""
    end = min(body.end_unix_ms, now.unix_ms)
    if body.last_ms:
        body = replace(body, begin_unix_ms=max(0, end - body.last_ms))
    begin = body.begin_unix_ms
    if wrong := _wrong(state, body, end):
        return Refusal(RefusalKind.INVALID, wrong)
    end = max(begin, end)
    stays = [
        stay
        for stay in stays_of(state, now.unix_ms, begin - BEFORE_MS)
        if not body.project or stay.job.spec.project == body.project
    ]
    prices, leases = state.options.prices, () if body.project else state.options.leases
    if past is not None and body.project:
        past = replace(past, gpus={})  # leases are not one project's
    lines: dict[str, tuple[str, Money]] = {}
    for stay in stays:
        money = money_of(stay, begin, end, prices)
        if money.gpu_hours > 0:
            key, name = _key(stay, body.by)
            known = lines.get(key, (name, Money()))[1]
            lines[key] = (name, added(known, money))
    dearest = sorted(lines.items(), key=lambda pair: (-pair[1][1].usd, pair[0]))
    shown = tuple(CostLine(key, name, money) for key, (name, money) in dearest[:LINES_MAX])
    days = days_of(stays, leases, prices, begin, end)
    total = Money()
    for day in days:
        total = added(total, day.money)
    return CostPage(
        shown,
        total,
        sum(day.idle_lease_usd for day in days),
        days,
        tuple(hourly_uses(stays, (max(0, begin - BEFORE_MS), end), prices, past)),
        _kept_since(state, past),
        _source(stays, prices),
        ENERGY_SOURCE,
        () if body.project else tuple(fleets_of(state, now.unix_ms)),
        begin,
        end,
    )


def _kept_since(state: Books, past: PastDemand | None) -> int | None:
    """One that runs for weeks began before others that are forgotten: not all is known since."""
    if past is not None:
        return past.since_unix_ms
    return min((one.assigned_unix_ms for one in state.attempts.values()), default=None)


def _wrong(state: Books, body: GetCosts, end_ms: int) -> str:
    """Why there is no such bill, or nothing."""
    if not 0 <= body.begin_unix_ms < body.end_unix_ms:
        return "a span begins before it ends"
    if end_ms - body.begin_unix_ms > SPAN_MS_MAX:
        return f"a span is {SPAN_DAYS_MAX} days at most"
    if not body.project:
        return ""
    of_jobs = [job.spec.project for job in state.jobs.values()]
    known = sorted(dict.fromkeys([*state.options.projects, *of_jobs]))
    if body.project in known:
        return ""
    named = some(known, NAMES_SHOWN_MAX) or "none"
    return f"no job of project {body.project!r} is kept; there are {named}"


# --- stays ----------------------------------------------------------------------------------------


def stays_of(state: Books, unix_ms: int, since_ms: int) -> Iterator[Stay]:
    """Of all attempts that are kept and were not over by then; one that goes on stays until
    now."""
    for job_id in sorted(state.job_attempts):
        job = state.jobs[job_id]
        training = workload.read(job.spec) if job.spec.trainer else ""
        tokens = 0 if isinstance(training, str) else training.tokens
        for attempt in state.attempts_of(job_id):
            if end_unix_ms(attempt, unix_ms) > since_ms:
                yield from _stays(state, job, attempt, unix_ms, tokens)


def _stays(
    state: Books, job: Job, attempt: Attempt, unix_ms: int, tokens_per_step: int
) -> Iterator[Stay]:
    begin, end = attempt.assigned_unix_ms, end_unix_ms(attempt, unix_ms)
    if end <= begin or not attempt.gpu_uuids:
        return
    live = state.nodes.get(attempt.node) or state.forgotten.get(attempt.node)
    facts = {gpu.uuid: gpu for gpu in (live.node.gpus if live is not None else ())}
    # Of a rented node that is gone the type is still known.
    unknown = (live.node.power.gpu_type if live is not None else "") or UNKNOWN_TYPE
    (typical,) = gpu_types.facts_of(unknown, 1)
    by_type: dict[str, float] = {}
    for uuid in attempt.gpu_uuids:
        gpu = facts.get(uuid)
        name = unknown if gpu is None else gpu_types.key_of(gpu.name, gpu.memory_bytes)
        by_type[name] = by_type.get(name, 0.0) + shares.ratio(job.spec, gpu or typical)
    # Rank 0 speaks for its gang; what one step was on several types is told once.
    queued = attempt.times.queued_unix_ms
    wanted = begin if queued is None else min(begin, queued)
    tokens = 0.0 if attempt.rank else _new_steps(attempt) * tokens_per_step / (end - begin)
    for gpu_type, gpus in sorted(by_type.items()):
        whole = Stay(
            job, gpu_type, gpus, Source.OWNED, None, begin, end, wanted, tokens / len(by_type)
        )
        yield from _sourced(state, attempt.node, whole)


def _sourced(state: Books, node: str, whole: Stay) -> Iterator[Stay]:
    """A stay cut where a lease begins and ends. The first lease that names the node counts."""
    prices, options = state.options.prices, state.options
    tariff = prices.of(whole.gpu_type)
    rest, usd = Source.OWNED, tariff.owned_usd
    if any(fnmatchcase(node, pattern) for pattern in options.burst_nodes):
        rest, usd = Source.BURST, tariff.burst_usd
    at = whole.begin_ms
    named = [lease for lease in options.leases if fnmatchcase(node, lease.nodes)]
    for lease in sorted(named, key=lambda lease: (lease.begin_unix_ms, lease.name)):
        begin, end = max(at, lease.begin_unix_ms), min(whole.end_ms, lease.end_unix_ms)
        if begin >= end:
            continue
        if at < begin:
            yield replace(whole, source=rest, usd_per_hour=usd, begin_ms=at, end_ms=begin)
            whole = replace(whole, wanted_ms=begin)
        yield replace(
            whole,
            source=Source.LEASED,
            usd_per_hour=lease_usd(lease, prices),
            begin_ms=begin,
            end_ms=end,
            lease=lease.name,
        )
        at = end
        whole = replace(whole, wanted_ms=end)
    if at < whole.end_ms:
        yield replace(whole, source=rest, usd_per_hour=usd, begin_ms=at)


def lease_usd(lease: Lease, prices: Prices) -> float | None:
    """Of one GPU, an hour."""
    return prices.of(lease.gpu_type).lease_usd if lease.usd is None else lease.usd


def _new_steps(attempt: Attempt) -> int:
    """Those that no attempt before it had made, as far as they are written down."""
    times = attempt.times
    return max(0, (times.step or 0) - max(attempt.restored_step, times.reached_step))


# --- money ----------------------------------------------------------------------------------------


def money_of(stay: Stay, begin_ms: int, end_ms: int, prices: Prices) -> Money:
    """What of a stay is in the span."""
    spent_ms = min(stay.end_ms, end_ms) - max(stay.begin_ms, begin_ms)
    if spent_ms <= 0:
        return Money()
    gpu_hours = stay.gpus * spent_ms / MS_PER_H
    usd = gpu_hours * (stay.usd_per_hour or 0.0)
    energy_kwh = 0.0
    owned = stay.source is Source.OWNED
    if owned:
        watts = prices.of(stay.gpu_type).loaded_watts or 0.0
        energy_kwh = gpu_hours * watts * prices.overhead_ratio / WATTS_PER_KW
    money = Money(
        gpu_hours=gpu_hours,
        owned_usd=usd if owned else 0.0,
        lease_usd=usd if stay.source is Source.LEASED else 0.0,
        burst_usd=usd if stay.source is Source.BURST else 0.0,
        energy_kwh=energy_kwh,
        energy_usd=energy_kwh * prices.energy_usd_per_kwh,
        unpriced_gpu_hours=gpu_hours if stay.usd_per_hour is None else 0.0,
    )
    tokens = stay.tokens_per_ms * spent_ms
    return replace(money, tokens=tokens, token_usd=money.usd) if tokens else money


def added(one: Money, other: Money) -> Money:
    """Written out, since a bill adds for each attempt and day."""
    return Money(
        one.gpu_hours + other.gpu_hours,
        one.owned_usd + other.owned_usd,
        one.lease_usd + other.lease_usd,
        one.burst_usd + other.burst_usd,
        one.energy_kwh + other.energy_kwh,
        one.energy_usd + other.energy_usd,
        one.unpriced_gpu_hours + other.unpriced_gpu_hours,
        one.tokens + other.tokens,
        one.token_usd + other.token_usd,
    )


def _key(stay: Stay, by: Grouping) -> tuple[str, str]:
    if by is Grouping.JOB:
        return str(stay.job.id), stay.job.spec.name
    return (stay.job.spec.project if by is Grouping.PROJECT else stay.gpu_type), ""


def days_of(
    stays: Iterable[Stay], leases: Sequence[Lease], prices: Prices, begin_ms: int, end_ms: int
) -> tuple[CostDay, ...]:
    """The span in days of UTC, the first and last perhaps in part. What of a lease is idle is
    counted by the day."""
    if end_ms <= begin_ms:
        return ()
    first, last = begin_ms // MS_PER_DAY, (end_ms - 1) // MS_PER_DAY
    spans = {
        day: (max(begin_ms, day * MS_PER_DAY), min(end_ms, (day + 1) * MS_PER_DAY))
        for day in range(first, last + 1)
    }
    spent = {day: Money() for day in spans}
    used: dict[tuple[int, str], float] = {}
    for stay in stays:
        begin, end = stay.begin_ms // MS_PER_DAY, (stay.end_ms - 1) // MS_PER_DAY
        for day in range(max(first, begin), min(last, end) + 1):
            money = money_of(stay, *spans[day], prices)
            spent[day] = added(spent[day], money)
            if stay.lease:
                used[day, stay.lease] = used.get((day, stay.lease), 0.0) + money.lease_usd
    return tuple(
        CostDay(
            span[0],
            spent[day],
            sum(
                _idle_usd(lease, prices, span, used.get((day, lease.name), 0.0)) for lease in leases
            ),
        )
        for day, span in spans.items()
    )


def _idle_usd(lease: Lease, prices: Prices, span: tuple[int, int], used_usd: float) -> float:
    spent_ms = min(lease.end_unix_ms, span[1]) - max(lease.begin_unix_ms, span[0])
    paid_usd = lease.gpus * max(0, spent_ms) / MS_PER_H * (lease_usd(lease, prices) or 0.0)
    return max(0.0, paid_usd - used_usd)


def hourly_uses(
    stays: Sequence[Stay], span: tuple[int, int], prices: Prices, past: PastDemand | None = None
) -> Iterator[HourlyUse]:
    """By type, of whole hours."""
    first = -(-span[0] // MS_PER_H)
    count = max(0, span[1] // MS_PER_H - first)
    kept = 0 if past is None else min(count, max(0, -(-past.since_unix_ms // MS_PER_H) - first))
    kept_span = (first + kept) * MS_PER_H, (first + count) * MS_PER_H
    held: dict[str, list[float]] = {}
    wanted: dict[str, list[float]] = {}
    patient: dict[str, Patience] = {}
    for stay in stays:
        gpus = held.setdefault(stay.gpu_type, [0.0] * count)
        _count(gpus, first, stay, stay.begin_ms)
        gpus = wanted.setdefault(stay.gpu_type, [0.0] * count)
        may_wait_ms = _may_wait_ms(stay)
        waited_ms = min(may_wait_ms, stay.begin_ms - stay.wanted_ms)
        at_once = replace(stay, end_ms=stay.end_ms - waited_ms) if waited_ms else stay
        _count(gpus, first, at_once, stay.wanted_ms)
        if may_wait_ms:
            its = patient.setdefault(stay.gpu_type, Patience())
            gpu_hours = _gpu_hours(stay, stay.wanted_ms, at_once.end_ms, kept_span)
            its.gpu_hours += gpu_hours
            its.waited_hours += gpu_hours * may_wait_ms / MS_PER_H
            its.queued_gpu_hours += _gpu_hours(stay, at_once.end_ms, stay.end_ms, kept_span)
    for gpu_type, gpus in sorted(held.items()):
        if any(wanted[gpu_type]):
            tariff, its = prices.of(gpu_type), patient.get(gpu_type, Patience())
            all_gpu_hours = sum(wanted[gpu_type][kept:])
            sampled = all_gpu_hours + its.queued_gpu_hours
            part = all_gpu_hours / sampled if sampled else 1.0
            yield HourlyUse(
                gpu_type,
                first * MS_PER_H,
                tuple(gpus),
                tariff.lease_usd,
                tariff.burst_usd,
                tuple(wanted[gpu_type]),
                its.gpu_hours / all_gpu_hours if all_gpu_hours else 0.0,
                int(its.waited_hours / its.gpu_hours) if its.gpu_hours else 0,
                () if past is None else tuple(g * part for g in past.gpus.get(gpu_type, ())),
            )


@dataclass(slots=True)
class Patience:
    """GPU-hours of work that may wait, and the same times the hours that it may. Samples of demand
    would have counted `queued_gpu_hours` more, in which it waited by its own wish."""

    gpu_hours: float = 0.0
    waited_hours: float = 0.0
    queued_gpu_hours: float = 0.0


def _gpu_hours(stay: Stay, begin_ms: int, end_ms: int, span: tuple[int, int]) -> float:
    """Of its GPUs in that time, as far as it is in the span."""
    return stay.gpus * max(0, min(end_ms, span[1]) - max(begin_ms, span[0])) / MS_PER_H


def _may_wait_ms(stay: Stay) -> int:
    """By its own wish; what is less than an hour is nothing to whoever counts in hours."""
    spec = stay.job.spec
    patient = flexible.is_counted_late(spec) and spec.flexible_ms >= MS_PER_H
    return spec.flexible_ms if patient else 0


def _count(gpus: list[float], first: int, stay: Stay, begin_ms: int) -> None:
    last = min(first + len(gpus) - 1, (stay.end_ms - 1) // MS_PER_H)
    for hour in range(max(first, begin_ms // MS_PER_H), last + 1):
        spent_ms = min(stay.end_ms, (hour + 1) * MS_PER_H) - max(begin_ms, hour * MS_PER_H)
        gpus[hour - first] += stay.gpus * spent_ms / MS_PER_H


def fleets_of(state: Books, unix_ms: int) -> Iterator[TypeFleet]:
    """By type: own GPUs of nodes that are known, and leases that run."""
    options = state.options
    leases = [
        lease for lease in options.leases if lease.begin_unix_ms <= unix_ms < lease.end_unix_ms
    ]
    rented = [*options.burst_nodes, *(lease.nodes for lease in leases)]
    owned: dict[str, int] = {lease.gpu_type: 0 for lease in leases}
    for name, live in sorted(state.nodes.items()):
        if not any(fnmatchcase(name, pattern) for pattern in rented):
            for gpu in live.node.gpus:
                key = gpu_types.key_of(gpu.name, gpu.memory_bytes)
                owned[key] = owned.get(key, 0) + 1
    for gpu_type, gpus in sorted(owned.items()):
        lots = [(one.gpus, one.end_unix_ms) for one in leases if one.gpu_type == gpu_type]
        yield TypeFleet(gpu_type, gpus, tuple(lots))


def _source(stays: Iterable[Stay], prices: Prices) -> str:
    """Where the prices of these types are from."""
    named: Mapping[str, None] = {prices.source(stay.gpu_type): None for stay in stays}
    return " and ".join(sorted(named))
