"""Which job gets GPUs of which type, and how many: value, less what moving costs, class by class.

Problem: a fleet has GPUs of several types, and a job runs well on some and badly on others. Giving
each job the best that is free when it comes leaves the best GPUs with whoever came first. So all
jobs are weighed against each other at every decision. Each way to run a job has a value:

    age x tenant x rate relative to the job's best x GPUs
    x ((1 - balance) / GPU-hours left ^ 0.6 + balance x (hours left / hours of all work) ^ power)

and the sum of the values of what runs is made as large as the fleet permits. The first term in the
brackets ends short jobs first, short beside the others (`Horizon.scaled`), the second keeps long
ones from being the last to end; `balance` says how much of the second. A job is long by the
hours that the fleet needs for all work of its class (`horizon.py`), or those of its longest job:
where there is work for days, five hours can wait. Where none come any more, the longest will end
last and count for more (`Horizon.quiet`). At a balance of 1 only the end of all counts: then an
hour's work is worth what it costs the fleet, and long jobs come first by little.

Where it is not known how much is left, the more a job has had, the more it is taken to need
(two-dimensional least attained service), and at least what its project's jobs typically take.

- Classes are solved one after another on what is left, never weighed against each other. So are,
  within each, those within their projects' quotas and those beyond (`quotas.py`).
- A job that runs is worth more where it is (`stay_ratio`), and elsewhere less, by the part of its
  next stay that a restart would take. Within its class it cannot be displaced at all before it has
  run for `run_s_min`, ten times what its restart takes; near balance 1 nor if it ends within that.
- A job whose latest start has come goes first in its class while its deadline can still be kept,
  whose came last first. A deadline that is lost counts as none.
- What the solver returns is rounded, filled up, and a gang that was left out changes places with
  small jobs that are worth less; in the end no GPU is free that a waiting job could use. Without a
  solver the filling up is all there is (the greedy).
- The solver's prices, of one GPU of each type, decide over a job that comes before the next
  decision (`backlog.at_prices`), and are the numbers in the sentence of one that waits.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from coordinator.core.horizon import Horizon, Work, horizon

MS_PER_S: Final = 1000.0
S_PER_H: Final = 3600.0
# A restart is worth a tenth of what follows it at most.
RUN_PER_RESTART_MIN: Final = 10.0
# Less than a minute on one GPU left: all of these are as good as done.
LEFT_GPU_H_MIN: Final = 1 / 60
# However dear a restart is: who waits and may run is worth something.
LOST_RATIO_MAX: Final = 0.9
# Speeds are estimates: a deadline is not given up before its job would have to be faster than it is
# taken to be by more than this, or by a minute in all.
FASTER_RATIO_MAX: Final = 0.1
LOST_MS_MIN: Final = 60_000
# What a solver calls 1: it computes with a tolerance of 1e-7.
WHOLE_MIN: Final = 1 - 1e-6
# Of the two terms of a job's value; chosen on Gavel's continuous trace, as `Aims` was.
SHORT_POWER: Final = 0.6
URGENCY: Final = 1.1
# Near a balance of 1, and hardly below a half of it, only the end of all counts; then all work has
# to be done where it is cheap, and how long a job is says least.
END_POWER: Final = 4
POWER_END: Final = 0.25


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a job; `rate` is in steps a second of the whole job."""

    gpu_type: str
    gpus: int
    rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A job that runs or could. `rank` is that of its class, 0 the first. `at` is how it runs since
    `since_ms`; None: it does not. `typical_gpu_s` is what jobs of its project take, for one that
    does not say how many steps it has left. `lent`: what it runs on, or would, is lent to its
    project, and goes first to those of its class that are within their quotas."""

    job_id: int
    options: tuple[Option, ...]
    rank: int = 0
    project: str = ""
    submitted_ms: int = 0
    steps_left: float | None = None
    attained_gpu_s: float = 0.0
    typical_gpu_s: float = 0.0
    at: Option | None = None
    since_ms: int = 0
    restart_s: float = 0.0
    deadline_ms: int | None = None
    lent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Aims:
    """What is wanted of a fleet. `balance`: 0 for the shortest mean completion, 1 for the earliest
    end of all; the higher `power`, the more it is the very longest jobs that this is about.
    `age_h`: after so long a job counts twice. `stay_s` is what a job is taken to run for after a
    move."""

    balance: float = 0.3
    power: float = 1.5
    age_h: float = 18.0
    stay_ratio: float = 0.16
    stay_s: float = 7200.0
    run_s_min: float = 600.0


@dataclass(frozen=True, slots=True)
class Columns:
    """A problem for a solver: column i gives `gpus[i]` of type `types[i]` to job `jobs[i]` and is
    worth `values[i]`. A job takes one column at most; `capacity` is that of each type."""

    jobs: Sequence[int]
    types: Sequence[int]
    gpus: Sequence[int]
    values: Sequence[float]
    job_count: int
    capacity: Sequence[int]


@dataclass(frozen=True, slots=True)
class Solved:
    """How much of each column is taken (0 to 1), what one GPU of each type is worth, and the most
    that any allocation can be worth."""

    shares: Sequence[float]
    prices: Sequence[float]
    bound: float


Solve = Callable[[Columns], Solved]


def unsolved(columns: Columns) -> Solved:
    """What a solver answers that has found nothing: the filling up decides."""
    return Solved([0.0] * len(columns.values), [0.0] * len(columns.capacity), math.inf)


@dataclass(frozen=True, slots=True)
class Grant:
    """A job that runs, and what it is worth to the fleet there."""

    job_id: int
    option: Option
    value: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """Who runs and how; whoever is not in `grants` waits. `prices` are those of the last class that
    was solved for a type; `bound` is no less than what any allocation would be worth. What follows
    it is for those who decide before the next time (`backlog.py`): what the options of each who
    waits are worth, and the most hours that a job of a class has left."""

    grants: Mapping[int, Grant]
    waits: Mapping[int, str]
    prices: Mapping[str, float]
    value: float
    bound: float
    waiting_worth: Mapping[int, Sequence[float]] = field(default_factory=dict)
    ahead: Mapping[int, Horizon] = field(default_factory=dict)


@dataclass(slots=True)
class _Class:
    """The jobs of one class while they are decided."""

    contenders: Sequence[Contender]
    worth: list[list[float]]
    free: dict[str, int]
    grants: dict[int, Grant] = field(default_factory=dict)

    def take(self, index: int, choice: int) -> bool:
        """Give a job its option, where it has none yet and there is room."""
        contender = self.contenders[index]
        option = contender.options[choice]
        if contender.job_id in self.grants or self.free.get(option.gpu_type, 0) < option.gpus:
            return False
        self.free[option.gpu_type] -= option.gpus
        self.grants[contender.job_id] = Grant(contender.job_id, option, self.worth[index][choice])
        return True

    def give_back(self, grant: Grant) -> None:
        del self.grants[grant.job_id]
        self.free[grant.option.gpu_type] += grant.option.gpus


def allocate(
    contenders: Iterable[Contender],
    capacity: Mapping[str, int],
    now_ms: int,
    aims: Aims,
    *,
    tenants: Mapping[str, float] | None = None,
    solve: Solve | None = None,
) -> Allocation:
    """Decide over all jobs. `tenants` weighs projects, 1 where it does not name one."""
    free = dict(sorted(capacity.items()))
    grants: dict[int, Grant] = {}
    waits: dict[int, str] = {}
    prices = dict.fromkeys(free, 0.0)
    waiting_worth: dict[int, Sequence[float]] = {}
    ahead: dict[int, Horizon] = {}
    bound = 0.0
    by_rank: dict[int, list[Contender]] = {}
    for contender in sorted(contenders, key=lambda c: (c.rank, c.submitted_ms, c.job_id)):
        by_rank.setdefault(contender.rank, []).append(contender)
    for rank, group in by_rank.items():
        ahead[rank] = work_ahead(group, free, now_ms)
        worth = worths(group, now_ms, aims, tenants or {}, ahead[rank])
        tiers = _tiers(group, worth, free)
        for place, tier in enumerate(tiers):
            _keep_late(tier, now_ms)
            # Who is beyond a quota has to run for its minimum, too, before others may have it.
            for other in tiers[place:]:
                _keep_running(other, now_ms, aims, ending=other is tier)
            kept = dict(tier.grants)
            solved_prices, solved_bound = _solve(tier, solve)
            prices.update(solved_prices)
            bound += sum(grant.value for grant in kept.values()) + solved_bound
            _fill(tier)
            if solve is not None:
                _exchange(tier, kept)
                _fill(tier)
            grants.update(tier.grants)
        for tier in tiers:
            waits.update(_reasons(tier, prices))
        waiting_worth.update(
            (contender.job_id, worth[index])
            for index, contender in enumerate(group)
            if contender.job_id not in grants
        )
    value = sum(grant.value for grant in grants.values())
    return Allocation(grants, waits, prices, value, bound, waiting_worth, ahead)


def worths(
    contenders: Sequence[Contender],
    now_ms: int,
    aims: Aims,
    tenants: Mapping[str, float],
    ahead: Horizon,
) -> list[list[float]]:
    """What each option of each job is worth, in the order of `contenders`, with so much work
    `ahead` of their class."""
    end = aims.balance**END_POWER
    power = (1.0 - end) * aims.power + end * POWER_END
    found = []
    for contender in contenders:
        best = _best(contender)
        hours = _hours_left(contender, best)
        age = 1.0 + max(0, now_ms - contender.submitted_ms) / MS_PER_S / S_PER_H / aims.age_h
        weight = age * tenants.get(contender.project, 1.0) * best.gpus
        part = min(1.0, hours / best.gpus / max(ahead.hours, LEFT_GPU_H_MIN))
        urgency = URGENCY * ahead.cost(_relative(contender, best)) ** end * part**power
        urgency /= 1.0 - (1.0 - end) * ahead.quiet * part - end**2 * ahead.last(part)
        value = (1.0 - aims.balance) * ahead.scaled(hours) ** -SHORT_POWER + aims.balance * urgency
        found.append(_worth(contender, best, hours, weight * value, aims))
    return found


def work_ahead(group: Sequence[Contender], capacity: Mapping[str, int], now_ms: int) -> Horizon:
    """Of these jobs, on what there is."""
    works, longest_h, came_ms = [], 0.0, 0
    for contender in group:
        best = _best(contender)
        hours = _hours_left(contender, best)
        longest_h = max(longest_h, hours / best.gpus)
        came_ms = max(came_ms, contender.submitted_ms)
        works.append(Work(hours, best.gpus, _relative(contender, best)))
    return horizon(works, longest_h, capacity, (now_ms - came_ms) / MS_PER_S / S_PER_H)


def _hours_left(contender: Contender, best: Option) -> float:
    if contender.steps_left is None:
        left_gpu_s = max(contender.attained_gpu_s, contender.typical_gpu_s)
    else:
        left_gpu_s = contender.steps_left / best.rate * best.gpus
    return max(LEFT_GPU_H_MIN, left_gpu_s / S_PER_H)


def _best(contender: Contender) -> Option:
    """The option with the highest rate; one that stands for no option at all does nothing."""
    return max(contender.options, key=lambda option: option.rate, default=Option("", 1, math.inf))


def _relative(contender: Contender, best: Option) -> dict[str, float]:
    """How fast it is on each type that can run it, relative to the best."""
    return {
        option.gpu_type: option.rate / best.rate for option in contender.options if option.rate > 0
    }


def _worth(
    contender: Contender, best: Option, hours: float, base: float, aims: Aims
) -> list[float]:
    """Of each option, where the best one is worth `base` before any cost of moving."""
    moves = contender.at is not None or contender.attained_gpu_s > 0
    found = []
    for option in contender.options:
        if option.rate <= 0:
            found.append(0.0)
            continue
        relative = option.rate / best.rate
        value = base * relative
        if option == contender.at:
            value *= 1.0 + aims.stay_ratio * (1.0 + aims.balance)
        elif moves:
            stay_s = min(aims.stay_s, hours * S_PER_H / best.gpus / relative)
            value *= 1.0 - min(LOST_RATIO_MAX, contender.restart_s / stay_s)
        found.append(value)
    return found


def run_s_min(restart_s: float, aims: Aims) -> float:
    """For how long a job runs, once it does, before its class may displace it."""
    return max(aims.run_s_min, RUN_PER_RESTART_MIN * restart_s)


def latest_start_ms(contender: Contender) -> float:
    """When it must run on its best GPUs to keep its deadline; infinite without one."""
    if contender.deadline_ms is None or contender.steps_left is None:
        return math.inf
    need_s = contender.steps_left / _best(contender).rate + contender.restart_s
    return contender.deadline_ms - need_s * MS_PER_S


def is_late(contender: Contender, now_ms: int) -> bool:
    """Whether it has to run now to keep its deadline, and may still keep it."""
    latest_ms = latest_start_ms(contender)
    if latest_ms > now_ms or contender.deadline_ms is None or now_ms >= contender.deadline_ms:
        return False
    margin_ms = max(LOST_MS_MIN, FASTER_RATIO_MAX * (contender.deadline_ms - latest_ms))
    return now_ms <= latest_ms + margin_ms


def _tiers(
    group: Sequence[Contender], worth: list[list[float]], free: dict[str, int]
) -> list[_Class]:
    """The jobs of a class that are within their projects' quotas, and those beyond."""
    found = []
    for lent in (False, True):
        indices = [index for index, contender in enumerate(group) if contender.lent is lent]
        if indices:
            contenders = [group[index] for index in indices]
            found.append(_Class(contenders, [worth[index] for index in indices], free))
    return found


