"""How the commands show an array: one line for all of its trials.

Problem: a hundred trials that differ in one number push everybody else's jobs off the screen, and
nobody reads the hundred. `squeue` folds those that wait and lists those that run; here all of them
are one line, which says how many there are of each, and `--trials` lists them.
"""

from datetime import datetime
from typing import TYPE_CHECKING

from coordinator.cli import units
from coordinator.core.sentences import quantity

if TYPE_CHECKING:
    from coordinator.cli.values import ArrayChange, Job, Trial

INDICES_CHARACTERS_MAX = 16  # of a list of indices; Slurm cuts it as well


def name_of(job: "Job", trial: "Trial") -> str:
    """ "12_[0-99%8]"."""
    array = job.spec.array
    cut = array if len(array) <= INDICES_CHARACTERS_MAX else f"{array[:INDICES_CHARACTERS_MAX]}…"
    return f"{trial.array_job_id}_[{cut}]"


def standing(trial: "Trial") -> str:
    """ "8 run, 41 wait, 51 are over"."""
    words = [
        quantity(count, one, several)
        for count, one, several in (
            (trial.running, "runs", "run"),
            (trial.waiting, "waits", "wait"),
            (trial.held, "is held", "are held"),
            (trial.over, "is over", "are over"),
        )
        if count
    ]
    return ", ".join(words)


def row(job: "Job", trial: "Trial", now: datetime) -> tuple[object, ...]:
    """Under the columns of `baton jobs`."""
    phases = (("active", trial.running), ("queued", trial.waiting), ("held", trial.held))
    return (
        name_of(job, trial),
        job.spec.name,
        job.spec.job_class,
        next((phase for phase, count in phases if count), "over"),
        job.spec.gpus if job.spec.ranks == 1 else f"{job.spec.ranks}x{job.spec.gpus}",
        None,
        f"{trial.over}/{trial.trials}",
        units.format_span(job.submit_time, now),
        standing(trial),
    )


def once(jobs: "list[Job]") -> "list[Job]":
    """Without a second line of an array that has trials which are open and trials which are not."""
    shown: dict[int, None] = {}
    found = []
    for job in jobs:
        array_id = job.id if job.trial is None else job.trial.array_job_id
        if array_id not in shown:
            found.append(job)
        shown[array_id] = None
    return found


_DOING = {
    "cancel": "cancelling",
    "hold": "holding",
    "release": "releasing",
    "requeue": "requeueing",
}


def changed(verb: str, change: "ArrayChange") -> str:
    """For who asked it of all. Those that run save first, so nobody says yet that it is done."""
    count = "all" if change.jobs == change.trials else change.jobs
    whom = f"{count} of its {quantity(change.trials, 'trial')}"
    return f"array {change.array_job_id}: {_DOING.get(verb, verb)} {whom}{_left(change)}"


def _left(change: "ArrayChange") -> str:
    from coordinator.cli.values import ArrayRequeue

    if not isinstance(change, ArrayRequeue):
        return ""
    words = []
    if change.left_running:
        words.append(quantity(change.left_running, "runs", "run"))
    if change.left_succeeded:
        words.append(f"{quantity(change.left_succeeded, 'has', 'have')} succeeded")
    return f"; {' and '.join(words)}: see --all" if words else ""
