"""A page of jobs fits into a message, whatever the jobs are."""

import pytest

from coordinator import wire
from coordinator.core.coordinator import Coordinator
from coordinator.core.messages import JobPage, ListJobs, Reply, Request
from coordinator.core.model import Attempt, Job, JobSpec, Snapshot
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.state import Instant, Options
from protos.baton.v1 import jobs_pb2

MESSAGE_BYTES_MAX = 4 << 20  # gRPC's default
COUNT = 200
GPUS = tuple(f"GPU-{number:032x}" for number in range(8))


def loaded(spec: JobSpec) -> Coordinator:
    known = [
        Job(number, spec, JobPhase.SUCCEEDED, 1, epoch=1, reason="r" * 900, ended_unix_ms=number)
        for number in range(1, COUNT + 1)
    ]
    tries = [
        Attempt(job.id, 1, "n1", GPUS[: spec.gpus], AttemptPhase.SUCCEEDED, 1, 2, 3, 0,
                reason="r" * 900, rank=rank, ranks=spec.ranks)
        for job in known
        for rank in range(spec.ranks)
    ]  # fmt: skip
    core = Coordinator(Options())
    core.load(Snapshot(jobs=tuple(known), attempts=tuple(tries), last_job_id=COUNT), 0)
    return core


@pytest.mark.parametrize(
    "spec",
    [
        JobSpec(command=("train", "x" * 60_000), environment=(("A", "y" * 60_000),)),
        JobSpec(command=("train", "ö" * 30_000), trainer_config_json="{}" + " " * 60_000),
        JobSpec(command=("train",), gpus=8, ranks=64),
    ],
    ids=["long", "letters", "gangs"],
)
def test_pages_that_would_be_too_large_are_more_pages(spec: JobSpec) -> None:
    core, before, found, pages = loaded(spec), 0, list[int](), 0
    while before or not pages:
        (reply,) = core.handle(Instant(1, 1), Request(1, ListJobs((), "", 1_000, before)))
        assert isinstance(reply, Reply)
        assert isinstance(reply.answer, JobPage)
        message = jobs_pb2.ListJobsResponse(jobs=map(wire.encode_job, reply.answer.jobs))
        assert message.ByteSize() <= MESSAGE_BYTES_MAX
        found += [shown.job.id for shown in reply.answer.jobs]
        before, pages = reply.answer.next_before_job_id, pages + 1
    assert found == list(range(COUNT, 0, -1))
    assert 2 < pages < COUNT // 2
