"""An agent that may start no process more (RLIMIT_NPROC): a start is refused with the limit, as one
that another node may take, and comes about when there is room. What runs goes on, and is told.

The limit is the kernel's own. It does not hold for root, so that root's run drops to another user;
what its Python lies in may then be root's alone, hence the capabilities to read it.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from agent.processes import records
from tests.agent.waiting import DEADLINE_S

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65_534
READS = "+dac_override,+dac_read_search"
LATER = "as many processes as may be: of the agent's user (RLIMIT_NPROC, "


def as_ordinary_user(script: str, state: Path) -> list[str]:
    """What it prints, line by line."""
    command = [sys.executable, "-c", textwrap.dedent(script), str(state)]
    if os.getuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root has no limit, and there is no setpriv")
        user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        command = [setpriv, *user, f"--inh-caps=-all,{READS}", f"--ambient-caps={READS}", *command]
        os.chown(state, NOBODY, NOBODY)
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_start_without_a_process_is_refused_for_now_and_what_runs_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    said = as_ordinary_user(
        """
        import asyncio, os, resource, sys
        from pathlib import Path
        from agent.core.values import Launch
        from agent.ports import StartError
        from agent.processes.supervisor import Supervisor
        from tests.agent.waiting import until

        state = Path(sys.argv[1])
        path = (("PATH", "/usr/local/bin:/usr/bin:/bin"),)

        def launch(attempt_id, script):
            return Launch(attempt_id, ("bash", "-c", script), path, "/")

        async def run():
            exits = []
            made = Supervisor(state)
            await made.open(exits.append)
            os.mkfifo(state / "pipe")
            await made.start(launch("1.1", f"read < {state}/pipe; exit 3"))
            soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
            resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
            try:
                await made.start(launch("2.1", "exit 4"))
            except StartError as error:
                print(error.permanent, error)
            with open(state / "pipe", "w") as pipe:
                pipe.write("go")
            await until(lambda: len(exits) == 1)
            resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
            await made.start(launch("2.1", "exit 4"))
            await until(lambda: len(exits) == 2)
            print([(one.attempt_id, one.exit_code) for one in exits])
            await made.close()

        asyncio.run(run())
        """,
        state,
    )
    refusal, exits = (line for line in said if not line.startswith("20"))
    assert refusal.startswith("False cannot start 2.1: there are as many processes as may be: of")
    assert "(RLIMIT_NPROC, 0)" in refusal
    assert exits == "[('1.1', 3), ('2.1', 4)]"


def test_a_supervisor_that_cannot_fork_says_the_same(tmp_path: Path) -> None:
    """The last process that was left has become the supervisor of the trainer."""
    errors = tmp_path / "shim.err"
    ended = "the trainer's supervisor ended before it could start it"
    errors.write_text(
        "Traceback\n  x\nBlockingIOError: [Errno 11] Resource temporarily unavailable\n"
    )
    assert records.shim_failure(tmp_path).startswith(f"{ended}: there are {LATER}")
    errors.write_text("OSError: [Errno 12] Cannot allocate memory\n")
    said = f"{ended}: OSError: [Errno 12] Cannot allocate memory"
    assert records.shim_failure(tmp_path) == said
