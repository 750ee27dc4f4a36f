"""What is expected of demand, as the core asks for it and gets to know it.

Problem: a forecast takes numpy and tens of milliseconds, and the core has neither. So it asks for
one with each sample (`MakeForecast`, a command), and somewhere beside the loop one is made and
comes back as an event like any other (`ForecastMade`). It may come late, or not at all: the state
keeps the newest, and whoever plans by it is told when it is too old, or when the clock that it was
made by is not to be believed.
"""

import math
from collections import Counter
from typing import Final

from coordinator.core import demand_samples, gpu_types, held_ahead, lease_days, power
from coordinator.core.capacity_model import Outlook
from coordinator.core.demand_history import HOUR_MIN, MINUTE_MS, Series
from coordinator.core.demand_messages import AskedType, ForecastMade, MakeForecast
from coordinator.core.state import Instant, State

# Forecasts come once a minute; who has missed so many is away.
FRESH_MS: Final = 300_000


def tick(state: State, now: Instant) -> None:
    """A sample, where one is due, and what is asked with it: a forecast, and leases once a day."""
    minute = demand_samples.due(state, now)
    if minute is None:
        return
    history, wanted = state.demand_history, demand_samples.wanted(state)
    ends_hour = (minute + 1) % HOUR_MIN == 0
    still = held_ahead.still_wanted(state, now, wanted) if ends_hour else {}
    state.records += history.put(minute, wanted, still)
    lease_days.tick(state, now)
    asked = tuple(
        AskedType(gpu_type, gpus, *minutes_ahead(state, gpu_type))
        for gpu_type in history.gpu_types()
        for gpus in history.read(1, minute, 1, Series(gpu_type))
        if gpus is not None
    )
    if asked:
        state.commands.append(MakeForecast(minute, asked))


def minutes_ahead(state: State, gpu_type: str) -> tuple[int, int]:
    """Over how many minutes the maximum of a type is asked for: until a node that is started now is
    there and one decision more has been made, and for as long as a node has to stay off to be worth
    it."""
    scaling = state.options.scaling
    boots, guess_ms = power.boot_times(state), state.options.power.boot_guess_ms
    # One of each kind will do: thousands are alike.
    nodes = [state.nodes[next(iter(alike))].node for alike in state.indices.kinds.values()]
    boots_ms = [boots.of(power.model_of(node)) for node in nodes if power.type_of(node) == gpu_type]
    soon_ms = max(boots_ms, default=guess_ms) + scaling.interval_ms
    soon_min = math.ceil(soon_ms / state.options.demand_minute_ms)
    return soon_min, math.ceil(scaling.rules.later_ms / MINUTE_MS)


def made(state: State, now: Instant, event: ForecastMade) -> None:
    """The newest counts; one that comes out of turn is of no use any more."""
    if state.forecast is None or state.forecast[1].minute <= event.minute:
        state.forecast = now.now_ms, event


def outlooks(state: State, now: Instant) -> list[Outlook]:
    """By GPU type in order, of all that were ever wanted or that nodes have."""
    present = demand_samples.present(state)
    forecasts = {}
    stale = state.demand_history.clock.doubts or state.forecast is None
    if state.forecast is not None:
        came_ms, event = state.forecast
        stale = stale or now.now_ms - came_ms > FRESH_MS
        forecasts = {told.gpu_type: told for told in event.types}
    sizes = _node_sizes(state)
    frees_ms = held_ahead.frees_ms(
        state,
        now,
        {gpu_type: sizes.get(gpu_type, 1) for gpu_type, at in present.items() if at.queued_gpus},
    )
    found = []
    for gpu_type in sorted(dict.fromkeys([*sizes, *present, *forecasts])):
        counts = present.get(gpu_type, demand_samples.Present())
        told = forecasts.get(gpu_type)
        found.append(
            Outlook(
                gpu_type,
                round(counts.running_gpus),
                math.ceil(counts.queued_gpus),
                math.ceil(counts.guaranteed_gpus),
                () if told is None else told.soon_gpus,
                () if told is None else told.later_gpus,
                None if told is None else told.coverage,
                stale,
                frees_ms.get(gpu_type),
            )
        )
    return found


def _node_sizes(state: State) -> dict[str, int]:
    """How many GPUs of a type the smallest node has that has any."""
    sizes: dict[str, int] = {}
    for _, _, gpus in state.indices.kinds:
        counts = Counter(gpu_types.key_of(name, memory_bytes) for name, memory_bytes in gpus)
        for gpu_type, count in counts.items():
            sizes[gpu_type] = min(count, sizes.get(gpu_type, count))
    return sizes
