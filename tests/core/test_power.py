"""Nodes are emptied, switched off and on: what is ordered, what is believed, what is never done.

Problem: a driver hangs, lies or acts twice; nodes come back unasked; a person closes what we have
closed; the coordinator dies in between. Each of these has a test here, and all of them at once are
in `test_coordinator_machine.py`.
"""

from dataclasses import replace

import pytest

from coordinator.core import fleet_scaling, guard_rails, power, power_memory
from coordinator.core.capacity_messages import Actuated
from coordinator.core.capacity_model import Power, Source
from coordinator.core.capacity_orders import CapacityOrder, CapacityOutcome, Verb
from coordinator.core.guard_rails import Bounds, Rail
from coordinator.core.live import LiveNode
from coordinator.core.messages import (
    AgentEvent,
    AgentEventBody,
    AttemptExited,
    AttemptStarted,
    CheckpointProposed,
    CordonNode,
    DrainNode,
    Effect,
    FromAgent,
    Heartbeat,
    ListNodes,
    Log,
    NodePage,
    Refusal,
    Reply,
    Request,
    Send,
    StopAttempt,
    Submit,
    Tick,
    UncordonNode,
)
from coordinator.core.model import SHARED, JobClass, JobSpec, Replication
from coordinator.core.node_power import REFUSED_MS, STARTS_MAX, UNANSWERED_RATIO, minutes
from coordinator.core.phases import AttemptPhase, NodeIntent
from coordinator.core.state import Options
from tests.core import coordinator_harness
from tests.core.switched_fleet import ACTS, SwitchedRig


@pytest.fixture
def fleet() -> SwitchedRig:
    fleet = SwitchedRig.new()
    for name in ("n1", "n2", "n3"):
        fleet.hello(name)
    return fleet


def logged(effects: list[Effect]) -> list[str]:
    return [effect.event for effect in effects if isinstance(effect, Log)]


def about(log: Log, name: str) -> bool:
    return dict(log.fields).get("node") == name


def shown(fleet: SwitchedRig, name: str) -> str:
    effects = fleet.handle(Request(1, ListNodes()))
    page = next(effect.answer for effect in effects if isinstance(effect, Reply))
    assert isinstance(page, NodePage)
    return next(view.reason for view in page.nodes if view.node.id == name)


def beat(fleet: SwitchedRig, name: str, number: int) -> None:
    session = fleet.rig.core.state.nodes[name].session
    assert session is not None
    fleet.handle(FromAgent(session, Heartbeat(number)))


def test_an_idle_node_is_closed_ordered_off_and_started_again(fleet: SwitchedRig) -> None:
    fleet.leave("n3")
    assert fleet.node("n3").intent is NodeIntent.DRAINED
    assert fleet.power("n3") is Power.STOPPING
    assert fleet.orders == [CapacityOrder("n3.2", Verb.SUSPEND, ("n3",), "H100")]
    session = fleet.rig.core.state.nodes["n3"].session
    assert session is not None
    fleet.answer("n3")
    assert fleet.power("n3") is Power.STOPPING, "what the driver says proves nothing"
    fleet.hang_up(session)
    effects = fleet.wait(10_000)
    assert fleet.power("n3") is Power.OFF
    said = [effect.event for effect in effects if isinstance(effect, Log) and about(effect, "n3")]
    assert said == ["node.power"], "a silence on purpose is no alarm"
    assert shown(fleet, "n3").startswith("off: demand is low; starts within about 20 s")
    fleet.start("n3")
    assert fleet.orders[-1] == CapacityOrder("n3.4", Verb.RESUME, ("n3",), "H100")
    fleet.wait(7_000)
    fleet.hello("n3")
    assert fleet.power("n3") is Power.ON
    assert fleet.node("n3").intent is NodeIntent.OPEN
    assert fleet.node("n3").power.boots_ms == (7_000,)
    assert len(fleet.node("n3").power.starts_unix_ms) == 1


def test_a_running_job_is_handed_off_before_its_node_goes(fleet: SwitchedRig) -> None:
    fleet.handle(Request(1, Submit(JobSpec(command=("train",), gpus=1))))
    attempt = fleet.rig.core.state.attempts["1.1"]
    session = fleet.rig.core.state.nodes[attempt.node].session
    assert session is not None
    effects = fleet.leave(attempt.node)
    stops = [e.order for e in effects if isinstance(e, Send) and isinstance(e.order, StopAttempt)]
    assert [order.precopy_ms for order in stops] == [60_000]
    assert fleet.power(attempt.node) is Power.LEAVING
    assert not fleet.orders
    assert "1 attempt is still leaving" in shown(fleet, attempt.node)
    fleet.handle(FromAgent(session, AgentEvent(1, 0, "1.1", AttemptStarted(7))))
    fleet.handle(FromAgent(session, AgentEvent(2, 0, "1.1", AttemptExited(75))))
    fleet.handle(Tick())
    assert fleet.power(attempt.node) is Power.STOPPING
    assert fleet.rig.core.state.attempts["1.2"].node != attempt.node


