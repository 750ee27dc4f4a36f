"""Nodes without a management controller: woken by a packet, switched off by a program.

Problem: a box with no BMC (most with consumer cards) can be switched on over its network card,
which sleeps with an ear open for the magic packet: six bytes 0xFF and sixteen times its MAC
address, as a broadcast (AMD, Magic Packet Technology, 1995). Nothing answers; that it has worked,
the node's hello shows. The other direction has no packet: a program of the site's, such as
`ssh NODE systemctl poweroff`, is called as Slurm calls its SuspendProgram (`programs.py`).

UDP may lose a packet, so it is sent a few times; a node that is on ignores it.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.capacity import programs
from coordinator.capacity.driver import CapacityError, State, reverse, unknown_verb
from coordinator.core.capacity_orders import CapacityOrder, Verb

PACKETS: Final = 3


@dataclass(frozen=True, slots=True)
class Wake:
    """`address_of` a node: the MAC address of its card. `broadcast`: host:port that hears it."""

    address_of: Callable[[str], str]
    broadcast: str
    suspend: str
    states: str = ""
    takes_lists: bool = False

    def plan(self, order: CapacityOrder) -> list[str]:
        if not self._is_resume(order):
            return [f"run {self.suspend} {node}" for node in order.nodes]
        return [
            f"send the magic packet for {node} ({self.address_of(node)}) to {self.broadcast}"
            for node in order.nodes
        ]

    async def state(self, nodes: Sequence[str]) -> Mapping[str, State]:
        return await programs.states(self.states, nodes)

    async def apply(self, order: CapacityOrder) -> None:
        if not self._is_resume(order):
            await programs.call(self.suspend, order)
            return
        for node in order.nodes:
            self._send(magic_packet(self.address_of(node)))

    async def roll_back(self, order: CapacityOrder) -> None:
        await self.apply(reverse(order))

    def _is_resume(self, order: CapacityOrder) -> bool:
        if order.verb not in (Verb.RESUME, Verb.SUSPEND):
            raise unknown_verb("wake", order)
        return order.verb is Verb.RESUME

    def _send(self, packet: bytes) -> None:
        host, _, port = self.broadcast.rpartition(":")
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                for _ in range(PACKETS):
                    sender.sendto(packet, (host, int(port)))
        except OSError as error:
            raise CapacityError(
                f"no packet can be sent to {self.broadcast}: {error.strerror}"
            ) from error


def magic_packet(mac: str) -> bytes:
    """For the card with this address, 00:11:22:33:44:55 or with dashes."""
    return b"\xff" * 6 + bytes.fromhex(mac.replace(":", "").replace("-", "")) * 16
