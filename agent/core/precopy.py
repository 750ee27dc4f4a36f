"""Whether an attempt that has to leave saves once before it is asked to leave.

Problem: from the stop request to the next attempt's first step nobody trains, and most of that time
goes into sending a large checkpoint to a node that has nothing of it. With a frozen backbone nearly
all of it never changes. So, as in the live migration of virtual machines (Clark et al., NSDI 2005),
it is sent while the work goes on: the trainer is asked for a checkpoint, that one is stored and
copied, and only then does the stop begin. What is sent after the stop is the last difference.

It is no gain where the other node has the last checkpoint already, since then the difference is all
that follows anyway; where every part of the state changes with every step; or where it is over
sooner than one more capture. Then, and where the trainer does not look for such a request, the stop
begins at once. `decide` says which it is, from numbers that the node has.

Of several ranks no agent may decide alone, since the stop of one is the stop of all. There the
coordinator does, by what each agent says with its heartbeats that it would gain (`held`); whether
the other node has the last checkpoint it knows itself. Then all hold the stop back until it tells
them to go on, once a checkpoint of all has arrived, or until the limit. Rank 0 alone is asked to
save: it tells the others, so that all take the same step for it.

The pre-copy itself is not journalled, the stop is: an agent that comes back in the middle of one
goes on with the stop. So do the bound of the order, a second order without a pre-copy, and a copy
that fails.
"""

from dataclasses import dataclass

from agent.core import copies
from agent.core.attempt import LiveAttempt, Phase
from agent.core.messages import (
    Event,
    ReplicationDone,
    ReplicationFailed,
    StoreDone,
    StoreFailed,
)
from agent.core.state import Instant, State
from agent.core.values import HeldAttempt

# What one more capture costs those who wait for the GPUs, since it is hashed, stored and proposed
# first: 0.1 to 0.2 s for 200 MB (`bench/precopy.py`). A pre-copy has to save clearly more.
GAIN_MS_MIN = 500
# Until a copy of this attempt's was timed: 1 Gbit/s, the slowest network that such boxes have.
LINK_BYTES_PER_MS = 100_000
# A checkpoint through a directory stops the training while it is written: a plain SSD's rate.
DISK_BYTES_PER_MS = 500_000

MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Known:
    """What a node knows of an attempt that it is told to stop. `size_bytes` is of its whole state,
    0 where nobody has said; `change_bytes` what of it differed between the last two checkpoints, 0
    where there was one at most. `copied`: `target` has the last one. `captures`: the training does
    not stop for a checkpoint."""

    heeds: bool
    captures: bool
    target: str
    size_bytes: int
    change_bytes: int
    copied: bool
    bytes_per_ms: int


@dataclass(frozen=True, slots=True)
class Decision:
    first: bool
    why: str


def decide(known: Known) -> Decision:
    """Save first, or stop at once, and the sentence that says why."""
    if not known.heeds:
        return Decision(False, "its trainer does not look for a request to save")
    if not known.target:
        return Decision(False, "its checkpoints go to no other node")
    if known.copied:
        return Decision(False, f"{known.target} has its last checkpoint: only the change follows")
    if not known.size_bytes:
        return Decision(False, "nothing is known of the size of its state")
    gain_ms = _gain_ms(known)
    spared = f"{_spared_bytes(known) // MEGABYTE} MB of {known.size_bytes // MEGABYTE} MB"
    what = f"{spared} can go to {known.target} before the stop"
    if gain_ms < GAIN_MS_MIN:
        return Decision(False, f"{what}, which would save {gain_ms} ms: too little")
    return Decision(True, f"{what}, about {gain_ms} ms")


def _spared_bytes(known: Known) -> int:
    return max(0, known.size_bytes - known.change_bytes)


def _gain_ms(known: Known) -> int:
    """How much sooner the last checkpoint is there, if the target has nothing of it."""
    gain_ms = _spared_bytes(known) // max(1, known.bytes_per_ms)
    if not known.captures:
        gain_ms -= known.size_bytes // DISK_BYTES_PER_MS
    return max(0, gain_ms)


def held(state: State, asked: tuple[str, ...] = ()) -> tuple[HeldAttempt, ...]:
    """What this node answers for, for hello and heartbeat; of those `asked` for all of it."""
    return tuple(
        HeldAttempt(
            live.record.id,
            live.record.gpu_uuids,
            live.live,
            live.stuck if live.live else (),
            _gain_of_rank_ms(state, live),
            # Of a shared directory no other node would help.
            0 if state.options.shared_directory else live.copies_failed,
            *((live.record.spec.whole, live.record.committed) if live.record.id in asked else ()),
        )
        for live in state.attempts.values()
    )


def _gain_of_rank_ms(state: State, live: LiveAttempt) -> int | None:
    if live.record.gang is None:
        return None
    known = _known(state, live)
    heeded = known.heeds or live.record.gang.rank > 0
    return _gain_ms(known) if heeded and known.target else 0


def begin(state: State, now: Instant, live: LiveAttempt, limit_ms: int | None) -> None:
    """Ask for a checkpoint, if that is a gain; the stop waits for it, at most `limit_ms`. `None`:
    the order asks for none. Of several ranks it has been decided already."""
    live.precopy_until_ms = None
    if limit_ms is None or live.record.phase is not Phase.RUNNING:
        return
    together = Decision(True, "all ranks do, and stop together")
    decision = decide(_known(state, live)) if live.record.gang is None else together
    if decision.first:
        live.precopy_until_ms = now.now_ms + limit_ms
        ask(state, live)
    event = "attempt.precopy" if decision.first else "attempt.no_precopy"
    state.log("info", event, attempt=live.record.id, reason=decision.why)


def ask(state: State, live: LiveAttempt) -> None:
    """Also once more, of a trainer that connects late. Asked twice is one checkpoint more. Rank 0
    asks the others."""
    if live.record.gang is None or live.record.gang.rank == 0:
        state.tell(live.record.id, type="save", reason=live.record.stop_reason)


def is_over(state: State, live: LiveAttempt, event: Event) -> bool:
    """Whether this was what the stop waits for: what has not changed has arrived, or it never
    will."""
    if live.precopy_until_ms is None or live.record.gang is not None:
        return False
    target = copies.target_of(state, live)
    match event:
        case ReplicationDone():
            return target is None or target.node == event.node
        case ReplicationFailed():
            return live.replicating is None  # else it goes to another node now
        case StoreDone():
            return target is None
        case StoreFailed():
            return True
    return False


def _known(state: State, live: LiveAttempt) -> Known:
    target = copies.target_of(state, live)
    hung = bool(live.record.exit_reason)
    where = "" if target is None else target.node
    has_it = live.copied_to == where or (not live.stored_bytes and where in _sources(live))
    return Known(
        heeds=live.heeds_saves and not hung,
        captures=live.slab,
        target=where,
        size_bytes=live.stored_bytes or live.slab_bytes,
        change_bytes=live.change_bytes,
        copied=bool(where) and has_it,
        bytes_per_ms=live.copy_bytes_per_ms or LINK_BYTES_PER_MS,
    )


def _sources(live: LiveAttempt) -> list[str]:
    """Who else has the checkpoint that it was restored from."""
    restored = [one for one in live.record.candidates if one.digest == live.record.restored_digest]
    return [source.node for candidate in restored for source in candidate.sources]
