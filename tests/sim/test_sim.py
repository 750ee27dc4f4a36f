"""Seeds in every build, what seeds have found as scenarios, and proof that the checkers can fail.

A seed that found something is written out as a scenario below: the next change of the planner would
make another story of it.

Safety: `checkers.py` and `sweep.py` name the rules. Liveness: after the last fault every job ends
within `world.HEALED_MS_MAX`. A seed that breaks a rule is replayed by the command that its failure
prints.
"""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from agent.core import node as agent_node
from agent.core import stuck
from agent.core.messages import KillProcess, Opened
from agent.core.node import NodeCore
from agent.core.state import State as AgentState
from coordinator import shell as coordinator_shell
from coordinator.core import attempts, checkpoints, costs, gangs, leases, nodes, outcomes
from coordinator.core import messages as cm
from coordinator.core.messages import CheckpointProposed, PutJob, Record
from coordinator.core.model import Attempt, Checkpoint, Job, Part
from coordinator.core.phases import JobPhase, NodePhase
from coordinator.core.state import LiveNode
from coordinator.core.state import State as CoordinatorState
from coordinator.store.memory import MemoryDisk
from tests.sim import week
from tests.sim.__main__ import main as further_seeds
from tests.sim.faults import KINDS, Fault, Plan, Program, plan
from tests.sim.injector import broken, run_plan
from tests.sim.world import Outcome, World, simulate

SEEDS = 200
CHUNK = 10  # seeds per test: small enough to spread over workers, large enough to cost no overhead


def run(the_plan: Plan) -> str:
    """The sentence of the rule that it broke, or nothing."""
    return run_plan(the_plan).failure


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_safety_and_liveness_hold_for_every_seed(first: int) -> None:
    for seed in range(first, first + CHUNK):
        failure = broken(plan(seed), run_plan(plan(seed)))
        assert not failure, f"seed {seed}: {failure}; python -m tests.sim --seed {seed} --trace"


@pytest.mark.parametrize("first", range(0, 40, CHUNK))
def test_they_hold_where_jobs_share_only_where_that_pays(first: int) -> None:
    """Who waits for a GPU of its own is where a fault does not look for it, so not all fire."""
    shared = 0
    for seed in range(first, first + CHUNK):
        programs = tuple(replace(each, picky=True) for each in plan(seed).programs)
        shared += sum(each.share_automatic for each in programs)
        assert not run(replace(plan(seed), programs=programs)), f"seed {seed}"
    assert shared


def test_the_seeds_cover_every_kind_of_fault() -> None:
    """A planned fault has fired, or the seeds' own test fails; so planning covers firing."""
    planned = {fault.kind for seed in range(SEEDS) for fault in plan(seed).faults}
    assert planned == set(KINDS)


