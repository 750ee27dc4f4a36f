"""What others were stopped for is kept for a job that fails at its start, until it is tried again.

Problem: room for a gang costs everybody who had it a restart. One that then fails at its start (a
port that is taken, a disk that is full) is tried again after a few seconds, and in these those who
left for it are back on its GPUs: all was for nothing, and they may not be stopped again before they
have run for their minimum.

How: if within `CLAIM_MS_MAX` after others were stopped for a job a try of it ends badly, what it
had is promised to it for its wait, as after a move (`moves.py`), and no longer; of a gang from the
moment on when its first rank has ended. When it is tried again it may go elsewhere, where its last
node is the one to avoid. A job that cannot start at all must not keep GPUs idle for ever: the time
counts from the first stop, and not anew before the job has committed something.
"""

from coordinator.core import gpu_types
from coordinator.core.model import Job
from coordinator.core.phases import JOB_ENDED
from coordinator.core.standing import Promise
from coordinator.core.state import Instant, State

# As long as a promise lasts at most: what is kept for a job does nothing meanwhile.
CLAIM_MS_MAX = 600_000
# From the end of its wait to its start: a tick, and a batch.
SLACK_MS = 10_000
# Ranks of a broken gang are killed; until they are heard to have ended it may take a lease.
KILLED_MS_MAX = 30_000


def note(state: State, now: Instant, job_id: int) -> None:
    """Somebody is stopped for it, the first time since it has saved anything."""
    made_room = (now.now_ms, state.jobs[job_id].epoch)
    state.standing.made_room_ms.setdefault(job_id, made_room)


def forget(state: State) -> None:
    """Those that have come further since, or are over."""
    known = state.standing.made_room_ms
    state.standing.made_room_ms = {
        job_id: (at_ms, epoch)
        for job_id, (at_ms, epoch) in known.items()
        if (job := state.jobs.get(job_id)) is not None and not _is_through(state, job, epoch)
    }


def _is_through(state: State, job: Job, epoch: int) -> bool:
    if job.phase in JOB_ENDED:
        return True
    return job.epoch > epoch and any(rank.commits for rank in state.gang(job))


def keep(state: State, now: Instant, job: Job, wait_ms: int) -> bool:
    """A try has ended badly, and the next one comes after a wait: whether what it had is kept."""
    made_room = state.standing.made_room_ms.get(job.id)
    if made_room is None:
        return False
    until_ms = min(now.now_ms + wait_ms + SLACK_MS, made_room[0] + CLAIM_MS_MAX)
    types: dict[str, None] = {}
    nodes: dict[str, None] = {}
    for rank in state.gang(job):
        live = state.nodes.get(rank.node)
        nodes[rank.node] = None
        for uuid in rank.gpu_uuids:
            gpu = None if live is None else live.gpus.get(uuid)
            if gpu is None:  # its node has come back without it, or not at all
                return False
            types[gpu_types.key_of(gpu.facts.name, gpu.facts.memory_bytes)] = None
    if len(types) != 1 or until_ms < now.now_ms + wait_ms:
        return False
    (gpu_type,) = types
    promise = Promise(gpu_type, until_ms, now.now_ms, tuple(nodes), claim=True)
    state.standing.promises[job.id] = promise
    return True


def waits_out(state: State, now: Instant, job: Job) -> bool:
    """Whether it is to be tried again later, and what it had is kept until then."""
    return job.id in state.standing.promises and state.eligible_ms.get(job.id, 0) > now.now_ms
