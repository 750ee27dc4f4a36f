"""Which process hands over which files of a checkpoint that ranks have written on several nodes.

Problem: FSDP and DeepSpeed have every process write shards of its own, each into the output
directory of its node, so that no node has a whole checkpoint. The shards cannot get other names,
since a common file names them, and by its name nobody can tell for all formats who has written one.
An output directory may also hold what an earlier attempt has left there under the same names, when
the ranks lay otherwise on the nodes.

How: each process notes what its directory holds of a step before that is saved, which is next to
never anything, and looks again when all have written; what is there now and was not before is of
this save. The first process says what it sees, and the others what they see besides. Where that is
nothing, as on one node or in a directory that all nodes see, the first hands over all of it.
Otherwise each rank hands over a part: a file goes to the first that sees it, so none is there twice
and what is on all nodes is rank 0's. The coordinator commits when all parts have come. Processes
below a launcher are one rank to Baton, and the first of them speaks for it.

To resume, the files of all parts are put together again in one directory, as `Trainer` expects it.
Of torch's format each process reads rows that it does not keep itself (state that all have the same
is written by one of them, whichever has least to write), so all of it is on every node then. Of
DeepSpeed's a process reads its own files and the common ones (0.19.8, `_get_all_zero_checkpoint_
state_dicts` in its engine.py), but not with `elastic_checkpoint`, and only its names tell which
they are; nor does a part have them where two ranks had one node, or in a checkpoint that is laid
out for `Trainer` to find. One file that is wanted and not there costs more than to fetch them all.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton_hook import states, torn

FILES_MAX = 100_000
"""In a checkpoint of one step; more is no checkpoint, and would have to go through memory."""

Seen = Mapping[str, tuple[int, int, int]]
"""Files below a directory by their relative paths: inode, bytes, and when written (ns)."""


class Scattered(ValueError):
    """The files of a step cannot be brought together; the sentence says why."""


@dataclass(frozen=True)
class Said:
    """What a process says."""

    part: int
    """Which of Baton's ranks it belongs to."""
    paths: tuple[str, ...] | None
    """What it sees, or what of it the first does not see; None where it could not look."""

    def besides(self, first: "Said") -> "Said":
        """What it sees besides."""
        if self.paths is None or first.paths is None:
            return self
        known = set(first.paths)
        return Said(self.part, tuple(path for path in self.paths if path not in known))


@dataclass(frozen=True)
class Share:
    """What this process hands over."""

    parts: int
    """Of how many; 1 is a whole checkpoint."""
    paths: frozenset[str]
    """Its files; of a whole one all."""
    all_paths: frozenset[str]
    """Those of all processes."""
    speaks: bool = True
    """Whether it hands over anything at all."""


def alone(speaks: bool) -> Share:
    """A whole checkpoint, without any looking, of processes that cannot ask each other."""
    return Share(1, frozenset(), frozenset(), speaks)


def look(directory: Path) -> dict[str, tuple[int, int, int]]:
    """What is there, without what the ranks tell each other (`states`). Raises OSError, and
    `Scattered` where there is too much."""
    found: dict[str, tuple[int, int, int]] = {}
    for folder, _, names in os.walk(directory, onerror=_raise):
        for name in names:
            path = Path(folder, name)
            others = states.NAME.fullmatch(name) or name == torn.PART_NAME
            if others and path.parent == directory:
                continue
            stat = path.stat()
            known = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            found[path.relative_to(directory).as_posix()] = known
        if len(found) > FILES_MAX:
            raise Scattered(f"{directory} has more than {FILES_MAX} files")
    return found


def _raise(error: OSError) -> None:
    raise error


def written(directory: Path, before: Seen) -> tuple[str, ...]:
    """The files that are there now and were not before, or were others. Nothing where there is no
    directory. Raises like `look`."""
    if not directory.is_dir():
        return ()
    return tuple(sorted(p for p, known in look(directory).items() if before.get(p) != known))


def encode(said: Said) -> bytes:
    """For the other processes."""
    return json.dumps([said.part, said.paths]).encode()


def decode(data: bytes) -> Said:
    """Raises ValueError."""
    part, paths = json.loads(data)
    return Said(part, None if paths is None else tuple(paths))


def divide(first: Said, others: Sequence[Said], process: int, parts: int) -> Share:
    """What this process hands over, by what all have said: the same for all. `others` has an entry
    for each process, in order; `parts` is how many ranks Baton has started. Raises `Scattered`."""
    told = [first, *others[1:]]
    for number, said in enumerate(told):
        if said.paths is None:
            raise Scattered(f"process {number} cannot look at what it has saved")
    speakers: dict[int, int] = {}
    for number, said in enumerate(told):
        speakers.setdefault(said.part, number)
    owners = _owners((number, told[number]) for number in speakers.values())
    for number, said in enumerate(told):
        lost = [path for path in said.paths or () if path not in owners]
        if lost:
            raise Scattered(f"process {number} alone sees {lost[0]}, and another speaks for it")
    mine = frozenset(path for path, owner in owners.items() if owner == process)
    if not any(owners.values()):
        return Share(1, mine, frozenset(owners), speaks=process == 0)
    if set(speakers) != set(range(parts)):
        raise Scattered(f"processes of {len(speakers)} ranks have saved, and there are {parts}")
    return Share(parts, mine, frozenset(owners), speaks=process in speakers.values())


def _owners(told: Iterable[tuple[int, Said]]) -> dict[str, int]:
    owners: dict[str, int] = {}
    for number, said in told:
        for path in said.paths or ():
            owners.setdefault(path, number)
    return owners


def mark(saved: Path, share: Share) -> None:
    """That what lies here is a part, or is not any more, for whoever looks for a checkpoint to
    resume from. Raises OSError."""
    if share.parts > 1 and saved.is_dir():
        (saved / torn.PART_NAME).touch()
    elif share.parts == 1 and share.speaks:
        (saved / torn.PART_NAME).unlink(missing_ok=True)


def check(saved: Path, share: Share) -> None:
    """That what names shards among this process's files names none that nobody has written. Raises
    `torn.Torn` and OSError."""
    for path in sorted(share.paths):
        folder, _, name = path.rpartition("/")
        if name == torn.SHARDS_INDEX_NAME:
            for shard in torn.named_shards(saved / path):
                if f"{folder}/{shard}" not in share.all_paths:
                    raise torn.Torn(f"{path} names {shard}, which no rank has written")
