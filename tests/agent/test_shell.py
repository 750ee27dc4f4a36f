"""What the shell takes in of trainers while its journal takes nothing."""

from types import SimpleNamespace
from typing import cast

from agent.core import messages as m
from agent.core.launch import LaunchOptions
from agent.core.node import NodeCore
from agent.core.state import Instant, Memory, Options
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


def test_a_heartbeat_comes_however_much_there_is_to_do() -> None:
    """Each round finds the next event already there: on a slow disk a commit takes that long."""
    clock = SimpleNamespace(now_ms=lambda: 20_000)
    shell = AgentShell(NodeCore(OPTIONS, Memory("j")), cast("Ports", SimpleNamespace(clock=clock)))
    welcome = m.Welcome(0, heartbeat_interval_ms=1_000, lease_ms=60_000, acknowledged_sequence=0)
    shell._core.handle(Instant(0, 0), m.Connected(()))
    shell._core.handle(Instant(0, 0), m.FromCoordinator(welcome, ""))
    shell.post(m.FromCoordinator(m.EventAck(1), ""))
    (event, tick) = shell._drain()
    assert isinstance(event, m.FromCoordinator)
    effects = shell._core.handle(Instant(20_000, 0), tick)
    assert any(isinstance(one, m.Send) and isinstance(one.message, m.Heartbeat) for one in effects)
