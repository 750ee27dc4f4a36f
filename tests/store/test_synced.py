"""What is acknowledged has reached the disk, and not only the kernel's memory.

Problem: a kill shows nothing of it. What a killed process has written the kernel still has, so a
store that never syncs passes every test that kills it, and loses its last seconds with the power.
So here the writer's own calls of `fsync` and `fdatasync` are seen: a library that is loaded before
the C library says each that has succeeded, in the stream in which the writer says what is durable.
"""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

BATCHES = 20
SYNCED = "synced"
LIBRARY = f"""
#include <sys/syscall.h>
#include <unistd.h>

static int said(long number, int file) {{
    int result = (int)syscall(number, file);
    if (result == 0 && write(1, "{SYNCED}\\n", {len(SYNCED) + 1}) < 0) return -1;
    return result;
}}

int fsync(int file) {{ return said(SYS_fsync, file); }}
int fdatasync(int file) {{ return said(SYS_fdatasync, file); }}
"""


@pytest.mark.parametrize("writer", ["tests.store.crash_writer", "tests.agent.journal_writer"])
def test_a_batch_is_on_the_disk_before_it_is_durable(writer: str, tmp_path: Path) -> None:
    """Of the coordinator's store and of an agent's journal; with one sync for all of a batch."""
    source, library = tmp_path / "said.c", tmp_path / "said.so"
    source.write_text(LIBRARY)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    done = subprocess.run(
        [sys.executable, "-m", writer, str(tmp_path / "file.sqlite3"), str(BATCHES)],
        env={**os.environ, "LD_PRELOAD": str(library)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout.split()
    durable = [place for place, word in enumerate(said) if word.isdecimal()]
    assert [said[place] for place in durable] == [str(number + 1) for number in range(BATCHES)]
    for before, place in pairwise(durable):
        assert said[before + 1 : place] == [SYNCED]
    assert said[durable[0] - 1] == SYNCED
