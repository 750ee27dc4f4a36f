"""What one batch costs when many come, go or are lost at once: the production core alone.

Problem: a decision that is cheap for each job by itself may cost the square of them when they come
together, and then everybody's events wait for seconds. So each kind of crowd is put before fleets
of half the size, of 1,000 GPUs and jobs, and of twice that, and beside the seconds of a core stands
how many times as much twice the crowd takes: 2 where each job costs the same, 4 where each one asks
all others.

Nodes of eight GPUs of three types, with one job on each GPU, or one that shares it; what a crowd
is, `CROWDS` says. The coordinator has the production solver. Measured is the dearest batch: the
crowd's own, the one behind it, which looks again, and the next minute's tick with its decision over
all jobs. CPU time of this process, Python's collector off (`bench/rounds.py`).
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from bench import report
from bench.rounds import COMMAND, GIGABYTE, GPUS, HOST, KINDS, UNIX_MS, Fleet
from coordinator.core.messages import (
    AgentEvent,
    AttemptExited,
    CancelJob,
    Event,
    FromAgent,
    Heartbeat,
    HeldAttempt,
    Hello,
    Request,
    SessionClosed,
    Submit,
    Tick,
)
from coordinator.core.model import (
    Attempt,
    GpuFacts,
    Job,
    JobClass,
    JobSpec,
    Node,
    Progress,
    Snapshot,
    TrainerTime,
)
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.quotas import Quota
from coordinator.core.state import Options
from coordinator.core.stretches import Stretch
from coordinator.solver import solve

SIZES, SIZES_QUICK = (500, 1_000, 2_000), (250, 500)
GOAL_SIZE, GOAL_S = 1_000, 0.3
HOUR_MS = 3_600_000
PROJECTS = tuple(f"team-{number}" for number in range(50))
OPTIONS = Options(solve=solve)

ONE = JobSpec(command=COMMAND, gpus=1)
LIGHT = replace(ONE, shared_gpu_memory_bytes=8 * GIGABYTE)
AUTOMATIC = replace(LIGHT, share_automatic=True)
SPARE = replace(ONE, job_class=JobClass.SPARE)
GANG = JobSpec(command=COMMAND, gpus=4, ranks=2)

Specs = Callable[[int], JobSpec]  # by number
Batches = Callable[["Crowded", int], Iterator[list[Event]]]


@dataclass(frozen=True, slots=True)
class Crowd:
    """`there` has the GPUs before, on so many of eight nodes; `coming` is what comes then."""

    coming: Batches
    there: Specs | None = None
    of_eight: int = 8
    options: Options = OPTIONS


@dataclass(slots=True)
class Crowded:
    """A fleet with what its agents have to say."""

    fleet: Fleet
    attempts: list[Attempt]
    session_of: dict[str, int]
    alive: list[int]
    beats: int = 1
    sequences: dict[int, int] = field(default_factory=dict)

    def pass_ms(self, milliseconds: int) -> None:
        """Whoever is alive is heard, which is not measured."""
        self.fleet.pass_ms(milliseconds)
        self.beats += 1
        self.fleet.batch(*(FromAgent(session, Heartbeat(self.beats)) for session in self.alive))

    def exit_of(self, attempt: Attempt) -> Event:
        session = self.session_of[attempt.node]
        sequence = self.sequences[session] = self.sequences.get(session, 0) + 1
        exited = AgentEvent(sequence, UNIX_MS, attempt.id, AttemptExited(0))
        return FromAgent(session, exited)


def own(spec: JobSpec) -> Specs:
    """A training of its own for each."""
    return lambda number: replace(spec, command=(f"train {number}",))


def alike(spec: JobSpec) -> Specs:
    return lambda _: spec


def submissions(specs: Specs, part: float) -> Batches:
    """So many of the fleet's GPUs come at once."""

    def coming(_: Crowded, size: int) -> Iterator[list[Event]]:
        yield [Request(number, Submit(specs(number))) for number in range(round(part * size))]

    return coming


