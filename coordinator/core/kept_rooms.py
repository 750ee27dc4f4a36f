"""The rooms of all nodes that take work, kept from one pass to the next.

Problem: of ten thousand nodes one or two change between two passes, and a pass changes the few that
it places somebody on. Who makes an offer and a room of every node for each start of a job pays for
ten thousand, a tenth of a second of a core that everybody else's events wait for.

How: whoever changes something that an offer is made of says so (`touch`), and only of these nodes
an offer is made again. A room that a pass has changed says so (`Room.changed`) and is opened anew
from its offer before the next one. What a room remembers (`Room.answers`, its box) it keeps.
"""

from collections.abc import Mapping
from itertools import islice

from coordinator.core.capacity_model import Box
from coordinator.core.fragmentation import Mix
from coordinator.core.rooms import Offer, Room, open_room
from coordinator.core.standing import Fleet


class KeptRooms:
    """`stale` are the nodes whose offer may have changed since they were put here; `recallable` the
    jobs that give way within their class in the last pass. `fits` is how soon a node could go on
    with a request (`standby.py`), of those that were asked since they changed. `fleet` is what all
    GPUs here come to (`contenders.py`), until others are here. `boxes` are what a plan of the
    fleet's size sees of those that have not changed since that was looked at, `unboxed` all others
    (`fleet_scaling.py`)."""

    def __init__(self) -> None:
        self.stale: dict[str, None] = {}
        self.fits: dict[str, dict[object, int]] = {}
        self.boxes: dict[str, Box] = {}
        self.unboxed: dict[str, None] = {}
        self.recallable: Mapping[int, None] = {}
        self.fleet: Fleet | None = None
        self._rooms: dict[str, Room] = {}
        self._by_name: list[Room] | None = None
        self._positions: dict[str, int] = {}

    def touch(self, node: str) -> None:
        """Something that its offer is made of may have changed, or its box."""
        self.stale[node] = None
        self.fits.pop(node, None)
        self.boxes.pop(node, None)
        self.unboxed[node] = None

    def take_stale(self, count: int) -> list[str]:
        """So many of them; each is to be `put` or `drop`ped."""
        taken = list(islice(self.stale, count))
        for node in taken:
            del self.stale[node]
        return taken

    def put(self, offer: Offer) -> None:
        known = self._rooms.get(offer.node)
        if known is not None and known.offer == offer:
            return
        self._keep(open_room(offer))

    def drop(self, node: str) -> None:
        """It takes no work now."""
        if self._rooms.pop(node, None) is not None:
            self._by_name = self.fleet = None

    def forget(self, node: str) -> None:
        """There is no such node any more."""
        self.stale.pop(node, None)
        self.fits.pop(node, None)
        self.boxes.pop(node, None)
        self.unboxed.pop(node, None)
        self.drop(node)

    def open(self, mix: Mix) -> list[Room]:
        """All of them by name, as no pass had been."""
        if self._by_name is None:
            self._by_name = [self._rooms[node] for node in sorted(self._rooms)]
            self._positions = {room.offer.node: at for at, room in enumerate(self._by_name)}
        for room in [room for room in self._by_name if room.changed]:
            self._keep(open_room(room.offer))
        for room in self._by_name:
            if room.mix is not mix:
                room.mix = mix
                room.increases.clear()
        return list(self._by_name)

    def _keep(self, room: Room) -> None:
        node = room.offer.node
        before = self._rooms.get(node)
        if before is not None and before.offer.gpus == room.offer.gpus:
            room.stock = before.stock
        else:
            self.fleet = None
        if self._by_name is not None and before is not None:
            self._by_name[self._positions[node]] = room
        else:
            self._by_name = None
        self._rooms[node] = room
