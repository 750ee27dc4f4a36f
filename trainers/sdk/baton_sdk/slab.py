"""Memory that the agent owns and the training writes into: a capture survives the trainer's death.

Problem: a checkpoint that is written to files holds the training up for as long as the disk takes,
and what was not written when the process is killed is lost with it. Memory of our own is fast and
dies with us. So the agent makes a piece of anonymous memory (memfd_create(2)) and passes us its
descriptor (SCM_RIGHTS, unix(7)). We map it once, touch every page once, and reuse it: fresh pages
cost several times what the copy costs. The agent reads it whenever it likes, also when we are gone;
when the agent is gone, we hold the memory and hand the descriptor to the next one.

Layout, version 1, the same in ``agent/slabs.py``:

    0        header 0: what slot 0 holds
    32 KiB   header 1: what slot 1 holds
    64 KiB   slot 0, then slot 1 (or one slot alone, where two do not fit the host's memory)

    header: magic 8 bytes | version u32 | document bytes u32 | BLAKE2b-128 | document (JSON)
    document: {"sequence", "slot", "step", "files": [[name, offset, bytes, edges], ...], "parts",
               "written": {name: number}}

``parts`` is there where the capture is one of several, so that one that is found in the memory of
a dead rank counts as what it was meant to be. ``written`` names files that may lie in this slot
unchanged since an earlier capture; before their bytes are written to they get a new number, by
chance. So the agent need not read what it has read under the same number.

A capture is written in this order: the header of its slot is made invalid, the payload is copied,
the header is written. So a valid header says that the payload below it is whole: stores that come
before the header's in the program are in memory when it is (a process that is killed is killed
between two instructions). A checksum of the whole payload would prove the same once more, and cost
more than the copy (CRC-32: about 1 GB/s); the drain's BLAKE3 covers what leaves the slab. What is
cheap is kept: ``edges`` is the CRC-32 of a file's first and last 4 KiB, which finds a header that
was put over another payload. The highest valid sequence is the newest capture.

A slot is taken from its header on until the agent has answered for it (stored, or refused); a
capture that finds both slots taken is put off, so a training never waits for a disk here. Where
there is one slot, its capture is on the agent's disk before the next one begins, and is what is
left when that is never finished.
"""

import ctypes
import json
import mmap
import os
import struct
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from baton_sdk.mailbox import Mailbox, Ticket, TicketState

MAGIC = b"batonslb"
LAYOUT_VERSION = 1
HEADER_BYTES = 32 * 1024
PAYLOAD_OFFSET = 2 * HEADER_BYTES
PREFIX = struct.Struct("<8sII16s")
DOCUMENT_BYTES_MAX = HEADER_BYTES - PREFIX.size

FILES_MAX = 64
"""A built-in trainer has five; 64 names of 255 bytes still fit a header."""

EDGE_BYTES = 4096
"""Of each end of a file, for ``edges``: it holds the names and shapes of most safetensors files,
and costs microseconds."""

GROWTH_RATIO = 1 / 32
GROWTH_BYTES = 1024 * 1024
"""Room beyond what was asked for: the JSON state grows a little while a training goes on, and a
new slab for that would cost fresh memory."""

REFUSAL_HOLDS_S = 300.0
"""A host without memory now may have some later; once in five minutes is a cheap question."""

POPULATE_BYTES = 64 * 1024 * 1024
"""In one call: between two calls the thread can be asked to end."""

_MADV_POPULATE_WRITE = 23
"""madvise(2), Linux 5.14: make the pages and the page table's entries, as if written to."""


