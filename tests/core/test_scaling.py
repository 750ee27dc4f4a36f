"""Who is switched on and off: cases known by hand."""

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import bursts
from coordinator.core.bursts import Burst
from coordinator.core.capacity_model import LEVELS, Box, Outlook, Power, Source
from coordinator.core.capacity_orders import Verb
from coordinator.core.guard_rails import Bounds, Rail
from coordinator.core.scaling import Memory, Mode, Plan, Rules, plan

MINUTE, HOUR = 60_000, 3_600_000
NOW = 100 * HOUR
RULES = Rules(mode=Mode.ACT, bounds=Bounds(spares_min=0))


def box(number: int, power: Power = Power.ON, **more: object) -> Box:
    """A node of eight; one that is on has been idle for two hours."""
    idle_ms = NOW - 2 * HOUR if power in (Power.ON, Power.LEAVING) else 0
    made = Box(f"n{number:02}", "box", "H100", 8, power, NOW - 5 * HOUR, idle_ms=idle_ms)
    return replace(made, **more)  # type: ignore[arg-type]


def busy(number: int, **more: object) -> Box:
    return box(number, **{"held_gpus": 8, "idle_ms": 0, **more})  # type: ignore[arg-type]


def outlook(running: int, queued: int = 0, soon: float = 0, later: float = 0) -> Outlook:
    """Demand that is known for certain."""
    levels = len(LEVELS)
    return Outlook("H100", running, queued, 0, (soon,) * levels, (later,) * levels)


def decided(boxes: list[Box], wanted: Outlook, rules: Rules = RULES) -> Plan:
    return plan(NOW, boxes, [wanted], rules, Memory())


def test_what_will_be_needed_comes_up_at_once() -> None:
    boxes = [busy(1), *(box(n, Power.OFF) for n in range(2, 6))]
    found = decided(boxes, outlook(8, soon=20, later=20))
    assert [(each.verb, each.nodes) for each in found.actions] == [(Verb.RESUME, ("n02", "n03"))]
    assert found.decisions[0].need_gpus == 20
    assert found.decisions[0].sentence.startswith("2 nodes of H100 start (n02, n03): 20 GPUs")


def test_what_boots_is_counted_and_what_did_not_come_up_is_not() -> None:
    waits = outlook(8, queued=8)
    starting = box(2, Power.STARTING, since_ms=NOW - MINUTE)
    others = [busy(1), box(3, Power.OFF)]
    assert not decided([*others, starting], waits).actions
    for late in (
        replace(starting, boot_failures=1),
        replace(starting, since_ms=NOW - HOUR),
        replace(starting, closed=True),
    ):
        assert decided([*others, late], waits).actions[0].nodes == ("n03",)


def test_the_emptiest_takes_no_new_work_and_goes_off_when_it_is_ripe() -> None:
    boxes = [busy(1, held_gpus=6), busy(2, held_gpus=2), box(3), box(4, idle_ms=NOW - MINUTE)]
    found = decided(boxes, outlook(8, soon=8, later=8))
    assert found.leaving == ("n03", "n04", "n02")
    assert not found.actions
    marked = [replace(each, power=Power.LEAVING) for each in boxes if each.node in found.leaving]
    found = decided([boxes[0], *marked], outlook(8, soon=8, later=8))
    assert [(each.verb, each.nodes) for each in found.actions] == [(Verb.SUSPEND, ("n03",))]
    assert "1 node of H100 goes off (n03)" in found.decisions[0].sentence


def test_a_margin_stays_on_beyond_what_is_likely() -> None:
    boxes = [busy(1), box(2), box(3)]
    wanted = outlook(8, soon=8, later=15)
    assert decided(boxes, wanted).leaving == ("n02",)
    kept = decided(boxes, wanted, replace(RULES, margin_ratio=0.1))
    assert kept.leaving == (), "17 of 24"


def test_who_leaves_is_back_when_needed() -> None:
    boxes = [busy(1), box(2, Power.LEAVING)]
    assert decided(boxes, outlook(8, soon=8, later=8)).leaving == ("n02",)
    assert decided(boxes, outlook(8, soon=8, later=9)).leaving == ()


def test_observe_switches_nothing_and_advise_proposes() -> None:
    boxes = [busy(1), box(2, Power.OFF)]
    waits = outlook(8, queued=8)
    observed = decided(boxes, waits, replace(RULES, mode=Mode.OBSERVE))
    assert not observed.actions
    assert not observed.proposed
    assert observed.decisions
    advised = decided(boxes, waits, replace(RULES, mode=Mode.ADVISE))
    assert not advised.actions
    assert advised.proposed[0].nodes == ("n02",)


def test_a_burst_is_rented_when_waiting_costs_more() -> None:
    rules = replace(
        RULES, bursts={"H100": Burst(2.0)}, budget_usd_per_day=1000.0, spends_alone=True
    )
    waits = replace(outlook(8, queued=8), frees_ms=2 * HOUR)
    assert not decided([busy(1)], waits, rules).actions
    longer = replace(waits, frees_ms=3 * HOUR)
    created = decided([busy(1)], longer, rules).actions
    assert [each.verb for each in created] == [Verb.CREATE]
    assert len(created[0].nodes) == 1
    *_, chosen = decided([busy(1)], longer, rules).decisions[0].alternatives
    assert (chosen.name, chosen.fixed_usd) == ("chosen", 32.0), "eight for two hours"
    late = replace(waits, late_gpus=1)
    assert decided([busy(1)], late, rules).actions == created
    asks = decided([busy(1)], longer, replace(rules, spends_alone=False))
    assert not asks.actions
    assert asks.proposed[0].asks
    assert asks.decisions[0].rail is Rail.APPROVAL
    poor = decided([busy(1)], longer, replace(rules, budget_usd_per_day=15.0))
    assert not poor.actions
    assert poor.decisions[0].rail is Rail.BUDGET


