"""A person's word that GPUs may be used as they are.

Problem: what a job has left on a GPU is remembered across restarts (`core/clean.py`), or a restart
would hand it to the next job. But only a person can know that it is nothing, or not worth a reboot.

How: a file in the agent's directory, `gpus-as-they-are`, made by who may write there, and a
restart, which costs no training. What is there then is what later jobs are compared with. The file
goes once that is durable: it says so once, and not for all that is to come.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from agent.core.gpu_messages import PutGpusLeft
from agent.core.state import Memory
from agent.ports import Journal

FILE_NAME = "gpus-as-they-are"


async def waive(
    directory: Path,
    journal: Journal,
    memory: Memory,
    emit: Callable[[str, str, tuple[tuple[str, object], ...]], None],
) -> Memory:
    """The journal's content after the person's word, if there is one. Raises `JournalUnavailable`,
    and OSError where the file cannot be taken away."""
    path = directory / FILE_NAME
    if not path.exists():
        return memory
    await journal.commit([PutGpusLeft(())])
    path.unlink()
    for left in memory.gpus_left:
        emit("warning", "gpu.waived", (("gpu", left.uuid), ("attempt", left.attempt)))
    return replace(memory, gpus_left=())
