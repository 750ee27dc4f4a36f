"""The agent's slabs: bounded, sealed, and nothing in them believed.

How a real SDK writes them, and that a torn header is none, is in tests/trainers/test_capture.py.
"""

import contextlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from hashlib import blake2b

import pytest

from agent import slabs
from agent.core.trainer_messages import capture_name
from agent.ports import ChunkError, FoundCapture
from agent.slabs import Granted, Slabs

ATTEMPT = "7.1"
GB = 1_000_000_000


@pytest.fixture
def desk() -> Iterator[Slabs]:
    made = Slabs(0.5, lambda: 4 * GB)
    yield made
    made.close()


def granted(desk: Slabs, slot_bytes: int = 8192, attempt: str = ATTEMPT) -> Granted:
    found = desk.grant(attempt, slot_bytes)
    assert isinstance(found, Granted)
    return found


def write(slab: Granted, slot: int, document: object) -> None:
    """A header with a right checksum, whatever it says."""
    text = json.dumps(document).encode()
    prefix = struct.pack("<II", 1, len(text))
    header = b"batonslb" + prefix + blake2b(prefix + text, digest_size=16).digest() + text
    os.pwrite(slab.descriptor, header, slot * slabs.HEADER_BYTES)


def described(sequence: int, slot: int = 0, **changed: object) -> dict[str, object]:
    files = [["a", 0, 4, zlib.crc32(bytes(8))]]
    return {"sequence": sequence, "slot": slot, "step": 5, "files": files, **changed}


def held_count() -> int:
    """Of slabs alone: other threads of this process open and close what they need."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            count += os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:baton-slab")
    return count


def test_memory_is_bounded_by_a_share_of_what_the_host_has() -> None:
    desk = Slabs(0.5, lambda: 4 * GB)
    assert granted(desk, GB // 2).slots == 2
    assert granted(desk, 3 * GB // 2).slots == 1
    assert desk.grant(ATTEMPT, 2 * GB + 1) == (
        "a slot needs 2000003072 bytes; 2000000000 may be given away, "
        "50% of the 4000000000 that the host has available"
    )
    desk.close()
    off = "slabs are switched off on this node"
    assert Slabs(0.0, lambda: 4 * GB).grant(ATTEMPT, 1) == off
    for size in (0, slabs.SLOT_BYTES_MAX + 1):
        refusal = desk.grant(ATTEMPT, size)
        assert isinstance(refusal, str)
        assert f"a slot of {size} bytes" in refusal


def test_the_size_is_sealed(desk: Slabs) -> None:
    slab = granted(desk)
    size = os.fstat(slab.descriptor).st_size
    assert size == slabs.PAYLOAD_OFFSET + slab.slots * slab.slot_bytes
    for other in (0, size * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(slab.descriptor, other)


def test_only_slabs_are_adopted(desk: Slabs) -> None:
    slab = granted(desk)
    reader, writer = os.pipe()
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, os.fstat(slab.descriptor).st_size)
    with tempfile.TemporaryFile() as file:
        offers = [
            (reader, 8192, 2, "is no slab"),
            (os.dup(file.fileno()), 8192, 2, "no slab"),
            (unsealed, 8192, 2, "not sealed"),
            (os.dup(slab.descriptor), 8192, 3, "none of ours"),
            (os.dup(slab.descriptor), 0, 2, "none of ours"),
            (os.dup(slab.descriptor), 4096, 2, "bytes, not 2 slots of 4096"),
        ]
        for descriptor, slot_bytes, slots, reason in offers:
            assert reason in desk.adopt("8.1", descriptor, slot_bytes, slots)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)  # not ours, and not left open
    os.close(writer)
    assert desk.newest("8.1") is None


def test_a_slab_comes_back_after_a_restart_with_its_names(desk: Slabs) -> None:
    slab = granted(desk)
    write(slab, 0, described(3))
    before = desk.newest(ATTEMPT)
    held = os.dup(slab.descriptor)  # as its trainer does
    desk.close()
    assert desk.newest(ATTEMPT) is None
    assert desk.adopt(ATTEMPT, os.dup(held), slab.slot_bytes, slab.slots) == ""
    assert desk.newest(ATTEMPT) == before
    assert before is not None
    assert before.name == desk.name(ATTEMPT, 3)
    # Offered again on another connection: the same slab, held once.
    open_before = held_count()
    assert desk.adopt(ATTEMPT, held, slab.slot_bytes, slab.slots) == ""
    assert held_count() == open_before - 1


@pytest.mark.parametrize(
    "document",
    [
        [],
        described(1, slot=1),
        described(1, files=[]),
        described(1, files=[["a", 0, 8193, 0]]),
        described(1, files=[["a", -1, 4, 0]]),
        described(1, files=[["a", 1 << 70, 4, 0]]),
        described(1, files=[["a", 0, True, 0]]),
        described(1, files=[["a", 0, 4]]),
        described(1, files=[["a", 0, 1, 0]] * 65),
        described(1, files="aaaa"),
        described(1, step="5"),
        described(1, step=None),
        described(1, parts=0),
        described(1, parts=1_025),
        described(1, parts=None),
        {"sequence": 1},
    ],
)
def test_a_header_that_makes_no_sense_is_none(desk: Slabs, document: object) -> None:
    slab = granted(desk)
    write(slab, 0, document)
    assert desk.newest(ATTEMPT) is None
    write(slab, 1, described(2, slot=1))
    newest = desk.newest(ATTEMPT)
    assert newest is not None
    assert newest.name == desk.name(ATTEMPT, 2)


def test_a_capture_says_of_how_many_parts_it_is_one(desk: Slabs) -> None:
    slab = granted(desk)
    write(slab, 0, described(1))
    assert desk.newest(ATTEMPT) == FoundCapture(desk.name(ATTEMPT, 1), 5, 1), "an older SDK's"
    write(slab, 1, described(2, slot=1, parts=8))
    assert desk.newest(ATTEMPT) == FoundCapture(desk.name(ATTEMPT, 2), 5, 8)


def test_reading_goes_on_when_the_attempt_is_released(desk: Slabs) -> None:
    slab = granted(desk)
    os.pwrite(slab.descriptor, b"data", slabs.PAYLOAD_OFFSET)
    write(slab, 0, described(1, files=[["a", 0, 4, zlib.crc32(b"datadata")]]))
    with desk.reading(ATTEMPT, desk.name(ATTEMPT, 1)) as source:
        desk.release(ATTEMPT)
        assert source.read(0, 4) == b"data"
        source.check()
        with pytest.raises(ChunkError, match="cannot be read"):
            source.read(0, 1 << 20)
    gone = pytest.raises(ChunkError, match=r"is not in the slab of attempt 7\.1")
    with gone, desk.reading(ATTEMPT, capture_name(1, 1)):
        raise AssertionError("it is gone")


def test_an_attempt_has_a_bounded_number_of_slabs(desk: Slabs) -> None:
    before = held_count()
    for number in range(5):
        slab = granted(desk, 8192 + number)
        write(slab, 0, described(number))
    assert held_count() == before + slabs.SLABS_PER_ATTEMPT_MAX
    newest = desk.newest(ATTEMPT)
    assert newest is not None
    assert newest.name == desk.name(ATTEMPT, 4)


def test_the_host_says_what_is_available() -> None:
    assert slabs.host_available_bytes() > 1_000_000
