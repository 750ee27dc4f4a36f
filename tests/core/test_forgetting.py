"""`baton forget`: what is lost for good leaves the lists, and nothing that counts is lost by it."""

from dataclasses import replace

import pytest

from coordinator.core import messages as m
from coordinator.core.capacity_model import Power
from coordinator.core.census import census
from coordinator.core.cost_requests import CostPage, GetCosts, Grouping
from coordinator.core.fit_requests import FitJob, FitPage
from coordinator.core.forgetting import FORGOTTEN_MAX
from coordinator.core.model import JobSpec, Node, NodeView
from coordinator.core.node_requests import DropNode, ForgetNode
from coordinator.core.options import Options
from coordinator.core.phases import JobPhase, NodeIntent, NodePhase
from coordinator.core.quotas import Quota
from tests.core.coordinator_harness import GIGABYTE, Rig, gpus_of
from tests.core.switched_fleet import SwitchedRig
from tests.core.training_fleet import A100, HOST, Fleet

LEASE_S = 10
ONE = "1xH100:80"


def lose(fleet: Fleet, *names: str) -> None:
    """Their connections close, and nobody comes back within the grace."""
    for name in names:
        session = fleet.state.nodes[name].session
        assert session is not None
        fleet.rig.handle(m.FromAgent(session, m.SessionClosed()))
    for _ in range(LEASE_S):
        fleet.rig.now_ms += 1_000
        fleet.train(0.0, save=False)  # the others are heard
        fleet.rig.handle(m.Tick())
    assert {fleet.state.nodes[name].phase for name in names} == {NodePhase.LOST}


def asked(fleet: Fleet, body: m.RequestBody) -> m.Answer:
    (reply,) = (e for e in fleet.rig.handle(m.Request(9, body)) if isinstance(e, m.Reply))
    return reply.answer


def refused(fleet: Fleet, name: str, **more: bool) -> str:
    answer = asked(fleet, ForgetNode(name, **more))
    assert isinstance(answer, m.Refusal)
    return answer.sentence


def listed(fleet: Fleet) -> list[str]:
    page = asked(fleet, m.ListNodes())
    assert isinstance(page, m.NodePage)
    return [view.node.id for view in page.nodes]


def forgotten(fleet: Fleet, name: str, **more: bool) -> None:
    answer = asked(fleet, ForgetNode(name, **more))
    assert isinstance(answer, NodeView), answer
    assert answer.node.id == name
    assert name not in listed(fleet)


def test_one_that_joined_by_mistake_leaves_nothing_behind() -> None:
    fleet = Fleet(ONE, ONE)
    lose(fleet, "n2")
    lost = (NodePhase.LOST, NodeIntent.OPEN)
    assert dict(census(fleet.state, 0).nodes)[lost] == 1
    effects = fleet.rig.handle(m.Request(1, ForgetNode("n2")))
    assert DropNode("n2") in effects
    (said,) = (e for e in effects if isinstance(e, m.Log) and e.event == "node.forgotten")
    assert dict(said.fields) == {"node": "n2", "reason": "by its operator"}
    assert listed(fleet) == ["n1"]
    assert dict(census(fleet.state, 0).nodes)[lost] == 0, "the alert is over"
    assert "n2" not in fleet.rig.disk.nodes
    assert refused(fleet, "n2") == "there is no node 'n2'"
    fleet.rig.restart()
    assert listed(fleet) == ["n1"], "it is durable"


def test_what_only_it_could_run_is_refused_then() -> None:
    fleet = Fleet(ONE, "4xA100:80")
    lose(fleet, "n2")
    four = m.Submit(JobSpec(command=("x",), gpus=4))
    forgotten(fleet, "n2")
    answer = asked(fleet, four)
    assert isinstance(answer, m.Refusal)
    assert "4 GPUs" in answer.sentence
    fits = asked(fleet, FitJob(JobSpec(command=("x",), gpus=1)))
    assert isinstance(fits, FitPage)
    assert [one.gpu_type for one in fits.fits] == ["H100"]


def test_who_is_connected_or_may_come_back_is_not_forgotten() -> None:
    fleet = Fleet(ONE, ONE)
    assert refused(fleet, "n2") == (
        "n2 is connected, and would join again at once; end its agent first:"
        " `systemctl disable --now baton-agent` on n2"
    )
    fleet.rig.handle(m.FromAgent(2, m.SessionClosed()))
    assert refused(fleet, "n2") == "n2 is suspect and may come back; ask again when it is lost"
    assert refused(fleet, "n9") == "there is no node 'n9'"


