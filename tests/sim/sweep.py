"""What takes time, looked at once a virtual second.

A stale copy must stop soon after its agent can hear; a queued job must say why; no guaranteed job
may wait behind a spare one; nothing may grow without bound; and what a core believes must be what
its disk holds whenever nothing is under way.
"""

import asyncio
from typing import TYPE_CHECKING

import msgspec

from coordinator.core.checkpoints import head_within_reach
from coordinator.core.model import JobClass
from coordinator.core.phases import ATTEMPT_ENDED, AttemptPhase, NodePhase

if TYPE_CHECKING:
    from tests.sim.hosts import AgentHost
    from tests.sim.world import World

# From the moment its agent can hear: five seconds of back-off, a hello, an order each heartbeat.
STALE_MS_MAX = 15_000
REASON_MS_MAX = 2_000  # a batch or two
DISPLACED_MS_MAX = (
    20_000  # an order to stop, repeated each heartbeat; the leaving itself may take longer
)
# Ten jobs on four boxes; the real bounds are far above.
WAITING_MAX = 4_000
SPOOL_MAX = 500


class Sweep:
    def __init__(self, world: "World") -> None:
        self._world = world
        self._since_ms: dict[tuple[str, str], int] = {}
        self._seen: dict[tuple[str, str], None] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._seen = {}
            self._bounds()
            self._durable()
            self._queue()
            for agent in self._world.agents.values():
                self._stale(agent)
            self._since_ms = {key: at for key, at in self._since_ms.items() if key in self._seen}

    def _lasts(self, what: str, whom: str) -> int:
        """For how long, in ms, this has been so in every sweep."""
        key, now_ms = (what, whom), self._world.now_ms()
        self._seen[key] = None
        return now_ms - self._since_ms.setdefault(key, now_ms)

    def _calm(self) -> bool:
        """The coordinator does its work."""
        host = self._world.coordinator
        return host.core is not None and host.gate.is_set() and not host.full

    def _in_line(self, node: str) -> bool:
        """It has said hello, and is neither heard nor told anything until its turn comes."""
        core = self._world.coordinator.core
        return core is not None and node in core.state.admission.line

    def _stale(self, agent: "AgentHost") -> None:
        world = self._world
        healthy = self._calm() and agent.up and agent.weather.clear and not agent.box.disk.full
        healthy = healthy and agent.box.gate.is_set() and not world.deposed
        if not healthy or not agent.connected or self._in_line(agent.box.name):
            return
        for attempt_id, trainer in agent.box.trainers.items():
            if trainer.stuck:
                continue  # nobody could stop it
            attempt = world.checkers.attempts[attempt_id]
            if attempt.phase in ATTEMPT_ENDED:
                lasts_ms = self._lasts("stale", attempt_id)
                if lasts_ms > STALE_MS_MAX:
                    world.fail(f"{attempt_id} is stale and has run on for {lasts_ms} ms")

    def _queue(self) -> None:
        world = self._world
        core = world.coordinator.core
        if core is None or not self._calm():
            return
        spares = self._spares()
        for job_id in core.state.queued:
            job = core.state.jobs[job_id]
            if not core.state.wait_reason(job):
                if self._lasts("mute", str(job_id)) > REASON_MS_MAX:
                    world.fail(f"job {job_id} waits and nobody says why")
            blocked = job_id in core.state.eligible_ms or head_within_reach(core.state, job)
            if job.spec.job_class is not JobClass.GUARANTEED or blocked or not job.spec.gpus:
                continue
            for spare in spares:
                lasts_ms = self._lasts("behind", f"{job_id} {spare}")
                if lasts_ms > DISPLACED_MS_MAX:
                    world.fail(f"guaranteed job {job_id} waits {lasts_ms} ms for spare {spare}")

    def _spares(self) -> list[str]:
        """Spare attempts that run and that nobody has asked to leave, alone on enough GPUs."""
        core = self._world.coordinator.core
        assert core is not None
        state = core.state
        open_nodes = self._world.open_nodes()
        found = []
        for live in state.nodes.values():
            if live.phase is not NodePhase.UP or live.node.id not in open_nodes:
                continue
            tenants = [state.attempts[attempt_id] for attempt_id in live.attempts]
            tenants = [attempt for attempt in tenants if attempt.gpu_uuids]
            if live.strays or any(
                state.jobs[attempt.job_id].spec.job_class is not JobClass.SPARE
                for attempt in tenants
            ):
                continue
            found += [a.id for a in tenants if a.phase is AttemptPhase.RUNNING]
        return found

    def _bounds(self) -> None:
        world = self._world
        shell, core = world.coordinator.shell, world.coordinator.core
        counts: dict[str, int] = {}
        if shell is not None and core is not None:
            counts["the coordinator's inbox"] = len(shell._inbox)
            counts["the coordinator's peers"] = len(shell._peers)
            counts["the coordinator's replies"] = len(shell._replies)
            counts["the coordinator's sessions"] = len(core.state.sessions)
        for name, agent in world.agents.items():
            if agent.shell is not None and agent.core is not None:
                counts[f"{name}'s inbox"] = len(agent.shell._inbox)
                counts[f"{name}'s outbox"] = len(agent.shell._outbox)
                counts[f"{name}'s tasks"] = len(agent.shell._tasks)
                if len(agent.core.state.spool) > SPOOL_MAX:
                    world.fail(f"{name}'s spool holds {len(agent.core.state.spool)}")
        for what, count in counts.items():
            if count > WAITING_MAX:
                world.fail(f"{what} holds {count}")

    def _durable(self) -> None:
        """Between batches a core knows exactly what is on its disk."""
        world, host = self._world, self._world.coordinator
        if host.core is not None and host.store is not None and not host.store.busy:
            for job_id, job in host.core.state.jobs.items():
                written = world.checkers.jobs.get(job_id)
                if written is not job and written != job:
                    world.fail(f"job {job_id} is {job} and {written} on disk")
        for name, agent in world.agents.items():
            core, journal = agent.core, agent.journal
            if core is None or journal is None or journal.busy:
                continue
            documents = {
                attempt_id: msgspec.json.encode(live.record)
                for attempt_id, live in core.state.attempts.items()
            }
            if documents != agent.box.disk.attempts:
                world.fail(f"{name} knows attempts that its journal does not")
            heard = 0 if core.state.dropped is None else core.state.dropped.sequence
            if list(core.state.spool) != [n for n in sorted(agent.box.disk.spool) if n > heard]:
                world.fail(f"{name} has events that its journal does not")
