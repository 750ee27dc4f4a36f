"""The answer to an order for a decision over all jobs: a function of frozen values.

Problem: with ten thousand jobs that run and as many that wait a decision takes seconds of a core,
which the loop that everybody waits for has not. So the core hands what it has gathered to somebody
beside the loop (`MakeAllocation`, a command), who calls `answer`, and what was found comes back as
an event like any other (`AllocationMade`). What the state is by then nobody here knows: what of it
is still true `decisions.made` says.
"""

from collections.abc import Mapping, Sequence

from coordinator.core.allocation import allocate, worths
from coordinator.core.allocation_messages import AllocationMade, MakeAllocation, Order
from coordinator.core.phases import JobPhase
from coordinator.core.standing import Entrant

# What a price may say of a wait is worth saying where it decides: not for a hundredth.
DEARER_RATIO = 1.05


def answer(asked: MakeAllocation) -> AllocationMade:
    """Raises only for bugs of our own, and of the solver."""
    allocation = allocate(
        [entrant.contender for entrant in asked.entrants],
        asked.capacity,
        asked.now_ms,
        asked.aims,
        tenants=asked.tenants,
        solve=asked.solve,
    )
    prices, choice = allocation.prices, len(asked.capacity) > 1
    order: dict[int, Order] = {}
    turn: dict[int, tuple[bool, float]] = {}
    notes: dict[int, str] = {}
    for entrant in asked.entrants:
        job, contender = entrant.job, entrant.contender
        if job.phase is not JobPhase.QUEUED:
            continue
        grant = allocation.grants.get(job.id)
        worth = allocation.waiting_worth.get(job.id)
        if worth is None:
            ahead = allocation.ahead[contender.rank]
            (worth,) = worths([contender], asked.now_ms, asked.aims, asked.tenants, ahead)
        granted = "" if grant is None else grant.option.gpu_type
        order[job.id] = order_of(entrant, worth, prices, granted) if choice else ()
        if entrant.known and worth:
            turn[job.id] = (grant is not None, max(worth) / (job.spec.ranks * job.spec.gpus))
        if entrant.known and grant is None:
            notes[job.id] = _note(entrant, worth, prices)
    return AllocationMade(asked.asking, allocation, asked.tenants, order, turn, notes)


def order_of(
    entrant: Entrant, worth: Sequence[float], prices: Mapping[str, float], granted: str = ""
) -> Order:
    """Its types, what it was granted first, then by what is left of their worth after the price;
    empty where there is nothing to choose by."""
    rates, options = entrant.rates, entrant.contender.options
    if not rates.told:
        return ()
    surplus = [
        value - option.gpus * prices.get(option.gpu_type, 0.0)
        for value, option in zip(worth, options, strict=True)
    ]
    places = sorted(
        range(len(options)),
        key=lambda place: (options[place].gpu_type != granted, -surplus[place], place),
    )
    return tuple((options[place].gpu_type, rates.mean[place]) for place in places)


def _note(entrant: Entrant, worth: Sequence[float], prices: Mapping[str, float]) -> str:
    """Where it comes nearest to running, if it is a price that it does not pay there."""
    options = entrant.contender.options
    found = [
        (value / option.gpus - prices.get(option.gpu_type, 0.0), value / option.gpus, place)
        for place, (value, option) in enumerate(zip(worth, options, strict=True))
    ]
    if not found:
        return ""
    _, value, place = max(found)
    gpu_type = options[place].gpu_type
    price = prices.get(gpu_type, 0.0)
    if price <= DEARER_RATIO * value:
        return ""
    return f"; a GPU of type {gpu_type} is worth {value:.2g} to it, and {price:.2g} to others"