def test_what_may_still_run_there_holds_it() -> None:
    fleet = Fleet(ONE)
    job = fleet.submit()
    fleet.run(1, saving=False)
    lose(fleet, "n1")
    assert refused(fleet, "n1", lose_checkpoints=True) == (
        "n1 may still run 1 attempt, of job 1: wait until they go on elsewhere, or `baton cancel`"
        " them"
    )
    asked(fleet, m.CancelJob(job))
    assert fleet.job(job).phase is JobPhase.CANCELLED
    forgotten(fleet, "n1")


def test_a_gang_that_may_go_on_holds_the_node_of_a_rank_that_has_ended() -> None:
    """It waits, for all who are left are out of reach; one of them is back, and another is not."""
    fleet = Fleet(ONE, ONE, ONE)
    job = fleet.submit(ranks=3, grace_ms=3_600_000)
    fleet.run(5, saving=False)
    ended, back, _ = fleet.state.gang(fleet.job(job))
    fleet.say(ended.id, m.AttemptExited(0))
    lose(fleet, "n1", "n2", "n3")
    assert fleet.job(job).phase is JobPhase.QUEUED
    assert "may still run 1 attempt, of job 1" in refused(fleet, ended.node)
    held = (m.HeldAttempt(back.id, back.gpu_uuids),)
    hello(fleet, 7, back.node, attempts=held)
    assert fleet.job(job).phase is JobPhase.ACTIVE
    fleet.rig.now_ms += 1_000
    fleet.rig.handle(m.Tick())
    asked(fleet, m.CancelJob(job))
    fleet.say(back.id, m.AttemptExited(0))
    assert fleet.job(job).phase is JobPhase.CANCELLED
    forgotten(fleet, ended.node)


def test_who_ran_there_gives_back_what_is_lent_to_him_elsewhere() -> None:
    fleet = Fleet(ONE, ONE, options=Options(projects={"vision": Quota(gpu_hours=240.0)}))
    fleet.tick_ms = 5_000
    job = fleet.submit(project="others")
    fleet.run(5, saving=False)
    (first,) = fleet.state.attempts_of(job)
    lose(fleet, first.node)
    fleet.run(10)
    forgotten(fleet, first.node)
    waits = fleet.submit(project="vision")
    assert "has GPUs that are lent to others" in fleet.state.waits[waits]
    fleet.run(3_600)
    assert fleet.job(job).phase is JobPhase.QUEUED
    assert fleet.job(waits).phase is JobPhase.ACTIVE


def test_a_last_checkpoint_is_lost_only_by_a_word_that_says_so() -> None:
    fleet = Fleet(ONE)
    job = fleet.submit()
    fleet.run(25)
    fleet.end(job)
    assert fleet.job(job).head
    lose(fleet, "n1")
    assert refused(fleet, "n1") == (
        "n1 alone has checkpoints of job 1: start its agent once more, and they are copied or can"
        " be exported; or `baton forget --lose-checkpoints n1`"
    )
    forgotten(fleet, "n1", lose_checkpoints=True)
    assert all(kept.replicas == () for kept in fleet.state.checkpoints[job])


def test_copies_elsewhere_are_enough_and_it_is_no_source_any_more() -> None:
    fleet = Fleet(ONE, ONE)
    job = fleet.submit()
    fleet.run(5, saving=False)
    (attempt,) = fleet.state.attempts_of(job)
    other = "n2" if attempt.node == "n1" else "n1"
    both = (attempt.node, other)
    fleet.say(attempt.id, m.CheckpointProposed("a", "", 3, GIGABYTE, both))
    fleet.end(job)
    lose(fleet, attempt.node)
    forgotten(fleet, attempt.node)
    assert [kept.replicas for kept in fleet.state.checkpoints[job]] == [(other,)]


def hello(fleet: Fleet, session: int, name: str, *digests: str, **more: object) -> None:
    body = m.Hello(name, f"{name}-1", f"{name}:1", HOST, gpus_of(name, ONE), (), digests)
    body = replace(body, **more)  # type: ignore[arg-type]
    fleet.rig.handle(m.FromAgent(session, body))


