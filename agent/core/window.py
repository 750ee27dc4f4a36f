"""What the GPUs were like between two reports: the last reading of each, with how low and how high
its figures were in all of them, and their mean.

Problem: read once a second and told once in five, four readings of five would leave no trace, and
the one that is told may be the one that is not typical. A reading that is only repeated, since
readings are slow by order, must not count again. And a GPU that was read within the window was not
silent in it, though the last try has failed: how often it was read is told, too.
"""

from dataclasses import dataclass, field, replace

from agent.core.values import GpuSample, GpuWindow, HostSample, Sample, Spread

FIGURES = ("utilization_ratio", "memory_used_bytes", "temperature_celsius", "power_mw")


@dataclass(slots=True)
class _Sum:
    least: float
    most: float
    total: float
    count: int = 1

    def add(self, value: float) -> None:
        self.least = min(self.least, value)
        self.most = max(self.most, value)
        self.total += value
        self.count += 1


@dataclass(slots=True)
class _Tally:
    """Of one GPU."""

    readings: int = 0
    sums: dict[str, _Sum] = field(default_factory=dict)

    def add(self, read: GpuSample) -> None:
        self.readings += 1
        for name in FIGURES:
            value = getattr(read, name)
            if value is None:
                continue
            known = self.sums.get(name)
            if known is None:
                self.sums[name] = _Sum(value, value, value)
            else:
                known.add(value)

    def window(self) -> GpuWindow:
        spreads = {
            name: Spread(one.least, one.total / one.count, one.most)
            for name, one in self.sums.items()
        }
        return GpuWindow(self.readings, **spreads)


class Window:
    """Readings since the last report, added up. It has as many tallies as there are GPUs."""

    def __init__(self) -> None:
        self._last: Sample | None = None
        self._tallies: dict[str, _Tally] = {}

    def clear(self) -> None:
        self._last, self._tallies = None, {}

    def add(self, sample: Sample) -> None:
        self._last = sample
        if sample.reading.rate == "off":
            return
        for read in sample.gpus:
            if not read.unread and read.age_ms == 0:
                self._tallies.setdefault(read.uuid, _Tally()).add(read)

    def take(self) -> tuple[HostSample, tuple[GpuSample, ...]] | None:
        """The host and its GPUs as they were last, and a new window begins; `None`: nothing was
        read in this one."""
        if self._last is None:
            return None
        sample, tallies = self._last, self._tallies
        self.clear()
        gpus = tuple(
            replace(read, window=tallies[read.uuid].window()) if read.uuid in tallies else read
            for read in sample.gpus
        )
        return sample.host, gpus
