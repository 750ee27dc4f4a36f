"""Orders of power that come to nothing, and what is left when a node is gone.

Problem: an order that had no turn says nothing of its node, one that is repeated is given in
another world than the first time, and of a rented node that is gone only records are left. What is
counted, waited for and known then is looked at here.
"""

from collections.abc import Iterator

import pytest

from coordinator.core import power
from coordinator.core.capacity_model import Power
from coordinator.core.cost_requests import CostPage, GetCosts
from coordinator.core.messages import (
    AgentEvent,
    AgentEventBody,
    AttemptStarted,
    CheckpointProposed,
    FromAgent,
    Refusal,
    RequeueJob,
    UncordonNode,
)
from coordinator.core.node_power import DAY_MS, POSTPONED_MAX, is_gone
from tests.core.coordinator_harness import GIGABYTE, UNIX_MS_AT_START
from tests.core.switched_fleet import ACTS, TICK_MS, SwitchedRig
from tests.core.test_power import shown
from tests.core.test_rentals import RentingRig, end_all, exit_of, rented


@pytest.fixture
def fleet() -> SwitchedRig:
    fleet = SwitchedRig.new()
    for name in ("n1", "n2", "n3"):
        fleet.hello(name)
    return fleet


@pytest.fixture
def own_name() -> Iterator[None]:
    """Of a fleet that rents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.core.test_fleet_scaling.NAMES", ("n1",))
        yield


def test_a_start_that_has_no_turn_is_no_failed_boot(fleet: SwitchedRig) -> None:
    """It is ordered again, more and more seldom, and left to a person in the end."""
    fleet.off("n3")
    fleet.start("n3")
    waits_ms = []
    for _ in range(POSTPONED_MAX):
        fleet.answer("n3", done=False, reason="it waited for its turn", postponed=True)
        assert "is put off: it waited for its turn; it is ordered again" in shown(fleet, "n3")
        begun_ms, orders = fleet.rig.now_ms, len(fleet.orders)
        while len(fleet.orders) == orders:
            fleet.wait(TICK_MS)
        waits_ms.append(fleet.rig.now_ms - begun_ms)
        assert fleet.power("n3") is Power.STARTING
        assert fleet.node("n3").power.boot_failures == 0
    assert waits_ms == [ACTS.boot_retry_ms << times for times in range(POSTPONED_MAX)]
    assert f"put off {POSTPONED_MAX} times of {POSTPONED_MAX}" in fleet.node("n3").power.reason
    fleet.answer("n3", done=False, reason="it waited for its turn", postponed=True)
    assert fleet.power("n3") is Power.FAILED
    assert "never begun, `baton uncordon n3` tries again" in fleet.node("n3").power.reason


def test_a_turn_that_was_waited_for_counts_as_no_try(fleet: SwitchedRig) -> None:
    fleet.off("n3")
    fleet.start("n3")
    fleet.answer("n3", done=False, reason="it waited for its turn", postponed=True)
    fleet.wait(ACTS.boot_retry_ms)
    for _ in range(ACTS.boot_retries):
        fleet.answer("n3", done=False, reason="no route to the BMC")
        fleet.wait(ACTS.boot_retry_ms)
    assert fleet.power("n3") is Power.STARTING
    fleet.hello("n3")
    assert fleet.power("n3") is Power.ON
    assert not fleet.rig.core.state.switching.postponed


@pytest.mark.usefixtures("own_name")
def test_a_restart_counts_what_was_used_on_a_rented_node_that_is_gone_as_before() -> None:
    fleet = rented()
    state = fleet.rig.core.state
    exit_of(fleet, next(iter(state.nodes["r1"].attempts)))
    fleet.submit(shared_gpu_memory_bytes=20 * GIGABYTE)
    shared = state.jobs[state.last_job_id]
    assert state.gang(shared)[0].node == "r1"
    fleet.wait(5_000)
    end_all(fleet)
    booked, before = state.ledger.ended, bill(fleet)
    assert state.ledger.parts(f"{shared.id}.1") == 278, "20 of 72 GB"
    power.give_back(state, fleet.rig.now, state.nodes["r1"], "a test")
    fleet.wait(1_000)
    fleet.obey("r1")
    fleet.wait(20_000)
    assert is_gone(fleet.node("r1").power)
    assert bill(fleet) == pytest.approx(before, rel=0.01), "of a part by the memory of its type"
    fleet.rig.restart()
    assert fleet.rig.core.state.ledger.ended == booked


def bill(fleet: RentingRig) -> float:
    """The hours of all jobs."""
    page = fleet.ask(GetCosts(UNIX_MS_AT_START, UNIX_MS_AT_START + DAY_MS))
    assert isinstance(page, CostPage)
    return sum(line.money.gpu_hours for line in page.lines)


@pytest.mark.usefixtures("own_name")
@pytest.mark.parametrize("returns", [True, False])
def test_a_deletion_is_not_ordered_again_while_only_that_node_has_a_checkpoint(
    returns: bool,
) -> None:
    """It was ordered when another node had a copy, and that one has been lost since."""
    fleet = rented()
    state = fleet.rig.core.state
    (attempt_id,) = state.nodes["n1"].attempts
    session, rented_session = state.nodes["n1"].session, state.nodes["r1"].session
    assert session is not None
    assert rented_session is not None
    saved = CheckpointProposed("c1", "", 10, 1, ("n1", "r1"))
    told: list[AgentEventBody] = [AttemptStarted(7), saved]
    for sequence, body in enumerate(told, start=1):
        fleet.handle(FromAgent(session, AgentEvent(sequence, 0, attempt_id, body)))
    for other in list(state.nodes["r1"].attempts):
        exit_of(fleet, other)
    power.give_back(state, fleet.rig.now, state.nodes["r1"], "a test")
    fleet.wait(1_000)
    fleet.answer("r1", done=False, reason="no such token")
    for each in (session, rented_session):
        fleet.hang_up(each)
    fleet.wait(60_000)
    deletions, mine = [("r1", "create"), ("r1", "delete")], ("r1",)
    assert fleet.verbs(mine) == deletions
    assert fleet.power("r1") is Power.STOPPING
    if returns:
        fleet.hello("n1", checkpoints=("c1",))
        fleet.wait(1_000)
        assert fleet.verbs(mine) == [*deletions, ("r1", "delete")]
        return
    fleet.wait(ACTS.unanswered_ms)
    assert fleet.verbs(mine) == deletions
    assert fleet.power("r1") is Power.FAILED
    assert fleet.node("r1").power.reason.startswith("a checkpoint of job 1 lies nowhere else; it")
    refused = fleet.ask(UncordonNode("r1"))
    assert isinstance(refused, Refusal)
    assert refused.sentence.endswith(
        "nowhere else; `baton requeue --abandon` gives it up, for its job"
    )
    fleet.ask(RequeueJob(1, abandon_unreachable_checkpoints=True))
    fleet.ask(UncordonNode("r1"))
    assert fleet.verbs(mine) == [*deletions, ("r1", "delete")]