def test_a_plan_whose_fault_never_fired_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where somebody looks for further seeds by hand."""
    kind = plan(7).faults[0].kind

    def without(the_plan: Plan) -> Outcome:
        outcome = run_plan(the_plan)
        del outcome.fired[kind]
        return outcome

    monkeypatch.setattr("tests.sim.__main__.run_plan", without)
    assert further_seeds(["--seed", "7"]) == 1
    assert f"seed 7: {kind} never fired\n" in capsys.readouterr().out


def test_the_same_seed_is_the_same_run_whatever_the_hash_seed() -> None:
    printed = []
    for hash_seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", "7"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        printed.append(done.stdout.splitlines()[0])
    assert printed[0].startswith("fingerprint ")
    assert printed[0] == printed[1]


# --- directed scenarios ---------------------------------------------------------------------------


async def _first_replicated(world: World) -> tuple[int, str, str, str]:
    """Wait for a commit with a copy: job, digest, and the two nodes, the writer first."""
    while True:
        for job_id, head in world.checkers.heads.items():
            replicas = world.checkers.checkpoints[head].replicas if head else ()
            if len(replicas) == 2 and world.agents[replicas[0]].box.trainers:
                return job_id, head, replicas[0], replicas[1]
        await asyncio.sleep(0.1)


def test_a_rotten_copy_waits_for_the_good_one_on_a_lost_node() -> None:
    """Its writer is without power and the replica has rotted: nobody within reach has the last
    checkpoint, and going on from an older one would undo work that is safe."""

    async def strike(world: World) -> None:
        job_id, head, writer, replica = await _first_replicated(world)
        world.agents[writer].power_off()
        world.agents[replica].box.disk.copies[head].intact = False
        await asyncio.sleep(40)
        job = world.checkers.jobs[job_id]
        assert job.head == head, f"{job} went back"
        async with asyncio.timeout(200):  # whoever has a better claim goes first
            told = ""
            while "--abandon" not in told:
                await asyncio.sleep(0.2)
                told = await world.explain(job_id)
        world.agents[writer].power_on()
        world.fired("scenario")

    outcome = simulate(workload("cut", 0), strike)
    assert not outcome.failure
    assert outcome.fired["scenario"] == 1


def test_an_owner_may_give_up_a_copy_on_a_node_that_never_returns() -> None:
    """As above, but the writer is gone for good: the sentence says what to do, and it works."""

    async def strike(world: World) -> None:
        _, head, writer, replica = await _first_replicated(world)
        world.agents[writer].gone = True
        world.agents[writer].power_off()
        world.agents[replica].box.disk.copies[head].intact = False
        world.fired("scenario")

    outcome = simulate(workload("cut", 0), strike)
    assert not outcome.failure
    assert outcome.fired["scenario"] == 1
    assert any("user gives up" in line and "JobView" in line for line in outcome.lines)


def test_who_resumed_from_a_checkpoint_counts_as_a_holder_of_it() -> None:
    async def strike(world: World) -> None:
        job_id, _, writer, replica = await _first_replicated(world)
        third = next(name for name in world.agents if name not in (writer, replica))
        await world.insist(cm.CordonNode(replica))
        world.agents[writer].power_off()
        held: list[Checkpoint] = []
        async with asyncio.timeout(30):
            while not held:
                await asyncio.sleep(0.1)
                mine = [c for (owner, _), c in world.checkers.kept.items() if owner == job_id]
                held = [c for c in mine if third in c.replicas and c.epoch == 1]
        world.agents[writer].power_on()
        world.fired("scenario")

    lone = workload("cut", 0)
    outcome = simulate(replace(lone, programs=lone.programs[:1]), strike)
    assert not outcome.failure
    assert outcome.fired["scenario"] == 1


def test_a_drained_job_sends_ahead_and_trains_on_meanwhile() -> None:
    """To a standby that has nothing of it, since the one that had was closed; then it goes on."""

    async def strike(world: World) -> None:
        job_id, _, writer, replica = await _first_replicated(world)
        await world.insist(cm.CordonNode(replica))
        await world.insist(cm.DrainNode(writer))
        async with asyncio.timeout(60):
            moved = False
            while not moved:
                await asyncio.sleep(0.1)
                moved = world.checkers.jobs[job_id].epoch == 2
        world.fired("scenario")

    lone = replace(workload("cut", 0), seed=10)  # of which the copies are so slow that it pays
    outcome = simulate(replace(lone, programs=lone.programs[:1]), strike)
    assert not outcome.failure
    assert outcome.fired["scenario"] == 1
    ahead = [n for n, line in enumerate(outcome.lines) if "attempt.precopy" in line]
    moved = [n for n, line in enumerate(outcome.lines) if "attempt.accepted attempt=1.2" in line]
    kept = [n for n, line in enumerate(outcome.lines) if "checkpoint.committed" in line]
    assert ahead
    assert sum(ahead[0] < number < moved[0] for number in kept) == 2, "one ahead, one at the end"


def test_a_drained_gang_sends_ahead_and_stops_together() -> None:
    """Both ranks send one checkpoint ahead, of one step, and one at the end."""

    async def strike(world: World) -> None:
        job_id, _, writer, replica = await _first_replicated(world)
        await world.insist(cm.CordonNode(replica))
        await asyncio.sleep(2)  # so that a heartbeat has said what it would gain
        await world.insist(cm.DrainNode(writer))
        async with asyncio.timeout(60):
            moved = False
            while not moved:
                await asyncio.sleep(0.1)
                moved = world.checkers.jobs[job_id].epoch == 2
        world.fired("scenario")

    gang = gangs_of_two("cut")
    outcome = simulate(replace(gang, programs=gang.programs[:1], faults=()), strike)
    assert not outcome.failure
    assert outcome.fired["scenario"] == 1
    ahead = [n for n, line in enumerate(outcome.lines) if "attempt.precopy" in line]
    moved = [n for n, line in enumerate(outcome.lines) if "attempt.accepted attempt=1.2.0" in line]
    kept = [n for n, line in enumerate(outcome.lines) if "checkpoint.committed job=1 " in line]
    assert len(ahead) == 2, "one for each rank"
    assert sum(ahead[0] < number < moved[0] for number in kept) == 2, "one ahead, one at the end"


def test_a_program_that_is_told_to_leave_does_so_with_a_full_disk() -> None:
    async def strike(world: World) -> None:
        _, _, writer, _ = await _first_replicated(world)
        agent, coordinator = world.agents[writer], world.coordinator
        agent.box.disk.full = coordinator.full = True
        await asyncio.sleep(12)
        assert agent.shell is not None
        assert coordinator.shell is not None
        agent.shell.leave(1_000)
        coordinator.shell.leave()
        assert agent.task is not None
        assert coordinator.task is not None
        done, _ = await asyncio.wait((agent.task, coordinator.task), timeout=5)
        assert len(done) == 2
        world.fired("scenario")
        coordinator.kill()

    outcome = simulate(workload("cut", 0), strike)
    assert not outcome.failure
    assert outcome.fired["scenario"] == 1


def test_what_agents_say_beyond_the_bound_is_lost_without_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full disk for half a minute, and room for ten messages."""
    monkeypatch.setattr(coordinator_shell, "MESSAGES_MAX", 10)

    async def strike(world: World) -> None:
        await _first_replicated(world)
        world.coordinator.full = True
        for _ in range(300):
            await asyncio.sleep(0.1)
            assert world.coordinator.shell is not None
            # Ends of sessions are never lost, and there is one tick.
            assert len(world.coordinator.shell._inbox) <= 10 + 30
        world.coordinator.full = False
        world.fired("scenario")

    outcome = simulate(workload("cut", 0), strike)
    assert not outcome.failure
    assert outcome.fired["scenario"] == 1


