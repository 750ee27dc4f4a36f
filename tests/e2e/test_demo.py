"""`make demo` as a user sees it: it ends well, tells the whole timeline, and leaves nothing behind.

The demo runs as its own process, with a shorter fine-tuning job; nothing of it is replaced. That
the figures are good is the demo's own verdict (its exit status); here stands that the verdict is
about the right things. How long anything took is not judged.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.processes import proc
from tests.e2e.cluster import ROOT

MOMENTS = [
    "submitted", "running", "killed", "detected", "reassigned", "process started", "imports",
    "load", "first new step", "finished",
]  # fmt: skip
PHASES = ["detection", "decision", "start", "imports", "load", "first step"]
# Preparing, comparing and two trainings, on a machine that is busy with other tests.
TIMEOUT_S = 1_500
DAEMON_MARK = "DEMO_UNDER_TEST"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(TIMEOUT_S), pytest.mark.xdist_group("demo")]


def start_demo(*arguments: str) -> subprocess.Popen[str]:
    # The node that is killed closes its connections; the others are not to be lost for being slow.
    words = ["--stand-in", "--steps", "120", "--lease-ms", "60000", *arguments]
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "tests.e2e.demo", *words],
        cwd=ROOT,
        env={**os.environ, DAEMON_MARK: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def demos() -> Iterator[list[subprocess.Popen[str]]]:
    """Those that a failed test leaves running are killed; their guardian does the rest."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for demo in started:
        demo.kill()
        demo.communicate()


def left_by(pid: int) -> list[bytes]:
    """Command lines of what the demo has started: daemons and helpers inherit a variable from it,
    trainers and their shims name its run directory."""
    marks = (
        os.fsencode(f"{ROOT}/.demo/run-{pid}/"),
        os.fsencode(f"{DAEMON_MARK}={os.getpid()}"),
    )
    found = []
    for process in proc.all_processes():
        words = proc.read_bytes(process.pid, "cmdline")
        text = words + b"\0" + proc.read_bytes(process.pid, "environ")
        if process.pid != pid and any(mark in text for mark in marks):
            found.append(words)
    return found


def test_job_of_a_dead_node_finishes_elsewhere_and_demo_says_how(
    demos: list[subprocess.Popen[str]],
) -> None:
    demo = start_demo("--json")
    demos.append(demo)
    output, told = demo.communicate()

    assert demo.returncode == 0, told
    summary = json.loads(output)
    assert [moment["name"] for moment in summary["moments"]] == MOMENTS
    seconds = [moment["seconds"] for moment in summary["moments"]]
    assert seconds == sorted(seconds)
    assert seconds[MOMENTS.index("killed")] == 0
    assert [phase["name"] for phase in summary["phases"]] == PHASES
    assert summary["recovery_s"] == pytest.approx(seconds[MOMENTS.index("first new step")])
    assert summary["dominant"] in PHASES
    assert summary["resumed_on"] != summary["killed_node"]
    # A commit goes to the coordinator at once and the last step with a heartbeat, so the step that
    # was restored may be ahead of the last reported one.
    assert 0 < summary["restored_step"] < summary["total_steps"]
    assert summary["repeated_steps"] < summary["total_steps"] == 120
    assert summary["finetune"]["metric"] == "bits_per_byte"
    assert summary["finetune"]["value"] < summary["finetune"]["at_start"]
    assert summary["transfer"]["metric"] == "accuracy"
    assert summary["transfer"]["value"] > summary["transfer"]["at_start"]
    assert summary["failures"] == []
    for words in ("baton submit", "disk gone", "is lost", "steps repeated", "What dominates"):
        assert words in told
    assert "\x1b" not in told, "escape codes where there is no terminal"
    assert "Traceback" not in told
    assert left_by(demo.pid) == []
    assert not Path(ROOT, ".demo", f"run-{demo.pid}").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_in_the_middle_of_training_leaves_no_process(
    number: signal.Signals, demos: list[subprocess.Popen[str]]
) -> None:
    demo = start_demo("--no-comparison")
    demos.append(demo)
    assert demo.stdout is not None
    told = []
    for line in demo.stdout:
        told.append(line)
        if "from the beginning" in line:
            break
    else:
        pytest.fail("the demo ended before a job ran:\n" + "".join(told) + demo.communicate()[1])
    assert left_by(demo.pid), "a demo that trains has processes"

    demo.send_signal(number)
    # Its guardian and its trainers hold the other ends of no pipe of ours: this is the demo's end.
    rest, errors = demo.communicate()

    if number == signal.SIGINT:
        assert demo.returncode == 128 + signal.SIGINT
        assert "Traceback" not in rest + errors
    else:
        wait_for_the_guardian(demo.pid)
    assert left_by(demo.pid) == []


def wait_for_the_guardian(pid: int) -> None:
    """Until the guardian of a demo that was killed has ended the rest, and itself."""
    guardians = [
        process.pid
        for process in proc.all_processes()
        if b"tests.e2e.guardian" in (words := proc.read_bytes(process.pid, "cmdline"))
        and words.rstrip(b"\0").endswith(os.fsencode(f"/run-{pid}"))
    ]
    for guardian in guardians:
        try:
            descriptor = os.pidfd_open(guardian)
        except ProcessLookupError:
            continue
        ready, _, _ = select.select([descriptor], [], [], 120.0)
        os.close(descriptor)
        assert ready, "the guardian did not finish"