def _keep_late(state: _Class, now_ms: int) -> None:
    """Those over whom there is nothing to decide: who must start, and may still be in time."""
    late = [
        (-latest_start_ms(contender), index)
        for index, contender in enumerate(state.contenders)
        if is_late(contender, now_ms)
    ]
    for _, index in sorted(late):
        worth = state.worth[index]
        order = sorted(range(len(worth)), key=lambda choice: (-worth[choice], choice))
        any(worth[choice] > 0 and state.take(index, choice) for choice in order)


def _keep_running(state: _Class, now_ms: int, aims: Aims, *, ending: bool) -> None:
    """And who stays where it is."""
    stay = [
        (-max(state.worth[index], default=0.0), index, contender.options.index(contender.at))
        for index, contender in enumerate(state.contenders)
        if contender.at in contender.options and stays(contender, now_ms, aims, ending=ending)
    ]
    for _, index, choice in sorted(stay):
        state.take(index, choice)


def stays(contender: Contender, now_ms: int, aims: Aims, *, ending: bool = True) -> bool:
    """Whether one that runs has just started; `ending`: or will have ended before that long."""
    least_s = run_s_min(contender.restart_s, aims)
    young = now_ms - contender.since_ms < least_s * MS_PER_S
    if young or not ending or contender.at is None or contender.steps_left is None:
        return young
    return contender.steps_left < aims.balance ** (2 * END_POWER) * least_s * contender.at.rate


