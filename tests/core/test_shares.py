"""Where jobs go that share a GPU, and who makes room for whom.

The properties of `test_placement.py` draw such jobs too; here is what they do not say: which of the
GPUs with room is taken, and that what is kept for one who waits is kept.
"""

from dataclasses import replace

import pytest

from coordinator.core.model import CLASS_RANK, GpuFacts, JobClass, JobSpec
from coordinator.core.placement import Need, Plan, place
from coordinator.core.rooms import Offer, Tenant
from coordinator.core.shares import SHARERS_MAX, Hold, gives_room, shareable_bytes
from tests.core.coordinator_harness import GIGABYTE

WHOLE = JobSpec(command=("train",), gpus=1)


def share(gigabytes: float, job_class: JobClass = JobClass.STANDARD) -> JobSpec:
    size_bytes = int(gigabytes * GIGABYTE)
    return replace(WHOLE, shared_gpu_memory_bytes=size_bytes, job_class=job_class)


def offer(
    sizes: str, *tenants: tuple[str, int, float, JobClass, bool], strays: tuple[str, ...] = ()
) -> Offer:
    """A node n1 with GPUs of these gigabytes; each tenant is an attempt, the number of its GPU, its
    share (0: all of it), its class, and whether it is stopping."""
    gpus = tuple(
        GpuFacts(f"g{number}", "H100", int(size) * GIGABYTE)
        for number, size in enumerate(sizes.split())
    )
    there = tuple(
        Tenant(
            name, CLASS_RANK[job_class], order, (f"g{gpu}",), 0, stopping,
            share_bytes=int(size * GIGABYTE),
        )
        for order, (name, gpu, size, job_class, stopping) in enumerate(tenants)
    )  # fmt: skip
    held = [uuid for tenant in there for uuid in tenant.gpu_uuids] + list(strays)
    free = tuple(gpu.uuid for gpu in gpus if gpu.uuid not in held)
    return Offer("n1", gpus, free, 100 * GIGABYTE, 4, there, strays=strays)


def decide(node: Offer, *specs: JobSpec) -> Plan:
    return place([Need(number, spec) for number, spec in enumerate(specs, start=1)], [node])


def chosen(plan: Plan) -> dict[int, str]:
    return {start.job_id: start.places[0].gpu_uuids[0] for start in plan.starts}


STAYING = (JobClass.GUARANTEED, False)
SPARE = (JobClass.SPARE, False)


def test_a_gpu_that_is_shared_is_taken_first_and_the_tightest_of_them() -> None:
    node = offer("80 80 80 24", ("7.1", 0, 20, *STAYING), ("8.1", 1, 60, *STAYING))
    assert chosen(decide(node, share(10), share(10), share(40))) == {1: "g1", 2: "g0", 3: "g0"}


def test_else_the_smallest_free_one_that_is_large_enough() -> None:
    node = offer("80 24 40", ("7.1", 2, 0, *STAYING))
    assert chosen(decide(node, share(8), share(30))) == {1: "g1", 2: "g0"}


def test_a_share_of_just_what_may_be_shared_fits_and_one_byte_more_does_not() -> None:
    node = offer("80", ("7.1", 0, 10, *STAYING))
    left = shareable_bytes(node.gpus[0]) - 10 * GIGABYTE
    exact = replace(WHOLE, shared_gpu_memory_bytes=left)
    assert chosen(decide(node, exact)) == {1: "g0"}
    assert not decide(node, replace(exact, shared_gpu_memory_bytes=left + 1)).starts


def test_no_more_jobs_share_a_gpu_than_the_bound() -> None:
    plan = decide(offer("80"), *[share(1)] * (SHARERS_MAX + 1))
    assert len(plan.starts) == SHARERS_MAX
    assert f"beside {SHARERS_MAX} jobs ({SHARERS_MAX} at most)" in plan.waits[0][1]


def test_what_leaves_for_two_is_displaced_once() -> None:
    node = offer("80 80", ("7.1", 0, 0, *SPARE), ("8.1", 1, 0, *SPARE))
    plan = decide(node, share(20, JobClass.GUARANTEED), share(20, JobClass.GUARANTEED))
    assert [displace.attempt for displace in plan.displacements] == ["8.1"]
    assert not plan.starts


def test_nobody_joins_a_gpu_that_is_kept_for_a_job_that_wants_all_of_it() -> None:
    node = offer("80", ("7.1", 0, 8, *SPARE), ("8.1", 0, 8, JobClass.SPARE, True))
    plan = decide(node, replace(WHOLE, job_class=JobClass.GUARANTEED), share(8))
    assert [displace.attempt for displace in plan.displacements] == ["7.1"]
    assert not plan.starts
    assert dict(plan.waits)[1] == "jobs 7 and 8 have to save and leave n1 first"


def test_only_as_many_sharers_leave_as_must() -> None:
    node = offer("80", ("7.1", 0, 10, *SPARE), ("8.1", 0, 40, *SPARE), ("9.1", 0, 5, *SPARE))
    plan = decide(node, share(40, JobClass.GUARANTEED))
    assert [displace.attempt for displace in plan.displacements] == ["8.1"]


@pytest.mark.parametrize("spec", [share(8), WHOLE])
def test_beside_what_should_not_run_there_nobody_starts(spec: JobSpec) -> None:
    node = offer("80", ("7.1", 0, 8, *SPARE), strays=("g0",))
    assert not decide(node, spec).starts
    assert not decide(node, replace(spec, job_class=JobClass.GUARANTEED)).displacements


@pytest.mark.parametrize(
    ("holds", "spec", "expected"),
    [
        ([], WHOLE, (True, True)),
        ([], share(8), (True, True)),
        ([(0, True)], share(8), (False, True)),
        ([(0, False)], share(8), (False, False)),
        ([(20, True), (20, False)], WHOLE, (False, False)),
        ([(20, True), (20, True)], WHOLE, (False, True)),
        ([(20, True), (20, False)], share(32), (True, True)),
        ([(20, True), (20, False)], share(33), (False, True)),
        ([(20, True), (20, False)], share(53), (False, False)),
    ],
)
def test_a_standby_s_gpu_has_room_or_gets_it(
    holds: list[tuple[int, bool]], spec: JobSpec, expected: tuple[bool, bool]
) -> None:
    """Of 80 GB, of which 72 may be shared: now, and when those have left who would have to."""
    gpu = GpuFacts("g0", "H100", 80 * GIGABYTE)
    there = [
        (Hold(f"{number}.1", size * GIGABYTE), leaves)
        for number, (size, leaves) in enumerate(holds, start=1)
    ]
    assert gives_room(gpu, there, spec) == expected


def test_beside_one_that_is_shunned_is_where_a_job_goes_last() -> None:
    node = offer("80 80", ("7.1", 0, 20, *STAYING))
    need = Need(1, share(10), shunned=frozenset({"7.1"}))
    assert chosen(place([Need(1, share(10))], [node])) == {1: "g0"}
    assert chosen(place([need], [node])) == {1: "g1"}
    full = offer("80", ("7.1", 0, 20, *STAYING))
    assert chosen(place([need], [full])) == {1: "g0"}, "it does not wait for that"


def test_it_leaves_its_last_checkpoint_behind_for_that() -> None:
    here = offer("80", ("7.1", 0, 20, *STAYING))
    there = replace(offer("80"), node="n2")
    need = Need(1, share(10), replicas=("n1",), near=("n1",))
    (start,) = place([need], [here, there]).starts
    assert start.places[0].node == "n1"
    (start,) = place([replace(need, shunned=frozenset({"7.1"}))], [here, there]).starts
    assert start.places[0].node == "n2"
