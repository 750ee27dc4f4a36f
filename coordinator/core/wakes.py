"""Nodes that are started, or stay, since somebody who waits cannot do without them.

Problem: a plan counts GPUs by type. A job that goes on from a checkpoint needs the node where it
lies; one that wants eight GPUs on one node has no use for eight nodes of one, and a node of two
types is counted as the first of them. Such a job would wait for ever beside a node that is off.

Both hold in any mode: they are no matter of demand. Only whom we have switched off, or are
emptying, is touched, and nothing is rented for this. Who may wait is looked at in his time
(`patience.py`).
"""

from collections.abc import Sequence
from itertools import islice

from coordinator.core import checkpoints, patience, power
from coordinator.core.capacity_model import Power, Source
from coordinator.core.demand import ask_of
from coordinator.core.fragmentation import Ask
from coordinator.core.live import LiveNode
from coordinator.core.model import JobSpec
from coordinator.core.phases import NodeIntent, NodePhase
from coordinator.core.sentences import quantity
from coordinator.core.state import Instant, State
from coordinator.core.validate import could_hold

# Different requests that are looked at for whom they fit, in one plan.
ASKS_MAX = 50


def tick(state: State, now: Instant) -> None:
    if state.options.power.acts and state.indices.switched:
        patients = patience.patients(state, now)
        urgent = [job_id for job_id in state.queued if job_id not in patients]
        _for_checkpoints(state, now, [*urgent, *_trials(state)])
        _for_room(state, now, urgent)


def _trials(state: State) -> list[int]:
    """Of each array as many as have a place and lack their checkpoint alone: they are not among
    those who wait (`trials.py`), and whatever is not started for them is not started at all."""
    found: list[int] = []
    arrays = state.indices.arrays
    for array in (arrays.by_id[array_id] for array_id in arrays.wanting):
        able = (job_id for job_id in array.behind if _may_come_back(state, job_id))
        found.extend(islice(able, array.free))
    return found


def _may_come_back(state: State, job_id: int) -> bool:
    """Whether its checkpoint is out of reach, and on a node that comes, or could be started."""
    return any(
        live.node.power.phase is Power.STARTING or _could_start(live)
        for holders in _out_of_reach(state, job_id)
        for live in holders
    )


def _for_checkpoints(state: State, now: Instant, urgent: Sequence[int]) -> None:
    for job_id in urgent:
        for holders in _out_of_reach(state, job_id):
            if any(live.node.power.phase is Power.STARTING for live in holders):
                continue
            for live in filter(_could_start, holders):
                why = f"the last checkpoint of job {job_id} lies on no node that is on"
                power.start(state, now, live, why)
                break


def _out_of_reach(state: State, job_id: int) -> list[list[LiveNode]]:
    """Who holds what of its last checkpoint, of each piece that nobody has who is there."""
    job = state.jobs[job_id]
    if not checkpoints.head_within_reach(state, job):
        return []
    return [
        [state.nodes[name] for name in piece.replicas if name in state.nodes]
        for piece in state.good_checkpoints(job)[0].pieces
        if not state.piece_reachable(piece)
    ]


def _could_start(live: LiveNode) -> bool:
    its = live.node.power
    return its.phase is Power.OFF and its.ours and its.source is not Source.BURST


def _for_room(state: State, now: Instant, urgent: Sequence[int]) -> None:
    """Who fits no node that takes work, not even an empty one, gets one back that he fits."""
    specs: dict[Ask, JobSpec] = {}
    for job_id in urgent:
        spec = state.jobs[job_id].spec
        if spec.gpus:
            specs.setdefault(ask_of(spec), spec)
    for spec in islice(specs.values(), ASKS_MAX):
        if not any(_is_there(live) and _could_hold(live, spec) for live in state.nodes.values()):
            _one_back(state, now, spec)


def _one_back(state: State, now: Instant, spec: JobSpec) -> None:
    gpus = quantity(spec.gpus, "such GPU")
    why = f"no node that takes work could hold {gpus}, which somebody waits for"
    for node_id in list(state.indices.switched):
        live = state.nodes[node_id]
        its = live.node.power
        if not its.ours or its.source is Source.BURST or not _could_hold(live, spec):
            continue
        if its.phase is Power.LEAVING and live.phase is NodePhase.UP:
            power.stay(state, now, live, why)
            return
        if its.phase is Power.OFF:
            power.start(state, now, live, why)
            return


def _is_there(live: LiveNode) -> bool:
    """It takes work, or will once it has come up."""
    node = live.node
    if node.power.phase is Power.STARTING:
        return node.power.ours
    open_ = node.intent is NodeIntent.OPEN and node.power.phase is Power.ON
    return open_ and live.phase is NodePhase.UP


def _could_hold(live: LiveNode, spec: JobSpec) -> bool:
    return could_hold(spec, live.node.gpus, live.node.host.memory_bytes)
