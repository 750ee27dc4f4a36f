"""Arrays: all trials or none, never more at once than was asked for, and who waits for his turn is
nobody's demand.

Random histories with every fault: `test_coordinator_machine.py`.
"""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from coordinator.core import (
    arrays,
    contenders,
    demand_forecast,
    demand_samples,
    foresight,
    jobs,
    trials,
)
from coordinator.core.census import census
from coordinator.core.demand_history import Series
from coordinator.core.held_ahead import frees_ms, held_ahead
from coordinator.core.messages import (
    AgentEvent,
    Answer,
    AttemptStarted,
    CancelJob,
    ExplainJob,
    Explanation,
    FromAgent,
    Heartbeat,
    HoldJob,
    Refusal,
    ReleaseJob,
    Reply,
    Request,
    RequestBody,
    Send,
    SessionClosed,
    StartAttempt,
    Submit,
    Submitted,
    Tick,
)
from coordinator.core.model import JobClass, JobSpec, Progress
from coordinator.core.phases import AttemptPhase, JobPhase
from tests.core import test_fleet_scaling
from tests.core.coordinator_harness import Rig
from tests.core.test_rentals import RentingRig
from tests.core.training_fleet import A100, H100, Fleet

SPEC = JobSpec(command=("train",), gpus=1)


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "indices", "limit"),
    [
        ("0-3", (0, 1, 2, 3), 0),
        ("0-99%8", tuple(range(100)), 8),
        ("7", (7,), 0),
        ("1,3,8-16:4%2", (1, 3, 8, 12, 16), 2),
        ("5,1-3,2", (1, 2, 3, 5), 0),
        ("0-1000", tuple(range(1_001)), 0),
        ("4000000", (4_000_000,), 0),
    ],
)
def test_indices_are_read_as_slurm_reads_them(
    text: str, indices: tuple[int, ...], limit: int
) -> None:
    assert arrays.parse(text) == arrays.Plan(indices, limit)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not like 0-99"),
        ("a-b", "is not like 0-99"),
        ("1,,2", "is not like 0-99"),
        ("-3", "is not like 0-99"),
        ("٣", "is not like 0-99"),
        ("9-1", "has no index in it"),
        ("0-9:0", "has no index in it"),
        ("0-9%0", "1 or more"),
        ("0-9%", "1 or more"),
        ("0-9%8%2", "1 or more"),
        ("0-1001", "more than 1001 trials, which is the limit: submit it in parts"),
        ("0-4000000", "more than 1001 trials"),
        ("4000001", "an index is 4000000 at most"),
        (",".join("1" * 600), "longer than 1024 characters"),
    ],
)
def test_what_is_none_is_refused_with_a_sentence(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="array") as error:
        arrays.parse(text)
    assert says in str(error.value)


def ask(rig: Rig, body: RequestBody) -> Answer:
    (reply,) = (effect for effect in rig.handle(Request(1, body)) if isinstance(effect, Reply))
    return reply.answer


def sentence(rig: Rig, job_id: int) -> str:
    answer = ask(rig, ExplainJob(job_id))
    assert isinstance(answer, Explanation)
    return answer.sentence


def test_all_trials_are_made_at_once_and_only_once() -> None:
    rig = Rig()
    body = Submit(replace(SPEC, array="3-7%2"), "r1")
    first = ask(rig, body)
    assert first == Submitted(1, "no node has joined the fleet yet", 5)
    again = ask(rig, body)
    assert isinstance(again, Submitted)
    assert (again.job_id, again.jobs) == (1, 5)
    assert [(job.id, job.array_id, job.array_index) for job in rig.disk.jobs.values()] == [
        (number, 1, 2 + number) for number in range(1, 6)
    ]
    assert rig.disk.last_job_id == 5
    assert ask(rig, Submit(SPEC, "r2")) == Submitted(6, "no node has joined the fleet yet", 1)


def test_what_is_not_written_down_was_not_submitted() -> None:
    rig = Rig()
    body = Submit(replace(SPEC, array="0-4"), "r1")
    rig.crash_on(Request(1, body))
    assert not rig.disk.jobs
    assert ask(rig, body) == Submitted(1, "no node has joined the fleet yet", 5)


def test_what_does_not_fit_into_the_queue_is_refused_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "JOBS_OPEN_MAX", 6)
    rig = Rig()
    assert isinstance(ask(rig, Submit(replace(SPEC, array="0-3"))), Submitted)
    refused = ask(rig, Submit(replace(SPEC, array="0-2")))
    assert isinstance(refused, Refusal)
    assert "4 jobs are open and 6 is the limit" in refused.sentence
    assert rig.disk.last_job_id == 4
    bad = ask(rig, Submit(replace(SPEC, array="3-1")))
    assert isinstance(bad, Refusal)
    assert "has no index in it" in bad.sentence
    words = ("train", "x" * 60_000)
    large = ask(rig, Submit(replace(SPEC, command=words, array="0-299")))
    assert isinstance(large, Refusal)
    assert "of 300 trials have 18001500 bytes together" in large.sentence


