"""Bills: sums add up however time and work are cut, a restart changes nothing, idle is nobody's."""

import json
from collections.abc import Iterable
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import bills, shares, tariffs
from coordinator.core.cost_requests import CostPage, GetCosts, Grouping, Money
from coordinator.core.ledger import gpu_parts
from coordinator.core.messages import Refusal
from coordinator.core.model import (
    Attempt,
    AttemptTimes,
    GpuFacts,
    HostFacts,
    Job,
    JobSpec,
    Node,
    Snapshot,
)
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.state import Instant, Options, State
from coordinator.core.tariffs import Lease, Prices, Tariff

H_MS = bills.MS_PER_H
DAY_MS = bills.MS_PER_DAY
BEGIN = 20_000 * DAY_MS  # a midnight
GIB = 1024**3
H100, A100 = GpuFacts("", "NVIDIA H100 80GB HBM3", 80 * GIB), GpuFacts("", "A100-SXM4", 80 * GIB)
OWN = Tariff(lease_usd=2.0, burst_usd=4.0, owned_usd=1.0, loaded_watts=500.0)
LEASE = Lease("november", "H100", 8, BEGIN, BEGIN + 2 * DAY_MS, "lease-*")
OPTIONS = Options(
    prices=Prices({"H100": OWN}, energy_usd_per_kwh=0.2, overhead_ratio=2.0),
    leases=(LEASE,),
    burst_nodes=("cloud-*",),
)
NODES = ("own-1", "lease-1", "cloud-1", "old-1")


def node(name: str) -> Node:
    kind = A100 if name == "old-1" else H100
    gpus = tuple(replace(kind, uuid=f"{name}/{index}") for index in range(8))
    return Node(name, "j", "a:1", HostFacts(), gpus)


def job(job_id: int, project: str = "demo", **spec: object) -> Job:
    wanted = JobSpec(project=project, gpus=1, **spec)  # type: ignore[arg-type]
    return Job(job_id, wanted, JobPhase.ACTIVE, BEGIN)


def attempt(
    job_id: int, epoch: int, place: str, begin_h: float, end_h: float | None, *, gpus: int = 1
) -> Attempt:
    begin = BEGIN + round(begin_h * H_MS)
    end = None if end_h is None else BEGIN + round(end_h * H_MS)
    phase = AttemptPhase.RUNNING if end is None else AttemptPhase.FAILED
    uuids = tuple(f"{place}/{index}" for index in range(gpus))
    return Attempt(job_id, epoch, place, uuids, phase, begin, begin, end)


def state_of(jobs: Iterable[Job], attempts: Iterable[Attempt], options: Options = OPTIONS) -> State:
    state = State(options)
    nodes = tuple(node(name) for name in NODES)
    state.load(Snapshot(jobs=tuple(jobs), attempts=tuple(attempts), nodes=nodes), 0)
    return state


def bill(state: State, begin_h: float, end_h: float, **asked: object) -> CostPage:
    span = (BEGIN + round(begin_h * H_MS), BEGIN + round(end_h * H_MS))
    now = Instant(0, BEGIN + 100 * DAY_MS)
    found = bills.answer(state, now, GetCosts(*span, **asked))  # type: ignore[arg-type]
    assert isinstance(found, CostPage)
    return found


attempts_drawn = st.lists(
    st.tuples(
        st.integers(1, 4), st.sampled_from(NODES), st.integers(0, 90), st.integers(1, 60),
        st.integers(1, 8),
    ),
    max_size=12,
).map(
    lambda drawn: [
        attempt(job_id, epoch, place, begin, begin + length, gpus=gpus)
        for epoch, (job_id, place, begin, length, gpus) in enumerate(drawn, 1)
    ]
)  # fmt: skip
JOBS = [job(1, "a"), job(2, "a"), job(3, "b"), job(4, "c")]


def close(one: Money, other: Money) -> bool:
    pairs = [(getattr(one, part.name), getattr(other, part.name)) for part in fields(Money)]
    return all(left == pytest.approx(right) for left, right in pairs)


