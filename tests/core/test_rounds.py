"""What makes a round over all who wait: room that came free, and what lets nobody start does not.

Problem: a round looks at everybody who waits. One more for each of five hundred small jobs is a
third of what the coordinator does in such a burst, and no answer shows it.
"""

from coordinator.core.messages import (
    AgentEvent,
    AgentEventBody,
    AttemptExited,
    AttemptStarted,
    FromAgent,
    Hello,
    Request,
    Submit,
)
from coordinator.core.model import GpuFacts, HostFacts, JobSpec
from tests.core.coordinator_harness import GIGABYTE, Rig

HOST = HostFacts(cpu_count=1, memory_bytes=8 * GIGABYTE)


def rig_of_one_node() -> Rig:
    rig = Rig()
    gpus = (GpuFacts("g1", "NVIDIA H100", 80 * GIGABYTE),)
    rig.handle(FromAgent(1, Hello("n1", "j1", "", HOST, gpus)))
    return rig


def looks_again(rig: Rig, sequence: int, attempt: str, body: AgentEventBody) -> bool:
    rig.handle(FromAgent(1, AgentEvent(sequence, 0, attempt, body)), decide=False)
    return rig.core.state.undecided


def test_a_held_job_is_nobody_to_look_at() -> None:
    rig = rig_of_one_node()
    rig.handle(Request(1, Submit(JobSpec(command=("true",), hold=True))), decide=False)
    assert not rig.core.state.undecided
    rig.handle(Request(2, Submit(JobSpec(command=("true",)))), decide=False)
    assert rig.core.state.undecided


def test_a_job_that_begins_lets_nobody_start_and_one_that_ends_does() -> None:
    rig = rig_of_one_node()
    rig.handle(Request(1, Submit(JobSpec(command=("true",)))))
    assert not looks_again(rig, 1, "1.1", AttemptStarted(7))
    assert looks_again(rig, 2, "1.1", AttemptExited(0))


def test_of_one_with_gpus_what_others_are_told_may_change() -> None:
    """As where it began on a GPU that is reserved for somebody."""
    rig = rig_of_one_node()
    rig.handle(Request(1, Submit(JobSpec(command=("true",), gpus=1))))
    assert looks_again(rig, 1, "1.1", AttemptStarted(7))
