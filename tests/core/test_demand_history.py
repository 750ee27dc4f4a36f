"""How much was wanted: that a sample counts each job once, that what was not seen is unknown, and
that neither clocks nor restarts nor many series break it.

Problem: a history that is wrong looks like one that is right. An outage that reads as zero, a job
that counts on two types, or a year that a wrong clock has wiped out shows months later, in a fleet
of the wrong size.
"""

from dataclasses import replace
from typing import Any

import pytest

from coordinator.core import demand_samples
from coordinator.core.demand_history import (
    DAY_MS,
    GPU_TYPES_MAX,
    KEPT_STEPS,
    MINUTE_MS,
    OTHER,
    SERIES_MAX,
    SETTLE_MS,
    STILL_MIN,
    ClockWatch,
    DemandHistory,
    DemandLog,
    DemandRow,
    PutDemand,
    PutDemandSeries,
    Series,
    Still,
)
from coordinator.core.demand_messages import DemandSeries, GetDemand
from coordinator.core.demand_samples import wanted
from coordinator.core.messages import (
    CancelJob,
    CordonNode,
    FromAgent,
    Log,
    Refusal,
    Reply,
    Request,
    SessionClosed,
    Tick,
)
from coordinator.core.model import Attempt, JobSpec
from coordinator.core.phases import AttemptPhase
from coordinator.core.shares import shareable_bytes
from coordinator.core.state import Instant, Options, State
from tests.core.coordinator_harness import UNIX_MS_AT_START, Rig
from tests.core.training_fleet import A100, H100, Fleet

NLP = Series("H100", "nlp", "standard")
VISION = Series("A100", "vision", "spare")
# A full hour, so that a block of ten minutes and one of an hour begin here.
BEGIN = UNIX_MS_AT_START // (60 * MINUTE_MS) * 60


def durable(records: list[Any]) -> DemandLog:
    return DemandLog(
        tuple(record for record in records if isinstance(record, PutDemandSeries)),
        tuple(
            sorted(
                (record.row for record in records if isinstance(record, PutDemand)),
                key=lambda row: (row.period_min, row.step),
            )
        ),
    )


def reloaded(records: list[Any]) -> DemandHistory:
    history = DemandHistory()
    history.load(durable(records))
    return history


# --- rings ----------------------------------------------------------------------------------------


def test_a_minute_in_which_nobody_looked_is_unknown_and_no_zero() -> None:
    history = DemandHistory()
    history.put(BEGIN, {NLP: 8})
    history.put(BEGIN + 1, {})
    history.put(BEGIN + 4, {NLP: 4, VISION: 2})
    assert history.read(1, BEGIN - 1, 6) == [None, 8.0, 0.0, None, None, 6.0]
    assert history.read(1, BEGIN, 5, Series("A100")) == [0.0, 0.0, None, None, 2.0]


def test_what_is_asked_for_is_summed_over_what_is_left_open() -> None:
    history = DemandHistory()
    other = Series("H100", "nlp", "guaranteed")
    third = Series("H100", "vision", "standard")
    history.put(BEGIN, {NLP: 1, VISION: 2, other: 4, third: 8})
    asked = {
        Series(): 15.0,
        Series("H100"): 13.0,
        Series("H100", "", "standard"): 9.0,
        Series("", "nlp"): 5.0,
        Series("", "", "spare"): 2.0,
        NLP: 1.0,
        Series("B200"): 0.0,
    }
    assert {which: history.read(1, BEGIN, 1, which)[0] for which in asked} == asked


