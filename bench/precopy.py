"""What sending ahead gains: a job with a large frozen part leaves its node, with and without.

One spare job with 200 MB of which 1 MB at most ever changes trains on n1, and nothing of it lies on
n2. Then n1 is drained, or a guaranteed job wants n1's kind of GPU. *Ahead*: the trainer looks for
requests to save, so the frozen part travels while it trains. *At once*: the same program does not
look, so everything follows after the stop. Each repetition has a frozen part of its own, since
chunks that a node has of an earlier one would not travel.

The pause is from the last step on n1 to the first on n2, in which nobody trains; the wait is from
the order until the node is given back: the guaranteed job's first instruction, or the end of the
drained attempt. Times are the trainer's own, the command's that displaces it, and the history's.
The link is loopback, which is faster than most networks: read the ratios.
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import report
from bench.submit import stamp_spec, wait_stamp
from protos.baton.v1 import jobs_pb2, nodes_pb2, types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.trainers import backbone
from tests.fakenvml.build import a100, h100

REPETITIONS, REPETITIONS_QUICK = 5, 2
FROZEN_MB = 200
STEP_MS = 20
TOLD_GOAL_S = 0.3
STEPS_BEFORE = 25  # its slab is there, and nothing of it has been saved
WAIT_S_MAX = 120.0
AHEAD, AT_ONCE = "ahead", "at once"


@dataclass(frozen=True, slots=True)
class Move:
    """Seconds. `steps` are those that were taken between the order and the stop; `told_s` is from
    the order until the trainer heard that it should save or leave."""

    told_s: float
    wait_s: float
    pause_s: float
    whole_s: float
    steps: int


def main(arguments: Sequence[str]) -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--frozen-mb", type=int, default=FROZEN_MB)
    parsed = parser.parse_args(arguments)
    asked = report.options(parsed)
    count = REPETITIONS_QUICK if asked.quick else REPETITIONS
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        seeds = itertools.count(1)
        for why in ("drain", "preemption"):
            found: dict[str, list[Move]] = {AT_ONCE: [], AHEAD: []}
            for number in range(count):
                for way, moves in found.items():
                    report.say(f"precopy: {why}, {way}, {number + 1} of {count}")
                    directory = Path(scratch) / f"{why}-{way}-{number}".replace(" ", "-")
                    moves.append(one_move(directory, why, way, (parsed.frozen_mb, next(seeds))))
            rows += rows_of(why, found)
    report.show(f"Moving a job with {parsed.frozen_mb} MB frozen", rows, asked)
    return 0


def rows_of(why: str, found: dict[str, list[Move]]) -> Iterator[report.Row]:
    """Each figure of both ways, the second with the first as its reference."""
    figures = {
        "pause, last step to first step elsewhere": [m.pause_s for m in found[AT_ONCE]],
        "wait, order to the node being given back": [m.wait_s for m in found[AT_ONCE]],
        "order to first step elsewhere": [m.whole_s for m in found[AT_ONCE]],
    }
    ahead = (
        [m.pause_s for m in found[AHEAD]],
        [m.wait_s for m in found[AHEAD]],
        [m.whole_s for m in found[AHEAD]],
    )
    for (name, before), after in zip(figures.items(), ahead, strict=True):
        first = report.row_of(f"{why}, {AT_ONCE}: {name}", before, "s")
        second = report.row_of(f"{why}, {AHEAD}: {name}", after, "s")
        yield first
        source = "stopped at once, same run"
        yield replace(second, reference=first.value, reference_source=source)
    for way, moves in found.items():
        told = report.row_of(f"{why}, {way}: order to the trainer being told", _told(moves), "s")
        yield replace(told, goal=TOLD_GOAL_S)
        steps = [float(move.steps) for move in moves]
        yield report.row_of(f"{why}, {way}: steps from the order to the stop", steps, "")


def _told(moves: Sequence[Move]) -> list[float]:
    return [move.told_s for move in moves]


def one_move(directory: Path, why: str, way: str, frozen: tuple[int, int]) -> Move:
    """A fresh fleet, so that no node has anything of the frozen part."""
    directory.mkdir()
    witness = directory / "steps"
    with Cluster(directory / "cluster", patient=False) as cluster:
        cluster.start_coordinator()
        cluster.start_agent("n1", h100(1, node="n1"))
        cluster.start_agent("n2", a100(1, node="n2"))
        cluster.wait_for_nodes("n1", "n2")
        spec = training_spec(witness, way, frozen)
        job_id = cluster.jobs.Submit(jobs_pb2.SubmitRequest(spec=spec)).job_id
        cluster.wait_until(
            lambda: len(steps_of(witness, 1)) >= STEPS_BEFORE, WAIT_S_MAX, "its first steps"
        )
        ordered_s = time.time()
        given_back_s = 0.0
        if why == "drain":
            cluster.nodes.DrainNode(nodes_pb2.DrainNodeRequest(node="n1"))
        else:
            urgent = stamp_spec(directory / "stamp")
            urgent.gpus, urgent.job_class = 1, types_pb2.JOB_CLASS_GUARANTEED
            urgent.gpu_types.append("H100")
            cluster.jobs.Submit(jobs_pb2.SubmitRequest(spec=urgent))
            given_back_s = wait_stamp(directory / "stamp")
        cluster.wait_until(lambda: steps_of(witness, 2), WAIT_S_MAX, "a step on n2")
        attempts = cluster.job(job_id).attempts
        assert [attempt.node for attempt in attempts] == ["n1", "n2"]
        if why == "drain":
            given_back_s = attempts[0].end_time.ToNanoseconds() / 1e9
        said = [one for one in work.lines(cluster, job_id) if one["event"] in ("asked", "told")]
    before, after = steps_of(witness, 1), steps_of(witness, 2)
    return Move(
        said[0]["unix_ns"] / 1e9 - ordered_s,
        given_back_s - ordered_s,
        after[0] - before[-1],
        after[0] - ordered_s,
        sum(1 for taken_s in before if taken_s > ordered_s),
    )


def training_spec(witness: Path, way: str, frozen: tuple[int, int]) -> types_pb2.JobSpec:
    frozen_mb, seed = frozen
    words = [sys.executable, str(backbone.__file__), "--witness", str(witness)]
    words += ["--frozen-mb", str(frozen_mb), "--seed", str(seed), "--step-ms", str(STEP_MS)]
    words += ["--plain"] if way == AT_ONCE else []
    return types_pb2.JobSpec(command=words, gpus=1, job_class=types_pb2.JOB_CLASS_SPARE)


def steps_of(witness: Path, epoch: int) -> list[float]:
    """When that attempt took its steps, in seconds since 1970."""
    if not witness.exists():
        return []
    rows = [line.split() for line in witness.read_text("ascii").splitlines()]
    return [int(row[2]) / 1e9 for row in rows if len(row) == 3 and int(row[1]) == epoch]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
