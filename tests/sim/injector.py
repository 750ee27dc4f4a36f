"""Strikes: each kind of fault, done to whoever is there at the moment.

A strike returns when its fault is over and has fired. `_until` tries again until somebody is there
to be struck; `_window` keeps a condition until its time is over and it has had an effect.
"""

import asyncio
from collections.abc import Awaitable, Callable

from coordinator.core import messages as cm
from coordinator.core.model import JobView, NodeView
from coordinator.core.phases import JOB_ENDED, JobPhase
from tests.sim.box import STUCK_PID
from tests.sim.faults import Fault, Plan
from tests.sim.hosts import AgentHost, CoordinatorHost
from tests.sim.link import Weather
from tests.sim.world import Outcome, World, simulate

RETRY_MS = 500
MOVE_MS = 12_000  # a window that has hit nothing for this long moves to another box
DEPOSED_MS_MAX = 20_000  # two leases: time enough to do harm
WINDOWS = {
    "half_open", "drop", "repeat", "reorder", "delay", "peer_cut", "journal_full", "store_full",
}  # fmt: skip


def run_plan(plan: Plan) -> Outcome:
    """A plan with its own faults, from beginning to end."""
    return simulate(plan, lambda world: Injector(world).strike())


def broken(plan: Plan, outcome: Outcome) -> str:
    """What the plan fails for: the rule that was broken, or its faults that had no effect."""
    kinds = dict.fromkeys(fault.kind for fault in plan.faults)
    missed = ", ".join(kind for kind in kinds if not outcome.fired[kind])
    return outcome.failure or (f"{missed} never fired" if missed else "")


