"""What was read of each GPU last, by class, and how the readings went.

Problem: three classes of readings come at three paces, and whoever looks wants one picture of a
GPU. So the last usage and inventory are kept, and put beside each sample, but not beside one that
says that the GPU cannot be read, nor longer than three of their periods: what is old is unknown.

The same holds for samples where an operator has slowed them down: between two readings the last one
is shown with its age, and no older one than its period.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from agent.core.values import GpuInventory, GpuSample, GpuUsage, Reading
from agent.telemetry.schedule import INVENTORY, OFF, PERIODS_MS, SAMPLE, USAGE

# A reading may be missed, or two, before what it said is not known any more.
PERIODS_KEPT: Final = 3
# Drivers have some hundred functions and thirty codes; of those that fail, a few. More is a fault
# in the count, and the first ones stay.
FAILURES_MAX: Final = 256


class Details:
    """Of one box. `rate` is what an operator may change at any time, from any thread."""

    def __init__(self, rate: str) -> None:
        self.rate = rate
        self._samples: dict[str, tuple[int, GpuSample]] = {}
        self._usages: dict[str, tuple[int, GpuUsage]] = {}
        self._inventories: dict[str, tuple[int, GpuInventory]] = {}
        self._failures: Counter[tuple[str, str]] = Counter()
        self._misses: Counter[str] = Counter()
        self._durations_ms: dict[str, int] = {}

    def take_usage(self, usage: GpuUsage, now_ms: int) -> None:
        self._usages[usage.uuid] = now_ms, usage

    def take_inventory(self, inventory: GpuInventory, now_ms: int) -> None:
        self._inventories[inventory.uuid] = now_ms, inventory

    def take_samples(self, samples: Iterable[GpuSample], now_ms: int) -> None:
        self._samples.update({sample.uuid: (now_ms, sample) for sample in samples})

    def failed(self, failures: Iterable[tuple[str, str, int]]) -> None:
        for call, code, count in failures:
            if (call, code) in self._failures or len(self._failures) < FAILURES_MAX:
                self._failures[call, code] += count

    def asked(self, kind: str, duration_ms: int, *, in_time: bool) -> None:
        self._durations_ms[kind] = duration_ms
        self._misses[kind] += not in_time

    def between(self, uuid: str, rate: str, now_ms: int) -> GpuSample:
        """For a GPU that is not to be read now: the last sample while it is within its period; else
        nothing is known, and nothing is wrong."""
        read_ms, sample = self._samples.get(uuid, (None, GpuSample(uuid)))
        period_ms = PERIODS_MS[rate].get(SAMPLE)
        if read_ms is None or period_ms is None or now_ms - read_ms > period_ms:
            return GpuSample(uuid)
        return replace(sample, age_ms=now_ms - read_ms)

    def beside(self, sample: GpuSample, rate: str, now_ms: int) -> GpuSample:
        """The sample with what is known beside it."""
        if sample.error or rate == OFF:
            return sample
        usage_ms, usage = self._usages.get(sample.uuid, (0, None))
        inventory_ms, inventory = self._inventories.get(sample.uuid, (0, None))
        periods = PERIODS_MS[rate]
        if now_ms - usage_ms > PERIODS_KEPT * periods[USAGE]:
            usage = None
        if now_ms - inventory_ms > PERIODS_KEPT * periods[INVENTORY]:
            inventory = None
        condition = sample.condition
        if condition is not None and inventory is not None:
            condition = replace(
                condition,
                rows_failed=inventory.remapped_rows_failed,
                rows_pending=inventory.remapped_rows_pending,
            )
        return replace(sample, condition=condition, usage=usage, inventory=inventory)

    def reading(self) -> Reading:
        failures = tuple((call, code, count) for (call, code), count in self._failures.items())
        misses = tuple((kind, self._misses[kind]) for kind in (SAMPLE, USAGE, INVENTORY))
        return Reading(self.rate, failures, misses, tuple(self._durations_ms.items()))
