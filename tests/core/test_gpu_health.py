"""What the coordinator does about a verdict: close, hand off, say so, open again, and not too much.

Verdicts come as an agent's events; what follows is read off the records, the orders and the
answers.
"""

from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from coordinator.core.messages import (
    AgentEvent,
    AttemptExited,
    AttemptStarted,
    CordonNode,
    Effect,
    ExplainJob,
    Explanation,
    FromAgent,
    GpuHealthChanged,
    Heartbeat,
    HeldAttempt,
    Hello,
    ListNodes,
    Log,
    NodePage,
    Reply,
    Request,
    RequestBody,
    Send,
    StartAttempt,
    StopAttempt,
    Submit,
    Submitted,
    Tick,
    UncordonNode,
)
from coordinator.core.model import GpuHealth, GpuVerdict, GpuView, HostFacts, JobSpec, NodeView
from coordinator.core.phases import NodeIntent
from coordinator.core.state import Options
from tests.core.coordinator_harness import GIGABYTE, Rig, gpus_of

V = GpuVerdict
BOX = HostFacts("box", "", 8, 256 * GIGABYTE)
REASONS = {
    V.NEEDS_RESET: "needs a reset (xid 95)",
    V.NEEDS_REBOOT: "needs a reboot of the node (xid 7)",
    V.LOST: "is lost (xid 79)",
    V.DEGRADED: "has to be looked at (xid 74)",
    V.UNKNOWN: "is unknown",
    V.HEALTHY: "",
}


def health(uuid: str, verdict: GpuVerdict) -> GpuHealth:
    return GpuHealth(uuid, verdict, REASONS[verdict])


class Fleet:
    """Nodes that say what they are told to say."""

    def __init__(self, nodes: dict[str, int], options: Options | None = None) -> None:
        self.rig = Rig(options)
        self.sequences = dict.fromkeys(nodes, 0)
        self.counts = nodes
        self.sessions: dict[str, int] = {}
        for name in nodes:
            self.hello(name)

    def hello(self, name: str, *gpus: GpuHealth) -> list[Effect]:
        self.sessions[name] = max(self.sessions.values(), default=0) + 1
        body = Hello(
            name, "j1", f"{name}:1", BOX, gpus_of(name, f"{self.counts[name]}xH100"),
            self.held(name), (), self.sequences[name], gpus,
        )  # fmt: skip
        return self.rig.handle(FromAgent(self.sessions[name], body))

    def held(self, name: str) -> tuple[HeldAttempt, ...]:
        return tuple(
            HeldAttempt(attempt.id, attempt.gpu_uuids)
            for attempt in self.rig.disk.attempts.values()
            if attempt.node == name and attempt.ended_unix_ms is None
        )

    def event(self, name: str, attempt: str, body: object) -> list[Effect]:
        self.sequences[name] += 1
        event = AgentEvent(self.sequences[name], 0, attempt, body)  # type: ignore[arg-type]
        return self.rig.handle(FromAgent(self.sessions[name], event))

    def judge(self, uuid: str, verdict: GpuVerdict) -> list[Effect]:
        name = uuid.partition("-")[0]
        return self.event(name, "", GpuHealthChanged((health(uuid, verdict),)))

    def ask(self, body: RequestBody) -> object:
        effects = self.rig.handle(Request(1, body))
        return next(effect.answer for effect in effects if isinstance(effect, Reply))

    def submit(self, gpus: int = 1) -> int:
        """A job, and where it starts its process comes up."""
        answer = self.ask(Submit(JobSpec(command=("train",), gpus=gpus)))
        assert isinstance(answer, Submitted)
        attempt = self.rig.disk.attempts.get(f"{answer.job_id}.1")
        if attempt is not None:
            self.event(attempt.node, attempt.id, AttemptStarted(7))
        return answer.job_id

    def pass_ms(self, duration_ms: int) -> list[Effect]:
        """All nodes live on."""
        self.rig.now_ms += duration_ms
        for number, name in enumerate(self.sessions):
            beat = Heartbeat(self.rig.now_ms + number, attempts=self.held(name))
            self.rig.handle(FromAgent(self.sessions[name], beat))
        return self.rig.handle(Tick())

    def explain(self, job_id: int) -> str:
        answer = self.ask(ExplainJob(job_id))
        assert isinstance(answer, Explanation)
        return answer.sentence

    def node(self, name: str) -> NodeView:
        page = self.ask(ListNodes())
        assert isinstance(page, NodePage)
        return next(view for view in page.nodes if view.node.id == name)

    def gpu(self, uuid: str) -> GpuView:
        view = self.node(uuid.partition("-")[0])
        return next(gpu for gpu in view.gpus if gpu.facts.uuid == uuid)


