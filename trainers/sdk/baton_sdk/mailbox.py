"""The pigeonholes between a training loop and the thread that talks to the agent.

Problem: the loop produces news at any rate, and the agent may be away for minutes. A queue of
everything grows without bound, and a full queue that blocks stops the training. So each kind of
news has the memory that it deserves: of progress only the latest counts; milestones are few and
each is kept until it was sent; of sections the present one counts, and how many have ended since
one was told; checkpoints are kept until the agent answers, because it owns their directories only
from then on, and are sent again on each new connection until then.

Every method is short, takes the one lock, and does no input or output except ``discard``, which
removes the directory of a checkpoint that was superseded before any agent heard of it: nobody
else would, and a disk that fills up while the agent is away would end the training.
"""

import json
import math
import operator
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import SupportsFloat, SupportsIndex

LINE_BYTES_MAX = 64 * 1024
"""The contract's limit on one line, either way."""

METRICS_MAX = 64
"""Metrics in one progress line: far above what a page can show, far below the line limit."""

TIMES_MAX = 16
"""Names of times in one progress line; the contract knows five."""

SECONDS_MAX = 1e9
"""What the agent takes: thirty years; no process lives longer."""

METRIC_NAME_CHARACTERS_MAX = 100
"""64 names of 100 characters and their numbers stay under a fifth of the line limit."""

REASON_CHARACTERS_MAX = 500
"""What the agent takes of a sentence; people read no more."""

MILESTONES_MAX = 64
"""The contract names four; more than 64 is a loop that mistakes milestones for progress."""

UNANSWERED_MAX = 8
"""Checkpoints that no agent has answered. Each holds a directory on disk, so this bounds the
disk space that an absent agent can cost."""

SETTLED_MAX = 64
"""Stored checkpoints whose commit is still awaited; older tickets just stay `stored`."""

PROGRESS_INTERVAL_S = 0.2
"""Five progress lines a second are more than a person or a scheduler can use."""


class TicketState(Enum):
    """How far a checkpoint has come."""

    PENDING = "pending"
    STORED = "stored"
    COMMITTED = "committed"
    REFUSED = "refused"


class Ticket:
    """A checkpoint on its way. Made by ``Session.checkpoint``; readable from any thread."""

    def __init__(
        self,
        ticket_id: int,
        path: Path | None,
        step: int,
        *,
        sequence: int | None = None,
        parts: int = 1,
    ) -> None:
        self.id = ticket_id
        self.path = path
        """The directory; None for a capture in the slab, which has a ``sequence`` instead."""
        self.step = step
        self.sequence = sequence
        self.parts = parts
        """How many ranks hand over a part of this step; 1 for a whole checkpoint."""
        self.state = TicketState.PENDING
        self.digest = ""
        self.reason = ""
        self._answered = threading.Event()

    def wait_stored(self, timeout_s: float) -> bool:
        """Wait until the agent has hashed the checkpoint and made it durable on this node.

        True if it is stored or committed; False after ``timeout_s`` seconds, or as soon as it is
        refused (then ``reason`` says why). Never raises because the agent is away.
        """
        self._answered.wait(max(0.0, timeout_s))
        return self.state in (TicketState.STORED, TicketState.COMMITTED)

    def settle(self, state: TicketState, *, digest: str = "", reason: str = "") -> None:
        """Move forward; a late `stored` does not undo a `committed`."""
        if self.state in (TicketState.COMMITTED, TicketState.REFUSED):
            return
        self.digest = digest or self.digest
        self.reason = reason
        self.state = state
        self._answered.set()