@given(attempts_drawn, st.sampled_from(Grouping))
def test_lines_and_days_add_up_to_the_total(attempts: list[Attempt], by: Grouping) -> None:
    page = bill(state_of(JOBS, attempts), 0, 200, by=by)
    lines = Money()
    for line in page.lines:
        lines = bills.added(lines, line.money)
    assert close(lines, page.total)
    hours = sum(
        len(each.gpu_uuids) * ((each.ended_unix_ms or 0) - each.assigned_unix_ms) / H_MS
        for each in attempts
    )
    assert page.total.gpu_hours == pytest.approx(hours)
    assert sum(sum(use.gpus) for use in page.uses) == pytest.approx(hours)
    assert page.idle_lease_usd == pytest.approx(sum(day.idle_lease_usd for day in page.days))


@given(attempts_drawn, st.integers(1, 8))
def test_a_bill_of_two_spans_is_the_sum_of_both(attempts: list[Attempt], cut_days: int) -> None:
    state = state_of(JOBS, attempts)
    whole, first = bill(state, 0, 216), bill(state, 0, 24 * cut_days)
    second = bill(state, 24 * cut_days, 216)
    assert close(bills.added(first.total, second.total), whole.total)
    assert first.idle_lease_usd + second.idle_lease_usd == pytest.approx(whole.idle_lease_usd)


@given(attempts_drawn)
def test_a_restart_answers_the_same(attempts: list[Attempt]) -> None:
    before = bill(state_of(JOBS, attempts), 0, 100)
    assert bill(state_of(reversed(JOBS), reversed(attempts)), 0, 100) == before


def test_each_source_has_its_price() -> None:
    """Two hours on each: own with energy, the lease's and the hourly price without."""
    attempts = [attempt(1, n, place, 0, 2) for n, place in enumerate(NODES[:3], 1)]
    total = bill(state_of(JOBS, attempts), 0, 24).total
    assert (total.owned_usd, total.lease_usd, total.burst_usd) == (2.0, 4.0, 8.0)
    assert total.energy_kwh == pytest.approx(2 * 500 * 2 / 1000)
    assert total.energy_usd == pytest.approx(0.4)
    assert total.usd == pytest.approx(14.4)


def test_what_is_leased_and_idle_has_a_line_of_its_own() -> None:
    """Eight GPUs for two days at $2, of which one was used for ten hours."""
    page = bill(state_of(JOBS, [attempt(1, 1, "lease-1", 5, 15)]), 0, 200)
    assert page.total.lease_usd == 20.0
    assert page.idle_lease_usd == 8 * 48 * 2.0 - 20.0
    assert bill(state_of(JOBS, []), 0, 200, project="a").idle_lease_usd == 0.0


def test_a_stay_is_cut_where_its_lease_ends() -> None:
    total = bill(state_of(JOBS, [attempt(1, 1, "lease-1", 40, 60)]), 0, 200).total
    assert (total.lease_usd, total.owned_usd) == (16.0, 12.0)


def test_what_nobody_has_a_price_for_is_in_no_sum() -> None:
    page = bill(state_of(JOBS, [attempt(1, 1, "old-1", 0, 3, gpus=2)]), 0, 24)
    assert page.total.unpriced_gpu_hours == 6.0
    assert page.total.owned_usd == 0.0
    assert page.total.energy_kwh > 0, "what it draws is in the table"
    (use,) = page.uses
    assert (use.gpu_type, use.burst_usd) == ("A100 80GB", tariffs.public("A100 80GB").burst_usd)


def test_a_gpu_that_is_not_known_any_more_counts_without_a_price() -> None:
    lost = replace(attempt(1, 1, "gone-1", 0, 3), gpu_uuids=("gone-1/0",))
    page = bill(state_of(JOBS, [lost]), 0, 24, by=Grouping.GPU_TYPE)
    assert [(line.key, line.money.unpriced_gpu_hours) for line in page.lines] == [("unknown", 3.0)]