def starts(fleet: Fleet, body: RequestBody) -> Iterator[StartAttempt]:
    for effect in fleet.rig.handle(Request(1, body)):
        if isinstance(effect, Send) and isinstance(effect.order, StartAttempt):
            yield effect.order


def test_a_trial_is_told_which_it_is() -> None:
    fleet = Fleet("4xH100")
    asked = replace(
        SPEC, array="2-8:3%2", command=("train", "--seed={index}"), environment=(("A", "b"),)
    )
    plain, slurm = (
        [order.spec for order in starts(fleet, Submit(replace(asked, slurm_environment=on)))]
        for on in (False, True)
    )
    assert [spec.command[1] for spec in plain] == ["--seed=2", "--seed=5"]
    ours = {"BATON_ARRAY_INDEX": "5", "BATON_ARRAY_COUNT": "3", "BATON_ARRAY_JOB_ID": "1"}
    assert dict(plain[1].environment) == {"A": "b", **ours}
    assert dict(slurm[1].environment) == {
        "A": "b", **ours, "BATON_ARRAY_JOB_ID": "4",
        "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_COUNT": "3",
        "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_MAX": "8",
    }  # fmt: skip
    assert fleet.job(2).spec.environment == (("A", "b"),), "the request stays as it was asked"


def test_a_built_in_trainer_gets_its_index_as_a_number() -> None:
    fleet = Fleet("4xH100")
    config = '{"model": "m-{index}", "train_data": "d \\"{index}", "steps": 9, "seed": "{index}"}'
    asked = JobSpec(trainer="finetune", trainer_config_json=config, gpus=1, array="7")
    (order,) = starts(fleet, Submit(asked))
    said = json.loads(order.spec.trainer_config_json)
    assert said == {"model": "m-7", "train_data": 'd "7', "steps": 9, "seed": 7}


# --- so many at once ------------------------------------------------------------------------------


def active(fleet: Fleet) -> list[int]:
    return [job.id for job in fleet.state.jobs.values() if job.phase is JobPhase.ACTIVE]


def test_so_many_run_at_once_in_the_order_of_their_indices() -> None:
    fleet = Fleet("8xH100")
    fleet.submit(array="0-9%3")
    assert active(fleet) == [1, 2, 3]
    assert list(fleet.state.queued) == []
    said = sentence(fleet.rig, 7)
    assert said == "job 7 waits: 3 of its array's 10 trials run, as --array 0-9%3 allows; 7 wait"
    fleet.end(2)
    fleet.run(0)
    assert active(fleet) == [1, 3, 4]
    assert sentence(fleet.rig, 7).endswith("6 wait, 1 is over")
    for _ in range(9):
        fleet.end(active(fleet)[0])
        fleet.run(0)
        assert len(active(fleet)) <= 3
    assert all(job.phase is JobPhase.SUCCEEDED for job in fleet.state.jobs.values())


def test_without_a_limit_all_run() -> None:
    fleet = Fleet("8xH100")
    fleet.submit(array="0-9")
    assert active(fleet) == list(range(1, 9))
    assert sorted(fleet.state.queued) == [9, 10]


def test_who_has_a_place_and_no_room_is_told_so() -> None:
    fleet = Fleet("2xH100")
    fleet.submit(array="0-9%3")
    assert list(fleet.state.queued) == [3]
    assert "all 2 that fit are taken" in sentence(fleet.rig, 3)
    assert (
        "2 of its array's 10 trials run and 1 waits to start, as --array 0-9%3 allows; 7 wait"
        in (sentence(fleet.rig, 9))
    )


def test_who_gives_way_keeps_his_place() -> None:
    """Nobody begins in his stead: unfinished trials would be ever more."""
    fleet = Fleet("2xH100")
    fleet.submit(array="0-5%2", job_class=JobClass.SPARE)
    fleet.run(20)
    fleet.submit(gpus=1, job_class=JobClass.GUARANTEED)
    fleet.run(5)
    (waiting,) = fleet.state.queued
    assert waiting in (1, 2)
    assert len([known for known in active(fleet) if known < 7]) == 1
    fleet.end(7)
    fleet.run(5)
    assert active(fleet) == [1, 2]


def test_a_held_trial_leaves_its_place_and_comes_back_before_those_that_have_not_begun() -> None:
    fleet = Fleet("4xH100")
    fleet.submit(array="0-5%2")
    ask(fleet.rig, HoldJob(1))
    fleet.run(5)
    assert active(fleet) == [2, 3]
    ask(fleet.rig, ReleaseJob(1))
    fleet.run(0)
    assert active(fleet) == [2, 3]
    assert not fleet.state.queued
    fleet.end(3)
    fleet.run(0)
    assert active(fleet) == [1, 2]