class Mailbox:
    """All that waits to be sent, and the tickets that wait for an answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.nudge: Callable[[], None] = _nobody
        """Wakes whoever sends; the link puts itself here."""
        self._progress: dict[str, object] | None = None
        self._progress_sent_at_s = -math.inf
        self._section = ""
        self._section_unix_ms = 0
        self._sections_ended = 0
        self._section_unsent = False
        self._sections_wanted = False
        self._section_sent_at_s = -math.inf
        self._heeds_saves = False
        self._heeds_saves_unsent = False
        self._saves_wanted = False
        self._leaving: dict[str, object] | None = None
        self._leaving_unsent = False
        self._leaving_wanted = False
        self._milestones: OrderedDict[str, dict[str, object]] = OrderedDict()
        self._milestones_sent: set[str] = set()
        self._unanswered: OrderedDict[int, Ticket] = OrderedDict()
        self._unsent: set[int] = set()
        self._heard_of: set[int] = set()
        self._settled: OrderedDict[int, Ticket] = OrderedDict()
        self._last_id = 0

    def put_progress(
        self,
        step: SupportsIndex,
        total_steps: SupportsIndex | None,
        metrics: Mapping[str, SupportsFloat] | None,
        seconds: Mapping[str, SupportsFloat] | None = None,
    ) -> bool:
        """Replace whatever progress was waiting; True if none was, so that the link must be woken.
        Metrics that are no finite number are left out: JSON has no word for them. So are times that
        are no seconds: they would spoil every sum. Numbers of numpy and torch are made Python's
        here, in the caller's thread, where a mistake can be raised: `TypeError` for a step that is
        no whole number."""
        message: dict[str, object] = {"type": "progress", "step": operator.index(step)}
        if total_steps is not None:
            message["total_steps"] = operator.index(total_steps)
        if metrics:
            numbers = [(_label(name), float(value)) for name, value in metrics.items()]
            finite = [(name, value) for name, value in numbers if math.isfinite(value)]
            message["metrics"] = dict(finite[:METRICS_MAX])
        if seconds is not None:
            times = {_label(name): float(value) for name, value in seconds.items()}
            known = [pair for pair in times.items() if 0 <= pair[1] <= SECONDS_MAX]
            message["time"] = dict(known[:TIMES_MAX])
        with self._lock:
            was_empty = self._progress is None
            self._progress = message
        return was_empty

    def put_section(self, name: str, unix_ms: int) -> bool:
        """The training is in this section from now on, in none if it is empty. True if the link
        must be woken: a loop of short steps wakes it as rarely as it may send."""
        name = _label(name) if name else ""
        with self._lock:
            self._sections_ended += 1 if self._section else 0
            self._section, self._section_unix_ms = name, unix_ms
            was_sent = not self._section_unsent
            self._section_unsent = True
        return was_sent

    def put_milestone(self, name: str, unix_ms: int) -> None:
        """Keep a milestone until it was sent; the second of a name is ignored."""
        name = _label(name)
        with self._lock:
            if name in self._milestones or name in self._milestones_sent:
                return
            if len(self._milestones) + len(self._milestones_sent) >= MILESTONES_MAX:
                return
            self._milestones[name] = {"type": "milestone", "name": name, "unix_ms": unix_ms}

    def put_heeds_saves(self) -> None:
        """The training looks for requests to save; each agent is told once."""
        with self._lock:
            self._heeds_saves = self._heeds_saves_unsent = True

    def put_leaving(self, status: int, reason: str) -> None:
        """With what status this process will end, and why; each agent is told once."""
        reason = "".join(c for c in " ".join(reason.split()) if c.isprintable())
        told = {"type": "leaving", "status": status, "reason": reason[:REASON_CHARACTERS_MAX]}
        with self._lock:
            self._leaving, self._leaving_unsent = told, True

    def put_checkpoint(
        self,
        path: Path | None,
        step: SupportsIndex,
        *,
        sequence: int | None = None,
        parts: int = 1,
    ) -> Ticket:
        """Keep a checkpoint until it is answered. When too many wait, the oldest that no agent
        has heard of is refused and its directory removed; failing that, the new one is.

        A capture has no directory but a ``sequence``; the slots of its slab bound how many wait."""
        whole_step = operator.index(step)
        with self._lock:
            self._last_id += 1
            ticket = Ticket(self._last_id, path, whole_step, sequence=sequence, parts=parts)
            self._unanswered[ticket.id] = ticket
            self._unsent.add(ticket.id)
            victim = None
            if len(self._unanswered) > UNANSWERED_MAX:
                victim_id = next(i for i in self._unanswered if i not in self._heard_of)
                victim = self._unanswered.pop(victim_id)
                self._unsent.discard(victim_id)
        if victim is not None:
            self._discard(victim)
        return ticket

    def new_connection(self) -> None:
        """Whatever was not answered is to be sent once more."""
        with self._lock:
            self._unsent = set(self._unanswered)
            # For whoever has just come the section begins now, and nothing of before counts.
            self._section_unsent, self._sections_ended = bool(self._section), 0
            self._section_sent_at_s, self._sections_wanted = -math.inf, False
            self._heeds_saves_unsent, self._saves_wanted = self._heeds_saves, False
            self._leaving_unsent, self._leaving_wanted = self._leaving is not None, False

    def refuse_captures(self, reason: str) -> None:
        """The agent that is there now cannot read them: their slots are free again, and the next
        checkpoint is a directory."""
        with self._lock:
            tickets = [t for t in self._unanswered.values() if t.path is None]
            for ticket in tickets:
                del self._unanswered[ticket.id]
                self._unsent.discard(ticket.id)
                self._heard_of.discard(ticket.id)
        for ticket in tickets:
            ticket.settle(TicketState.REFUSED, reason=reason)

    def welcomed(self, message: Mapping[str, object]) -> None:
        """An agent that knows nothing of sections, of requests to save, or of leaving, says nothing
        of them, and is told nothing."""
        with self._lock:
            self._sections_wanted = message.get("sections") is True
            self._saves_wanted = message.get("saves") is True
            self._leaving_wanted = message.get("leaving") is True

    def take(self, now_s: float, *, everything: bool = False) -> list[bytes]:
        """The lines to send now. ``everything`` ignores the rate limit of progress."""
        with self._lock:
            messages = list(self._milestones.values())
            self._milestones_sent.update(self._milestones)
            self._milestones.clear()
            if self._heeds_saves_unsent and self._saves_wanted:
                messages.append({"type": "heeds_saves"})
                self._heeds_saves_unsent = False
            for ticket_id in sorted(self._unsent):
                ticket = self._unanswered[ticket_id]
                messages.append(_offer(ticket))
            self._heard_of |= self._unsent
            self._unsent.clear()
            wanted = self._section_unsent and self._sections_wanted
            if wanted and (everything or now_s >= self._section_due_s):
                messages.append(self._told_section())
                self._section_sent_at_s = now_s
            due = everything or now_s - self._progress_sent_at_s >= PROGRESS_INTERVAL_S
            if self._progress is not None and due:
                messages.append(self._progress)
                self._progress = None
                self._progress_sent_at_s = now_s
            if self._leaving is not None and self._leaving_unsent and self._leaving_wanted:
                messages.append(self._leaving)
                self._leaving_unsent = False
        return [encode(message) for message in messages]

    def seconds_until_due(self, now_s: float) -> float | None:
        """How long until something may be sent; None while there is nothing."""
        with self._lock:
            heeds_saves = self._heeds_saves_unsent and self._saves_wanted
            leaving = self._leaving_unsent and self._leaving_wanted
            if self._milestones or self._unsent or heeds_saves or leaving:
                return 0.0
            due_s = []
            if self._progress is not None:
                due_s.append(self._progress_sent_at_s + PROGRESS_INTERVAL_S)
            if self._section_unsent and self._sections_wanted:
                due_s.append(self._section_due_s)
            return max(0.0, min(due_s) - now_s) if due_s else None

    @property
    def _section_due_s(self) -> float:
        return self._section_sent_at_s + PROGRESS_INTERVAL_S

    def _told_section(self) -> dict[str, object]:
        count, self._sections_ended, self._section_unsent = self._sections_ended, 0, False
        return {
            "type": "section",
            "name": self._section,
            "count": count,
            "unix_ms": self._section_unix_ms,
        }

    def answer(self, message: Mapping[str, object]) -> None:
        """Apply `stored`, `committed` or `refused`. Unknown ids are old news and are ignored."""
        ticket_id = message.get("id")
        if not isinstance(ticket_id, int):
            return
        state = TicketState(message["type"])
        with self._lock:
            ticket = self._unanswered.pop(ticket_id, None) or self._settled.pop(ticket_id, None)
            self._unsent.discard(ticket_id)
            self._heard_of.discard(ticket_id)
            if ticket is not None and state is TicketState.STORED:
                self._settled[ticket_id] = ticket
                if len(self._settled) > SETTLED_MAX:
                    self._settled.popitem(last=False)
        if ticket is not None:
            digest, reason = message.get("digest", ""), message.get("reason", "")
            ticket.settle(state, digest=str(digest), reason=str(reason))

    @staticmethod
    def _discard(ticket: Ticket) -> None:
        ticket.settle(
            TicketState.REFUSED,
            reason=f"superseded: {UNANSWERED_MAX} newer checkpoints wait for an absent agent",
        )
        if ticket.path is not None:
            shutil.rmtree(ticket.path, ignore_errors=True)


def _offer(ticket: Ticket) -> dict[str, object]:
    if ticket.path is None:
        offered: dict[str, object] = {"slab": ticket.sequence}
    else:
        offered = {"path": str(ticket.path)}
    if ticket.parts > 1:
        offered["parts"] = ticket.parts
    return {"type": "checkpoint", "id": ticket.id, **offered, "step": ticket.step}


def _nobody() -> None:
    """Wakes nobody: there is no link."""


def encode(message: Mapping[str, object]) -> bytes:
    """One line of the contract."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _label(name: str) -> str:
    """A name as the agent takes it: printable, not empty, not endless."""
    printable = "".join(character for character in name if character.isprintable())
    return printable[:METRIC_NAME_CHARACTERS_MAX] or "unnamed"
