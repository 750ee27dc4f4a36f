"""Every second has one name, whatever three clocks say: drawn at random, and by hand.

Problem: an account whose parts do not add up is believed by nobody, and one that adds up because
the rest is called idle hides what it should show. So the sum, and that nothing is negative, are
properties over any record at all; that each part is what it should be is checked on stories whose
seconds are known, through the real core with its restarts.
"""

from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import messages as m
from coordinator.core.accounting import PARTS, account, total
from coordinator.core.model import (
    Accounting,
    Attempt,
    AttemptTimes,
    HostFacts,
    JobSpec,
    JobView,
    Progress,
    TrainerTime,
)
from coordinator.core.phases import AttemptPhase
from tests.core.coordinator_harness import UNIX_MS_AT_START, Rig

# Clocks that are right, that were set, and that are nonsense.
UNIX_MS = st.integers(0, 10_000_000) | st.integers(0, 253_402_300_799_999)
SECONDS = st.floats(0, 10_000) | st.floats(0, 1e9)
STEP = st.integers(0, 10_000) | st.integers(-(2**63), 2**63 - 1)
MS = st.integers(0, 1_000_000) | st.integers(0, 10**15)
TIME = st.builds(TrainerTime, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS)
TIMES = st.builds(
    AttemptTimes,
    queued_unix_ms=st.none() | UNIX_MS,
    silent_unix_ms=st.none() | UNIX_MS,
    over_unix_ms=st.none() | UNIX_MS,
    restore_ms=st.none() | MS,
    start_ms=st.none() | MS,
    ready_ms=st.none() | MS,
    speaks=st.booleans(),
    reached_step=STEP,
    step=st.none() | STEP,
    trainer=st.none() | TIME,
)
ATTEMPT = st.builds(
    Attempt,
    st.just(1),
    st.just(1),
    st.just("n1"),
    st.just(()),
    st.sampled_from(AttemptPhase),
    UNIX_MS,
    started_unix_ms=st.none() | UNIX_MS,
    ended_unix_ms=st.none() | UNIX_MS,
    restored_step=STEP,
    times=TIMES,
)
PROGRESS = st.none() | st.builds(Progress, STEP, time=st.none() | TIME)


def parts(one: Accounting) -> dict[str, float]:
    """The parts that are there, to the millisecond."""
    shown = {name: round(getattr(one, name), 3) for name in PARTS}
    return {name.removesuffix("_s"): value for name, value in shown.items() if value}


def check(one: Accounting) -> None:
    """Within a thousandth of what was promised."""
    told = asdict(one)
    assert all(told[name] >= -1e-9 * one.wall_s for name in PARTS), told
    assert sum(told[name] for name in PARTS) == pytest.approx(one.wall_s, rel=1e-5, abs=1e-6), told
    assert one.overstated_ratio >= 1


@pytest.mark.long
@settings(max_examples=3_000, deadline=None)
@given(ATTEMPT, PROGRESS, UNIX_MS)
def test_the_parts_of_any_record_add_up(
    attempt: Attempt, progress: Progress | None, unix_ms: int
) -> None:
    check(account(attempt, progress, unix_ms))


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(ATTEMPT, PROGRESS), max_size=5), UNIX_MS)
def test_sums_add_up_too(records: list[tuple[Attempt, Progress | None]], unix_ms: int) -> None:
    check(total([account(attempt, progress, unix_ms) for attempt, progress in records]))


RUN = Attempt(
    1, 2, "n1", (), AttemptPhase.RUNNING, 10_000, started_unix_ms=13_000, restored_step=100,
    restored_digest="c", times=AttemptTimes(
        queued_unix_ms=4_000, restore_ms=2_000, start_ms=1_000, ready_ms=5_000, reached_step=110,
    ),
)  # fmt: skip
TOLD = TrainerTime(step_s=40, evaluate_s=3, input_wait_s=2, capture_s=1, restore_s=4)


