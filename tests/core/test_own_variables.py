"""What an agent sets over what a job's owner says is refused at submission, and nothing else is."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from agent.core import values as v
from agent.core.attempt import AttemptRecord
from agent.core.launch import compose
from agent.processes.mps import MpsProcesses
from coordinator.core import arrays
from coordinator.core.launch import own_variables
from coordinator.core.model import Job, JobSpec
from coordinator.core.phases import JobPhase
from coordinator.core.validate import refuse_spec
from tests.core.agent_box import LAUNCH

USERS = "as its owner says"
# Those of a trainer, of the trace that it belongs to, and of MPS that Baton leaves alone.
DEFAULTS = {"TORCH_NCCL_DEBUG_INFO_PIPE_FILE"}
LEFT = (
    *DEFAULTS,
    "PYTHONPATH",
    "TRACEPARENT",
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
    "SLURM_CPUS_PER_TASK",
)
SPECS = [
    replace(
        JobSpec(command=("x",), ranks=ranks, gpus=gpus, slurm_environment=slurm, array=array),
        shared_gpu_memory_bytes=1 << 30 if share else 0,
    )
    for ranks, gpus, share, slurm, array in product(
        (1, 2), (0, 1, 2), (False, True), (False, True), ("", "0-9")
    )
    if not share or (ranks, gpus) == (1, 1)
]
CANDIDATES = {name for spec in SPECS for name in own_variables(spec)} | {*LEFT}


def launched(spec: JobSpec, **said: str) -> list[dict[str, str]]:
    """The environment of rank 0, wherever the others may be."""
    job = Job(7, spec, JobPhase.ACTIVE, 0, array_id=7 if spec.array else 0)
    mine = arrays.launched(replace(job, spec=replace(spec, environment=tuple(said.items()))))
    kept: dict[str, Any] = {
        name: getattr(mine, name)
        for name in ("command", "environment", "slurm_environment", "shared_gpu_memory_bytes")
    }
    uuids = ("GPU-a", "GPU-b")[: spec.gpus]
    gangs: list[v.Gang | None] = [None]
    if spec.ranks > 1:
        alone = v.Gang(0, 2, 0, 1, 0, ("n1", "n2"), "n1", 20_000, uuids)
        beside = v.Gang(0, 2, 0, 2, 0, ("n1",), "n1", 20_000, uuids)
        gangs = [alone, beside]
    found = []
    for gang in gangs:
        record = AttemptRecord(
            "7.1", 7, 1, v.JobSpec(**kept), uuids, (), None, False, 0, "token", gang=gang
        )
        launch = compose(record, LAUNCH)
        if spec.shared_gpu_memory_bytes:
            mps: Any = MpsProcesses(None, Path("/mps"), "control")  # type: ignore[arg-type]
            launch = mps._as_client(launch, "GPU-a")  # as where MPS runs
        found.append(dict(launch.environment))
    return found


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_refused_is_what_would_be_overridden(spec: JobSpec) -> None:
    everywhere = launched(spec, **dict.fromkeys(CANDIDATES, USERS))
    set_by_baton = {name for told in launched(spec) for name in told}
    named = {name for name in set_by_baton if not name.startswith("BATON_")}
    assert named - DEFAULTS == {*own_variables(spec)}
    for told in everywhere:
        left = {name for name, value in told.items() if value == USERS}
        assert left >= CANDIDATES - {*own_variables(spec)}


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        (
            "RANK",
            {"ranks": 2},
            "environment variable RANK is set by Baton: leave it out (for this job Baton",
        ),
        ("RANK", {}, ""),
        ("CUDA_VISIBLE_DEVICES", {}, "sets CUDA_VISIBLE_DEVICES, MASTER_ADDR, MASTER_PORT, TORCH"),
        ("PET_NNODES", {"ranks": 2}, "PET_NNODES is set by Baton"),
        ("PET_NNODES", {}, ""),
        ("SLURM_JOB_ID", {"slurm_environment": True}, "SLURM_JOB_ID is set by Baton"),
        ("SLURM_JOB_ID", {}, ""),
        ("SLURM_ARRAY_TASK_ID", {"slurm_environment": True}, ""),
    ],
)
def test_the_sentence_says_which_are_batons(
    name: str, changed: dict[str, Any], sentence: str
) -> None:
    spec = replace(JobSpec(command=("x",), environment=((name, "3"),)), **changed)
    said = refuse_spec(spec)
    assert sentence in said
    assert bool(said) == bool(sentence)