def _solve(state: _Class, solve: Solve | None) -> tuple[dict[str, float], float]:
    """What the solver takes whole, and then what it takes in part, most of it first. Its prices and
    its bound."""
    names = list(state.free)
    number = {name: index for index, name in enumerate(names)}
    jobs, types, gpus, values = [], [], [], []
    choices: list[tuple[int, int]] = []
    job_count = 0
    for index, contender in enumerate(state.contenders):
        if contender.job_id in state.grants:
            continue
        before = len(choices)
        for choice, option in enumerate(contender.options):
            value = state.worth[index][choice]
            if value > 0 and option.gpus <= state.free.get(option.gpu_type, 0):
                choices.append((index, choice))
                jobs.append(job_count)
                types.append(number[option.gpu_type])
                gpus.append(option.gpus)
                values.append(value)
        job_count += len(choices) > before
    if solve is None or not choices:
        return {}, math.inf if choices else 0.0
    capacity = [state.free[name] for name in names]
    solved = solve(Columns(jobs, types, gpus, values, job_count, capacity))
    taken = [
        (-min(share, WHOLE_MIN), -value, place)
        for place, (share, value) in enumerate(zip(solved.shares, values, strict=True))
        if share > 1 - WHOLE_MIN
    ]
    for _, _, place in sorted(taken):
        state.take(*choices[place])
    return dict(zip(names, solved.prices, strict=True)), solved.bound


