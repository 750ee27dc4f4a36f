"""`baton submit --flexible`: sent as said, by flag and by file, and shown."""

from pathlib import Path

import pytest

from protos.baton.v1 import jobs_pb2
from protos.baton.v1 import types_pb2 as t
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator


def test_by_flag_and_by_file(baton: Baton, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.answers["Submit"] = [jobs_pb2.SubmitResponse(job_id=1)]
    path = tmp_path / "job.toml"
    path.write_text('command = ["true"]\nflexible = "1d12h"\n', encoding="utf-8")
    assert baton("submit", "--flexible", "24h", "--", "true").exit_code == 0
    assert baton("submit", str(path)).exit_code == 0
    assert baton("submit", "--", "true").exit_code == 0
    day, file, never = fake.requests
    assert day.spec.flexible.seconds == 86_400
    assert file.spec.flexible.seconds == 36 * 3_600
    assert not never.spec.HasField("flexible")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('flexible = "24"', "flexible: '24' has no unit"),
        ("flexible = 24", 'write it with its unit: flexible = "120s"'),
    ],
)
def test_what_is_no_duration(baton: Baton, tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(f'command = ["true"]\n{line}\n', encoding="utf-8")
    result = baton("submit", str(path))
    assert result.exit_code == 2
    assert said in result.stderr


def test_it_is_shown(baton: Baton, fake: FakeCoordinator) -> None:
    job = t.Job(id=3, spec=t.JobSpec(gpus=1))
    job.spec.flexible.seconds = 86_400
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=job)]
    assert "1 GPU, may wait 1d" in baton("job", "3").stdout
