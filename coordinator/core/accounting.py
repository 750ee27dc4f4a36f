"""Where the time of a job went: every second of every attempt has a name.

Problem: "it ran for a day" says nothing of how much of the day was training. Three clocks know a
part each: the coordinator knows when it assigned an attempt and when it noticed its end, the agent
how long it fetched and started, the trainer what it did in between. Added up as they come, the
parts of three clocks make more or less than the time that has passed, and nobody believes such a
table.

So the coordinator's own wall clock gives the frame, and the others divide it. An attempt's frame
begins when its job came back to the queue and ends when the attempt was known to be over; frames of
one job do not overlap. The frame is cut in this order, each part at most as long as what is left:

1. *schedule*: in the queue, until the attempt was assigned.
2. *detect*: at the end, from the last sign of life to the knowledge that it is over.
3. *restore*, *start*: what the agent measured, what the trainer needed to load its checkpoint, and
   the time until the trainer was ready.
4. What the trainer says that it did: *input wait*, *capture*, and steps. Steps that an attempt
   before it had done already are *recompute*, at the mean time of this attempt's steps; the others,
   and evaluations, are *productive*. Where that is more than is left it takes from the loading, and
   then all of it is divided by the same number, which is shown.
5. *idle*: the rest.

A program that says milestones or progress is starting until it says that it is ready. One that does
not say its times gets all that is left after its start as steps, and the account says that this was
not measured. If it has failed, and neither said a step nor committed anything, nothing is known to
have come of that: it is idle.

The ranks of a gang spend the same time together, so a try counts once in a job's sum: as rank 0
tells it (`jobs.accounted`). Each rank's own account is shown beside it.

Wall time is right here although clocks get set: nothing is decided by these numbers, and they have
to outlive the coordinator, which no monotonic clock does. What a changed clock makes negative is 0.
What the trainer said is written down with each commit and at the end, so a restart of the
coordinator costs no more than what a lost node has said since its last commit.

The idea of goodput as productive time over wall time, with lost work counted where it is done
again: Google, "Introducing ML Productivity Goodput" (2024).
"""

from collections.abc import Iterable
from dataclasses import fields, replace

from coordinator.core.model import Accounting, Attempt, AttemptTimes, Job, Progress, TrainerTime
from coordinator.core.phases import AttemptPhase, JobPhase

PARTS = (
    "productive_s",
    "input_wait_s",
    "capture_s",
    "recompute_s",
    "detect_s",
    "schedule_s",
    "start_s",
    "restore_s",
    "idle_s",
)
# The milestone with which a trainer says that it has loaded everything and begins to train.
READY_MILESTONE = "load"


# --- what is written down on the way --------------------------------------------------------------


def ready(times: AttemptTimes, name: str, since_start_ms: int) -> AttemptTimes:
    """A milestone: `since_start_ms` after the program began, by its node's clock."""
    ready_ms = max(0, since_start_ms) if name == READY_MILESTONE else times.ready_ms
    return replace(times, ready_ms=ready_ms, speaks=True)


def first_word(attempt: Attempt, progress: Progress, unix_ms: int) -> AttemptTimes:
    """A trainer without milestones has become ready before the time that its first word tells."""
    times = attempt.times
    told_s = 0.0
    if progress.time is not None:
        told_s = _told_s(progress.time) - progress.time.restore_s
    before_ms = (times.restore_ms or 0) + (times.start_ms or 0)
    ready_ms = unix_ms - attempt.assigned_unix_ms - before_ms - round(told_s * 1000)
    return replace(times, ready_ms=max(0, ready_ms), speaks=True)


def noted(times: AttemptTimes, progress: Progress | None) -> AttemptTimes:
    """With what the trainer last said, for the record."""
    if progress is None:
        return times
    return replace(
        times, step=progress.step, trainer=progress.time, total_steps=progress.total_steps
    )


def following(job: Job, before: Attempt | None, progress: Progress | None) -> AttemptTimes:
    """What a new attempt begins with: since when its job waits, and how far it has come."""
    if before is None:
        return AttemptTimes(queued_unix_ms=job.queued_unix_ms)
    times = noted(before.times, progress)
    reached_step = max(times.reached_step, before.restored_step, times.step or 0)
    return AttemptTimes(
        queued_unix_ms=job.queued_unix_ms, speaks=times.speaks, reached_step=reached_step
    )


# --- the account ----------------------------------------------------------------------------------


