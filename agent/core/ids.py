"""What an attempt is called: `<job>.<epoch>`, and `<job>.<epoch>.<rank>` for one rank of a gang.

Problem: the id comes over the wire, becomes a directory's name, and says what may run beside what.
Read in several places it would be read in several ways, and a name with two spellings is two names.
So the pattern and its reading stand here alone: no leading zeros, and 18 digits at most, which fit
an int64 and so every store.
"""

import re
from dataclasses import dataclass

# One process each; with two more digits a gang would be larger than any machine that was built.
RANKS_MAX = 1_024

_PATTERN = re.compile(r"([1-9][0-9]{0,17})\.([1-9][0-9]{0,17})(?:\.(0|[1-9][0-9]{0,3}))?")


@dataclass(frozen=True, slots=True)
class AttemptId:
    """`rank` of `None`: the job has one rank, and the attempt is all of it."""

    job_id: int
    epoch: int
    rank: int | None = None

    def may_run_beside(self, other: "AttemptId") -> bool:
        """Attempts of different jobs may, and the ranks of one gang. `other` is not this one."""
        ranks = self.rank is not None and other.rank is not None
        return self.job_id != other.job_id or (ranks and self.epoch == other.epoch)


def find_attempt_id(text: str) -> AttemptId | None:
    """What the text says, or `None` when it is no attempt's id."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    job, epoch, rank = match.groups()
    if rank is not None and int(rank) >= RANKS_MAX:
        return None
    return AttemptId(int(job), int(epoch), None if rank is None else int(rank))


def parse_attempt_id(text: str) -> AttemptId:
    """The same for an id that has been let in. Raises `ValueError` for any other: a bug."""
    found = find_attempt_id(text)
    if found is None:
        raise ValueError(f"{text[:80]!r} is no attempt id")
    return found