def stops(effects: list[Effect]) -> dict[str, StopAttempt]:
    orders = [effect.order for effect in effects if isinstance(effect, Send)]
    return {order.attempt: order for order in orders if isinstance(order, StopAttempt)}


def starts(effects: list[Effect]) -> list[str]:
    orders = [effect.order for effect in effects if isinstance(effect, Send)]
    return [uuid for o in orders if isinstance(o, StartAttempt) for uuid in o.gpu_uuids]


def logged(effects: list[Effect]) -> list[str]:
    return [effect.event for effect in effects if isinstance(effect, Log)]


def test_a_gpu_that_needs_a_reset_is_left_by_its_job_and_by_no_other() -> None:
    fleet = Fleet({"n1": 2, "n2": 2})
    first, second = fleet.submit(), fleet.submit()
    ill = fleet.rig.disk.attempts[f"{first}.1"].gpu_uuids[0]
    effects = fleet.judge(ill, V.NEEDS_RESET)
    orders = stops(effects)
    assert list(orders) == [f"{first}.1"]
    assert orders[f"{first}.1"].precopy_ms is not None
    sentence = f"gpu {ill} needs a reset (xid 95): cordoned"
    assert orders[f"{first}.1"].reason == sentence
    assert sentence in fleet.explain(first)
    assert fleet.gpu(ill).cordon == sentence
    assert sentence in fleet.node(ill.partition("-")[0]).reason
    assert {"gpu.verdict", "gpu.cordoned"} <= set(logged(effects))
    node = ill.partition("-")[0]
    effects = fleet.event(node, f"{first}.1", AttemptExited(0, None, "stopped"))
    assert ill not in starts(effects)
    assert second


def test_nothing_is_placed_there_and_who_waits_is_told() -> None:
    fleet = Fleet({"n1": 1})
    fleet.judge("n1-g0", V.LOST)
    job_id = fleet.submit()
    assert f"{job_id}.1" not in fleet.rig.disk.attempts
    assert "1 is cordoned for its health" in fleet.explain(job_id)
    effects = fleet.judge("n1-g0", V.HEALTHY)
    assert starts(effects) == ["n1-g0"]
    assert fleet.gpu("n1-g0").cordon == ""


def test_fallen_off_the_bus_waits_for_no_precopy() -> None:
    fleet = Fleet({"n1": 1})
    job_id = fleet.submit()
    order = stops(fleet.judge("n1-g0", V.LOST))[f"{job_id}.1"]
    assert order.precopy_ms is None


def test_a_node_that_needs_a_reboot_is_drained_and_opened_when_it_is_well() -> None:
    fleet = Fleet({"n1": 2, "n2": 1})
    jobs = [fleet.submit(), fleet.submit()]
    assert {fleet.rig.disk.attempts[f"{job}.1"].node for job in jobs} <= {"n1", "n2"}
    effects = fleet.judge("n1-g0", V.NEEDS_REBOOT)
    here = [a.id for a in fleet.rig.disk.attempts.values() if a.node == "n1"]
    assert list(stops(effects)) == here
    view = fleet.node("n1")
    assert view.node.intent in (NodeIntent.DRAINING, NodeIntent.DRAINED)
    assert "needs a reboot of the node (xid 7): node cordoned" in view.reason
    fleet.judge("n1-g0", V.UNKNOWN)
    assert fleet.node("n1").node.intent is not NodeIntent.OPEN
    fleet.judge("n1-g0", V.HEALTHY)
    assert fleet.node("n1").node.intent is NodeIntent.OPEN


