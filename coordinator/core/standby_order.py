"""The nodes in the order in which each start asks them to be its standby (`standby.py`).

Problem: whoever asks all nodes for each start pays for all of them, and a start changes what two
of them have to do. So the order is kept, and what has changed takes its place anew when somebody
asks.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

# How many attempts a node has, of how many others it has the copies, and its name.
Place = tuple[int, int, str]


class StandbyOrder:
    """The least first. The ranks of a gang stay together, so for them no copies count."""

    def __init__(self) -> None:
        self._stale: dict[str, None] = {}
        self._place_of: dict[str, Place] = {}
        self._places: list[Place] = []
        self._places_of_gangs: list[Place] = []

    def touch(self, node: str) -> None:
        """Its place, or whether it has one, may have changed."""
        self._stale[node] = None

    def places(self, place_of: Callable[[str], Place | None], *, gang: bool) -> Sequence[Place]:
        for node in self._stale:
            before, place = self._place_of.pop(node, None), place_of(node)
            if before is not None:
                del self._places[bisect_left(self._places, before)]
                without = before[0], 0, node
                del self._places_of_gangs[bisect_left(self._places_of_gangs, without)]
            if place is not None:
                self._place_of[node] = place
                insort(self._places, place)
                insort(self._places_of_gangs, (place[0], 0, node))
        self._stale.clear()
        return self._places_of_gangs if gang else self._places
