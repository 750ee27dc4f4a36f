"""A coordinator's store in a process of its own, to be killed: `python -m tests.store.crash_writer
<file> <batches>`.

It says `open`, commits whole jobs one after another, says each one's number when `commit` has
returned, and then waits for its input to end. What it has said is acknowledged: a kill at any
moment must not lose it.
"""

import asyncio
import sys
from pathlib import Path

from coordinator.core.messages import AppendEvent, PutAttempt, PutCheckpoint, PutJob, Record
from coordinator.core.model import Attempt, Checkpoint
from coordinator.core.phases import AttemptPhase
from coordinator.store.sqlite import SqliteStore
from tests.store.worlds import event, job


def whole_job(job_id: int) -> list[Record]:
    """A batch that touches every table with a row per job."""
    return [
        PutJob(job(job_id, reason="x" * 500)),
        PutAttempt(Attempt(job_id, 1, "n1", (), AttemptPhase.ASSIGNED, assigned_unix_ms=1)),
        PutCheckpoint(Checkpoint(job_id, "cc" * 32, "", 1, 10, 10, ("n1",), committed_unix_ms=1)),
        AppendEvent(event(job_id, 1)),
        AppendEvent(event(job_id, 2)),
    ]


async def write(path: Path, batches: int) -> None:
    store = SqliteStore(path)
    snapshot = await store.open()
    say("open")
    for job_id in range(snapshot.last_job_id + 1, snapshot.last_job_id + batches + 1):
        await store.commit(whole_job(job_id))
        say(str(job_id))
    sys.stdin.read()
    await store.close()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(write(Path(sys.argv[1]), int(sys.argv[2])))
