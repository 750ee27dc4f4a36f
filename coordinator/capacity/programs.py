"""Nodes are switched by a site's own programs, called as Slurm calls its ResumeProgram and
SuspendProgram.

Problem: who ran Slurm has scripts that know his machines, and nobody wants to write them again. So
the contract is Slurm's (slurm.conf(5), power_save.html): one argument, the nodes in bracket
notation; no standard input; for a resume `SLURM_RESUME_FILE` names a temporary file, JSON with
`all_nodes_resume` and `jobs` (always empty here: nodes come ahead of the jobs); a resume that
failed is told to the ResumeFailProgram, where there is one. Nodes of a cloud that exist only while
they are resumed are created and deleted by the same two.

Where it is more than Slurm's: an exit status other than 0 is believed (Slurm logs it), the program
has a deadline, and `BATON_CAPACITY_KEY` lets it see that an order comes again. `state_program`,
which Slurm does not have, may say how nodes are: a line `NODE on` or `NODE off` for each; without
it the nodes' own hellos tell.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import orjson

from coordinator.capacity import hostlist
from coordinator.capacity.driver import CapacityError, State, reverse, unknown_verb
from coordinator.capacity.running import succeed
from coordinator.core.capacity_orders import CapacityOrder, Verb

STATES: Final = {state.value: state for state in State}
STATES_BYTES_MAX: Final = 1 << 20  # a line each for ten thousand nodes with long names
RESUMES: Final = (Verb.RESUME, Verb.CREATE)


@dataclass(frozen=True, slots=True)
class Programs:
    """Paths of programs; empty where there is none."""

    resume: str
    suspend: str
    resume_fail: str = ""
    states: str = ""
    takes_lists: bool = True

    def plan(self, order: CapacityOrder) -> list[str]:
        return [f"run {self._program(order)} {hostlist.written(order.nodes)}"]

    async def state(self, nodes: Sequence[str]) -> Mapping[str, State]:
        return await states(self.states, nodes)

    async def apply(self, order: CapacityOrder) -> None:
        await call(self._program(order), order)

    async def roll_back(self, order: CapacityOrder) -> None:
        if order.verb in RESUMES and self.resume_fail:
            await call(self.resume_fail, replace(order, key=f"{order.key}.back"))
        else:
            await self.apply(reverse(order))

    def _program(self, order: CapacityOrder) -> str:
        path = self.resume if order.verb in RESUMES else self.suspend
        if not path:
            raise unknown_verb("programs", order)
        return path


async def call(program: str, order: CapacityOrder) -> None:
    """Run `program` for the nodes of `order`. Raises `CapacityError`."""
    nodes = hostlist.written(order.nodes)
    environment = {"BATON_CAPACITY_KEY": order.key, "BATON_CAPACITY_VERB": order.verb.value}
    if order.gpu_type:
        environment["BATON_GPU_TYPE"] = order.gpu_type
    if order.verb not in RESUMES:
        await succeed((program, nodes), environment)
        return
    with tempfile.NamedTemporaryFile(prefix="baton-resume-", suffix=".json") as file:
        file.write(orjson.dumps({"all_nodes_resume": nodes, "jobs": []}))
        file.flush()
        await succeed((program, nodes), {**environment, "SLURM_RESUME_FILE": file.name})


async def states(program: str, nodes: Sequence[str]) -> Mapping[str, State]:
    """What a state program prints of `nodes`; without one, or a line: unknown. Raises
    `CapacityError`."""
    found = dict.fromkeys(nodes, State.UNKNOWN)
    if not program:
        return found
    printed = await succeed((program, hostlist.written(nodes)), {}, STATES_BYTES_MAX)
    for line in printed.splitlines():
        words = line.split()
        if len(words) != 2 or words[1] not in STATES:
            raise CapacityError(f"{program} printed '{line[:80]}', not a node and on or off")
        if words[0] in found:
            found[words[0]] = STATES[words[1]]
    return found