def test_it_simply_joins_again_with_what_it_has() -> None:
    fleet = Fleet(ONE, ONE)
    job = fleet.submit()
    fleet.run(5, saving=False)
    (attempt,) = fleet.state.attempts_of(job)
    other = "n2" if attempt.node == "n1" else "n1"
    proposed = m.CheckpointProposed("a", "", 3, GIGABYTE, (attempt.node, other))
    fleet.say(attempt.id, proposed)
    fleet.end(job)
    counted = fleet.state.nodes[attempt.node].node.acknowledged
    assert counted > 1
    lose(fleet, attempt.node)
    forgotten(fleet, attempt.node)
    fleet.rig.restart()
    assert attempt.node not in fleet.state.nodes
    hello(fleet, 7, attempt.node, "a", acknowledged=1)
    live = fleet.state.nodes[attempt.node]
    assert live.phase is NodePhase.UP
    assert live.node.acknowledged == counted, "its events are not counted again"
    assert sorted(fleet.state.checkpoints[job][0].replicas) == ["n1", "n2"]
    assert attempt.node not in fleet.state.forgotten
    assert not fleet.rig.disk.nodes[attempt.node].forgotten


def test_what_ran_there_stays_on_the_bill() -> None:
    fleet = Fleet("1xA100:80", ONE)
    job = fleet.submit(gpu_types=("A100",))
    fleet.run(60, saving=False)
    fleet.end(job)

    def by_type() -> dict[str, float]:
        until = fleet.rig.now.unix_ms + 1
        page = asked(fleet, GetCosts(until - 3_600_000, until, by=Grouping.GPU_TYPE))
        assert isinstance(page, CostPage)
        return {line.key: line.money.gpu_hours for line in page.lines}

    before = by_type()
    assert list(before) == [A100]
    used = fleet.state.ledger.used_h(fleet.rig.now.unix_ms)
    lose(fleet, "n1")
    forgotten(fleet, "n1")
    fleet.rig.restart()
    assert "n1" not in listed(fleet)
    assert by_type() == before
    assert fleet.state.ledger.used_h(fleet.rig.now.unix_ms).keys() == used.keys()


def test_of_too_many_forgotten_ones_the_first_is_dropped() -> None:
    fleet = Fleet(ONE, ONE)
    job = fleet.submit()
    fleet.end(job)
    (attempt,) = fleet.state.attempts_of(job)
    node = fleet.state.nodes[attempt.node].node
    lose(fleet, attempt.node)
    names = [f"old{number:04}" for number in range(FORGOTTEN_MAX)]
    fleet.rig.disk.nodes.update({n: replace(node, id=n, forgotten=True) for n in names})
    fleet.rig.restart()
    fleet.rig.now_ms += 100_000
    fleet.rig.handle(m.Tick())
    effects = fleet.rig.handle(m.Request(1, ForgetNode(attempt.node)))
    assert [e.node for e in effects if isinstance(e, DropNode)] == ["old0000"]
    assert len(fleet.state.forgotten) == FORGOTTEN_MAX


@pytest.mark.parametrize("field", ["given", "refused", "at_ms", "unmanaged"])
def test_no_memory_of_its_switching_is_left(field: str) -> None:
    fleet = Fleet(ONE, ONE)
    lose(fleet, "n2")
    getattr(fleet.state.switching, field)["n2"] = None
    forgotten(fleet, "n2")
    assert "n2" not in getattr(fleet.state.switching, field)


def test_a_node_in_an_old_record_is_not_forgotten() -> None:
    rig = Rig()
    rig.disk.nodes["n1"] = Node("n1", "j", "n1:1", HOST, ())
    rig.restart()
    assert list(rig.core.state.nodes) == ["n1"]


def test_a_forgotten_node_that_joins_again_gives_no_key_a_second_time() -> None:
    """The journal of deeds still knows them: it would answer that the order is carried out."""
    fleet = SwitchedRig.new()
    for name in ("n1", "n2", "n3"):
        fleet.hello(name)

    def go_off() -> None:
        fleet.leave("n3")
        session = fleet.rig.core.state.nodes["n3"].session
        assert session is not None
        fleet.answer("n3")
        fleet.hang_up(session)
        fleet.wait(10_000)
        assert fleet.power("n3") is Power.OFF

    go_off()
    fleet.handle(m.Request(1, ForgetNode("n3")))
    assert "n3" not in fleet.rig.core.state.nodes
    fleet.hello("n3")
    assert fleet.power("n3") is Power.ON
    go_off()
    assert len({order.key for order in fleet.orders}) == len(fleet.orders) == 2
