"""`python -m coordinator.capacity_check NODES [flags of baton-coordinator]`: what drivers would do.

Problem: a wrong address or password should be found before the night in which a node is switched.
This asks each node's driver how it sees the node, and says what a resume and a suspend would do. It
switches nothing, and needs no coordinator. It says which configuration it went by, since a node
that is in no group is mostly one that another file has. A site's programs are looked at and not
run: one that is not there would be found out in that night.

Exit status: 0, 1 where a driver cannot say or a program is missing, 2 for wrong usage.
"""

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from coordinator.capacity import hostlist
from coordinator.capacity.actuator import Group
from coordinator.capacity.driver import CapacityError, State
from coordinator.capacity.opening import open_groups
from coordinator.capacity_settings import OPTIONAL, CapacityGroup
from coordinator.config import Config, from_command_line
from coordinator.core.capacity_orders import CapacityOrder, Verb
from coordinator.main import SystemClock

STATE_S: Final = 30.0  # for one answer; a BMC that needs longer is as good as none
SWITCHED: Final = (Verb.RESUME, Verb.SUSPEND)
RENTED: Final = (Verb.CREATE, Verb.DELETE)  # a group that names a `gpu_type`
# A `state_program` is run here, and says itself what is wrong with it.
PROGRAMS: Final = (
    "resume_program",
    "suspend_program",
    "resume_fail_program",
    "create_program",
    "delete_program",
)
PROGRAM: Final = "python -m coordinator.capacity_check"
USAGE: Final = f"usage: {PROGRAM} NODES [flags of baton-coordinator]\n"
HELP: Final = f"""{USAGE}
Ask the driver of each node how it sees the node, and print what it would do. Nothing is switched,
and no coordinator has to run.

  NODES          as Slurm writes them: n1, or 'n[01-03,07]'
  --config PATH  the coordinator's TOML file, with its tables [capacity.NAME];
                 default: /etc/baton/coordinator.toml when it exists
  -h, --help     print this

All other flags of baton-coordinator, and BATON_COORDINATOR_* in the environment, count as well.
Run this as who the coordinator runs as: it has to read the same passwords.

  {PROGRAM} 'n[01-40]' --config /etc/baton/coordinator.toml

Exit status: 0; 1 where a driver cannot say, a program does not exist or is not executable, or a
node is in no group; 2 for wrong usage.
"""


def main(arguments: Sequence[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        sys.stdout.write(HELP)
        return 0
    if not arguments or arguments[0].startswith("-"):
        sys.stderr.write(f"{USAGE}NODES comes first; --help says more\n")
        return 2
    try:
        nodes = hostlist.read(arguments[0])
    except ValueError as error:
        sys.stderr.write(f"capacity_check: {error}\n")
        return 2
    loaded = from_command_line(arguments[1:], os.environ)
    sys.stderr.write(f"capacity_check: {_source(loaded.sources)}\n")
    return asyncio.run(_show(nodes, loaded.config))


def _source(sources: Mapping[str, str]) -> str:
    """What the drivers are taken from, in a sentence."""
    if sources["capacity"] != "default":
        return f"'capacity' is from {sources['capacity']}"
    files = [source for source in sources.values() if source.startswith("file ")]
    read = files[0] if files else "no file"
    return f"there is no 'capacity': {read} was read; --config PATH names another"


async def _show(nodes: Sequence[str], config: Config) -> int:
    groups = open_groups(config, SystemClock())
    is_well = True
    for node in nodes:
        group = groups.get(node)
        if group is None:
            sys.stdout.write(f"{node}: in no group of 'capacity'\n")
            is_well = False
            continue
        settings = config.capacity[group.name]
        try:
            states = await asyncio.wait_for(group.driver.state((node,)), STATE_S)
            seen = _seen(states[node], settings)
        except (CapacityError, TimeoutError) as error:
            seen = str(error) or "no answer"
            is_well = False
        sys.stdout.write(f"{node} ({group.name}): {seen}\n")
        sys.stdout.writelines(f"  {sentence}\n" for sentence in _plans(node, group, settings))
        missing = _missing(settings)
        sys.stdout.writelines(f"  {sentence}\n" for sentence in missing)
        is_well = is_well and not missing
    return 0 if is_well else 1


def _seen(state: State, settings: CapacityGroup) -> str:
    """With the reason where nobody can say."""
    if state is not State.UNKNOWN or "state_program" not in OPTIONAL[settings.driver]:
        return state.value
    if settings.state_program:
        return f"{state.value}: {settings.state_program} says nothing of it"
    return f"{state.value}: there is no 'state_program', so its agent's word alone counts"


def _plans(node: str, group: Group, settings: CapacityGroup) -> list[str]:
    found = []
    for verb in RENTED if settings.gpu_type else SWITCHED:
        try:
            steps = group.driver.plan(CapacityOrder("check", verb, (node,)))
        except CapacityError:
            continue
        found.append(f"{verb.value}: {'; then '.join(steps)}")
    return found


def _missing(settings: CapacityGroup) -> list[str]:
    """Programs that could not be started, as sentences."""
    found = []
    for name in PROGRAMS:
        path = getattr(settings, name)
        if not path:
            continue
        if not os.access(path, os.F_OK):
            found.append(f"{name}: '{path}' does not exist")
        elif not os.path.isfile(path) or not os.access(path, os.X_OK):
            found.append(f"{name}: '{path}' is not executable")
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
