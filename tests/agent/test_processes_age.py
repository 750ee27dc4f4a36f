"""How long ago a program began: by the kernel, not by when a busy agent hears of it."""

import os
import time
from pathlib import Path

import pytest

from agent.core.values import Launch
from agent.processes import proc
from agent.processes.supervisor import Supervisor

PATH = ("PATH", "/usr/local/bin:/usr/bin:/bin")
TICK_MS = 1_000 // os.sysconf("SC_CLK_TCK")


async def test_a_program_is_as_old_as_the_kernel_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = Supervisor(tmp_path)
    await supervisor.open(lambda _: None)
    earliest_ms = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    pid = await supervisor.start(Launch("1.1", ("sleep", "600"), (PATH,), "/"))
    process = proc.read_process(pid)
    assert process is not None
    began_ms = process.start_ticks * TICK_MS
    assert began_ms + TICK_MS > earliest_ms, "the clock is the one of the kernel's start times"
    for later_ms in (0, TICK_MS, 5 * TICK_MS):
        now_ns = (began_ms + later_ms) * 1_000_000
        monkeypatch.setattr(time, "clock_gettime_ns", lambda _, now_ns=now_ns: now_ns)
        assert supervisor.age_ms("1.1") == max(0, later_ms - TICK_MS)
        assert supervisor.age_ms("7.7") == 0, "nobody has started it"
    monkeypatch.undo()
    supervisor.kill("1.1")
    await supervisor.close()
