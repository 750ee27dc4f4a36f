"""A control group for each trainer, where there is no systemd to make one.

Problem: what a job leaves behind is known by its parent, its session and a token in its
environment. A daemon with a session of its own and an empty environment has none of them once its
shim was killed, and goes on computing on a GPU that the next job is given.

How: nothing leaves its control group by forking (cgroups(7)). So each trainer is in a group of its
own, `baton-job-<attempt>`, which its shim enters for it between fork and exec. Its end is a write
to `cgroup.kill`, and `populated 0` in `cgroup.events` is the proof that nothing has survived: not
before it is there an attempt counts as ended. The shim stays outside, since it has the end to tell.

The groups lie below the agent's own, in one that is named after its state directory, since two
agents may have one group. No controllers are enabled, so the agent may stay where it is ("no
internal processes" is a rule for groups that hand controllers on). Where each lies is written
beside the attempt's records: the next agent may be started from elsewhere. Of version 1 of control
groups nothing is used: it has no such kill.

Below systemd only a group that was delegated may be divided (systemd.resource-control(5),
"Delegate="). Where nothing can be made all is as it would be without this.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path

import structlog

from agent.core.values import ProcessesStuck
from agent.processes import shim, unkillable
from agent.processes.shim_output import private_opener

PREFIX = "baton-job-"
LOOK_S = 0.05  # a killed process is gone in milliseconds, if the kernel lets go of it at all
DELEGATED = ("user.delegate", "trusted.delegate")  # what systemd marks such a group with

log = structlog.get_logger()


class NoGroups(Exception):
    """The text says why there can be none."""


class Groups:
    """The groups of attempts, by the directories of these. `home` is what `make_home` returns;
    None: no new ones, and those of an agent before this one are ended all the same."""

    def __init__(self, home: Path | None, *, remove: Callable[[Path], None] = Path.rmdir) -> None:
        self._home = home
        self._remove_group = remove
        self.on_stuck: Callable[[ProcessesStuck], None] = lambda _: None
        self._closed = False

    def make(self, directory: Path) -> None:
        """For an attempt that is to be started. Without one it starts as well."""
        if self._home is None:
            return
        group = self._home / f"{PREFIX}{directory.name}"
        try:
            group.mkdir(parents=True)
            with open(directory / shim.GROUP_NAME, "wb", opener=private_opener) as file:
                file.write(os.fsencode(group))
        except OSError as error:
            log.warning("process.no_group", attempt=directory.name, reason=str(error))

    def kill(self, directory: Path) -> None:
        """All in it at once."""
        group = self._of(directory)
        if group is not None:
            shim.tell_group(os.fsencode(group), b"cgroup.kill", b"1")

    def clear(self, directory: Path, then: Callable[[], None]) -> None:
        """Kill what is left of an attempt; `then` is called once nothing is, at once where nothing
        was. What the kernel does not let go of is told."""
        group = self._of(directory)
        if group is None:
            then()
        else:
            self._end(group, then)

    def sweep(self, known: Collection[str]) -> None:
        """End groups of attempts that nobody answers for: their state was lost."""
        if self._home is None:
            return
        for group in sorted(self._home.glob(f"{PREFIX}*")):
            attempt = group.name.removeprefix(PREFIX)
            if attempt not in known:
                if is_populated(group):
                    log.error("process.group_unknown", attempt=attempt)
                self._end(group, lambda: None)

    def close(self) -> None:
        """Look at nothing more; what is in use goes on."""
        self._closed = True

    def _of(self, directory: Path) -> Path | None:
        recorded = os.fsdecode(shim.read_group(os.fsencode(directory)))
        name = f"{PREFIX}{directory.name}"
        group = Path(recorded) if recorded or self._home is None else self._home / name
        return group if group.name == name and group.is_dir() else None

    def _end(self, group: Path, then: Callable[[], None]) -> None:
        over = False

        def look() -> None:
            nonlocal over
            if self._closed:
                over = True
            elif is_populated(group):
                shim.tell_group(os.fsencode(group), b"cgroup.kill", b"1")
                loop.call_later(LOOK_S, look)
            else:
                over = True
                self._remove(group)
                then()

        loop = asyncio.get_running_loop()
        look()
        if not over:
            attempt = group.name.removeprefix(PREFIX)
            unkillable.watch(attempt, 0, lambda: over, self.on_stuck, find=lambda _: stuck(group))

    def _remove(self, group: Path) -> None:
        """With those that a job has made below it. One that stays costs the kernel a little memory,
        and is tried again by the next agent."""
        with contextlib.suppress(OSError):
            for path, _, _ in os.walk(group, topdown=False):
                self._remove_group(Path(path))
            self._remove_group(group.parent)  # the last of them


def make_home(
    state_directory: Path,
    *,
    proc: Path = Path("/proc"),
    systemd: Path = Path("/run/systemd/system"),
) -> Path:
    """The group below which this agent may make others; it is there as long as one of them is.
    Raises `NoGroups`."""
    own = own_group(proc)
    if systemd.exists() and not any(_is_marked(own, name) for name in DELEGATED):
        raise NoGroups(f"systemd has not delegated {own}")
    key = hashlib.sha256(os.fsencode(state_directory.resolve())).hexdigest()[:12]
    home = own / f"baton-{key}"
    try:
        home.mkdir(exist_ok=True)
    except OSError as error:
        raise NoGroups(f"{own} cannot be divided: {error.strerror}") from None
    # Who moves a process needs the right to do so in the group above both places, too.
    needed = (own / "cgroup.procs", home / "cgroup.procs", home / "cgroup.kill")
    refused = [path for path in needed if not os.access(path, os.W_OK)]
    with contextlib.suppress(OSError):  # there are jobs below it
        home.rmdir()
    if refused:
        raise NoGroups(f"{refused[0]} cannot be written to")
    return home


def own_group(proc: Path) -> Path:
    """Where this process is in the hierarchy of version 2. Raises `NoGroups`."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
        mounts = (proc / "self/mountinfo").read_text().splitlines()
    except OSError as error:
        raise NoGroups(f"{error.filename}: {error.strerror}") from None
    path = next((line[3:] for line in lines if line.startswith("0::")), "")
    for mount in mounts:
        fields, _, rest = mount.partition(" - ")
        if rest.startswith("cgroup2 "):
            root, where = fields.split()[3:5]
            below = os.path.relpath(path, root) if path else ".."
            if not below.startswith(".."):
                return Path(where) / below
    raise NoGroups("no hierarchy of control groups of version 2 is mounted here")


def is_populated(group: Path) -> bool:
    """Whether anything lives in it or below it. A group that is gone is empty."""
    try:
        return "populated 1" in (group / "cgroup.events").read_text().splitlines()
    except OSError as error:  # ENODEV: while it is being removed; else nobody can say
        return error.errno not in (errno.ENOENT, errno.ENODEV)


def stuck(group: Path) -> tuple[int, ...]:
    """Those in it or below it that wait in the kernel and cannot be interrupted."""
    pids: list[int] = []
    for path, _, _ in os.walk(group):
        with contextlib.suppress(OSError):
            pids += map(int, Path(path, "cgroup.procs").read_text().split())
    return tuple(pid for pid in sorted(pids) if unkillable.is_stuck(shim.stat_fields(pid)))


def _is_marked(group: Path, attribute: str) -> bool:
    try:
        return os.getxattr(group, attribute) == b"1"
    except OSError:
        return False
