"""What is durable of a node's power, and what it means for those who look at the node.

Problem: a node that was switched off says nothing, and nor does one that has died. Only a record of
what was ordered tells them apart, and it must outlive the coordinator: else its successor mourns
every node that sleeps, or orders twice what was ordered once. So each node has its power phase in
its own record, with a count of changes: node and count together are the key of the order that
follows from the phase, and the same phase makes the same order again.
"""

from dataclasses import dataclass

from coordinator.core.capacity_model import Power, Source

# Boot times of one node that are kept: enough for a p95 of a fleet's worth of like nodes, and a
# node whose firmware was mended is believed after so many.
BOOTS_MAX = 16
# Starts that are kept. Whoever has been switched on oftener than so in a day is long beyond every
# limit that a plan may have.
STARTS_MAX = 16
DAY_MS = 86_400_000
# After an order off that came to nothing (no driver knows the node, its controller is broken) the
# next one waits for so long, twice as long each time: else it would take the place of every other
# node's, for ever. Once a day is often enough to see that somebody has mended it.
REFUSED_MS = 3_600_000
REFUSED_MS_MAX = DAY_MS
# An order to delete a rented node that had no turn is given again so many times, each after twice
# as long: with the default of a minute that is four hours, and then a person is told.
POSTPONED_MAX = 8
# What is not begun within two deadlines of its driver is never begun, and what is has ended after a
# third (`coordinator/capacity/actuator.py`); ours is longer than each of them. So after four of
# ours nothing comes of an order any more, and whose driver has said no word takes work again.
UNANSWERED_RATIO = 4
# On purpose there is no word of it, or need not be.
SILENT = (Power.STOPPING, Power.OFF, Power.STARTING, Power.FAILED)
# It has no power, as far as we know.
DARK = (Power.OFF, Power.STARTING, Power.FAILED)


@dataclass(frozen=True, slots=True)
class PowerOptions:
    """What an operator may set. `acts`: there is somebody who switches nodes; without, nothing is
    ever ordered. A start that has not led to a hello within `boot_deadline_ms` has failed, and is
    tried `boot_retries` times more, each `boot_retry_ms` after the last one failed at the
    earliest. A node that is heard `stop_deadline_ms` after it was ordered off stays on, once the
    driver has spoken: until then it may still be switched off."""

    acts: bool = False
    boot_deadline_ms: int = 1_200_000
    boot_retries: int = 2
    boot_retry_ms: int = 60_000
    stop_deadline_ms: int = 900_000
    # Of a node model that has never been started: a server's firmware tests its memory for as long.
    boot_guess_ms: int = 540_000

    @property
    def unanswered_ms(self) -> int:
        """After so long nothing comes any more of an order off that no driver has answered."""
        return self.stop_deadline_ms * (UNANSWERED_RATIO if self.acts else 1)


@dataclass(frozen=True, slots=True)
class Rent:
    """A node was paid for by the hour, from the order until it was gone; `end_unix_ms` is `None`
    while it is. `usd_per_h` is of the whole node."""

    begin_unix_ms: int
    usd_per_h: float
    end_unix_ms: int | None = None


@dataclass(frozen=True, slots=True)
class NodePower:
    """`changes` counts changes of phase; `since_unix_ms` is when the last one was. `ours`: we have
    closed the node for this, and open it when it is back; a person who closes it meanwhile makes it
    his. `reason` is why it is in its phase, a sentence without its subject. `starts_unix_ms` are
    the last starts, `boots_ms` how long the last ones took, both oldest first;
    `boot_failures` are those in a row. Of a rented node `gpu_type` and `gpus` are what was ordered,
    and `rents` those of the last day, oldest first."""

    phase: Power = Power.ON
    changes: int = 0
    since_unix_ms: int = 0
    ours: bool = False
    reason: str = ""
    starts_unix_ms: tuple[int, ...] = ()
    boots_ms: tuple[int, ...] = ()
    boot_failures: int = 0
    source: Source = Source.OWNED
    gpu_type: str = ""
    gpus: int = 0
    rents: tuple[Rent, ...] = ()


def is_gone(power: NodePower) -> bool:
    """It is a name alone, for a node that could be rented: there is no such machine."""
    return power.source is Source.BURST and power.phase is Power.OFF


def rents_from(power: NodePower, unix_ms: int, usd_per_h: float | None) -> tuple[Rent, ...]:
    """Those of the last day, and the one that begins now unless one goes on; of an own node none.
    Without a price it is as the last one was."""
    if power.source is not Source.BURST or (power.rents and power.rents[-1].end_unix_ms is None):
        return power.rents
    kept = [each for each in power.rents if (each.end_unix_ms or 0) > unix_ms - DAY_MS]
    if usd_per_h is None:
        usd_per_h = power.rents[-1].usd_per_h if power.rents else 0.0
    return (*kept, Rent(unix_ms, usd_per_h))


def silent(power: NodePower) -> bool:
    """Nobody need be alarmed when such a node is not heard."""
    return power.phase in SILENT


def describe(power: NodePower, boot_ms: int) -> str:
    """Why the node takes no work, in one sentence; empty where power is no reason."""
    match power.phase:
        case Power.ON:
            return ""
        case Power.LEAVING:
            return f"it is emptied to be switched off: {power.reason}"
        case Power.STOPPING:
            return f"it is being switched off: {power.reason}"
        case Power.OFF:
            return f"off: {power.reason}; starts within about {minutes(boot_ms)}"
        case Power.STARTING:
            return f"it is starting: {power.reason}; takes about {minutes(boot_ms)}"
        case Power.FAILED:
            return f"it did not start: {power.reason}"


def minutes(duration_ms: int) -> str:
    """For people: "9 min"; "40 s" below two of them."""
    if duration_ms < 120_000:
        return f"{-(-duration_ms // 1000)} s"
    return f"{-(-duration_ms // 60_000)} min"
