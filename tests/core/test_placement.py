"""Placement as properties: whatever the queue and the fleet, these hold for one pass.

Problem: a table of examples for a scheduler tests the author's imagination. So queues and fleets
are drawn, and the plan is checked by counting, not by a second scheduler.
"""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.model import CLASS_RANK, GpuFacts, JobClass, JobSpec
from coordinator.core.placement import Need, Offer, Place, Plan, Tenant, place
from coordinator.core.validate import suits
from tests.core.coordinator_harness import GIGABYTE

SPECS = st.builds(
    JobSpec,
    command=st.just(("train",)),
    job_class=st.sampled_from(JobClass),
    gpus=st.integers(0, 4),
    gpu_types=st.sampled_from([(), ("H100",), ("A100", "H100")]),
    memory_bytes=st.sampled_from([0, 10 * GIGABYTE, 60 * GIGABYTE]),
)


@st.composite
def offers(draw: st.DrawFn) -> list[Offer]:
    return [draw(_offer(f"n{number}")) for number in range(draw(st.integers(0, 4)))]


@st.composite
def _offer(draw: st.DrawFn, node: str) -> Offer:
    kinds = draw(st.lists(st.sampled_from(["H100", "A100"]), max_size=5))
    gpus = tuple(GpuFacts(f"{node}-g{i}", kind, 80 * GIGABYTE) for i, kind in enumerate(kinds))
    left = [gpu.uuid for gpu in gpus]
    tenants = []
    for number in range(draw(st.integers(0, 4))):
        taken, left = left[: draw(st.integers(0, 2))], left[2:]
        memory_bytes = draw(st.sampled_from([0, 20 * GIGABYTE]))
        rank, stopping = draw(st.integers(0, 2)), draw(st.booleans())
        name = f"{node}{number}.1"
        tenants.append(Tenant(name, rank, number, tuple(taken), memory_bytes, stopping))
    held = [uuid for tenant in tenants for uuid in tenant.gpu_uuids]
    free = tuple(gpu.uuid for gpu in gpus if gpu.uuid not in held)
    return Offer(node, gpus, free, 100 * GIGABYTE, 4, tuple(tenants))


@st.composite
def queues(draw: st.DrawFn) -> list[Need]:
    specs = draw(st.lists(SPECS, max_size=8))
    replicas = st.sampled_from([(), ("n0",), ("n1", "n2")])
    needs = [Need(number, spec, draw(replicas)) for number, spec in enumerate(specs, start=1)]
    return sorted(needs, key=lambda need: (CLASS_RANK[need.spec.job_class], need.job_id))


def _spec_of(needs: list[Need], job_id: int) -> JobSpec:
    return next(need.spec for need in needs if need.job_id == job_id)


def _places(plan: Plan) -> list[tuple[int, Place]]:
    return [(start.job_id, share) for start in plan.starts for share in start.places]


@given(queues(), offers())
def test_nothing_is_placed_over_capacity(needs: list[Need], fleet: list[Offer]) -> None:
    plan = place(needs, fleet)
    given_out = Counter(uuid for _, share in _places(plan) for uuid in share.gpu_uuids)
    assert all(count == 1 for count in given_out.values())
    for offer in fleet:
        here = [(job_id, share) for job_id, share in _places(plan) if share.node == offer.node]
        specs = [_spec_of(needs, job_id) for job_id, _ in here]
        memory_bytes = sum(t.memory_bytes for t in offer.tenants)
        slots = sum(1 for t in offer.tenants if not t.gpu_uuids)
        assert not here or memory_bytes + sum(s.memory_bytes for s in specs) <= offer.memory_bytes
        started = sum(1 for spec in specs if spec.gpus == 0)
        assert not started or slots + started <= offer.slots
        facts = {gpu.uuid: gpu for gpu in offer.gpus}
        for (_, share), spec in zip(here, specs, strict=True):
            assert len(share.gpu_uuids) == spec.gpus
            for uuid in share.gpu_uuids:
                assert uuid in offer.free
                assert suits(spec, facts[uuid])


@given(queues(), offers())
def test_every_job_starts_or_waits_with_numbers(needs: list[Need], fleet: list[Offer]) -> None:
    plan = place(needs, fleet)
    answered = [start.job_id for start in plan.starts] + [job_id for job_id, _ in plan.waits]
    assert sorted(answered) == sorted(need.job_id for need in needs)
    for job_id, sentence in plan.waits:
        numbered = any(letter.isdigit() for letter in sentence)
        assert numbered or _spec_of(needs, job_id).gpus == 0, sentence


@given(queues(), offers())
def test_the_order_of_offers_does_not_matter(needs: list[Need], fleet: list[Offer]) -> None:
    shuffled = [replace(offer, free=offer.free[::-1]) for offer in reversed(fleet)]
    assert place(needs, shuffled) == place(needs, fleet)


