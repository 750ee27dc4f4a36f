"""A decision over all jobs that is answered late, never, twice or by somebody else's order.

Problem: it is made beside the loop of what was true when it was ordered, and what it says may be
wrong by the time it is heard. So each of these stands between an order and its answer, makes
something happen, and looks at who is stopped for what and what is promised to whom.
"""

import math
from collections.abc import Callable

import pytest

from coordinator.core import contenders, decisions
from coordinator.core import messages as m
from coordinator.core.allocation import unsolved
from coordinator.core.decisions import ANSWER_MS_MAX, TICK_MS
from coordinator.core.model import JobClass
from coordinator.core.phases import JobPhase
from coordinator.core.state import Instant, Options
from coordinator.core.weighing import answer
from tests.core.coordinator_checks import check_promises
from tests.core.coordinator_harness import UNIX_MS_AT_START
from tests.core.training_fleet import A100, H100, Fleet, training

MOVED = ["moves to H100, where it is 2.5 times as fast as on A100 80GB"]


def asked_whether_to_move() -> Fleet:
    """Job 2 trains on the A100, the H100 is free by now, and a decision is ordered that has it
    there."""
    fleet = Fleet("1xA100:80", "1xH100", options=Options(solve=unsolved))
    fleet.submit(name="first")
    fleet.submit(name="second", total=100_000)
    fleet.run(900)
    fleet.rig.answers_at_once = False
    fleet.end(1)
    fleet.run(3)
    assert len(fleet.rig.unanswered) == 1
    assert fleet.stops() == []
    return fleet


def told(fleet: Fleet) -> list[m.Effect]:
    """The oldest order is answered."""
    return fleet.rig.handle(answer(fleet.rig.unanswered.pop(0)))


def ask(body: m.RequestBody) -> Callable[[Fleet], object]:
    return lambda fleet: fleet.rig.handle(m.Request(1, body))


def lose(fleet: Fleet) -> None:
    fleet.rig.handle(m.FromAgent(1, m.SessionClosed()))
    for _ in range(20):
        fleet.rig.now_ms += 500
        fleet.rig.handle(m.FromAgent(2, m.Heartbeat(1_000_000)))
        fleet.rig.handle(m.Tick())
    assert fleet.job(2).phase is not JobPhase.ACTIVE or fleet.type_of(2) == H100


MEANWHILE: dict[str, Callable[[Fleet], object]] = {
    "it is cancelled": ask(m.CancelJob(2)),
    "it is held": ask(m.HoldJob(2)),
    "it is requeued": ask(m.RequeueJob(2)),
    "it ends": lambda fleet: fleet.end(2),
    "it fails": lambda fleet: fleet.say("2.1", m.AttemptExited(1)),
    "its node is drained": ask(m.DrainNode("n1")),
    "its node is lost": lose,
    "the other GPU is taken": lambda fleet: fleet.submit(),
    "the other node is cordoned": ask(m.CordonNode("n2")),
    "the other node is gone": lambda fleet: fleet.rig.handle(m.FromAgent(2, m.Goodbye(None))),
}


def test_an_answer_is_taken_when_it_comes_and_changes_nothing_again() -> None:
    fleet = asked_whether_to_move()
    again = answer(fleet.rig.unanswered[0])
    fleet.run(40)
    assert len(fleet.rig.unanswered) == 1, "one is asked for at a time"
    assert fleet.stops() == []
    told(fleet)
    assert fleet.stops() == MOVED
    assert list(fleet.state.standing.promises) == [2]
    assert fleet.rig.handle(again) == []
    fleet.run(5)
    assert fleet.type_of(2) == H100
    assert fleet.stops() == MOVED


@pytest.mark.parametrize("happens", MEANWHILE)
def test_of_an_answer_only_what_is_still_true_is_taken(happens: str) -> None:
    fleet = asked_whether_to_move()
    MEANWHILE[happens](fleet)
    before = fleet.stops()
    told(fleet)
    assert fleet.stops() == before
    check_promises(fleet.state)
    assert fleet.state.standing.promises == {}
    fleet.run(60)
    assert not [why for why in fleet.stops() if why in MOVED] or fleet.type_of(2) == H100


