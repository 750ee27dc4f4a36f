"""A node that is not coming back leaves the lists, because a person says so.

Problem: a lost node may come back in a minute or never, and nobody can tell which. One that joined
by mistake, or was sold, is lost for ever: it stands in `baton nodes`, keeps the alert about lost
nodes alive, and jobs that only it could run wait for it. Only a person knows, and he may be wrong.

How: what is forgotten is nothing that a return could not say again. So it must be lost, nothing may
be running there as far as anybody knows, and it must not be the last to have a checkpoint, unless
that is given up in the same breath. If it says hello after all, it joins as a new node does. What
ran there is still on the bill, and is evidence of speed, by the facts about its GPUs: as long as an
attempt that ran there is kept, its record stays, marked (`Node.forgotten`), in no list.
"""

from collections.abc import Sequence

from coordinator.core import checkpoints, parts
from coordinator.core.capacity_model import Power, Source
from coordinator.core.gangs import RUNNING_JOB
from coordinator.core.model import Attempt
from coordinator.core.phases import ATTEMPT_ENDED, NodePhase
from coordinator.core.sentences import listed, quantity
from coordinator.core.state import LiveNode, State

# Of forgotten nodes that somebody ran on, or that were switched; of those before them neither the
# GPUs' type nor which orders were given (their keys count on) is known any more. Some 2 kB each.
FORGOTTEN_MAX = 1_000
JOBS_SHOWN_MAX = 5
RETURNED = "once its provider has taken it back it leaves the list by itself"


def forget(state: State, live: LiveNode, *, lose_checkpoints: bool) -> str:
    """Why that cannot be, with what to do; empty where it is done."""
    name = live.node.id
    alone = _has_alone(state, live)
    why = _why_not(state, live)
    if not why and alone and not lose_checkpoints:
        why = (
            f"{name} alone has checkpoints of {_jobs(alone)}: start its agent once more, and they"
            f" are copied or can be exported; or `baton forget --lose-checkpoints {name}`"
        )
    if why:
        return why
    jobs = state.indices.jobs_of(live.digests)
    checkpoints.reconcile_copies(state, name, {}, jobs)
    parts.reconcile(state, name, {}, jobs)
    _take_out(state, live)
    checkpoints.retarget(state)
    lost = f", and with it what it alone has of {_jobs(alone)}" if alone else ""
    state.log("info", "node.forgotten", node=name, reason=f"by its operator{lost}")
    return ""


def _take_out(state: State, live: LiveNode) -> None:
    name = live.node.id
    state.switching.forget(name)
    for gpu in live.node.gpus:
        state.held_back.pop(gpu.uuid, None)
    for rank, kept in list(state.reservations.items()):
        if any(place.node == name for place in kept.places):
            del state.reservations[rank]
    ran = any(attempt.node == name for attempt in state.attempts.values())
    state.take_out_node(name, keep=ran or live.node.power.changes > 0)
    for oldest in list(state.forgotten)[:-FORGOTTEN_MAX]:
        del state.forgotten[oldest]
        state.changed_nodes[oldest] = None


def _why_not(state: State, live: LiveNode) -> str:
    name, its = live.node.id, live.node.power
    if live.session is not None or name in state.admission.line:
        end = f"`systemctl disable --now baton-agent` on {name}"
        return f"{name} is connected, and would join again at once; end its agent first: {end}"
    if live.phase is not NodePhase.LOST:
        return f"{name} is {live.phase.value} and may come back; ask again when it is lost"
    if its.phase not in (Power.ON, Power.OFF, Power.FAILED):
        return f"{name} is {its.phase.value}: what was ordered has to end first"
    if its.source is Source.BURST:
        return f"{name} is rented and may still cost money; {RETURNED}"
    there = [attempt for attempt in state.attempts.values() if attempt.node == name]
    holds = [attempt for attempt in there if _counts(state, attempt)]
    if not holds:
        return ""
    jobs = list(dict.fromkeys(attempt.job_id for attempt in holds))
    return (
        f"{name} may still run {quantity(len(holds), 'attempt')}, of {_jobs(jobs)}: wait until they"
        " go on elsewhere, or `baton cancel` them"
    )


def _counts(state: State, attempt: Attempt) -> bool:
    """It has not ended, or its gang has not, which also waits while all who are left of it are out
    of reach."""
    job = state.jobs[attempt.job_id]
    present = attempt.epoch == job.epoch
    gang = state.gang(job) if present else [attempt]
    running = present and job.phase in RUNNING_JOB
    return running or any(rank.phase not in ATTEMPT_ENDED for rank in gang)


def _has_alone(state: State, live: LiveNode) -> list[int]:
    """The jobs of which a checkpoint that is any good lies there, and nowhere else that is
    known."""
    name = live.node.id
    return [
        job_id
        for job_id in state.indices.jobs_of(live.digests)
        if any(
            piece.replicas == (name,)
            for checkpoint in state.checkpoints.get(job_id, ())
            for piece in checkpoint.pieces
            if not checkpoint.bad
        )
    ]


def _jobs(job_ids: Sequence[int]) -> str:
    """Some of them by number."""
    shown = [str(job_id) for job_id in job_ids[:JOBS_SHOWN_MAX]]
    more = len(job_ids) - len(shown)
    words = listed([*shown, *([f"{more} more"] if more else [])])
    return f"{'job' if len(job_ids) == 1 else 'jobs'} {words}"
