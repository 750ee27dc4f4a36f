"""What one decision costs in a large fleet: the production core alone, no store and no wire.

Ten thousand nodes of eight GPUs of three types come back to a coordinator that has restarted; on
most of them a job has some of the GPUs. Then one job after another is submitted, decided and ended,
each kind of job some times. Measured is the batch of the submission with its `Decide`, which
everybody else's events wait for meanwhile, and the empty one behind it, which looks again. Seconds
of a core (CPU time), in this process, with Python's collector off, as a coordinator of this size
has it most of the time (`coordinator/garbage.py`).
"""

import gc
import random
import sys
import time
from collections.abc import Sequence

from bench import report
from coordinator.core.coordinator import Coordinator
from coordinator.core.messages import (
    AgentEvent,
    AttemptExited,
    CancelJob,
    Decide,
    Effect,
    Event,
    FromAgent,
    HeldAttempt,
    Hello,
    MakeAllocation,
    Request,
    Send,
    StartAttempt,
    Submit,
)
from coordinator.core.model import Attempt, GpuFacts, HostFacts, Job, JobSpec, Node, Snapshot
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.state import Instant, Options
from coordinator.core.weighing import answer

SIZES, SIZES_QUICK = (1_000, 10_000), (1_000,)
REPETITIONS, REPETITIONS_QUICK = 20, 10
GPUS = 8
GIGABYTE = 10**9
KINDS = (("NVIDIA H100", 80), ("NVIDIA A100", 40), ("NVIDIA GeForce RTX 4090", 24))
HOST = HostFacts("host", "boot", 64, 512 * GIGABYTE)
SEED = 11
UNIX_MS = 1_790_000_000_000

COMMAND = ("true",)
SHAPES = {
    "one GPU": JobSpec(command=COMMAND, gpus=1),
    "no GPU": JobSpec(command=COMMAND),
    "four GPUs of one type": JobSpec(command=COMMAND, gpus=4, gpu_types=("A100",)),
    "a share of a GPU": JobSpec(command=COMMAND, gpus=1, shared_gpu_memory_bytes=10 * GIGABYTE),
    "4 ranks of one GPU": JobSpec(command=COMMAND, gpus=1, ranks=4),
    "4 ranks of eight GPUs": JobSpec(command=COMMAND, gpus=8, ranks=4),
    "64 ranks of one GPU": JobSpec(command=COMMAND, gpus=1, ranks=64),
    "fits nowhere": JobSpec(command=COMMAND, gpus=8, gpu_types=("4090",)),
    "fits nowhere, 4 ranks": JobSpec(command=COMMAND, gpus=8, ranks=4, gpu_types=("4090",)),
}


class Fleet:
    """A coordinator's core, the clock that it is told, and agents that do what they must."""

    def __init__(self, snapshot: Snapshot, options: Options | None = None) -> None:
        self.core = Coordinator(options or Options(hellos_per_s=len(snapshot.nodes) + 1))
        self.core.load(snapshot, 0)
        self._now_ms = 0
        self._sequence = 0

    def batch(self, *events: Event) -> list[Effect]:
        """As the shell does it: all events, then one decision. What is asked of who decides over
        all jobs is answered at once."""
        self._now_ms += 1
        now = Instant(self._now_ms, UNIX_MS + self._now_ms)
        effects = [effect for event in events for effect in self.core.handle(now, event)]
        for asked in [effect for effect in effects if isinstance(effect, MakeAllocation)]:
            effects += self.core.handle(now, answer(asked))
        return [*effects, *self.core.handle(now, Decide())]

    def pass_ms(self, milliseconds: int) -> None:
        self._now_ms += milliseconds

    def end(self, session: int, attempt: str) -> None:
        """Its agent says that it has succeeded."""
        self._sequence += 1
        exited = AgentEvent(self._sequence, UNIX_MS, attempt, AttemptExited(0))
        self.batch(FromAgent(session, exited))


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    gc.disable()
    rows: list[report.Row] = []
    for size in SIZES_QUICK if asked.quick else SIZES:
        report.say(f"rounds: {size:,} nodes")
        rows += measure(size, REPETITIONS_QUICK if asked.quick else REPETITIONS)
    report.show("One decision", rows, asked)
    return 0


def measure(size: int, repetitions: int) -> list[report.Row]:
    """Of each kind of job, in a fleet of `size` nodes."""
    fleet = joined(size)
    rows = []
    for name, spec in SHAPES.items():
        costs_ms, orders = [], 0
        for _ in range(repetitions):
            began_s = time.process_time()
            effects = [*fleet.batch(Request(1, Submit(spec))), *fleet.batch()]
            costs_ms.append(1000 * (time.process_time() - began_s))
            for effect in effects:
                if isinstance(effect, Send) and isinstance(effect.order, StartAttempt):
                    fleet.end(effect.session, effect.order.attempt)
                    orders += 1
            if not orders:
                fleet.batch(Request(1, CancelJob(fleet.core.state.last_job_id)))
        # A benchmark of a job that is refused or waits unseen would show a good figure.
        expected = 0 if "nowhere" in name else spec.ranks * repetitions
        if orders != expected:
            raise RuntimeError(f"{name}: {orders} orders and not {expected}")
        rows.append(report.row_of(f"{size:,} nodes, {name}", costs_ms, "ms of a core"))
    return rows


def joined(size: int) -> Fleet:
    """All nodes are back, and the first round is over."""
    chance = random.Random(SEED)
    jobs, attempts, nodes, hellos = [], [], [], []
    for number in range(size):
        name = f"node-{number:05}"
        kind, gigabytes = KINDS[number % len(KINDS)]
        gpus = tuple(
            GpuFacts(f"{name}-{index}", kind, gigabytes * GIGABYTE) for index in range(GPUS)
        )
        # No node of the last type is empty, so that somebody fits nowhere.
        taken = chance.randint(1, 7) if kind == KINDS[-1][0] else chance.choice((0, 0, 1, 2, 4, 7))
        uuids = tuple(gpu.uuid for gpu in gpus[:taken])
        held: tuple[HeldAttempt, ...] = ()
        if taken:
            spec = JobSpec(command=COMMAND, gpus=taken)
            jobs.append(Job(number + 1, spec, JobPhase.ACTIVE, 0, str(number), epoch=1))
            phase = AttemptPhase.RUNNING
            attempts.append(Attempt(number + 1, 1, name, uuids, phase, 0, started_unix_ms=0))
            held = (HeldAttempt(attempts[-1].id, uuids, live=True),)
        nodes.append(Node(name, f"journal-{name}", "", HOST, gpus))
        hellos.append(Hello(name, f"journal-{name}", "", HOST, gpus, held))
    fleet = Fleet(Snapshot(1, size, tuple(jobs), tuple(attempts), nodes=tuple(nodes)))
    fleet.batch(*(FromAgent(session, hello) for session, hello in enumerate(hellos, start=1)))
    fleet.batch()
    return fleet


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
