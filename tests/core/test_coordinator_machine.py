"""The coordinator's core against random histories of a small fleet that fails in every way we know.

Problem: scenarios test the orders of events that somebody thought of. Here hypothesis chooses:
submissions and owners' wishes, operators' wishes, trainers that save, finish and crash, nodes that
die, lose their disk, are cut off and come back, messages lost, repeated and out of turn, and a
coordinator that is killed with and without its last batch. After every step the invariants are
looked at from outside: from the records that were written, from what the nodes physically run, and
from a model of each job's history.

The nodes are those of `coordinator_fleet.py`. At the end all faults stop; then every job must end.
Safety and liveness are named so. `HYPOTHESIS_PROFILE=explore pytest <this file>` searches further.
"""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from coordinator.core import costs, decisions
from coordinator.core.allocation import Aims
from coordinator.core.arrays import parse
from coordinator.core.capacity_model import Power
from coordinator.core.coordinator import Coordinator
from coordinator.core.messages import (
    AgentMessage,
    AppendEvent,
    AttemptExited,
    AttemptMilestone,
    CancelJob,
    CloseSession,
    CordonNode,
    DrainNode,
    Effect,
    Event,
    FromAgent,
    Goodbye,
    HoldJob,
    PutCheckpoint,
    ReleaseJob,
    Request,
    RequestBody,
    RequeueJob,
    Send,
    SessionClosed,
    Submit,
    Tick,
    UncordonNode,
)
from coordinator.core.model import Job, JobClass, JobSpec, Replication
from coordinator.core.node_requests import ForgetNode
from coordinator.core.phases import (
    ATTEMPT_ENDED,
    ATTEMPT_LIVE,
    JOB_ENDED,
    AttemptPhase,
    GpuPhase,
    JobPhase,
    NodePhase,
)
from coordinator.core.state import Options, State
from coordinator.core.validate import refuse_fleet
from tests.core.coordinator_checks import (
    HEAD_MOVES,
    History,
    Moves,
    check_arrays,
    check_gang,
    check_gpu,
    check_guaranteed,
    check_index,
    check_promises,
    check_store,
)
from tests.core.coordinator_fleet import HOST, FakeNode, Run, numbers
from tests.core.coordinator_harness import GIGABYTE, Rig, gpus_of
from tests.core.slow_weighing import SlowWeighing

pytestmark = pytest.mark.long

FLEET = {"n1": "2xH100:80", "n2": "2xA100:40", "n3": "1xH100:80", "n4": ""}
TICK_MS = 500
# Back-off reaches a minute, a grace of the model none; an hour of virtual time is patience enough.
HEALED_TICKS_MAX = 7_200

NODES = st.sampled_from(sorted(FLEET))
JOBS_MAX = 10
# Who has run for two seconds may be moved; `test_moves_machine.py` has many who are.
OPTIONS = Options(aims=Aims(run_s_min=2.0), moves_per_hour=4)
JOBS = st.integers(1, JOBS_MAX)
SPECS = st.builds(
    JobSpec,
    command=st.just(("train",)),
    job_class=st.sampled_from(JobClass),
    gpus=st.integers(0, 2),
    memory_bytes=st.sampled_from([0, 0, 20 * GIGABYTE]),
    max_restarts=st.integers(0, 2),
    replication=st.sampled_from(Replication),
    hold=st.sampled_from([False, False, False, True]),
    ranks=st.sampled_from([1, 1, 2, 3]),
    grace_ms=st.sampled_from([2_000, 120_000]),
)
SHARES = st.sampled_from([8 * GIGABYTE, 20 * GIGABYTE, 70 * GIGABYTE])
SHARED = {"shared_gpu_memory_bytes": SHARES, "share_automatic": st.sampled_from([False, True])}
SHARING_SPECS = st.builds(replace, SPECS, gpus=st.just(1), ranks=st.just(1), **SHARED)
ARRAYS = st.sampled_from(["", "", "", "1-2", "0-2%1", "5-8%2"])
_SPECS = st.one_of(SPECS, SPECS, SHARING_SPECS)
ANY_SPECS = st.builds(replace, _SPECS, array=ARRAYS)


