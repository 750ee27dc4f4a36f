"""Placement as properties: whatever the queue and the fleet, these hold for one pass.

Problem: a table of examples for a scheduler tests the author's imagination. So queues and fleets
are drawn, and the plan is checked by counting, not by a second scheduler.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import placement
from coordinator.core.demand import ask_of, parts_of
from coordinator.core.fragmentation import Mix
from coordinator.core.gpu_types import key_of
from coordinator.core.model import CLASS_RANK, GpuFacts, JobClass, JobSpec
from coordinator.core.placement import Need, Plan, place
from coordinator.core.rooms import Offer, Place, Tenant, open_room
from coordinator.core.shares import SHARERS_MAX, SHARES_PERCENT_MAX
from coordinator.core.validate import suits
from tests.core.coordinator_harness import GIGABYTE, gpus_of

SPECS = st.builds(
    JobSpec,
    command=st.just(("train",)),
    job_class=st.sampled_from(JobClass),
    gpus=st.integers(0, 4),
    gpu_types=st.sampled_from([(), ("H100",), ("A100", "H100")]),
    memory_bytes=st.sampled_from([0, 10 * GIGABYTE, 60 * GIGABYTE]),
    ranks=st.sampled_from([1, 1, 2, 3, 5]),
) | st.builds(
    JobSpec,
    command=st.just(("train",)),
    job_class=st.sampled_from(JobClass),
    gpus=st.just(1),
    gpu_types=st.sampled_from([(), ("H100",)]),
    memory_bytes=st.sampled_from([0, 0, 60 * GIGABYTE]),
    shared_gpu_memory_bytes=st.sampled_from([8 * GIGABYTE, 30 * GIGABYTE, 72 * GIGABYTE]),
    share_automatic=st.sampled_from([False, False, True]),
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
        # Gangs have their ranks on several nodes, all of one class, and leave together.
        gang = draw(st.sampled_from(["", "", "g0", "g1", "g2", "g3"]))
        if gang:
            rank, stopping, name = int(gang[1]) % 3, gang == "g3", f"{gang}.1.{node}{number}"
        tenants.append(Tenant(name, rank, number, tuple(taken), memory_bytes, stopping, gang))
    for uuid in left[: draw(st.integers(0, 2))]:
        for number in range(draw(st.integers(1, 3))):
            share_bytes = draw(st.sampled_from([4, 12, 20])) * GIGABYTE
            rank, stopping = draw(st.integers(0, 2)), draw(st.booleans())
            name = f"{uuid}{number}.1"
            pairs = number == 0 and draw(st.sampled_from([False, False, True]))
            tenant = Tenant(name, rank, 9, (uuid,), 0, stopping, "", share_bytes, in_pairs=pairs)
            tenants.append(tenant)
    held = [uuid for tenant in tenants for uuid in tenant.gpu_uuids]
    free = tuple(gpu.uuid for gpu in gpus if gpu.uuid not in held)
    knows = draw(st.sampled_from([True, True, True, False]))
    shares = draw(st.sampled_from([True, True, False]))
    return Offer(node, gpus, free, 100 * GIGABYTE, 4, tuple(tenants), gangs=knows, shares=shares)


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


def _mix_of(specs: Sequence[JobSpec]) -> Mix:
    return Mix(Counter(ask_of(spec) for spec in specs), parts_of)


@pytest.mark.long
@given(
    queues(),
    offers(),
    st.lists(st.sampled_from(["", "n0", "n1", "n3"]), min_size=16),
    st.lists(SPECS, max_size=6),
)
def test_who_asks_few_rooms_chooses_as_who_asks_all(
    needs: list[Need], fleet: list[Offer], names: list[str], recent: list[JobSpec]
) -> None:
    pairs = zip(needs, names[::2], names[1::2], strict=False)
    needs = [replace(need, avoid=avoid, near=(near,)) for need, avoid, near in pairs]
    few = place(needs, fleet, _mix_of(recent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "first_that_takes", placement.best_of_all)
        assert place(needs, fleet, _mix_of(recent)) == few


@pytest.mark.long
@given(queues(), offers(), st.lists(SPECS, max_size=6))
def test_nothing_is_placed_over_capacity(
    needs: list[Need], fleet: list[Offer], recent: list[JobSpec]
) -> None:
    """Whatever came lately."""
    plan = place(needs, fleet, _mix_of(recent))
    whole = [
        uuid
        for job_id, share in _places(plan)
        if not _spec_of(needs, job_id).shared_gpu_memory_bytes
        for uuid in share.gpu_uuids
    ]
    assert all(count == 1 for count in Counter(whole).values())
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
                assert suits(spec, facts[uuid])
                if not spec.shared_gpu_memory_bytes:
                    assert uuid in offer.free
                    continue
                beside = [t.share_bytes for t in offer.tenants if uuid in t.gpu_uuids]
                beside += [
                    other.shared_gpu_memory_bytes
                    for (_, taken), other in zip(here, specs, strict=True)
                    if uuid in taken.gpu_uuids
                ]
                assert offer.shares, "its agent would start it as if it were alone"
                assert all(beside), "beside a job that has the GPU alone"
                assert len(beside) <= SHARERS_MAX
                pairs = any(t.in_pairs for t in offer.tenants if uuid in t.gpu_uuids)
                assert len(beside) <= 2 or not (pairs or spec.share_automatic)
                assert sum(beside) * 100 <= facts[uuid].memory_bytes * SHARES_PERCENT_MAX


@pytest.mark.long
@given(queues(), offers())
def test_every_job_starts_or_waits_with_numbers(needs: list[Need], fleet: list[Offer]) -> None:
    plan = place(needs, fleet)
    answered = [start.job_id for start in plan.starts] + [job_id for job_id, _ in plan.waits]
    assert sorted(answered) == sorted(need.job_id for need in needs)
    for start in plan.starts:
        assert len(start.places) == _spec_of(needs, start.job_id).ranks, "all ranks or none"
    for job_id, sentence in plan.waits:
        numbered = any(letter.isdigit() for letter in sentence)
        assert numbered or _spec_of(needs, job_id).gpus == 0, sentence


@pytest.mark.long
@given(queues(), offers())
def test_an_agent_from_before_gangs_gets_no_rank(needs: list[Need], fleet: list[Offer]) -> None:
    """And is as good as any other for a job of one."""
    plan = place(needs, fleet)
    old = [offer.node for offer in fleet if not offer.gangs]
    for start in plan.starts:
        if _spec_of(needs, start.job_id).ranks > 1:
            assert not any(share.node in old for share in start.places)
    single = [need for need in needs if need.spec.ranks == 1]
    upgraded = [replace(offer, gangs=True) for offer in fleet]
    assert place(single, fleet).starts == place(single, upgraded).starts


@pytest.mark.long
@given(queues(), offers(), st.lists(SPECS, max_size=6))
def test_the_order_of_offers_does_not_matter(
    needs: list[Need], fleet: list[Offer], recent: list[JobSpec]
) -> None:
    """Nor does what a mix was asked before."""
    shuffled = [replace(offer, free=offer.free[::-1]) for offer in reversed(fleet)]
    mix = _mix_of(recent)
    assert place(needs, shuffled, mix) == place(needs, fleet, mix)
    assert place(needs, fleet, mix) == place(needs, fleet, _mix_of(recent[::-1]))


@pytest.mark.long
@given(SPECS, offers(), st.lists(SPECS, max_size=6))
def test_of_the_nodes_that_fit_others_lose_least_by_the_one_that_is_chosen(
    spec: JobSpec, fleet: list[Offer], recent: list[JobSpec]
) -> None:
    """Among those with a copy of the checkpoint, and of GPUs that are shared already, where there
    are such. Each node is asked as if it were alone."""
    mix = _mix_of(recent)
    need = Need(1, replace(spec, ranks=1), ("n1", "n2"))
    ranks = {}
    for offer in fleet:
        for start in place([need], [offer]).starts:
            gpu_uuids = start.places[0].gpu_uuids
            room = open_room(offer)
            increase = mix.cost(room.box(need.spec, (gpu_uuids,))) - mix.cost(room.box())
            opens = spec.shared_gpu_memory_bytes > 0 and gpu_uuids[0] in offer.free
            ranks[offer.node] = (offer.node not in need.replicas, opens, increase)
    starts = place([need], fleet, mix).starts
    assert bool(starts) == bool(ranks)
    for start in starts:
        assert ranks[start.places[0].node] == min(ranks.values())


@pytest.mark.long
@given(queues(), offers())
def test_victims_are_of_lower_classes_and_none_is_needless(
    needs: list[Need], fleet: list[Offer]
) -> None:
    """The first job that displaces anybody does so in an untouched fleet: spare one of its victims
    and it must not fit."""
    tenants = {tenant.attempt: tenant for offer in fleet for tenant in offer.tenants}
    plan = place(needs, fleet)
    displaced = Counter(tenants[displace.attempt].whole for displace in plan.displacements)
    assert all(count == 1 for count in displaced.values())
    for displace in plan.displacements:
        victim = tenants[displace.attempt]
        assert not victim.stopping
        assert victim.rank > CLASS_RANK[_spec_of(needs, displace.job_id).job_class]
    for need in needs:
        alone = place([need], fleet)
        for spared in alone.displacements:
            assert not _fits_when_gone(need, fleet, alone, tenants[spared.attempt].whole), spared


def _fits_when_gone(need: Need, fleet: list[Offer], plan: Plan, spared: str) -> bool:
    """On the nodes that it waits for, and of several only with others of them: one node more is
    another choice."""
    tenants = {tenant.attempt: tenant for offer in fleet for tenant in offer.tenants}
    victims = [tenants[displace.attempt].whole for displace in plan.displacements]
    left = [_without(offer, [whole for whole in victims if whole != spared]) for offer in fleet]
    if need.spec.ranks == 1:
        homes = [tenants[displace.attempt].whole for displace in plan.displacements]
        left = [offer for offer in left if _home_of(fleet, homes) == offer.node]
    return bool(place([need], left).starts)


def _home_of(fleet: list[Offer], wholes: list[str]) -> str:
    """The node that has all of them."""
    for offer in fleet:
        here = [tenant.whole for tenant in offer.tenants]
        if all(whole in here for whole in wholes):
            return offer.node
    raise AssertionError(f"{wholes} are nowhere together")


def _without(offer: Offer, wholes: list[str]) -> Offer:
    gone = [tenant for tenant in offer.tenants if tenant.stopping or tenant.whole in wholes]
    left = tuple(tenant for tenant in offer.tenants if tenant not in gone)
    held = [uuid for tenant in left for uuid in tenant.gpu_uuids]
    freed = dict.fromkeys(uuid for tenant in gone for uuid in tenant.gpu_uuids)
    free = offer.free + tuple(uuid for uuid in freed if uuid not in held)
    return replace(offer, free=free, tenants=left)


@pytest.mark.long
@given(queues(), offers())
def test_a_gang_takes_the_fewest_nodes(needs: list[Need], fleet: list[Offer]) -> None:
    """Of the first job in an untouched fleet: no smaller set of nodes has room for all ranks."""
    for need in needs:
        for start in place([need], fleet).starts:
            nodes = list(dict.fromkeys(share.node for share in start.places))
            assert [p.node for p in start.places] == sorted(p.node for p in start.places)
            for fewer in combinations(fleet, len(nodes) - 1):
                assert not place([replace(need, avoid="")], fewer).starts, f"{nodes} are many"


@pytest.mark.long
@given(queues(), offers())
def test_a_gang_that_waits_fits_nowhere(needs: list[Need], fleet: list[Offer]) -> None:
    """Counted rank by rank, as single jobs on the same nodes."""
    for need in needs:
        if not place([need], fleet).starts:
            one = replace(need.spec, ranks=1)
            singles = [Need(number, one) for number in range(need.spec.ranks)]
            able = [offer for offer in fleet if offer.gangs or need.spec.ranks == 1]
            assert len(place(singles, able).starts) < need.spec.ranks


@pytest.mark.long
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


def test_pairs_are_kept_for_those_who_want_pairs() -> None:
    """A single GPU fits tightest where it breaks a pair; those who asked lately want pairs."""
    fleet = [_node("n1", ["H100"] * 2), _node("n2", ["H100"] * 3)]
    assert place([Need(1, _job(1))], fleet).starts[0].places[0].node == "n1"
    mix = _mix_of([_job(2), _job(2), _job(1), _job(4)])
    start = place([Need(1, _job(1))], fleet, mix).starts[0]
    assert start.places[0].node == "n2"
    leaves = "leaves 2 GPUs there, of use to 75% of recent requests"
    assert start.why == f"runs on 1 x H100 on n2 and {leaves}"


def test_host_memory_is_kept_where_gpus_are_free() -> None:
    """A job without GPUs takes the memory of the node that has fewer of them to feed."""
    busy = Tenant("1.1", 1, 1, ("n2-g0", "n2-g1", "n2-g2"), 0, False)
    fleet = [_node("n1", ["H100"] * 4), _node("n2", ["H100"] * 4, (busy,))]
    large = JobSpec(command=("x",), memory_bytes=90 * GIGABYTE)
    mix = _mix_of([replace(_job(1), memory_bytes=25 * GIGABYTE)])
    assert place([Need(1, large)], fleet).starts[0].places[0].node == "n1"
    assert place([Need(1, large)], fleet, mix).starts[0].places[0].node == "n2"


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


def _gang(ranks: int, job_class: JobClass = JobClass.STANDARD) -> JobSpec:
    return JobSpec(command=("x",), gpus=1, ranks=ranks, job_class=job_class)


def _counts(plan: Plan) -> dict[str, int]:
    return dict(Counter(share.node for start in plan.starts for share in start.places))


def test_a_gang_prefers_one_node_and_there_the_tightest() -> None:
    fleet = [_node("n1", ["H100"] * 3), _node("n2", ["H100"] * 8), _node("n3", ["H100"] * 4)]
    assert _counts(place([Need(1, _gang(4))], fleet)) == {"n3": 4}
    assert _counts(place([Need(1, _gang(4), ("n2",))], fleet)) == {"n2": 4}


def test_the_rest_of_a_gang_goes_where_it_fits_tightest() -> None:
    fleet = [_node("n1", ["H100"] * 4), _node("n2", ["H100"] * 3), _node("n3", ["H100"])]
    assert _counts(place([Need(1, _gang(5))], fleet)) == {"n1": 4, "n3": 1}


def test_a_gang_avoids_a_node_even_if_that_takes_more_of_them() -> None:
    fleet = [_node("n1", ["H100"] * 4), _node("n2", ["H100"] * 2), _node("n3", ["H100"] * 2)]
    assert _counts(place([Need(1, _gang(4), avoid="n1")], fleet)) == {"n2": 2, "n3": 2}
    assert _counts(place([Need(1, _gang(5), avoid="n1")], fleet)) == {"n1": 4, "n2": 1}


def test_a_rank_that_is_displaced_counts_with_all_of_its_gang() -> None:
    """One GPU of a gang of three costs three; two of two single jobs cost two."""
    ranks = [Tenant(f"1.1.{i}", 2, 9, (f"n1-g{i}",), 0, False, "1.1") for i in range(3)]
    singles = [Tenant(f"{i + 5}.1", 2, 1, (f"n2-g{i}",), 0, False) for i in range(2)]
    fleet = [_node("n1", ["H100"] * 3, tuple(ranks)), _node("n2", ["H100"] * 2, tuple(singles))]
    plan = place([Need(9, _job(2, JobClass.GUARANTEED))], fleet)
    assert sorted(displace.attempt for displace in plan.displacements) == ["5.1", "6.1"]
    plan = place([Need(9, _job(3, JobClass.GUARANTEED))], fleet)
    assert [displace.attempt for displace in plan.displacements] == ["1.1.0"]
    assert plan.waits == ((9, "job 1 has to save and leave n1 first"),)


def test_a_gang_displaces_over_several_nodes_and_keeps_what_it_waits_for() -> None:
    spare = [Tenant(f"{i}.1", 2, i, (f"n{i}-g0",), 0, False) for i in (1, 2, 3)]
    fleet = [_node(f"n{i}", ["H100"], (spare[i - 1],)) for i in (1, 2, 3)]
    needs = [Need(8, _gang(2, JobClass.GUARANTEED)), Need(9, _gang(1))]
    plan = place(needs, fleet)
    assert [(d.attempt, d.job_id) for d in plan.displacements] == [
        ("3.1", 8), ("2.1", 8), ("1.1", 9),
    ]  # fmt: skip
    assert plan.waits[0][1] == "jobs 2 and 3 have to save and leave n2 and n3 first"


def test_the_sentence_says_where_places_are_free() -> None:
    fleet = [_node("n1", ["H100"] * 2), _node("n2", ["H100"])]
    assert place([Need(1, _gang(4))], fleet).waits[0][1] == (
        "needs 4 ranks of 1 GPU each; places for 3 are free, 2 on n1 and 1 on n2"
    )
    many = [_node(f"n{i}", ["H100"]) for i in range(9)]
    assert place([Need(1, _gang(10))], many).waits[0][1] == (
        "needs 10 ranks of 1 GPU each; places for 9 are free, 1 on n0, 1 on n1, 1 on n2, 1 on n3"
        " and 5 on 5 more"
    )


def test_a_large_gang_displaces_in_a_large_fleet() -> None:
    """Hundreds of nodes and tenants: the search looks only at rooms that have changed."""
    fleet = []
    for number in range(200):
        name = f"n{number}"
        uuids = [f"{name}-g{i}" for i in range(8)]
        tenants = [Tenant(f"{uuid}.1", 2, number, (uuid,), 0, False) for uuid in uuids]
        fleet.append(_node(name, ["H100"] * 8, tuple(tenants)))
    plan = place([Need(1, _gang(1_000, JobClass.GUARANTEED))], fleet)
    assert len(plan.displacements) == 1_000


def test_where_the_checkpoint_lies_comes_before_a_type_that_is_a_little_faster() -> None:
    """Handoff in seconds: what it needs is there. Not where it is less than half as fast."""
    offers = [
        Offer(name, gpus_of(name, text), (f"{name}-g0",), 64 * GIGABYTE, 4, ())
        for name, text in (("n1", "1xH100:80"), ("n2", "1xA100:80"), ("n3", "1xA100:80"))
    ]

    def node(slow: float, replicas: tuple[str, ...] = (), near: tuple[str, ...] = ()) -> str:
        types = (("H100", 1.0), ("A100 80GB", slow))
        need = Need(1, JobSpec(command=("x",), gpus=1), replicas, near=near, types=types)
        return place([need], offers).starts[0].places[0].node

    assert node(0.6) == "n1"
    assert node(0.6, replicas=("n3",)) == "n3"
    assert node(0.6, near=("n2",)) == "n2"
    assert node(0.6, replicas=("n3",), near=("n2",)) == "n3"
    assert node(0.4, replicas=("n3",)) == "n1"


@pytest.mark.parametrize("promised", [False, True])
def test_who_was_promised_a_type_waits_for_a_gpu_of_his_own_there(promised: bool) -> None:
    gpus = gpus_of("n1", "2xH100:80")
    size = 8 * GIGABYTE
    tenants = (
        Tenant("1.1", 1, 0, (gpus[0].uuid,), 0, False, share_bytes=size, in_pairs=True),
        Tenant("2.1", 1, 0, (gpus[1].uuid,), 0, True),
    )
    spec = JobSpec(command=("x",), gpus=1, shared_gpu_memory_bytes=size, share_automatic=True)
    only = key_of(gpus[0].name, gpus[0].memory_bytes) if promised else ""
    plan = place([Need(3, spec, only=only)], [Offer("n1", gpus, (), 0, 1, tenants)])
    if promised:
        assert plan.waits == ((3, "job 2 has to save and leave n1 first"),)
    else:
        assert [start.places for start in plan.starts] == [(Place("n1", (gpus[0].uuid,)),)]
