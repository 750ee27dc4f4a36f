"""What the shell takes in of trainers while its journal takes nothing."""

from typing import cast

from agent.core import messages as m
from agent.core.launch import LaunchOptions
from agent.core.node import NodeCore
from agent.core.state import Memory, Options
from agent.core.trainer_messages import TrainerProgress, TrainerSection
from agent.shell import BATCH_MAX, INBOX_MAX, AgentShell, Ports

OPTIONS = Options("", LaunchOptions("n1", "/run/agent.sock", "/state", "/bin/python", ()))


def test_where_a_trainer_is_gets_through_a_full_inbox() -> None:
    """It had left the section when there was no room: it must not be taken for hung in there."""
    shell = AgentShell(NodeCore(OPTIONS, Memory("j")), cast("Ports", None))
    for step in range(INBOX_MAX):
        shell.on_trainer_message("1.1", TrainerProgress(step, None, ()))
    for name in ("step", "save", ""):
        shell.on_trainer_message("1.1", TrainerSection(7, name, 1))
    shell.on_trainer_message("1.1", TrainerSection(8, "step", 1))
    shell.on_trainer_message("1.1", TrainerProgress(INBOX_MAX, None, ()))
    taken = shell._drain() + shell._drain()
    assert BATCH_MAX < len(taken) <= 2 * BATCH_MAX
    told = [one.message for one in taken if isinstance(one, m.FromTrainer)]
    assert sum(isinstance(message, TrainerProgress) for message in told) == INBOX_MAX
    sections = {one.source: one for one in told if isinstance(one, TrainerSection)}
    assert sections == {7: TrainerSection(7, "", 0), 8: TrainerSection(8, "step", 0)}
