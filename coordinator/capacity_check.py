"""`python -m coordinator.capacity_check NODES [flags of baton-coordinator]`: what drivers would do.

Problem: a wrong address or password should be found before the night in which a node is switched.
This asks each node's driver how it sees the node, and says what a resume and a suspend would do. It
switches nothing, and needs no coordinator.

Exit status: 0, 1 where a driver cannot say, 2 for wrong usage.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Final

from coordinator.capacity import hostlist
from coordinator.capacity.actuator import Group
from coordinator.capacity.driver import CapacityError
from coordinator.capacity.opening import open_groups
from coordinator.config import Config, from_command_line
from coordinator.core.capacity_orders import CapacityOrder, Verb
from coordinator.main import SystemClock

STATE_S: Final = 30.0  # for one answer; a BMC that needs longer is as good as none
USAGE: Final = "usage: python -m coordinator.capacity_check NODES [flags of baton-coordinator]\n"


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        sys.stderr.write(USAGE)
        return 2
    config = from_command_line(arguments[1:], os.environ).config
    try:
        nodes = hostlist.read(arguments[0])
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return asyncio.run(_show(nodes, config))


async def _show(nodes: Sequence[str], config: Config) -> int:
    groups = open_groups(config, SystemClock())
    is_well = True
    for node in nodes:
        group = groups.get(node)
        if group is None:
            sys.stdout.write(f"{node}: in no group of 'capacity'\n")
            is_well = False
            continue
        try:
            states = await asyncio.wait_for(group.driver.state((node,)), STATE_S)
            sys.stdout.write(f"{node} ({group.name}): {states[node].value}\n")
        except (CapacityError, TimeoutError) as error:
            sys.stdout.write(f"{node} ({group.name}): {str(error) or 'no answer'}\n")
            is_well = False
        sys.stdout.writelines(f"  {sentence}\n" for sentence in _plans(node, group))
    return 0 if is_well else 1


def _plans(node: str, group: Group) -> list[str]:
    found = []
    for verb in Verb:
        try:
            steps = group.driver.plan(CapacityOrder("check", verb, (node,)))
        except CapacityError:
            continue
        found.append(f"{verb.value}: {'; then '.join(steps)}")
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
