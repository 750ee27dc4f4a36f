"""`python -m tests.sim.week`: a week of virtual time in which something breaks every few minutes.

Problem: "runs for a week and survives anything" is not shown by many short runs: what grows, what
is counted (restarts, back-offs, retries) and what is forgotten shows itself in long ones only. Here
both real shells run a whole week: four long trainings, one of them a gang, with short jobs around
them, while nodes lose power and disks, links are cut, programs are killed and suspended, clocks
jump and disks fill. All rules of the simulator are watched all along.

It prints what was done to the fleet, and of each long training what the week cost it: in how many
attempts it ran, how many steps were done twice, and how much longer it took than undisturbed.

A disk is only taken away, and all copies of a checkpoint only scratched, where another copy or an
older checkpoint is left: more than that no two copies survive.
"""

import argparse
import asyncio
import random
import sys
import time
from dataclasses import dataclass, replace

from coordinator.core.phases import JOB_ENDED, JobPhase
from tests.sim.checkers import digests
from tests.sim.faults import KINDS, Fault, Plan, Program
from tests.sim.injector import Injector
from tests.sim.world import Outcome, World, simulate

DAY_MS = 86_400_000
NODES = 5
EVERY_S = 300  # a fault, in the mean
STEP_MS = 10_000
STEPS_PER_CHECKPOINT = 6
# Of the time that there is: what is left is for what faults cost.
SHARE_OF_TIME = 0.85
# Those nobody survives, and what people do on purpose to end a job.
LEFT_OUT = ("node_gone", "corrupt_all", "cancel")
SHORT_MS, LONG_MS = (300, 20_000), (60_000, 600_000)
LONG_RATIO = 0.2
LONG_JOBS = {
    "guaranteed": ("guaranteed", 1, 1),
    "standard": ("standard", 1, 1),
    "gang of three": ("standard", 1, 3),
    "spare": ("spare", 1, 1),
}


@dataclass(frozen=True, slots=True)
class Training:
    """What a week was to a long training. A gang's steps are counted once."""

    name: str
    phase: JobPhase
    attempts: int
    steps: int
    steps_repeated: int
    alone_ms: int
    took_ms: int


def week(seed: int, days: float, every_s: float = EVERY_S) -> Plan:
    """The same seed gives the same week."""
    chance = random.Random(seed)
    end_ms = int(days * DAY_MS)
    kinds = {kind: often for kind, often in KINDS.items() if kind not in LEFT_OUT}
    faults: list[Fault] = []
    at_ms = 60_000
    while at_ms < end_ms:
        (kind,) = chance.choices(list(kinds), list(kinds.values()))
        spread = LONG_MS if chance.random() < LONG_RATIO else SHORT_MS
        faults.append(Fault(at_ms, kind, chance.randint(*spread)))
        at_ms += 1 + int(chance.expovariate(1 / every_s) * 1000)
    steps = int(end_ms * SHARE_OF_TIME / STEP_MS)
    long = Program(
        1_000, "standard", 1, 1, "required", 30_000, steps, STEP_MS, STEPS_PER_CHECKPOINT,
        deaf=False, doomed=False, crash_at=0,
    )  # fmt: skip
    programs = tuple(
        replace(long, job_class=job_class, gpus=gpus, ranks=ranks)
        for job_class, gpus, ranks in LONG_JOBS.values()
    )
    return Plan(
        seed, NODES, programs, tuple(faults),
        faults_ms_max=end_ms + DAY_MS // 4, feed_ms=1_800_000, rounds_max=end_ms,
    )  # fmt: skip