def cancellations(crowded: Crowded, size: int) -> Iterator[list[Event]]:
    """Everybody, and as many who wait."""
    yield from submissions(alike(ONE), 1.0)(crowded, size)
    numbers = sorted(crowded.fleet.core.state.jobs)
    yield [Request(number, CancelJob(number)) for number in numbers]
    yield [crowded.exit_of(attempt) for attempt in crowded.attempts]


def ends(crowded: Crowded, size: int) -> Iterator[list[Event]]:
    """All jobs at once, and as many wait."""
    yield from submissions(own(ONE), 1.0)(crowded, size)
    yield [crowded.exit_of(attempt) for attempt in crowded.attempts]


def deaths(crowded: Crowded, size: int) -> Iterator[list[Event]]:
    """Three of ten nodes, with their jobs."""
    count = round(0.3 * size / GPUS)
    dead, crowded.alive = crowded.alive[:count], crowded.alive[count:]
    yield [FromAgent(session, SessionClosed()) for session in dead]
    for _ in range(12):
        crowded.pass_ms(1_000)
        yield [Tick()]


def silence(crowded: Crowded, _: int) -> Iterator[list[Event]]:
    """The coordinator's link is cut: all are lost at once."""
    crowded.fleet.pass_ms(OPTIONS.lease_ms + 1)
    yield [Tick()]


def with_deadline(number: int) -> JobSpec:
    return replace(own(ONE)(number), deadline_unix_ms=UNIX_MS + HOUR_MS * (1 + number % 24))


def of_project(number: int) -> JobSpec:
    return replace(own(ONE)(number), project=PROJECTS[number % len(PROJECTS)])


def quotas() -> Options:
    return replace(OPTIONS, projects={name: Quota(240.0) for name in PROJECTS})


