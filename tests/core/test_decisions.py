"""The decision over all jobs in the live coordinator: when it is made and what follows from it.

Problem: a decision that is right on paper does harm where it is followed at the wrong time, twice,
or for somebody of whom nothing is known. So these drive the real core, job by job, and look at who
is stopped, who runs where, and what is said of it.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.core import contenders, costs, decisions, gangs, moves
from coordinator.core import messages as m
from coordinator.core.allocation import Aims
from coordinator.core.model import JobClass, JobSpec, Progress, TrainerTime
from coordinator.core.phases import JobPhase
from coordinator.core.state import Instant, Options, State
from coordinator.solver import solve
from tests.core.coordinator_harness import GIGABYTE, UNIX_MS_AT_START
from tests.core.training_fleet import A100, H100, Fleet, training

AUTOMATIC = JobSpec(
    command=("train",), gpus=1, shared_gpu_memory_bytes=8 * GIGABYTE, share_automatic=True
)

ROOT = Path(__file__).parents[2]


# --- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [JobSpec(command=("train",), gpus=1), AUTOMATIC])
def test_a_job_takes_the_type_that_facts_call_faster_and_others_what_is_left(
    spec: JobSpec,
) -> None:
    fleet = Fleet("2xA100:80", "1xH100")
    jobs = [fleet.submit(spec) for _ in range(3)]
    assert [fleet.type_of(job_id) for job_id in jobs] == [H100, A100, A100]
    assert "it is about 2.5 times as fast there as on A100 80GB" in fleet.job(1).reason
    assert "on H100 it would be about 2.5 times as fast" in fleet.job(2).reason


def test_where_nothing_is_known_of_types_nobody_prefers_one() -> None:
    fleet = Fleet("3xFoo:80", "1xBar:80")
    fleet.submit()
    assert fleet.type_of(1) == "Bar", "the tightest fit"
    assert fleet.job(1).reason == "runs on 1 x Bar on n2, the tightest fit"


def test_a_node_that_failed_is_avoided_though_its_type_is_better() -> None:
    fleet = Fleet("1xA100:80", "1xH100")
    fleet.submit()
    fleet.say("1.1", m.AttemptRefused("the disk is full"))
    fleet.run(2)
    assert fleet.type_of(1) == A100


def test_prices_send_a_newcomer_where_it_is_worth_most() -> None:
    """The H100 is dear by the last decision, and to this one the A100 is nearly as good."""
    fleet = Fleet("1xA100:80", "1xH100")
    fleet.submit()
    fleet.end(1)
    fleet.state.standing.prices = {H100: 50.0, A100: 0.0}
    fleet.submit()
    assert fleet.type_of(2) == A100


def test_a_gang_is_of_one_type_where_one_has_room_and_whole_in_any_case() -> None:
    fleet = Fleet("2xH100,2xA100:80", "2xA100:80")
    fleet.submit(gpus=1, ranks=3)
    assert fleet.type_of(1) == A100, "no H100 is the third"
    fleet.end(1)
    fleet.submit(gpus=1, ranks=5)
    assert fleet.type_of(2).count("and") == 1


# --- moves ----------------------------------------------------------------------------------------


def on_the_slower(
    options: Options | None = None, total: int = 100_000, spec: JobSpec | None = None
) -> Fleet:
    """Job 1 has just ended on the H100; job 2 has run on the A100 for a quarter of an hour."""
    fleet = Fleet("1xA100:80", "1xH100", options=options)
    fleet.submit(name="first")
    fleet.submit(spec, total, name="second")
    fleet.run(900)
    fleet.end(1)
    return fleet


@pytest.mark.long
@pytest.mark.parametrize("spec", [None, AUTOMATIC])
def test_a_job_moves_to_the_faster_type_and_goes_on_from_its_checkpoint(
    spec: JobSpec | None,
) -> None:
    fleet = on_the_slower(spec=spec)
    fleet.run(30)
    assert fleet.type_of(2) == H100
    assert fleet.stops() == ["moves to H100, where it is 2.5 times as fast as on A100 80GB"]
    attempt = fleet.state.current(fleet.job(2))
    assert attempt is not None
    assert attempt.restored_step >= 360
    fleet.run(900)
    assert len(fleet.stops()) == 1, "it is where it is best"


def pair_on_the_faster(*others: str) -> Fleet:
    """Job 1 and job 2 share the H100; on the other GPUs somebody has just ended."""
    fleet = Fleet("1xH100", *others)
    fleet.submit(AUTOMATIC)
    fillers = [fleet.submit() for _ in others]
    fleet.run(150)
    guest = fleet.submit(AUTOMATIC)
    attempt = fleet.state.current(fleet.job(guest))
    assert attempt is not None
    assert len(contenders.beside(fleet.state, attempt)) == 1
    fleet.run(700)
    for job_id in fillers:
        fleet.end(job_id)
    fleet.run(60)
    return fleet


@pytest.mark.long
@pytest.mark.parametrize(("others", "type_after"), [(("1xA100:80",), ""), (("1xH100",), H100)])
def test_two_on_a_gpu_come_apart_only_where_that_is_faster(
    others: tuple[str, ...], type_after: str
) -> None:
    """Beside one another they do 0.9 of what each does alone, and an A100 does 0.4."""
    fleet = pair_on_the_faster(*others)
    assert len(fleet.stops()) == bool(type_after)
    assert [fleet.type_of(job_id) for job_id in (1, 3)] == [H100, H100]


def test_who_has_company_is_no_contender_and_what_it_has_is_not_there_to_have() -> None:
    fleet = pair_on_the_faster("1xA100:80")
    state, now = fleet.state, fleet.rig.now
    seen = contenders.fleet_of(state)
    field = contenders.field_of(state, now, seen, contenders.contending(state), {})
    assert field.entrants == ()
    assert field.capacity == {A100: 1, H100: 0}


@pytest.mark.long
def test_who_does_not_say_how_much_is_left_is_not_moved() -> None:
    fleet = on_the_slower(total=0)
    fleet.run(300)
    assert fleet.stops() == []


def test_who_is_nearly_done_is_not_moved() -> None:
    fleet = on_the_slower(total=380)
    fleet.run(30)
    assert fleet.stops() == []


@pytest.mark.long
def test_nobody_is_moved_where_no_moves_are_allowed() -> None:
    fleet = on_the_slower(Options(moves_per_hour=0))
    fleet.run(300)
    assert fleet.stops() == []


@pytest.mark.long
def test_what_a_mover_was_promised_is_kept_for_it() -> None:
    """From one of its class that comes meanwhile, not from a higher class."""
    for job_class, theirs in ((JobClass.STANDARD, A100), (JobClass.GUARANTEED, H100)):
        fleet = on_the_slower()
        while not fleet.stops():
            fleet.rig.now_ms += 500
            fleet.rig.handle(m.Tick())
        fleet.rig.handle(
            m.Request(1, m.Submit(JobSpec(command=("x",), gpus=1, job_class=job_class)))
        )
        fleet.totals[3] = 0
        fleet.run(5)
        assert fleet.type_of(3) == theirs
        assert fleet.type_of(2) == (H100 if theirs == A100 else A100)


def test_a_promise_ends_when_whoever_leaves_must_have_left() -> None:
    fleet = on_the_slower()
    while not fleet.stops():
        fleet.rig.now_ms += 500
        fleet.rig.handle(m.Tick())
    promise = fleet.state.standing.promises[2]
    assert promise.gpu_type == H100
    grace_ms = fleet.job(2).spec.grace_ms
    assert promise.until_ms - fleet.rig.now_ms == grace_ms + 10_000 + moves.SLACK_MS
    fleet.rig.now_ms = promise.until_ms
    decisions.forget(fleet.state, fleet.rig.now)
    assert fleet.state.standing.promises == {}


@pytest.mark.long
def test_moves_are_bounded_over_an_hour() -> None:
    fleet = Fleet("4xA100:80", "4xH100", options=Options(moves_per_hour=2))
    for _ in range(4):
        fleet.submit(name="first")
    for number in range(4):
        fleet.submit(name=f"second {number}", total=100_000)
    fleet.run(900)
    for job_id in range(1, 5):
        fleet.end(job_id)
    fleet.run(120)
    assert len(fleet.stops()) == 2
    assert [fleet.type_of(job_id) for job_id in range(5, 9)].count(H100) == 2
    fleet.run(3_600)
    assert [fleet.type_of(job_id) for job_id in range(5, 9)].count(H100) == 4
    assert len(fleet.stops()) == 4


# --- within a class -------------------------------------------------------------------------------


@pytest.mark.long
def test_a_short_job_displaces_one_with_hours_to_go_which_moves_to_what_is_free() -> None:
    fleet = Fleet("1xH100", "1xA100:80")
    fleet.submit(training(50_000))
    fleet.run(400)
    fleet.submit(training(900, gpu_types=(H100,)))
    fleet.run(100)
    assert fleet.stops() == [], "it has not run for ten minutes"
    fleet.run(900)
    assert fleet.stops()[0].startswith(
        "moves to A100 80GB and gives way to job 2: a GPU of type H100"
    )
    assert [fleet.type_of(job_id) for job_id in (1, 2)] == [A100, H100]
    fleet.end(2)
    fleet.run(900)
    assert fleet.type_of(1) == H100, "and back, when that is over"


def test_nobody_gives_way_to_one_of_his_class_of_whom_nothing_is_known() -> None:
    fleet = Fleet("1xH100")
    fleet.submit(total=100_000)
    fleet.run(900)
    fleet.submit(name="unknown")
    fleet.run(900)
    assert fleet.stops() == []
    assert fleet.type_of(1) == H100


def test_those_who_say_what_is_left_take_turns_and_others_keep_their_place() -> None:
    fleet = Fleet("1xH100")
    fleet.submit(training(1_000_000))
    fleet.run(300)
    kinds = [
        JobSpec(command=("x",), gpus=1),
        training(90_000),
        JobSpec(command=("y",), gpus=1),
        training(50),
    ]
    for spec in kinds:
        fleet.submit(spec)
    fleet.run(62)
    waiting = [fleet.job(job_id) for job_id in fleet.state.queued]
    assert [job.id for job in decisions.in_turn(fleet.state, waiting, {})] == [2, 5, 4, 3]
    fleet.submit(JobSpec(command=("z",), gpus=1, job_class=JobClass.GUARANTEED))
    waiting = [fleet.job(job_id) for job_id in fleet.state.queued]
    first, *_ = decisions.in_turn(fleet.state, waiting, {}) if waiting else [fleet.job(6)]
    assert first.id == 6 or fleet.type_of(6)


def test_a_wait_names_the_price_where_that_decides() -> None:
    fleet = Fleet("1xH100", options=Options(solve=solve))
    fleet.submit(training(1_500))
    fleet.run(900)
    for steps in (9_000, 80_000):
        fleet.submit(training(steps))
    fleet.run(3)
    assert "to it, and" in fleet.state.waits[3]
    assert "a GPU of type H100 is worth" in fleet.state.waits[3]


@pytest.mark.long
def test_without_facts_the_queue_is_one_of_submission() -> None:
    fleet = Fleet("1xFoo:80")
    jobs = [fleet.submit(name=str(number)) for number in range(4)]
    for job_id in jobs:
        assert fleet.type_of(job_id) == "Foo"
        fleet.run(700)
        fleet.end(job_id)
        fleet.run(2)
    assert fleet.stops() == []


# --- victims and what a stop costs ----------------------------------------------------------------


def test_of_the_lowest_class_the_one_with_least_to_lose_gives_way() -> None:
    """It began first, and has just saved; the other one has not for ten minutes."""
    fleet = Fleet("2xH100")
    fleet.submit(job_class=JobClass.SPARE)
    fleet.run(600, saving=False)
    fleet.submit(job_class=JobClass.SPARE)
    fleet.run(600, saving=False)
    fleet.save("1.1")
    fleet.submit(job_class=JobClass.GUARANTEED)
    assert fleet.state.attempts["1.1"].stop_reason == "gives way to guaranteed job 3"
    assert not fleet.state.attempts["2.1"].stop_reason


def test_a_restart_costs_what_it_has_cost() -> None:
    fleet = Fleet("1xH100")
    fleet.submit(total=1_000)
    assert costs.restart_s(fleet.state, fleet.rig.now, fleet.job(1)) == costs.RESTART_S_DEFAULT
    fleet.run(45, saving=False)
    at_risk_s = costs.at_risk_s(fleet.state, fleet.rig.now, fleet.job(1))
    assert at_risk_s == 45
    fleet.save("1.1")
    assert costs.at_risk_s(fleet.state, fleet.rig.now, fleet.job(1)) == 0
    first = fleet.state.attempts["1.1"]
    came_back = replace(
        first, epoch=2, restored_digest="x", times=replace(first.times, restore_ms=7_000)
    )
    fleet.state.put_attempt(came_back)
    measured_s = costs.restart_s(fleet.state, fleet.rig.now, fleet.job(1))
    assert measured_s == pytest.approx(7.0, abs=0.5)


def test_whoever_saves_slowly_has_twice_that_to_leave() -> None:
    fleet = Fleet("1xH100")
    fleet.submit(grace_ms=5_000)
    attempt = replace(fleet.state.attempts["1.1"], commits=2)
    fleet.state.put_attempt(attempt)
    told = Progress(9, 0, time=TrainerTime(capture_s=2.0))
    fleet.state.progress["1.1"] = told
    assert gangs.grace_ms(fleet.state, fleet.job(1)) == 5_000, "what its owner allows"
    fleet.state.progress["1.1"] = replace(told, time=TrainerTime(capture_s=20.0))
    assert gangs.grace_ms(fleet.state, fleet.job(1)) == 20_000


# --- the field ------------------------------------------------------------------------------------


def test_what_others_hold_is_not_there_to_have() -> None:
    """A share, GPUs of two types, and a cordoned node; who leaves gives back."""
    fleet = Fleet("2xH100,2xA100:80", "2xH100", "1xH100")
    fleet.rig.handle(m.Request(1, m.CordonNode("n3")))
    fleet.submit(shared_gpu_memory_bytes=8 * GIGABYTE)
    fleet.submit(gpus=3)
    looked = contenders.fleet_of(fleet.state)
    jobs = contenders.contending(fleet.state)
    field = contenders.field_of(fleet.state, fleet.rig.now, looked, jobs, {})
    assert field.entrants == ()
    assert dict(looked.counts) == {A100: {2: 1}, H100: {2: 2}}
    assert sum(field.capacity.values()) == 6 - 1 - 3


def test_options_are_types_that_have_room_for_all_ranks() -> None:
    fleet = Fleet("2xH100,4xA100:80", "2xH100,1xFoo:80")
    looked = contenders.fleet_of(fleet.state)
    assert contenders.types_for(JobSpec(gpus=1), looked) == (A100, "Foo", H100)
    assert contenders.types_for(JobSpec(gpus=2), looked) == (A100, H100)
    assert contenders.types_for(JobSpec(gpus=4), looked) == (A100,)
    assert contenders.types_for(JobSpec(gpus=2, ranks=2), looked) == (A100, H100)
    assert contenders.types_for(JobSpec(gpus=1, gpu_types=("Foo",)), looked) == ("Foo",)


def test_of_a_type_without_facts_nobody_expects_much() -> None:
    fleet = Fleet("1xH100", "1xA100:80", "1xFoo:80")
    fleet.submit(total=100_000)
    fleet.run(120)
    looked = contenders.fleet_of(fleet.state)
    jobs = contenders.contending(fleet.state)
    (entrant,) = contenders.field_of(fleet.state, fleet.rig.now, looked, jobs, {}).entrants
    rates = dict(zip(entrant.rates.types, entrant.rates.mean, strict=True))
    assert rates["Foo"] == rates[A100] < rates[H100]
    assert rates[H100] == pytest.approx(1.0, rel=0.1), "measured"
    assert entrant.known
    assert entrant.contender.steps_left == pytest.approx(100_000 - 120, abs=2)


# --- when -----------------------------------------------------------------------------------------


def test_a_burst_is_one_decision_and_a_quiet_fleet_is_looked_at_each_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    decide = decisions.decide

    def counting(state: State, now: Instant) -> None:
        made.append(now.now_ms)
        decide(state, now)

    fleet = Fleet("1xH100", "1xA100:80")
    fleet.run(2)
    monkeypatch.setattr(decisions, "decide", counting)
    for _ in range(20):
        fleet.submit()
        fleet.rig.now_ms += 10
    assert made == []
    fleet.run(30)
    assert len(made) == 1
    made.clear()
    fleet.run(180)
    assert len(made) == 3


_PROGRAM = """
from tests.core.test_decisions import Fleet, Options, decided, solve
print(decided(solve))
print(decided(None))
"""


def decided(solver: object) -> Sequence[object]:
    """An hour of a mixed fleet: every word of its history."""
    options = Options(solve=solver, aims=Aims(run_s_min=60))  # type: ignore[arg-type]
    fleet = Fleet("4xA100:80", "2xH100", "2xL40S:48", options=options)
    for number in range(14):
        spec = training(200 * (1 + number * 7 % 10), gpus=1 + number % 2)
        fleet.submit(spec, project=f"p{number % 3}", working_directory=f"/{number % 4}")
    fleet.run(600)
    fleet.end(next(job.id for job in fleet.state.jobs.values() if job.phase is JobPhase.ACTIVE))
    fleet.run(120)
    then = [again == effects for effects, again in fleet.rig.replayed()]
    assert all(then), "a replay decides otherwise"
    return [(event.job_id, event.name, event.message) for event in fleet.rig.disk.events]


def test_nobody_is_remembered_once_the_last_job_has_ended() -> None:
    fleet = Fleet("1xH100")
    fleet.submit()
    fleet.run(3)
    standing = fleet.state.standing
    assert list(standing.entrants) == [1]
    fleet.end(1)
    fleet.run(3)
    assert not standing.entrants
    assert not standing.since_ms


@pytest.mark.long
def test_two_hash_seeds_decide_the_same() -> None:
    said = [
        subprocess.run(
            [sys.executable, "-c", _PROGRAM], cwd=ROOT, check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert said[0] == said[1]
    assert "attempt.assigned" in said[0]
    assert str(UNIX_MS_AT_START) not in said[0]
