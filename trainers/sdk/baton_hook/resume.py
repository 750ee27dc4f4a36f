"""Which checkpoint a `Trainer` continues from: the script's own, or the last committed one.

Problem: a script says where to resume in one of three ways: not at all, `True` (the newest in its
output directory), or by a path that it found itself. On a new node its output directory is empty,
and `True` raises; on an old one it may hold checkpoints from before the job moved away, and
resuming from those would repeat work, or leave the history that was committed.

The rule: the higher step wins, and on a tie the committed one, whose bytes were verified. What the
script asks for counts if it exists and is whole; a torn one is set aside, and the one before it
counts in its place. If all that there was is torn, training starts from the beginning, which is
what was true before the first save; that it was torn is known by its new name, to other processes
and in later attempts. Where other ranks come to other steps this is not the last word
(`agreement`), so what was chosen is said and laid out only afterwards.

A program may call `train` several times. Which call a checkpoint belongs to stands in a file beside
Hugging Face's (`MARK_NAME`); a restored checkpoint is for that call alone.
"""

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from baton_hook import torn
from baton_hook.guard import say

MARK_NAME = "baton_hook.json"
BEST_NAME = "baton_best"
"""Folder with the best checkpoint so far, for those who load it at the end. It has a level of its
own below, because Trainer takes a direct folder with adapter weights for an adapter."""

PART_NAME = re.compile(r"rank-\d{5,}")
"""Where the agent lays out what each rank has handed over."""

UNKNOWN = -1
"""No step: below all that there are."""

_PARTIAL = ".baton-"
_TOGETHER_NAME = "restored"


@dataclass(frozen=True)
class Found:
    """A checkpoint that can be resumed from."""

    path: Path
    step: int


@dataclass(frozen=True)
class Choice:
    """What `Trainer.train` is given as `resume_from_checkpoint`."""

    answer: object
    step: int
    """After which training begins; 0 is the beginning, `UNKNOWN` is left to `Trainer`."""
    sentence: str = ""
    """For the log, where the choice is not simply what the script asked for."""


def committed(directory: Path | None, call: int) -> Found | None:
    """What the agent has laid out, if it is a Trainer's and of this call of `train`."""
    if directory is None or not (directory / torn.STATE_NAME).is_file():
        return None
    if marked_call(directory) != call:
        return None
    return Found(directory, torn.step_of(directory))


def marked_call(directory: Path | None) -> int:
    """The number of the call of `train` that wrote a checkpoint; 0, the first, without a mark."""
    if directory is None or not (directory / MARK_NAME).is_file():
        return 0
    return int(json.loads((directory / MARK_NAME).read_text("utf-8"))["call"])


def choose(
    asked: object, output_directory: Path, restored: Found | None, *, may_move: bool
) -> Choice:
    """What to give `Trainer.train` as `resume_from_checkpoint`, whatever the script gave.

    `may_move` is for one process of several on a machine; the others see what it left.
    """
    if asked is None or asked is False:
        return of_committed(restored) if restored is not None else Choice(asked, 0)
    local, was_torn = _asked_for(asked, output_directory, may_move)
    if restored is not None and (local is None or local.step <= restored.step):
        return of_committed(restored, f", and not from {local.path}" if local is not None else "")
    if local is not None:
        return Choice(str(local.path), local.step)
    if was_torn:
        return Choice(None, 0, "no whole checkpoint is left: training starts from the beginning")
    # There is nothing, and what Trainer says to that is right, unless another rank has something.
    return Choice(asked, UNKNOWN)


def of_committed(restored: Found, more: str = "") -> Choice:
    """To resume from the committed one; `more` ends the sentence."""
    sentence = f"resuming from step {restored.step}, the last committed checkpoint{more}"
    return Choice(str(restored.path), restored.step, sentence)


def _asked_for(asked: object, output_directory: Path, may_move: bool) -> tuple[Found | None, bool]:
    """The newest whole checkpoint that answers the script's wish, and where there is none, whether
    one was torn, now or earlier."""
    if asked is True:
        candidates = list(torn.numbered(output_directory))
        local = _newest_whole(candidates, may_move)
        return local, bool(candidates) or torn.any_set_aside(output_directory)
    if not isinstance(asked, str | os.PathLike):
        return None, False
    path = Path(os.fspath(asked))
    match = torn.NAME.fullmatch(path.name)
    if not path.is_dir() and not (match and torn.was_set_aside(path)):
        return None, False
    if match is None:
        # Not Trainer's naming, so not for us to rename or to look for an older one.
        return Found(path, torn.step_of(path)), False
    older = [
        other
        for other in torn.numbered(path.parent)
        if int(other.name.rpartition("-")[2]) < int(match.group(1))
    ]
    candidates = [path, *older] if path.is_dir() else older
    return _newest_whole(candidates, may_move), True


