"""Bytes that two files share on disk, until one of them is written to.

Problem: a checkpoint in parts is laid out for every rank, so eight ranks on one node were eight
copies of all of it, written at the same time. Hard links would not cost that, but whoever writes
into its directory would write into the store and into the others' directories, too.

Where the file system shares blocks between files (XFS, Btrfs), a chunk of the store becomes part of
another file without being copied, and stays what it was whatever becomes of that file. Elsewhere
(ext4), and between two file systems, nothing is shared, and the caller writes.

https://man7.org/linux/man-pages/man2/ioctl_ficlonerange.2.html
"""

import fcntl
import struct
from pathlib import Path

# _IOW(0x94, 13, struct file_clone_range) of linux/fs.h, where writing is 1: all but MIPS, PowerPC
# and SPARC. There it is unknown, and nothing is shared.
FICLONERANGE = 0x4020940D
# Descriptor, offset and length of what is shared, and its offset in the other file.
_RANGE = struct.Struct("=qQQQ")


def clone(source: Path, size_bytes: int, target: int, offset_bytes: int) -> bool:
    """Let the file `target` share the first bytes of `source` from an offset on; False where that
    cannot be, and nothing is changed. Why not does not matter: whoever writes instead is told what
    is wrong with the disk."""
    try:
        with open(source, "rb") as handle:
            shared = _RANGE.pack(handle.fileno(), 0, size_bytes, offset_bytes)
            fcntl.ioctl(target, FICLONERANGE, shared)
    except OSError:
        return False
    return True