def test_a_restart_knows_who_has_a_place() -> None:
    """The trial whose node is silent waits, and may come back: its place is nobody else's."""
    fleet = Fleet("1xH100", "1xH100")
    fleet.submit(array="0-4%2")
    (session,) = (live.session for name, live in fleet.state.nodes.items() if name == "n1")
    assert session is not None
    here = next(a.job_id for a in fleet.state.attempts.values() if a.node == "n1")
    fleet.rig.handle(FromAgent(session, SessionClosed()))
    while fleet.job(here).phase is not JobPhase.QUEUED:
        fleet.rig.now_ms += 500
        fleet.rig.handle(Tick())
        fleet.obey()
    for _ in range(2):
        assert list(fleet.state.queued) == [here]
        assert sum(job.phase is JobPhase.ACTIVE for job in fleet.state.jobs.values()) <= 1
        fleet.rig.restart()
        fleet.rig.handle(Tick())


def pass_time(fleet: Fleet, seconds: int) -> None:
    """Whoever is heard goes on."""
    for _ in range(2 * seconds):
        fleet.rig.now_ms += 500
        fleet.train(0.5, False)
        fleet.obey()
        fleet.rig.handle(Tick())
        assert len(active(fleet)) <= 1


def test_who_waits_for_a_checkpoint_out_of_reach_holds_nobody_up_for_long() -> None:
    fleet = Fleet("1xH100", "1xH100")
    fleet.submit(array="0-4%1")
    fleet.run(20)
    assert fleet.job(1).head, "it has something to lose"
    session = fleet.state.nodes[fleet.state.attempts["1.1"].node].session
    assert session is not None
    fleet.rig.handle(FromAgent(session, SessionClosed()))
    pass_time(fleet, 300)
    assert not active(fleet), "its node may be back, with it"
    assert "lies only on n1, which is lost" in sentence(fleet.rig, 1)
    pass_time(fleet, 400)
    assert active(fleet) == [2]
    assert list(fleet.state.indices.arrays.by_id[1].behind) == [3, 4, 5, 1]
    assert "lies only on n1, which is lost" in sentence(fleet.rig, 1)
    assert "1 of its array's 5 trials runs, as --array 0-4%1 allows" in sentence(fleet.rig, 3)
    fleet.end(2)
    pass_time(fleet, 1)
    assert active(fleet) == [3]


