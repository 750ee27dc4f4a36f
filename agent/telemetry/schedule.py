"""Decides what is read of which GPU now. Pure: time is an argument.

Problem: what a reading costs is not our CPU time but the driver's lock, which trainers wait for. So
things are read in three classes, as often as they are worth it: the *sample* once a second, the
*usage* (processes, errors, the driver's own samples) every ten seconds, the *inventory* (what the
GPU is and how it is connected) once a minute. An operator may ask for less while a benchmark runs,
or for more while a fault is hunted. `tests/agent/test_classes.py` holds the rate `normal` to less
than five milliseconds of the lock for each GPU and second.

How: a GPU is due when a period of its class has begun since it was read last. Periods of the GPUs
of a box begin at different times, so that they are not all asked at the same moment; what was never
read is due at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

SAMPLE: Final = "sample"
USAGE: Final = "usage"
INVENTORY: Final = "inventory"

OFF: Final = "off"
# By rate and class, in milliseconds; 0: with every reading (`sample_interval_ms`).
PERIODS_MS: Final[Mapping[str, Mapping[str, int]]] = {
    OFF: {},
    "slow": {SAMPLE: 10_000, USAGE: 60_000, INVENTORY: 600_000},
    "normal": {SAMPLE: 0, USAGE: 10_000, INVENTORY: 60_000},
    "watch": {SAMPLE: 0, USAGE: 2_000, INVENTORY: 10_000},
}


@dataclass(slots=True)
class Schedule:
    """When each GPU was read last, by class."""

    read_ms: dict[tuple[str, str], int] = field(default_factory=dict)

    def due(self, rate: str, kind: str, now_ms: int, uuids: Sequence[str]) -> tuple[str, ...]:
        """Those of `uuids` that are to be read now, in their order."""
        period_ms = PERIODS_MS[rate].get(kind)
        if period_ms is None:
            return ()
        if period_ms == 0:
            return tuple(uuids)
        places = {uuid: place for place, uuid in enumerate(sorted(uuids))}
        return tuple(
            uuid
            for uuid in uuids
            if self._is_due(kind, uuid, now_ms, period_ms, places[uuid] * period_ms // len(uuids))
        )

    def read(self, kind: str, uuids: Sequence[str], now_ms: int) -> None:
        """These were asked for, whether or not they answered."""
        self.read_ms.update(dict.fromkeys(((kind, uuid) for uuid in uuids), now_ms))

    def _is_due(self, kind: str, uuid: str, now_ms: int, period_ms: int, offset_ms: int) -> bool:
        last_ms = self.read_ms.get((kind, uuid))
        if last_ms is None:
            return True
        return (now_ms - offset_ms) // period_ms > (last_ms - offset_ms) // period_ms
