"""Which node is a job's standby, and when another one takes over.

Safety. A standby moves to nothing that fits no better, at most once in `INTERVAL_MS`, and never for
an advantage that has not lasted. Liveness. For one that lasts it moves.
"""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.model import GpuFacts, JobClass, JobSpec
from coordinator.core.placement import Need, place
from coordinator.core.rooms import Offer
from coordinator.core.standby import (
    INTERVAL_MS,
    SETTLED_MS,
    Candidate,
    Fit,
    best,
    better,
    move,
)
from coordinator.core.state import StandbyWatch
from tests.core.training_fleet import Fleet

TICK_MS = 1_000
NODES = ("n1", "n2", "n3")
FITS = st.tuples(*[st.sampled_from(Fit)] * len(NODES))
# What the fleet looks like, and for how many ticks.
HISTORIES = st.lists(st.tuples(FITS, st.integers(1, 90)), min_size=1, max_size=8)


def fleet(fits: tuple[Fit, ...]) -> dict[str, Candidate]:
    return {name: Candidate(name, fit) for name, fit in zip(NODES, fits, strict=True)}


def moves_of(history: list[tuple[tuple[Fit, ...], int]]) -> list[tuple[int, str, str]]:
    """Every move, as (time, from, to); checks each on the way."""
    watch, standby, now_ms, moves = StandbyWatch(), "n1", 0, []
    lasted_ms = 0
    for fits, ticks in history:
        nodes = fleet(fits)
        for _ in range(ticks):
            now_ms += TICK_MS
            sooner = any(other.fit > nodes[standby].fit for other in nodes.values())
            lasted_ms = lasted_ms + TICK_MS if sooner else 0
            watch, found = move(now_ms, watch, nodes[standby], list(nodes.values()))
            if found is not None:
                assert found.fit > nodes[standby].fit, "no better"
                assert lasted_ms > SETTLED_MS, "it has not lasted"
                moves.append((now_ms, standby, found.node))
                standby, lasted_ms = found.node, 0
    return moves


@given(HISTORIES)
def test_a_standby_moves_seldom_and_only_to_what_is_better(
    history: list[tuple[tuple[Fit, ...], int]],
) -> None:
    times = [now_ms for now_ms, _, _ in moves_of(history)]
    assert all(later - now >= INTERVAL_MS for now, later in pairwise(times))


@given(HISTORIES, FITS)
def test_in_the_end_nobody_fits_better(
    history: list[tuple[tuple[Fit, ...], int]], last: tuple[Fit, ...]
) -> None:
    """Liveness: once the fleet rests, so does the standby, and with the best."""
    ticks = (2 * INTERVAL_MS + 2 * SETTLED_MS) // TICK_MS
    moves = moves_of([*history, (last, ticks)])
    standby = moves[-1][2] if moves else "n1"
    assert fleet(last)[standby].fit is max(last)


@given(st.lists(st.tuples(FITS, st.integers(1, SETTLED_MS // TICK_MS)), max_size=9))
def test_a_gap_moves_nothing(gaps: list[tuple[tuple[Fit, ...], int]]) -> None:
    calm = (Fit.FREE,) * len(NODES)
    history = [part for gap in gaps for part in (gap, (calm, 1))]
    assert not moves_of(history)


def test_who_holds_the_last_checkpoint_comes_before_who_has_nothing_to_do() -> None:
    idle = Candidate("n1", Fit.FREE)
    busy = Candidate("n2", Fit.DISPLACING, holds=True, load=5)
    assert best([idle, busy]) == busy
    assert better(busy, [idle, busy]) == idle, "but not before who could take it sooner"


def test_a_closed_node_is_the_last_resort() -> None:
    closed = Candidate("n1", Fit.CLOSED, holds=True)
    assert best([closed, Candidate("n2", Fit.UNABLE)]) != closed
    assert best([closed]) == closed
    assert best([]) is None


def test_a_job_goes_on_at_its_standby_where_it_can() -> None:
    gpu = [GpuFacts(f"g{number}", "H100", 80 << 30) for number in (1, 2, 3)]
    offers = [Offer(f"n{i}", (g,), (g.uuid,), 1 << 40, 8, ()) for i, g in enumerate(gpu, start=1)]
    spec = JobSpec(command=("x",), gpus=1, job_class=JobClass.STANDARD)
    near = ("n0", "n3")
    assert place([Need(1, spec, ("n2", "n3"), near=near)], offers).starts[0].places[0].node == "n3"
    assert place([Need(1, spec, ("n2",), near=near)], offers).starts[0].places[0].node == "n2"
    alone = place([Need(1, spec, ("n0",), near=near)], offers).starts[0]
    assert alone.places[0].node == "n3"
    assert alone.why == "runs on 1 x H100 on n3, where most of its last checkpoint lies"


def test_copies_of_many_jobs_are_spread_over_the_nodes_that_are_free() -> None:
    """Once the last of them has started all want those, and one disk would have to hold all."""
    there = Fleet(*["4xH100:80"] * 6)
    for _ in range(16):
        there.submit(gpus=1)
    there.run(90)
    spread = Counter(attempt.replica_node for attempt in there.state.attempts.values())
    assert there.state.indices.standbys == spread
    assert (len(spread), sum(spread.values())) == (2, 16)
    assert max(spread.values()) <= 10
    for job_id in range(1, 17):
        there.end(job_id)
    assert not there.state.indices.standbys