class Careful(Injector):
    """Takes no disk that has the last copy of something."""

    async def _disk_lost(self, fault: Fault) -> bool:
        agents = self._world.agents
        if any(agent.busy for agent in agents.values()) or not self._all_have_two():
            return False
        return await super()._disk_lost(fault)

    def _all_have_two(self) -> bool:
        checkers = self._world.checkers
        disks = [agent.box.disk for agent in self._world.agents.values()]
        for job in checkers.jobs.values():
            head = "" if job.phase in JOB_ENDED else checkers.heads.get(job.id, "")
            for digest in digests(checkers.checkpoints[head]) if head else ():
                copies = [disk.copies[digest] for disk in disks if digest in disk.copies]
                if sum(copy.intact for copy in copies) < 2:
                    return False
        return True


def live(plan: Plan) -> tuple[Outcome, list[Training], int]:
    """The run, what it was to each long training, and how many jobs there were in all."""
    ended: dict[int, int] = {}
    worlds: list[World] = []

    async def strike(world: World) -> None:
        worlds.append(world)
        watching = asyncio.create_task(_watch(world, ended))
        await Careful(world).strike()
        # The long ones have their time; the rest of the fleet is whole meanwhile.
        watching.cancel()

    outcome = simulate(plan, strike)
    (world,) = worlds
    return outcome, _trainings(world, ended, outcome.virtual_ms), len(world.checkers.jobs)


async def _watch(world: World, ended: dict[int, int]) -> None:
    while True:
        await asyncio.sleep(60)
        for job in world.checkers.jobs.values():
            if job.phase in JOB_ENDED:
                ended.setdefault(job.id, world.now_ms())


def _trainings(world: World, ended: dict[int, int], now_ms: int) -> list[Training]:
    checkers, told = world.checkers, []
    for number, (name, program) in enumerate(zip(LONG_JOBS, world.plan.programs, strict=True)):
        job_id = checkers.submitted_ids.get(f"r{number + 1}")
        if job_id is None:
            continue
        mine = [a for a in checkers.attempts.values() if a.job_id == job_id and a.rank == 0]
        taken = [checkers.steps[a.id] for a in mine if a.id in checkers.steps]
        done = sum(last - first for first, last in taken)
        reached = max((last for _, last in taken), default=0)
        told.append(
            Training(
                name, checkers.jobs[job_id].phase, len(mine), program.steps, done - reached,
                program.steps * program.step_ms, ended.get(job_id, now_ms) - program.at_ms,
            )
        )  # fmt: skip
    return told


def report(plan: Plan, outcome: Outcome, trainings: list[Training], jobs: int) -> str:
    fired = sum(outcome.fired[kind] for kind in {fault.kind for fault in plan.faults})
    lines = [
        f"{outcome.virtual_ms / DAY_MS:.2f} days, {plan.nodes} nodes, {jobs} jobs, "
        f"{len(plan.faults)} faults planned; counted by kind (a window counts each message):"
    ]
    lines += [f"  {kind:<18} {outcome.fired[kind]:>7}" for kind in KINDS if outcome.fired[kind]]
    lines += [f"  {'all':<18} {fired:>7}", ""]
    lines.append("training       ended as  attempts     steps  done twice  alone     took  longer")
    for each in trainings:
        lines.append(
            f"{each.name:<14} {each.phase.value:<9} {each.attempts:>7} {each.steps:>9} "
            f"{each.steps_repeated / each.steps:>10.2%} {each.alone_ms / DAY_MS:>5.2f}d "
            f"{each.took_ms / DAY_MS:>7.2f}d {each.took_ms / each.alone_ms - 1:>7.1%}"
        )
    lines.append(outcome.failure or "every rule held, every job ended")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.week", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--days", type=float, default=7.0)
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between faults")
    options = parser.parse_args()
    plan = week(options.seed, options.days, options.every)
    begun_s = time.process_time()
    outcome, trainings, jobs = live(plan)
    sys.stdout.write(report(plan, outcome, trainings, jobs))
    sys.stdout.write(f"{time.process_time() - begun_s:.0f} s of CPU\n")
    return 1 if outcome.failure else 0


if __name__ == "__main__":
    sys.exit(main())
