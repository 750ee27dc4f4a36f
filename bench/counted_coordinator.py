"""The real coordinator with a store that counts its commits, and can be told to work badly.

Problem: to say what group commit is worth, the same process must be measured with and without it,
and neither the shell nor the store has a switch for working badly. So two names are replaced in the
process that is measured, which is else the one that users start. `--one-each` sets the shell's
largest batch to one event: each submission has a commit of its own, as in a program without group
commit. `--slower-ms` sleeps before each commit, which is what a disk with a slower fsync does
(network disks take 2 to 10 ms).

Started as `python -c "from bench.counted_coordinator import main; main()" OPTIONS -- ARGUMENTS`,
with the coordinator's own arguments behind the dashes. After SIGTERM the number of commits, which
is the number of fsyncs of the log, stands in the file behind `--count-file`.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import coordinator.__main__  # noqa: F401 - it says how gRPC polls, before that comes
from coordinator import main as program
from coordinator import shell
from coordinator.core.messages import Record
from coordinator.store.sqlite import SqliteStore


class CountedStore(SqliteStore):
    """`SqliteStore`, counted and slowed. Class attributes, because `coordinator.main` makes it."""

    slower_ms = 0.0
    commits = 0

    async def commit(self, records: Sequence[Record]) -> None:
        if self.slower_ms:
            await asyncio.sleep(self.slower_ms / 1000)
        await super().commit(records)
        CountedStore.commits += 1


def main() -> None:
    """Run the coordinator until SIGTERM, then write the count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one-each", action="store_true")
    parser.add_argument("--slower-ms", type=float, default=0.0)
    parser.add_argument("--count-file", type=Path, required=True)
    parser.add_argument("arguments", nargs="*")
    asked = parser.parse_args()
    if asked.one_each:
        shell.BATCH_MAX = 1
    CountedStore.slower_ms = asked.slower_ms
    setattr(program, "SqliteStore", CountedStore)  # noqa: B010 - there by its own name
    status = program.main(asked.arguments)
    asked.count_file.write_text(str(CountedStore.commits), encoding="utf-8")
    sys.exit(status)
