"""Jobs that may wait for a cheap hour (`--flexible 24h`), and what follows for them.

Problem: what makes a fleet dear is its peaks, and most of a peak does not have to run right then.
Whoever says so gives the fleet that time: until a job has waited for so long, no GPU idles for it
(`reservations.py`), and what it wants is no reason to rent one by the hour, nor to lease one for a
month (`deferral.py`). It still starts at once where there is room: who may wait gets no less.

Wall time is right here, as the allowance outlives the coordinator; a clock that is set makes a job
urgent a little sooner or later.
"""

from coordinator.core.model import Job

MS_PER_H = 3_600_000


def left_ms(job: Job, unix_ms: int) -> int:
    """How much longer it may wait; 0 for one that is urgent."""
    since_ms = job.submitted_unix_ms if job.queued_unix_ms is None else job.queued_unix_ms
    return max(0, job.spec.flexible_ms - max(0, unix_ms - since_ms))


def describe(job: Job, unix_ms: int) -> str:
    """For the sentence of one that waits; empty for one that is urgent."""
    left = left_ms(job, unix_ms)
    if not left:
        return ""
    return f"; it may wait for {left / MS_PER_H:.1f} h more before GPUs are kept or rented for it"
