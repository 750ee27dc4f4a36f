"""Gangs where scenarios do not reach: hundreds of ranks, many of them on few nodes, time that
counts once, ports, and parts that are elsewhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import mismatches
from coordinator.core.gangs import by_parts
from coordinator.core.messages import (
    AgentEvent,
    AttemptExited,
    AttemptStarted,
    CheckpointProposed,
    FromAgent,
    GetJob,
    Heartbeat,
    Hello,
    Reply,
    Request,
    Send,
    SessionClosed,
    StartAttempt,
    StopAttempt,
    Submit,
    Tick,
)
from coordinator.core.model import HostFacts, JobSpec, JobView, Part, Progress
from coordinator.core.outcomes import YIELDS_MAX
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.rooms import Place
from coordinator.core.state import ATTEMPTS_SHOWN_MAX
from tests.core.coordinator_harness import UNIX_MS_AT_START, Rig

RANKS = 2 * ATTEMPTS_SHOWN_MAX + 50
HOST = HostFacts(cpu_count=RANKS)


class Box:
    """A rig with nodes that say what a test has them say."""

    def __init__(self, *addresses: str, versions: tuple[str, ...] = ()) -> None:
        self.rig = Rig()
        self.sequences = [0] * len(addresses)
        self.sent: list[object] = []
        for number, address in enumerate(addresses):
            host = HostFacts(cpu_count=1, agent_version=versions[number]) if versions else HOST
            hello = Hello(f"n{number}", "j", address, host, ())
            self.take(FromAgent(number, hello))

    def take(self, event: FromAgent | Request | Tick) -> None:
        self.sent = [e.order for e in self.rig.handle(event) if isinstance(e, Send)]

    def pass_ms(self, ms: int) -> None:
        """Time in which all nodes are heard."""
        self.rig.now_ms += ms
        for number in range(len(self.sequences)):
            self.take(FromAgent(number, Heartbeat(self.rig.now_ms)))
        self.take(Tick())

    def submit(self, ranks: int) -> list[StartAttempt]:
        self.take(Request(1, Submit(JobSpec(command=("x",), ranks=ranks))))
        return [order for order in self.sent if isinstance(order, StartAttempt)]

    def say(self, attempt: str, body: AttemptStarted | AttemptExited | CheckpointProposed) -> None:
        node = int(self.rig.disk.attempts[attempt].node[1:])
        self.sequences[node] += 1
        unix_ms = UNIX_MS_AT_START + self.rig.now_ms
        event = AgentEvent(self.sequences[node], unix_ms, attempt, body)
        self.take(FromAgent(node, event))


def test_a_gang_of_hundreds_is_kept_whole_and_ends_as_one() -> None:
    """More ranks than attempts are remembered of a job otherwise."""
    box = Box("n0:1")
    assert len(box.submit(RANKS)) == RANKS
    state = box.rig.core.state
    assert len(state.gang(state.jobs[1])) == RANKS
    box.say("1.1.7", AttemptExited(1))
    assert sum(isinstance(order, StopAttempt) for order in box.sent) == RANKS - 1
    box.rig.restart()
    box.sequences = [1]
    state = box.rig.core.state
    assert len(state.gang(state.jobs[1])) == RANKS
    live = [rank for rank in state.gang(state.jobs[1]) if rank.phase is AttemptPhase.STOPPING]
    assert len(live) == RANKS - 1
    assert state.jobs[1].phase is JobPhase.ACTIVE


def test_ranks_that_do_not_understand_one_another_are_tried_as_long_as_that_takes() -> None:
    """Each node's agent brings the trainers, and an upgrade takes hours. Who leaves with that
    status for a reason of his own has failed."""
    box = Box("n0:1", "n1:1")
    box.submit(2)
    for epoch in range(1, 2 * YIELDS_MAX):
        job = box.rig.core.state.jobs[1]
        assert (job.phase, job.epoch) == (JobPhase.ACTIVE, epoch)
        for rank in range(2):
            box.say(f"1.{epoch}.{rank}", AttemptExited(76, reason="upgrade n0"))
        assert box.rig.core.state.jobs[1].phase is JobPhase.QUEUED
        box.pass_ms(mismatches.RETRY_MS_FIRST if epoch == 1 else mismatches.RETRY_MS)
    job = box.rig.core.state.jobs[1]
    assert (job.phase, job.failures, job.yields) == (JobPhase.ACTIVE, 0, 0)
    for rank in range(2):
        box.say(f"1.{job.epoch}.{rank}", AttemptExited(76))
    assert box.rig.core.state.jobs[1].failures == 1


def test_one_rank_alone_misunderstands_nobody() -> None:
    """Below a launcher that it has started, its trainer leaves with that status."""
    box = Box("n0:1")
    box.submit(1)
    box.say("1.1", AttemptExited(75, reason="upgrade n0", said_exit_code=76))
    job = box.rig.core.state.jobs[1]
    assert (job.phase, job.yields) == (JobPhase.QUEUED, 1)
    assert job.reason.startswith("asked to be run again without having saved anything further")


@pytest.mark.parametrize("versions", [("1.0", "1.0"), ("1.0", "1.1")])
def test_where_no_upgrade_is_why_they_are_not_tried_for_ever(versions: tuple[str, ...]) -> None:
    """Others leave for such a job, each time. A coordinator that restarts goes on counting."""
    box = Box("n0:1", "n1:1", versions=versions)
    box.submit(5)  # more than one node takes
    alike = len(set(versions)) == 1
    for epoch in range(1, YIELDS_MAX + 3):
        job = box.rig.core.state.jobs[1]
        assert (job.phase, job.epoch) == (JobPhase.ACTIVE, epoch)
        assert job.yields == (max(0, epoch - 2) if alike else 0)
        for rank in range(5):
            box.say(f"1.{epoch}.{rank}", AttemptExited(76, reason="another protocol"))
        box.pass_ms(mismatches.RETRY_MS_FIRST if epoch == 1 else mismatches.RETRY_MS)
    job = box.rig.core.state.jobs[1]
    assert job.phase is (JobPhase.FAILED if alike else JobPhase.ACTIVE)
    assert job.reason.endswith("21 times in a row on nodes with one version of the agent") is alike


@pytest.mark.long
def test_ranks_are_numbered_through_the_nodes() -> None:
    box = Box("10.0.0.1:70", "[::1]:70")
    slots = HOST.cpu_count * 4
    places = [order.gang for order in box.submit(slots + 3)]
    assert [place.rank for place in places if place] == list(range(slots + 3))
    told = [
        (place.node_rank, place.local_rank, place.local_world_size) for place in places if place
    ]
    assert told == [(0, i, slots) for i in range(slots)] + [(1, i, 3) for i in range(3)]
    assert all(place and place.nodes == ("n0", "n1") for place in places)
    assert all(place and place.master_host == "10.0.0.1" for place in places)


def test_the_master_is_named_without_brackets_and_its_port_is_another_on_each_try() -> None:
    box = Box("[fe80::1]:70")
    first = box.submit(2)[0].gang
    for rank in range(2):
        box.say(f"1.1.{rank}", AttemptStarted(1))
    for rank in range(2):
        box.say(f"1.1.{rank}", AttemptExited(75))
    box.rig.now_ms += 1_000
    box.take(Tick())
    second = next(order.gang for order in box.sent if isinstance(order, StartAttempt))
    assert first is not None
    assert second is not None
    assert first.master_host == second.master_host == "fe80::1"
    assert second.master_port == first.master_port + 1


def test_who_names_more_ranks_than_there_are_is_cut_short() -> None:
    box = Box("n0:1")
    box.submit(3)
    box.say("1.1.0", AttemptStarted(1, held_ranks=tuple(range(100_000))))
    assert box.rig.disk.attempts["1.1.0"].held_ranks == (0, 1, 2)


def test_the_time_of_a_gang_counts_once() -> None:
    box = Box("n0:1")
    box.submit(3)
    for rank in range(3):
        box.say(f"1.1.{rank}", AttemptStarted(1))
    box.rig.now_ms += 60_000
    (reply,) = [e for e in box.rig.handle(Request(1, GetJob(1))) if isinstance(e, Reply)]
    assert isinstance(reply.answer, JobView)
    assert reply.answer.accounting is not None
    assert [account.wall_s for account in reply.answer.accounts] == [60.0] * 3
    assert reply.answer.accounting.wall_s == 60.0


def test_a_first_failure_of_a_gang_proves_nothing_and_a_second_one_does() -> None:
    """Its port may have been taken; a missing module stays missing."""
    box = Box("n0:1")
    first = box.submit(2)[0].gang
    box.say("1.1.0", AttemptExited(1))
    box.say("1.1.1", AttemptExited(None, 9))
    again = [order.gang for order in box.sent if isinstance(order, StartAttempt)]
    assert first is not None
    assert [place.master_port for place in again if place] == [first.master_port + 1] * 2
    box.say("1.2.0", AttemptExited(1))
    box.say("1.2.1", AttemptExited(None, 9))
    job = box.rig.core.state.jobs[1]
    assert job.phase is JobPhase.FAILED
    assert "it would fail again" in job.reason


def test_a_rank_that_was_killed_before_its_stop_arrived_may_be_why_the_others_failed() -> None:
    """Rank 0 is out of touch and killed from outside; its peer's end is heard first, twice."""
    box = Box("n0:1")
    box.submit(2)
    for epoch in (1, 2):
        box.say(f"1.{epoch}.1", AttemptExited(1, by_itself=True))
        box.say(f"1.{epoch}.0", AttemptExited(None, 9, by_itself=True))
    job = box.rig.core.state.jobs[1]
    assert (job.phase, job.failures) == (JobPhase.QUEUED, 2)