def test_a_checkpoint_that_lies_nowhere_else_keeps_its_node_on(fleet: SwitchedRig) -> None:
    spec = JobSpec(command=("train",), gpus=1, replication=Replication.NONE)
    fleet.handle(Request(1, Submit(spec)))
    state = fleet.rig.core.state
    name = state.attempts["1.1"].node
    session = state.nodes[name].session
    assert session is not None
    for node_id in ("n1", "n2", "n3"):
        fleet.handle(Request(1, CordonNode(node_id)))  # the job waits when it has yielded
    proposal = CheckpointProposed("aa", "", 10, 100, (name,))
    bodies: tuple[AgentEventBody, ...] = (AttemptStarted(7), proposal, AttemptExited(75))
    for number, body in enumerate(bodies, 1):
        fleet.handle(FromAgent(session, AgentEvent(number, 0, "1.1", body)))
    assert not state.nodes[name].attempts
    needed = "a checkpoint of job 1 lies nowhere else"
    assert power.why_needed(state, state.nodes[name]) == needed
    state.put_checkpoint(replace(state.checkpoints[1][0], replicas=(name, SHARED)))
    assert power.why_needed(state, state.nodes[name]) == ""


def test_the_last_node_that_takes_copies_stays_on() -> None:
    fleet = SwitchedRig.new()
    fleet.hello("n1")
    fleet.hello("n2")
    fleet.handle(Request(1, Submit(JobSpec(command=("train",), gpus=1))))
    attempt = fleet.rig.core.state.attempts["1.1"]
    other = "n2" if attempt.node == "n1" else "n1"
    state = fleet.rig.core.state
    assert attempt.replica_node == other
    assert "copies of job 1" in power.why_needed(state, state.nodes[other])
    fleet.hello("n3")
    assert power.why_needed(state, state.nodes[other]) == ""


def test_of_two_that_hold_a_copy_and_leave_one_stays(fleet: SwitchedRig) -> None:
    fleet.handle(Request(1, Submit(JobSpec(command=("train",), gpus=1))))
    attempt = fleet.rig.core.state.attempts["1.1"]
    session = fleet.rig.core.state.nodes[attempt.node].session
    assert session is not None
    holders = (attempt.node, attempt.replica_node)
    proposal = CheckpointProposed("aa", "", 10, 100, holders)
    fleet.handle(FromAgent(session, AgentEvent(1, 0, "1.1", AttemptStarted(7))))
    fleet.handle(FromAgent(session, AgentEvent(2, 0, "1.1", proposal)))
    third = next(name for name in ("n1", "n2", "n3") if name not in holders)
    fleet.handle(Request(1, CordonNode(third)))
    for name in holders:
        fleet.leave(name)
    fleet.handle(FromAgent(session, AgentEvent(3, 0, "1.1", AttemptExited(75))))
    for number in range(1, 6):
        fleet.wait(1_000)
        for name in ("n1", "n2", "n3"):
            beat(fleet, name, number)
    phases = [fleet.power(name) for name in holders]
    assert sorted(phase.value for phase in phases) == ["leaving", "stopping"]


def test_a_node_that_is_heard_after_its_deadline_stays_on(fleet: SwitchedRig) -> None:
    fleet.leave("n3")
    fleet.answer("n3")  # a lie
    effects: list[Effect] = []
    for number in range(1, 32):
        effects += fleet.wait(1_000)
        beat(fleet, "n3", number)
    assert fleet.power("n3") is Power.ON
    assert fleet.node("n3").intent is NodeIntent.OPEN
    assert "node.power_failed" in logged(effects)


@pytest.mark.parametrize("acts", [True, False])
def test_who_is_ordered_off_takes_no_work_before_the_driver_has_spoken(acts: bool) -> None:
    fleet = SwitchedRig.new(Options(power=replace(ACTS, acts=acts)))
    fleet.hello("n1")
    fleet.leave("n1")
    dead_s = (UNANSWERED_RATIO if acts else 1) * ACTS.stop_deadline_ms // 1_000
    for number in range(1, dead_s + 1):
        assert fleet.power("n1") is Power.STOPPING, "an order may wait for its turn"
        fleet.wait(1_000)
        beat(fleet, "n1", number)
    assert fleet.power("n1") is Power.ON
    assert fleet.node("n1").intent is NodeIntent.OPEN