def all_at_once(restarts: bool) -> Outcome:
    """Sixteen nodes lose the coordinator in one instant, which lets in one a second: twice as long
    as a lease for the last of them, five times the grace of a closed connection."""

    async def strike(world: World) -> None:
        await _first_replicated(world)
        await asyncio.sleep(20)  # so that all have joined
        host = world.coordinator
        assert host.core is not None
        if restarts:
            host.kill()
        for agent in world.agents.values():
            for connection in agent.connections:
                connection.end_agent("connection reset")
                connection.end_coordinator()
        if restarts:
            await host.start()
            assert host.core is not None
        host.core.state.options = replace(host.core.state.options, hellos_per_s=1)
        await asyncio.sleep(25)
        phases = [live.phase for live in host.core.state.nodes.values()]
        assert phases == [NodePhase.UP] * 16
        world.fired("scenario")

    return simulate(replace(workload("cut", 0), nodes=16), strike)


@pytest.mark.parametrize("restarts", [True, False])
def test_nobody_is_lost_while_it_stands_in_line(restarts: bool) -> None:
    outcome = all_at_once(restarts)
    assert not outcome.failure
    assert outcome.fired["scenario"] == 1
    assert 14 <= outcome.fired["herd"] <= 20, "hardly any is told twice for how long"
    assert not [line for line in outcome.lines if "node.lost" in line]
    assert not [line for line in outcome.lines if "attempt.accepted attempt=1.2" in line]


# --- the checkers can fail ------------------------------------------------------------------------


def test_a_job_moves_to_a_faster_type_when_it_comes_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on there from its checkpoint: the checkers see to that. Its restarts have not been
    measured, and so close to its end a minute would be too dear."""
    monkeypatch.setattr(costs, "RESTART_S_DEFAULT", 10.0)

    async def strike(world: World) -> None:
        world.fired("scenario")

    first, second = (
        replace(workload("cut").programs[0], at_ms=at_ms, steps=steps)
        for at_ms, steps in ((5_000, 620), (6_000, 800))
    )
    names = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100")
    the_plan = replace(workload("cut", 0), nodes=2, programs=(first, second), gpu_names=names)
    outcome = simulate(the_plan, strike)
    assert not outcome.failure
    moved = [line for line in outcome.lines if "moves to H100, where it is 2.5 times" in line]
    assert any("attempt.stopping" in line for line in moved), outcome.lines[-40:]
    again = [line for line in outcome.lines if "attempt.started" in line and "attempt=2.2" in line]
    assert any("from step" in line for line in again), again


def workload(kind: str, count: int = 3) -> Plan:
    """A plan that is about one thing."""
    program = Program(
        at_ms=0, job_class="standard", gpus=2, ranks=1, replication="automatic", grace_ms=3_000,
        steps=30, step_ms=1_000, every=4, deaf=False, doomed=False, crash_at=0,
    )  # fmt: skip
    faults = tuple(Fault(8_000 + 9_000 * index, kind, 15_000) for index in range(count))
    return Plan(11, 3, (program,) * 3, faults)


def found(the_plan: Plan, sentence: str) -> None:
    """Some seed of this plan's fate breaks the rule in these words."""
    told = []
    for seed in range(11, 31):
        told.append(run(replace(the_plan, seed=seed)))
        if sentence in told[-1]:
            return
    raise AssertionError(f"no checker said {sentence!r}; they said {told}")


def test_unbroken_rules_pass_the_plans_of_the_broken_ones() -> None:
    for kind in ("cut", "agent_kill", "drain", "coordinator_kill", "unkillable"):
        assert not run(workload(kind))


def test_a_stale_commit_that_is_accepted_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(
        state: CoordinatorState, job: Job, attempt: Attempt, body: CheckpointProposed
    ) -> str:
        return ""

    monkeypatch.setattr(checkpoints, "_refuse_commit", accept)
    found(workload("cut"), "was committed by epoch")


