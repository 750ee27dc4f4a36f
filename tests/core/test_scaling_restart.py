"""The plan of a coordinator that has just come back: it knows who was on, and waits for them.

Problem: whoever counts nodes before they have said hello sees half a fleet, and starts the other
half anew; whoever has forgotten what went off a minute ago sends the next one after it.
"""

from dataclasses import replace

from coordinator.core.capacity_model import Power
from coordinator.core.capacity_orders import Verb
from coordinator.core.scaler import ScalingOptions
from coordinator.core.scaling import Mode
from tests.core.test_fleet_scaling import NAMES, RULES, ScaledRig


def test_a_successor_knows_who_went_off_within_ten_minutes() -> None:
    fleet = ScaledRig.of(Mode.ACT)
    fleet.forecast()
    fleet.live(240)
    (gone,) = [name for name in NAMES if fleet.power(name) is Power.OFF]
    fleet.rig.restart()
    for name in NAMES:
        if name != gone:
            fleet.hello(name)
    fleet.forecast()
    fleet.live(300)
    assert len(fleet.orders) == 1
    fleet.live(420)
    assert len(fleet.orders) == 2


def restarted() -> ScaledRig:
    """Three nodes are needed and on, the fourth is off; a plan is made each second, and the
    coordinator has just come back."""
    fleet = ScaledRig.of(Mode.ACT)
    fleet.rig.options = replace(
        fleet.rig.options, scaling=ScalingOptions(RULES, Mode.ACT, interval_ms=1_000)
    )
    fleet.off("n4")
    fleet.orders.clear()
    fleet.rig.restart()
    fleet.soon = fleet.later = 3.0
    fleet.wait(500)
    fleet.forecast()
    return fleet


def test_after_a_restart_nobody_is_started_for_those_who_have_not_said_hello_yet() -> None:
    fleet = restarted()
    fleet.live(5)
    for name in NAMES[:3]:
        fleet.hello(name)
        fleet.live(2)
    fleet.live(30)
    assert not fleet.orders
    assert fleet.powers() == {"n1": "on", "n2": "on", "n3": "on", "n4": "off"}
    assert fleet.rig.core.state.scaler.made is not None


def test_who_does_not_come_back_after_a_restart_is_replaced_when_the_grace_is_over() -> None:
    fleet = restarted()
    for name in NAMES[:2]:
        fleet.hello(name)
    fleet.live(11)
    assert not fleet.orders
    fleet.live(4)
    assert [(order.verb, order.nodes) for order in fleet.orders] == [(Verb.RESUME, ("n4",))]


def test_after_a_restart_who_waits_gets_a_node_as_soon_as_all_are_back() -> None:
    fleet = restarted()
    for name in NAMES[:3]:
        fleet.hello(name)
    for _ in NAMES:
        fleet.submit()
    fleet.live(2)
    assert [(order.verb, order.nodes) for order in fleet.orders] == [(Verb.RESUME, ("n4",))]
