"""Memory for captures: made by the agent, written by a trainer, read when either of them is gone.

Problem: what a trainer has captured and nobody has stored yet must outlive the trainer, which may
be killed between any two instructions. A file on disk holds the training up; memory of the trainer
dies with it. So each slab is an anonymous file in memory (memfd_create(2)) that this process makes
and holds; its trainer gets the descriptor, maps it, and writes captures into it. After an agent's
restart the trainer, who held it meanwhile, offers it again.

A trainer may be any program, so nothing in a slab is believed. The size is sealed, and what is
offered must be sealed too: a file of another kind (a pipe, a file on a network) could hold a
reader up for ever. Headers are bounded, checked by their checksum, and every range in them must lie
within its slot. Reading is `preadv` into memory of our own, never a mapping: what is hashed is what
is stored, whatever the trainer writes meanwhile, and a trainer cannot take pages away from under
us. Whether the payload stayed what its header describes is asked again after it was read
(`check`): the capture of a trainer that overwrites a slot which is being read is refused.

Layout, version 1, as written by `baton_sdk/slab.py` (its essay says why this order is safe):

    0        header 0: what slot 0 holds          header: magic 8 bytes | version u32 |
    32 KiB   header 1: what slot 1 holds                  document bytes u32 | BLAKE2b-128 |
    64 KiB   slot 0, then slot 1                          document (JSON)

    document: {"sequence", "slot", "step", "files": [[name, offset, bytes, edges], ...], "parts",
               "written": {name: number}}

By `written` a file is known again that lies in its slot unchanged since an earlier capture, and is
not read once more. Who lies there spoils his own checkpoints and nobody else's.

Memory is bounded by a share of what the host has available when a slab is asked for. Where two
slots do not fit one is given: then the checkpoint before it, on disk, is the one to fall back to
while a capture is being written.
"""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from agent.core.trainer_messages import PARTS_MAX, capture_name
from agent.ports import CapturedFile, CaptureSource, ChunkError, FoundCapture

MAGIC = b"batonslb"
LAYOUT_VERSION = 1
HEADER_BYTES = 32 * 1024
PAYLOAD_OFFSET = 2 * HEADER_BYTES
PREFIX = struct.Struct("<8sII16s")
EDGE_BYTES = 4096
FILES_MAX = 64  # as the SDK writes at most; a header has no room for many more
SLOTS_MAX = 2  # one is written while the other one is read
# The largest state that is trained on one box today is far below; a size beyond is a mistake.
SLOT_BYTES_MAX = 1 << 42
# The one in use and the one that outgrew it, whose last capture may still be waiting.
SLABS_PER_ATTEMPT_MAX = 2
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
MEMORY_FILE = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Granted:
    """A slab for a trainer: its `descriptor` stays ours, slots have `slot_bytes` each."""

    descriptor: int
    slot_bytes: int
    slots: int


@dataclass(frozen=True, slots=True)
class _Header:
    sequence: int
    slot: int
    step: int
    parts: int
    files: tuple[CapturedFile, ...]
    edges: tuple[int, ...]
    written: tuple[int, ...]
    """Of each file; 0: nothing is said."""


