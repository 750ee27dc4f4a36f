"""Which numbers a store gives next that was put back from a copy.

Problem: job ids, attempts' epochs and leaders' epochs that were given after the copy was made are
on nodes and in people's notes, and the copy does not have them. Given again, two trainings are one
to an agent, and a new leader is an old one. How many were given nobody can say; how many at most
can be, by how old the copy is. So each goes on above that, with a gap that is never filled.

A clock that says the copy is of the future leaves the smallest gap. The same copy put back again is
older by then, so that what was given between is skipped as well.
"""

from dataclasses import dataclass

# As many jobs as may be open, submitted at once; beside them ten a second, day and night.
JOB_IDS_MIN = 100_000
JOB_IDS_PER_S = 10
# Neither a job nor a coordinator starts again more often than once a second for long.
EPOCHS_MIN = 1_000
EPOCHS_PER_S = 1


@dataclass(frozen=True, slots=True)
class Numbering:
    """Of a job above `remembered_job_id` that is not known, nodes may know; without it (`None`: the
    store was never put back) all that are not known have been forgotten. Of jobs up to
    `given_job_id`, which no job has that is submitted from here on, epochs below `epoch_floor` may
    have been given and not be known."""

    remembered_job_id: int | None = None
    given_job_id: int = 0
    epoch_floor: int = 0

    def next_epoch(self, job_id: int, epoch: int) -> int:
        """After `epoch`, the job's highest that is known."""
        return max(epoch + 1, self.epoch_floor if job_id <= self.given_job_id else 0)

    def restarts(self, job_id: int, epoch: int) -> int:
        """How often the job was started before, as far as is known: the gap is no restart."""
        above = job_id <= self.given_job_id and epoch >= self.epoch_floor > 0
        return epoch - self.epoch_floor + 1 if above else epoch - 1

    def is_forgotten(self, job_id: int) -> bool:
        """Whether only a job of the time after the copy can have that id, if it is not known."""
        remembered = self.remembered_job_id
        return remembered is not None and remembered < job_id <= self.given_job_id

    def may_be_forgotten(self, job_id: int, epoch: int) -> bool:
        """Whether such an attempt may have done what is not known."""
        return job_id <= self.given_job_id and epoch < self.epoch_floor


@dataclass(frozen=True, slots=True)
class PutBack:
    """The numbers from here on, and by how much leaders' epochs grow beside the usual."""

    numbering: Numbering
    last_job_id: int
    leader_epochs: int


def put_back(before: Numbering, last_job_id: int, epoch_max: int, age_ms: int) -> PutBack:
    """`age_ms`: since the copy was made; `epoch_max`: the highest of any attempt in it."""
    age_s = max(0, age_ms) // 1_000
    epochs = EPOCHS_MIN + EPOCHS_PER_S * age_s
    remembered = before.remembered_job_id
    given_job_id = last_job_id + JOB_IDS_MIN + JOB_IDS_PER_S * age_s
    numbering = Numbering(
        last_job_id if remembered is None else min(remembered, last_job_id),
        given_job_id,
        max(before.epoch_floor, epoch_max) + epochs,
    )
    return PutBack(numbering, given_job_id, epochs)
