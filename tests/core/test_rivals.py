"""Two agents that claim one node, one of them with a copy of the other's state directory: the one
that is connected keeps the node, and people hear of both.
"""

from dataclasses import replace

import pytest

from coordinator.core.messages import (
    CloseSession,
    Effect,
    FromAgent,
    Hello,
    SessionClosed,
    Tick,
)
from coordinator.core.model import HostFacts
from tests.core.coordinator_harness import gpus_of
from tests.core.test_admission import welcomed
from tests.core.test_gpu_health import BOX, Fleet

OTHER = replace(BOX, hostname="other", boot_id="boot-2")
HERE = replace(BOX, boot_id="boot-1")


class Claimed(Fleet):
    """A node that runs a job, and others that say they are it."""

    def __init__(self) -> None:
        super().__init__({"n1": 1})
        self.come(HERE)
        self.submit()

    def come(self, host: HostFacts, box: str = "n1") -> list[Effect]:
        """An agent with the same journal; one elsewhere knows nothing of what runs here."""
        self.sessions["n1"] = session = self.sessions["n1"] + 1
        held = self.held("n1") if host is HERE else ()
        gpus = gpus_of(box, "1xH100")
        body = Hello("n1", "j1", "n1:1", host, gpus, held, (), self.sequences["n1"])
        return self.rig.handle(FromAgent(session, body))


@pytest.mark.parametrize(
    "other", [OTHER, replace(HERE, hostname="other")], ids=["box", "container"]
)
def test_a_copy_of_a_node_is_turned_away_and_its_jobs_go_on(other: HostFacts) -> None:
    fleet = Claimed()
    mine = fleet.sessions["n1"]
    effects = fleet.come(other)
    closed = next(effect for effect in effects if isinstance(effect, CloseSession))
    assert closed.session == fleet.sessions["n1"]
    assert "another agent is connected as n1 (host box)" in closed.reason
    assert "(host other) a node name of its own, and without the other's state" in closed.reason
    assert len(fleet.rig.disk.attempts) == 1
    assert fleet.held("n1")
    for _ in range(10):
        fleet.rig.now_ms += 100
        again = fleet.come(other)
        assert [type(one) for one in again] == [CloseSession], "the log has said it"
    fleet.sessions["n1"] = mine
    assert "an agent on host other claims the name n1 as well" in fleet.node("n1").reason
    for _ in range(61):
        fleet.pass_ms(1_000)
    assert not fleet.node("n1").reason


def test_the_node_itself_may_come_again_on_another_connection_or_after_a_reboot() -> None:
    fleet = Claimed()
    assert welcomed(fleet.come(HERE)) == [fleet.sessions["n1"]], "its old connection hangs"
    fleet.rig.handle(FromAgent(fleet.sessions["n1"], SessionClosed()))
    rebooted = replace(HERE, boot_id="boot-3")
    assert welcomed(fleet.come(rebooted)) == [fleet.sessions["n1"]]
    fleet.rig.now_ms += fleet.rig.core.state.options.closed_grace_ms
    assert welcomed(fleet.come(OTHER)) == [fleet.sessions["n1"]], "nobody is heard any more"
    assert not fleet.node("n1").reason


@pytest.mark.parametrize(
    ("other", "box"), [(OTHER, "n1"), (replace(HERE, boot_id="boot-2"), "n9")], ids=["name", "gpus"]
)
def test_after_a_restart_a_copy_that_comes_first_waits_for_the_node_itself(
    other: HostFacts, box: str
) -> None:
    """By what is written down of it. If it does not come the other one is it from here on."""
    fleet = Claimed()
    fleet.rig.restart()
    (closed,) = [one for one in fleet.come(other, box) if isinstance(one, CloseSession)]
    assert "n1 was on host box when it was seen last" in closed.reason
    rebooted = replace(HERE, boot_id="boot-3")
    assert welcomed(fleet.come(rebooted)) == [fleet.sessions["n1"]]
    fleet.rig.restart()
    assert welcomed(fleet.come(replace(rebooted, hostname="renamed"), "n9"))
    fleet.rig.restart()
    fleet.rig.now_ms += fleet.rig.core.state.options.restart_grace_ms
    fleet.rig.handle(Tick())
    assert welcomed(fleet.come(other, box)) == [fleet.sessions["n1"]]
