"""Preemption, hop by hop: from a submission that displaces a job to its own first instruction.

A spare job trains on the only GPU, and a guaranteed job is submitted. The spare one must be told at
once, may take its time to save, and when its checkpoint is committed the guaranteed job must start
at once. Two spare jobs, one after the other: a Python trainer that is the job's command itself, and
the same under a shell, `bash -c 'python ...; exit $?'`, as people write it. The second is where
work is lost elsewhere: with Slurm's default the Python below the shell was told 41 s late, and its
save never finished. A shell that is signalled with its group dies at once, so what is below it must
be left to finish; a stop after which the last save was not committed is counted, with goal 0.

Times: the trainer's own notes (told, and with every step), the coordinator's log (the commit),
and the time that the guaranteed job's command writes down first.
"""

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bench import report
from bench.submit import stamp_spec, wait_stamp
from protos.baton.v1 import jobs_pb2, types_pb2
from tests.e2e.cluster import Cluster
from tests.e2e.trainers import ticking
from tests.fakenvml.build import h100

REPETITIONS, REPETITIONS_QUICK = 20, 6
WAIT_S_MAX = 60.0
TOLD_GOAL_S = 0.3
NEXT_GOAL_S = 0.5
SLURM_TOLD_S = 41.0
STEPS_ENDLESS = 10_000_000


@dataclass(frozen=True, slots=True)
class Preemption:
    """Instants in seconds since 1970. `None`: it never came to that."""

    asked_s: float
    told_s: float | None
    committed_s: float | None
    began_s: float


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    count = REPETITIONS_QUICK if asked.quick else REPETITIONS
    rows: list[report.Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch,
        Cluster(Path(scratch), patient=False) as cluster,
    ):
        cluster.start_coordinator()
        cluster.start_agent("n1", h100(1))
        cluster.wait_for_nodes("n1")
        for under in ("python", "python under bash"):
            witness = Path(scratch) / under.replace(" ", "-")
            spec = spare_spec(witness, shell="bash" in under)
            spare = cluster.jobs.Submit(jobs_pb2.SubmitRequest(spec=spec)).job_id
            preemptions = []
            for number in range(count):
                report.say(f"preempt: {under}, {number + 1} of {count}")
                preemptions.append(one_preemption(cluster, spare, witness))
            cluster.jobs.CancelJob(jobs_pb2.CancelJobRequest(job_id=spare))
            rows += rows_of(under, preemptions)
    report.show("Preemption of a training job", rows, asked)
    return 0


def rows_of(under: str, preemptions: Sequence[Preemption]) -> list[report.Row]:
    whole = [one.began_s - one.asked_s for one in preemptions]
    unsaved = sum(one.committed_s is None for one in preemptions)
    rows = [
        report.row_of(f"{under}: submit to the other job's first instruction", whole, "s"),
        report.Row(
            name=f"{under}: stops whose save was not committed, of {len(preemptions)}",
            value=unsaved,
            unit="",
            goal=0.0,
        ),
    ]
    hops = [
        (one.told_s - one.asked_s, one.committed_s - one.told_s, one.began_s - one.committed_s)
        for one in preemptions
        if one.told_s is not None and one.committed_s is not None
    ]
    if hops:
        told, saved, following = (list(samples) for samples in zip(*hops, strict=True))
        name = f"{under}: submit to the trainer being told"
        rows.append(goal_row(name, told, TOLD_GOAL_S, SLURM_TOLD_S))
        rows.append(report.row_of(f"{under}: told to checkpoint committed", saved, "s"))
        name = f"{under}: committed to the other job's first instruction"
        rows.append(goal_row(name, following, NEXT_GOAL_S, None))
    return rows


def goal_row(name: str, samples: list[float], goal: float, reference: float | None) -> report.Row:
    source = "Slurm's default, measured under bash" if reference else ""
    return report.row_of(name, samples, "s", goal=goal, reference=reference, source=source)


def spare_spec(witness: Path, *, shell: bool) -> types_pb2.JobSpec:
    words = [sys.executable, str(ticking.__file__), "--file", str(witness)]
    words += ["--steps", str(STEPS_ENDLESS), "--step-ms", "10", "--checkpoint-ms", "1000"]
    if shell:
        # With something left to do the shell stays; a lone command it would replace itself with.
        words = ["bash", "-c", f"{shlex.join(words)}; exit $?"]
    return types_pb2.JobSpec(command=words, gpus=1, job_class=types_pb2.JOB_CLASS_SPARE)


def one_preemption(cluster: Cluster, spare: int, witness: Path) -> Preemption:
    """Let it train until it has committed something, then displace it."""
    epoch = cluster.wait_until(lambda: settled(cluster, spare, witness), WAIT_S_MAX, "a commit")
    stamp = cluster.directory / f"guaranteed-{spare}-{epoch}"
    spec = stamp_spec(stamp)
    spec.gpus = 1
    spec.job_class = types_pb2.JOB_CLASS_GUARANTEED
    asked_s = time.time()
    job_id = cluster.jobs.Submit(jobs_pb2.SubmitRequest(spec=spec)).job_id
    began_s = wait_stamp(stamp)
    cluster.wait_until(
        lambda: cluster.job(job_id).phase == types_pb2.JOB_PHASE_SUCCEEDED, WAIT_S_MAX, "its end"
    )
    told = [note.unix_s for note in notes_of(witness, epoch) if note.event == "told"]
    if not told:
        return Preemption(asked_s, None, None, began_s)
    committed_s = last_commit_s(cluster, f"{spare}.{epoch}")
    return Preemption(asked_s, told[0], committed_s if committed_s > told[0] else None, began_s)


def settled(cluster: Cluster, spare: int, witness: Path) -> int:
    """The spare job's epoch, once that attempt has taken a step and committed; 0 until then."""
    job = cluster.job(spare)
    if job.phase != types_pb2.JOB_PHASE_ACTIVE or not witness.exists():
        return 0
    committed = any(note.event == "committed" for note in notes_of(witness, job.epoch))
    return job.epoch if committed else 0


@dataclass(frozen=True, slots=True)
class Note:
    """A line of the trainer's."""

    event: str
    unix_s: float


def notes_of(witness: Path, epoch: int) -> list[Note]:
    """What that attempt has noted so far."""
    found = [json.loads(line) for line in witness.read_text("utf-8").splitlines()]
    return [Note(line["event"], line["unix_ns"] / 1e9) for line in found if line["epoch"] == epoch]


def last_commit_s(cluster: Cluster, attempt: str) -> float:
    """When the attempt's last checkpoint was committed, seconds since 1970."""
    return max(
        datetime.fromisoformat(line["ts"]).timestamp()
        for line in cluster.log_lines("coordinator")
        if line["event"] == "checkpoint.committed" and line["attempt"] == attempt
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