def test_a_late_word_of_the_driver_ends_the_wait(fleet: SwitchedRig) -> None:
    fleet.leave("n3")
    for number in range(1, 50):
        fleet.wait(1_000)
        beat(fleet, "n3", number)
    fleet.answer("n3")
    assert fleet.power("n3") is Power.STOPPING, "what it has done may take a moment"
    for number in range(50, 60):
        fleet.wait(1_000)
        beat(fleet, "n3", number)
    assert fleet.power("n3") is Power.ON


def test_who_is_silent_only_for_us_is_not_off_before_the_driver_has_spoken(
    fleet: SwitchedRig,
) -> None:
    """It would come back, and take work under an order that is still to be carried out."""
    fleet.leave("n3")
    fleet.wait(ACTS.stop_deadline_ms + 1_000)
    fleet.hello("n3")
    assert fleet.power("n3") is Power.STOPPING
    assert fleet.node("n3").intent is not NodeIntent.OPEN
    fleet.wait(UNANSWERED_RATIO * ACTS.stop_deadline_ms)
    assert fleet.power("n3") is Power.OFF


def test_who_stayed_on_is_left_alone_for_longer_each_time(fleet: SwitchedRig) -> None:
    state = fleet.rig.core.state
    live = state.nodes["n3"]

    def waits_ms(of: LiveNode) -> int:
        power_memory.note_refused(state, fleet.rig.now, of)
        at_ms = fleet.rig.now_ms
        found_ms = state.switching.refused[of.node.id][1]
        fleet.rig.now_ms = at_ms + found_ms - 1
        assert power_memory.is_refused(state, fleet.rig.now, of)
        fleet.rig.now_ms += 1
        assert not power_memory.is_refused(state, fleet.rig.now, of)
        return found_ms

    hours = [waits_ms(live) // REFUSED_MS for _ in range(7)]
    assert hours == [1, 2, 4, 8, 16, 24, 24]
    rented = replace(live.node, power=replace(live.node.power, source=Source.BURST))
    assert waits_ms(replace(live, node=rented)) == REFUSED_MS, "its bill goes on meanwhile"
    fleet.hello("n3")
    fleet.off("n3")
    assert not state.switching.refused


def test_a_node_that_is_to_go_and_stays_again_and_again_is_remembered_once(
    fleet: SwitchedRig,
) -> None:
    state = fleet.rig.core.state
    for _ in range(2 * STARTS_MAX):
        power.leave(state, fleet.rig.now, state.nodes["n3"], "demand is low")
        fleet.wait(1_000)
        power.stay(state, fleet.rig.now, state.nodes["n3"], "it is needed")
        fleet.wait(1_000)
    assert len(state.switching.at_ms["n3"]) == 1


@pytest.mark.parametrize("hours", [-3, 3])
def test_a_clock_that_jumps_ends_no_minimum_uptime(
    fleet: SwitchedRig, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.off("n3")
    fleet.start("n3")
    fleet.hello("n3")
    up_ms = fleet.rig.now_ms
    jumped = coordinator_harness.UNIX_MS_AT_START + hours * 3_600_000
    monkeypatch.setattr(coordinator_harness, "UNIX_MS_AT_START", jumped)
    fleet.wait(1_000)
    state = fleet.rig.core.state
    box = fleet_scaling.box_of(state, fleet.rig.now, state.nodes["n3"])
    assert box.since_ms == up_ms
    assert guard_rails.of_node(box, fleet.rig.now_ms, Bounds()) is Rail.UP_TIME


def test_what_is_remembered_of_a_node_is_bounded(fleet: SwitchedRig) -> None:
    for _ in range(STARTS_MAX + 2):
        fleet.off("n3")
        fleet.start("n3")
        fleet.hello("n3")
    assert len(fleet.node("n3").power.starts_unix_ms) == STARTS_MAX
    assert len(fleet.rig.core.state.switching.at_ms["n3"]) <= STARTS_MAX + 1


def test_a_driver_that_says_no_is_believed_only_while_the_node_is_heard(
    fleet: SwitchedRig,
) -> None:
    fleet.leave("n3")
    fleet.answer("n3", done=False, reason="the BMC does not answer")
    assert fleet.power("n3") is Power.STOPPING, "it may go down all the same"
    fleet.wait(10_000)
    assert fleet.power("n3") is Power.OFF
    fleet.hello("n2")
    fleet.leave("n2")
    fleet.answer("n2", done=False, reason="the BMC does not answer")
    for number in range(1, 10):
        fleet.wait(1_000)
        beat(fleet, "n2", number)
    assert fleet.power("n2") is Power.ON
    assert fleet.node("n2").power.reason == "the BMC does not answer"


@pytest.mark.parametrize("postponed", [True, False])
def test_a_node_whose_driver_was_not_asked_has_not_refused(
    fleet: SwitchedRig, postponed: bool
) -> None:
    fleet.leave("n3")
    fleet.answer("n3", done=False, reason="it waited for its turn", postponed=postponed)
    for number in range(1, 12):
        fleet.wait(1_000)
        beat(fleet, "n3", number)
    state = fleet.rig.core.state
    assert fleet.power("n3") is Power.ON
    assert fleet.node("n3").intent is NodeIntent.OPEN
    assert power_memory.is_refused(state, fleet.rig.now, state.nodes["n3"]) is not postponed


def test_a_start_is_tried_three_times_each_with_a_key_of_its_own(fleet: SwitchedRig) -> None:
    fleet.off("n3")
    fleet.start("n3")
    effects = fleet.wait(3 * ACTS.boot_deadline_ms + 1_000)
    resumes = [order.key for order in fleet.orders if order.verb is Verb.RESUME]
    assert resumes == ["n3.4", "n3.5", "n3.6"]
    assert fleet.power("n3") is Power.FAILED
    assert "node.boot_failed" in logged(effects)
    fleet.wait(600_000)
    assert len(fleet.orders) == 4, "it is left alone"
    fleet.handle(Request(1, UncordonNode("n3")))
    assert fleet.power("n3") is Power.STARTING
    fleet.hello("n3")
    assert fleet.power("n3") is Power.ON
    assert fleet.node("n3").power.boot_failures == 0


def test_a_driver_that_fails_at_once_is_not_asked_thrice_in_a_second(fleet: SwitchedRig) -> None:
    fleet.off("n3")
    fleet.start("n3")
    fleet.answer("n3", done=False, reason="no route to the BMC")
    fleet.wait(1_000)
    assert fleet.orders[-1].key == "n3.4"
    fleet.wait(ACTS.boot_retry_ms)
    assert fleet.orders[-1].key == "n3.5"
    assert "no route to the BMC" in fleet.node("n3").power.reason


def test_an_answer_to_an_order_that_is_over_counts_for_nothing(fleet: SwitchedRig) -> None:
    fleet.off("n3")
    stale = fleet.orders[-1].key
    fleet.start("n3")
    before = fleet.node("n3").power
    fleet.handle(Actuated(CapacityOutcome(stale, "n3", False, "late")))
    fleet.handle(Actuated(CapacityOutcome("nobody.7", "n9", False, "a stranger")))
    fleet.wait(ACTS.boot_retry_ms + 1_000)
    assert fleet.node("n3").power == before


@pytest.mark.parametrize("phase", [Power.STOPPING, Power.STARTING])
def test_a_successor_gives_the_same_order_under_the_same_key(
    fleet: SwitchedRig, phase: Power
) -> None:
    if phase is Power.STOPPING:
        fleet.leave("n3")
    else:
        fleet.off("n3")
        fleet.start("n3")
    last = fleet.orders[-1]
    fleet.rig.restart()
    fleet.handle(Tick())
    assert fleet.orders[-2:] == [last, last]
    fleet.handle(Tick())
    assert fleet.orders.count(last) == 2, "once in each process"


def test_a_successor_does_not_mourn_who_is_off(fleet: SwitchedRig) -> None:
    fleet.off("n3")
    fleet.rig.restart()
    effects = fleet.wait(60_000)
    lost = [e for e in effects if isinstance(e, Log) and e.event in ("node.lost", "node.suspect")]
    assert [dict(e.fields)["node"] for e in lost if e.event == "node.lost"] == ["n1", "n2"]
    assert fleet.power("n3") is Power.OFF


def test_a_boot_that_a_successor_saw_the_end_of_is_not_timed(fleet: SwitchedRig) -> None:
    fleet.off("n3")
    fleet.start("n3")
    fleet.rig.restart()
    fleet.wait(1_000)
    fleet.hello("n3")
    assert fleet.power("n3") is Power.ON
    assert fleet.node("n3").power.boots_ms == ()


def test_a_node_that_a_person_switches_on_is_on(fleet: SwitchedRig) -> None:
    fleet.off("n3")
    fleet.hello("n3")
    assert fleet.power("n3") is Power.ON
    assert fleet.node("n3").intent is NodeIntent.OPEN
    assert len(fleet.node("n3").power.starts_unix_ms) == 1


def test_what_a_person_closes_while_it_is_off_stays_closed(fleet: SwitchedRig) -> None:
    fleet.off("n3")
    fleet.handle(Request(1, CordonNode("n3")))
    fleet.hello("n3")
    assert fleet.power("n3") is Power.ON
    assert fleet.node("n3").intent is NodeIntent.CORDONED


@pytest.mark.parametrize("wish", [CordonNode, DrainNode, UncordonNode])
def test_a_person_who_speaks_of_a_leaving_node_has_it(
    fleet: SwitchedRig, wish: type[CordonNode | DrainNode | UncordonNode]
) -> None:
    fleet.handle(Request(1, Submit(JobSpec(command=("train",), gpus=1))))
    name = fleet.rig.core.state.attempts["1.1"].node
    fleet.leave(name)
    fleet.handle(Request(1, wish(name)))
    assert fleet.power(name) is Power.ON
    assert not fleet.node(name).power.ours
    wanted = {CordonNode: "cordoned", DrainNode: "draining", UncordonNode: "open"}[wish]
    assert fleet.node(name).intent.value == wanted


@pytest.mark.parametrize("says", ["yes", "no", "nothing"])
def test_a_node_that_is_being_switched_off_cannot_be_opened(fleet: SwitchedRig, says: str) -> None:
    """And whoever asks hears for how long at most that is so."""
    state = fleet.rig.core.state
    fleet.leave("n3")
    fleet.wait(1_000)
    if says != "nothing":
        fleet.answer("n3", done=says == "yes")
    left_ms = power_memory.stopping_ms_max(state, fleet.rig.now, state.nodes["n3"])
    assert left_ms is not None
    effects = fleet.handle(Request(1, UncordonNode("n3")))
    answer = next(effect.answer for effect in effects if isinstance(effect, Reply))
    assert isinstance(answer, Refusal)
    assert f"closed for that for {minutes(left_ms)} at most" in answer.sentence
    assert "once it is off, `baton uncordon n3` starts it" in answer.sentence
    for number in range(1, left_ms // 1_000 + 1):
        fleet.wait(1_000)
        beat(fleet, "n3", number)
    assert fleet.power("n3") is Power.ON
    assert fleet.node("n3").intent is NodeIntent.OPEN


def test_a_node_that_dies_while_it_is_emptied_is_a_dead_node(fleet: SwitchedRig) -> None:
    fleet.handle(Request(1, Submit(JobSpec(command=("train",), gpus=1))))
    name = fleet.rig.core.state.attempts["1.1"].node
    fleet.leave(name)
    effects = fleet.wait(10_000)
    assert "node.lost" in logged(effects)
    assert fleet.power(name) is Power.ON
    assert not fleet.orders
    assert fleet.rig.core.state.attempts["1.1"].phase is not AttemptPhase.STOPPING


def test_without_a_driver_nothing_is_ever_ordered() -> None:
    fleet = SwitchedRig.new()
    fleet.rig.options = replace(fleet.rig.options, power=replace(ACTS, acts=False))
    fleet.rig.restart()
    fleet.hello("n1")
    fleet.hello("n2")
    fleet.leave("n2")
    assert fleet.power("n2") is Power.STOPPING
    assert not fleet.orders


def test_a_guaranteed_job_is_never_under_a_node_that_goes(fleet: SwitchedRig) -> None:
    spec = JobSpec(command=("train",), gpus=1, job_class=JobClass.GUARANTEED)
    fleet.handle(Request(1, Submit(spec)))
    name = fleet.rig.core.state.attempts["1.1"].node
    state = fleet.rig.core.state
    assert power.why_needed(state, state.nodes[name]) == "something runs there"


def test_boot_times_are_learnt_by_model_of_node(fleet: SwitchedRig) -> None:
    state = fleet.rig.core.state
    assert power.boot_ms(state, fleet.node("n3")) == ACTS.boot_guess_ms
    fleet.off("n3")
    fleet.start("n3")
    fleet.wait(45_000)
    fleet.hello("n3")
    assert power.boot_ms(state, fleet.node("n1")) == 45_000, "one like it takes as long"
    fleet.hello("n9", "4xA100:40")
    assert power.boot_ms(state, fleet.node("n9")) == ACTS.boot_guess_ms