class Slab:
    """The mapped memory, and which of its slots are free. Used by one thread at a time; the
    answers that free a slot may come from any."""

    def __init__(self, descriptor: int, slot_bytes: int, slots: int) -> None:
        self.descriptor = descriptor
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.mapping: mmap.mmap
        self._tickets: list[Ticket | None] = [None] * slots

    def open(self) -> None:
        """Map it and touch every page. Takes a third of a second per GB, once. Raises OSError when
        the host has not the memory after all."""
        size_bytes = PAYLOAD_OFFSET + self.slots * self.slot_bytes
        if os.fstat(self.descriptor).st_size < size_bytes:
            raise OSError("the slab is smaller than the agent says")
        # First: a page that cannot be had is an error here, and a SIGBUS in a copy.
        os.posix_fallocate(self.descriptor, 0, size_bytes)
        self.mapping = mmap.mmap(self.descriptor, size_bytes)
        _populate(self.mapping)

    def close(self) -> None:
        """Give the descriptor up; the memory goes when nobody maps it any more."""
        os.close(self.descriptor)

    def free_slot(self) -> int | None:
        """A slot that nobody reads from, or None: of two the one with the older capture, so that
        whoever is killed while it is written has the newer one in the other."""
        free = [
            (ticket.sequence or 0 if ticket is not None else 0, slot)
            for slot, ticket in enumerate(self._tickets)
            if ticket is None or ticket.state is not TicketState.PENDING
        ]
        return min(free)[1] if free else None

    def wait_free_slot(self, timeout_s: float) -> int | None:
        """The same, after at most so many seconds of waiting for the agent's answers."""
        until_s = time.monotonic() + timeout_s
        while (slot := self.free_slot()) is None and time.monotonic() < until_s:
            for ticket in self._tickets:
                if ticket is not None and ticket.state is TicketState.PENDING:
                    ticket.wait_stored(min(until_s - time.monotonic(), timeout_s / self.slots))
                    break
        return slot

    def offset_bytes(self, slot: int) -> int:
        """Where the slot begins in ``mapping``."""
        return PAYLOAD_OFFSET + slot * self.slot_bytes

    def begin(self, slot: int) -> None:
        """From here to ``publish`` the slot may be written, and nobody takes it for a capture."""
        self.mapping[slot * HEADER_BYTES : slot * HEADER_BYTES + len(MAGIC)] = bytes(len(MAGIC))
        self._tickets[slot] = None

    def publish(
        self,
        slot: int,
        files: Sequence[tuple[str, int, int]],
        *,
        sequence: int,
        step: int,
        parts: int = 1,
        written: Mapping[str, int] | None = None,
    ) -> None:
        """Write the slot's header, last of all. ``files`` are (name, offset in the slot, bytes).
        Raises ValueError for more than a header holds."""
        begin = self.offset_bytes(slot)
        described = []
        for name, offset, size in files:
            if not 0 <= offset <= offset + size <= self.slot_bytes:
                raise ValueError(f"file {name} of a capture does not lie within its slot")
            described.append([name, offset, size, self._edges(begin + offset, size)])
        fields: dict[str, object] = {"sequence": sequence, "slot": slot, "step": step}
        fields["files"] = described
        if parts > 1:
            fields["parts"] = parts
        if written:
            fields["written"] = dict(written)
        document = json.dumps(fields, separators=(",", ":")).encode()
        if len(document) > DOCUMENT_BYTES_MAX or len(files) > FILES_MAX:
            raise ValueError(f"a capture of {len(files)} files does not fit its header")
        at = slot * HEADER_BYTES
        header = PREFIX.pack(MAGIC, LAYOUT_VERSION, len(document), checksum(document))
        self.mapping[at + PREFIX.size : at + PREFIX.size + len(document)] = document
        self.mapping[at : at + PREFIX.size] = header

    def take(self, slot: int, ticket: Ticket) -> None:
        """The slot is the agent's until the ticket is answered."""
        self._tickets[slot] = ticket

    def _edges(self, offset: int, size: int) -> int:
        first = zlib.crc32(self.mapping[offset : offset + min(size, EDGE_BYTES)])
        return zlib.crc32(self.mapping[offset + max(0, size - EDGE_BYTES) : offset + size], first)