def test_coarse_steps_are_means_of_what_is_known_and_unknown_where_little_is() -> None:
    history, records = DemandHistory(), []
    for minute in range(60):
        if minute not in range(11, 17) and minute not in range(20, 25):
            records += history.put(BEGIN + minute, {NLP: minute})
    ten = BEGIN // 10
    # 0 to 9; four of ten minutes; 25 to 29.
    assert history.read(10, ten, 3) == [4.5, None, 27.0]
    known = [minute for minute in range(60) if minute not in (*range(11, 17), *range(20, 25))]
    assert history.read(60, BEGIN // 60, 1) == [pytest.approx(sum(known) / len(known), abs=1e-3)]
    assert reloaded(records).read(10, ten, 3) == [4.5, None, 27.0]


def test_a_step_is_ended_by_whoever_comes_after_it() -> None:
    """The coordinator was away when it ended: at the next sample, also after a restart."""
    history, records = DemandHistory(), []
    for minute in range(7):
        records += history.put(BEGIN + minute, {NLP: 6})
    again = reloaded(records)
    again.put(BEGIN + 35, {NLP: 1})
    assert again.read(10, BEGIN // 10, 4) == [6.0, None, None, None]
    assert again.read(60, BEGIN // 60, 1) == [None]  # seven of sixty


def test_rings_end() -> None:
    """Each keeps as many steps as it says, and a year of absence leaves nothing of the minutes."""
    history = DemandHistory()
    kept = KEPT_STEPS[1]
    for minute in (0, 1, 2, kept + 1):
        history.put(BEGIN + minute, {NLP: minute + 1})
    assert history.read(1, BEGIN, 3) == [None, None, 3.0]
    history.put(BEGIN + 365 * 1_440, {VISION: 1})
    assert history.read(1, BEGIN + kept - 5, 20) == [None] * 20
    assert history.read(1, BEGIN + 365 * 1_440, 1, NLP) == [0.0]


def test_the_oldest_minute_is_the_first_that_is_known_and_not_gone() -> None:
    history, kept = DemandHistory(), KEPT_STEPS[1]
    assert history.oldest_minute is None
    for minute, oldest in ((0, 0), (5, 0), (kept - 1, 0), (kept + 2, 5), (kept + 5, kept - 1)):
        history.put(BEGIN + minute, {NLP: 8})
        assert history.oldest_minute == BEGIN + oldest
    history.rewind(BEGIN + kept)
    assert history.oldest_minute == BEGIN + kept - 1
    history.rewind(BEGIN + kept - 2)
    assert history.oldest_minute is None, "all that is left was never seen"


def test_a_restart_reads_what_was_written() -> None:
    history, records = DemandHistory(), []
    for minute in (0, 1, 5, 6, 7, 8, 9, 10):
        records += history.put(BEGIN + minute, {NLP: minute, VISION: 0.25})
    again = reloaded(records)
    for which in (Series(), NLP, Series("A100")):
        for period_min in KEPT_STEPS:
            first = BEGIN // period_min - 1
            assert again.read(period_min, first, 15, which) == history.read(
                period_min, first, 15, which
            )
    assert again.newest_minute == BEGIN + 10
    # A series keeps its number.
    assert again.put(BEGIN + 11, {VISION: 3, NLP: 2}) == [
        PutDemand(DemandRow(1, BEGIN + 11, (0, 1), (3, 2)))
    ]


def still(said_gpus: float, gpus: float) -> Still:
    return Still(said_gpus, (gpus,) * len(STILL_MIN))


def an_hour(history: DemandHistory, begin: int, last: dict[Series, Still]) -> list[Any]:
    """NLP wants four and VISION two; `last` is known of them at its end."""
    records = []
    for minute in range(begin, begin + 60):
        known = last if minute == begin + 59 else {}
        records += history.put(minute, {NLP: 4, VISION: 2}, known)
    return records


def test_what_was_known_at_the_end_of_an_hour_is_kept_and_summed() -> None:
    history = DemandHistory()
    an_hour(history, BEGIN, {NLP: still(3, 1), VISION: still(0, 2)})
    an_hour(history, BEGIN + 60, {})
    an_hour(history, BEGIN + 120, {VISION: still(2, 0)})
    ends = [BEGIN + 60, BEGIN + 180]
    assert history.read_still(BEGIN) == [(ends[0], still(3, 3)), (ends[1], still(2, 0))]
    assert history.read_still(BEGIN, NLP) == [(ends[0], still(3, 1))]
    assert history.read_still(BEGIN, Series("A100")) == [(ends[1], still(2, 0))]
    assert history.read_still(BEGIN + 61) == [(ends[1], still(2, 0))]


def test_what_was_known_outlives_a_restart_and_a_wrong_clock_takes_it() -> None:
    history = DemandHistory()
    records = an_hour(history, BEGIN, {NLP: still(3, 1)})
    records += an_hour(history, BEGIN + 60, {NLP: still(1, 0.5)})
    again = reloaded(records)
    assert len(again.read_still(BEGIN)) == 2
    for which in (Series(), NLP, VISION):
        assert again.read_still(BEGIN, which) == history.read_still(BEGIN, which)
    again.rewind(BEGIN + 100)
    assert [minute for minute, _ in again.read_still(BEGIN)] == [BEGIN + 60]


@pytest.mark.parametrize("odd", [((1.0,), (1.0,)), ((1.0,) * 20,) * 2, ((0.0,) * 7,)])
def test_what_a_later_version_has_kept_otherwise_is_not_read(odd: Any) -> None:
    log = durable(an_hour(DemandHistory(), BEGIN, {NLP: still(3, 1)}))
    rows = [replace(row, still=odd) if row.still else row for row in log.rows]
    again = DemandHistory()
    again.load(replace(log, rows=tuple(rows)))
    assert again.read_still(BEGIN) == []
    assert again.read(10, BEGIN // 10 + 5, 1, NLP) == [4.0]


def test_what_a_wrong_clock_has_sampled_goes() -> None:
    history, records = DemandHistory(), []
    for minute in range(20):
        records += history.put(BEGIN + minute, {NLP: 5})
    future = BEGIN + 1_000
    for minute in range(20):
        records += history.put(future + minute, {NLP: 7})
    assert history.rewind(BEGIN + 15).after_minute == BEGIN + 15
    assert history.newest_minute == BEGIN + 15
    assert history.read(1, future, 20) == [None] * 20
    assert history.read(10, BEGIN // 10, 2) == [5.0, None]
    history.put(BEGIN + 16, {NLP: 1})
    assert history.read(1, BEGIN + 14, 4) == [5.0, 5.0, 1.0, None]


def test_series_beyond_the_bound_count_to_other_and_sums_stay_true() -> None:
    history, records = DemandHistory(), []
    many = {Series("H100", f"p{n}", "standard"): 1.0 for n in range(SERIES_MAX + 50)}
    records += history.put(BEGIN, many)
    assert history.read(1, BEGIN, 1, Series("H100")) == [SERIES_MAX + 50.0]
    assert history.read(1, BEGIN, 1, Series("H100", OTHER)) == [50.0]
    types = {Series(f"type {n}", "a", "spare"): 1.0 for n in range(GPU_TYPES_MAX + 20)}
    records += history.put(BEGIN + 1, types)
    assert history.read(1, BEGIN + 1, 1) == [GPU_TYPES_MAX + 20.0]
    assert history.read(1, BEGIN + 1, 1, Series(OTHER)) == [21.0]  # H100 is one, too
    classes, ends = 3, 1
    assert len(history.series()) <= SERIES_MAX + classes * (GPU_TYPES_MAX + ends)
    assert reloaded(records).read(1, BEGIN, 2) == history.read(1, BEGIN, 2)


# --- the clock ------------------------------------------------------------------------------------


def test_a_clock_that_jumps_is_believed_when_it_has_settled() -> None:
    clock = ClockWatch()
    assert clock.believes(0, DAY_MS, None)
    assert clock.believes(1_000, DAY_MS + 1_400, None)  # slewed
    jump_ms = 3_600_000
    assert not clock.believes(2_000, DAY_MS + jump_ms, None)
    assert clock.doubts
    assert not clock.believes(2_000 + SETTLE_MS - 1, DAY_MS + jump_ms + SETTLE_MS, None)
    assert clock.believes(2_000 + SETTLE_MS, DAY_MS + jump_ms + SETTLE_MS, None)
    assert not clock.doubts


def test_a_clock_that_jumps_to_and_fro_costs_only_the_minutes_between() -> None:
    clock = ClockWatch()
    assert clock.believes(0, DAY_MS, None)
    assert not clock.believes(1_000, 9 * DAY_MS, None)
    assert clock.believes(2_000, DAY_MS + 2_000, None)


def test_a_coordinator_that_was_away_for_a_month_waits_for_the_time_server() -> None:
    clock, newest_ms = ClockWatch(), DAY_MS
    assert not clock.believes(0, 32 * DAY_MS, newest_ms)
    assert clock.believes(SETTLE_MS, 32 * DAY_MS + SETTLE_MS, newest_ms)
    assert ClockWatch().believes(0, 8 * DAY_MS, newest_ms)


def test_a_clock_far_behind_is_believed_after_a_day() -> None:
    """1970, as after a reset: nothing is sampled, nothing is forgotten."""
    clock, newest_ms = ClockWatch(), 30 * DAY_MS
    assert not clock.believes(0, 0, newest_ms)
    assert not clock.believes(DAY_MS - 1, DAY_MS - 1, newest_ms)
    assert clock.doubts
    assert clock.believes(DAY_MS, DAY_MS, newest_ms)


# --- samples --------------------------------------------------------------------------------------


def ticked(rig: Rig, unix_ms: int) -> list[Any]:
    """What a tick gives at this wall time; what is durable of it goes to the disk."""
    effects = rig.core.handle(Instant(rig.now_ms, unix_ms), Tick())
    for effect in effects:
        if isinstance(effect, PutDemandSeries | PutDemand):
            rig.disk.write(effect)
    return [
        effect
        for effect in effects
        if isinstance(effect, PutDemandSeries | PutDemand)
        or (isinstance(effect, Log) and effect.event.startswith("demand."))
    ]


def test_one_sample_a_minute_and_none_twice() -> None:
    rig = Rig()
    begin_ms = BEGIN * MINUTE_MS
    assert [type(e) for e in ticked(rig, begin_ms)] == [PutDemand]
    rig.now_ms = 59_999
    assert ticked(rig, begin_ms + 59_999) == []
    rig.restart()
    assert ticked(rig, begin_ms + 59_999) == []
    rig.now_ms = 60_000
    assert [type(e) for e in ticked(rig, begin_ms + 60_000)] == [PutDemand]
    rig.now_ms = 400_000
    ticked(rig, begin_ms + 400_000)
    history = rig.core.state.demand_history
    assert history.read(1, BEGIN, 7) == [0.0, 0.0, None, None, None, None, 0.0]


def test_a_minute_lasts_as_long_as_is_said() -> None:
    rig = Rig(Options(demand_minute_ms=250))
    begin = BEGIN * MINUTE_MS // 250
    for rig.now_ms in range(0, 1_000, 125):
        sampled = ticked(rig, begin * 250 + rig.now_ms)
        assert [type(e) for e in sampled] == [PutDemand] * (rig.now_ms % 250 == 0)
    rig.restart()
    rig.now_ms = 2_000
    ticked(rig, begin * 250 + 2_000)
    history = rig.core.state.demand_history
    assert history.read(1, begin, 9) == [0.0] * 4 + [None] * 4 + [0.0]
    assert asked(rig, GetDemand(period_min=1)) == DemandSeries(
        begin * 250, 1, (*(0.0,) * 4, *(None,) * 4, 0.0)
    )


def test_a_jump_is_said_once_and_what_follows_is_sampled_again() -> None:
    rig = Rig()
    begin_ms = BEGIN * MINUTE_MS
    ticked(rig, begin_ms)
    jump_ms = 7_200_000
    said = []
    for rig.now_ms in range(60_000, SETTLE_MS + 120_001, 60_000):
        said.append(ticked(rig, begin_ms + jump_ms + rig.now_ms))
    assert [type(e) for e in said[0]] == [Log]
    assert said[1:10] == [[]] * 9
    assert all(any(isinstance(e, PutDemand) for e in each) for each in said[10:])
    history = rig.core.state.demand_history
    assert history.read(1, BEGIN, 3) == [0.0, None, None]


def test_a_job_counts_once_wherever_it_is() -> None:
    """It waits, runs, waits again beside the attempt that is out of reach, and has ended."""
    fleet = Fleet("2xA100")
    spec = JobSpec(command=("train",), gpus=2, project="nlp", ranks=1)
    series = Series(A100, "nlp", "standard")
    job_id = fleet.submit(spec)
    assert wanted(fleet.state) == {series: 2.0}
    second = fleet.submit(spec)
    assert wanted(fleet.state) == {series: 4.0}
    fleet.rig.handle(FromAgent(1, SessionClosed()))
    for _ in range(30):
        fleet.rig.now_ms += 1_000
        fleet.rig.handle(Tick())
    attempt = fleet.state.attempts[f"{job_id}.1"]
    assert (attempt.phase, job_id in fleet.state.queued) == (AttemptPhase.UNREACHABLE, True)
    assert wanted(fleet.state) == {series: 4.0}
    fleet.rig.handle(Request(1, CancelJob(second)))
    assert wanted(fleet.state) == {series: 2.0}


def test_a_job_that_may_go_to_several_types_counts_where_it_would_go() -> None:
    """Without a decision where most GPUs are; else where the decision puts it first; and where
    there is nothing for it, as what it asks for."""
    fleet = Fleet("2xH100", "4xA100", "4xA100")
    for _ in range(3):
        fleet.submit(gpus=2 if len(fleet.state.jobs) == 2 else 4, gpu_types=())
    state = fleet.state
    fleet.submit(gpus=2, project="nlp")
    state.standing.order = {}
    waits = Series("", "nlp", "standard")
    assert wanted(state)[replace(waits, gpu_type=A100)] == 2.0
    for gpu_type in (H100, A100):
        state.standing.order = dict.fromkeys(state.queued, ((gpu_type, 1.0), ("B200", 0.5)))
        counted = wanted(state)
        assert counted[replace(waits, gpu_type=gpu_type)] == 2.0
        assert sum(counted.values()) == 12.0


def test_a_share_counts_as_the_part_of_its_gpu() -> None:
    fleet = Fleet("1xA100")
    gpu = fleet.state.nodes["n1"].node.gpus[0]
    spec = JobSpec(command=("x",), gpus=1, shared_gpu_memory_bytes=shareable_bytes(gpu) // 4)
    for _ in range(5):
        fleet.submit(spec)
    assert len(fleet.state.queued) == 1
    assert sum(wanted(fleet.state).values()) == pytest.approx(1.25, abs=0.01)


def test_a_fleet_that_is_switched_off_is_still_where_work_would_go() -> None:
    fleet = Fleet("8xA100")
    fleet.rig.handle(Request(1, CordonNode("n1")))
    fleet.submit(gpus=8)
    assert wanted(fleet.state) == {Series(A100, "default", "standard"): 8.0}


def test_what_is_wanted_of_a_type_that_is_gone_is_counted_to_it() -> None:
    fleet = Fleet("8xA100")
    fleet.rig.handle(Request(1, CordonNode("n1")))
    job_id = fleet.submit(gpus=8)
    state = fleet.state
    named = replace(state.jobs[job_id].spec, gpu_types=("h100",))
    state.jobs[job_id] = replace(state.jobs[job_id], spec=named)
    assert wanted(state) == {Series(H100, "default", "standard"): 8.0}


def test_jobs_without_gpus_are_no_demand() -> None:
    fleet = Fleet("1xA100")
    for _ in range(3):
        fleet.submit(gpus=0)
    assert not any(wanted(fleet.state).values())


def test_a_sample_looks_at_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand jobs that run, and as many that wait, cost it milliseconds."""
    fleet = Fleet("8xA100", "8xH100")
    for _ in range(40):
        fleet.submit(gpus=1)
    looks: list[str] = []
    held, group = demand_samples.counts_as, demand_samples._group

    def counted_held(state: State, attempt: Attempt) -> Any:
        looks.append(attempt.id)
        return held(state, attempt)

    def counted_group(state: State, job_id: int) -> int:
        looks.append(str(job_id))
        return group(state, job_id)

    monkeypatch.setattr(demand_samples, "counts_as", counted_held)
    monkeypatch.setattr(demand_samples, "_group", counted_group)
    before = wanted(fleet.state)
    assert len(looks) == 39  # the first was there at the first tick
    assert wanted(fleet.state) == before
    assert len(looks) == 39
    fleet.rig.handle(Request(1, CancelJob(1)))
    fleet.run(1)
    assert sum(wanted(fleet.state).values()) == 39
    assert len(looks) == 40  # one that waited runs now


# --- what people ask ------------------------------------------------------------------------------


def seen() -> Rig:
    rig = Rig()
    history = rig.core.state.demand_history
    for minute in (*range(13), *range(40, 45)):
        history.put(BEGIN + minute, {NLP: 4, VISION: 2, replace(NLP, gpu_type="A100 PCIe"): 1})
    return rig


def test_an_answer_begins_with_what_is_known_and_has_no_hole() -> None:
    rig = seen()
    assert asked(rig, GetDemand()) == DemandSeries(BEGIN * MINUTE_MS, 10, (7.0,))
    minutes = asked(rig, GetDemand("h1", period_min=1))
    assert isinstance(minutes, DemandSeries)
    assert (minutes.begin_unix_ms, minutes.gpu_type) == (BEGIN * MINUTE_MS, "H100")
    assert minutes.gpus == (4.0,) * 13 + (None,) * 27 + (4.0,) * 5
    last = asked(rig, GetDemand(project="vision", job_class="spare", period_min=1, steps=6))
    assert isinstance(last, DemandSeries)
    assert last.gpus == (2.0,) * 5
    assert asked(Rig(), GetDemand()) == DemandSeries(0, 10, ())


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        (GetDemand("B200"), "GPU type 'B200' was ever wanted; of these something was: A100, A100"),
        (GetDemand("a10"), "'a10' may be A100, A100 PCIe: say which"),
        (GetDemand(project="x"), "project 'x' was ever wanted; of these something was: nlp, vis"),
        (GetDemand(period_min=7), "in steps of 1, 10, 60 minutes, not of 7"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(question: GetDemand, sentence: str) -> None:
    answer = asked(seen(), question)
    assert isinstance(answer, Refusal)
    assert sentence in answer.sentence


def test_a_whole_name_is_no_question() -> None:
    answer = asked(seen(), GetDemand("a100", period_min=1, steps=1))
    assert isinstance(answer, DemandSeries)
    assert (answer.gpu_type, answer.gpus) == ("A100", (2.0,))


def asked(rig: Rig, question: GetDemand) -> Any:
    (reply,) = (e for e in rig.handle(Request(1, question)) if isinstance(e, Reply))
    return reply.answer
