"""Who is stopped at random is below the tests, is seldom a worker, and goes on afterwards."""

import random
import subprocess
import threading
from collections.abc import Iterator

import psutil
import pytest

from tests import stalls

pytestmark = pytest.mark.e2e

POLL_S = 0.005
SCRIPT = "bash -c 'sleep 600 & echo $!; wait' & wait"


@pytest.fixture
def top() -> Iterator[psutil.Process]:
    """As a test run: a worker below it, and what that has started."""
    with subprocess.Popen(["bash", "-c", SCRIPT], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stdout.readline()
        found = psutil.Process(started.pid)
        below = found.children(recursive=True)
        yield found
        for process in (found, *below):
            process.kill()


def stands_still(process: psutil.Process) -> None:
    """The kernel stops it when it gets the signal, which is not when it was sent."""
    while process.status() != psutil.STATUS_STOPPED:
        threading.Event().wait(POLL_S)


@pytest.mark.parametrize("young", [True, False])
def test_a_worker_is_chosen_seldom(top: psutil.Process, young: bool) -> None:
    draw = random.Random(1)
    found = [stalls.choose(top, draw, young) for _ in range(200)]
    chosen = [one.ppid() == top.pid for one in found if one]
    assert 0 < sum(chosen) < len(chosen) / 4
    assert len(chosen) < 200


def test_it_stands_still_for_its_time_and_goes_on(top: psutil.Process) -> None:
    sleeper = next(one for one in top.children(recursive=True) if one.name() == "sleep")

    class Pause(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout == 1.5
            stands_still(sleeper)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stalls.stop(sleeper, 1.5, Pause())
    assert sleeper.status() != psutil.STATUS_STOPPED


def test_who_was_stopped_by_somebody_else_stays_so(top: psutil.Process) -> None:
    (worker,) = top.children()
    worker.suspend()
    stands_still(worker)
    stalls.stop(worker, 60.0, threading.Event())
    assert worker.status() == psutil.STATUS_STOPPED