class Fleet(SlowWeighing):
    def __init__(self) -> None:
        super().__init__()
        self.rig = self.new_rig()
        self.moves = Moves(OPTIONS.moves_per_hour)
        self.nodes = self.new_nodes()
        self.sessions = 0
        self.histories: dict[int, History] = {}
        self.counted: dict[str, int] = {}
        self.committed: dict[str, None] = {}
        self.corrupt: dict[str, None] = {}
        self.saved: dict[str, tuple[int, int, int]] = {}
        for node in self.nodes.values():
            self.dial(node)
            self.settle(node)

    def new_rig(self) -> Rig:
        return Rig(OPTIONS)

    def new_nodes(self) -> dict[str, FakeNode]:
        return {name: FakeNode(name, gpus_of(name, text)) for name, text in FLEET.items()}

    # --- the world's mechanics --------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self.rig.core.state

    def apply(self, event: Event) -> None:
        effects = self.rig.handle(event)
        self.judge(effects)
        for effect in effects:
            if isinstance(effect, Send | CloseSession):
                for node in self.nodes.values():
                    if node.session == effect.session:
                        if isinstance(effect, Send):
                            node.downward.append(effect.order)
                        else:
                            node.cut()

    def ask(self, body: RequestBody) -> None:
        self.apply(Request(1, body))

    def dial(self, node: FakeNode) -> None:
        self.sessions += 1
        node.dial(self.sessions)

    def deliver_up(self, node: FakeNode, index: int = 0, keep: bool = False) -> None:
        if node.session is not None and index < len(node.upward):
            message: AgentMessage = node.upward[index]
            if not keep:
                del node.upward[index]
            self.apply(FromAgent(node.session, message))

    def deliver_down(self, node: FakeNode, index: int = 0, keep: bool = False) -> None:
        if node.session is not None and index < len(node.downward):
            order = node.downward[index]
            if not keep:
                del node.downward[index]
            node.obey(order, self.holds)

    def holds(self, name: str, digest: str) -> bool:
        return digest in self.nodes[name].disk and digest not in self.corrupt

    def settle(self, node: FakeNode) -> None:
        while node.upward or node.downward:
            self.deliver_up(node)
            self.deliver_down(node)

    def run_of(self, index: int) -> tuple[FakeNode, Run] | None:
        living = [(node, run) for node in self.nodes.values() for run in node.living()]
        return living[index % len(living)] if living else None

    def close(self, session: int | None, message: AgentMessage) -> None:
        if session is not None:
            self.apply(FromAgent(session, message))

    # --- what may happen --------------------------------------------------------------------------

    @initialize(specs=st.lists(ANY_SPECS, min_size=1, max_size=5))
    def begin(self, specs: list[JobSpec]) -> None:
        for spec in specs:
            self.submit(spec, "", prompt=True)

    @rule(spec=ANY_SPECS, kind=st.sampled_from(["", "H100", "A100"]), prompt=st.booleans())
    def submit(self, spec: JobSpec, kind: str, prompt: bool) -> None:
        """Each job twice, since the client asks again; `prompt`: the orders arrive at once."""
        last = self.state.last_job_id
        if last >= JOBS_MAX or not self.state.nodes:  # a fleet of nobody refuses nothing
            return
        spec = replace(spec, gpu_types=(kind,) if kind and spec.gpus else ())
        count = len(parse(spec.array or "0").indices)
        # What was forgotten and has not come back is no place for anybody.
        known = [node for node in self.nodes.values() if node.name in self.state.nodes]
        if refuse_fleet(spec, [(HOST, node.gpus) for node in known]):
            self.ask(Submit(spec, request_id=f"r{last}"))
            assert self.state.last_job_id == last, "accepted, and can never run"
            return
        for _ in range(2):
            self.ask(Submit(spec, request_id=f"r{last}"))
            assert self.state.last_job_id == last + count, "an id used twice, or a job made twice"
        if prompt:
            self.flow()

    @rule(
        job=JOBS,
        wish=st.sampled_from([CancelJob, HoldJob, ReleaseJob, RequeueJob]),
        whole=st.sampled_from([False, False, True]),
    )
    def wish(
        self, job: int, wish: type[CancelJob | HoldJob | ReleaseJob | RequeueJob], whole: bool
    ) -> None:
        self.ask(wish(job, array=whole))
        self.ask(RequeueJob(job, abandon_unreachable_checkpoints=True))

    @rule(
        name=NODES, wish=st.sampled_from([CordonNode, DrainNode, *2 * [UncordonNode], ForgetNode])
    )
    def operate(self, name: str, wish: "type[CordonNode | DrainNode | ForgetNode]") -> None:
        self.ask(wish(name))

    @rule(seconds=st.sampled_from([1, 1, 2, 4, 9]), flowing=st.sampled_from([True, True, False]))
    def pass_time(self, seconds: int, flowing: bool) -> None:
        for tick in range(seconds * 1_000 // TICK_MS):
            self.rig.now_ms += TICK_MS
            if flowing and tick % 2 == 0:
                self.flow()
            self.apply(Tick())

    @rule()
    def flow(self) -> None:
        for node in self.nodes.values():
            node.beat()
            self.settle(node)

    @rule(
        name=NODES,
        index=st.integers(0, 2),
        up=st.booleans(),
        fate=st.sampled_from(["take", "take", "repeat", "lose"]),
    )
    def deliver_one(self, name: str, index: int, up: bool, fate: str) -> None:
        """In turn or out of turn, once or again later, or never."""
        node = self.nodes[name]
        if fate != "lose":
            (self.deliver_up if up else self.deliver_down)(node, index, fate == "repeat")
        elif up:
            del node.upward[index : index + 1]
        else:
            del node.downward[index : index + 1]

    @rule(
        index=st.integers(0, 7), count=st.integers(1, 4), copied=st.booleans(), told=st.booleans()
    )
    def save(self, index: int, count: int, copied: bool, told: bool) -> None:
        found = self.run_of(index)
        if found is not None:
            node, run = found
            for _ in range(count):
                self._save(node, run, copied)
            if told:
                self.settle(node)

    @rule(index=st.integers(0, 7), count=st.integers(1, 2), copied=st.booleans())
    def save_together(self, index: int, count: int, copied: bool) -> None:
        """All ranks of a gang, each at its own step."""
        found = self.run_of(index)
        if found is not None:
            mine = numbers(found[1].attempt)[:2]
            for node in self.nodes.values():
                for run in [run for run in node.living() if numbers(run.attempt)[:2] == mine]:
                    for _ in range(count):
                        self._save(node, run, copied)
                self.settle(node)

    def _save(self, node: FakeNode, run: Run, copied: bool) -> None:
        node.save(run, self.nodes.get(run.target) if copied else None)
        _, epoch, rank = numbers(run.attempt)
        self.saved[run.head] = (epoch, rank, run.step)

    @rule(index=st.integers(0, 7), code=st.sampled_from([0, 1, 75, None]), told=st.booleans())
    def exit(self, index: int, code: int | None, told: bool) -> None:
        found = self.run_of(index)
        if found is not None:
            node, run = found
            node.report(run.attempt, AttemptMilestone("leaving"))
            node.end(run, AttemptExited(code, 9 if code is None else None))
            if told:
                self.settle(node)

    @rule(
        name=NODES,
        fate=st.sampled_from(["agent", "agent", "power", "wipe"]),
        seen=st.booleans(),
        seconds=st.sampled_from([0, 0, 4, 9]),
    )
    def fail(self, name: str, fate: str, seen: bool, seconds: int) -> None:
        """`seen`: the connection closes; otherwise there is only silence, and perhaps time."""
        node, session = self.nodes[name], self.nodes[name].session
        {"agent": node.cut, "power": node.die, "wipe": node.wipe}[fate]()
        if seen:
            self.close(session, SessionClosed())
        self.pass_time(seconds, flowing=True)

    @rule(name=NODES, prompt=st.booleans())
    def come_back(self, name: str, prompt: bool) -> None:
        self.dial(self.nodes[name])
        if prompt:
            self.settle(self.nodes[name])

    @rule(name=NODES, kind=st.sampled_from(["rot", "sleep", "leave", "away", "restart", "crash"]))
    def calamity(self, name: str, kind: str) -> None:
        node, session = self.nodes[name], self.nodes[name].session
        if kind == "rot":  # the newest checkpoint on this disk verifies nowhere any more
            self.corrupt.update(dict.fromkeys(list(node.disk)[-1:]))
        elif kind == "sleep":  # the coordinator's machine is suspended
            self.rig.now_ms += 20_000
            self.apply(Tick())
        elif kind in ("leave", "away"):
            node.cut()
            self.close(session, Goodbye(30_000 if kind == "away" else None))
        else:
            self.check_determinism()
            if kind == "crash" and session is not None and node.upward:
                self.rig.crash_on(FromAgent(session, node.upward[0]))
            else:
                self.rig.restart()
            self.moves.restarted()
            for other in self.nodes.values():
                other.cut()
            self.apply(Tick())

    # --- safety -----------------------------------------------------------------------------------

    def judge(self, effects: list[Effect]) -> None:
        """Of what was just written: one history per job, made by the highest epoch alone."""
        told = {(e.event.job_id, e.event.name): True for e in effects if isinstance(e, AppendEvent)}
        self.moves.judge(effects, self.rig.disk.jobs, self.rig.now_ms)
        for effect in effects:
            if isinstance(effect, PutCheckpoint) and effect.checkpoint.digest not in self.committed:
                new = effect.checkpoint
                self.committed[new.digest] = None
                history = self.histories[new.job_id]
                assert new.epoch == self.rig.disk.jobs[new.job_id].epoch, "a stale epoch committed"
                assert new.parent == history.head, "two histories"
                assert new.step >= history.head_step, "progress went back"
                ranks = self.rig.disk.jobs[new.job_id].spec.ranks
                for rank, piece in enumerate(new.pieces):
                    said = self.saved[piece.digest]
                    assert said == (new.epoch, rank, new.step), "not a common step"
                assert len(new.pieces) == ranks, "a part is missing"
                history.head, history.head_step = new.digest, new.step
        for node in self.rig.disk.nodes.values():
            counted = self.counted.get(node.journal_id, 0)
            assert node.acknowledged >= counted, "an event was counted twice"
        self.counted = {n.journal_id: n.acknowledged for n in self.rig.disk.nodes.values()}
        for job in self.rig.disk.jobs.values():
            history = self.histories.setdefault(job.id, History())
            assert job.epoch >= history.epoch, "an epoch went back"
            history.epoch = job.epoch
            if job.head != history.head:
                said_so = any((job.id, name) in told for name in HEAD_MOVES)
                assert said_so, f"job {job.id} lost its head and nobody was told"
                assert job.head == "" or job.head in self.committed
                history.head, history.head_step = job.head, job.head_step

    @invariant()
    def phases_agree(self) -> None:
        state = self.state
        check_index(state)
        for job in state.jobs.values():
            gang = state.gang(job)
            alive = any(rank.phase in ATTEMPT_LIVE for rank in gang)
            assert alive == (job.phase in (JobPhase.ACTIVE, JobPhase.CANCELLING)), job
            if job.phase is not JobPhase.QUEUED and not alive:
                assert all(rank.phase in ATTEMPT_ENDED for rank in gang), job
            for old in state.attempts_of(job.id):
                past = old.epoch < job.epoch
                assert not past or old.phase in ATTEMPT_ENDED, "two attempts of one job"
            good = state.good_checkpoints(job)
            assert (good[0].digest if good else "") == job.head

    @invariant()
    def no_more_trials_have_a_place_than_was_asked_for(self) -> None:
        check_arrays(self.state, self.rig.disk.jobs.values())

    @invariant()
    def a_gang_runs_whole_or_is_being_ended(self) -> None:
        for job in self.state.jobs.values():
            check_gang(self.state, job)

    @invariant()
    def no_gpu_is_promised_twice(self) -> None:
        check_promises(self.state)
        for live in self.state.nodes.values():
            for attempt_id in live.attempts:
                attempt = self.state.attempts[attempt_id]
                assert attempt.phase not in ATTEMPT_ENDED, "an ended attempt holds something"
                if live.phase is NodePhase.LOST:
                    assert attempt.phase is AttemptPhase.UNREACHABLE, "its job waits for nobody"
            for uuid in live.gpus:
                check_gpu(self.state, live, uuid)

    @invariant()
    def what_runs_is_not_free(self) -> None:
        for name, node in self.nodes.items():
            live = self.state.nodes.get(name)
            if live is None or live.session is None or live.session != node.session:
                continue
            for run in node.living():
                if run.attempt in live.attempts or run.attempt in live.strays:
                    for uuid in run.gpu_uuids:
                        assert live.gpus[uuid].phase is GpuPhase.HELD, f"{uuid} runs {run.attempt}"

    @invariant()
    def every_wait_has_a_reason(self) -> None:
        for job_id in self.state.queued:
            job = self.state.jobs[job_id]
            assert self.state.waits.get(job_id), "queued, and nobody says why"
            assert self.state.wait_reason(job) == self.state.waits[job_id]

    @invariant()
    def no_guaranteed_job_waits_for_a_lower_one(self) -> None:
        check_guaranteed(self.state, self.rig.now_ms)

    @invariant()
    def the_store_tells_the_same(self) -> None:
        fresh = Coordinator(self.rig.options)
        fresh.load(self.rig.disk.snapshot(), self.rig.now_ms)
        check_store(self.state, fresh.state)

    def check_determinism(self) -> None:
        for then, again in self.rig.replayed():
            assert then == again

    # --- liveness ---------------------------------------------------------------------------------

    def teardown(self) -> None:
        """All faults stop, everybody is back and nobody is held: in the end every job has ended."""
        self.check_determinism()
        for node in self.nodes.values():
            self.dial(node)
            self.settle(node)
        asked = [node.name for node in self.nodes.values() if not self._uncordon(node.name)]
        for _ in range(HEALED_TICKS_MAX):
            asked = [name for name in asked if not self._uncordon(name)]
            if all(job.phase in JOB_ENDED for job in self.state.jobs.values()) and not any(
                node.living() for node in self.nodes.values()
            ):
                break
            self.rig.now_ms += TICK_MS
            for job in list(self.state.jobs.values()):
                self._let_go_on(job)
            for node in self.nodes.values():
                if node.session is None:
                    self.dial(node)
                for run in node.living():
                    node.end(run, AttemptExited(75 if run.stopping else 0))
                node.beat()
                self.settle(node)
            self.apply(Tick())
        left = [job for job in self.state.jobs.values() if job.phase not in JOB_ENDED]
        assert not left, [(job, self.state.wait_reason(job)) for job in left]
        for live in self.state.nodes.values():
            assert not live.attempts
            assert not live.strays
            assert all(gpu.phase is GpuPhase.FREE for gpu in live.gpus.values())

    def _uncordon(self, name: str) -> bool:
        self.ask(UncordonNode(name))  # refused while it is being switched off
        return self.state.nodes[name].node.power.phase is not Power.STOPPING

    def _let_go_on(self, job: Job) -> None:
        if job.intent.value == "hold":
            self.ask(ReleaseJob(job.id))
        good = self.state.good_checkpoints(job)
        gone = good and not all(piece.replicas for piece in good[0].pieces)
        if job.phase is JobPhase.QUEUED and gone:
            self.ask(RequeueJob(job.id, abandon_unreachable_checkpoints=True))


def test_every_invariant_holds_in_every_history() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "RESTART_S_DEFAULT", 0.1)
        patch.setattr(decisions, "ANSWER_MS_MAX", 5_000)  # who hangs may answer yet
        run_state_machine_as_test(Fleet, settings=settings(max_examples=60, stateful_step_count=50))
