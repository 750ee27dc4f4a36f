"""How an attempt has ended, where more is known of it than the status of its process.

Problem: a status says little. Of a trainer that was killed since it hung it says "signal 9". Of
workers that have left with 75, to be run again, or with 12, out of memory, a launcher's says 1, as
of any failure (torchrun, and what is made with it). So what a section's limit or the trainer itself
has said goes with it.

A trainer's word counts within its attempt, until another program of that says hello: launchers
start their workers again. It says what a launcher's 1 is about, and nothing of any other status.
"""

from dataclasses import replace

from agent.core.attempt import AttemptRecord, LiveAttempt
from agent.core.state import State, sentence
from agent.core.trainer_messages import TrainerLeaving
from agent.core.values import ProcessExit

LAUNCHER_STATUS = 1
SHELL_SIGNAL_BASE = 128  # a shell's status for a program that a signal has ended is above this


def begun(state: State, live: LiveAttempt) -> None:
    """A program has said hello; what the one before it said is not about this one."""
    if live.record.said_exit_code is not None:
        state.put(live, said_exit_code=None, said_reason="")


def said(state: State, live: LiveAttempt, word: TrainerLeaving) -> None:
    """Journalled: the agent may be gone when the end comes. Once, where eight ranks say the
    same."""
    reason = sentence(word.reason)
    if (live.record.said_exit_code, live.record.said_reason) != (word.status, reason):
        state.put(live, said_exit_code=word.status, said_reason=reason)


def exit_of(record: AttemptRecord, ended: ProcessExit) -> ProcessExit:
    """Its end as it is reported: with what it hung in, if that is why a signal ended it, else with
    the trainer's own reason."""
    code = ended.exit_code
    if record.exit_reason and (code is None or code > SHELL_SIGNAL_BASE):
        return replace(ended, reason=record.exit_reason)
    if not ended.reason and code in (record.said_exit_code, LAUNCHER_STATUS):
        return replace(ended, reason=record.said_reason)
    return ended


def plainly(ended: ProcessExit) -> str:
    """Of one that nothing more is known of."""
    return f"exit status {ended.exit_code}" if ended.signal is None else f"signal {ended.signal}"


def said_of(record: AttemptRecord) -> int | None:
    """The status of those below a launcher, as far as it is known. Where it is the launcher's own,
    there may be none, and nothing is to be added."""
    said = record.said_exit_code
    return said if record.exit_code == LAUNCHER_STATUS != said else None