@pytest.mark.parametrize("wait_pays", [True, False], ids=["for its wait", "for its deadline"])
def test_a_gang_is_rented_all_of_its_nodes_or_none(wait_pays: bool) -> None:
    """Three nodes for one job, and eight GPUs for others; a node costs 16 dollars."""
    rules = replace(RULES, bursts={"H100": Burst(2.0)}, spends_alone=True)
    waits = replace(outlook(8, queued=32), frees_ms=5 * HOUR, rentable_gangs=(3,))
    if not wait_pays:
        waits = replace(outlook(8), late_gpus=32, late_jobs=(7, 9), late_gangs=(3,))
    boxes = [busy(number) for number in range(1, 21)]  # four of them come within ten minutes
    waits = replace(waits, running_gpus=160)

    def rented(usd: float, fleet: list[Box]) -> tuple[int, Rail | None]:
        found = decided(fleet, waits, replace(rules, budget_usd_per_day=usd))
        return sum(len(each.nodes) for each in found.actions), found.decisions[0].rail

    assert rented(15.0, boxes) == (0, Rail.BUDGET)
    assert rented(47.0, boxes) == (1, Rail.BUDGET), "the other one's"
    assert rented(48.0, boxes) == (3, Rail.BUDGET)
    assert rented(64.0, boxes) == (4, None)
    few = replace(rules, bursts={"H100": Burst(2.0, nodes_max=2)}, budget_usd_per_day=64.0)
    assert [len(each.nodes) for each in decided(boxes, waits, few).actions] == [1]
    waits = replace(waits, running_gpus=8)
    assert rented(64.0, boxes[:1]) == (2, Rail.UP_RATE), "the others follow, and are paid for"


@given(
    wanted=st.integers(0, 40),
    possible=st.integers(0, 40),
    gangs=st.lists(st.integers(2, 12), max_size=5),
)
def test_what_is_rented_in_part_is_whole_gangs_and_others(
    wanted: int, possible: int, gangs: list[int]
) -> None:
    nodes = bursts.whole(wanted, possible, gangs)
    assert 0 <= nodes <= min(wanted, possible)
    if wanted <= possible:
        assert nodes == wanted
        return
    sizes = [min(each, wanted) for each in gangs]
    others = max(0, wanted - sum(gangs))
    sums = {sum(chosen) for count in range(len(sizes) + 1) for chosen in combinations(sizes, count)}
    assert any(0 <= nodes - each <= others for each in sums)
    if sizes and sizes[0] <= possible:
        assert nodes >= sizes[0], "the first in the queue"
    assert nodes == possible or others < possible


def test_a_deadline_is_a_reason_beside_what_waiting_costs_and_is_told() -> None:
    rules = replace(
        RULES, bursts={"H100": Burst(2.0)}, budget_usd_per_day=1000.0, spends_alone=True
    )
    late = replace(outlook(8), late_gpus=16, late_jobs=(7, 9))
    found = decided([busy(1)], late, rules)
    assert [(each.verb, len(each.nodes)) for each in found.actions] == [(Verb.CREATE, 2)], (
        "though they count as demand elsewhere"
    )
    assert found.decisions[0].sentence == (
        "16 GPUs of H100 are rented by the hour: 8 GPUs are needed at 95%, 8 stay on, 8 are there,"
        " and jobs 7, 9 would miss their deadlines by waiting, which 16 GPUs more would keep"
    )
    patient = replace(late, queued_gpus=16, rentable_gpus=0)
    assert [len(each.nodes) for each in decided([busy(1)], patient, rules).actions] == [2]
    poor = decided([busy(1)], late, replace(rules, budget_usd_per_day=15.0))
    assert not poor.actions
    assert poor.decisions[0].rail is Rail.BUDGET


def test_for_a_deadline_an_own_node_is_started_before_one_is_rented() -> None:
    rules = replace(
        RULES, bursts={"H100": Burst(2.0)}, budget_usd_per_day=1000.0, spends_alone=True
    )
    late = replace(outlook(8), late_gpus=16, late_jobs=(7,))
    found = decided([busy(1), box(2, Power.OFF)], late, rules)
    assert [(each.verb, len(each.nodes)) for each in found.actions] == [
        (Verb.RESUME, 1),
        (Verb.CREATE, 1),
    ]


def test_a_burst_is_given_back_when_nobody_is_there() -> None:
    rules = replace(RULES, bursts={"H100": Burst(2.0)})
    rented = box(2, Power.LEAVING, source=Source.BURST)
    found = decided([busy(1), rented], outlook(8, soon=16, later=16), rules)
    assert [(each.verb, each.nodes) for each in found.actions] == [(Verb.DELETE, ("n02",))]
    needed = decided([busy(1), rented], outlook(8, queued=1), rules)
    assert not needed.actions
    assert not needed.leaving
