"""What people see of GPUs that are shared, in tables and in JSON."""

import json

from protos.baton.v1 import jobs_pb2, nodes_pb2
from protos.baton.v1 import types_pb2 as t
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator

GPU = t.Gpu(
    uuid="GPU-1",
    name="NVIDIA A100-SXM4-40GB",
    memory_bytes=40 * 2**30,
    phase=t.GPU_PHASE_HELD,
    shares=[
        t.GpuShare(attempt="1.1", memory_bytes=8 * 2**30),
        t.GpuShare(attempt="2.1", memory_bytes=16 * 2**30),
    ],
)
NODE = t.Node(id="n1", phase=t.NODE_PHASE_UP, intent=t.NODE_INTENT_OPEN, gpus=[GPU])


def test_nodes_say_how_many_jobs_share_how_much(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse(nodes=[NODE])]
    assert "0/1 A100-SXM4-40GB (2 jobs share 24 GiB)" in baton("nodes").stdout


def test_nodes_say_in_json_who_does(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse(nodes=[NODE])]
    (gpu,) = json.loads(baton("nodes", "--json").stdout)[0]["gpus"]
    assert gpu["attempt"] == ""
    assert gpu["shares"] == [
        {"attempt": "1.1", "memory_bytes": 8 * 2**30},
        {"attempt": "2.1", "memory_bytes": 16 * 2**30},
    ]


def test_a_job_says_what_it_has_of_a_gpu(baton: Baton, fake: FakeCoordinator) -> None:
    job = t.Job(id=3, spec=t.JobSpec(gpus=1, shared_gpu_memory_bytes=8 * 2**30))
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=job)]
    fake.answers["ListJobEvents"] = [jobs_pb2.ListJobEventsResponse()]
    assert "8 GiB of a shared GPU" in baton("job", "3").stdout
    job.spec.share_automatic = True
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=job)]
    fake.answers["ListJobEvents"] = [jobs_pb2.ListJobEventsResponse()]
    assert "8 GiB of a shared GPU where that pays" in baton("job", "3").stdout
