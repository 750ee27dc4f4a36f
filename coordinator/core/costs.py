"""What a stop costs a job: measured by its own attempts, before anybody is asked to give way.

Problem: the same stop costs one job a second and another one an hour. Who saves in a moment and has
just done so loses nothing; who saves once an hour, or never, loses everything since. So a restart
is what this job's restarts have taken: to come up again from a checkpoint and to be where it was,
to save, and the steps since the last checkpoint, which it may not get to save. Before it has come
up from a checkpoint once, `RESTART_S_DEFAULT` stands for the first, in the plan's own time where a
minute of that is shorter (`plan_time.py`).

Wall time is right here, as in `accounting.py`: all of it is written down with the attempts, and a
changed clock makes a stop look dearer or cheaper, no more.
"""

from collections.abc import Callable, Iterable

from coordinator.core import accounting, plan_time
from coordinator.core.model import Attempt, Job, Progress
from coordinator.core.phases import ATTEMPT_ENDED
from coordinator.core.rooms import Tenant
from coordinator.core.state import Instant, State

# To fetch a checkpoint, to import what a trainer imports, and to be warm again: what public
# schedulers are charged for a restart in comparisons, and what the built-in trainers need cold.
RESTART_S_DEFAULT = 60.0
ATTEMPTS_MAX = 5  # that are looked at, the newest: what a job was like a week ago does not matter


def restart_s(state: State, now: Instant, job: Job) -> float:
    """Until it would be where it is now, if it were stopped now."""
    own = _own(state, job)
    back = [_back_s(state, now, attempt) for attempt in own if attempt.restored_digest]
    guess_s = plan_time.wall_ms(state.options, round(RESTART_S_DEFAULT * 1_000)) / 1_000
    back_s = sum(back) / len(back) if back else guess_s
    return back_s + _save_s(state, own) + at_risk_s(state, now, job)


def save_s(state: State, job: Job) -> float:
    """How long it has taken to save, on the average of the attempt where that was longest."""
    return _save_s(state, _own(state, job))


def _save_s(state: State, own: Iterable[Attempt]) -> float:
    told = [(attempt.commits, _progress(state, attempt)) for attempt in own]
    return max(
        (
            progress.time.capture_s / commits
            for commits, progress in told
            if commits and progress is not None and progress.time is not None
        ),
        default=0.0,
    )


def at_risk_s(state: State, now: Instant, job: Job) -> float:
    """For how long it has run since what it committed last; 0 where it does not run."""
    attempt = state.current(job)
    if attempt is None or attempt.phase in ATTEMPT_ENDED or attempt.started_unix_ms is None:
        return 0.0
    since_unix_ms = attempt.started_unix_ms
    kept = state.good_checkpoints(job)
    if kept and kept[0].epoch == attempt.epoch:
        since_unix_ms = max(since_unix_ms, kept[0].committed_unix_ms)
    return max(0, now.unix_ms - since_unix_ms) / 1000


def stake(state: State, now: Instant, job: Job) -> float:
    """What is lost by a stop, in seconds of a GPU."""
    return max(1, job.spec.ranks * job.spec.gpus) * restart_s(state, now, job)


def stakes(state: State, now: Instant) -> Callable[[Tenant], float]:
    """What those who may have to give way lose by it; of each job it is looked at once."""
    known: dict[int, float] = {}

    def stake_of(tenant: Tenant) -> float:
        job = state.jobs[state.attempts[tenant.attempt].job_id]
        if job.id not in known:
            known[job.id] = stake(state, now, job)
        return known[job.id]

    return stake_of


def attained_gpu_s(attempts: Iterable[Attempt], now: Instant) -> float:
    """What a job has had of GPUs, as far back as its attempts are known."""
    total_ms = 0
    for attempt in attempts:
        if attempt.started_unix_ms is not None:
            end_ms = accounting.end_unix_ms(attempt, now.unix_ms)
            total_ms += max(0, end_ms - attempt.started_unix_ms) * len(attempt.gpu_uuids)
    return total_ms / 1000


def _back_s(state: State, now: Instant, attempt: Attempt) -> float:
    spent = accounting.account(attempt, state.progress.get(attempt.id), now.unix_ms)
    return spent.restore_s + spent.start_s + spent.recompute_s


def _own(state: State, job: Job) -> list[Attempt]:
    """Rank 0 speaks for its gang."""
    return [one for one in state.attempts_of(job.id) if one.rank == 0][-ATTEMPTS_MAX:]


def _progress(state: State, attempt: Attempt) -> Progress | None:
    """What its trainer last said, or what is written down of that."""
    said = state.progress.get(attempt.id)
    if said is not None or attempt.times.step is None:
        return said
    times = attempt.times
    return Progress(attempt.times.step, times.total_steps, time=times.trainer)
