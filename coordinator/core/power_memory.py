"""What is remembered of nodes' power beside its phase: when, how often, and what came to nothing.

Problem: bounds go by how long ago something was. Wall time is what outlives the coordinator, and it
jumps: a node that came up a minute ago has then been up for hours. So each wall time is asked once
how long ago it is, and from then on the monotonic clock goes on; only a restarted coordinator has
nothing better than the wall clock.

And an order that comes to nothing would be given again each minute, in the place of every other
node's: a node that stayed on is left alone for a while, longer each time. Not so one whose driver
was never asked, for others had all the places; that is counted by itself.

And whoever is told that a node is being switched off wants to know for how long that may last.

Of each node there is no more than its last starts, so it is all bounded by the nodes there are.
"""

from coordinator.core import plan_time
from coordinator.core.capacity_model import Power, Source
from coordinator.core.guard_rails import WINDOW_MS
from coordinator.core.node_power import REFUSED_MS, REFUSED_MS_MAX
from coordinator.core.phases import NodePhase
from coordinator.core.state import Instant, LiveNode, State


def note_change(state: State, now: Instant, live: LiveNode) -> None:
    """Its phase began this moment. Who went off has not refused."""
    if live.node.power.phase is Power.OFF:
        state.switching.refused.pop(live.node.id, None)
    if live.node.power.phase not in (Power.STOPPING, Power.STARTING):
        state.switching.postponed.pop(live.node.id, None)
    state.switching.at_ms.setdefault(live.node.id, {})[now.unix_ms] = now.now_ms
    starts_ms(state, now, live)


def note_refused(state: State, now: Instant, live: LiveNode) -> None:
    """It was ordered off, and stays on. One that is rented costs money meanwhile, so it never waits
    longer than the first time."""
    _, before_ms = state.switching.refused.get(live.node.id, (0, 0))
    most_ms = REFUSED_MS if live.node.power.source is Source.BURST else REFUSED_MS_MAX
    wait_ms = max(REFUSED_MS, min(most_ms, 2 * before_ms))
    state.switching.refused[live.node.id] = (now.now_ms, wait_ms)


def note_answer(state: State, live: LiveNode, *, postponed: bool) -> bool:
    """A driver has spoken; returns whether that is news: not so, if it has no turn once more."""
    before = state.switching.postponed.pop(live.node.id, 0)
    if postponed:
        state.switching.postponed[live.node.id] = before + 1
    return not (postponed and before)


def retry_ms(state: State, name: str) -> int:
    """After how long it is ordered again: twice as long each time that there was no turn."""
    put_off = state.switching.postponed.get(name, 0)
    return state.options.power.boot_retry_ms << max(0, put_off - 1)


def is_refused(state: State, now: Instant, live: LiveNode) -> bool:
    """Whether it was ordered off lately, and stayed on."""
    at_ms, wait_ms = state.switching.refused.get(live.node.id, (0, 0))
    return plan_time.plan_ms(state.options, now.now_ms - at_ms) < wait_ms


def stopping_ms_max(state: State, now: Instant, live: LiveNode) -> int | None:
    """For how long a node that is ordered off is neither off nor open, at most. `None`: of a rented
    one that is silent only its driver can tell, and may be asked again."""
    options, given = state.options, state.switching.given.get(live.node.id)
    if live.node.power.source is Source.BURST and live.phase is not NodePhase.UP:
        return None
    if given is None:
        return options.power.unanswered_ms + options.lease_ms
    # Whoever answers at the last moment may have done it, and has a lease to be seen.
    end_ms = given.at_ms + options.power.unanswered_ms
    if given.done is not None:
        late_ms = given.at_ms + options.power.stop_deadline_ms
        end_ms = max(late_ms, given.answered_ms) if given.done else given.answered_ms
    return max(0, end_ms + options.lease_ms - now.now_ms)


def starts_ms(state: State, now: Instant, live: LiveNode) -> tuple[tuple[int, ...], int]:
    """When it was switched on, and when its phase began, by the monotonic clock. Wall time is asked
    once for each: a clock that jumps later makes nothing older."""
    its = live.node.power
    known = state.switching.at_ms.get(live.node.id, {})
    if not its.starts_unix_ms and list(known) == [its.since_unix_ms]:
        return (), known[its.since_unix_ms]  # of most nodes, each minute
    found = {
        unix_ms: known.get(unix_ms, now.now_ms - max(0, now.unix_ms - unix_ms))
        for unix_ms in (*its.starts_unix_ms, its.since_unix_ms)
    }
    state.switching.at_ms[live.node.id] = found
    return tuple(found[unix_ms] for unix_ms in its.starts_unix_ms), found[its.since_unix_ms]


def lately(state: State, now: Instant) -> tuple[int, int]:
    """How many nodes went off and came on within the time that bounds count over, by their records:
    for a coordinator that has made no plan yet."""
    since_unix_ms = now.unix_ms - plan_time.wall_ms(state.options, WINDOW_MS)
    powers = [live.node.power for live in state.nodes.values()]
    went = (Power.STOPPING, Power.OFF)
    off = sum(its.phase in went and its.since_unix_ms > since_unix_ms for its in powers)
    on = sum(bool(its.starts_unix_ms) and its.starts_unix_ms[-1] > since_unix_ms for its in powers)
    return off, on
