"""A replica's node that comes back at another address: whoever copies to it hears of it.

Liveness, found by torture: a job that requires a copy waited for ever at the old address.
"""

from coordinator.core import messages as m
from coordinator.core.coordinator import Coordinator
from coordinator.core.launch import PeerAddress
from coordinator.core.model import HostFacts, JobSpec
from coordinator.core.state import Instant, Options

HOST = HostFacts(cpu_count=2, memory_bytes=1 << 30)


def hello(node: str, address: str, *attempts: m.HeldAttempt) -> m.Hello:
    return m.Hello(node, f"journal of {node}", address, HOST, (), attempts)


def test_copies_follow_a_node_to_its_new_address() -> None:
    core, now = Coordinator(Options()), Instant(1_000, 1_000)
    core.handle(now, m.FromAgent(1, hello("n1", "n1:1")))
    core.handle(now, m.Request(1, m.Submit(JobSpec(command=("train",)))))
    core.handle(now, m.Decide())
    core.handle(now, m.FromAgent(2, hello("n2", "n2:1")))
    effects = core.handle(now, m.FromAgent(3, hello("n2", "n2:9")))
    told = [e.order for e in effects if isinstance(e, m.Send) and e.session == 1]
    assert m.SetReplicaTarget("1.1", PeerAddress("n2", "n2:9"), False) in told