def test_what_a_person_has_closed_is_not_opened() -> None:
    fleet = Fleet({"n1": 1})
    fleet.ask(CordonNode("n1"))
    fleet.judge("n1-g0", V.NEEDS_REBOOT)
    fleet.judge("n1-g0", V.HEALTHY)
    assert fleet.node("n1").node.intent is NodeIntent.CORDONED
    other = Fleet({"n1": 1})
    other.judge("n1-g0", V.NEEDS_REBOOT)
    other.ask(CordonNode("n1"))
    other.judge("n1-g0", V.HEALTHY)
    assert other.node("n1").node.intent is NodeIntent.CORDONED


@pytest.mark.parametrize("verdict", [V.NEEDS_RESET, V.NEEDS_REBOOT])
def test_what_a_person_has_opened_stays_open_until_it_was_well(verdict: GpuVerdict) -> None:
    fleet = Fleet({"n1": 1})
    fleet.judge("n1-g0", verdict)
    fleet.ask(UncordonNode("n1"))
    fleet.judge("n1-g0", verdict)
    assert (fleet.node("n1").node.intent, fleet.gpu("n1-g0").cordon) == (NodeIntent.OPEN, "")
    fleet.judge("n1-g0", V.HEALTHY)
    fleet.rig.now_ms += 3_600_000
    fleet.judge("n1-g0", verdict)
    view = fleet.node("n1")
    assert view.node.intent is not NodeIntent.OPEN or view.gpus[0].cordon


def test_an_unknown_verdict_closes_and_opens_nothing() -> None:
    fleet = Fleet({"n1": 1})
    fleet.judge("n1-g0", V.UNKNOWN)
    assert fleet.gpu("n1-g0").cordon == ""
    fleet.judge("n1-g0", V.NEEDS_RESET)
    fleet.judge("n1-g0", V.UNKNOWN)
    assert fleet.gpu("n1-g0").cordon


def test_degraded_ones_are_closed_by_policy_alone() -> None:
    assert not stops(Fleet({"n1": 1}).judge("n1-g0", V.DEGRADED))
    strict = Fleet({"n1": 1}, Options(cordons_degraded=True))
    strict.judge("n1-g0", V.DEGRADED)
    assert strict.gpu("n1-g0").cordon
    silent = Fleet({"n1": 1}, Options(cordons_gpus=False))
    silent.judge("n1-g0", V.LOST)
    assert silent.gpu("n1-g0").cordon == ""
    said = silent.gpu("n1-g0").health
    assert said is not None
    assert said.verdict is V.LOST


def test_a_mass_of_verdicts_trips_the_breaker_and_says_so() -> None:
    """Of forty GPUs four are closed; the others are reported, and follow when there is room."""
    fleet = Fleet({f"n{number}": 8 for number in range(5)})
    effects: list[Effect] = []
    for number in range(5):
        for place in range(8):
            effects += fleet.judge(f"n{number}-g{place}", V.NEEDS_RESET)
    closed = [g for n in range(5) for g in fleet.node(f"n{n}").gpus if g.cordon]
    held = [g for n in range(5) for g in fleet.node(f"n{n}").gpus if g.held_back]
    assert (len(closed), len(held)) == (4, 36)
    assert logged(effects).count("gpu.not_cordoned") == 36
    assert "not cordoned: 4 of the fleet's 40 GPUs" in held[0].held_back
    assert "not cordoned" in fleet.node("n4").reason
    again = fleet.pass_ms(2_000)
    assert "gpu.cordoned" not in logged(again)
    for _ in range(400):
        fleet.pass_ms(2_000)
    assert sum(bool(g.cordon) for n in range(5) for g in fleet.node(f"n{n}").gpus) == 8


def test_a_restarted_coordinator_knows_what_it_has_closed() -> None:
    fleet = Fleet({"n1": 1, "n2": 1})
    fleet.judge("n1-g0", V.NEEDS_RESET)
    fleet.rig.restart()
    fleet.hello("n1")
    fleet.hello("n2")
    assert fleet.gpu("n1-g0").cordon
    assert starts(fleet.rig.handle(Request(1, Submit(JobSpec(command=("x",), gpus=1))))) == [
        "n2-g0"
    ]
    fleet.hello("n1", health("n1-g0", V.HEALTHY))
    assert fleet.gpu("n1-g0").cordon == ""


