"""A rig whose nodes can be switched: what a plan orders of the core, as events of its history.

Problem: nobody outside the core says "empty this node", a plan does, and plans have tests of their
own. Here a test says it in a plan's place, and the history still replays.
"""

from dataclasses import dataclass

from coordinator.core import power
from coordinator.core.capacity_messages import Actuate, Actuated
from coordinator.core.capacity_model import Power
from coordinator.core.capacity_orders import CapacityOrder, CapacityOutcome
from coordinator.core.messages import Effect, Event, FromAgent, Hello, SessionClosed, Tick
from coordinator.core.model import HostFacts, Node
from coordinator.core.node_power import PowerOptions
from coordinator.core.state import Options
from tests.core.coordinator_harness import GIGABYTE, Rig, gpus_of

HOST = HostFacts("box", "", 8, 64 * GIGABYTE)
TICK_MS = 500
ACTS = PowerOptions(
    acts=True, boot_deadline_ms=60_000, boot_retry_ms=5_000, stop_deadline_ms=30_000,
    boot_guess_ms=20_000,
)  # fmt: skip


@dataclass
class SwitchedRig:
    """`orders` are all that were given, oldest first."""

    rig: Rig
    orders: list[CapacityOrder]
    sessions: int = 0

    @classmethod
    def new(cls, options: Options | None = None) -> "SwitchedRig":
        return cls(Rig(options or Options(power=ACTS)), [])

    def node(self, name: str) -> Node:
        return self.rig.disk.nodes[name]

    def power(self, name: str) -> Power:
        return self.node(name).power.phase

    def handle(self, event: Event) -> list[Effect]:
        effects = self.rig.handle(event)
        self.orders += [effect.order for effect in effects if isinstance(effect, Actuate)]
        return effects

    def hello(self, name: str, gpus: str = "1xH100", checkpoints: tuple[str, ...] = ()) -> int:
        self.sessions += 1
        facts = gpus_of(name, gpus)
        body = Hello(name, f"j-{name}", f"{name}:1", HOST, facts, (), checkpoints)
        self.handle(FromAgent(self.sessions, body))
        return self.sessions

    def leave(self, name: str, why: str = "demand is low") -> list[Effect]:
        state = self.rig.core.state
        power.go(state, self.rig.now, state.nodes[name], why)
        return self.handle(Tick())

    def start(self, name: str, why: str = "demand is coming") -> list[Effect]:
        state = self.rig.core.state
        power.start(state, self.rig.now, state.nodes[name], why)
        return self.handle(Tick())

    def answer(
        self, name: str, done: bool = True, reason: str = "", *, postponed: bool = False
    ) -> list[Effect]:
        """What the driver says of the node's last order."""
        key = next(order.key for order in reversed(self.orders) if name in order.nodes)
        return self.handle(Actuated(CapacityOutcome(key, name, done, reason, postponed)))

    def hang_up(self, session: int) -> None:
        self.handle(FromAgent(session, SessionClosed()))

    def wait(self, duration_ms: int) -> list[Effect]:
        """Nobody says anything meanwhile."""
        effects: list[Effect] = []
        for _ in range(duration_ms // TICK_MS):
            self.rig.now_ms += TICK_MS
            effects += self.handle(Tick())
        return effects

    def off(self, name: str) -> None:
        """As it should go."""
        self.leave(name)
        session = self.rig.core.state.nodes[name].session
        assert session is not None
        self.answer(name)
        self.hang_up(session)
        self.wait(10_000)
        assert self.power(name) is Power.OFF
