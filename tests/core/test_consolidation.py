"""Nodes that are to go off are emptied by handoff, where that pays.

Problem: whoever is moved loses a restart, and what is gained is only an idle node less. So these
drive the real core over fleets that train, and look at who is moved, where he goes, what is said of
it, and that nobody is moved where it costs more, or where one of a node has no place.
"""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import consolidation, power
from coordinator.core.capacity_model import LEVELS, Outlook, Power
from coordinator.core.consolidation import Follower, worth
from coordinator.core.demand_messages import ForecastMade, TypeForecast
from coordinator.core.guard_rails import Bounds
from coordinator.core.messages import FromAgent, HeldAttempt, Hello, Tick
from coordinator.core.phases import JobPhase, NodeIntent
from coordinator.core.scaler import ScalingOptions
from coordinator.core.scaling import Mode, Rules
from coordinator.core.state import Options
from tests.core.coordinator_harness import gpus_of
from tests.core.switched_fleet import ACTS
from tests.core.training_fleet import HOST, Fleet

HOUR_MS = 3_600_000
FOUR = "4xH100"
LONG = 100_000
RULES = Rules()
# No plan is made but by the test.
ALONE = Options(power=ACTS, scaling=ScalingOptions(RULES, interval_ms=10**9))


def thinned(*gpus: str, keep: dict[str, int], total: int = LONG, seconds: int = 720) -> Fleet:
    """All GPUs have trained for so long; then so many jobs are left on each node."""
    fleet = Fleet(*gpus, options=ALONE)
    count = sum(len(live.gpus) for live in fleet.state.nodes.values())
    for _ in range(count):
        fleet.submit(total=total)
    fleet.tick_ms = 5_000
    fleet.run(seconds)
    fleet.tick_ms = 1_000
    for name, kept in keep.items():
        for attempt_id in list(fleet.state.nodes[name].attempts)[kept:]:
            fleet.end(fleet.state.attempts[attempt_id].job_id)
    return fleet


def leave(fleet: Fleet, *names: str) -> None:
    """A plan wants these off."""
    for name in names:
        power.leave(fleet.state, fleet.rig.now, fleet.state.nodes[name], "demand is low")
    consolidation.tick(fleet.state, fleet.rig.now, names)
    fleet.rig.handle(Tick())


def on(fleet: Fleet, name: str) -> list[int]:
    return [fleet.state.attempts[one].job_id for one in fleet.state.nodes[name].attempts]


def test_who_keeps_a_node_on_goes_on_beside_others() -> None:
    fleet = thinned(FOUR, FOUR, keep={"n1": 1, "n2": 2})
    (job_id,) = on(fleet, "n1")
    steps = fleet.steps[f"{job_id}.1"]
    leave(fleet, "n1")
    (told,) = fleet.stops()
    assert told.startswith(
        "moves to n2 so that n1 can go off: its 4 GPUs would else be on for 2.0 h"
    )
    assert told.endswith("more, for 0.4 dollars, and restarts cost 0.016")
    fleet.run(10)
    assert fleet.job(job_id).phase is JobPhase.ACTIVE
    assert job_id in on(fleet, "n2")
    assert on(fleet, "n1") == []
    attempt = fleet.state.current(fleet.job(job_id))
    assert attempt is not None
    assert attempt.restored_step >= steps - 4, "from its save"


def test_whoever_comes_meanwhile_does_not_take_its_place() -> None:
    fleet = thinned(FOUR, FOUR, keep={"n1": 1, "n2": 3})
    (job_id,) = on(fleet, "n1")
    leave(fleet, "n1")
    late = fleet.submit()
    fleet.run(10)
    assert job_id in on(fleet, "n2")
    assert fleet.job(late).phase is JobPhase.QUEUED


def test_it_is_not_done_where_the_last_one_ends_soon() -> None:
    """The restart costs 1.6 cents; four GPUs idle for nine minutes for 3, and for ten for 3.3."""
    fleet = thinned(FOUR, FOUR, keep={"n1": 1, "n2": 2}, total=720 + 540)
    leave(fleet, "n1")
    assert fleet.stops() == []
    fleet = thinned(FOUR, FOUR, keep={"n1": 1, "n2": 2}, total=720 + 600)
    leave(fleet, "n1")
    assert len(fleet.stops()) == 1


def test_who_does_not_say_when_he_ends_is_as_likely_there_as_by_his_age() -> None:
    fleet = thinned(FOUR, FOUR, keep={"n1": 1, "n2": 2}, total=0)
    leave(fleet, "n1")
    assert "would else be on for 29 min more" in fleet.stops()[0], "12 min * ln(1 + 120 / 12)"