@pytest.mark.parametrize(
    "wishes", [(), (m.CancelJob(2),), (m.HoldJob(2),), (m.HoldJob(2), m.ReleaseJob(2))]
)
def test_nobody_gives_way_to_one_who_does_not_wait_any_more(
    wishes: tuple[m.CancelJob | m.HoldJob | m.ReleaseJob, ...],
) -> None:
    """Job 1 has hours to go, and may be stopped for job 2 once it has run for ten minutes. Job 2 is
    a trial, and whoever is behind gets its place where it is cancelled or held."""
    fleet = Fleet("1xH100", "1xA100:80")
    fleet.submit(training(50_000))
    fleet.run(400)
    fleet.submit(training(900, gpu_types=(H100,), array="0-1%1"))
    fleet.run(240)
    fleet.rig.answers_at_once = False
    while not fleet.rig.unanswered:
        fleet.run(1)
    found = answer(fleet.rig.unanswered[0]).allocation
    assert found is not None
    assert found.grants[2].option.gpu_type == H100
    for wish in wishes:
        fleet.rig.handle(m.Request(1, wish))
    told(fleet)
    assert len(fleet.stops()) == (not wishes)


def test_who_comes_meanwhile_goes_by_the_prices_of_the_last_time() -> None:
    fleet = Fleet("1xA100:80", "1xH100", "1xA100:80")
    fleet.submit(gpu_types=("A100",))
    fleet.rig.answers_at_once = False
    fleet.run(3)
    fleet.state.standing.prices = {H100: 50.0, A100: 0.0}
    assert fleet.state.standing.asked is not None
    fleet.submit()
    assert fleet.type_of(2) == A100
    fleet.submit(job_class=JobClass.SPARE)
    assert fleet.type_of(3) == H100, "no GPU idles for want of an answer"
    told(fleet)
    assert fleet.stops() == []


def test_who_is_beyond_his_quota_by_now_is_left_out() -> None:
    fleet = asked_whether_to_move()
    asked = fleet.state.standing.asked
    assert asked is not None
    (entrant,) = asked.field.entrants
    seen = contenders.fleet_of(fleet.state)
    assert contenders.stays(fleet.state, entrant, seen, {})
    assert not contenders.stays(fleet.state, entrant, seen, {2: None})


def test_an_answer_to_a_coordinator_that_is_no_more_changes_nothing() -> None:
    """Also where the next one has asked in the same millisecond."""
    fleet = asked_whether_to_move()
    fleet.rig.restart()
    for session in (1, 2):
        fleet.rig.handle(m.FromAgent(session, m.SessionClosed()))
    then = fleet.rig.unanswered.pop()
    assert fleet.rig.handle(answer(then)) == []
    fleet.run(3)
    asked = fleet.state.standing.asked
    assert asked is not None
    assert then.asking != (fleet.state.leader_epoch, then.now_ms)
    fleet.rig.handle(answer(then))
    assert fleet.state.standing.asked is asked