def test_every_part_has_its_place() -> None:
    """Six seconds in the queue, two of fetching, one of starting, five of loading of which four are
    its checkpoint's, and fifty that the trainer tells; half of its 20 steps are repeated."""
    ended = replace(RUN, ended_unix_ms=73_000, times=replace(RUN.times, silent_unix_ms=70_000))
    found = account(ended, Progress(120, time=TOLD), 999_999)
    assert parts(found) == {
        "productive": 23, "input_wait": 2, "capture": 1, "recompute": 20, "detect": 3,
        "schedule": 6, "start": 2, "restore": 6, "idle": 6,
    }  # fmt: skip
    assert (found.wall_s, found.overstated_ratio, found.measured) == (69, 1, True)


def test_what_a_trainer_overstates_is_divided_and_said() -> None:
    found = account(RUN, Progress(120, time=TOLD), 38_000)
    # 25 s are left for the 50 s that it claims: nothing is left for loading.
    assert found.overstated_ratio == 2
    assert parts(found) == {
        "productive": 11.5, "input_wait": 1, "capture": 0.5, "recompute": 10,
        "schedule": 6, "start": 1, "restore": 4,
    }  # fmt: skip


def test_a_program_that_says_nothing_gets_all_of_it() -> None:
    found = account(RUN, Progress(120), 38_000)
    assert parts(found) == {
        "productive": 10, "recompute": 10, "schedule": 6, "start": 6, "restore": 2,
    }  # fmt: skip
    assert not found.measured


@pytest.mark.parametrize(
    ("more", "progress", "part"),
    [
        ({}, None, "idle"),
        ({"restored_step": 120}, Progress(120), "idle"),
        ({"commits": 1}, None, "productive"),
        ({"phase": AttemptPhase.SUCCEEDED}, None, "productive"),
        ({"phase": AttemptPhase.RUNNING}, None, "productive"),
    ],
)
def test_one_that_says_nothing_and_fails_was_not_productive(
    more: dict[str, object], progress: Progress | None, part: str
) -> None:
    silent = replace(RUN, times=replace(RUN.times, ready_ms=None, step=None, reached_step=0))
    failed = replace(silent, phase=AttemptPhase.FAILED, commits=0, restored_step=0)
    found = account(replace(failed, **more), progress, 38_000)  # type: ignore[arg-type]
    assert [name for name in ("idle", "productive") if name in parts(found)] == [part]
    assert found.measured is (part == "idle"), "nothing of it is taken to be steps"
    check(found)


def test_one_that_speaks_is_starting_until_it_is_ready() -> None:
    loading = replace(RUN, times=replace(RUN.times, ready_ms=None, speaks=True))
    found = account(loading, None, 38_000)
    assert parts(found) == {"schedule": 6, "start": 26, "restore": 2}
    silent = replace(RUN, times=replace(RUN.times, ready_ms=None))
    assert parts(account(silent, None, 38_000))["productive"] == 25


def test_an_attempt_that_never_started_was_starting() -> None:
    refused = replace(RUN, started_unix_ms=None, ended_unix_ms=17_000, times=AttemptTimes())
    assert parts(account(refused, None, 0)) == {"start": 7}


# --- stories through the core ---------------------------------------------------------------------


