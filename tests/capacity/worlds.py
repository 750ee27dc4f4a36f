"""What each driver switches, with the ways in which it can go wrong, behind one face."""

import select
import socket
from pathlib import Path
from typing import Final, Protocol

from sushy_tools.emulator import main as emulator

from coordinator.capacity.burst import Burst
from coordinator.capacity.driver import Driver, State
from coordinator.capacity.ipmi import Ipmi
from coordinator.capacity.programs import Programs
from coordinator.capacity.redfish import Redfish
from coordinator.capacity.simulated import Fault, Simulated, Wrong
from coordinator.capacity.wake import PACKETS, Wake
from coordinator.core.capacity_orders import Verb
from tests.capacity.bench import VirtualClock
from tests.capacity.emulator import PASSWORD, USER, Service
from tests.capacity.site import Site

NODES: Final = ("n01", "n02")
GRACEFUL_MS: Final = 60_000
PATIENCE_S: Final = 30.0


class World(Protocol):
    """`up` and `down` are the verbs that its driver knows, and `faulty` the one that can go wrong.
    `can_see`: its driver can tell how nodes are, so that a lie is found out."""

    driver: Driver
    nodes: tuple[str, ...]
    up: Verb
    down: Verb
    faulty: Verb
    can_see: bool

    def is_on(self, node: str) -> bool: ...

    def deeds(self) -> int:
        """How many switches have been made, or were tried."""
        ...

    def go_wrong(self, wrong: str) -> None:
        """From now on: hang, lie, fail, or (empty) nothing."""
        ...


class SimulatedWorld:
    nodes: tuple[str, ...] = NODES
    up = Verb.RESUME
    down = Verb.SUSPEND
    faulty = Verb.RESUME
    can_see = True

    def __init__(self) -> None:
        self._driver = Simulated()
        self.driver: Driver = self._driver

    def is_on(self, node: str) -> bool:
        return self._driver.states.get(node) is State.ON

    def deeds(self) -> int:
        return len(self._driver.deeds)

    def go_wrong(self, wrong: str) -> None:
        self._driver.faults = [
            Fault(node, verb, Wrong(wrong), times=100)
            for node in self.nodes
            for verb in Verb
            if wrong
        ]


class ProgramsWorld:
    nodes: tuple[str, ...] = NODES
    up = Verb.RESUME
    down = Verb.SUSPEND
    faulty = Verb.RESUME

    def __init__(self, folder: Path, *, can_see: bool) -> None:
        self.site = Site(folder)
        self.can_see = can_see
        self.driver: Driver = Programs(
            self.site.program("resume"),
            self.site.program("suspend"),
            states=self.site.program("states") if can_see else "",
        )

    def is_on(self, node: str) -> bool:
        return self.site.is_on(node)

    def deeds(self) -> int:
        return len(self.site.calls())

    def go_wrong(self, wrong: str) -> None:
        self.site.go_wrong(wrong)


class BurstWorld(ProgramsWorld):
    up = Verb.CREATE
    down = Verb.DELETE
    faulty = Verb.CREATE

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, can_see=True)
        self.driver = Burst(
            self.site.program("create"), self.site.program("delete"), self.site.program("states")
        )


class IpmiWorld:
    """`ipmitool` is a program of the tests' own, which is called and answers as the real one."""

    nodes: tuple[str, ...] = NODES
    up = Verb.RESUME
    down = Verb.SUSPEND
    faulty = Verb.RESUME
    can_see = True

    def __init__(self, folder: Path, clock: VirtualClock) -> None:
        self.site = Site(folder)
        self.driver: Driver = Ipmi(
            "{}-bmc".format,
            write_credentials(folder),
            GRACEFUL_MS,
            clock,
            self.site.program("ipmitool"),
        )

    def is_on(self, node: str) -> bool:
        return self.site.is_on(f"{node}-bmc")

    def deeds(self) -> int:
        return len(self.site.calls())

    def go_wrong(self, wrong: str) -> None:
        self.site.go_wrong(wrong)


class WakeWorld:
    """A network of loopback: who hears a node's packet is on."""

    nodes: tuple[str, ...] = NODES
    up = Verb.RESUME
    down = Verb.SUSPEND
    faulty = Verb.SUSPEND  # nobody knows what becomes of a packet
    can_see = False

    def __init__(self, folder: Path) -> None:
        self.site = Site(folder)
        self._ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._ear.bind(("127.0.0.1", 0))
        self._ear.setblocking(False)
        self.driver: Driver = Wake(
            {"n01": "00:11:22:33:44:01", "n02": "00-11-22-33-44-02"}.__getitem__,
            f"127.0.0.1:{self._ear.getsockname()[1]}",
            self.site.program("suspend"),
        )
        self.heard: list[bytes] = []

    def close(self) -> None:
        self._ear.close()

    def is_on(self, node: str) -> bool:
        """The last that was said to it."""
        if any(call["arguments"] == [node] for call in self.site.calls()):
            return False
        packet = b"\xff" * 6 + bytes.fromhex(f"0011223344{node[1:]}") * 16
        while packet not in self.heard and self._hears(PATIENCE_S):
            pass
        return packet in self.heard

    def deeds(self) -> int:
        while self._hears(PATIENCE_S if len(self.heard) % PACKETS else 0.0):
            pass
        return len(self.heard) // PACKETS + len(self.site.calls())

    def go_wrong(self, wrong: str) -> None:
        self.site.go_wrong(wrong)

    def _hears(self, patience_s: float) -> bool:
        """One packet more. The kernel may be slower with it than whoever has sent it."""
        if not select.select([self._ear], [], [], patience_s)[0]:
            return False
        self.heard.append(self._ear.recv(2_000))
        return True


class RedfishWorld:
    nodes: tuple[str, ...] = NODES
    up = Verb.RESUME
    down = Verb.SUSPEND
    faulty = Verb.RESUME
    can_see = True

    def __init__(self, folder: Path, service: Service, clock: VirtualClock) -> None:
        self.service = service
        self.driver: Driver = Redfish(
            lambda node: service.url,
            write_credentials(folder),
            GRACEFUL_MS,
            clock,
            system="{node}",
        )

    def is_on(self, node: str) -> bool:
        """As the emulator itself keeps it."""
        return bool(emulator.app.systems.get_power_state(node) == "On")

    def deeds(self) -> int:
        return len(self.service.resets)

    def go_wrong(self, wrong: str) -> None:
        self.service.wrong = wrong


def write_credentials(folder: Path) -> str:
    path = folder / "bmc.toml"
    path.write_text(f'user = "{USER}"\npassword = "{PASSWORD}"\n')
    path.chmod(0o600)
    return str(path)