def test_a_person_waives_what_is_known_and_not_what_comes() -> None:
    """A GPU was not read when its node was opened; that says nothing of its later loss."""
    fleet = Fleet({"n1": 2, "n2": 2})
    fleet.judge("n1-g1", V.UNKNOWN)
    fleet.ask(CordonNode("n1"))
    fleet.ask(UncordonNode("n1"))
    fleet.judge("n1-g1", V.LOST)
    assert [cordon.uuid for cordon in fleet.node("n1").node.gpu_cordons] == ["n1-g1"]


def test_the_cordon_of_a_gpu_that_was_taken_out_goes_with_it() -> None:
    """It would stand in the node's reason, and count among the cordoned ones, for ever."""
    fleet = Fleet({"n1": 2, "n2": 2})
    fleet.judge("n1-g1", V.NEEDS_RESET)
    assert fleet.node("n1").node.gpu_cordons
    fleet.counts["n1"] = 1
    fleet.hello("n1", health("n1-g0", V.HEALTHY))
    assert fleet.node("n1").node.gpu_cordons == ()
    assert fleet.node("n1").reason == ""


def test_a_hello_says_it_as_well_as_an_event() -> None:
    fleet = Fleet({"n1": 1})
    fleet.hello("n1", health("n1-g0", V.LOST))
    assert fleet.gpu("n1-g0").cordon


class Histories(RuleBasedStateMachine):
    """Verdicts, people, restarts and time in any order, on a fleet of ten GPUs."""

    uuids: ClassVar = [f"n{number}-g{place}" for number in (1, 2) for place in range(5)]

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet({"n1": 5, "n2": 5})
        self.said: dict[str, GpuVerdict] = {}
        self.closed_by_person: dict[str, None] = {}

    @rule(uuid=st.sampled_from(uuids), verdict=st.sampled_from(list(V)))
    def judge(self, uuid: str, verdict: GpuVerdict) -> None:
        self.said[uuid] = verdict
        effects = self.fleet.judge(uuid, verdict)
        assert not stops(effects) or verdict not in (V.HEALTHY, V.UNKNOWN)

    @rule(name=st.sampled_from(["n1", "n2"]), opens=st.booleans())
    def person(self, name: str, opens: bool) -> None:
        self.fleet.ask(UncordonNode(name) if opens else CordonNode(name))
        if opens:
            self.closed_by_person.pop(name, None)
        else:
            self.closed_by_person[name] = None

    @rule()
    def restart(self) -> None:
        self.fleet.rig.restart()
        for name in ("n1", "n2"):
            said = [health(u, v) for u, v in self.said.items() if u.startswith(name)]
            self.fleet.hello(name, *said)

    @rule(duration_ms=st.sampled_from([1_000, 700_000]))
    def wait(self, duration_ms: int) -> None:
        self.fleet.pass_ms(duration_ms)

    @rule()
    def submit(self) -> None:
        self.fleet.submit()

    @invariant()
    def what_is_well_is_open_and_what_a_person_closed_is_closed(self) -> None:
        for name in ("n1", "n2"):
            view = self.fleet.node(name)
            if name in self.closed_by_person:
                assert view.node.intent is not NodeIntent.OPEN
            for gpu in view.gpus:
                if self.said.get(gpu.facts.uuid) is V.HEALTHY:
                    assert not gpu.cordon
                    assert not gpu.held_back
                if gpu.cordon or gpu.held_back:
                    assert self.said[gpu.facts.uuid] is not V.HEALTHY

    @invariant()
    def a_replay_does_the_same(self) -> None:
        for then, again in self.fleet.rig.replayed():
            assert then == again


@pytest.mark.long
def test_whatever_happens_what_is_well_is_open() -> None:
    options = settings(max_examples=40, stateful_step_count=20, deadline=None)
    run_state_machine_as_test(Histories, settings=options)
