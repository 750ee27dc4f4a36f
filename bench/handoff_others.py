"""What others need to go on after their worker was killed, on the same model and data.

Two of the ways in which people survive a crash today, on one machine: a plain PyTorch script that
saves every second with `torch.save` under `torchrun --max-restarts`, and a Hugging Face `Trainer`
script that a shell loop starts again with `resume_from_checkpoint`. In both the worker gets a
SIGKILL once it has saved, and what counts is the time to the first step of the next one. Both note
the wall time of every step in a file; there is nothing else between them and the clock.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import report

WAIT_S_MAX = 120.0
POLL_S = 0.005
PROGRAMS = Path(__file__).parent / "programs"
TORCHRUN, LOOP = "torchrun --max-restarts", "Hugging Face Trainer in a shell loop"


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a program's file: its pid, the wall time, how often it had saved by then."""

    pid: int
    at_s: float
    saves: int


def measure(prepared: Path, repetitions: int) -> dict[str, list[float]]:
    """Seconds from SIGKILL to the next worker's first step, by way."""
    return {
        TORCHRUN: _killed_again_and_again(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1",
                f"--max-restarts={repetitions}", str(PROGRAMS / "plain_training.py"),
            ],
            prepared,
            repetitions,
        ),
        LOOP: _killed_again_and_again(
            ["bash", "-c", 'until "$@"; do :; done', "bash", sys.executable,
             str(PROGRAMS / "hugging_face_training.py")],
            prepared,
            repetitions,
        ),
    }  # fmt: skip


def _killed_again_and_again(
    command: Sequence[str], prepared: Path, repetitions: int
) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        directory = Path(scratch)
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, str(prepared), scratch],
                env=variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            return [_kill_once(process, directory) for _ in range(repetitions)]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _kill_once(process: subprocess.Popen[bytes], directory: Path) -> float:
    """Wait for a step after a save, kill the worker, wait for another one's first step."""
    victim = _wait(process, directory, lambda step: step.saves > 0).pid
    died_s = time.time()
    os.kill(victim, signal.SIGKILL)
    return _wait(process, directory, lambda step: step.pid != victim).at_s - died_s


def _wait(
    process: subprocess.Popen[bytes], directory: Path, wanted: Callable[[Step], bool]
) -> Step:
    """The first step of the newest worker that is wanted."""
    end_s = time.monotonic() + WAIT_S_MAX
    while time.monotonic() < end_s and process.poll() is None:
        steps = _steps(directory / "steps")
        newest = [step for step in steps if step.pid == steps[-1].pid]
        if found := next((step for step in newest if wanted(step)), None):
            return found
        time.sleep(POLL_S)
    tail = (directory / "log").read_text("utf-8", "replace")[-2000:]
    raise RuntimeError(f"the program beside ours did not go on:\n{tail}")


def _steps(file: Path) -> list[Step]:
    if not file.exists():
        return []
    # The last line may be half written.
    lines = file.read_text("ascii").rpartition("\n")[0].splitlines()
    return [Step(int(pid), float(at_s), int(saves)) for pid, at_s, saves in map(str.split, lines)]


if __name__ == "__main__":
    for name, seconds in measure(Path(sys.argv[1]), 2).items():
        report.say(f"{name}: {seconds}")