class SlabDesk:
    """Asks the agent for memory, keeps it over the agent's restarts. The link's thread brings the
    answers, the training's thread asks; one lock, nothing slow under it."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._changed = threading.Condition()
        self._slab: Slab | None = None
        self._wanted_bytes = 0  # with room beyond; 0 where no request is open
        self._asked_bytes = 0  # of the open request, without that room
        self._unsent = False
        self._refused_until_s = 0.0
        self._refused_bytes = 0
        self._understood = True  # until a welcome says otherwise
        self._sequence = 0

    def slab(self, slot_bytes: int, wait_s: float) -> Slab | None:
        """The slab whose slots hold so many bytes, if it is there within ``wait_s`` seconds. Asks
        for it where that has not been done; None, and at once, also where the agent refuses it."""
        with self._changed:
            slab = self._fitting(slot_bytes)
            if slab is not None or not self._may_ask(slot_bytes):
                return slab
            if self._wanted_bytes < slot_bytes:
                self._wanted_bytes = slot_bytes + int(slot_bytes * GROWTH_RATIO) + GROWTH_BYTES
                self._asked_bytes = slot_bytes
                self._unsent = True
        self._mailbox.nudge()
        until_s = time.monotonic() + wait_s
        with self._changed:
            while (slab := self._fitting(slot_bytes)) is None:
                left_s = until_s - time.monotonic()
                if left_s <= 0 or not self._wanted_bytes or not self._understood:
                    break
                self._changed.wait(left_s)
        return slab

    def _fitting(self, slot_bytes: int) -> Slab | None:
        slab = self._slab
        return slab if slab is not None and slab.slot_bytes >= slot_bytes else None

    def next_sequence(self) -> int:
        """The number of the next capture; it only grows, over all slabs of this process."""
        self._sequence += 1
        return self._sequence

    def _may_ask(self, slot_bytes: int) -> bool:
        waiting = time.monotonic() < self._refused_until_s and slot_bytes >= self._refused_bytes
        return self._understood and not waiting

    # --- the link's side --------------------------------------------------------------------------

    def welcomed(self, message: Mapping[str, object]) -> list[tuple[dict[str, object], int | None]]:
        """A connection began; what to say first on it: here is what we hold. An agent that does
        not speak of slabs is told nothing of them."""
        with self._changed:
            self._understood = message.get("slabs") is True
            self._unsent = self._wanted_bytes > 0
            self._changed.notify_all()
            slab, understood = self._slab, self._understood
            if not understood:
                self._slab = None
        if not understood:
            self._mailbox.refuse_captures("this agent is older, and knows no captures")
        if slab is None or not understood:
            return []
        offer = {"type": "slab", "bytes": slab.slot_bytes, "slots": slab.slots, "offered": True}
        return [(offer, slab.descriptor)]

    def take(self) -> list[dict[str, object]]:
        """The request to send now, if there is one."""
        with self._changed:
            if not self._unsent or not self._understood:
                return []
            self._unsent = False
            return [{"type": "slab", "bytes": self._wanted_bytes}]

    @property
    def waiting(self) -> bool:
        """Whether ``take`` has something."""
        return self._unsent and self._understood

    def granted(self, message: Mapping[str, object], descriptor: int) -> None:
        """Memory has come: map it in a thread of its own, since touching it takes a while and the
        link has other things to carry."""
        size, slots = message.get("bytes"), message.get("slots")
        if not isinstance(size, int) or slots not in (1, 2):
            os.close(descriptor)
            return
        slab = Slab(descriptor, size, 2 if slots == 2 else 1)
        threading.Thread(target=self._open, args=(slab,), name="baton-slab", daemon=True).start()

    def refused(self, message: Mapping[str, object]) -> None:
        """No memory for us, or the memory that we offered is not taken."""
        with self._changed:
            # Who asks for the same again would have the same room added, and hear the same.
            self._refused_bytes = self._asked_bytes
            self._refused_until_s = time.monotonic() + REFUSAL_HOLDS_S
            self._wanted_bytes = self._asked_bytes = 0
            self._unsent = False
            offered = message.get("offered") is True
            if offered:
                self._slab = None
            self._changed.notify_all()
        if offered:
            self._mailbox.refuse_captures("the agent did not take the slab back")

    def _open(self, slab: Slab) -> None:
        try:
            slab.open()
        except (OSError, ValueError):  # ValueError: a size that mmap does not take
            slab.close()
            self.refused({})
            return
        with self._changed:
            former, self._slab = self._slab, slab
            if slab.slot_bytes >= self._wanted_bytes:  # else it has grown meanwhile, and is open
                self._wanted_bytes = self._asked_bytes = 0
            self._changed.notify_all()
        if former is not None:
            former.close()


def checksum(document: bytes) -> bytes:
    """Of a header: 16 bytes over layout version, length and document."""
    prefix = struct.pack("<II", LAYOUT_VERSION, len(document))
    return blake2b(prefix + document, digest_size=16).digest()


def _populate(mapping: mmap.mmap) -> None:
    """Make the page table's entries now and not in the first copy. Where the kernel does not know
    how, the first capture is slower, and nothing else. Through ctypes, which lets the training's
    thread run meanwhile."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    anchor = ctypes.c_char.from_buffer(mapping)
    try:
        address = ctypes.addressof(anchor)
        for offset in range(0, len(mapping), POPULATE_BYTES):
            size = min(POPULATE_BYTES, len(mapping) - offset)
            if madvise(address + offset, size, _MADV_POPULATE_WRITE):
                return
    finally:
        del anchor