def test_first_jobs_of_two_fleets_on_one_host_do_not_meet() -> None:
    ports = []
    for later_ms in (0, 7):
        box = Box("n0:1")
        box.rig.now_ms += later_ms
        place = box.submit(2)[0].gang
        assert place is not None
        ports.append(place.master_port)
    assert ports[0] != ports[1]


def test_a_large_gang_that_is_started_anew_is_known_after_a_restart() -> None:
    """All ranks of the old try end in the batch that makes the new one, and must be written."""
    box = Box("n0:1", "n1:1")
    box.submit(64)
    node = {attempt.node for attempt in box.rig.core.state.attempts.values()}.pop()
    gone = int(node[1:])
    box.take(FromAgent(gone, SessionClosed()))
    for _ in range(20):
        box.rig.now_ms += 1_000
        box.take(FromAgent(1 - gone, Heartbeat(box.rig.now_ms)))
        box.take(Tick())
    assert box.rig.core.state.jobs[1].epoch == 2
    stored = box.rig.disk.attempts.values()
    assert not [one.id for one in stored if one.epoch == 1 and one.ended_unix_ms is None]
    box.rig.restart()
    box.take(FromAgent(7, Hello(node, "j", f"{node}:1", HOST, ())))
    assert len(box.rig.core.state.gang(box.rig.core.state.jobs[1])) == 64


