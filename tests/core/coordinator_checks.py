"""What must hold of a coordinator's state, told from its records alone.

Problem: a check that asks the core's own functions finds right whatever they do. These count again,
in the plainest way.
"""

from coordinator.core.model import CLASS_RANK, GpuFacts, Job
from coordinator.core.phases import (
    ATTEMPT_ENDED,
    ATTEMPT_LIVE,
    AttemptPhase,
    GpuPhase,
    NodeIntent,
    NodePhase,
)
from coordinator.core.state import LiveNode, State
from coordinator.core.validate import suits
from tests.core.coordinator_fleet import HOST

# Whoever is left of a gang after one of these hangs in a collective operation.
SPOILING = (AttemptPhase.FAILED, AttemptPhase.REFUSED, AttemptPhase.LOST)


def check_gang(state: State, job: Job) -> None:
    """It was started whole, and runs whole or is being ended. Parts wait for somebody."""
    gang = state.gang(job)
    assert len(gang) == (job.spec.ranks if job.epoch else 0), "started in part"
    left = [rank for rank in gang if rank.phase in ATTEMPT_LIVE]
    over = [rank for rank in gang if rank.phase in ATTEMPT_ENDED]
    digests = dict.fromkeys(r.restored_digest for r in gang if r.started_unix_ms)
    spoilt = [rank for rank in over if rank.phase in SPOILING] or len(digests) > 1
    for rank in left:
        stopped = rank.stop_reason and rank.phase is AttemptPhase.STOPPING
        assert stopped or not spoilt, f"{rank.id} hangs"
        assert stopped or not over or job.id in state.finish_ms, f"{rank.id} is left alone"
    here = state.parts.get(job.id, [])
    assert not here or left or any(r not in over for r in gang), "parts of nobody"
    assert all(part.epoch == job.epoch for part in here)


def takes_work(live: LiveNode) -> bool:
    return live.phase is NodePhase.UP and live.node.intent is NodeIntent.OPEN


def places_for(state: State, live: LiveNode, job: Job, disturbing: bool) -> int:
    """How many ranks of the job would fit if all that is stopping, and with `disturbing` all that
    is of a lower class, were gone?"""
    facts: list[GpuFacts] = [g.facts for g in live.gpus.values() if g.phase is GpuPhase.FREE]
    memory_bytes, slots = live.node.host.memory_bytes, HOST.cpu_count * 4
    for attempt_id in live.attempts:
        attempt = state.attempts[attempt_id]
        spec = state.jobs[attempt.job_id].spec
        lower = CLASS_RANK[spec.job_class] > CLASS_RANK[job.spec.job_class]
        if attempt.phase is AttemptPhase.STOPPING or (disturbing and lower):
            facts += [live.gpus[uuid].facts for uuid in attempt.gpu_uuids]
        else:
            memory_bytes -= spec.memory_bytes
            slots -= 0 if attempt.gpu_uuids else 1
    count = slots
    if job.spec.gpus:
        count = sum(1 for gpu in facts if suits(job.spec, gpu)) // job.spec.gpus
    if memory_bytes < job.spec.memory_bytes:
        return 0
    if job.spec.memory_bytes:
        count = min(count, memory_bytes // job.spec.memory_bytes)
    return max(0, count)