def test_a_gpu_that_is_full_of_sharers_costs_what_a_gpu_costs() -> None:
    """80 GiB, of which 72 may be shared: nobody else could have had the rest."""
    shared = [job(number, shared_gpu_memory_bytes=18 * GIB) for number in (1, 2, 3, 4)]
    stays = [attempt(number, 1, "own-1", 0, 4) for number in (1, 2, 3, 4)]
    page = bill(state_of(shared, stays), 0, 24, by=Grouping.JOB)
    assert [line.money.gpu_hours for line in page.lines] == [1.0] * 4
    assert page.total.gpu_hours == 4.0


@pytest.mark.parametrize("gib", [1, 18, 36, 72])
def test_a_share_is_the_same_part_in_bills_demand_and_quotas(gib: int) -> None:
    shared = job(1, shared_gpu_memory_bytes=gib * GIB)
    state = state_of([shared], [attempt(1, 1, "own-1", 0, 4)])
    gpu = state.nodes["own-1"].node.gpus[0]
    part = bill(state, 0, 24).total.gpu_hours / 4
    assert part == pytest.approx(gib / 72)
    whole = gpu_parts(job(1).spec, gpu)
    assert gpu_parts(shared.spec, gpu) == round(whole * part)
    assert shares.ratio(shared.spec, gpu) == part


def test_tokens_are_those_of_steps_that_nobody_had_made_before() -> None:
    """Forty steps of 1,024 tokens, ten of them again; on four GPUs for five hours at $1."""
    config = {"model": "m", "steps": 100, "batch_size": 8, "window_tokens": 128}
    trained = job(1, trainer="lora", trainer_config_json=json.dumps(config))
    ran = attempt(1, 1, "own-1", 0, 5, gpus=4)
    ran = replace(ran, restored_step=10, times=AttemptTimes(reached_step=20, step=50))
    other = attempt(2, 1, "own-1", 0, 5)
    total = bill(state_of([trained, job(2)], [ran, other]), 0, 24).total
    assert total.tokens == pytest.approx(30 * 1024)
    assert total.token_usd == pytest.approx(20 * 1.0 + 20 * 0.5 * 2 * 0.2), "not the other job's"
    half = bill(state_of([trained, job(2)], [ran, other]), 0, 2.5).total
    assert half.tokens == pytest.approx(15 * 1024)


def test_one_that_goes_on_stays_until_now() -> None:
    state = state_of(JOBS, [attempt(1, 1, "own-1", 0, None)])
    asked = GetCosts(BEGIN, BEGIN + 10 * DAY_MS)
    page = bills.answer(state, Instant(0, BEGIN + 6 * H_MS), asked)
    assert isinstance(page, CostPage)
    assert page.total.gpu_hours == 6.0
    assert len(page.days) == 1
    assert (page.begin_unix_ms, page.end_unix_ms) == (BEGIN, BEGIN + 6 * H_MS)


def test_the_last_hours_end_now_by_the_coordinators_clock() -> None:
    """Whatever the asker takes the time to be; with an end that has passed, they end there."""
    state = state_of(JOBS, [attempt(1, 1, "own-1", 0, None)])
    now = Instant(0, BEGIN + 6 * H_MS)
    asked = GetCosts(BEGIN + 30 * DAY_MS, BEGIN + 31 * DAY_MS, last_ms=2 * H_MS)
    for end_ms, until_ms in ((BEGIN + 31 * DAY_MS, now.unix_ms), (BEGIN + H_MS, BEGIN + H_MS)):
        page = bills.answer(state, now, replace(asked, end_unix_ms=end_ms))
        assert isinstance(page, CostPage)
        assert (page.begin_unix_ms, page.end_unix_ms) == (until_ms - 2 * H_MS, until_ms)
        assert page.total.gpu_hours == (2.0 if until_ms == now.unix_ms else 1.0)
    beginning = bills.answer(state, Instant(0, H_MS), replace(asked, last_ms=2 * H_MS))
    assert isinstance(beginning, CostPage), "a clock that stands at 1970 still has an answer"