def test_a_store_that_forgets_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = MemoryDisk.commit

    def forget(disk: MemoryDisk, records: list[Record]) -> None:
        commit(disk, [r for r in records if not (isinstance(r, PutJob) and r.job.id == 2)])

    monkeypatch.setattr(MemoryDisk, "commit", forget)
    found(workload("coordinator_kill"), "was acknowledged and is not on the disk")


def test_a_reply_before_its_commit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = coordinator_shell.CoordinatorShell._commit

    async def hasty(shell: coordinator_shell.CoordinatorShell, records: list[Record]) -> None:
        for number in [*shell._replies]:
            shell._act(cm.Reply(number, cm.Submitted(number, "")))
        await commit(shell, records)

    monkeypatch.setattr(coordinator_shell.CoordinatorShell, "_commit", hasty)
    found(workload("store_full"), "was acknowledged before it was durable")


def test_an_agent_that_restarts_its_trainers_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = agent_node._opened

    def sweep_clean(state: AgentState, now: object, event: object) -> None:
        opened(state, now, event)  # type: ignore[arg-type]
        state.commands += [KillProcess(attempt_id) for attempt_id in state.attempts]

    monkeypatch.setattr(agent_node, "_opened", sweep_clean)
    found(workload("agent_kill"), "though nobody asked for it")


def test_an_agent_that_forgets_what_runs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = NodeCore.handle

    def amnesia(core: NodeCore, now: object, event: object) -> object:
        if isinstance(event, Opened):
            event = replace(event, adopted=())
        return handle(core, now, event)  # type: ignore[arg-type]

    monkeypatch.setattr(NodeCore, "handle", amnesia)
    found(workload("agent_kill"), "which runs")


def test_processes_that_outlive_their_kill_untold_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stuck, "told", lambda state, event: None)
    found(workload("unkillable", 1), "never fired")


def test_a_gpu_freed_too_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = attempts.order_stop

    def release(state: CoordinatorState, now: object, attempt: Attempt) -> None:
        stop(state, now, attempt)  # type: ignore[arg-type]
        state.release_gpus(state.nodes[attempt.node], attempt.id)

    monkeypatch.setattr(attempts, "order_stop", release)
    found(workload("requeue"), "promised to")


def test_a_node_that_is_lost_while_it_stands_in_line_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forget(live: LiveNode, until_ms: int) -> None:
        live.expected_ms = until_ms

    monkeypatch.setattr(leases, "expect", forget)
    monkeypatch.setattr(leases, "resume", lambda state: None)
    assert "is declared lost and may come" in all_at_once(restarts=False).failure


def test_a_stale_copy_that_runs_on_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def spare(state: object, now: object, live: LiveNode, attempt_id: str) -> int:
        return 0

    monkeypatch.setattr(nodes, "_stop_stray", spare)
    found(workload("cut"), "is stale and has run on")


def test_a_job_that_nobody_tries_again_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgotten(state: CoordinatorState, now: object, job: Job, reason: str) -> None:
        """It stays as it is."""

    monkeypatch.setattr(outcomes, "requeue", forgotten)
    found(workload("drain", 1), "after the last fault")


def gangs_of_two(kind: str) -> Plan:
    alone = workload(kind)
    return replace(alone, programs=tuple(replace(one, gpus=1, ranks=2) for one in alone.programs))


def test_unbroken_rules_pass_the_plans_of_gangs() -> None:
    for kind in ("cut", "agent_kill", "trainer_kill", "power_off", "coordinator_kill"):
        assert not run(gangs_of_two(kind))


def test_parts_of_different_steps_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = checkpoints.commit
    before: dict[int, tuple[Part, ...]] = {}

    def mix(state: CoordinatorState, attempt: Attempt, new: Checkpoint) -> None:
        late = before.get(new.job_id, new.parts)
        before[new.job_id] = new.parts
        commit(state, attempt, replace(new, parts=late))

    monkeypatch.setattr(checkpoints, "commit", mix)
    found(gangs_of_two("cut"), "holds step")


def test_a_gang_started_anew_beside_what_is_left_of_it_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gangs, "ATTEMPT_LIVE", ())
    found(gangs_of_two("trainer_kill"), "at once")


def test_a_short_week_keeps_every_rule_and_says_what_it_cost() -> None:
    plan_of_week = week.week(seed=3, days=0.01, every_s=60)
    outcome, trainings, jobs = week.live(plan_of_week)
    assert not outcome.failure
    assert [training.phase for training in trainings] == [JobPhase.SUCCEEDED] * 4
    assert sum(training.attempts for training in trainings) > 4, "nothing was ever interrupted"
    assert all(training.took_ms > training.alone_ms for training in trainings)
    assert "every rule held" in week.report(plan_of_week, outcome, trainings, jobs)
