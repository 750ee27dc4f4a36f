"""`baton projects`: the table, and what is not known in it."""

import json
import re

from protos.baton.v1 import jobs_pb2
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator

ANSWER = jobs_pb2.ListProjectsResponse(
    projects=[
        jobs_pb2.Project(
            name="beta", weight=1, used_gpu_hours=123.4, running_gpus=2, borrowed_gpus=2,
            running_jobs=2, waiting_jobs=1, waiting_gpus=8,
        ),
        jobs_pb2.Project(
            name="demo", quota_gpu_hours_per_day=48, weight=2, used_gpu_hours=40.96,
            entitled_gpus=3.6, running_gpus=0.215, borrowed_gpus=0.04, lent_gpus=1.785,
            running_jobs=1,
        ),
    ],
    half_life_hours=16.6355,
)  # fmt: skip
BETA = ["beta", "-", "123", "0", "2", "2", "0", "8", "2+1"]
DEMO = ["demo", "48", "41", "3.6", "0.2", "0", "1.8", "0", "1+0"]


def test_the_table_in_a_pipe(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ListProjects"] = [ANSWER]
    result = baton("projects")
    assert result.exit_code == 0
    assert result.stderr == "baton: half of what was used is forgotten after 16.6 h\n"
    _, *rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    assert rows == [BETA, DEMO]


def test_where_there_is_none_there_are_no_headings(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ListProjects"] = [jobs_pb2.ListProjectsResponse(half_life_hours=1)]
    said = baton("projects")
    assert (said.exit_code, said.stdout) == (0, "")
    assert said.stderr == "baton: no project has a job yet, and none has a quota\n"


def test_the_document(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ListProjects"] = [ANSWER]
    document = json.loads(baton("projects", "--json").stdout)
    beta, demo = document["projects"]
    assert beta["quota_gpu_hours_per_day"] is None, "none is not 0"
    assert demo["quota_gpu_hours_per_day"] == 48
    assert demo["lent_gpus"] == 1.785
    assert document["half_life_hours"] == 16.6355
