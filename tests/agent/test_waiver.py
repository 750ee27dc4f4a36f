"""Only a person, or a boot, has a GPU forget what a job has left on it."""

from pathlib import Path

from agent.core.gpu_messages import GpuLeft, PutGpusLeft
from agent.core.state import Memory
from agent.journal import SqliteJournal
from agent.waiver import FILE_NAME, waive

LEFT = GpuLeft("GPU-a", "7.1", "boot")


async def test_a_person_s_word_counts_once(tmp_path: Path) -> None:
    said: list[tuple[str, object]] = []
    path = tmp_path / "journal.sqlite3"

    def log(level: str, event: str, fields: tuple[tuple[str, object], ...]) -> None:
        said.append((event, dict(fields)))

    journal = SqliteJournal(path)
    await journal.open("fresh")
    await journal.commit([PutGpusLeft((LEFT,))])
    memory = await waive(tmp_path, journal, await _reopened(journal), log)
    assert memory.gpus_left == (LEFT,), "nobody has said anything"
    (tmp_path / FILE_NAME).touch()
    assert (await waive(tmp_path, journal, memory, log)).gpus_left == ()
    assert said == [("gpu.waived", {"gpu": "GPU-a", "attempt": "7.1"})]
    assert not (tmp_path / FILE_NAME).exists()
    assert (await _reopened(journal)).gpus_left == (), "it is durable"
    await journal.close()


async def _reopened(journal: SqliteJournal) -> Memory:
    await journal.close()
    return await journal.open("another")