@given(queues(), offers())
def test_victims_are_of_lower_classes_and_none_is_needless(
    needs: list[Need], fleet: list[Offer]
) -> None:
    """The first job that displaces anybody does so in an untouched fleet: spare one of its victims
    and it must not fit."""
    tenants = {tenant.attempt: tenant for offer in fleet for tenant in offer.tenants}
    plan = place(needs, fleet)
    displaced = Counter(displace.attempt for displace in plan.displacements)
    assert all(count == 1 for count in displaced.values())
    for displace in plan.displacements:
        victim = tenants[displace.attempt]
        assert not victim.stopping
        assert victim.rank > CLASS_RANK[_spec_of(needs, displace.job_id).job_class]
    for need in needs:
        alone = place([need], fleet)
        for spared in alone.displacements:
            assert not _fits_when_gone(need, fleet, alone, spared.attempt), spared


def _fits_when_gone(need: Need, fleet: list[Offer], plan: Plan, spared: str) -> bool:
    victims = [displace.attempt for displace in plan.displacements if displace.attempt != spared]
    for offer in fleet:
        if not any(tenant.attempt == spared for tenant in offer.tenants):
            continue
        gone = [t for t in offer.tenants if t.stopping or t.attempt in victims]
        free = offer.free + tuple(uuid for tenant in gone for uuid in tenant.gpu_uuids)
        left = tuple(tenant for tenant in offer.tenants if tenant not in gone)
        return bool(place([need], [replace(offer, free=free, tenants=left)]).starts)
    raise AssertionError(f"{spared} is nowhere")


@given(queues(), offers())
def test_a_higher_class_never_waits_for_a_lower_one(needs: list[Need], fleet: list[Offer]) -> None:
    """Whatever the lower classes ask for, the guaranteed jobs get the same."""
    guaranteed = [need for need in needs if need.spec.job_class is JobClass.GUARANTEED]
    alone = place(guaranteed, fleet)
    assert place(needs, fleet).starts[: len(alone.starts)] == alone.starts


def _node(name: str, kinds: list[str], tenants: tuple[Tenant, ...] = ()) -> Offer:
    gpus = tuple(GpuFacts(f"{name}-g{i}", kind, 80 * GIGABYTE) for i, kind in enumerate(kinds))
    held = [uuid for tenant in tenants for uuid in tenant.gpu_uuids]
    free = tuple(gpu.uuid for gpu in gpus if gpu.uuid not in held)
    return Offer(name, gpus, free, 100 * GIGABYTE, 4, tenants)


def _job(gpus: int, job_class: JobClass = JobClass.STANDARD) -> JobSpec:
    return JobSpec(command=("x",), gpus=gpus, job_class=job_class)


def test_a_node_with_a_copy_comes_before_the_tightest_fit() -> None:
    fleet = [_node("n1", ["H100"]), _node("n2", ["H100"] * 4)]
    assert place([Need(1, _job(1), ("n2",))], fleet).starts[0].places[0].node == "n2"
    assert place([Need(1, _job(1))], fleet).starts[0].places[0].node == "n1"


def test_two_spare_victims_are_better_than_one_standard() -> None:
    standard = Tenant("1.1", 1, 1, ("n1-g0", "n1-g1"), 0, False)
    spare = [Tenant(f"{i}.1", 2, i, (f"n2-g{i - 2}",), 0, False) for i in (2, 3, 4)]
    fleet = [_node("n1", ["H100"] * 2, (standard,)), _node("n2", ["H100"] * 3, tuple(spare))]
    plan = place([Need(9, _job(2, JobClass.GUARANTEED))], fleet)
    # Of the three that would do, those that have run the shortest.
    assert [displace.attempt for displace in plan.displacements] == ["4.1", "3.1"]


def test_a_higher_class_is_spared_before_a_lower_one() -> None:
    tenants = (
        Tenant("1.1", 2, 9, ("n1-g0",), 0, False),
        Tenant("2.1", 1, 9, ("n1-g1",), 0, False),
        Tenant("3.1", 1, 1, ("n1-g2", "n1-g3"), 0, False),
    )
    plan = place([Need(9, _job(3, JobClass.GUARANTEED))], [_node("n1", ["H100"] * 4, tenants)])
    assert [displace.attempt for displace in plan.displacements] == ["1.1", "3.1"]


def test_a_long_queue_meets_a_large_fleet() -> None:
    fleet = [_node(f"n{number}", ["H100"] * 8) for number in range(200)]
    kinds = list(JobClass)
    needs = [Need(number, _job(number % 9, kinds[number % 3])) for number in range(1, 2_001)]
    needs.sort(key=lambda need: (CLASS_RANK[need.spec.job_class], need.job_id))
    plan = place(needs, fleet)
    assert len(plan.starts) + len(plan.waits) == 2_000
    assert len(plan.starts) > 200
