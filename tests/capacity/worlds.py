"""What each driver switches, with the ways in which it can go wrong, behind one face."""

from pathlib import Path
from typing import Protocol

from coordinator.capacity.driver import Driver, State
from coordinator.capacity.programs import Programs
from coordinator.capacity.simulated import Fault, Simulated, Wrong
from coordinator.core.capacity_orders import Verb
from tests.capacity.site import Site

NODES = ("n01", "n02")


class World(Protocol):
    """`up` and `down` are the verbs that its driver knows. `can_see`: its driver can tell how nodes
    are, so that a lie is found out."""

    driver: Driver
    nodes: tuple[str, ...]
    up: Verb
    down: Verb
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
