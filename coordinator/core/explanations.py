"""What `baton explain` is told: a sentence, and the figures of it for programs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpectedStart:
    """A waiting job is expected to fit at `unix_ms` on `nodes`, when job `after_job_id` leaves."""

    unix_ms: int
    nodes: tuple[str, ...]
    where: str
    after_job_id: int


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What would let a waiting job start: `change` is an option of `baton submit`, or a command
    that begins with `baton`; `outcome` is what follows."""

    change: str
    outcome: str

    @property
    def words(self) -> str:
        if self.change.startswith("baton "):
            return f"{self.outcome} after `{self.change}`"
        return f"{self.outcome} with {self.change}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """`expected_end_unix_ms` is of a running job that says how many steps it has."""

    sentence: str
    expected_start: ExpectedStart | None = None
    expected_end_unix_ms: int | None = None
    suggestions: tuple[Suggestion, ...] = ()
