"""Jobs that may wait for a cheap hour (`--flexible 24h`), and what follows for them.

Problem: what makes a fleet dear is its peaks, and most of a peak does not have to run right then.
Whoever says so gives the fleet that time: until a job has waited for so long, no GPU idles for it
(`reservations.py`), no node is switched on for it (`patience.py`), and what it wants is no reason
to rent one by the hour, nor to lease one for a month (`deferral.py`). It still starts at once where
there is room: who may wait gets no less.

Wall time is right here, as the allowance outlives the coordinator; a clock that is set makes a job
urgent a little sooner or later.
"""

from coordinator.core import foresight
from coordinator.core.model import Job, JobClass, JobSpec


def left_ms(job: Job, unix_ms: int) -> int:
    """How much longer it may wait; 0 for one that is urgent."""
    since_ms = job.submitted_unix_ms if job.queued_unix_ms is None else job.queued_unix_ms
    return max(0, job.spec.flexible_ms - max(0, unix_ms - since_ms))


def is_counted_late(spec: JobSpec) -> bool:
    """Whether nodes are on for it in its time alone."""
    guaranteed = spec.job_class is JobClass.GUARANTEED
    return bool(spec.flexible_ms and spec.gpus) and not (guaranteed or spec.shared_gpu_memory_bytes)


def describe(job: Job, unix_ms: int) -> str:
    """For the sentence of one that waits; empty for one that is urgent."""
    left = left_ms(job, unix_ms)
    if not left:
        return ""
    does = "kept, rented or switched on" if is_counted_late(job.spec) else "kept or rented"
    more = f"{foresight.seconds(left / 1000)} more"
    if left < foresight.DAY_MS:
        more += f", until {foresight.clock(unix_ms + left)}"
    return f"; by its own wish it may wait for {more}, before GPUs are {does} for it"
