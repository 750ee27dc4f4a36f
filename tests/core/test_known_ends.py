"""Who says that he ends soon: no node is started in his stead, once such words have come true.

Problem: a word that is believed at once leaves work without a node when it is a lie, or when the
next job comes as the last one goes. So these look at what a plan does by it, and at what it takes
to be believed.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import held_ahead, known_ends
from coordinator.core.capacity_model import LEVELS, Outlook, Power
from coordinator.core.capacity_orders import Verb
from coordinator.core.fleet_scaling import boxes_of
from coordinator.core.model import JobClass
from coordinator.core.node_power import PowerOptions
from coordinator.core.scaler import ENDS_SEEN_MAX, ScalingOptions
from coordinator.core.scaling import Rules
from coordinator.core.state import Options
from tests.core.test_scaling import box, busy, decided, outlook
from tests.core.training_fleet import H100, Fleet

MINUTE_MS = 60_000
BOOT_MIN, INTERVAL_MIN, LATER_MIN = 2, 1, 4
TERM_MIN = 6  # of one job and what follows it, until all that was said of it is judged


# --- a plan that is told of them ------------------------------------------------------------------


def test_who_waits_behind_one_that_ends_in_time_has_no_node_started_for_him() -> None:
    boxes = [busy(1), box(2, Power.OFF)]
    waits = outlook(8, queued=8, soon=16)
    assert [each.verb for each in decided(boxes, waits).actions] == [Verb.RESUME]
    ends = replace(waits, ending_gpus=8)
    assert not decided(boxes, ends).actions
    assert decided(boxes, replace(ends, queued_gpus=16, soon_gpus=(24,) * 9)).actions


def test_what_a_job_that_ends_was_to_hold_for_hours_is_not_kept_on() -> None:
    boxes = [busy(1), busy(2), box(3)]
    stays = outlook(16, soon=16, later=24)
    assert decided(boxes, stays).leaving == ()
    assert decided(boxes, replace(stays, ended_later_gpus=16)).leaving == ("n03",)
    rises = replace(stays, ended_later_gpus=16, ending_gpus=16, soon_gpus=(20,) * len(LEVELS))
    assert decided(boxes, rises).leaving == (), "it may rise before it ends"


def test_guaranteed_demand_is_never_less_by_it() -> None:
    boxes = [busy(1), box(2, Power.OFF)]
    waits = replace(outlook(8, queued=8, soon=16), ending_gpus=8, guaranteed_gpus=16)
    assert [each.verb for each in decided(boxes, waits).actions] == [Verb.RESUME]


def test_a_forecast_that_is_not_trusted_is_not_lowered() -> None:
    boxes = [busy(1), box(2, Power.OFF)]
    waits = replace(outlook(8, queued=8, soon=16), ending_gpus=8, coverage=0.5)
    assert [each.verb for each in decided(boxes, waits).actions] == [Verb.RESUME]


# --- how much is believed -------------------------------------------------------------------------


def test_nothing_is_believed_before_enough_has_come_true() -> None:
    right = [(1.0, 8.0)] * known_ends.SAID_MIN
    assert known_ends.allowed_share(right, 8.0, 0.95) == 1.0
    assert known_ends.allowed_share(right[1:], 8.0, 0.95) == 0.0
    assert known_ends.allowed_share(right, 16.0, 0.95) == 0.0, "what is larger has no record"
    assert known_ends.allowed_share([], 1.0, 0.95) == 0.0


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(0.1, 64)), min_size=1, max_size=ENDS_SEEN_MAX),
    st.floats(0.05, 0.975),
)
def test_what_is_believed_would_have_been_wrong_as_seldom_as_was_asked_for(
    seen: list[tuple[float, float]], level: float
) -> None:
    share = known_ends.allowed_share(seen, 0.01, level)
    total = sum(gpus for _, gpus in seen)
    wrong = sum(gpus for held, gpus in seen if held < share)
    assert 0.0 <= share <= 1.0
    assert share == 0.0 or wrong <= (1 - level) * total * 1.001


# --- in the live coordinator ----------------------------------------------------------------------


def fleet() -> Fleet:
    scaling = ScalingOptions(
        Rules(later_ms=LATER_MIN * MINUTE_MS), interval_ms=INTERVAL_MIN * MINUTE_MS
    )
    power = PowerOptions(boot_guess_ms=BOOT_MIN * MINUTE_MS)
    made = Fleet("8xH100", "8xH100", options=Options(power=power, scaling=scaling))
    made.tick_ms = 20_000
    return made


def look(here: Fleet, queued: int = 0) -> Outlook:
    """What a plan would see, by a forecast that nothing changes."""
    now = here.rig.now
    running = 8.0 * len(here.state.indices.open_attempts)
    levels = (running + queued,) * len(LEVELS)
    seen = [Outlook(H100, round(running), queued, 0, levels, levels)]
    (found,) = known_ends.outlooks(here.state, now, boxes_of(here.state, now), seen)
    return found


def term(here: Fleet, ends: bool = True, *, next_one: bool = False) -> None:
    """A job of two minutes that says so."""
    job_id = here.submit(gpus=8, gpu_types=(H100,), total=120)
    for minute in range(TERM_MIN):
        here.run(60, saving=False)
        if minute == 1 and ends:
            here.end(job_id)
            if next_one:
                job_id = here.submit(gpus=8, gpu_types=(H100,))
        look(here)
    if not ends or next_one:
        here.end(job_id)
        here.run(60)


def believed(here: Fleet) -> tuple[int, int]:
    """Of a job of eight GPUs with less than a boot to go, soon and later."""
    here.submit(gpus=8, gpu_types=(H100,), total=120)
    here.run(60, saving=False)
    found = look(here)
    return found.ending_gpus, found.ended_later_gpus


def test_words_that_have_come_true_are_believed() -> None:
    here = fleet()
    for _ in range(known_ends.SAID_MIN - 1):
        term(here)
    assert believed(here) == (0, 0)
    here = fleet()
    for _ in range(known_ends.SAID_MIN):
        term(here)
    assert believed(here) == (8, 8)
    here.submit(gpus=8, gpu_types=(H100,), job_class=JobClass.GUARANTEED)
    here.submit(gpus=8, gpu_types=(H100,), job_class=JobClass.GUARANTEED)
    assert here.state.queued
    assert look(here, queued=8).ending_gpus == 0, "a guaranteed job waits"


@pytest.mark.parametrize("case", ["he does not end", "the next one comes at once"])
def test_words_that_come_to_nothing_are_not(case: str) -> None:
    here = fleet()
    for _ in range(known_ends.SAID_MIN):
        term(here, case != "he does not end", next_one=case != "he does not end")
    assert len(here.state.scaler.ends[H100, "soon"].seen) >= known_ends.SAID_MIN
    assert believed(here) == (0, 0)


def test_who_is_overdue_is_stopped_or_runs_on_a_closed_node_ends_at_no_known_time() -> None:
    here = fleet()
    job_id = here.submit(gpus=8, gpu_types=(H100,), total=120)
    here.run(60, saving=False)
    node = here.state.attempts[f"{job_id}.1"].node

    def ending(nodes: tuple[str, ...] = ("n1", "n2")) -> dict[str, float]:
        ahead_ms = {H100: BOOT_MIN * MINUTE_MS}
        return held_ahead.ending_gpus(here.state, here.rig.now, ahead_ms, nodes)

    assert ending() == {H100: 8.0}
    assert ending(tuple({"n1", "n2"} - {node})) == {}
    here.rig.now_ms += 240_000
    assert ending() == {}


def test_what_a_trial_leaves_is_free_when_those_behind_it_are_over() -> None:
    here = fleet()
    ahead_ms = {H100: BOOT_MIN * MINUTE_MS}
    job_id = here.submit(gpus=8, gpu_types=(H100,), array="0-2%1", total=120)
    here.run(60, saving=False)
    assert held_ahead.ending_gpus(here.state, here.rig.now, ahead_ms, ("n1", "n2")) == {}
    for trial in range(2):
        here.end(job_id + trial)
        here.run(60, saving=False)
    ending = held_ahead.ending_gpus(here.state, here.rig.now, ahead_ms, ("n1", "n2"))
    assert ending == {H100: 8.0}, "it is the last one"


def test_a_clock_that_is_set_back_leaves_no_words_that_are_never_judged() -> None:
    here = fleet()
    here.submit(gpus=8, gpu_types=(H100,), total=120)
    here.run(60, saving=False)
    look(here)
    record = here.state.scaler.ends[H100, "soon"]
    said = record.claim
    assert said is not None
    far = 365 * 1_440
    record.claim = replace(said, first=said.first + far, last=said.last + far)
    look(here)
    assert record.claim == said