CROWDS = {
    "one GPU each, room for all": Crowd(submissions(own(ONE), 0.5), own(ONE), 4),
    "one GPU each, no room": Crowd(submissions(own(ONE), 1.0), own(ONE)),
    "one GPU each, others give way": Crowd(
        submissions(own(replace(ONE, job_class=JobClass.GUARANTEED)), 0.5), own(SPARE)
    ),
    "gangs, room for all": Crowd(submissions(own(GANG), 1 / 16), own(ONE), 4),
    "gangs, no room": Crowd(submissions(own(GANG), 0.5), own(ONE)),
    "gangs, others give way": Crowd(
        submissions(own(replace(GANG, job_class=JobClass.GUARANTEED)), 1 / 16), own(SPARE)
    ),
    "lights, room for all": Crowd(submissions(own(LIGHT), 1.0), own(LIGHT)),
    "lights, no room": Crowd(submissions(own(LIGHT), 1.0), own(ONE)),
    "automatic sharers, free GPUs": Crowd(submissions(alike(AUTOMATIC), 0.5), own(AUTOMATIC), 4),
    "automatic sharers beside others": Crowd(submissions(alike(AUTOMATIC), 0.5), alike(AUTOMATIC)),
    "the same, each another training": Crowd(submissions(own(AUTOMATIC), 0.5), own(AUTOMATIC)),
    "deadlines": Crowd(submissions(with_deadline, 1.0), own(ONE)),
    "flexible jobs": Crowd(
        submissions(own(replace(ONE, flexible_ms=24 * HOUR_MS)), 1.0), own(ONE)
    ),
    "50 projects with quotas": Crowd(
        submissions(of_project, 1.0), of_project, options=quotas()
    ),
    "three of ten nodes die": Crowd(deaths, own(ONE), 7),
    "all are lost": Crowd(silence, own(ONE)),
    "all are cancelled": Crowd(cancellations, own(ONE)),
    "all end, and as many wait": Crowd(ends, own(ONE)),
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--only", default="", help="crowds whose name has this in it")
    parsed: argparse.Namespace = parser.parse_args(arguments)
    asked = report.options(parsed)
    gc.disable()
    rows: list[report.Row] = []
    for name, crowd in CROWDS.items():
        if parsed.only in name:
            report.say(f"crowds: {name}")
            rows += measure(name, crowd, SIZES_QUICK if asked.quick else SIZES)
            gc.collect()
    report.show("The dearest batch", rows, asked)
    return 0


def measure(name: str, crowd: Crowd, sizes: Sequence[int]) -> Iterator[report.Row]:
    before_s = None
    for size in sizes:
        cost_s = dearest_s(crowd, size)
        goal_s = GOAL_S if size == GOAL_SIZE else None
        label = f"{name}: {size:,} GPUs"
        yield report.Row(name=label, value=cost_s, unit="s of a core", goal=goal_s)
        if before_s is not None:
            yield report.Row(
                name=f"{label}, of half as many", value=cost_s / before_s, unit="times"
            )
        before_s = cost_s


def dearest_s(crowd: Crowd, size: int) -> float:
    crowded = joined(crowd, size)
    fleet = crowded.fleet
    costs_s = [_cost_s(fleet, events) for events in crowd.coming(crowded, size)]
    costs_s.append(_cost_s(fleet, []))
    crowded.pass_ms(60_000)
    costs_s += [_cost_s(fleet, [Tick()]), _cost_s(fleet, [])]
    return max(costs_s)


def _cost_s(fleet: Fleet, events: Sequence[Event]) -> float:
    began_s = time.process_time()
    fleet.batch(*events)
    return time.process_time() - began_s


def joined(crowd: Crowd, size: int) -> Crowded:
    """All nodes are there, their jobs have run for an hour and tell their steps."""
    jobs: list[Job] = []
    attempts: list[Attempt] = []
    nodes: list[Node] = []
    hellos: list[Hello] = []
    sessions: dict[str, int] = {}
    told: list[tuple[int, tuple[tuple[str, Progress], ...]]] = []
    for number in range(size // GPUS):
        name = f"node-{number:05}"
        kind, gigabytes = KINDS[number % len(KINDS)]
        gpus = tuple(
            GpuFacts(f"{name}-{index}", kind, gigabytes * GIGABYTE) for index in range(GPUS)
        )
        peer = f"node-{(number + 1) % (size // GPUS):05}"
        mine = []
        for gpu in gpus if crowd.there is not None and number % 8 < crowd.of_eight else ():
            assert crowd.there is not None
            job_id = len(jobs) + 1
            spec = crowd.there(-job_id)
            jobs.append(Job(job_id, spec, JobPhase.ACTIVE, UNIX_MS - HOUR_MS, f"{job_id}", epoch=1))
            mine.append(replace(_attempt(job_id, name, gpu.uuid, spec), replica_node=peer))
        attempts += mine
        nodes.append(Node(name, f"journal-{name}", "", HOST, gpus))
        held = tuple(HeldAttempt(each.id, each.gpu_uuids, live=True) for each in mine)
        hellos.append(Hello(name, f"journal-{name}", "", HOST, gpus, held))
        sessions[name] = number + 1
        progress = Progress(7_200, 14_400, time=TrainerTime(step_s=3_600.0))
        told.append((number + 1, tuple((each.id, progress) for each in mine)))
    snapshot = Snapshot(1, len(jobs), tuple(jobs), tuple(attempts), nodes=tuple(nodes))
    fleet = Fleet(snapshot, replace(crowd.options, hellos_per_s=len(nodes) + 1))
    fleet.batch(*(FromAgent(session, hello) for session, hello in enumerate(hellos, start=1)))
    fleet.batch(*(FromAgent(session, Heartbeat(1, progress=each)) for session, each in told))
    fleet.batch()
    return Crowded(fleet, attempts, sessions, list(sessions.values()))


def _attempt(job_id: int, node: str, uuid: str, spec: JobSpec) -> Attempt:
    alone = Stretch((), 7_200, 3_600.0, utilization_ratio=0.3)
    stretches = (alone,) if spec.shared_gpu_memory_bytes else ()
    began_ms = UNIX_MS - HOUR_MS
    return Attempt(
        job_id, 1, node, (uuid,), AttemptPhase.RUNNING, began_ms, began_ms, stretches=stretches
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
