"""Random hours of a mixed fleet in which jobs are moved, and what holds of all of them.

Problem: a scheduler that stops jobs for better places can promise a place twice, stop two for each
other for ever, or leave a rank behind, and each of these needs a history of several moves. The
machine of `test_coordinator_machine.py` has every fault in its histories and seldom a move; here
nothing fails, everybody trains, and jobs come, end, and are moved as often as they may be.

Safety is looked at after every change, liveness at the end: whoever fits ends, at a bound on moves.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.core import costs, decisions
from coordinator.core import messages as m
from coordinator.core.allocation import Aims, unsolved
from coordinator.core.messages import Effect, Event
from coordinator.core.model import JobClass, JobSpec
from coordinator.core.phases import JOB_ENDED, JobPhase
from coordinator.core.state import Options
from coordinator.core.weighing import answer
from tests.core.coordinator_checks import (
    Moves,
    check_gang,
    check_gpu,
    check_guaranteed,
    check_promises,
)
from tests.core.training_fleet import Fleet, training

pytestmark = pytest.mark.long

MOVES_PER_HOUR = 6
OPTIONS = Options(aims=Aims(run_s_min=30), moves_per_hour=MOVES_PER_HOUR, solve=unsolved)
# With how many small jobs on it at first: where some of them end, what is free lies scattered.
FLEETS = (
    (("2xA100:80", "2xH100", "1xH100,1xA100:80", "1xL40S:48"), 0),
    (("2xA100:80", "2xA100:80", "2xA100:80"), 6),
)
LEFT_S = 6 * 3_600  # for all that is left in the end

SPECS = st.builds(
    lambda steps, ranks, gpus, job_class, known: replace(
        training(steps) if known else JobSpec(command=("x",)),
        gpus=gpus,
        ranks=ranks,
        job_class=job_class,
    ),
    st.sampled_from([40, 200, 200, 900]),
    st.sampled_from([1, 1, 1, 2]),
    st.sampled_from([1, 1, 2]),
    st.sampled_from([JobClass.STANDARD, *JobClass]),
    st.sampled_from([True, True, True, False]),
)
STEPS = st.one_of(
    SPECS,
    st.sampled_from([5, 40, 40, 150]),
    st.sampled_from(["weigh 0", "weigh 4", "weigh 30", "weigh never"]),
    st.sampled_from(
        ["end -1", "end 0", "end 1", "cordon n2", "uncordon n2", "cordon n1", "uncordon n1"]
    ),
)


class Watched(Fleet):
    """Looked at after every change. Who decides over all jobs takes `weighs_s` for it; `None`: for
    ever."""

    def __init__(self, gpus: Sequence[str]) -> None:
        super().__init__(*gpus, options=OPTIONS)
        self.moves = Moves(MOVES_PER_HOUR)
        self.tick_ms = 2_000
        self.weighs_s: int | None = 0
        handle = self.rig.handle

        def watched(event: Event, decide: bool = True) -> list[Effect]:
            effects = handle(event, decide)
            effects += [effect for asked in self.weighed() for effect in handle(answer(asked))]
            if any(isinstance(effect, m.PutJob | m.PutAttempt) for effect in effects):
                self.judge(effects)
            return effects

        self.rig.handle = watched  # type: ignore[method-assign]

    def weighed(self) -> list[m.MakeAllocation]:
        """What is answered by now."""
        if self.weighs_s is None:
            return []
        until_ms = self.rig.now_ms - 1_000 * self.weighs_s
        due = [asked for asked in self.rig.unanswered if asked.now_ms <= until_ms]
        self.rig.unanswered = [asked for asked in self.rig.unanswered if asked not in due]
        return due

    def judge(self, effects: list[Effect]) -> None:
        state = self.state
        self.moves.judge(effects, self.rig.disk.jobs, self.rig.now_ms)
        for job in state.jobs.values():
            check_gang(state, job)
        for live in state.nodes.values():
            for uuid in live.gpus:
                check_gpu(state, live, uuid)
        check_promises(state)
        check_guaranteed(state, self.rig.now_ms)

    def take(self, step: JobSpec | int | str) -> None:
        if isinstance(step, JobSpec):
            if len(self.state.jobs) < 16:
                self.submit(step)
        elif isinstance(step, int):
            self.run(step)
        elif step.startswith("weigh"):
            said = step.split()[1]
            self.weighs_s = None if said == "never" else int(said)
            self.rig.answers_at_once = self.weighs_s == 0
        elif step.startswith("end"):
            active = [j.id for j in self.state.jobs.values() if j.phase is JobPhase.ACTIVE]
            if active:
                self.obey()
                self.end(active[int(step.split()[1]) % len(active)])
        else:
            wish, node = step.split()
            body = m.CordonNode(node) if wish == "cordon" else m.UncordonNode(node)
            self.rig.handle(m.Request(1, body))

    def finish(self) -> None:
        """Everybody trains to his end; who does not say how long that is, for five minutes. Longer
        steps of time, since most of it passes here; within a lease, and a save is still in time."""
        self.tick_ms = 5_000
        self.take("weigh 4")
        for node in self.state.nodes:
            self.rig.handle(m.Request(1, m.UncordonNode(node)))
        for _ in range(0, LEFT_S, 60):
            open_jobs = [job for job in self.state.jobs.values() if job.phase not in JOB_ENDED]
            if not open_jobs:
                break
            self.run(60)
            for job in open_jobs:
                attempt = self.state.current(self.state.jobs[job.id])
                if attempt is None or self.job(job.id).phase is not JobPhase.ACTIVE:
                    continue
                total = 900 if job.spec.trainer else 300
                self.obey()
                if self.steps.get(attempt.id, 0) >= total:
                    self.end(job.id)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(FLEETS), st.lists(STEPS, min_size=6, max_size=24))
def test_whatever_comes_nothing_is_promised_twice_and_all_end(
    nodes: tuple[Sequence[str], int], steps: list[JobSpec | int | str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "RESTART_S_DEFAULT", 2.0)
        patch.setattr(decisions, "ANSWER_MS_MAX", 20_000)
        fleet = Watched(nodes[0])
        for _ in range(nodes[1]):
            fleet.submit(training(900))
        fleet.run(60)
        for step in steps:
            fleet.take(step)
        fleet.finish()
    left = [job for job in fleet.state.jobs.values() if job.phase not in JOB_ENDED]
    assert not left, [(job, fleet.state.wait_reason(job)) for job in left]