class Slabs:
    """All slabs of this node. `share_ratio` (0 to 1) of the host's available memory may be given
    away at a time; 0 gives none. Methods are quick: no disk, at most 128 KiB read."""

    def __init__(
        self, share_ratio: float, available_bytes: Callable[[], int] | None = None
    ) -> None:
        self._share_ratio = share_ratio
        self._available_bytes = available_bytes or host_available_bytes
        self._slabs: dict[str, list[Granted]] = {}  # the newest last

    def grant(self, attempt_id: str, slot_bytes: int) -> Granted | str:
        """A slab with slots of at least so many bytes; or the sentence that says why not."""
        if not self._share_ratio:
            return "slabs are switched off on this node"
        if not 0 < slot_bytes <= SLOT_BYTES_MAX:
            return f"a slot of {slot_bytes} bytes; 1 to {SLOT_BYTES_MAX} can be had"
        whole_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        available_bytes = self._available_bytes()
        allowed_bytes = int(available_bytes * self._share_ratio)
        slots = min(SLOTS_MAX, (allowed_bytes - PAYLOAD_OFFSET) // whole_bytes)
        if slots < 1:
            return (
                f"a slot needs {whole_bytes} bytes; {allowed_bytes} may be given away, "
                f"{self._share_ratio:.0%} of the {available_bytes} that the host has available"
            )
        try:
            descriptor = os.memfd_create("baton-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            return f"no memory file can be made: {error.strerror}"
        try:
            os.ftruncate(descriptor, PAYLOAD_OFFSET + slots * whole_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
        except OSError as error:
            os.close(descriptor)
            return f"no slab of {slots} slots of {whole_bytes} bytes: {error.strerror}"
        granted = Granted(descriptor, whole_bytes, slots)
        self._keep(attempt_id, granted)
        return granted

    def adopt(self, attempt_id: str, descriptor: int, slot_bytes: int, slots: int) -> str:
        """Take back a slab that a trainer held while its agent was away. Owns `descriptor` from
        here on. Returns the sentence that says why not, or nothing."""
        refusal = _why_not_ours(descriptor, slot_bytes, slots)
        if refusal:
            os.close(descriptor)
            return refusal
        inode = os.fstat(descriptor).st_ino
        for known in self._slabs.get(attempt_id, []):
            if os.fstat(known.descriptor).st_ino == inode:
                os.close(descriptor)
                return ""
        self._keep(attempt_id, Granted(descriptor, slot_bytes, slots))
        return ""

    def name(self, attempt_id: str, sequence: int) -> str:
        """The core's name for a capture in the attempt's newest slab."""
        slabs = self._slabs.get(attempt_id)
        return capture_name(os.fstat(slabs[-1].descriptor).st_ino if slabs else 0, sequence)

    def newest(self, attempt_id: str) -> FoundCapture | None:
        """The newest whole capture of the attempt, if there is one."""
        best: tuple[int, FoundCapture] | None = None
        for slab in self._slabs.get(attempt_id, []):
            inode = os.fstat(slab.descriptor).st_ino
            for header in _headers(slab):
                if best is None or header.sequence > best[0]:
                    name = capture_name(inode, header.sequence)
                    best = (header.sequence, FoundCapture(name, header.step, header.parts))
        return best[1] if best is not None else None

    @contextlib.contextmanager
    def reading(self, attempt_id: str, name: str) -> Iterator[CaptureSource]:
        """The capture of that name, readable until the block ends, whatever becomes of the slab
        meanwhile. Raises `ChunkError` when it is not there (any more)."""
        for slab in self._slabs.get(attempt_id, []):
            inode = os.fstat(slab.descriptor).st_ino
            for header in _headers(slab):
                if capture_name(inode, header.sequence) == name:
                    own = Granted(_another(slab.descriptor), slab.slot_bytes, slab.slots)
                    try:
                        yield _Source(own, header)
                    finally:
                        os.close(own.descriptor)
                    return
        raise ChunkError(f"capture {name} is not in the slab of attempt {attempt_id}")

    def release(self, attempt_id: str) -> None:
        """The attempt has ended: the memory goes as soon as nobody reads or maps it."""
        for slab in self._slabs.pop(attempt_id, []):
            os.close(slab.descriptor)

    def close(self) -> None:
        """Let go of all; trainers that live hold theirs."""
        for attempt_id in list(self._slabs):
            self.release(attempt_id)

    def _keep(self, attempt_id: str, granted: Granted) -> None:
        slabs = self._slabs.setdefault(attempt_id, [])
        slabs.append(granted)
        while len(slabs) > SLABS_PER_ATTEMPT_MAX:
            os.close(slabs.pop(0).descriptor)


class _Source:
    """One capture, as the chunk store reads it. Its methods run in a worker thread."""

    def __init__(self, slab: Granted, header: _Header) -> None:
        self._slab = slab
        self._header = header

    @property
    def files(self) -> tuple[CapturedFile, ...]:
        """Numbers are of one slab's slot, and slabs are told apart as in `capture_name`."""
        place = f"{os.fstat(self._slab.descriptor).st_ino}.{self._header.slot}"
        return tuple(
            replace(entry, identity=f"{place}.{number}") if number else entry
            for entry, number in zip(self._header.files, self._header.written, strict=True)
        )

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Raises `ChunkError`."""
        data = bytearray(size_bytes)
        self.read_into(offset_bytes, memoryview(data))
        return bytes(data)

    def read_into(self, offset_bytes: int, target: memoryview) -> None:
        """Raises `ChunkError`."""
        begin = PAYLOAD_OFFSET + self._header.slot * self._slab.slot_bytes
        _read_into(self._slab.descriptor, begin + offset_bytes, target)

    def check(self) -> None:
        """Raises `ChunkError` when the slot holds another capture by now, or never held this one
        whole."""
        if _header(self._slab, self._header.slot) != self._header:
            raise ChunkError("its slot was overwritten while it was being stored")
        for entry, edges in zip(self._header.files, self._header.edges, strict=True):
            first = zlib.crc32(self.read(entry.offset_bytes, min(entry.size_bytes, EDGE_BYTES)))
            tail_bytes = min(entry.size_bytes, EDGE_BYTES)
            tail = self.read(entry.offset_bytes + entry.size_bytes - tail_bytes, tail_bytes)
            if zlib.crc32(tail, first) != edges:
                raise ChunkError(f"{entry.path} of the capture is not what its header describes")


def host_available_bytes() -> int:
    """What the kernel thinks can be had without swapping (proc_meminfo(5)). Memory of slabs that
    are in use counts as used there. 0 when it does not say."""
    try:
        lines = MEMORY_FILE.read_text("ascii").splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _why_not_ours(descriptor: int, slot_bytes: int, slots: int) -> str:
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return "what was offered is no slab"
        # Only files in memory can be sealed, so this also says what kind it is.
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
            return "what was offered is not sealed as a slab is"
    except OSError as error:
        return f"what was offered is no slab: {error.strerror}"
    if not 1 <= slots <= SLOTS_MAX or not 0 < slot_bytes <= SLOT_BYTES_MAX:
        return f"a slab of {slots} slots of {slot_bytes} bytes is none of ours"
    if status.st_size != PAYLOAD_OFFSET + slots * slot_bytes:
        return f"the slab has {status.st_size} bytes, not {slots} slots of {slot_bytes}"
    return ""


def _another(descriptor: int) -> int:
    """A descriptor of our own for the same slab. Raises `ChunkError` when we may have no more."""
    try:
        return os.dup(descriptor)
    except OSError as error:
        raise ChunkError(f"a slab cannot be read: {error.strerror}") from error


def _headers(slab: Granted) -> list[_Header]:
    found = (_header(slab, slot) for slot in range(slab.slots))
    return [header for header in found if header is not None]


def _header(slab: Granted, slot: int) -> _Header | None:
    """What the header of a slot says, if it is whole and makes sense."""
    try:
        data = bytearray(HEADER_BYTES)
        _read_into(slab.descriptor, slot * HEADER_BYTES, memoryview(data))
    except ChunkError:
        return None
    magic, version, document_bytes, checksum = PREFIX.unpack_from(data)
    document = bytes(data[PREFIX.size : PREFIX.size + document_bytes])
    if magic != MAGIC or version != LAYOUT_VERSION or len(document) != document_bytes:
        return None
    prefix = struct.pack("<II", version, document_bytes)
    if blake2b(prefix + document, digest_size=16).digest() != checksum:
        return None
    return _decoded(document, slot, slab.slot_bytes)


def _decoded(document: bytes, slot: int, slot_bytes: int) -> _Header | None:
    try:
        fields = json.loads(document)
        parts = fields.get("parts", 1)  # an older SDK does not say, and knows of no parts
        numbers = (fields["sequence"], fields["slot"], fields["step"], parts)
        written = dict(fields.get("written", {}))
        listed = [
            (str(name), offset, size, edges, written.get(name, 0))
            for name, offset, size, edges in fields["files"]
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    counts = [*numbers, *(number for entry in listed for number in entry[1:])]
    if any(type(count) is not int or not 0 <= count < 1 << 63 for count in counts):
        return None
    if fields["slot"] != slot or not 0 < len(listed) <= FILES_MAX or not 0 < parts <= PARTS_MAX:
        return None
    if any(offset + size > slot_bytes for _, offset, size, *_ in listed):
        return None
    files = tuple(CapturedFile(*entry[:3]) for entry in listed)
    edges = tuple(entry[3] for entry in listed)
    numbers_written = tuple(entry[4] for entry in listed)
    return _Header(fields["sequence"], slot, fields["step"], parts, files, edges, numbers_written)


def _read_into(descriptor: int, offset_bytes: int, target: memoryview) -> None:
    """As much as it holds. Raises `ChunkError`."""
    done_bytes = 0
    try:
        while done_bytes < len(target):
            rest = target[done_bytes:]
            more_bytes = os.preadv(descriptor, [rest], offset_bytes + done_bytes)
            if not more_bytes:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done_bytes += more_bytes
    except OSError as error:
        raise ChunkError(f"a slab cannot be read: {error.strerror}") from error