def test_what_fails_is_told_and_tried_again_in_a_minute() -> None:
    fleet = asked_whether_to_move()
    failed = m.AllocationMade(fleet.rig.unanswered.pop().asking, None, reason="out of memory")
    (log,) = fleet.rig.handle(failed)
    assert log == m.Log("warning", "allocation.failed", (("reason", "out of memory"),))
    fleet.submit(gpu_types=("A100",))
    fleet.run(TICK_MS // 1_000 - 10)
    assert not fleet.rig.unanswered, "whatever happens: it may be the memory that there is none of"
    fleet.run(11)
    told(fleet)
    assert fleet.stops() == MOVED


def until_given_up(fleet: Fleet) -> tuple[m.MakeAllocation, str]:
    """Who hangs, and what is said of it."""
    (asked,) = fleet.rig.unanswered
    handled = len(fleet.rig.handled)
    left_ms = asked.now_ms + ANSWER_MS_MAX - fleet.rig.now_ms
    fleet.run(left_ms // 1_000 - 5)
    assert fleet.rig.unanswered == [asked]
    fleet.run(10)
    logged = [effect for _, _, some in fleet.rig.handled[handled:] for effect in some]
    (said,) = [one for one in logged if isinstance(one, m.Log) and one.event == "allocation.hangs"]
    fleet.rig.unanswered.remove(asked)
    return asked, str(dict(said.fields)["reason"])


def test_what_is_never_answered_is_asked_of_somebody_else_without_the_solver() -> None:
    fleet = asked_whether_to_move()
    late, said = until_given_up(fleet)
    assert late.solve is unsolved
    assert said == "no answer has come for 300 s; decisions are made without the solver for 1 h"
    (asked,) = fleet.rig.unanswered
    assert asked.solve is None
    assert fleet.rig.handle(answer(late)) == []
    told(fleet)
    assert fleet.stops() == MOVED


def test_a_solver_that_hangs_is_left_out_ever_longer_and_then_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decisions, "SOLVER_RESTS_H", 0.1)
    fleet = asked_whether_to_move()
    fleet.tick_ms = 2_000
    for hours in (0.1, 0.2):
        _, said = until_given_up(fleet)
        assert said.endswith(f"without the solver for {hours} h")
        (asked,) = fleet.rig.unanswered
        until_ms = asked.now_ms + hours * 3_600_000
        while asked.now_ms < until_ms:
            assert asked.solve is None
            told(fleet)
            fleet.run(TICK_MS // 1_000)
            (asked,) = fleet.rig.unanswered
        assert asked.solve is unsolved
    _, said = until_given_up(fleet)
    assert said.endswith("without the solver until a restart")
    assert fleet.state.standing.unsolved_until_ms == math.inf


def test_who_was_away_himself_does_not_take_it_for_a_decision_that_hangs() -> None:
    """As on a machine that was suspended."""
    fleet = asked_whether_to_move()
    fleet.rig.now_ms += 2 * ANSWER_MS_MAX
    fleet.run(10)
    told(fleet)
    assert fleet.stops() == MOVED
    assert fleet.state.standing.hangs == 0


def test_a_deadline_comes_due_while_nobody_answers() -> None:
    """Job 3 has to start after three minutes; the GPU is free after four."""
    fleet = Fleet("1xH100")
    fleet.submit(training(400))
    fleet.run(60)
    fleet.submit(training(300))
    fleet.submit(training(900, deadline_unix_ms=fleet.rig.now.unix_ms + 1_160_000))
    fleet.run(75)
    fleet.rig.answers_at_once = False
    fleet.run(120)
    assert len(fleet.rig.unanswered) == 1
    fleet.end(1)
    assert fleet.type_of(3) == H100


def test_who_comes_while_nobody_answers_has_a_latest_start_and_goes_first_then() -> None:
    """Job 3 comes after the order, and has to start three minutes later; so has job 2 for ever."""
    fleet = Fleet("1xH100")
    fleet.submit(training(400))
    fleet.run(75)
    fleet.rig.answers_at_once = False
    fleet.submit(training(300))
    fleet.run(5)
    assert len(fleet.rig.unanswered) == 1
    fleet.submit(training(900, deadline_unix_ms=fleet.rig.now.unix_ms + 1_140_000))
    fleet.run(TICK_MS // 1_000)
    assert fleet.state.standing.latest_ms[3] > fleet.rig.now_ms
    fleet.run(170)
    assert len(fleet.rig.unanswered) == 1
    fleet.end(1)
    assert fleet.type_of(3) == H100


def test_a_clock_that_is_set_meanwhile_changes_nothing() -> None:
    fleet = asked_whether_to_move()
    tomorrow = Instant(fleet.rig.now_ms, UNIX_MS_AT_START + fleet.rig.now_ms + 86_400_000)
    effects = fleet.rig.core.handle(tomorrow, answer(fleet.rig.unanswered.pop()))
    orders = [effect.order for effect in effects if isinstance(effect, m.Send)]
    assert [each.attempt for each in orders if isinstance(each, m.StopAttempt)] == ["2.1"]
