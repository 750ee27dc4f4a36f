"""Stacks of a hung trainer, from real processes: who can write them does, and nobody else notices.

Problem: a trainer that hangs, hangs in C code, where no Python handler runs; and the same job has
processes that would be ended by a signal they do not know. Both are the kernel's doing, so the
programs here are real.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

import baton_sdk
from agent.core.values import Launch, ProcessExit
from agent.processes import proc, records, stacks
from agent.processes.supervisor import Supervisor
from tests.agent.test_processes import PATH, alive
from tests.agent.waiting import until

# Two threads: one sleeps, the main one reads from a socket that nobody writes to; a forked child
# waits for a lock that it holds itself.
HANGING = """
import os, socket, sys, threading, time
import baton_sdk
baton_sdk.connect()
def sleeps_in_a_thread():
    time.sleep(600)
def waits_for_its_own_lock():
    lock = threading.Lock()
    lock.acquire()
    print("child", flush=True)
    lock.acquire()
def reads_from_nobody():
    ours, theirs = socket.socketpair()
    print("ready", flush=True)
    ours.recv(1)
threading.Thread(target=sleeps_in_a_thread, daemon=True).start()
if os.fork() == 0:
    waits_for_its_own_lock()
reads_from_nobody()
"""
FUNCTIONS = ("sleeps_in_a_thread", "waits_for_its_own_lock", "reads_from_nobody")


def written(supervisor: Supervisor) -> str:
    """What the attempt has written so far."""
    kept = records.segments(supervisor.attempt_directory("1.1"))
    return "".join(path.read_text() for _, path in kept)


async def test_stacks_of_every_thread_and_rank_land_in_the_log(tmp_path: Path) -> None:
    exits: list[ProcessExit] = []
    supervisor = Supervisor(tmp_path)
    await supervisor.open(exits.append)
    supervisor.dump_stacks("1.1", "")  # not there (yet): no error
    # A shell around it and a program beside it, neither of which expects the signal.
    script = 'sleep 600 & "$1" -c "$2"; exit 7'
    words = ("bash", "-c", script, "bash", sys.executable, HANGING)
    paths = ("PYTHONPATH", os.pathsep.join(sys.path))
    environment = (PATH, paths, ("BATON_SOCKET", str(tmp_path / "nobody.sock")))
    pid = await supervisor.start(Launch("1.1", words, environment, str(tmp_path)))
    await until(lambda: {"child", "ready"} <= set(written(supervisor).split()))
    started = records.read_started(supervisor.attempt_directory("1.1"))
    assert started is not None
    before = {process.pid for process in proc.descendants(started.shim_pid)}
    supervisor.dump_stacks("1.1", "")
    await until(lambda: all(f"in {name}" in written(supervisor) for name in FUNCTIONS))
    assert "Thread 0x" in written(supervisor)
    assert {process.pid for process in proc.descendants(started.shim_pid)} == before
    assert alive(pid)
    assert exits == []
    supervisor.kill("1.1")
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, signal.SIGKILL)]
    supervisor.dump_stacks("1.1", "")  # it has gone: no error
    await supervisor.close()


def test_agent_and_sdk_mean_the_same_signal_and_it_stops_nothing() -> None:
    assert stacks.DUMP_SIGNAL == baton_sdk.DUMP_SIGNAL
    assert stacks.DUMP_SIGNAL not in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    assert signal.SIGRTMIN < stacks.DUMP_SIGNAL < signal.SIGRTMAX


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGSEGV, stacks.DUMP_SIGNAL])
def test_who_catches_a_signal(number: int) -> None:
    before = signal.signal(number, lambda *_: None)
    try:
        assert stacks.catches(os.getpid(), number)
        signal.signal(number, signal.SIG_IGN)
        assert not stacks.catches(os.getpid(), number)
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)
    assert not stacks.catches(2**22, number), "no process has this number"


def test_only_pipes_that_are_read_are_written_to(tmp_path: Path) -> None:
    for name in ("nccl[0.pipe", "nccl[1.pipe", "other.pipe"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "nccl[2.pipe").write_text("a file")
    (tmp_path / "nccl[3.pipe").symlink_to(tmp_path / "other.pipe")
    readers = {
        name: os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK)
        for name in ("nccl[0.pipe", "other.pipe")
    }
    assert stacks.trigger(str(tmp_path / "nccl[")) == 1
    assert os.read(readers["nccl[0.pipe"], 10) == b"1"
    assert os.read(readers["other.pipe"], 10) == b""
    assert (tmp_path / "nccl[2.pipe").read_text() == "a file"
    for reader in readers.values():
        os.close(reader)
