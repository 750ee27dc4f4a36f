"""What goes wrong in a run: data, made from a seed.

Problem: a fault that is thrown from the middle of a test cannot be replayed, listed or counted. So
a plan is a list of values (when, what, how long); whom it hits is chosen when it strikes, from what
is there at that moment, with the run's own chance. A fault counts when it had an effect: a message
really lost, a commit really refused, a process really killed. One that strikes nobody tries again,
and a window stays open until it has done something; a plan with a fault that never fired fails.
"""

import random
from dataclasses import dataclass

# Every kind, and how likely a plan has it relative to the others.
KINDS: dict[str, int] = {
    "agent_kill": 4,
    "agent_upgrade": 2,
    "agent_stall": 2,
    "power_off": 4,
    "disk_lost": 2,
    "node_gone": 1,
    "coordinator_kill": 4,
    "coordinator_stall": 2,
    "takeover": 2,
    "cut": 4,
    "half_open": 3,
    "drop": 3,
    "repeat": 3,
    "reorder": 3,
    "delay": 2,
    "store_full": 2,
    "store_unsure": 2,
    "journal_full": 2,
    "trainer_kill": 3,
    "corrupt_one": 2,
    "corrupt_all": 1,
    "peer_cut": 3,
    "clock_jump": 2,
    "drain": 2,
    "cancel": 1,
    "hold": 2,
    "requeue": 2,
    "resubmit": 1,
    "lost_reply": 1,
    "gpu_error": 3,
    "herd": 2,
    "unkillable": 2,
}
# Once a plan is enough: a fleet of three that loses two for good has nobody to run its jobs.
ONCE = ("node_gone", "disk_lost")
STRIKE_MS_MAX = 45_000
DURATION_MS = (300, 20_000)
GPU_MEMORY_BYTES = 80_000_000_000  # of each GPU of the fleet


@dataclass(frozen=True, slots=True)
class Fault:
    at_ms: int
    kind: str
    duration_ms: int


@dataclass(frozen=True, slots=True)
class Program:
    """A job of the workload: what it asks for, and how its trainer behaves."""

    at_ms: int
    job_class: str
    gpus: int
    ranks: int
    replication: str
    grace_ms: int
    steps: int
    step_ms: int
    every: int
    deaf: bool
    doomed: bool
    crash_at: int
    picky: bool = False  # of those that share a GPU: only where that pays

    @property
    def shared_gpu_memory_bytes(self) -> int:
        """Every other job of one GPU shares it: two or three have room beside one another."""
        if (self.gpus, self.ranks) != (1, 1) or self.at_ms % 2:
            return 0
        return GPU_MEMORY_BYTES * (2 + self.steps % 2) // 10

    @property
    def share_automatic(self) -> bool:
        return self.picky and bool(self.shared_gpu_memory_bytes)

    @property
    def array(self) -> str:
        """Every fifth is an array of four trials, of which two run at a time."""
        return "0-3%2" if self.at_ms % 5 == 3 else ""


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    nodes: int
    programs: tuple[Program, ...]
    faults: tuple[Fault, ...]
    gpu_names: tuple[str, ...] = ("NVIDIA H100",)  # of the nodes, in turn
    faults_ms_max: int = 400_000  # until the last one is over
    feed_ms: int = 8_000  # while faults strike somebody must be there to be struck
    rounds_max: int = 3_000_000  # of the loop: a virtual second of a small fleet takes about 100


def plan(seed: int) -> Plan:
    """The same seed gives the same plan, whatever the machine."""
    chance = random.Random(seed)
    count = chance.randint(2, 8)
    faults: list[Fault] = []
    # Every seed has one kind for certain, in turn, so that any run of seeds covers them all.
    kinds = [list(KINDS)[seed % len(KINDS)]]
    kinds += chance.choices(list(KINDS), list(KINDS.values()), k=count - 1)
    for index, kind in enumerate(kinds):
        if kind in ONCE and any(once in kinds[:index] for once in ONCE):
            continue
        at_ms = chance.randint(3_000, STRIKE_MS_MAX)
        faults.append(Fault(at_ms, kind, chance.randint(*DURATION_MS)))
    programs = tuple(program(chance, chance.randint(0, 15_000)) for _ in range(5))
    return Plan(
        seed,
        chance.randint(3, 4),
        programs,
        tuple(sorted(faults, key=lambda fault: (fault.at_ms, fault.kind))),
    )


def program(chance: random.Random, at_ms: int) -> Program:
    steps = chance.randint(8, 40)
    return Program(
        at_ms,
        chance.choice(("guaranteed", "standard", "standard", "spare")),
        *chance.choice(((0, 1), (1, 1), (1, 1), (1, 2), (1, 3), (2, 1), (0, 2))),
        chance.choice(("automatic", "automatic", "required", "none")),
        chance.randint(2_000, 12_000),
        steps,
        chance.randint(200, 1_500),
        chance.randint(2, 8),
        chance.random() < 0.1,
        chance.random() < 0.04,
        chance.randint(1, steps) if chance.random() < 0.1 else 0,
    )