@pytest.mark.parametrize(
    ("span", "sentence"),
    [
        ((0, 0), "a span begins before it ends"),
        ((5, 4), "a span begins before it ends"),
        ((-1, 4), "a span begins before it ends"),
        ((0, bills.SPAN_MS_MAX + 1), "a span is 366 days at most"),
    ],
)
def test_a_span_that_cannot_be_is_refused(span: tuple[int, int], sentence: str) -> None:
    found = bills.answer(state_of([], []), Instant(0, 10**15), GetCosts(*span))
    assert isinstance(found, Refusal)
    assert found.sentence == sentence


def test_a_project_that_nobody_has_is_refused_with_those_there_are() -> None:
    state = state_of([job(1, "vision"), job(2, "audio")], [])
    asked = GetCosts(BEGIN, BEGIN + DAY_MS, project="visoin")
    found = bills.answer(state, Instant(0, BEGIN + DAY_MS), asked)
    assert isinstance(found, Refusal)
    assert found.sentence == "no job of project 'visoin' is kept; there are audio, vision"
    known = bills.answer(state, Instant(0, BEGIN + DAY_MS), replace(asked, project="vision"))
    assert not isinstance(known, Refusal), "of one that has used nothing the bill is 0"


def test_what_was_waited_for_was_wanted() -> None:
    """Six hours in the queue, then four on two GPUs; the hours of the wait cost nothing."""
    ran = attempt(1, 1, "own-1", 6, 10, gpus=2)
    ran = replace(ran, times=AttemptTimes(queued_unix_ms=BEGIN))
    page = bill(state_of(JOBS, [ran]), 0, 24)
    (use,) = page.uses
    first = (BEGIN - use.begin_unix_ms) // H_MS
    assert use.wanted_gpus[first : first + 12] == (2.0,) * 10 + (0.0,) * 2
    assert use.gpus[first : first + 12] == (0.0,) * 6 + (2.0,) * 4 + (0.0,) * 2
    assert page.total.gpu_hours == 8.0


@pytest.mark.parametrize(("may_wait_h", "until_h"), [(24, 4), (4, 6)])
def test_who_waits_by_his_own_wish_wants_no_more_by_it(may_wait_h: int, until_h: int) -> None:
    """Six hours in the queue, then four on two GPUs: what he had wanted at once, and the two hours
    beyond his wish."""
    ran = attempt(1, 1, "own-1", 6, 10, gpus=2)
    ran = replace(ran, times=AttemptTimes(queued_unix_ms=BEGIN))
    urgent = attempt(2, 1, "own-1", 30, 30 + until_h, gpus=2)
    jobs = [job(1, flexible_ms=may_wait_h * H_MS), job(2)]
    (use,) = bill(state_of(jobs, [ran, urgent]), 0, 48).uses
    first = (BEGIN - use.begin_unix_ms) // H_MS
    assert use.wanted_gpus[first : first + 12] == (2.0,) * until_h + (0.0,) * (12 - until_h)
    assert use.flexible_ratio == pytest.approx(0.5)
    assert use.flexible_hours == may_wait_h
    assert sum(use.gpus) == 2.0 * (4 + until_h), "what was held is as it was"


def test_one_wait_counts_once_where_a_lease_ends() -> None:
    ran = attempt(1, 1, "lease-1", 40, 60)
    ran = replace(ran, times=AttemptTimes(queued_unix_ms=BEGIN + 30 * H_MS))
    (use,) = bill(state_of(JOBS, [ran]), 0, 200).uses
    assert sum(use.wanted_gpus) == 30.0


def test_the_fleet_is_what_is_owned_and_what_is_leased_now() -> None:
    state = state_of([], [])
    during = bills.fleets_of(state, BEGIN + H_MS)
    assert [(fleet.gpu_type, fleet.owned_gpus, fleet.lots) for fleet in during] == [
        ("A100 80GB", 8, ()),
        ("H100", 8, ((8, LEASE.end_unix_ms),)),
    ]
    after = {fleet.gpu_type: fleet for fleet in bills.fleets_of(state, LEASE.end_unix_ms)}
    assert after["H100"].lots == ()
    assert after["H100"].owned_gpus == 16, "what is not leased any more, and still there"