def test_a_place_that_is_given_up_is_somebodys_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where somebody else is looked at in the same round, and nothing happens after it."""
    monkeypatch.setattr(trials, "RETURN_MS_MAX", 20_000)
    fleet = Fleet("1xH100", "1xH100")
    fleet.submit(array="0-4%1")
    fleet.run(20)
    fleet.submit(ranks=2)
    fleet.rig.answers_at_once = False
    session = fleet.state.nodes[fleet.state.attempts["1.1"].node].session
    assert session is not None
    fleet.rig.handle(FromAgent(session, SessionClosed()))
    behind = fleet.state.indices.arrays.by_id[1].behind
    while 1 not in behind:
        pass_time(fleet, 1)
    assert 2 not in behind


# --- nobody's demand ------------------------------------------------------------------------------


def test_who_waits_for_his_turn_is_no_demand() -> None:
    fleet = Fleet("2xH100")
    fleet.submit(array="0-9%3")
    assert sum(demand_samples.wanted(fleet.state).values()) == 3.0
    assert demand_samples.present(fleet.state)[H100].queued_gpus == 1.0
    assert [job.id for job in contenders.contending(fleet.state)] == [1, 2, 3]
    found = census(fleet.state, fleet.rig.now.unix_ms)
    assert dict(found.queued)[JobClass.STANDARD] == 1
    assert dict(found.jobs)[JobClass.STANDARD, JobPhase.QUEUED] == 8


def test_nothing_is_kept_free_or_stopped_for_who_waits_for_his_turn() -> None:
    """Guaranteed trials beyond the limit, and a spare job: nobody has to go, and it may come."""
    fleet = Fleet("3xH100")
    fleet.submit(array="0-9%2", job_class=JobClass.GUARANTEED)
    spare = fleet.submit(job_class=JobClass.SPARE)
    fleet.run(1_200)
    assert active(fleet) == [1, 2, spare]
    assert not fleet.state.reservations
    assert list(fleet.state.waiting_ms) == []


def test_what_a_trial_leaves_is_the_arrays_until_all_are_over() -> None:
    """Four places, and eight behind who take 100 s each, as the first four did: 200 s more."""
    fleet = Fleet("4xA100")
    first = fleet.submit(array="0-15%4", gpu_types=("A100",))
    fleet.run(100)
    for job_id in range(first, first + 4):
        fleet.end(job_id)
    fleet.run(60)
    (soon, late) = held_ahead(fleet.state, fleet.rig.now, Series(A100), (3, 60))[1]
    assert (soon.certain_gpus, soon.expected_gpus) == (0.0, 4.0)
    assert late.expected_gpus < 0.2
    alone = Fleet("4xA100")
    alone.submit(array="0-3", gpu_types=("A100",))
    alone.run(60)
    frees = [frees_ms(one.state, one.rig.now, {A100: 2.0})[A100] for one in (fleet, alone)]
    assert frees[1] == pytest.approx(60_000, rel=0.2)
    assert frees[0] == pytest.approx(frees[1] + 200_000, rel=0.2)


@pytest.mark.parametrize(("indices", "rents"), [("0", False), ("0-200%1", True)])
def test_a_plan_rents_where_what_runs_is_followed_by_others(
    monkeypatch: pytest.MonkeyPatch, indices: str, rents: bool
) -> None:
    """What runs has ten seconds to go. If it is all that there is, waiting costs less than an
    hour's rent; if two hundred of its kind follow, it does not."""
    monkeypatch.setattr(test_fleet_scaling, "NAMES", ("n1",))
    fleet = RentingRig.renting()
    fleet.submit(array=indices, gpu_types=("H100",))
    fleet.queue(1)
    fleet.soon = fleet.later = 2.0
    state = fleet.rig.core.state
    (session,) = state.sessions
    started = AgentEvent(1, fleet.rig.now.unix_ms, "1.1", AttemptStarted(1))
    fleet.handle(FromAgent(session, started))
    for step in range(62):
        fleet.live(1)
        told = (("1.1", Progress(step, 72)),)
        fleet.beats += 1
        fleet.handle(FromAgent(session, Heartbeat(fleet.beats, progress=told)))
    (outlook,) = demand_forecast.outlooks(state, fleet.rig.now)
    assert (outlook.running_gpus, outlook.queued_gpus) == (1, 1), "who is behind is not counted"
    assert outlook.frees_ms is not None
    assert (outlook.frees_ms > 3_600_000) is rents
    assert any(verb == "create" for _, verb in fleet.verbs()) is rents


def test_who_waits_behind_an_array_is_not_told_an_hour_that_is_not_his() -> None:
    fleet = Fleet("1xH100")
    fleet.submit(array="0-5%1", total=100)
    fleet.totals.update(dict.fromkeys(range(1, 7), 100))
    later = fleet.submit()
    fleet.run(30)
    assert foresight.ends(fleet.state, fleet.rig.now)
    assert "leaves" not in sentence(fleet.rig, later)
    ask(fleet.rig, CancelJob(2, array=False))
    for job_id in range(3, 7):
        ask(fleet.rig, CancelJob(job_id))
    assert "when job 1 leaves" in sentence(fleet.rig, later)


# --- what people ask of all -----------------------------------------------------------------------


def test_trials_that_are_forgotten_are_over() -> None:
    fleet = Fleet("2xH100")
    fleet.rig.keep(2)
    fleet.submit(array="0-3%1")
    for job_id in (1, 2, 3):
        fleet.end(job_id)
        fleet.run(0)
    ask(fleet.rig, Submit(SPEC))
    assert 2 not in fleet.state.jobs
    assert fleet.state.indices.arrays.by_id[1].tally() == (4, 1, 0, 0, 3)
    fleet.rig.restart()
    assert fleet.state.indices.arrays.by_id[1].tally() == (4, 1, 0, 0, 3)
    assert fleet.state.attempts["4.1"].phase is not AttemptPhase.SUCCEEDED


def test_the_first_trial_is_remembered_while_others_are_open() -> None:
    """A request that is repeated makes no second array, and `1_1` is found by job 1; but where
    there is nobody else to forget, history is bounded all the same."""
    fleet = Fleet("2xH100")
    fleet.rig.keep(2)
    body = Submit(replace(SPEC, array="0-1%1"), "r1")
    ask(fleet.rig, body)
    fleet.totals[1] = fleet.totals[2] = 0
    fleet.run(0)
    fleet.end(1)
    for job_id in (3, 4, 5):
        ask(fleet.rig, Submit(SPEC))
        ask(fleet.rig, CancelJob(job_id, array=False))
        fleet.rig.restart()
    again = ask(fleet.rig, body)
    assert isinstance(again, Submitted)
    assert (again.job_id, again.jobs) == (1, 2)
    fleet.rig.keep(1)
    ask(fleet.rig, Submit(SPEC))
    assert not fleet.state.ended
