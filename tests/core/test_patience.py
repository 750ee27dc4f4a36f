"""Jobs that may wait: no node is on for them before their time, and in it there is one.

Problem: who waits by his own wish saves a boot and an idle node, and who is forgotten has been
promised a time that nobody keeps. So these look at when the node is ordered: not before it has to
be, and early enough to boot.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import consolidation, patience
from coordinator.core.capacity_model import LEVELS, Outlook, Power
from coordinator.core.capacity_orders import Verb
from coordinator.core.messages import (
    AgentEvent,
    AttemptExited,
    ExplainJob,
    Explanation,
    FromAgent,
)
from coordinator.core.model import JobClass
from coordinator.core.phases import JobPhase
from coordinator.core.scaling import Mode
from coordinator.core.standing import Promise
from tests.core.switched_fleet import ACTS
from tests.core.test_fleet_scaling import ScaledRig

MINUTE_MS = 60_000
HALF_AN_HOUR_MS = 30 * MINUTE_MS
# A boot of 20 s and a plan each minute, in whole minutes of demand.
SOON_MS = 2 * MINUTE_MS


@pytest.fixture
def fleet() -> ScaledRig:
    """Two nodes are busy, two are off."""
    made = ScaledRig.of(Mode.ACT)
    made.soon = made.later = 2.0
    made.forecast()
    for name, others in (("n3", ("n1", "n2", "n4")), ("n4", ("n1", "n2"))):
        made.off(name)
        for other in others:  # nobody beats while one goes
            made.hello(other)
    for _ in range(2):
        made.submit()
    made.live(61)
    assert [made.power(name) for name in ("n1", "n2", "n3", "n4")] == [Power.ON] * 2 + [
        Power.OFF
    ] * 2
    made.orders.clear()
    return made


def resumed(fleet: ScaledRig) -> list[str]:
    return [order.nodes[0] for order in fleet.orders if order.verb is Verb.RESUME]


def test_people_are_shown_that_who_may_wait_is_not_needed_yet(fleet: ScaledRig) -> None:
    """What `baton plan` says is needed is what the plan acts by."""
    fleet.submit(flexible_ms=HALF_AN_HOUR_MS)
    fleet.soon = fleet.later = 3.0  # a forecast is of all that waits
    fleet.forecast()
    fleet.live(61)
    (shown,) = fleet.page().types
    assert (shown.running_gpus, shown.queued_gpus, shown.need_gpus) == (2, 1, 2)
    assert not resumed(fleet)
    assert fleet.page() == fleet.page(), "who looks changes nothing"


def test_a_node_is_started_for_it_when_it_has_to_be_and_not_sooner(fleet: ScaledRig) -> None:
    job_id = fleet.submit(flexible_ms=HALF_AN_HOUR_MS)
    fleet.soon = fleet.later = 3.0  # the forecast is of all that waits
    since_ms = fleet.rig.now_ms
    while not resumed(fleet):
        fleet.live(1)
        assert fleet.rig.now_ms < since_ms + HALF_AN_HOUR_MS
    ordered_ms = fleet.rig.now_ms - since_ms
    assert HALF_AN_HOUR_MS - SOON_MS <= ordered_ms <= HALF_AN_HOUR_MS - ACTS.boot_guess_ms
    assert fleet.rig.core.state.jobs[job_id].phase is JobPhase.QUEUED
    fleet.hello(resumed(fleet)[0])
    fleet.live(2)
    assert fleet.rig.core.state.jobs[job_id].phase is JobPhase.ACTIVE


def test_it_takes_what_comes_free_meanwhile(fleet: ScaledRig) -> None:
    first = fleet.rig.core.state.attempts["1.1"]
    job_id = fleet.submit(flexible_ms=HALF_AN_HOUR_MS)
    fleet.live(120)
    assert not resumed(fleet)
    live = fleet.rig.core.state.nodes[first.node]
    assert live.session is not None
    sequence = live.node.acknowledged + 1
    exited = AgentEvent(sequence, fleet.rig.now.unix_ms, first.id, AttemptExited(0))
    fleet.handle(FromAgent(live.session, exited))
    fleet.live(2)
    assert fleet.rig.core.state.jobs[job_id].phase is JobPhase.ACTIVE
    fleet.live(1_800)
    assert not resumed(fleet)


@pytest.mark.parametrize(
    "asks",
    [{}, {"flexible_ms": HALF_AN_HOUR_MS, "job_class": JobClass.GUARANTEED}],
    ids=["urgent", "guaranteed"],
)
def test_for_these_a_node_is_started_at_once(fleet: ScaledRig, asks: dict[str, object]) -> None:
    fleet.submit(**asks)
    for _ in range(61):
        if not resumed(fleet):
            fleet.live(1)
    assert len(resumed(fleet)) == 1


def test_who_may_wait_and_has_a_deadline_of_which_nobody_knows_is_urgent(fleet: ScaledRig) -> None:
    deadline_unix_ms = fleet.rig.now.unix_ms + 4 * HALF_AN_HOUR_MS
    job_id = fleet.submit(flexible_ms=HALF_AN_HOUR_MS, deadline_unix_ms=deadline_unix_ms)
    state = fleet.rig.core.state
    job = state.jobs[job_id]
    assert patience.left_ms(state, fleet.rig.now, job) == 0
    state.standing.latest_ms[job_id] = fleet.rig.now_ms + 5 * MINUTE_MS
    assert patience.left_ms(state, fleet.rig.now, job) == 5 * MINUTE_MS
    state.standing.latest_ms[job_id] = fleet.rig.now_ms + 5 * HALF_AN_HOUR_MS
    assert patience.left_ms(state, fleet.rig.now, job) == HALF_AN_HOUR_MS


def test_who_is_on_his_way_to_a_place_is_taken_from_the_demand_once(fleet: ScaledRig) -> None:
    """A node is emptied, and one who may wait and one who may not were on it."""
    job_id = fleet.submit(flexible_ms=HALF_AN_HOUR_MS)
    fleet.submit()
    state, now = fleet.rig.core.state, fleet.rig.now
    found = patience.patients(state, now)
    assert list(found) == [job_id]
    gpu_type = found[job_id].gpu_type
    for claim in (True, False):
        promise = Promise(gpu_type, now.now_ms + 1_000, now.now_ms, ("n1",), claim=claim)
        state.standing.promises[job_id] = promise
        seen = consolidation.settled(state, [Outlook(gpu_type, 2, 2, 0)])
        (left,) = patience.outlooks(state, now, seen)
        assert left.queued_gpus == 1, "who may not wait"


def test_it_is_told_that_it_waits_by_its_own_wish_and_until_when(fleet: ScaledRig) -> None:
    job_id = fleet.submit(flexible_ms=HALF_AN_HOUR_MS)
    told = fleet.ask(ExplainJob(job_id))
    assert isinstance(told, Explanation)
    assert "; by its own wish it may wait for 30 min more, until " in told.sentence
    assert told.sentence.count("before GPUs are kept, rented or switched on for it") == 1
    fleet.submit()
    fleet.live(121)
    said = [record.sentence for record in fleet.rig.disk.scaled.values()]
    assert any(", 1 more may wait" in sentence for sentence in said)


@given(
    queued=st.integers(0, 50),
    soon=st.floats(0, 100),
    later=st.floats(0, 100),
    jobs=st.lists(st.tuples(st.integers(1, 8), st.booleans()), max_size=6),
)
def test_what_is_left_of_demand_is_never_less_than_what_is_urgent(
    queued: int, soon: float, later: float, jobs: list[tuple[int, bool]]
) -> None:
    patients = {
        number: patience.Patient("H100", gpus, beyond) for number, (gpus, beyond) in enumerate(jobs)
    }
    waits = sum(gpus for gpus, _ in jobs)
    whole = Outlook(
        "H100", 4, queued + waits, 1, (soon + waits,) * len(LEVELS), (later + waits,) * len(LEVELS)
    )
    (found,) = patience.without(patients.values(), [whole])
    assert found.queued_gpus == queued
    assert found.guaranteed_gpus == 1
    assert found.soon_gpus == pytest.approx((soon,) * len(LEVELS))
    due = sum(gpus for gpus, beyond in jobs if not beyond)
    assert found.later_gpus == pytest.approx((later + due,) * len(LEVELS))
    (less,) = patience.without(patients.values(), [replace(whole, soon_gpus=(0.0,), queued_gpus=0)])
    assert less.queued_gpus == 0
    assert less.soon_gpus == (0.0,)
