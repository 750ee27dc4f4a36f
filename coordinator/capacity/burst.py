"""Nodes that exist only while they are needed: made and deleted by a site's commands.

Problem: every provider has its own interface, its own images and its own bill, and each site its
way with them. So what makes a node is a command of the site's: it gets the new node's name as its
one argument, makes a machine of that name, and returns when the provider has said yes. The machine
starts an agent of that name, which enrols itself as any other does. Deleting is the same with
another command; of a name that does not exist it must succeed.

`BATON_CAPACITY_KEY` is the same when an order comes again; providers take such a key as a client
token, and then make no second machine. `BATON_GPU_TYPE` says what kind is wanted. With a
`state_program` (`programs.py`) it is also seen whether the machine is there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.capacity import programs
from coordinator.capacity.driver import State, reverse, unknown_verb
from coordinator.core.capacity_orders import CapacityOrder, Verb


@dataclass(frozen=True, slots=True)
class Burst:
    """Paths of commands; `states` is empty where there is none."""

    create: str
    delete: str
    states: str = ""
    takes_lists: bool = False

    def plan(self, order: CapacityOrder) -> list[str]:
        command = self._command(order)
        return [f"run {command} {node}" for node in order.nodes]

    async def state(self, nodes: Sequence[str]) -> Mapping[str, State]:
        return await programs.states(self.states, nodes)

    async def apply(self, order: CapacityOrder) -> None:
        await programs.call(self._command(order), order)

    async def roll_back(self, order: CapacityOrder) -> None:
        await self.apply(reverse(order))

    def _command(self, order: CapacityOrder) -> str:
        if order.verb not in (Verb.CREATE, Verb.DELETE):
            raise unknown_verb("burst", order)
        return self.create if order.verb is Verb.CREATE else self.delete