@pytest.mark.long
@pytest.mark.parametrize(
    "keep",
    [{"n1": 1, "n2": 4}, {"n1": 1, "n2": 0}, {"n1": 2, "n2": 3}],
    ids=["no room", "only an empty node", "room for one of two"],
)
def test_nobody_moves_without_a_place_beside_others(keep: dict[str, int]) -> None:
    fleet = thinned(FOUR, FOUR, keep=keep)
    leave(fleet, "n1")
    assert fleet.stops() == []
    assert fleet.state.standing.promises == {}


def test_where_somebody_waits_nothing_is_free() -> None:
    fleet = thinned(FOUR, FOUR, keep={"n1": 1, "n2": 2})
    fleet.submit(gpus=4)
    leave(fleet, "n1")
    assert fleet.stops() == []


def test_who_has_saved_nothing_stays() -> None:
    fleet = Fleet(FOUR, FOUR, options=ALONE)
    fleet.tick_ms = 1_000
    first, second = fleet.submit(total=LONG), fleet.submit(total=LONG, gpus=3)
    third = fleet.submit(total=LONG, gpus=2)
    fleet.run(700, saving=False)
    assert (on(fleet, "n1"), on(fleet, "n2")) == ([first, second], [third])
    leave(fleet, "n2")
    assert fleet.stops() == []
    fleet.end(second)
    consolidation.tick(fleet.state, fleet.rig.now, ["n2"])
    assert fleet.stops() == [], "it has saved nothing"
    fleet.run(20)
    consolidation.tick(fleet.state, fleet.rig.now, ["n2"])
    fleet.rig.handle(Tick())
    assert len(fleet.stops()) == 1


def test_who_has_just_begun_is_not_moved_again() -> None:
    """Ten times a restart of 60 s."""
    fleet = thinned(FOUR, FOUR, keep={"n1": 1, "n2": 2}, seconds=590)
    leave(fleet, "n1")
    assert fleet.stops() == []


def test_who_has_a_gpu_that_its_node_does_not_list_any_more_stays() -> None:
    """It fell off the bus, and the coordinator has restarted since: of what type it was is not
    known."""
    fleet = thinned(FOUR, FOUR, keep={"n1": 1, "n2": 2})
    (attempt_id,) = fleet.state.nodes["n1"].attempts
    (gone,) = fleet.state.attempts[attempt_id].gpu_uuids
    for session in (10, 20):
        for name in ("n1", "n2"):
            live = fleet.state.nodes[name]
            held = [HeldAttempt(one, fleet.state.attempts[one].gpu_uuids) for one in live.attempts]
            body = Hello(
                name, f"{name}-1", f"{name}:1", HOST,
                tuple(gpu for gpu in gpus_of(name, FOUR) if gpu.uuid != gone), tuple(held),
                tuple(live.digests), live.node.acknowledged,
            )  # fmt: skip
            fleet.rig.handle(FromAgent(session + int(name[1]), body))
        if session == 10:
            fleet.rig.restart()
    assert gone not in fleet.state.nodes["n1"].gpus
    leave(fleet, "n1")
    assert fleet.stops() == []
    assert list(fleet.state.nodes["n1"].attempts) == [attempt_id]


def test_moves_of_an_hour_are_bounded_for_all_reasons() -> None:
    fleet = thinned(FOUR, FOUR, keep={"n1": 1, "n2": 2})
    fleet.state.standing.moves_ms += [fleet.rig.now_ms] * fleet.state.options.moves_per_hour
    leave(fleet, "n1")
    assert fleet.stops() == []


def test_one_node_at_a_time_and_what_a_person_has_taken_is_left_alone() -> None:
    fleet = thinned(FOUR, FOUR, FOUR, keep={"n1": 1, "n2": 1, "n3": 1})
    leave(fleet, "n1", "n2")
    assert len(fleet.stops()) == 1
    fleet.run(10)
    assert len(on(fleet, "n3")) == 2
    live = fleet.state.nodes["n2"]
    power.person_says(fleet.state, fleet.rig.now, live, NodeIntent.CORDONED)
    consolidation.tick(fleet.state, fleet.rig.now, ["n2"])
    fleet.rig.handle(Tick())
    assert len(fleet.stops()) == 1


def test_who_is_on_his_way_asks_for_no_node() -> None:
    fleet = thinned(FOUR, FOUR, keep={"n1": 1, "n2": 2})
    (job_id,) = on(fleet, "n1")
    leave(fleet, "n1")
    state = fleet.state
    state.queued[job_id] = None  # as between its end on the one node and its start on the other
    waits, other = Outlook("H100", 2, 3, 0), Outlook("A100 80GB", 2, 3, 0)
    assert consolidation.settled(state, [waits, other]) == [Outlook("H100", 3, 2, 0), other]
    del state.queued[job_id]
    assert consolidation.settled(state, [waits]) == [waits], "it runs"