class Story:
    """One job on a fleet of agents that say what the test tells them to."""

    def __init__(self) -> None:
        self.rig = Rig()
        self.sequence: dict[str, int] = {}
        self.sessions = 0
        self.session: dict[str, int] = {}
        self.beat = 0
        for node in ("n1", "n2"):
            self.hello(node)
        self.ask(m.Submit(JobSpec(command=("train",))))

    def ask(self, body: m.RequestBody) -> m.Answer:
        for effect in self.rig.handle(m.Request(1, body)):
            if isinstance(effect, m.Reply):
                return effect.answer
        raise AssertionError("no answer")

    def hello(self, node: str, *held: str) -> None:
        self.sessions += 1
        self.session[node] = self.sessions
        attempts = tuple(m.HeldAttempt(attempt, ()) for attempt in held)
        host = HostFacts(cpu_count=1)
        said = m.Hello(node, f"journal-{node}", "", host, (), attempts)
        self.rig.handle(m.FromAgent(self.session[node], said))

    def heartbeat(self, node: str, attempt: str = "", progress: Progress | None = None) -> None:
        self.beat += 1
        held = (m.HeldAttempt(attempt, ()),) if attempt else ()
        told = ((attempt, progress),) if progress is not None else ()
        said = m.Heartbeat(self.beat, None, (), held, told)
        self.rig.handle(m.FromAgent(self.session[node], said))

    def event(self, node: str, attempt: str, body: m.AgentEventBody, ago_ms: int = 0) -> None:
        sequence = self.sequence[node] = self.sequence.get(node, 0) + 1
        unix_ms = UNIX_MS_AT_START + self.rig.now_ms - ago_ms
        said = m.AgentEvent(sequence, unix_ms, attempt, body)
        self.rig.handle(m.FromAgent(self.session[node], said))

    def started(self, node: str, attempt: str, **fields: object) -> None:
        self.event(node, attempt, m.AttemptStarted(7, **fields))  # type: ignore[arg-type]

    def commit(self, node: str, attempt: str, digest: str, step: int) -> None:
        body = m.CheckpointProposed(digest, "", step, 1, (node, "shared"))
        self.event(node, attempt, body)

    def wait(self, span_ms: int, *alive: str) -> None:
        """Time passes; these nodes stay within their lease."""
        for _ in range(span_ms // 500):
            self.rig.now_ms += 500
            for node in alive:
                self.heartbeat(node, self.running_on(node))
            self.rig.handle(m.Tick())

    def running_on(self, node: str) -> str:
        return next(iter(self.rig.core.state.nodes[node].attempts), "")

    @property
    def view(self) -> JobView:
        answer = self.ask(m.GetJob(1))
        assert isinstance(answer, JobView)
        for one in (*answer.accounts, answer.accounting):
            assert one is not None
            check(one)
        return answer

    def accounts(self) -> list[dict[str, float]]:
        return [parts(one) for one in self.view.accounts]


def told(step: int, step_s: float) -> Progress:
    return Progress(step, time=TrainerTime(step_s=step_s))


def test_a_trainer_dies_and_goes_on() -> None:
    story = Story()
    story.started("n1", "1.1", start_ms=0)
    story.wait(10_000, "n1", "n2")
    story.commit("n1", "1.1", "a" * 64, 5)
    story.heartbeat("n1", "1.1", told(10, 10))
    story.event("n1", "1.1", m.AttemptExited(None, 9))
    story.wait(4_000, "n1", "n2")  # a first failure costs no wait
    story.started("n1", "1.2", restored_digest="a" * 64, restored_step=5, restore_ms=2_000,
                  start_ms=1_000)  # fmt: skip
    story.wait(10_000, "n1", "n2")
    story.heartbeat("n1", "1.2", told(15, 10))
    first, second = story.accounts()
    assert first == {"productive": 10}
    assert second == {
        "productive": 5, "recompute": 5, "start": 2, "restore": 2,
    }  # fmt: skip
    whole = story.view.accounting
    assert whole is not None
    assert (whole.wall_s, whole.productive_s) == (24, 15)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_node_dies_and_its_job_goes_elsewhere(restarted: bool) -> None:
    story = Story()
    story.started("n1", "1.1", start_ms=0)
    story.wait(20_000, "n1", "n2")
    story.heartbeat("n1", "1.1", told(20, 20))
    story.commit("n1", "1.1", "a" * 64, 20)
    story.ask(m.CordonNode("n2"))
    story.wait(8_000, "n2")
    assert story.accounts() == [{"productive": 20, "detect": 8}]
    story.wait(5_000, "n2")
    waiting = story.view.accounting
    assert waiting is not None
    assert parts(waiting) == {"productive": 20, "detect": 8, "schedule": 5}
    if restarted:
        story.rig.restart()
        story.hello("n2")
    story.ask(m.UncordonNode("n2"))
    story.started("n2", "1.2", restored_digest="a" * 64, restored_step=20)
    story.wait(4_000, "n2")
    story.heartbeat("n2", "1.2", told(24, 4))
    assert story.accounts() == [
        {"productive": 20, "detect": 8}, {"productive": 4, "schedule": 5},
    ]  # fmt: skip


def test_a_restart_forgets_no_more_than_since_the_last_commit() -> None:
    story = Story()
    story.started("n1", "1.1", start_ms=0)
    story.wait(10_000, "n1", "n2")
    story.heartbeat("n1", "1.1", told(10, 10))
    story.commit("n1", "1.1", "a" * 64, 10)
    story.wait(2_000, "n1", "n2")
    story.heartbeat("n1", "1.1", told(12, 12))
    story.rig.restart()
    assert story.accounts() == [{"productive": 10, "idle": 2}]
    # Its node never comes back: it was last heard, as far as is written down, with its commit.
    story.wait(story.rig.options.restart_grace_ms)
    (lost,) = story.accounts()
    assert lost == {"productive": 10, "detect": 2 + story.rig.options.restart_grace_ms / 1000}


def test_a_restart_after_the_end_forgets_nothing() -> None:
    story = Story()
    story.started("n1", "1.1", start_ms=0)
    story.wait(10_000, "n1", "n2")
    story.heartbeat("n1", "1.1", told(10, 10))
    story.event("n1", "1.1", m.AttemptExited(0))
    story.rig.restart()
    assert story.accounts() == [{"productive": 10}]


def test_a_node_that_returns_has_lost_nothing() -> None:
    story = Story()
    story.started("n1", "1.1", start_ms=0)
    story.ask(m.CordonNode("n2"))
    story.wait(10_000, "n1", "n2")
    story.wait(10_000, "n2")
    story.hello("n1", "1.1")
    story.heartbeat("n1", "1.1", told(20, 20))
    assert story.accounts() == [{"productive": 20}]


def test_time_that_its_owner_held_it_is_nobodys() -> None:
    story = Story()
    story.started("n1", "1.1", start_ms=0)
    story.wait(10_000, "n1", "n2")
    story.heartbeat("n1", "1.1", told(10, 10))
    story.ask(m.HoldJob(1))
    story.event("n1", "1.1", m.AttemptExited(75))
    story.wait(60_000, "n1", "n2")
    story.ask(m.CordonNode("n1"))
    story.ask(m.CordonNode("n2"))
    story.ask(m.ReleaseJob(1))
    story.wait(2_000, "n1", "n2")
    story.ask(m.UncordonNode("n1"))
    assert story.accounts() == [{"productive": 10}, {"schedule": 2}]


def test_milestones_tell_when_it_was_ready() -> None:
    story = Story()
    story.started("n1", "1.1", start_ms=500)
    story.wait(4_000, "n1", "n2")
    assert story.accounts() == [{"productive": 3.5, "start": 0.5}]  # a program like any other
    story.event("n1", "1.1", m.AttemptMilestone("imports"))
    assert story.accounts() == [{"start": 4}]
    story.event("n1", "1.1", m.AttemptMilestone("load"), ago_ms=1_000)
    story.wait(6_000, "n1", "n2")
    story.heartbeat("n1", "1.1", told(5, 5))
    assert story.accounts() == [{"productive": 5, "start": 3.5, "idle": 1.5}]


def test_an_end_that_was_heard_late_was_noticed_late() -> None:
    story = Story()
    story.started("n1", "1.1", start_ms=0)
    story.wait(10_000, "n1", "n2")
    story.heartbeat("n1", "1.1", told(6, 6))
    story.event("n1", "1.1", m.AttemptExited(0), ago_ms=4_000)
    assert story.accounts() == [{"productive": 6, "detect": 4}]


def test_lists_do_not_pay_for_accounts() -> None:
    story = Story()
    page = story.ask(m.ListJobs())
    assert isinstance(page, m.JobPage)
    assert [(view.accounts, view.accounting) for view in page.jobs] == [((), None)]