def _newest_whole(candidates: list[Path], may_move: bool) -> Found | None:
    for path in candidates:
        if torn.is_part(path):
            say(f"{path} is passed over: the rest of it lies on other nodes")
            continue
        wrong = torn.problem(path)
        if not wrong:
            return Found(path, torn.step_of(path))
        if may_move:
            _move_aside(path, wrong)
    return None


def _move_aside(path: Path, wrong: str, instead: str = "the one before it") -> None:
    try:
        target = torn.set_aside(path)
    except OSError as error:
        say(f"{path} is torn ({wrong}) and is passed over; cannot rename it: {error.strerror}")
    else:
        say(f"{path} is torn ({wrong}); it is now {target.name}, and {instead} is used")


def put_together(directory: Path, into: Path) -> Path:
    """The files of all parts of a restored checkpoint in one directory, in `into`; of a whole one
    its own directory. What several parts have is taken from the first. Raises OSError."""
    parts = sorted(path for path in directory.iterdir() if PART_NAME.fullmatch(path.name))
    together = into / _TOGETHER_NAME
    if not parts:
        return directory
    files: dict[Path, Path] = {}
    for part in parts:
        for path in part.rglob("*"):
            if not path.is_dir():
                files.setdefault(path.relative_to(part), path)
    if not together.is_dir():
        _link_once(files, together)
    return together


def _link_once(files: Mapping[Path, Path], target: Path) -> None:
    try:
        link_files(files, target)
    except OSError:
        if not target.is_dir():  # else another process, or node, was faster
            raise


def link_tree(source: Path, target: Path) -> None:
    """The same files under another directory, without what is ours; see `link_files`."""
    link_files(_tree(source), target)


def link_files(files: Mapping[Path, Path], target: Path) -> None:
    """Files under other names below `target`: by hard links, which cost nothing, or by copies
    where the two lie on different file systems. `target` appears whole or not at all. Raises
    OSError."""
    partial = _partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, path in files.items():
            copy = partial / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            _link(path, copy)
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _partial_of(target: Path) -> Path:
    """This process's own name beside it: nodes may share the directory, and begin at once."""
    writer = f"{socket.gethostname()}-{os.getpid()}-"
    return target.with_name(_PARTIAL + writer + target.name)


def lay_out(restored: Found, output_directory: Path) -> None:
    """Put a restored checkpoint, and the best one that came with it, where `Trainer` looks for
    them in the end, unless something lies there; what is one node's part gives way, since all of it
    is in what was restored, and what is torn. Raises OSError."""
    best = restored.path / BEST_NAME
    sources = {output_directory / f"checkpoint-{restored.step}": restored.path}
    sources |= {output_directory / path.name: path for path in torn.numbered(best)}
    output_directory.mkdir(parents=True, exist_ok=True)
    for target, source in sources.items():
        # A whole one was verified, and may be of a script's own kind.
        wrong, together = torn.problem(source), restored.path.name == _TOGETHER_NAME
        wrong = wrong or (torn.lacking(source, restored.path) if together else "")
        if wrong and together:
            # Of the best one a rank may have had nothing; Trainer raises over what it cannot load.
            say(f"{source.name} was restored, and is no use: {wrong}")
            continue
        _make_way(target, may_judge=not wrong)
        if not target.exists():
            _link_once(_tree(source), target)


def _make_way(target: Path, *, may_judge: bool) -> None:
    """Another process, or node, may be at it as well, so it goes in one step."""
    try:
        if torn.is_part(target):
            away = _partial_of(target)
            target.rename(away)
            if away.is_symlink():
                away.unlink()
            else:
                shutil.rmtree(away)
        elif may_judge and target.is_dir() and (wrong := torn.problem(target)):
            _move_aside(target, wrong, "the restored one")
    except FileNotFoundError:
        return


def _tree(source: Path) -> dict[Path, Path]:
    files = {path.relative_to(source): path for path in _files(source)}
    if not files:
        raise FileNotFoundError(errno.ENOENT, "no files", str(source))
    return files


def _files(source: Path) -> Iterator[Path]:
    """Regular files, without what is ours."""
    for folder, folders, names in os.walk(source):
        if Path(folder) == source:
            folders[:] = [name for name in folders if name != BEST_NAME]
            names = [name for name in names if name not in (MARK_NAME, torn.PART_NAME)]
        yield from (Path(folder, name) for name in names)


def _link(source: Path, target: Path) -> None:
    # A symbolic link may point anywhere, and an agent takes none: what it points to is copied.
    if not source.is_symlink():
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)  # another file system, or one without hard links
        return
    shutil.copyfile(source, target)
