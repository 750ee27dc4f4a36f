"""One run: a coordinator, three or four boxes, users, faults, and the wait for a good end.

How: everything lives on one `VirtualLoop` and draws from one generator seeded by the plan, so the
seed is the run. Users submit the plan's jobs and keep asking until they have an answer. Faults
strike (`injector.py`). Then everything heals, and every job must end within a bounded time: that is
the liveness half; the safety half are the `Checkers`, which watch all along.

A run is told as lines of text with virtual milliseconds; its hash is the run's fingerprint.
"""

import asyncio
import hashlib
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from coordinator.core import messages as cm
from coordinator.core.model import JobClass, JobSpec, JobView, Replication
from coordinator.core.phases import JOB_ENDED, JobPhase, NodeIntent
from coordinator.shell import Unavailable
from coordinator.store.memory import MemoryDisk
from tests.sim.box import Box
from tests.sim.checkers import Checkers, digests
from tests.sim.faults import Plan, Program, program
from tests.sim.gang import Gang
from tests.sim.hosts import AgentHost, CoordinatorHost
from tests.sim.link import Weather
from tests.sim.loop import VirtualLoop
from tests.sim.sweep import Sweep

GPUS_PER_NODE = 2
# After the last fault: leases, a settle of two minutes for a copy that cannot be made, a minute of
# retry back-off, and then the jobs themselves, one after the other on what is left of the fleet.
HEALED_MS_MAX = 900_000
OPEN_JOBS_MAX = 9


class Violation(AssertionError):
    """A rule was broken; the text says which, by whom and when."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`fingerprint` is the hash of the trace; `virtual_ms` how long the run was to itself."""

    seed: int
    failure: str
    fingerprint: str
    virtual_ms: int
    fired: Counter[str]
    lines: tuple[str, ...]


