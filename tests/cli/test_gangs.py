"""What the commands say and show of gangs: ranks in requests, their nodes, their parts and logs."""

import json
import re
from pathlib import Path

import pytest
from blake3 import blake3

from protos.baton.v1 import checkpoints_pb2 as pb
from protos.baton.v1 import jobs_pb2, peer_pb2
from protos.baton.v1 import types_pb2 as t
from tests.cli import samples
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator

TRIES = [[("n3", t.ATTEMPT_PHASE_LOST)] * 3, [(n, t.ATTEMPT_PHASE_RUNNING) for n in "aab"]]
PARTS = [b"rank nought", b"rank one", b"rank two"]


def gang() -> t.Job:
    """Three ranks, on two nodes, in the second try."""
    attempts = [
        t.Attempt(id=f"9.{epoch}.{rank}", epoch=epoch, rank=rank, node=node, phase=phase)
        for epoch, ranks in enumerate(TRIES, start=1)
        for rank, (node, phase) in enumerate(ranks)
    ]
    parts = [t.CheckpointPart(digest=f"{rank}" * 64, replicas=["a", "b"]) for rank in (1, 2)]
    return t.Job(
        id=9,
        spec=t.JobSpec(name="ddp", command=["train"], gpus=2, ranks=3),
        phase=t.JOB_PHASE_ACTIVE,
        reason="runs with 2 of its 3 ranks on a and 1 on b",
        attempts=attempts,
        checkpoint=t.Checkpoint(digest="0" * 64, step=7, replicas=["a", "b"], parts=parts),
        submit_time=samples.ago(30.5),
    )


@pytest.fixture
def job(fake: FakeCoordinator) -> t.Job:
    found = gang()
    fake.answers["GetJob"] = [lambda request: jobs_pb2.GetJobResponse(job=found)]
    return found


def test_ranks_are_asked_for(
    baton: Baton, fake: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = lambda request: jobs_pb2.SubmitResponse(job_id=9)  # noqa: E731
    fake.answers["Submit"] = [answer]
    assert baton("submit", "--ranks", "4", "--gpus", "1", "--", "train").exit_code == 0
    (tmp_path / "job.toml").write_text('command = ["train"]\nranks = 3\n')
    assert baton("submit", "job.toml").exit_code == 0
    assert baton("submit", "job.toml", "--ranks", "1").exit_code == 0
    assert [request.spec.ranks for request in fake.requests] == [4, 3, 0]


@pytest.mark.parametrize("ranks", ["0", "-2"])
def test_no_rank_at_all_is_no_job(baton: Baton, fake: FakeCoordinator, ranks: str) -> None:
    said = baton("submit", "--ranks", ranks, "--", "train")
    assert (said.exit_code, said.stderr) == (
        2,
        f"baton: --ranks is {ranks}; a job has 1 at least\n",
    )
    assert fake.requests == []


def test_a_list_has_the_nodes_of_all_ranks(baton: Baton, fake: FakeCoordinator) -> None:
    shown = gang()
    del shown.attempts[:3]  # a list has the newest try alone
    answers = [jobs_pb2.ListJobsResponse(jobs=[shown]), jobs_pb2.ListJobsResponse()]
    fake.answers["ListJobs"] = answers
    line = baton("jobs").stdout.splitlines()[1]
    assert re.split(r"\s{2,}", line.strip())[:6] == ["9", "ddp", "-", "active", "3x2", "a x2, b"]


def test_a_job_shows_all_ranks_of_its_newest_try(baton: Baton, job: t.Job) -> None:
    shown = baton("job", "9").stdout
    assert "active, on a x2, b for" in shown
    assert "3 ranks of 2 GPUs each" in shown
    assert "step 7, 0 B in 3 parts, on a x3, b x3, committed - ago" in shown
    table = shown[shown.index("Attempts") :].splitlines()[2:]
    assert [line.split()[:2] for line in table] == [
        ["9.1.0", "n3"], ["9.2.0", "a"], ["9.2.1", "a"], ["9.2.2", "b"],
    ]  # fmt: skip
    document = json.loads(baton("job", "9", "--json").stdout)
    assert [attempt["rank"] for attempt in document["attempts"]] == [0, 1, 2] * 2
    assert [part["digest"][:1] for part in document["checkpoint"]["parts"]] == ["1", "2"]
    assert document["spec"]["ranks"] == 3


def test_logs_of_a_rank(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["StreamLogs"] = [[jobs_pb2.StreamLogsResponse(data=b"x")]]
    assert baton("logs", "--rank", "2", "9").stdout == "x"
    assert baton("logs", "9").stdout == "x"
    assert [request.rank for request in fake.requests] == [2, 0]


def test_a_list_of_checkpoints_counts_parts(baton: Baton, fake: FakeCoordinator) -> None:
    kept = pb.KeptCheckpoint(checkpoint=gang().checkpoint)
    fake.answers["ListCheckpoints"] = [pb.ListCheckpointsResponse(checkpoints=[kept])]
    assert "3 parts: a x3, b x3" in baton("checkpoint", "list", "9").stdout


def part(data: bytes, step: int = 7) -> list[pb.ReadCheckpointResponse]:
    digest = blake3(data).hexdigest()
    files = [{"path": "deep/weights", "chunks": [[digest, len(data)]]}]
    document = json.dumps({"step": step, "files": files}).encode()
    named = peer_pb2.Manifest(digest=blake3(document).hexdigest(), data=document)
    chunk = peer_pb2.Chunk(digest=digest, data=data, size_bytes=len(data))
    return [pb.ReadCheckpointResponse(manifest=named), pb.ReadCheckpointResponse(chunk=chunk)]


def test_an_export_has_a_directory_for_each_rank(
    baton: Baton, fake: FakeCoordinator, job: t.Job, tmp_path: Path
) -> None:
    fake.answers["ReadCheckpoint"] = [[response for data in PARTS for response in part(data)]]
    target = tmp_path / "made"
    result = baton("checkpoint", "export", "9", "--format", "raw", "--to", str(target))
    assert (result.exit_code, result.stderr) == (0, "")
    found = {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert found == {f"rank-{i:05}/deep/weights": data for i, data in enumerate(PARTS)}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
    ("responses", "sentence"),
    [
        ([*part(PARTS[0])[:1], *part(PARTS[1])], "ended with 1 chunks missing"),
        ([*part(PARTS[0]), *part(PARTS[1])[:1]], "ended with 1 chunks missing"),
        ([*part(PARTS[0]), *part(PARTS[1], step=8)], "part is of step 8, rank 0's of 7"),
    ],
)
def test_parts_that_do_not_fit_are_not_exported(
    *,
    responses: list[pb.ReadCheckpointResponse],
    sentence: str,
    baton: Baton,
    fake: FakeCoordinator,
    job: t.Job,
    tmp_path: Path,
) -> None:
    fake.answers["ReadCheckpoint"] = [responses]
    target = str(tmp_path / "made")
    result = baton("checkpoint", "export", "9", "--format", "raw", "--to", target)
    assert (result.exit_code, result.stdout) == (1, "")
    assert sentence in result.stderr
    assert list(tmp_path.iterdir()) == []
