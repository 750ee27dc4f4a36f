"""Jobs that share a GPU only where that pays: whose company is tried, for how long, and what else.

Problem: "only where it pays" is a promise to both: to who has the GPU, that nobody slows him down
for long, and to who comes, that he waits no longer than for a GPU of his own. So the truth is known
here (`test_coruns.py`), the agents tell the steps that follow from it, and what comes of that is
compared with the rules, in stories and over random histories.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import coruns, costs, deadlines, history
from coordinator.core import messages as m
from coordinator.core.company import NAMED_MAX
from coordinator.core.explain import explain
from coordinator.core.model import Attempt, GpuFacts, Job, JobClass, JobSpec
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.shares import Hold, left_bytes, left_for, taken
from tests.core.coordinator_harness import GIGABYTE
from tests.core.test_coruns import ERROR_RATIO, MATRICES, PER_S, Kept, World, spec

LONG = 16  # beats after which all that is there has been measured
GOOD: Kept = ((0.9,) * 3,) * 3
BAD: Kept = ((0.5,) * 3,) * 3


def submit(world: World, asked: JobSpec) -> int:
    world.rig.handle(m.Request(1, m.Submit(asked)))
    world.obey()
    return world.rig.core.state.last_job_id


def automatic(training: int, share_gb: int = 8, **asks: object) -> JobSpec:
    return replace(spec(training, share_gb, automatic=True), **asks)  # type: ignore[arg-type]


def full(kept: Kept, beats: int = LONG) -> World:
    """Each of the three GPUs has one, who is known by then."""
    world = World(kept)
    for _ in range(3):
        submit(world, automatic(0))
    for _ in range(beats):
        world.beat()
    return world


def told(world: World, job_id: int) -> str:
    state = world.rig.core.state
    return explain(state, world.rig.now, state.jobs[job_id]).sentence


def beside(world: World, job_id: int) -> list[int]:
    attempt = world.rig.core.state.current(world.rig.core.state.jobs[job_id])
    assert attempt is not None
    return [other.job_id for other in world.neighbours(attempt)]


def end(world: World, job_id: int) -> None:
    attempt = world.rig.core.state.current(world.rig.core.state.jobs[job_id])
    assert attempt is not None
    world.steps.pop(attempt.id)
    world.say(attempt, m.AttemptExited(0))
    world.obey()


def test_each_has_a_gpu_of_its_own_while_there_are_some() -> None:
    world = full(GOOD)
    assert len({attempt.gpu_uuids for attempt in world.running()}) == 3
    assert "it has its GPU to itself, and shares it with one other where that pays" in told(
        world, 1
    )


def test_nobody_is_tried_beside_one_who_is_not_known_alone() -> None:
    world = full(GOOD, beats=3)
    job_id = submit(world, automatic(0))
    state = world.rig.core.state
    assert state.jobs[job_id].phase is JobPhase.QUEUED
    assert "not beside job 1 on n2: how fast that one is alone is not known yet" in told(
        world, job_id
    )
    assert "nor beside 1 more" in told(world, job_id)
    for _ in range(LONG):
        world.beat()
    assert state.jobs[job_id].phase is JobPhase.ACTIVE
    assert len(beside(world, job_id)) == 1


def test_two_that_are_fast_enough_stay_and_nobody_joins_them() -> None:
    world = full(GOOD)
    guests = [submit(world, automatic(0)) for _ in range(3)]
    assert "times one alone are expected; it takes 120 s" in told(world, guests[0])
    for _ in range(LONG):
        world.beat()
    assert sorted(len(beside(world, job_id)) for job_id in range(1, 7)) == [1] * 6
    assert "together 1.8 times one alone" in told(world, guests[0])
    state = world.rig.core.state
    for one in (automatic(0), spec(0, 8)):
        job_id = submit(world, one)
        assert state.jobs[job_id].phase is JobPhase.QUEUED
        assert told(world, job_id).startswith(
            f"job {job_id} waits: needs 8.0 GB of a shared GPU; all 3 that fit are taken"
        )
    assert world.parted == []


def test_two_that_are_too_slow_are_parted_without_a_free_gpu_and_stay_apart() -> None:
    world = full(BAD)
    guest = submit(world, automatic(1))
    for _ in range(10 * LONG):
        world.beat()
    state = world.rig.core.state
    assert len(world.parted) == 1, "the like of the host is not tried again, nor is the host"
    assert state.jobs[guest].phase is JobPhase.QUEUED
    assert "they were too slow together" in told(world, guest)
    end(world, 2)
    assert state.jobs[guest].phase is JobPhase.ACTIVE
    assert beside(world, guest) == []


def test_who_is_good_together_goes_apart_when_a_gpu_is_free_for_long() -> None:
    world = full(GOOD)
    guest = submit(world, automatic(0))
    (host,) = beside(world, guest)
    end(world, next(job_id for job_id in (1, 2, 3) if job_id != host))
    for _ in range(30):
        world.beat()
    assert world.parted == [], "it has not run for its minimum"
    for _ in range(60):
        world.beat()
    assert world.parted == [f"{guest}.1"]
    assert beside(world, guest) == []
    assert beside(world, host) == []


def test_who_is_good_together_stays_while_another_one_saves_to_go_where_a_gpu_is_free() -> None:
    world = full(GOOD)
    guest = submit(world, automatic(0))
    (host,) = beside(world, guest)
    gone, world.saving = (job_id for job_id in (1, 2, 3) if job_id != host)
    end(world, gone)
    world.rig.handle(m.Request(1, m.RequeueJob(world.saving)))
    for _ in range(90):
        world.beat()
    assert world.parted == [], "that one has the GPU first"
    world.saving = 0
    world.obey()
    for _ in range(LONG):
        world.beat()
    assert world.parted == [f"{guest}.1"], "and leaves its own to them"


def test_what_two_did_on_a_node_that_is_forgotten_is_still_known() -> None:
    world = full(BAD)
    guest = submit(world, automatic(0))
    for _ in range(LONG):
        world.beat()
    assert len(world.parted) == 1
    state = world.rig.core.state
    node = state.attempts[world.parted[0]].node
    mine = [attempt.job_id for attempt in world.running(node)]
    for job_id in mine:
        end(world, job_id)
    for attempt in list(world.running(node)):  # whoever took the place
        end(world, attempt.job_id)
    job, other = state.jobs[guest], next(one for one in world.running() if one.job_id != guest)

    def measured() -> tuple[float, float] | None:
        state.indices.lessons = None  # as after a restart
        (beside,) = [one for one in coruns.sharers(state).every if one.attempt == other.id]
        return coruns.forecast(state, job, beside).measured

    before = measured()
    assert before is not None
    state.take_out_node(node, keep=True)
    assert measured() == before


def test_a_round_looks_once_at_what_the_fleet_has_seen_however_many_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, looks = full(GOOD, beats=0), 0
    state = world.rig.core.state
    for training in range(10):
        submit(world, automatic(training % 2))
    world.rig.now_ms += coruns.LOOK_MS
    seen, why_not, asked = history.seen, coruns.forecast, 0

    def look(*given: object) -> history.History:
        nonlocal looks
        looks += 1
        return seen(*given)  # type: ignore[arg-type]

    def ask(*given: object) -> object:
        nonlocal asked
        asked += 1
        return why_not(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(history, "seen", look)
    monkeypatch.setattr(coruns, "forecast", ask)
    state.dirty = True
    world.rig.handle(m.Decide(), decide=False)
    assert len(state.queued) == 10
    assert looks == 1, "not for each of them beside each that runs"
    assert asked == 2 * (3 + NAMED_MAX), "of two kinds beside three, and for a sentence"


def test_where_many_run_a_place_elsewhere_is_looked_for_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def looks_of(lookers_max: int) -> int:
        monkeypatch.setattr(coruns, "LOOKERS_MAX", lookers_max)
        world, looks = full(GOOD), 0
        for _ in range(3):
            submit(world, automatic(0))
        for _ in range(LONG):
            world.beat()
        part = coruns._part

        def look(*given: object) -> None:
            nonlocal looks
            looks += 1
            part(*given)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(coruns, "_part", look)
            for _ in range(70):
                world.beat()
        return looks

    many, few = looks_of(1_000), looks_of(1)
    assert many >= 6 * 60
    assert 0 < few <= many // 5, "once in seven beats, and when a stretch is written"


def test_only_its_own_class_is_company() -> None:
    world = full(GOOD)
    spare = submit(world, automatic(0, job_class=JobClass.SPARE))
    assert world.rig.core.state.jobs[spare].phase is JobPhase.QUEUED
    assert "not beside job 1 on n2: that one is standard" in told(world, spare)


def test_who_asked_to_share_is_no_company_for_one_who_would_lose_by_it() -> None:
    world = full(BAD)
    known = submit(world, automatic(0))
    for _ in range(LONG):
        world.beat()
    assert world.parted == [f"{known}.1"]
    asked = submit(world, spec(0, 8))
    assert world.rig.core.state.jobs[asked].phase is JobPhase.QUEUED
    assert "kept 0.50 and 0.50 of their speeds" in told(world, asked)


def test_a_higher_class_displaces_who_would_be_no_company() -> None:
    world = full(BAD)
    job_id = submit(world, automatic(0, job_class=JobClass.GUARANTEED))
    assert world.rig.core.state.jobs[job_id].phase is JobPhase.ACTIVE
    assert beside(world, job_id) == []


@pytest.mark.parametrize("pairs", [True, False])
def test_a_pair_has_two(pairs: bool) -> None:
    gpu = GpuFacts("g", "H100", 80 * GIGABYTE)
    size = 8 * GIGABYTE
    two = [Hold("1.1", size, pairs), Hold("2.1", size)]
    assert (left_bytes(gpu, two) == 0) is pairs
    assert left_for(automatic(0), gpu, two) == 0
    assert left_for(automatic(0), gpu, two[:1]) == 64 * GIGABYTE
    assert left_for(automatic(0), gpu, [Hold("", size)]) == 0, "who that is, nobody knows"
    assert taken(spec(0, 8), two[:1]) == Hold("", 0 if pairs else size)
    assert taken(automatic(0), ()) == Hold("")


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("spare"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("end"), st.integers(0, 5), st.just(False)),
        st.tuples(st.just("pass"), st.sampled_from([3, 14, 30]), st.just(False)),
        st.tuples(st.just("pass"), st.sampled_from([14, 80]), st.just(False)),
        st.tuples(st.just("restart"), st.just(0), st.just(False)),
    ),
    min_size=4,
    max_size=16,
)


@pytest.mark.long
@given(kept=MATRICES, steps=STEPS)
@settings(max_examples=30, deadline=None)
def test_pairs_are_of_one_class_and_two_and_not_made_twice(
    kept: Kept, steps: list[tuple[str, int, bool]]
) -> None:
    """Safety: the rules of a pair; `World` checks who is parted, and that no GPU is promised beyond
    its memory. Liveness: nobody of them waits beside a free GPU."""
    world = World(kept)
    parted: set[frozenset[int]] = set()

    def look() -> None:
        state = world.rig.core.state
        for attempt in world.running():
            job = state.jobs[attempt.job_id]
            others = world.neighbours(attempt)
            if not job.spec.share_automatic:
                continue
            assert len(others) <= 1
            for other in others:
                assert state.jobs[other.job_id].spec.job_class is job.spec.job_class
                assert frozenset((job.id, other.job_id)) not in parted
        waiting = [state.jobs[job_id] for job_id in state.queued]
        assert not (world.free() and any(job.spec.share_automatic for job in waiting))

    def beat() -> None:
        state, known = world.rig.core.state, len(world.parted)
        pairs = {a.id: [o.job_id for o in world.neighbours(a)] for a in world.running()}
        slow = {a.id for a in world.running() if world.too_slow(a)}
        world.beat()
        for attempt_id in world.parted[known:]:
            job_id = state.attempts[attempt_id].job_id
            if attempt_id in slow and "pays" in state.attempts[attempt_id].stop_reason:
                parted.update(frozenset((job_id, other)) for other in pairs[attempt_id])
        look()

    for what, number, flag in [("submit", 0, True)] * 3 + [("pass", 14, False)] + steps:
        if what in ("submit", "spare"):
            job_class = JobClass.SPARE if what == "spare" else JobClass.STANDARD
            submit(world, replace(spec(number, 8, automatic=flag), job_class=job_class))
        elif what == "end" and world.running():
            mine = world.running()
            end(world, mine[number % len(mine)].job_id)
        elif what == "pass":
            for _ in range(number):
                beat()
        elif what == "restart":
            world.rig.restart()
            world.dial()
        look()
    for before, after in world.rig.replayed():
        assert before == after


HURRY = st.tuples(
    st.booleans(), st.sampled_from([300, 900]), st.sampled_from([1.15, 1.3, 1.6]), st.integers(0, 2)
)
HURRIED = st.lists(
    st.one_of(
        st.tuples(st.just("hurry"), HURRY),
        st.tuples(st.just("submit"), st.integers(0, 2)),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("pass"), st.sampled_from([14, 30, 60])),
    ),
    min_size=3,
    max_size=9,
)
SLACK_S = 75  # a minute before a deadline a job is to have ended, and a beat and a half


@dataclass
class Hurried(World):
    """Some have a deadline, and decisions over all jobs are made."""

    alone: list[str] = field(default_factory=list)  # who was stopped so that somebody is

    def beat(self) -> None:
        super().beat()
        before = {attempt.id: attempt.phase for attempt in self.running()}
        free = self.free()
        self.rig.handle(m.Tick())
        for attempt in self.running():
            stops = attempt.phase is not before[attempt.id]
            if stops and "alone" in attempt.stop_reason:
                (neighbour,) = self.neighbours(attempt)
                assert f"gives way to job {neighbour.job_id}," in attempt.stop_reason
                self.loses_no_more_than_it_may(attempt)
                self.had_to_be_alone(neighbour)
                self.alone.append(attempt.id)
            elif stops and "to itself" in attempt.stop_reason:
                assert free
                self.had_to_be_alone(attempt)
                self.alone.append(attempt.id)
        self.nobody_is_late_beside_one_who_may_leave()
        self.obey()

    def job(self, attempt: Attempt) -> Job:
        return self.rig.core.state.jobs[attempt.job_id]

    def loses_no_more_than_it_may(self, attempt: Attempt) -> None:
        job, now = self.job(attempt), self.rig.now
        assert job.spec.share_automatic
        assert job.head
        assert now.unix_ms - attempt.assigned_unix_ms >= 600_000
        assert self.needs_s(attempt) is None or not self.is_near(attempt)

    def had_to_be_alone(self, attempt: Attempt) -> None:
        """By the truth it would be late beside the other, and may be in time alone."""
        job = self.job(attempt)
        assert job.spec.share_automatic
        needs_s, left_s = self.needs_s(attempt), self.left_s(attempt)
        assert needs_s is not None
        # It counts what it has kept as it was written down last.
        assert needs_s / (self.ratio(attempt) - ERROR_RATIO) > left_s - SLACK_S
        assert needs_s <= 1.1 * left_s + SLACK_S

    def nobody_is_late_beside_one_who_may_leave(self) -> None:
        state = self.rig.core.state
        for attempt in self.running():
            others = self.neighbours(attempt)
            if attempt.job_id not in deadlines.late(state) or len(others) != 1:
                continue
            (other,) = others
            both = attempt.phase is other.phase is AttemptPhase.RUNNING
            decided = state.standing.decided_ms == self.rig.now_ms
            ran_s = (self.rig.now.unix_ms - other.assigned_unix_ms) / 1000
            automatic = all(self.job(one).spec.share_automatic for one in (attempt, other))
            needs_s = (self.needs_s(attempt) or 0) / (self.ratio(attempt) + ERROR_RATIO)
            if both and decided and automatic and needs_s > self.left_s(attempt):
                young = ran_s < 10 * costs.restart_s(state, self.rig.now, self.job(other))
                assert ran_s < 600 or young or self.is_near(other), attempt.id

    def needs_s(self, attempt: Attempt) -> float | None:
        """Alone."""
        total = self.totals.get(attempt.job_id)
        return None if total is None else (total - self.steps[attempt.id]) / PER_S

    def left_s(self, attempt: Attempt) -> float:
        return (self.job(attempt).spec.deadline_unix_ms - self.rig.now.unix_ms) / 1000

    def is_near(self, attempt: Attempt) -> bool:
        return deadlines.is_close(self.rig.core.state, self.rig.now, self.job(attempt))


@pytest.mark.long
@given(kept=MATRICES, steps=HURRIED)
@settings(max_examples=4, deadline=None)
def test_who_has_to_be_alone_for_a_deadline_is_and_costs_nobody_more_than_he_may(
    kept: Kept, steps: list[tuple[str, Any]]
) -> None:
    hurried(kept, steps)


def test_of_those_histories_some_have_one_who_has_to_be_alone() -> None:
    assert hurried(((0.75,) * 3,) * 3, []).alone == ["2.1"]


def hurried(kept: Kept, steps: list[tuple[str, Any]]) -> Hurried:
    """Three whose speed is known have had the GPUs for their minimum, and one comes who may be in
    time alone."""
    world = Hurried(kept)
    first: list[tuple[str, Any]] = [("submit", number) for number in range(3)]
    hurry = "hurry", (False, 900, 1.08, 0)
    for what, asked_for in [*first, ("pass", 62), hurry, ("pass", 62), *steps]:
        if what == "submit":
            submit(world, automatic(asked_for))
        elif what == "hurry":
            asked, needs_s, slack, training = asked_for
            deadline_unix_ms = world.rig.now.unix_ms + round(needs_s * slack + 180) * 1000
            world.totals[world.rig.core.state.last_job_id + 1] = round(needs_s * PER_S)
            share = spec(training, 8) if asked else automatic(training)
            submit(world, replace(share, deadline_unix_ms=deadline_unix_ms))
        elif what == "end" and world.running():
            mine = world.running()
            end(world, mine[asked_for % len(mine)].job_id)
        elif what == "pass":
            for _ in range(asked_for):
                world.beat()
                for attempt in world.running():
                    if world.steps[attempt.id] >= world.totals.get(attempt.job_id, 10**9):
                        end(world, attempt.job_id)
    for before, after in world.rig.replayed():
        assert before == after
    return world
