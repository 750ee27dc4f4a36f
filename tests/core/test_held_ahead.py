"""What is held ahead: those who say their end leave then, the others fade, and nobody doubles."""

from dataclasses import replace
from typing import Any

import pytest

from coordinator.core import demand_samples
from coordinator.core import held_ahead as module
from coordinator.core.demand_history import MINUTE_MS, STILL_MIN, Series, Still
from coordinator.core.demand_messages import DemandSeries, GetDemand
from coordinator.core.held_ahead import frees_ms, held_ahead, still_wanted
from coordinator.core.keeps import Reservation
from coordinator.core.messages import CancelJob, Refusal, Reply, Request
from coordinator.core.model import JobClass
from coordinator.core.phases import AttemptPhase
from coordinator.core.rooms import Place
from tests.core.training_fleet import A100, H100, Fleet


def fleet() -> Fleet:
    """On H100 two GPUs with 600 steps, one a second, and one that says nothing; on A100 four that
    say nothing; a minute later."""
    found = Fleet("3xH100", "4xA100")
    found.submit(gpus=2, gpu_types=("H100",), total=600)
    found.submit(gpus=1, gpu_types=("H100",), project="nlp")
    found.submit(gpus=4, gpu_types=("A100",), job_class=JobClass.SPARE)
    found.run(60)
    return found


def of(here: Fleet, which: Series, *minutes: int) -> list[Any]:
    held, ahead = held_ahead(here.state, here.rig.now, which, minutes)
    assert all(one.certain_gpus <= one.expected_gpus <= held for one in ahead)
    return [(one.certain_gpus, one.expected_gpus) for one in ahead]


def test_who_says_his_end_is_there_until_then_and_the_others_fade() -> None:
    here = fleet()
    assert held_ahead(here.state, here.rig.now, Series(), ())[0] == 7.0
    before, after = of(here, Series(H100), 8, 10)
    assert before == (2.0, pytest.approx(2 + 1 / 9, abs=0.01))  # one of a minute's age
    assert after == (0.0, pytest.approx(1 / 11, abs=0.01))
    assert of(here, Series(A100), 1, 3) == [
        (0.0, pytest.approx(2.0, abs=0.05)),
        (0.0, pytest.approx(1.0, abs=0.05)),
    ]


def test_what_is_asked_for_is_what_is_summed() -> None:
    here = fleet()
    for which, gpus in ((Series(project="nlp"), 1.0), (Series(job_class="spare"), 4.0)):
        assert held_ahead(here.state, here.rig.now, which, ())[0] == gpus


def test_who_is_told_to_stop_is_gone_when_his_grace_is_over() -> None:
    here = fleet()
    attempt = here.state.attempts["3.1"]
    spec = here.state.jobs[3].spec
    here.state.jobs[3] = replace(here.state.jobs[3], spec=replace(spec, grace_ms=120_000))
    here.rig.handle(Request(1, CancelJob(3)))
    assert here.state.attempts[attempt.id].phase is AttemptPhase.STOPPING
    assert of(here, Series(A100), 1, 3) == [(4.0, 4.0), (0.0, 0.0)]


def test_what_is_reserved_is_taken_when_it_comes_free() -> None:
    here = fleet()
    kept = Place("n1", tuple(gpu.uuid for gpu in here.state.nodes["n1"].node.gpus[:2]))
    until_ms = here.rig.now_ms + 30 * 60_000
    here.state.reservations[1] = Reservation(9, (kept,), until_ms)
    gone, later = of(here, Series(H100), 10, 60)
    assert gone == (2.0, pytest.approx(2 + 1 / 11, abs=0.01))
    assert later == (0.0, pytest.approx(2 + 1 / 61, abs=0.01))


def test_the_ranks_of_a_gang_leave_together() -> None:
    here = Fleet("2xH100", "2xH100")
    here.submit(gpus=2, ranks=2, total=600)
    here.run(60)
    assert of(here, Series(), 8, 10) == [(4.0, 4.0), (0.0, 0.0)]


def test_people_ask_for_few_times_not_far_ahead() -> None:
    rig = fleet().rig
    for minutes in (tuple(range(1, 18)), (10_081,)):
        (reply,) = (
            effect
            for effect in rig.handle(Request(1, GetDemand(ahead_min=minutes)))
            if isinstance(effect, Reply)
        )
        assert isinstance(reply.answer, Refusal)
        assert "at most 16 times, at most 10080 minutes" in reply.answer.sentence


def test_when_a_node_comes_free_is_when_as_many_gpus_are_expected_to_be() -> None:
    """Of those who say their end at it; of the others when they have run as long again; and not
    where what comes free is kept for somebody."""
    here = fleet()
    rig = here.rig
    freed = frees_ms(here.state, rig.now, {H100: 2.0, A100: 2.0, "B200": 1.0})
    assert 5 * MINUTE_MS < freed[H100] < 11 * MINUTE_MS  # in nine; between looks evenly
    assert freed[A100] == pytest.approx(MINUTE_MS, rel=0.1)
    assert "B200" not in freed
    kept = Place("n2", tuple(gpu.uuid for gpu in here.state.nodes["n2"].node.gpus))
    here.state.reservations[1] = Reservation(9, (kept,), rig.now_ms + MINUTE_MS)
    assert A100 not in frees_ms(here.state, rig.now, {A100: 2.0})