@pytest.mark.long
def test_a_plan_empties_and_switches_off_what_one_job_keeps_on() -> None:
    bounds = Bounds(spares_min=0, up_ms_min=0)
    rules = Rules(idle_ms_min=60_000, cycle_usd_per_gpu=0.0, bounds=bounds)
    scaling = ScalingOptions(rules, Mode.ACT)
    fleet = Fleet(FOUR, FOUR, FOUR, options=Options(power=ACTS, scaling=scaling))
    for _ in range(12):
        fleet.submit(total=LONG)
    fleet.tick_ms = 5_000

    def live(minutes: int, gpus: float) -> None:
        for _ in range(minutes):
            quantiles = (gpus,) * len(LEVELS)
            minute = fleet.rig.now.unix_ms // 60_000
            told = TypeForecast("H100", quantiles, quantiles)
            fleet.rig.handle(ForecastMade(minute, (told,)))
            fleet.run(60)

    def powers() -> list[Power]:
        return [live.node.power.phase for live in fleet.state.nodes.values()]

    live(12, 12.0)
    for job_id in (*on(fleet, "n1")[1:], *on(fleet, "n2")[:1]):
        fleet.end(job_id)
    live(3, 8.0)
    assert [len(on(fleet, name)) for name in ("n1", "n2", "n3")] == [0, 4, 4]
    assert powers() == [Power.STOPPING, Power.ON, Power.ON]
    assert len(fleet.stops()) == 1
    live(20, 8.0)
    assert len(fleet.stops()) == 1, "and that is all"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_whatever_leaves_and_comes_nobody_loses_more_than_a_restart(seed: int) -> None:
    """Jobs come and end, nodes are to go and are needed again: whoever moves goes on where it was
    kept a place for him, from his last save, and no GPU is promised twice."""
    chance = random.Random(seed)
    fleet = Fleet(FOUR, FOUR, FOUR, options=ALONE)
    fleet.tick_ms = 5_000
    names, moved = ("n1", "n2", "n3"), 0
    first = [fleet.submit(total=LONG) for _ in range(12)]
    fleet.run(720)
    for job_id in chance.sample(first, 6):  # packed as they were, there is no room beside others
        fleet.end(job_id)
    for _ in range(16):
        active = [job.id for job in fleet.state.jobs.values() if job.phase is JobPhase.ACTIVE]
        what = chance.choice(("end", "submit", "leave", "leave", "leave", "stay"))
        busy = [name for name in names if on(fleet, name)]
        name = min(busy, key=lambda one: (len(on(fleet, one)), one))  # as a plan does
        live = fleet.state.nodes[name]
        leaving = live.node.power.phase is Power.LEAVING
        if what == "end" and len(active) > 2:
            fleet.end(chance.choice(active))
        elif what == "submit":
            fleet.submit(total=LONG, gpus=chance.choice((1, 2)))
        elif what == "leave" and not leaving:
            for other in fleet.state.nodes.values():
                if other.node.power.phase is Power.LEAVING:
                    power.stay(fleet.state, fleet.rig.now, other, "it is needed")
            before = {job_id: fleet.job(job_id).head_step for job_id in on(fleet, name)}
            leave(fleet, name)
            promises = fleet.state.standing.promises
            gone = [job_id for job_id in before if job_id in promises]
            assert gone in ([], list(before)), "all of them or none"
            fleet.run(10)
            for job_id in gone:
                assert job_id not in on(fleet, name)
                attempt = fleet.state.current(fleet.job(job_id))
                assert attempt is not None, "its place was kept"
                assert attempt.restored_step is not None
                assert attempt.restored_step >= before[job_id]
            moved += len(gone)
        elif what == "stay" and leaving:
            power.stay(fleet.state, fleet.rig.now, live, "it is needed")
        fleet.run(chance.choice((60, 300, 700)))
        for live in fleet.state.nodes.values():
            assert all(len(gpu.holders) <= 1 for gpu in live.gpus.values())
    assert moved, "else the test says nothing"
    assert moved == len([told for told in fleet.stops() if "can go off" in told])


@given(
    gpus=st.integers(1, 16),
    ages_ms=st.lists(st.integers(1, 10**10), min_size=1, max_size=4),
    end_ms=st.none() | st.integers(0, 10**9),
    lost_ms=st.floats(0, 1e8),
)
def test_a_node_idles_for_no_longer_than_is_known(
    gpus: int, ages_ms: list[int], end_ms: int | None, lost_ms: float
) -> None:
    followers = [Follower(1, end_ms, age_ms, lost_ms) for age_ms in ages_ms]
    found = worth(gpus, followers, RULES)
    assert 0 <= found.idle_ms <= RULES.later_ms * (1 + 1e-9)
    assert found.cost_usd == pytest.approx(
        len(followers) * lost_ms / HOUR_MS * RULES.wait_usd_per_gpu_h
    )
    if end_ms is not None:
        assert found.idle_ms == min(end_ms, RULES.later_ms)
    longer = [replace(one, age_ms=2 * one.age_ms) for one in followers]
    assert worth(gpus, longer, RULES).gain_usd >= found.gain_usd
    assert worth(gpus + 1, followers, RULES).gain_usd >= found.gain_usd