def _fill(state: _Class) -> None:
    """Whoever still fits, the most worth for a GPU first: no GPU idles that one of them could
    use."""
    waiting = [
        (-state.worth[index][choice] / max(1, option.gpus), index, choice)
        for index, contender in enumerate(state.contenders)
        if contender.job_id not in state.grants
        for choice, option in enumerate(contender.options)
        if option.gpus <= state.free.get(option.gpu_type, 0) and state.worth[index][choice] > 0
    ]
    for _, index, choice in sorted(waiting):
        state.take(index, choice)


def _exchange(state: _Class, kept: Mapping[int, Grant]) -> None:
    """Rounding leaves gangs out that are worth more than the small jobs which then filled their
    GPUs: those change places, the dearest gang first, each job at most once."""
    placed: dict[str, list[Grant]] = {name: [] for name in state.free}
    for grant in state.grants.values():
        if grant.job_id not in kept:
            placed[grant.option.gpu_type].append(grant)
    for grants in placed.values():
        grants.sort(key=lambda grant: (grant.value / max(1, grant.option.gpus), grant.job_id))
    waiting = [
        (-state.worth[index][choice] / max(1, option.gpus), index, choice)
        for index, contender in enumerate(state.contenders)
        if contender.job_id not in state.grants
        for choice, option in enumerate(contender.options)
        if (cheap := placed.get(option.gpu_type))
        and state.worth[index][choice] / max(1, option.gpus) > cheap[0].value / cheap[0].option.gpus
    ]
    for _, index, choice in sorted(waiting):
        contender, value = state.contenders[index], state.worth[index][choice]
        option = contender.options[choice]
        short = option.gpus - state.free[option.gpu_type]
        leaving: list[Grant] = []
        for grant in placed[option.gpu_type]:
            if short <= 0:
                break
            leaving.append(grant)
            short -= grant.option.gpus
        gains = value > sum(grant.value for grant in leaving)
        if contender.job_id in state.grants or short > 0 or not gains:
            continue
        for grant in leaving:
            state.give_back(grant)
        del placed[option.gpu_type][: len(leaving)]
        state.take(index, choice)


def _reasons(state: _Class, prices: Mapping[str, float]) -> dict[int, str]:
    return {
        contender.job_id: _reason(contender, state.worth[index], state.free, prices)
        for index, contender in enumerate(state.contenders)
        if contender.job_id not in state.grants
    }


def _reason(
    contender: Contender,
    worth: Sequence[float],
    free: Mapping[str, int],
    prices: Mapping[str, float],
) -> str:
    """Why it waits: where it comes nearest to running, and by how much it falls short."""
    found = [
        (value - option.gpus * prices.get(option.gpu_type, 0.0), -place)
        for place, (value, option) in enumerate(zip(worth, contender.options, strict=True))
        if value > 0
    ]
    if not found:
        return "no GPU type of the fleet is known to run it"
    _, place = max(found)
    option, value = contender.options[-place], worth[-place]
    name, gpus = option.gpu_type, option.gpus
    price = prices.get(name, 0.0)
    return (
        f"needs {gpus} x {name}, {free.get(name, 0)} free; worth {value / gpus:.3g} a GPU there,"
        f" where the last GPU is worth {price:.3g}"
    )
