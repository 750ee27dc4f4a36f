"""A node for the tests of the agent's core."""

from agent.core import messages as m
from agent.core.launch import LaunchOptions
from agent.core.node import NodeCore
from agent.core.state import Effect, Instant, Options, Record
from agent.core.values import GpuFacts, HostFacts, ReplicaSource, Restored
from tests.core.agent_memory import MemoryJournal

LAUNCH = LaunchOptions("n1", "/sock", "/attempts", "/python", ())
# With a floor that the time between two events can pass.
OPTIONS = Options("n1:1", LAUNCH, hang_floor_ms=50)
HOST = HostFacts("box", "boot", 8, 1, "", "")
GPUS = ("A", "B")
PEER = ReplicaSource("n2", "n2:1")
ENDS = m.AttemptExited | m.AttemptRefused
ROUNDS_MAX = 400  # of the last, friendly stretch of a history; far more than anything needs


class Node:
    """A node's core under a clock, welcome to its coordinator. Its journal outlives its kills."""

    options, host = OPTIONS, HOST
    greeting = m.Welcome(1, 1_000, 8_000, 0)
    unix_ms = 0  # when the clock showed 0

    def __init__(self, *gpus: GpuFacts, now_ms: int = 0) -> None:
        self.journal = MemoryJournal()
        self.now_ms = now_ms
        self.gpus = gpus
        self.begin()

    def begin(self, adopted: tuple[str, ...] = ()) -> list[Effect]:
        """From the journal, as after a kill; `adopted` still run. Returns what it does before it is
        heard."""
        self.core = NodeCore(self.options, self.journal.memory())
        effects = list(self.hear(m.Opened(adopted, self.host, self.gpus)))
        self.hear(m.Connected(()))
        self.order(self.greeting)
        return effects

    def hear(self, event: m.Event) -> list[Effect]:
        """What it does then; its records are in the journal."""
        now = Instant(self.now_ms, self.unix_ms + self.now_ms)
        effects = self.core.handle(now, event)
        self.journal.commit([effect for effect in effects if isinstance(effect, Record)])
        return effects

    def order(self, order: m.Order) -> list[Effect]:
        return self.hear(m.FromCoordinator(order, "0" * 32))

    def run(self, order: m.StartAttempt) -> None:
        """Through the restore of nothing to a process."""
        self.order(order)
        self.hear(m.RestoreDone(order.attempt, Restored("", 0, "")))
        self.hear(m.ProcessStarted(order.attempt, 7))
