"""How long a part of a training may take: limits that are learned from the attempt itself.

Problem: a trainer that waits for a collective that never comes, or for a file server, looks like
one that works; it holds its GPUs until a person looks. One fixed limit for all trainings is either
so long that hours are lost, or shorter than somebody's honest step.

How: a trainer says which section it has entered (init, compile, step, eval, save, or a name of its
own), each rank on a connection of its own. From one word to the next is a duration. Until enough
of them are known a section has a generous limit of its own (`UNLEARNED_MS`); from then on it is

    max(floor, FACTOR * the 95th percentile, LONGEST_FACTOR * the longest)

over the last `SAMPLES_MAX` durations. The percentile is what the trainer usually takes, whatever
the tail; ten times that is beyond noise (a busy host and a slow disk double a step, not more). The
longest has been survived once and may come again, so it alone is never a reason to kill. The same
shape, a multiple of what was seen with a floor below, is that of the retransmission timer of TCP
(RFC 6298), with quantiles for its mean and deviation, because steps have heavier tails.

Times are the caller's monotonic milliseconds. Nothing here acts; `hangs.py` does.
"""

import math
from collections import deque
from dataclasses import dataclass, field, replace

# Durations of one section that are remembered: an hour or so of steps that take seconds; long
# enough to hold what happens every few hundred steps.
SAMPLES_MAX = 1_024
# Before so many a percentile says nothing. The first steps compile, fill caches and tune kernels.
SAMPLES_MIN = 8
PERCENTILE = 0.95
FACTOR = 10
LONGEST_FACTOR = 3
# Of names that a trainer thinks up itself; what comes beyond has no limit.
NAMES_MAX = 32
# Ranks of one box with a reconnect on its way, as the socket allows.
SOURCES_MAX = 16

_MINUTE_MS = 60_000
# What is allowed before anything is known. torch gives up on a collective after 10 (NCCL) or 30
# minutes (others) by itself; downloading and compiling a large model takes longer than that.
UNLEARNED_MS = {
    "init": 60 * _MINUTE_MS,
    "compile": 60 * _MINUTE_MS,
    "step": 30 * _MINUTE_MS,
    "eval": 60 * _MINUTE_MS,
    "save": 30 * _MINUTE_MS,
}
UNLEARNED_OTHER_MS = 60 * _MINUTE_MS


@dataclass(slots=True)
class History:
    """The durations of one section. `seen` counts all of them, `recent_ms` holds the last ones,
    where several short ones that were told in one word stand as one, their mean."""

    seen: int = 0
    recent_ms: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES_MAX))

    def add(self, total_ms: int, count: int) -> None:
        """`count` of them took `total_ms` together."""
        self.seen += count
        self.recent_ms.append(total_ms / count)


def limit_ms(name: str, history: History | None, floor_ms: int) -> int:
    """How long this section may take, never less than `floor_ms`."""
    if history is None or history.seen < SAMPLES_MIN:
        return max(floor_ms, UNLEARNED_MS.get(name, UNLEARNED_OTHER_MS))
    ordered = sorted(history.recent_ms)
    usual_ms = ordered[math.ceil(PERCENTILE * len(ordered)) - 1]
    return max(floor_ms, math.ceil(FACTOR * usual_ms), math.ceil(LONGEST_FACTOR * ordered[-1]))


@dataclass(frozen=True, slots=True)
class Present:
    """Where one connection's trainer is. `whole`: we have seen all of it since it was entered.
    `advanced_ms`: when it last got further."""

    name: str
    since_ms: int
    whole: bool = True
    advanced_ms: int = 0


@dataclass(frozen=True, slots=True)
class Overdue:
    """A section that takes longer than it may."""

    name: str
    taken_ms: int
    limit_ms: int


@dataclass(slots=True)
class Sections:
    """Of one attempt: where each of its connections is, and what each section has taken so far."""

    present: dict[int, Present] = field(default_factory=dict)
    histories: dict[str, History] = field(default_factory=dict)

    def enter(self, now_ms: int, source: int, name: str, count: int) -> None:
        """The trainer behind connection `source` is in `name` now (empty: in none), after `count`
        entries since it last said so. No count: it says again what it had said to nobody."""
        before = self.present.pop(source, None)
        if before is not None and before.whole and count > 0:
            self._learn(before.name, now_ms - before.since_ms, count)
        if name and len(self.present) < SOURCES_MAX:
            self.present[source] = Present(name, now_ms)

    def leave(self, source: int) -> None:
        """The connection has ended: nothing is known of it, and nothing learned."""
        self.present.pop(source, None)

    def restart(self, now_ms: int) -> None:
        """What has passed until now counts for nobody: time to judge by begins again."""
        for source, present in self.present.items():
            self.present[source] = Present(present.name, now_ms, whole=False)

    def advance(self, now_ms: int) -> None:
        """Somebody has got further: nobody is judged by what was before, and how long it all takes
        is learned as ever."""
        for source, present in self.present.items():
            self.present[source] = replace(present, advanced_ms=now_ms)

    def overdue(self, now_ms: int, floor_ms: int) -> Overdue | None:
        """The section that has been over its limit for the longest time, if there is one."""
        found: list[Overdue] = []
        for present in self.present.values():
            limit = limit_ms(present.name, self.histories.get(present.name), floor_ms)
            taken_ms = now_ms - max(present.since_ms, present.advanced_ms)
            if taken_ms > limit:
                found.append(Overdue(present.name, taken_ms, limit))
        return max(found, key=lambda one: one.taken_ms - one.limit_ms, default=None)

    def _learn(self, name: str, total_ms: int, count: int) -> None:
        history = self.histories.get(name)
        if history is None and len(self.histories) < NAMES_MAX:
            history = self.histories[name] = History()
        if history is not None:
            history.add(max(0, total_ms), count)