class World:
    """Implements `hosts.Around`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._loop = asyncio.get_running_loop()
        self.chance = random.Random(plan.seed ^ 0x5EED)
        self.checkers = Checkers(self.fail, self.intact)
        self.counts: Counter[str] = Counter()
        self.lines: list[str] = []
        self.failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.coordinator = CoordinatorHost(self, MemoryDisk())
        self.deposed: list[CoordinatorHost] = []
        self.agents: dict[str, AgentHost] = {}
        for number in range(1, plan.nodes + 1):
            gpu_name = plan.gpu_names[number % len(plan.gpu_names)]
            box = Box(f"n{number}", GPUS_PER_NODE, self, gpu_name)
            self.agents[box.name] = AgentHost(box, self, self.chance.uniform(0.98, 1.02))
        self._gangs: dict[tuple[int, int], Gang] = {}
        self.lost_replies = 0
        self._requests = 0

    # --- what boxes, links and hosts ask ----------------------------------------------------------

    def now_ms(self) -> int:
        return int(self._loop.time() * 1000)

    async def pause_ms(self, low_ms: int, high_ms: int) -> None:
        await asyncio.sleep(self.chance.randint(low_ms, high_ms) / 1000)

    def trace(self, line: str) -> None:
        self.lines.append(f"{self.now_ms():>7} {line}")

    def fired(self, kind: str) -> None:
        self.counts[kind] += 1

    def gang(self, job_id: int, epoch: int, world_size: int) -> Gang:
        return self._gangs.setdefault((job_id, epoch), Gang(world_size, self.chance))

    def peer(self, here: str, there: str) -> Box | None:
        agent = self.agents.get(there)
        if agent is None or not agent.up:
            return None
        if agent.peers_cut or self.agents[here].peers_cut:
            self.fired("peer_cut")
            return None
        return agent.box

    def intact(self, digest: str) -> bool:
        """Whether a good copy exists on a disk that anybody may ever read again."""
        for agent in self.agents.values():
            copy = agent.box.disk.copies.get(digest)
            if copy is not None and copy.intact and not agent.gone:
                return True
        return False

    def fail(self, sentence: str) -> None:
        if not self.failure.done():
            self.trace(f"VIOLATION {sentence}")
            self.failure.set_result(sentence)

    # --- users ------------------------------------------------------------------------------------

    async def ask(self, body: cm.RequestBody) -> cm.Answer:
        """Raises `Unavailable`, as a client sees it when nobody answers."""
        await self.pause_ms(1, 10)
        await self.coordinator.gate.wait()
        if self.coordinator.shell is None:
            raise Unavailable("connection refused")
        answer = await self.coordinator.shell.request(body)
        await self.pause_ms(1, 10)
        return answer

    async def insist(self, body: cm.RequestBody) -> cm.Answer:
        """Ask until there is an answer, with the same words."""
        while True:
            try:
                answer = await self.ask(body)
            except Unavailable:
                await self.pause_ms(200, 2_000)
                continue
            if self.lost_replies and isinstance(body, cm.Submit):
                self.lost_replies -= 1
                self.fired("lost_reply")
                continue
            return answer

    async def submit(self, wanted: Program, request_id: str = "") -> None:
        self._requests += not request_id
        request_id = request_id or f"r{self._requests}"
        if wanted.doomed:
            self.checkers.doomed[request_id] = None
        body = cm.Submit(specify(wanted, request_id), request_id)
        answer = await self.insist(body)
        while not isinstance(answer, cm.Submitted) and not self._fleet_is_whole():
            await self.pause_ms(200, 2_000)  # a gang may be more than the nodes that have joined
            answer = await self.insist(body)
        if not isinstance(answer, cm.Submitted):
            self.fail(f"{request_id} was refused: {answer}")
            return
        self.trace(f"user {request_id} is job {answer.job_id}")
        self.checkers.submitted(request_id, answer.job_id, answer.jobs)

    def _fleet_is_whole(self) -> bool:
        core = self.coordinator.core
        return core is not None and len(core.state.nodes) == len(self.agents)

    async def _submit_at(self, wanted: Program) -> None:
        await asyncio.sleep(wanted.at_ms / 1000)
        await self.submit(wanted)

    async def feed(self) -> None:
        """More work, as long as faults wait for somebody to strike."""
        while True:
            await asyncio.sleep(self.plan.feed_ms / 1000)
            open_jobs = [j for j in self.checkers.jobs.values() if j.phase not in JOB_ENDED]
            if len(open_jobs) < OPEN_JOBS_MAX:
                await self.submit(program(self.chance, 0))

    # --- the run ----------------------------------------------------------------------------------

    async def run(self, strike: "Strike") -> None:
        """Raises `Violation`."""
        story = asyncio.create_task(self._story(strike))
        await asyncio.wait((story, self.failure), return_when=asyncio.FIRST_COMPLETED)
        if self.failure.done():
            story.cancel()
            raise Violation(self.failure.result())
        story.result()

    async def _story(self, strike: "Strike") -> None:
        await self.coordinator.start()
        for agent in self.agents.values():
            agent.power_on()
        sweep = Sweep(self)
        async with asyncio.TaskGroup() as group:
            sweeping = group.create_task(sweep.run())
            feeding = group.create_task(self.feed())
            users = [group.create_task(self._submit_at(wanted)) for wanted in self.plan.programs]
            try:
                async with asyncio.timeout(self.plan.faults_ms_max / 1000):
                    await strike(self)
            except TimeoutError:
                self.fail("a fault of the plan never fired")
            feeding.cancel()
            await asyncio.wait(users)
            self.trace("healing")
            await self._heal()
            await self._all_end()
            sweeping.cancel()
        self.trace("end")

    async def _heal(self) -> None:
        """No more faults: whatever is away comes back, and people do what the sentences tell
        them."""
        self.coordinator.full = False
        self.coordinator.resume()
        if self.coordinator.task is None:
            await self.coordinator.start()
        for agent in self.agents.values():
            heal_weather(agent.weather)
            agent.peers_cut = agent.box.disk.full = False
            agent.box.gate.set()
            if not agent.gone and not agent.box.powered:
                agent.power_on()
            elif not agent.gone and not agent.up:
                agent.start()
        for name in self.agents:
            await self.insist(cm.UncordonNode(name))

    async def _all_end(self) -> None:
        deadline_ms = self.now_ms() + HEALED_MS_MAX
        while True:
            open_jobs = [j for j in self.checkers.jobs.values() if j.phase not in JOB_ENDED]
            if not open_jobs:
                return
            if self.now_ms() > deadline_ms:
                told = [await self.explain(job.id) for job in open_jobs]
                self.fail(f"{HEALED_MS_MAX} ms after the last fault: {'; '.join(told)}")
                return
            for job in open_jobs:
                if job.phase is JobPhase.HELD:
                    await self.insist(cm.ReleaseJob(job.id))
                elif job.phase is JobPhase.QUEUED:
                    await self._give_up_lost(job.id)
            await asyncio.sleep(1)

    async def explain(self, job_id: int) -> str:
        answer = await self.insist(cm.ExplainJob(job_id))
        return answer.sentence if isinstance(answer, cm.Explanation) else str(answer)

    async def _give_up_lost(self, job_id: int) -> None:
        """A checkpoint that lay only on a box that never comes back: its owner is told what to
        do."""
        head = self.checkers.heads.get(job_id, "")
        if head and not all(map(self.intact, digests(self.checkers.checkpoints[head]))):
            self.checkers.abandoned[job_id] = None
            answer = await self.insist(cm.RequeueJob(job_id, abandon_unreachable_checkpoints=True))
            self.trace(f"user gives up checkpoints of job {job_id}: {type(answer).__name__}")

    def open_nodes(self) -> list[str]:
        core = self.coordinator.core
        if core is None:
            return []
        nodes = core.state.nodes.items()
        return [name for name, live in nodes if live.node.intent is NodeIntent.OPEN]

    async def view(self, job_id: int) -> JobView | None:
        answer = await self.insist(cm.GetJob(job_id))
        return answer if isinstance(answer, JobView) else None


def heal_weather(weather: Weather) -> None:
    """In place: pipes hold it."""
    for name in Weather.__slots__:
        setattr(weather, name, getattr(Weather(), name))


def specify(wanted: Program, request_id: str) -> JobSpec:
    """The program stands in the command, where its trainer finds it."""
    program_json = json.dumps(
        {
            "steps": wanted.steps, "step_ms": wanted.step_ms, "every": wanted.every,
            "deaf": int(wanted.deaf), "doomed": int(wanted.doomed), "crash_at": wanted.crash_at,
        }
    )  # fmt: skip
    return JobSpec(
        name=request_id,
        job_class=JobClass(wanted.job_class),
        command=("simulated-trainer", program_json),
        gpus=wanted.gpus,
        ranks=wanted.ranks,
        shared_gpu_memory_bytes=wanted.shared_gpu_memory_bytes,
        share_automatic=wanted.share_automatic,
        grace_ms=wanted.grace_ms,
        max_restarts=1_000,
        replication=Replication(wanted.replication),
        array=wanted.array,
    )


Strike = Callable[["World"], Awaitable[None]]


def simulate(plan: Plan, strike: Strike) -> Outcome:
    """Run one plan from beginning to end. `strike` does the harm, and returns when it is over."""
    failure = ""
    bugs: list[str] = []
    world: World | None = None

    async def main() -> None:
        nonlocal world
        world = World(plan)
        await world.run(strike)

    def bug(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        bugs.append(f"{context.get('message')}: {error!r}")
        if world is not None:
            world.fail(f"a program stopped: {error!r}")

    loop = VirtualLoop(plan.rounds_max)
    loop.set_exception_handler(bug)
    try:
        loop.run_until_complete(main())
    except* AssertionError as errors:
        failure = str(errors.exceptions[0])
    if world is None:
        raise AssertionError("the world was not made")
    virtual_ms, lines = int(loop.time() * 1000), tuple(world.lines)
    _clear_away(loop)
    fingerprint = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Outcome(
        plan.seed, failure or "; ".join(bugs), fingerprint, virtual_ms, world.counts, lines
    )


def _clear_away(loop: VirtualLoop) -> None:
    """What still runs is the next run's no more; how it takes that is not part of this one."""
    loop.set_exception_handler(lambda _loop, _context: None)
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()
