"""A node whose wall clock is wrong, or is set while it runs: its jobs are accounted for as ever."""

import pytest

from agent.core import messages as am
from agent.core.state import Instant as AgentInstant
from agent.core.values import Restored
from coordinator.core import accounting
from coordinator.core.clocks import SAID_MS
from coordinator.core.coordinator import Coordinator
from coordinator.core.messages import (
    AgentEvent,
    AttemptExited,
    AttemptMilestone,
    AttemptStarted,
    Decide,
    Effect,
    FromAgent,
    Hello,
    Log,
    Request,
    Submit,
)
from coordinator.core.model import HostFacts, JobSpec
from coordinator.core.state import Instant, Options
from tests.core.test_agent_times import Node

DAY_MS = 86_400_000
UNIX_MS = 1_790_000_000_000
HOST = HostFacts(cpu_count=2, memory_bytes=1 << 30)


class Watched:
    """A coordinator with a right clock, and one node that runs one job."""

    def __init__(self) -> None:
        self.core, self.sequence = Coordinator(Options()), 0
        self.take(0, FromAgent(1, Hello("n1", "j", "n1:1", HOST, ())))
        self.take(0, Request(1, Submit(JobSpec(command=("train",)))))
        self.take(0, Decide())

    def take(self, now_ms: int, event: object) -> list[Effect]:
        return self.core.handle(Instant(now_ms, UNIX_MS + now_ms), event)  # type: ignore[arg-type]

    def says(self, now_ms: int, ahead_ms: int, body: object, age_ms: int = 0) -> list[str]:
        """What the log says to an event of so long ago."""
        self.sequence += 1
        unix_ms = UNIX_MS + now_ms - age_ms + ahead_ms
        event = AgentEvent(self.sequence, unix_ms, "1.1", body, age_ms)  # type: ignore[arg-type]
        effects = self.take(now_ms, FromAgent(1, event))
        clocks = [one for one in effects if isinstance(one, Log) and one.event == "node.clock"]
        return [str(dict(one.fields)["reason"]) for one in clocks]


@pytest.mark.parametrize("ahead_ms", [0, DAY_MS, -DAY_MS, -UNIX_MS])
def test_a_job_is_accounted_for_whatever_its_nodes_clock_says(ahead_ms: int) -> None:
    """Started after 2 s, loaded after 5 more, ended after a minute, heard 10 s later."""
    watched = Watched()
    said = watched.says(2_000, ahead_ms, AttemptStarted(7, start_ms=1_000))
    side = "ahead of" if ahead_ms > 0 else "behind"
    assert said == ([f"it is {abs(ahead_ms) // 1_000} seconds {side} ours"] if ahead_ms else [])
    assert not watched.says(7_000, ahead_ms, AttemptMilestone("load")), "said once"
    watched.says(70_000, ahead_ms, AttemptExited(0), age_ms=10_000)
    (attempt,) = watched.core.state.attempts.values()
    times = attempt.times
    assert (attempt.started_unix_ms, times.ready_ms) == (UNIX_MS + 2_000, 5_000)
    assert times.silent_unix_ms == UNIX_MS + 60_000
    spent = accounting.account(attempt, None, UNIX_MS + 80_000)
    assert (spent.wall_s, spent.detect_s, spent.start_s) == (70, 10, 6)


def test_a_clock_that_was_set_right_is_believed_again_and_a_slow_link_is_no_clock() -> None:
    watched = Watched()
    assert watched.says(2_000, DAY_MS, AttemptStarted(7))
    assert not watched.says(3_000, -2_000, AttemptMilestone("imports")), "a second on its way"
    assert not watched.says(4_000, 0, AttemptMilestone("load"))
    assert watched.core.state.attempts["1.1"].times.ready_ms == 2_000
    assert watched.says(5_000, -SAID_MS - 1, AttemptMilestone("first_step"))


@pytest.mark.parametrize("age_ms", [UNIX_MS, 10**16, 10**21])
def test_nothing_of_an_attempt_was_before_it_was_ordered(age_ms: int) -> None:
    """Of what happened in 1970 before the agent was started anew its wall clock alone tells how
    long ago that was; no calendar, and no database, has what the others say."""
    watched = Watched()
    event = AgentEvent(1, 0, "1.1", AttemptStarted(7), age_ms)
    watched.take(2_000, FromAgent(1, event))
    assert watched.core.state.attempts["1.1"].started_unix_ms == UNIX_MS


@pytest.mark.parametrize("set_by_ms", [0, DAY_MS, -DAY_MS])
def test_an_agent_knows_how_old_its_events_are_while_its_clock_is_set(set_by_ms: int) -> None:
    """The start was spooled while nobody was connected; then the clock is set."""
    node = Node()
    node.at(1_000, am.FromCoordinator(am.StartAttempt("1.1", am.JobSpec(command=("x",)), ()), "1"))
    node.at(2_000, am.Disconnected("cut"))
    node.at(3_000, am.RestoreDone("1.1", Restored("", 0, "")))
    node.at(4_000, am.ProcessStarted("1.1", 7))
    right = AgentInstant(9_000, 9_000 + set_by_ms)
    node.core.handle(right, am.Connected(()))
    welcome = am.FromCoordinator(am.Welcome(1, 1_000, 8_000, 0), "2")
    sent = [one.message for one in node.core.handle(right, welcome) if isinstance(one, am.Send)]
    (event,) = [message for message in sent if isinstance(message, am.AgentEvent)]
    assert (event.unix_ms, event.age_ms) == (4_000, 5_000)