def test_a_gang_fails_where_it_was_and_not_where_the_silent_rank_was() -> None:
    box = Box("n0:1")
    box.submit(2)
    for rank in range(2):
        box.say(f"1.1.{rank}", AttemptStarted(1))
    for rank in range(2):
        proposed = CheckpointProposed(f"r{rank}", "", 100, 1, ("n0",), 2)
        box.say(f"1.1.{rank}", proposed)
    box.take(FromAgent(0, Heartbeat(1, progress=(("1.1.0", Progress(150)),))))
    for rank, body in ((1, AttemptExited(1)), (0, AttemptExited(None, 9))):
        box.say(f"1.1.{rank}", body)
    for rank in range(2):
        box.say(f"1.2.{rank}", AttemptStarted(1, "r0", 100))
    box.take(FromAgent(0, Heartbeat(2, progress=(("1.2.0", Progress(150)),))))
    for rank, body in ((1, AttemptExited(1)), (0, AttemptExited(None, 9))):
        box.say(f"1.2.{rank}", body)
    trouble = box.rig.core.state.jobs[1].trouble
    assert trouble is not None
    assert trouble.step == 150


# --- which rank goes where ------------------------------------------------------------------------


def placed(nodes: str, *held: str) -> str:
    """By rank, of places on these nodes (a letter each), with who holds each rank's part."""
    places = [Place(node, (str(number),)) for number, node in enumerate(nodes)]
    pieces = [Part(f"r{rank}", 1, tuple(holders)) for rank, holders in enumerate(held)]
    found = by_parts(places, pieces)
    assert sorted(found, key=lambda place: place.gpu_uuids) == places, "no place lost, none twice"
    for node in nodes:  # of one node in their order, so GPUs and local ranks agree
        mine = [place.gpu_uuids for place in found if place.node == node]
        assert mine == sorted(mine)
    return "".join(place.node for place in found)


def test_ranks_go_where_their_parts_lie() -> None:
    # a is gone: its part lies on c, which was the standby of both ranks; b stays with its own.
    assert placed("bc", "ac", "bc") == "cb"
    # b is gone.
    assert placed("ac", "ac", "bc") == "ac"
    # d has all parts, and takes the rank that nobody else could take.
    assert placed("abd", "ad", "cd", "bd") == "adb"
    # Two ranks a node, of four on a, b; b is gone, and c was sent its ranks' parts.
    assert placed("aacc", "ac", "ac", "bc", "bc") == "aacc"
    assert placed("ccdd", "ad", "ad", "bc", "bc") == "ddcc"


def test_places_stay_as_they_are_where_parts_say_nothing() -> None:
    assert placed("bca", "", "", "") == "bca"  # held by nobody that is left
    assert placed("bca") == "bca"  # no checkpoint yet
    assert placed("bca", "a") == "bca"  # one that rank 0 keeps for all
    assert placed("bca", "xs", "ys", "zs") == "bca"  # elsewhere


@given(st.permutations("abcdef"), st.lists(st.sampled_from("abcdefx"), min_size=6, max_size=6))
def test_who_stays_with_its_part_gets_its_rank_again(nodes: list[str], held: list[str]) -> None:
    """Where each part lies on one node, no order has more ranks beside their parts."""
    found = placed("".join(nodes), *held)
    beside = sum(node == holder for node, holder in zip(found, held, strict=True))
    assert beside == len({holder for holder in held if holder != "x"})