def test_of_very_many_a_part_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Fleet("16xA100", "16xA100")
    for _ in range(32):
        here.submit(gpus=1)
    here.run(60)
    whole = frees_ms(here.state, here.rig.now, {A100: 16.0})
    monkeypatch.setattr(module, "HOLDERS_MAX", 5)
    assert frees_ms(here.state, here.rig.now, {A100: 16.0})[A100] == pytest.approx(
        whole[A100], rel=0.2
    )


def still_of(here: Fleet) -> dict[Series, Still]:
    return still_wanted(here.state, here.rig.now, demand_samples.wanted(here.state))


SAYS, SILENT = Series(H100, "default", "standard"), Series(A100, "default", "spare")


def test_of_what_is_wanted_who_says_his_end_leaves_then_and_who_waits_stays() -> None:
    here = fleet()
    here.submit(gpus=3, gpu_types=("H100",))  # waits
    found = still_of(here)
    assert sum(found[SAYS].gpus) == 3.0 * len(STILL_MIN)
    assert found[SAYS].said_gpus == 2.0
    (one,) = [found[series] for series in found if series.project == "nlp"]
    assert one.said_gpus == 0.0
    assert one.gpus[0] == pytest.approx(1 / 61, abs=0.01)  # of a minute's age, by that
    assert found[SILENT].said_gpus == 0.0
    assert list(found[SILENT].gpus) == sorted(found[SILENT].gpus, reverse=True)


def test_who_has_long_to_go_is_wanted_until_then() -> None:
    here = Fleet("2xH100")
    here.submit(gpus=2, total=4 * 3_600)
    here.run(60)
    (found,) = still_of(here).values()
    assert found.said_gpus == 2.0
    assert found.gpus == (2.0, 2.0, 0.0, 0.0, 0.0, 0.0)  # after 1, 3 and 6 h...


def test_who_is_told_to_stop_says_no_end_since_he_may_go_on_elsewhere() -> None:
    here = Fleet("2xH100")
    here.submit(gpus=2, total=4 * 3_600)
    here.run(60)
    here.rig.handle(Request(1, CancelJob(1)))
    assert here.state.attempts["1.1"].phase is AttemptPhase.STOPPING
    assert still_of(here) == {}


def test_where_nobody_says_his_end_nothing_is_kept() -> None:
    here = Fleet("4xA100")
    here.submit(gpus=4)
    here.run(60)
    assert still_of(here) == {}


def test_of_very_many_a_part_stands_for_all_who_say(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Fleet("16xA100", "16xA100")
    for _ in range(32):
        here.submit(gpus=1, total=4 * 3_600)
    here.run(60)
    (whole,) = still_of(here).values()
    monkeypatch.setattr(module, "HOLDERS_MAX", 11)  # every third
    (part,) = still_of(here).values()
    assert part.said_gpus == pytest.approx(whole.said_gpus, abs=2)
    assert part.gpus == pytest.approx(whole.gpus, abs=2)


def test_it_is_kept_at_the_end_of_each_hour_and_answered_with_what_is_known_now() -> None:
    here = Fleet("2xH100", "2xA100")
    here.tick_ms = 10_000
    here.submit(gpus=2, gpu_types=("H100",), total=5 * 3_600)
    here.submit(gpus=2, gpu_types=("A100",))
    here.run(2 * 3_600 + 600)

    def answer(**asked: Any) -> list[tuple[float, Still]]:
        question = GetDemand(period_min=10, still=True, **asked)
        (reply,) = (e for e in here.rig.handle(Request(1, question)) if isinstance(e, Reply))
        assert isinstance(reply.answer, DemandSeries)
        begin_min = reply.answer.begin_unix_ms / MINUTE_MS
        return [(begin_min + minute, still) for minute, still in reply.answer.still]

    first, second, now = answer(gpu_type="H100")
    assert (first[0] % 60, second[0] - first[0]) == (0.0, 60.0)
    assert now[0] > second[0]
    assert first[1] == Still(2.0, (2.0, 2.0, 0.0, 0.0, 0.0, 0.0))
    assert now[1] == Still(2.0, (2.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    assert answer(gpu_type="A100") == [], "nobody says there"
    both = answer()
    assert [still.said_gpus for _, still in both] == [2.0] * 3
    assert 2.0 < both[0][1].gpus[0] < 4.0, "the others by their age"
    here.rig.restart()
    assert [moment for moment, _ in answer(gpu_type="H100")][:2] == [first[0], second[0]]
