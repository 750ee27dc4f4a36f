"""How many agents are let in each second, and the line in which the others stand.

Problem: when this coordinator restarts, or a switch does, ten thousand agents dial within seconds.
Each hello is work (a node joins, what it runs is compared, its checkpoints are looked through), and
those who are in already wait behind it while their leases run. To send the rest away with an
appointment is worse: it costs a second connection, which is dearer than a hello, and a machine that
answers fewer of them than it gives appointments falls behind. Then everybody comes too late, gets
another appointment, and all that is done is to refuse.

How: there are slots, `hellos_per_s` of them, one behind the other (the virtual scheduling of ITU-T
I.371). Slots of the last second that nobody has used are free at once, so a small fleet waits for
nobody. A hello that finds none free stands in line on its open stream, and is let in when its turn
comes, in order, however long the machine takes: an agent connects once and says hello once. It is
told for about how long, so that it takes the silence for what it is. Who breaks the stream loses
the place.
"""

from dataclasses import dataclass, field

from coordinator.core.messages import Hello

# Slots that nobody has used are kept for so long.
BURST_MS = 1_000
# Nobody is told to wait longer in one piece; who still stands in line then is told again.
WAIT_MS_MAX = 600_000


@dataclass(slots=True)
class Waiting:
    """`told_ms`: until when it was told to wait."""

    session: int
    hello: Hello
    told_ms: int


@dataclass(slots=True)
class Admission:
    """`free_us` is the first slot that nobody has had, in microseconds, so that slots of any rate
    are exact enough; the first in line gets it. `line` is by node, `sessions` says whose one is."""

    free_us: int = -BURST_MS * 1_000
    line: dict[str, Waiting] = field(default_factory=dict)
    sessions: dict[int, str] = field(default_factory=dict)


def take_slot(admission: Admission, now_ms: int, hellos_per_s: int) -> bool:
    """Whether one was free; then it is no more."""
    slot_us = _next_us(admission, now_ms)
    if slot_us > now_ms * 1_000:
        return False
    admission.free_us = slot_us + 1_000_000 // hellos_per_s
    return True


def wait_ms(admission: Admission, now_ms: int, place: int, hellos_per_s: int) -> int:
    """When the slot comes for whoever has so many before it in line; at least a millisecond."""
    slot_us = _next_us(admission, now_ms) + place * (1_000_000 // hellos_per_s)
    return min(WAIT_MS_MAX, max(1, -((now_ms * 1_000 - slot_us) // 1_000)))


def stand(admission: Admission, session: int, hello: Hello, told_ms: int) -> int | None:
    """At the end of the line, or in the place that the node has. Returns the session that had it,
    if that was another one."""
    if admission.sessions.get(session) != hello.node:
        leave(admission, session)
    before = admission.line.get(hello.node)
    admission.line[hello.node] = Waiting(session, hello, told_ms)
    admission.sessions[session] = hello.node
    if before is None or before.session == session:
        return None
    del admission.sessions[before.session]
    return before.session


def leave(admission: Admission, session: int) -> Waiting | None:
    """Who stood in line there, if somebody did."""
    node = admission.sessions.pop(session, None)
    return None if node is None else admission.line.pop(node)


def first(admission: Admission) -> Waiting:
    """Takes it out of the line, which must not be empty."""
    waiting = admission.line.pop(next(iter(admission.line)))
    del admission.sessions[waiting.session]
    return waiting


def _next_us(admission: Admission, now_ms: int) -> int:
    return max(admission.free_us, (now_ms - BURST_MS) * 1_000)