class Injector:
    def __init__(self, world: World) -> None:
        self._world = world

    async def strike(self) -> None:
        """All of the plan's faults; returns when the last one is over."""
        async with asyncio.TaskGroup() as group:
            for fault in self._world.plan.faults:
                group.create_task(self._one(fault))

    async def _one(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_ms / 1000)
        if fault.kind in WINDOWS:
            await self._window(fault)
            return
        strike: Callable[[Fault], Awaitable[bool]] = getattr(self, f"_{fault.kind}")
        while True:
            if await strike(fault):
                return
            await asyncio.sleep(RETRY_MS / 1000)

    def _hit(self, fault: Fault, whom: str) -> None:
        self._world.trace(f"FAULT {fault.kind} on {whom} for {fault.duration_ms} ms")
        self._world.fired(fault.kind)

    async def _lasts(self, fault: Fault) -> None:
        await asyncio.sleep(fault.duration_ms / 1000)

    def _agent(self, with_trainer: bool = False) -> AgentHost | None:
        """One that no other fault has in its hands, rather one that has something to lose."""
        agents = [a for a in self._world.agents.values() if a.up and not a.busy]
        working = [agent for agent in agents if agent.box.trainers]
        choice = working or ([] if with_trainer else agents)
        return self._world.chance.choice(choice) if choice else None

    # --- agents and boxes -------------------------------------------------------------------------

    async def _agent_kill(self, fault: Fault) -> bool:
        agent = self._agent(with_trainer=True)
        if agent is None:
            return False
        self._hit(fault, agent.box.name)
        agent.busy = True
        agent.kill()
        await self._lasts(fault)
        agent.start()
        agent.busy = False
        return True

    async def _agent_upgrade(self, fault: Fault) -> bool:
        """A polite restart: goodbye first."""
        agent = self._agent(with_trainer=True)
        if agent is None or agent.shell is None or agent.task is None:
            return False
        self._hit(fault, agent.box.name)
        agent.busy = True
        task = agent.task
        agent.shell.leave(fault.duration_ms + 5_000)
        await asyncio.wait((task,), timeout=10)
        agent.kill()
        await self._lasts(fault)
        agent.start()
        agent.busy = False
        return True

    async def _agent_stall(self, fault: Fault) -> bool:
        """Suspended: its disk and its timers do not come back to it for a while."""
        agent = self._agent(with_trainer=True)
        if agent is None:
            return False
        self._hit(fault, agent.box.name)
        agent.busy = True
        agent.box.gate.clear()
        await self._lasts(fault)
        agent.box.gate.set()
        agent.busy = False
        return True

    async def _power(self, fault: Fault, disk_lost: bool, returns: bool) -> bool:
        agent = self._agent(with_trainer=True)
        if agent is None:
            return False
        self._hit(fault, agent.box.name)
        agent.busy = True
        agent.power_off()
        agent.gone = not returns
        if disk_lost:
            agent.box.lose_disk()
        await self._lasts(fault)
        if returns:
            agent.power_on()
            agent.busy = False
        return True

    async def _power_off(self, fault: Fault) -> bool:
        return await self._power(fault, disk_lost=False, returns=True)

    async def _disk_lost(self, fault: Fault) -> bool:
        return await self._power(fault, disk_lost=True, returns=True)

    async def _node_gone(self, fault: Fault) -> bool:
        return await self._power(fault, disk_lost=False, returns=False)

    async def _trainer_kill(self, fault: Fault) -> bool:
        agent = self._agent(with_trainer=True)
        if agent is None:
            return False
        trainer = self._world.chance.choice(list(agent.box.trainers.values()))
        self._hit(fault, trainer.attempt_id)
        trainer.end(None, 9)
        return True

    async def _gpu_error(self, fault: Fault) -> bool:
        """A GPU under a trainer has an error that only a reset mends, and later gets it."""
        agent = self._agent(with_trainer=True)
        if agent is None:
            return False
        used = [uuid for trainer in agent.box.trainers.values() for uuid in trainer.gpu_uuids]
        if not used:
            return False
        uuid = self._world.chance.choice(used)
        self._hit(fault, uuid)
        agent.box.break_gpu(uuid, agent.clock.unix_ms())
        await self._lasts(fault)
        agent.box.mend_gpu(uuid)
        return True

    async def _unkillable(self, fault: Fault) -> bool:
        """A trainer stands still for ever; its owner asks for another node, and the kill at the end
        does nothing. Its GPUs stay held until somebody does what `baton nodes` says of the node,
        whose agent may have been restarted since."""
        agent = self._agent(with_trainer=True)
        if agent is None:
            return False
        world, name = self._world, agent.box.name
        trainer = world.chance.choice(list(agent.box.trainers.values()))
        world.trace(f"FAULT {fault.kind} on {trainer.attempt_id}")
        agent.busy = True
        trainer.sink()
        world.checkers.requeued[trainer.job_id] = None
        told = f"(pid {STUCK_PID} of attempt {trainer.attempt_id}): cordon {name} and reboot it"
        while not await self._says(name, told):
            if not world.checkers.attempts[trainer.attempt_id].stop_reason:
                await world.insist(cm.RequeueJob(trainer.job_id))  # again, while it is out of reach
            await world.pause_ms(RETRY_MS, RETRY_MS)
        if world.chance.random() < 0.5:
            agent.kill()
            await self._lasts(fault)
            agent.start()
        while not await self._says(name, told):
            await world.pause_ms(RETRY_MS, RETRY_MS)
        world.fired(fault.kind)
        await world.insist(cm.CordonNode(name))
        agent.power_off()
        await self._lasts(fault)
        agent.power_on()
        while not await self._says(name, ""):
            await world.pause_ms(RETRY_MS, RETRY_MS)
        await world.insist(cm.UncordonNode(name))
        agent.busy = False
        return True

    async def _says(self, name: str, told: str) -> bool:
        """Whether an operator reads that of processes on the node; of none, if it is empty."""
        answer = await self._world.insist(cm.ListNodes())
        assert isinstance(answer, cm.NodePage)
        (said,) = (view.reason for view in answer.nodes if view.node.id == name)
        return told in said if told else "outlive their kill" not in said

    async def _clock_jump(self, fault: Fault) -> bool:
        clocks = [agent.clock for agent in self._world.agents.values()]
        clock = self._world.chance.choice([*clocks, self._world.coordinator.clock])
        clock.wall_jump_ms += self._world.chance.choice((-7_200_000, -90_000, 60_000, 86_400_000))
        self._hit(fault, f"a wall clock, now off by {clock.wall_jump_ms} ms")
        return True

    # --- checkpoints ------------------------------------------------------------------------------

    async def _corrupt(self, fault: Fault, everywhere: bool) -> bool:
        world = self._world
        open_jobs = [j.id for j in world.checkers.jobs.values() if j.phase not in JOB_ENDED]
        heads = [world.checkers.heads.get(job_id, "") for job_id in open_jobs]
        copies = []
        for digest in filter(None, heads):
            disks = [agent.box.disk for agent in world.agents.values()]
            found = [disk.copies[digest] for disk in disks if digest in disk.copies]
            if found and all(copy.intact for copy in found):
                copies.append((digest, found))
        if not copies:
            return False
        digest, found = world.chance.choice(copies)
        self._hit(fault, f"checkpoint {digest[:12]}")
        for copy in found if everywhere else [world.chance.choice(found)]:
            copy.intact = False
        return True

    async def _corrupt_one(self, fault: Fault) -> bool:
        return await self._corrupt(fault, everywhere=False)

    async def _corrupt_all(self, fault: Fault) -> bool:
        return await self._corrupt(fault, everywhere=True)

    # --- the coordinator --------------------------------------------------------------------------

    async def _coordinator_kill(self, fault: Fault) -> bool:
        host = self._world.coordinator
        if host.task is None:
            return False
        self._hit(fault, "the coordinator")
        host.kill()
        self._reset(host)
        await self._lasts(fault)
        await host.start()
        return True

    async def _coordinator_stall(self, fault: Fault) -> bool:
        host = self._world.coordinator
        if host.task is None or not host.gate.is_set():
            return False
        self._hit(fault, "the coordinator")
        host.stall()
        await self._lasts(fault)
        host.resume()
        return True

    async def _herd(self, fault: Fault) -> bool:
        """It restarts, and all come back at once, behind thousands of others."""
        host, counts = self._world.coordinator, self._world.counts
        if host.task is None or not host.gate.is_set():
            return False
        self._world.trace(f"FAULT {fault.kind} on the coordinator, {fault.duration_ms} ms long")
        before = counts[fault.kind]
        host.kill()
        self._reset(host)
        await host.start()
        host.crowd(fault.duration_ms)
        await self._lasts(fault)
        return counts[fault.kind] > before

    async def _takeover(self, fault: Fault) -> bool:
        """A second coordinator becomes leader while the first one sleeps, and then wakes up."""
        world, old = self._world, self._world.coordinator
        if old.task is None or not old.gate.is_set():
            return False
        self._hit(fault, "the coordinator")
        old.stall()
        world.coordinator = CoordinatorHost(world, old.disk)
        await world.coordinator.start()
        await self._lasts(fault)
        world.deposed.append(old)
        old.resume()
        # Its next commit stops it. One that has nothing to write, whoever looks after it.
        ends_ms = world.now_ms() + DEPOSED_MS_MAX
        await _until(lambda: old.task is None or world.now_ms() > ends_ms)
        old.kill()
        world.deposed.remove(old)
        self._reset(old)
        return True

    def _reset(self, host: CoordinatorHost) -> None:
        for agent in self._world.agents.values():
            for connection in agent.connections:
                if connection.listener is host:
                    connection.coordinator_died()

    async def _store_unsure(self, fault: Fault) -> bool:
        """A commit that took effect and says that it did not."""
        host, counts = self._world.coordinator, self._world.counts
        before = counts["store_unsure"]
        host.unsure = True
        await _until(lambda: counts["store_unsure"] > before)
        return True

    # --- links ------------------------------------------------------------------------------------

    async def _cut(self, fault: Fault) -> bool:
        agent = self._agent()
        if agent is None or agent.weather.cut or not agent.connected:
            return False
        self._hit(fault, agent.box.name)
        agent.weather.cut = True
        for connection in agent.connections:
            connection.cut()
        await self._lasts(fault)
        agent.weather.cut = False
        return True

    async def _window(self, fault: Fault) -> None:
        """Keeps a condition until its time is over and it has done something."""
        world = self._world
        before, left_ms = world.counts[fault.kind], fault.duration_ms
        while True:
            agent = self._agent()
            if agent is None:
                await asyncio.sleep(RETRY_MS / 1000)
                continue
            world.trace(f"FAULT {fault.kind} on {agent.box.name} for {left_ms} ms")
            undo = self._set(fault.kind, agent)
            await asyncio.sleep(max(left_ms, MOVE_MS) / 1000 if left_ms > 0 else MOVE_MS / 1000)
            undo()
            if world.counts[fault.kind] > before:
                return
            left_ms = 0

    def _set(self, kind: str, agent: AgentHost) -> Callable[[], None]:
        """Begin a condition; returns what ends it."""
        world, weather = self._world, agent.weather
        ratio = world.chance.uniform(0.05, 0.5)
        if kind == "store_full":
            return _hold(world.coordinator, "full", True)
        if kind == "journal_full":
            return _hold(agent.box.disk, "full", True)
        if kind == "peer_cut":
            return _hold(agent, "peers_cut", True)
        if kind == "half_open":
            return _hold(weather, world.chance.choice(("up_silent", "down_silent")), True)
        if kind == "delay":
            return _hold(weather, "delay_ms_max", world.chance.randint(50, 3_000))
        return _hold(weather, f"{kind}_ratio", ratio)

    # --- people -----------------------------------------------------------------------------------

    def _job(self, *phases: JobPhase) -> int | None:
        jobs = [job.id for job in self._world.checkers.jobs.values() if job.phase in phases]
        return self._world.chance.choice(jobs) if jobs else None

    async def _drain(self, fault: Fault) -> bool:
        agent = self._agent()
        if agent is None:
            return False
        name = agent.box.name
        answer = await self._world.insist(cm.DrainNode(name))
        if not isinstance(answer, NodeView):
            return False
        self._hit(fault, name)
        await self._lasts(fault)
        await self._world.insist(cm.UncordonNode(name))
        return True

    async def _on_job(self, fault: Fault, body: cm.RequestBody | None) -> bool:
        if body is None or not isinstance(await self._world.insist(body), JobView):
            return False
        self._hit(fault, str(body))
        return True

    async def _cancel(self, fault: Fault) -> bool:
        job_id = self._job(JobPhase.ACTIVE, JobPhase.QUEUED)
        return await self._on_job(fault, None if job_id is None else cm.CancelJob(job_id))

    async def _requeue(self, fault: Fault) -> bool:
        job_id = self._job(JobPhase.ACTIVE)
        if job_id is not None:
            self._world.checkers.requeued[job_id] = None  # also if it has ended meanwhile
        return await self._on_job(fault, None if job_id is None else cm.RequeueJob(job_id))

    async def _hold(self, fault: Fault) -> bool:
        job_id = self._job(JobPhase.ACTIVE, JobPhase.QUEUED)
        if job_id is None or not await self._on_job(fault, cm.HoldJob(job_id)):
            return False
        await self._lasts(fault)
        await self._world.insist(cm.ReleaseJob(job_id))
        return True

    async def _resubmit(self, fault: Fault) -> bool:
        """A client that asks again though it has its answer."""
        world = self._world
        if not world.checkers.submitted_ids:
            return False
        request_id = world.chance.choice(list(world.checkers.submitted_ids))
        self._hit(fault, request_id)
        await world.submit(world.chance.choice(world.plan.programs), request_id)
        return True

    async def _lost_reply(self, fault: Fault) -> bool:
        before = self._world.counts["lost_reply"]
        self._world.lost_replies += 1
        await _until(lambda: self._world.counts["lost_reply"] > before)
        return True


def _hold(thing: object, name: str, value: object) -> Callable[[], None]:
    setattr(thing, name, value)
    return lambda: setattr(thing, name, _quiet(name))


def _quiet(name: str) -> object:
    """The value of a condition when there is none."""
    return getattr(Weather(), name) if hasattr(Weather(), name) else False


async def _until(happened: Callable[[], bool]) -> None:
    while True:
        if happened():
            return
        await asyncio.sleep(RETRY_MS / 1000)