def account(attempt: Attempt, progress: Progress | None, unix_ms: int) -> Accounting:
    """Where an attempt's time went until now, or until it was over. `progress` is what its trainer
    last said, where that is newer than what the record holds."""
    times = noted(attempt.times, progress)
    assigned = attempt.assigned_unix_ms
    begun = min(assigned, assigned if times.queued_unix_ms is None else times.queued_unix_ms)
    end = max(assigned, end_unix_ms(attempt, unix_ms))
    wall_s = (end - begun) / 1000
    schedule_s = (assigned - begun) / 1000
    left_s = (end - assigned) / 1000
    silent_ms = 0 if times.silent_unix_ms is None else max(0, end - times.silent_unix_ms)
    detect_s = min(silent_ms / 1000, left_s)
    left_s -= detect_s
    frame = Accounting(wall_s=wall_s, schedule_s=schedule_s, detect_s=detect_s)
    if attempt.started_unix_ms is None:
        return replace(frame, start_s=left_s)
    told = times.trainer or TrainerTime()
    restore_s = min((times.restore_ms or 0) / 1000, left_s)
    start_s = min((times.start_ms or 0) / 1000, left_s - restore_s)
    left_s -= restore_s + start_s
    loading_s = max(0.0, (times.ready_ms or 0) / 1000 - told.restore_s)
    loading_s = min(loading_s, max(0.0, left_s - _told_s(told)))
    left_s -= loading_s
    if times.speaks and times.ready_ms is None and times.trainer is None:
        return replace(frame, restore_s=restore_s, start_s=start_s + left_s)
    measured = times.trainer is not None
    if not measured and _came_to_nothing(attempt, times):
        return replace(frame, restore_s=restore_s, start_s=start_s + loading_s, idle_s=left_s)
    if not measured:
        told = TrainerTime(step_s=left_s)
    overstated_ratio = max(1.0, _told_s(told) / left_s) if left_s > 0 else 1.0
    share = 1 / overstated_ratio if left_s > 0 else 0.0
    recompute_s = told.step_s * share * _repeated_ratio(attempt, times)
    return replace(
        frame,
        productive_s=(told.step_s + told.evaluate_s) * share - recompute_s,
        input_wait_s=told.input_wait_s * share,
        capture_s=told.capture_s * share,
        recompute_s=recompute_s,
        start_s=start_s + loading_s,
        restore_s=restore_s + told.restore_s * share,
        idle_s=max(0.0, left_s - _told_s(told) * share),
        overstated_ratio=overstated_ratio,
        measured=measured,
    )


def total(accounts: Iterable[Accounting]) -> Accounting:
    """Their sum; measured if all of them are, and overstated as much as the worst of them."""
    accounts = tuple(accounts)
    sums = {name: sum(getattr(one, name) for one in accounts) for name in ("wall_s", *PARTS)}
    worst = max((one.overstated_ratio for one in accounts), default=1.0)
    measured = all(one.measured for one in accounts)
    return Accounting(**sums, overstated_ratio=worst, measured=measured)


def waiting(job: Job, unix_ms: int) -> Accounting:
    """What a job has waited since its last attempt, for one that has not come yet."""
    if job.phase is not JobPhase.QUEUED or job.queued_unix_ms is None:
        return Accounting()
    waited_s = max(0, unix_ms - job.queued_unix_ms) / 1000
    return Accounting(wall_s=waited_s, schedule_s=waited_s)


def end_unix_ms(attempt: Attempt, unix_ms: int) -> int:
    """When it was known to be over, or `unix_ms` for one that is not."""
    for known in (attempt.times.over_unix_ms, attempt.ended_unix_ms):
        if known is not None:
            return known
    return unix_ms


def _came_to_nothing(attempt: Attempt, times: AttemptTimes) -> bool:
    made_steps = (times.step or 0) > attempt.restored_step
    return attempt.phase is AttemptPhase.FAILED and not attempt.commits and not made_steps


def _told_s(time: TrainerTime) -> float:
    return sum(float(getattr(time, field.name)) for field in fields(time))


def _repeated_ratio(attempt: Attempt, times: AttemptTimes) -> float:
    """Which share of the attempt's steps somebody had done before."""
    done = (times.step or 0) - attempt.restored_step
    if done <= 0:
        return 0.0
    repeated = min(times.step or 0, times.reached_step) - attempt.restored_step
    return max(0, repeated) / done
