"""How often what trainings run on fails, by what has become of the fleet's own attempts.

Problem: Young's rule, by which a built-in trainer spaces its checkpoints, wants the mean time
between failures, and a trainer sees no failure but its own last one. The coordinator sees all.

How: each rank counts for the time that it ran, and each attempt of a job for one failure at most:
when a node dies under one rank, the others fail of that. What nobody had asked to stop and was lost
or has failed is a failure, but for a program that ends with a status of its own before it has saved
anything: that is mostly a mistake in it. A day with one failure is believed beforehand, so that the
first hour of a fleet says little.
"""

from dataclasses import replace

from coordinator.core.model import Attempt, JobSpec
from coordinator.core.phases import AttemptPhase

VARIABLE = "BATON_MEAN_TIME_BETWEEN_FAILURES_S"
DAY_MS = 86_400_000
# Then all that was seen counts half: what was mended long ago is forgotten.
FAILURES_MAX = 100
# Whose last failed attempt is remembered, so that its other ranks do not count again.
JOBS_MAX = 1_000
# A shell reports a child that a signal ended as 128 + its number (POSIX.1-2017, shell, 2.8.2).
SIGNAL_STATUS_BASE = 128


class FailureRate:
    """Of what has ended; ``run_ms`` is the time of ranks."""

    def __init__(self) -> None:
        self.run_ms = 0.0
        self.failures = 0.0
        self._failed: dict[int, int] = {}  # by job: the epoch that has counted

    def note(self, before: Attempt | None, attempt: Attempt) -> None:
        """An attempt as it is now, and as it was known; ``None``: it is new here."""
        began, ended = attempt.started_unix_ms, attempt.ended_unix_ms
        if began is None or ended is None:
            return
        if before is not None and before.ended_unix_ms is not None:
            return
        self.run_ms += max(0, ended - began)
        if not _is_failure(attempt) or self._failed.get(attempt.job_id) == attempt.epoch:
            return
        self._failed.pop(attempt.job_id, None)
        self._failed[attempt.job_id] = attempt.epoch
        if len(self._failed) > JOBS_MAX:
            del self._failed[next(iter(self._failed))]
        self.failures += 1
        if self.failures >= FAILURES_MAX:
            self.run_ms, self.failures = self.run_ms / 2, self.failures / 2

    def mean_time_s(self, ranks: int) -> float | None:
        """Between failures of a job of so many ranks; ``None``: next to nothing was seen so far."""
        if not self.failures and self.run_ms < DAY_MS:
            return None
        return (DAY_MS + self.run_ms) / (1 + self.failures) / ranks / 1000

    def told(self, spec: JobSpec) -> JobSpec:
        """With what its trainer is to know of it."""
        mean_s = self.mean_time_s(spec.ranks)
        if mean_s is None:
            return spec
        variables = {**dict(spec.environment), VARIABLE: f"{mean_s:.0f}"}
        return replace(spec, environment=tuple(variables.items()))


def _is_failure(attempt: Attempt) -> bool:
    if attempt.stop_reason or attempt.phase not in (AttemptPhase.FAILED, AttemptPhase.LOST):
        return False
    own = attempt.exit_code is not None and attempt.exit_code <= SIGNAL_STATUS_BASE
    return not own or attempt.commits > 0
