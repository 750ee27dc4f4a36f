"""A coordinator that leaves while threads hang, one beside its loop and one of the loop's own, in a
process of its own."""

import subprocess
import sys

import pytest

PATIENCE_S = 60
SCRIPT = """
import asyncio
import threading
import coordinator.__main__ as program
from coordinator import leaving
from coordinator.allocator import Allocator
from tests.shell.test_allocator import Weighing

def hang(began):
    hanging.add(threading.current_thread())
    began.set()
    threading.Event().wait()

def join(thread, timeout_s=None):
    # those of the loop that are idle end, however slowly; for the others time passes
    ends = thread.name.startswith("asyncio") and thread not in hanging
    joined(thread, {patience_s} if ends else timeout_s)

async def decide():
    weighing = Weighing()
    weighing.hang = lambda columns: hang(began)
    weighing.ask(weighing.hang)
    await asyncio.to_thread(began.wait)
    task = asyncio.create_task(asyncio.to_thread(hang, exporting))
    await asyncio.to_thread(exporting.wait)
    {ends}

began, exporting, hanging = threading.Event(), threading.Event(), set()
joined, threading.Thread.join = threading.Thread.join, join
program.serve = lambda: leaving.run(decide()) or 0
program.leave.__defaults__ = (0.2,)
raise SystemExit(program.main())
"""


@pytest.mark.parametrize(
    ("ends", "status", "says"),
    [("return 0", 0, ""), ("raise KeyError('a bug')", 1, "KeyError: 'a bug'")],
)
def test_it_does_not_wait_for_a_thread_that_hangs(ends: str, status: int, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(ends=ends, patience_s=PATIENCE_S)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    names = done.stdout.strip().strip("'").partition("at work still: ")[2].split(", ")
    assert sorted(name.partition("_")[0] for name in names) == ["allocation", "asyncio"]


LATER = """
import asyncio
import threading
from coordinator import leaving

async def work():
    def none_left(thread):
        raise RuntimeError("can't start new thread")

    start, threading.Thread.start = threading.Thread.start, none_left
    waits = threading.Barrier(leaving.THREADS)
    await asyncio.gather(*(asyncio.to_thread(waits.wait) for _ in range(leaving.THREADS)))
    threading.Thread.start = start

leaving.run(work())
leaving.leave(1, 60)
"""


def test_the_loop_has_all_its_threads_from_the_beginning() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATER], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
