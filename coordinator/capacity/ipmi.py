"""Nodes are switched by their management controllers over IPMI 2.0, through `ipmitool`.

Problem: IPMI's handshake and ciphers are nothing to write again, and every distribution has a
program that knows them and their vendors' habits. It is started once for each question; the
password is in its environment (`-E`, IPMI_PASSWORD), which other users cannot see, and never among
its arguments, which they can.

Off is a soft shutdown (ACPI) with a bound, then a hard one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from coordinator.capacity import credentials
from coordinator.capacity.driver import CapacityError, State, is_resume, reverse
from coordinator.capacity.graceful import switch_off
from coordinator.capacity.running import succeed
from coordinator.core.capacity_orders import CapacityOrder
from coordinator.ports import Clock

PROGRAM: Final = "ipmitool"
STATES: Final = {"Chassis Power is on": State.ON, "Chassis Power is off": State.OFF}


@dataclass(frozen=True, slots=True)
class Ipmi:
    """`address_of` a node: the host of its controller."""

    address_of: Callable[[str], str]
    credentials_file: str
    graceful_ms: int
    clock: Clock
    program: str = PROGRAM
    takes_lists: bool = False

    def plan(self, order: CapacityOrder) -> list[str]:
        words = "power on" if is_resume("ipmi", order) else "power soft, and power off if need be"
        return [f"ask {self.address_of(node)} of {node} for {words}" for node in order.nodes]

    async def state(self, nodes: Sequence[str]) -> Mapping[str, State]:
        return {node: await self._state(node) for node in nodes}

    async def apply(self, order: CapacityOrder) -> None:
        on = is_resume("ipmi", order)
        for node in order.nodes:
            if on:
                await self._power(node, "on")
            elif await self._state(node) is not State.OFF:
                await switch_off(
                    partial(self._power, node, "soft"),
                    partial(self._power, node, "off"),
                    partial(self._is_off, node),
                    self.clock,
                    self.graceful_ms,
                )

    async def roll_back(self, order: CapacityOrder) -> None:
        await self.apply(reverse(order))

    async def _power(self, node: str, word: str) -> None:
        await self._ask(node, word)

    async def _is_off(self, node: str) -> bool:
        return await self._state(node) is State.OFF

    async def _state(self, node: str) -> State:
        said = await self._ask(node, "status")
        if said not in STATES:
            raise CapacityError(f"{self.program} said '{said[:80]}' of {node}, not on or off")
        return STATES[said]

    async def _ask(self, node: str, word: str) -> str:
        login = credentials.read(self.credentials_file, node)
        where = ("-I", "lanplus", "-H", self.address_of(node), "-U", login.user, "-E")
        try:
            return await succeed(
                (self.program, *where, "chassis", "power", word),
                {"IPMI_PASSWORD": login.password},
            )
        except CapacityError as error:
            raise CapacityError(f"the BMC of {node}: {error}") from error
