"""Once a day: what is worth leasing, asked for and told.

Problem: whoever decides on leases looks at the numbers once a day or forgets to, and the numbers
take up to a second over the attempts of two months, which the loop that everybody waits for has
not. So with the first sample of demand of a day, by UTC, the core hands what bills are made of to
somebody beside the loop (`MakeLeases`, a command; a copy of a few dictionaries, whose values never
change), and what is found comes back as an event like any other (`LeasesMade`).

A day is asked for when none of its number was made: that is durable, in the same commit as what is
told of it, so neither a restart nor a clock that jumps back and forth makes one twice. A crash
before that commit has it made again, one after it and before the file is written leaves yesterday's
file. While wall time is doubted there is no sample (`demand_samples.py`), and no day begins.

Where nothing can be recommended the log says why, once for each type and reason while this
coordinator runs, and nothing is published.
"""

from coordinator.core import past_demand
from coordinator.core.bills import MS_PER_DAY
from coordinator.core.lease_messages import (
    KeptBooks,
    KeptNode,
    LeasesMade,
    MakeLeases,
    PublishLeases,
    PutLeaseDay,
    with_day,
)
from coordinator.core.state import Instant, State


def tick(state: State, now: Instant) -> None:
    """Call it where a sample of demand was taken. Before anything has run there is nothing to
    say."""
    days, day = state.lease_days, now.unix_ms // MS_PER_DAY
    if day in days.made or day == days.asked or not state.attempts:
        return
    days.asked = day
    state.commands.append(MakeLeases(day, now.unix_ms, _kept(state, now.unix_ms)))


def made(state: State, event: LeasesMade) -> None:
    days = state.lease_days
    if event.day in days.made:
        return
    days.made = with_day(days.made, event.day)
    state.records.append(PutLeaseDay(event.day))
    for none in event.unadvised:
        if (none.gpu_type, none.why) not in days.said:
            days.said[none.gpu_type, none.why] = None
            state.log("info", "leases.none", reason=none.sentence)
    for each in event.found:
        state.log(
            "info",
            "leases.recommended",
            gpu_type=each.gpu_type,
            lease_gpus=each.lease_gpus,
            level_gpus=each.level_gpus,
            reason=each.sentence,
        )
    if event.found:
        state.commands.append(PublishLeases(event.found))


def _kept(state: State, unix_ms: int) -> KeptBooks:
    return KeptBooks(
        state.options,
        dict(state.jobs),
        dict(state.attempts),
        {job_id: tuple(attempts) for job_id, attempts in state.job_attempts.items()},
        {name: KeptNode(live.node) for name, live in state.nodes.items()},
        dict(state.forgotten),
        past_demand.read(state, unix_ms),
    )
