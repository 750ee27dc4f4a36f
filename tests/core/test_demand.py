"""The mix of recent requests: what it is of, that it stays bounded, and that a restart keeps it.

Problem: a window that forgets the wrong end, or a mix that is never made anew, decides for the
fleet of last year, and every single decision looks reasonable.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.core.demand import RENEWALS, REQUESTS_MAX, Demand, ask_of, parts_of
from coordinator.core.fragmentation import PARTS, Ask
from coordinator.core.model import GpuFacts, Job, JobSpec
from coordinator.core.phases import JobPhase
from coordinator.core.rooms import Offer, Tenant, open_room
from coordinator.core.shares import shareable_bytes
from tests.core.coordinator_harness import GIGABYTE

H100 = (80 * GIGABYTE, "NVIDIA H100")
SMALL = (24 * GIGABYTE, "NVIDIA GeForce RTX 4090")
ROOT = Path(__file__).parents[2]
SCENARIOS = ("fragmentation", "shares", "preemption_chooses")
REPLAY = """
import pathlib, sys
from tests.golden.test_coordinator_golden import play
for name in sys.argv[1:]:
    sys.stdout.write(play(pathlib.Path("tests/golden/coordinator", name + ".txt").read_text()))
"""


def _job(job_id: int, spec: JobSpec) -> Job:
    return Job(job_id, spec, JobPhase.QUEUED, 0)


def test_a_request_is_what_it_asks_for_and_not_whose_it_is() -> None:
    one, other = JobSpec(name="a", gpus=2, memory_bytes=5), JobSpec(name="b", gpus=2, ranks=4)
    assert ask_of(one) == ask_of(replace(other, memory_bytes=5))
    assert ask_of(one) != ask_of(other)


def test_what_a_request_takes_of_a_gpu() -> None:
    assert parts_of(ask_of(JobSpec(gpus=1)), SMALL) == PARTS
    assert parts_of(ask_of(JobSpec(gpus=1, gpu_types=("H100",))), SMALL) == 0
    assert parts_of(ask_of(JobSpec(gpus=1, gpu_memory_bytes_min=30 * GIGABYTE)), SMALL) == 0
    share_bytes = shareable_bytes(GpuFacts("", *H100[::-1])) // 4
    quarter = ask_of(JobSpec(gpus=1, shared_gpu_memory_bytes=share_bytes))
    assert parts_of(quarter, H100) == PARTS // 4
    assert PARTS * 3 // 4 < parts_of(quarter, SMALL) <= PARTS
    assert parts_of(ask_of(JobSpec(gpus=1, shared_gpu_memory_bytes=23 * GIGABYTE)), SMALL) == 0


def test_the_window_forgets_the_oldest() -> None:
    demand = Demand()
    old, new = ask_of(JobSpec(gpus=1)), ask_of(JobSpec(gpus=2))
    demand.note(old, REQUESTS_MAX)
    demand.note(new, REQUESTS_MAX - 1)
    assert demand.mix().total == REQUESTS_MAX
    box = open_room(_offer((H100,))).box()
    assert demand.mix().fitting(box) == 1


def test_a_mix_is_made_anew_when_an_eighth_of_it_is_new() -> None:
    demand = Demand()
    demand.note(ask_of(JobSpec(gpus=1)), REQUESTS_MAX)
    first = demand.mix()
    demand.note(ask_of(JobSpec(gpus=2)), REQUESTS_MAX // RENEWALS)
    assert demand.mix() is first
    demand.note(ask_of(JobSpec(gpus=2)))
    assert demand.mix() is not first


def test_a_restarted_coordinator_knows_the_last_requests() -> None:
    """Whatever the order of the records is."""
    jobs = [_job(number, JobSpec(gpus=1 + number // 900)) for number in range(1, 1_501)]
    demands = Demand(), Demand()
    demands[0].note_jobs(jobs)
    demands[1].note_jobs(jobs[::-1])
    box = open_room(_offer((H100,))).box()
    assert demands[0].mix().total == demands[1].mix().total == REQUESTS_MAX
    assert demands[0].mix().fitting(box) == demands[1].mix().fitting(box) == 899 - 476


def _offer(kinds: tuple[tuple[int, str], ...], tenants: tuple[Tenant, ...] = ()) -> Offer:
    gpus = tuple(GpuFacts(f"g{i}", name, size) for i, (size, name) in enumerate(kinds))
    held = [uuid for tenant in tenants for uuid in tenant.gpu_uuids]
    free = tuple(gpu.uuid for gpu in gpus if gpu.uuid not in held)
    return Offer("n1", gpus, free, 100 * GIGABYTE, 4, tenants)


def test_what_is_left_of_a_node() -> None:
    """Small GPUs come first; whose GPU is held alone is not there, of a shared one the rest is."""
    alone = Tenant("1.1", 1, 1, ("g0",), 10 * GIGABYTE, False)
    half_bytes = shareable_bytes(GpuFacts("", *H100[::-1])) // 2
    sharer = Tenant("2.1", 1, 1, ("g1",), 0, False, share_bytes=half_bytes)
    room = open_room(_offer((H100, H100, H100, SMALL), (alone, sharer)))
    half = (H100, PARTS // 2)
    assert room.box() == ((90 * GIGABYTE,), ((SMALL, PARTS), half, (H100, PARTS)))
    single = JobSpec(gpus=1, memory_bytes=5 * GIGABYTE)
    assert room.box(single, (("g2",),)) == ((85 * GIGABYTE,), ((SMALL, PARTS), half))
    shared = JobSpec(gpus=1, shared_gpu_memory_bytes=half_bytes)
    assert room.box(shared, (("g2",),)) == ((90 * GIGABYTE,), ((SMALL, PARTS), half, half))
    room.take(single, ("g2",))
    assert room.box().left == PARTS + PARTS // 2


def test_an_agent_that_knows_no_shares_has_no_rest() -> None:
    sharer = Tenant("2.1", 1, 1, ("g0",), 0, False, share_bytes=GIGABYTE)
    room = open_room(replace(_offer((H100,), (sharer,)), shares=False))
    assert room.box().left == 0


def test_jobs_without_gpus_are_no_part_of_the_mix() -> None:
    demand = Demand()
    demand.note(Ask(0, (5,), JobSpec()))
    assert demand.mix().total == 0


@pytest.mark.long
def test_a_replay_decides_the_same_under_two_hash_seeds() -> None:
    told = []
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", REPLAY, *SCENARIOS],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        )
        told.append(found.stdout)
    assert told[0] == told[1]
    assert "of recent requests" in told[0]
