"""How many agents are let in each second, and when the others are to come.

Problem: when this coordinator restarts, or a switch does, ten thousand agents dial within seconds.
Each hello is work (a node joins, what it runs is compared, its checkpoints are looked through), and
those who are in already wait behind it while their leases run. To refuse the rest is not enough:
who hears "later" and nothing else tries again with all the others, and a connection under TLS costs
more than a hello.

How: there are slots, `hellos_per_s` of them, one behind the other (the virtual scheduling of ITU-T
I.371). Slots of the last second that nobody has used are free at once, so a small fleet waits for
nobody. A hello that finds none free gets the next one as an appointment and is told how long to
wait; when it comes then, it is let in. So an agent comes twice, and in order. Who does not keep an
appointment for `LATE_MS` loses it.

Who has an appointment has been heard, and is not lost before it (`leases.expect`).
"""

from dataclasses import dataclass, field

# Slots that nobody has used are kept for so long.
BURST_MS = 1_000
# An agent that was told when to come dials then, which takes five seconds at most, and may have
# been suspended for some.
LATE_MS = 10_000
# No agent waits longer. Whoever would have to has no appointment, and asks again then.
WAIT_MS_MAX = 600_000


@dataclass(slots=True)
class Admission:
    """`free_us` is the first slot that nobody has; `appointments` are slots by node, in order. They
    are microseconds, so that slots of any rate are exact enough. No more are kept than there are
    slots in `WAIT_MS_MAX` and `LATE_MS`."""

    free_us: int = -BURST_MS * 1_000
    appointments: dict[str, int] = field(default_factory=dict)


def ask(admission: Admission, now_ms: int, node: str, hellos_per_s: int) -> int:
    """In how many milliseconds this node is let in; 0: now."""
    now_us = now_ms * 1_000
    _forget_late(admission, now_us)
    slot_us = admission.appointments.get(node)
    if slot_us is None:
        slot_us = max(admission.free_us, now_us - BURST_MS * 1_000)
        if slot_us - now_us > WAIT_MS_MAX * 1_000:
            return WAIT_MS_MAX
        admission.free_us = slot_us + 1_000_000 // hellos_per_s
        admission.appointments[node] = slot_us
    if slot_us <= now_us:
        del admission.appointments[node]
        return 0
    return -((now_us - slot_us) // 1_000)  # rounded up: nobody comes before it is time


def _forget_late(admission: Admission, now_us: int) -> None:
    """Whose time has passed. Each is forgotten once, so this costs nothing to speak of."""
    while admission.appointments:
        node, slot_us = next(iter(admission.appointments.items()))
        if slot_us + LATE_MS * 1_000 >= now_us:
            return
        del admission.appointments[node]
