"""An agent's journal in a process of its own, to be killed: `python -m tests.agent.journal_writer
<file> <batches>`.

It commits batches that belong together, says each one's number when `commit` has returned, and
waits for its input to end. What it has said is durable: a kill at any moment must not lose it.
"""

import asyncio
import sys
from pathlib import Path

from agent.core.attempt import AttemptRecord
from agent.core.messages import AgentEvent, AttemptExited, JobSpec
from agent.core.state import PutAttempt, PutFence, Record, SpoolEvent
from agent.journal import SqliteJournal


def batch(number: int) -> list[Record]:
    """An attempt, its event and its fence, all of the same number."""
    spec = JobSpec(command=("x" * 500,))
    record = AttemptRecord(
        f"{number}.1", number, 1, spec, (), (), None, False, 0, token="t", last_sequence=number
    )
    event = AgentEvent(number, 1, record.id, AttemptExited(0))
    return [PutAttempt(record), SpoolEvent(event), PutFence(number, 1)]


async def write(path: Path, batches: int) -> None:
    journal = SqliteJournal(path)
    memory = await journal.open("j1")
    first = memory.next_sequence
    for number in range(first, first + batches):
        await journal.commit(batch(number))
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
    sys.stdin.read()
    await journal.close()


if __name__ == "__main__":
    asyncio.run(write(Path(sys.argv[1]), int(sys.argv[2])))
