"""Each bound by itself, and all of them in any fleet, under any outlook, over many plans."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import guard_rails
from coordinator.core.bursts import Burst, spent
from coordinator.core.capacity_model import LEVELS, Box, Outlook, Power, Source
from coordinator.core.capacity_orders import Verb
from coordinator.core.guard_rails import DAY_MS, WINDOW_MS, Bounds, Rail, Switched
from coordinator.core.scaling import Memory, Mode, Plan, Rules, plan

MINUTE, HOUR = 60_000, 3_600_000
NOW = 1_000 * HOUR
BOUNDS = Bounds()
BOX = Box("n01", "box", "H100", 8, Power.ON, NOW - 9 * HOUR, idle_ms=NOW - 9 * HOUR)
CALM = Outlook("H100", 0, 0, 0, (0.0,) * len(LEVELS), (0.0,) * len(LEVELS))


def marked(count: int, **more: object) -> list[Box]:
    """Empty nodes that may go off by all that is known."""
    box = replace(BOX, power=Power.LEAVING, **more)  # type: ignore[arg-type]
    return [replace(box, node=f"n{number:03}") for number in range(count)]


def stopped(found: Plan) -> list[str]:
    verbs = (Verb.SUSPEND, Verb.DELETE)
    return [node for each in found.actions if each.verb in verbs for node in each.nodes]


def acted(
    boxes: Sequence[Box], outlook: Outlook = CALM, memory: Memory | None = None, **more: object
) -> Plan:
    rules = Rules(mode=Mode.ACT, **more)  # type: ignore[arg-type]
    return plan(NOW, boxes, [outlook], rules, memory or Memory())


@pytest.mark.parametrize(
    ("changed", "rail"),
    [
        ({"guaranteed": True}, Rail.GUARANTEED),
        ({"uploading": True}, Rail.UPLOADING),
        ({"closed": True}, Rail.CLOSED),
        ({"boot_failures": 1}, Rail.FLAKY),
        ({"refused": True}, Rail.REFUSED),
        ({"starts_ms": (NOW - 2 * HOUR + 1,)}, Rail.UP_TIME),
        ({"starts_ms": tuple(NOW - hour * HOUR for hour in (5, 9, 14, 23))}, Rail.CYCLES),
    ],
)
def test_a_node_that_must_stay_stays(changed: dict[str, object], rail: Rail) -> None:
    it = replace(BOX, node="it", power=Power.LEAVING, **changed)  # type: ignore[arg-type]
    assert guard_rails.of_node(it, NOW, BOUNDS) is rail
    boxes = [*marked(2), it]
    found = acted(boxes, bounds=Bounds(down_min=9))
    assert "it" not in stopped(found)
    assert "it" not in found.leaving
    assert stopped(found)


def test_a_node_that_nothing_forbids_may_go() -> None:
    long_ago = replace(BOX, starts_ms=(NOW - 2 * HOUR, NOW - 25 * HOUR))
    assert guard_rails.of_node(long_ago, NOW, BOUNDS) is None


@pytest.mark.parametrize(("nodes", "off"), [(3, 1), (40, 2), (400, 20)])
def test_few_nodes_go_off_within_ten_minutes(nodes: int, off: int) -> None:
    boxes = marked(nodes)
    first = acted(boxes)
    assert len(stopped(first)) == off
    assert first.decisions[0].rail is Rail.DOWN_RATE
    rest = [box for box in boxes if box.node not in stopped(first)]
    assert stopped(acted(rest, memory=replace(first.memory, at_ms=NOW))) == []
    past = (Switched(NOW - WINDOW_MS, off),)
    assert len(stopped(acted(boxes, memory=replace(first.memory, off=past)))) == off


@pytest.mark.parametrize(("nodes", "on"), [(3, 2), (40, 8), (400, 80)])
def test_few_nodes_are_switched_on_within_ten_minutes(nodes: int, on: int) -> None:
    boxes = [replace(box, power=Power.OFF, idle_ms=0) for box in marked(nodes)]
    waits = replace(CALM, queued_gpus=8 * nodes)
    found = acted(boxes, waits)
    assert len(found.actions[0].nodes) == on
    assert found.decisions[0].rail is Rail.UP_RATE
    assert not acted(boxes, waits, found.memory).actions


def test_empty_nodes_of_each_type_stay_on() -> None:
    few = marked(4)
    found = acted(few, bounds=Bounds(spares={"H100": 3}, down_min=9))
    assert len(stopped(found)) == 1
    assert found.decisions[0].rail is Rail.SPARES
    assert len(stopped(acted(few, bounds=Bounds(spares={"A100": 3}, down_min=9)))) == 3
    waits = replace(CALM, queued_gpus=9)
    assert len(stopped(acted(few, waits, bounds=Bounds(down_min=9)))) == 1


def test_a_node_that_does_not_come_up_is_tried_three_times_and_left_alone() -> None:
    waits = replace(CALM, queued_gpus=8, frees_ms=9 * HOUR)
    off = replace(BOX, power=Power.OFF, idle_ms=0)
    for failures in (0, 1, 2):
        tried = acted([replace(off, boot_failures=failures)], waits)
        assert tried.actions[0].nodes == ("n01",)
        assert tried.failed == ()
    bursts = {"H100": Burst(2.0)}
    gone = acted(
        [replace(off, boot_failures=3)],
        waits,
        bursts=bursts,
        spends_alone=True,
        budget_usd_per_day=99.0,
    )
    assert gone.failed == ("n01",)
    assert [each.verb for each in gone.actions] == [Verb.CREATE]
    assert gone.decisions[0].rail is Rail.BOOT_FAILURES


@pytest.mark.parametrize(
    ("outlook", "before_ms", "rail"),
    [
        (replace(CALM, stale=True), NOW - MINUTE, Rail.STALE),
        (CALM, NOW + 1, Rail.CLOCK),
        (CALM, NOW - 11 * MINUTE, Rail.CLOCK),
        (replace(CALM, coverage=0.84), NOW - MINUTE, Rail.COVERAGE),
        (replace(CALM, soon_gpus=()), NOW - MINUTE, Rail.NO_FORECAST),
    ],
)
def test_who_does_not_know_switches_nothing_off(
    outlook: Outlook, before_ms: int, rail: Rail
) -> None:
    found = acted(marked(9), outlook, Memory(at_ms=before_ms))
    assert not found.actions
    assert not found.leaving
    assert found.decisions[0].rail is rail
    assert stopped(acted(marked(9), CALM, Memory(at_ms=NOW - MINUTE)))


def test_what_waits_gets_nodes_though_forecasts_were_wrong_but_not_by_old_numbers() -> None:
    off = [replace(box, power=Power.OFF, idle_ms=0) for box in marked(9)]
    waits = replace(CALM, queued_gpus=8, soon_gpus=(72.0,) * len(LEVELS))
    assert len(acted(off, replace(waits, coverage=0.5)).actions[0].nodes) == 1
    assert not acted(off, replace(waits, stale=True)).actions
    assert not acted(off, replace(waits, coverage=0.5, queued_gpus=0)).actions, "only forecast"


def test_what_rented_nodes_cost_is_counted_over_a_day() -> None:
    hour = NOW // HOUR
    assert spent(((hour - 24, 5.0), (hour - 23, 7.0), (hour, 1.0)), NOW, 2.0) == (
        (hour - 23, 7.0),
        (hour, 3.0),
    )
    rented = [replace(box, source=Source.BURST, held_gpus=8, idle_ms=0) for box in marked(1)]
    waits = replace(CALM, running_gpus=8, queued_gpus=8, late_gpus=8)
    rules = {"bursts": {"H100": Burst(2.0)}, "spends_alone": True, "budget_usd_per_day": 40.0}
    first = acted(rented, waits, Memory(at_ms=NOW - 10 * MINUTE), **rules)
    assert [each for _, each in first.memory.spent_usd] == [pytest.approx(16 / 6)]
    assert [each.verb for each in first.actions] == [Verb.CREATE]
    spent_before = Memory(at_ms=NOW - 10 * MINUTE, spent_usd=((hour - 1, 6.0),))
    second = acted(rented, waits, spent_before, **rules)
    assert not second.actions
    assert second.decisions[0].rail is Rail.BUDGET


def some_box(number: int, chance: Random) -> Box:
    """Any node; what is off holds nothing."""
    power = chance.choice(tuple(Power))
    up = power in (Power.ON, Power.LEAVING)
    held_gpus = chance.choice((0, 0, 0, 1, 8)) if up else 0
    other = chance.random() < 0.5
    return Box(
        f"n{number:02}",
        "old" if other else "new",
        "A100" if other else "H100",
        8,
        power,
        NOW - chance.randint(1, 1_500) * MINUTE,
        source=Source.BURST if up and chance.random() < 0.2 else Source.OWNED,
        held_gpus=held_gpus,
        idle_ms=NOW - chance.randint(1, 300) * MINUTE if up and not held_gpus else 0,
        guaranteed=held_gpus > 0 and chance.random() < 0.2,
        uploading=up and chance.random() < 0.2,
        closed=chance.random() < 0.2,
        starts_ms=tuple(
            NOW - chance.randint(1, 1_500) * MINUTE for _ in range(chance.choice((0, 0, 1, 4)))
        ),
        boot_failures=chance.choice((0, 0, 1, 4)) if power is Power.OFF else 0,
        refused=up and chance.random() < 0.1,
    )


def some_outlook(gpu_type: str, chance: Random) -> Outlook:
    """Any demand; quantiles rise."""

    def quantiles() -> tuple[float, ...]:
        most = chance.choice((10, 200))
        return tuple(sorted(chance.uniform(0, most) for _ in LEVELS))

    most = chance.choice((0, 20, 100))
    return Outlook(
        gpu_type,
        chance.randint(0, most),
        chance.choice((0, chance.randint(0, most))),
        chance.randint(0, most),
        soon_gpus=quantiles() if chance.random() < 0.9 else (),
        later_gpus=quantiles(),
        coverage=chance.choice((None, 0.5, 0.96)),
        stale=chance.random() < 0.1,
        frees_ms=chance.choice((None, HOUR, 9 * HOUR)),
        late_gpus=chance.randint(0, 9),
    )


def some_rules(chance: Random) -> Rules:
    bounds = Bounds(
        down_ratio=chance.choice((0.0, 0.05, 0.3)),
        down_min=chance.randint(0, 3),
        up_ratio=chance.choice((0.0, 0.2, 0.5)),
        up_min=chance.randint(0, 4),
        spares_min=chance.randint(0, 3),
    )
    return Rules(
        mode=Mode.ACT,
        bounds=bounds,
        bursts=BURSTS,
        budget_usd_per_day=chance.choice((0.0, 20.0, 200.0)),
        spends_alone=chance.random() < 0.7,
    )


BURSTS = {"H100": Burst(2.0), "A100": Burst(1.0)}


@pytest.mark.long
@settings(deadline=None, max_examples=1_000)
@given(st.integers(0, 2**40))
def test_no_history_breaks_a_bound(seed: int) -> None:
    """Safety, over the plans of half an hour, each of which is obeyed."""
    chance = Random(seed)
    rules = some_rules(chance)
    bounds = rules.bounds
    boxes = tuple(some_box(number, chance) for number in range(chance.randint(0, 20)))
    memory, now_ms = Memory(), NOW
    off: list[tuple[int, int]] = []
    on: list[tuple[int, int]] = []
    for _ in range(chance.randint(1, 10)):
        pair = [some_outlook(name, chance) for name in ("H100", "A100")]
        found = plan(now_ms, boxes, pair, rules, memory)
        _spares_nobody(found, boxes, now_ms, bounds)
        _starts_whom_it_may(found, boxes, now_ms, bounds)
        _spends_within(found, boxes, rules)
        stale = [each.gpu_type for each in pair if each.stale]
        assert not [each for each in found.actions if each.gpu_type in stale]
        named = Counter(dict.fromkeys(Verb, 0))
        for each in found.actions:
            named[each.verb] += len(each.nodes)
        off.append((now_ms, named[Verb.SUSPEND] + named[Verb.DELETE]))
        on.append((now_ms, named[Verb.RESUME] + named[Verb.CREATE]))
        assert _lately(off) <= max(bounds.down_min, int(bounds.down_ratio * len(boxes)))
        assert _lately(on) <= max(bounds.up_min, int(bounds.up_ratio * len(boxes)))
        boxes = tuple(_obeyed(box, found, now_ms) for box in boxes if not _given_back(box, found))
        memory = found.memory
        now_ms += 3 * MINUTE


def _spares_nobody(found: Plan, boxes: Sequence[Box], now_ms: int, bounds: Bounds) -> None:
    at = {box.node: box for box in boxes}
    for node in (*stopped(found), *found.leaving):
        box = at[node]
        marks = (box.guaranteed, box.uploading, box.closed, box.refused)
        assert not any(marks)
        assert box.source is Source.BURST or guard_rails.of_node(box, now_ms, bounds) is None
    for node in stopped(found):
        assert (at[node].held_gpus, at[node].power) == (0, Power.LEAVING)
    for gpu_type in ("A100", "H100"):
        owned = [b for b in boxes if b.gpu_type == gpu_type and b.source is Source.OWNED]
        gone = [box for box in owned if box.node in stopped(found)]
        empty = [
            box
            for box in owned
            if box.power in (Power.ON, Power.LEAVING) and not (box.closed or box.held_gpus)
        ]
        assert not gone or len(empty) - len(gone) >= bounds.spares_min


def _starts_whom_it_may(found: Plan, boxes: Sequence[Box], now_ms: int, bounds: Bounds) -> None:
    at = {box.node: box for box in boxes}
    for each in found.actions:
        for box in [at[node] for node in each.nodes if each.verb is Verb.RESUME]:
            assert box.power is Power.OFF
            assert not box.closed
            assert box.boot_failures <= bounds.boot_retries
            lately = sum(ms > now_ms - DAY_MS for ms in box.starts_ms)
            assert lately < bounds.cycles_per_day_max


def _lately(switched: list[tuple[int, int]]) -> int:
    """Within ten minutes of the newest, if that switched anything: who rents less owns less."""
    newest_ms, newest = switched[-1]
    lately = sum(nodes for at_ms, nodes in switched if at_ms > newest_ms - WINDOW_MS)
    return lately if newest else 0


def _given_back(box: Box, found: Plan) -> bool:
    return any(each.verb is Verb.DELETE and box.node in each.nodes for each in found.actions)


def _obeyed(box: Box, found: Plan, now_ms: int) -> Box:
    for each in found.actions:
        if box.node in each.nodes and each.verb is Verb.SUSPEND:
            return replace(box, power=Power.OFF, since_ms=now_ms, idle_ms=0)
        if box.node in each.nodes and each.verb is Verb.RESUME:
            starts = (*box.starts_ms, now_ms)
            return replace(box, power=Power.ON, since_ms=now_ms, idle_ms=now_ms, starts_ms=starts)
    if box.power in (Power.ON, Power.LEAVING):
        return replace(box, power=Power.LEAVING if box.node in found.leaving else Power.ON)
    return box


def _spends_within(found: Plan, boxes: Sequence[Box], rules: Rules) -> None:
    created = Counter[str]()
    for each in found.actions:
        if each.verb is Verb.CREATE:
            created[each.gpu_type] += len(each.nodes)
    assert rules.spends_alone or not created
    rented = Counter(box.gpu_type for box in boxes if box.source is Source.BURST)
    usd = sum(
        8 * BURSTS[name].usd_min * (created[name] + rented[name]) for name in ("A100", "H100")
    )
    spent_usd = sum(each for _, each in found.memory.spent_usd)
    assert not created or spent_usd + usd <= rules.budget_usd_per_day + 1e-6
