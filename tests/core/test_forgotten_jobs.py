"""A history that has grown beyond its bound goes in pieces, whoever made it so."""

import pytest

from coordinator.core import jobs
from coordinator.core.coordinator import Coordinator
from coordinator.core.messages import DropJob, Effect, Request, Submit, Tick
from coordinator.core.model import Job, JobSpec, Snapshot
from coordinator.core.phases import JobPhase
from coordinator.core.state import Instant, Options

KEPT, AT_ONCE = 10, 5
SPEC = JobSpec(command=("true",))


def loaded(monkeypatch: pytest.MonkeyPatch, ended: int) -> Coordinator:
    monkeypatch.setattr(jobs, "FORGOTTEN_PER_TICK_MAX", AT_ONCE)
    over = (
        Job(number, SPEC, JobPhase.SUCCEEDED, 1, ended_unix_ms=number)
        for number in range(1, ended + 1)
    )
    core = Coordinator(Options(jobs_kept=KEPT))
    core.load(Snapshot(jobs=tuple(over), last_job_id=ended), 0)
    return core


def dropped(effects: list[Effect]) -> list[int]:
    return [effect.job_id for effect in effects if isinstance(effect, DropJob)]


def test_what_is_too_many_goes_a_few_in_each_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    core = loaded(monkeypatch, KEPT + 2 * AT_ONCE + 1)
    gone = [dropped(core.handle(Instant(250 * number, 1), Tick())) for number in range(1, 5)]
    assert gone == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11], []]
    assert sorted(core.state.ended) == list(range(12, 22))


def test_a_submission_makes_room_and_never_empties_a_history(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One more than it adds: whoever submits faster than the clock ticks meets a bound, too."""
    core = loaded(monkeypatch, KEPT + 20)
    assert dropped(core.handle(Instant(1, 1), Request(1, Submit(SPEC)))) == [1, 2]
    core = loaded(monkeypatch, KEPT)
    assert dropped(core.handle(Instant(1, 1), Request(1, Submit(SPEC)))) == [1]
    array = Submit(JobSpec(command=("true",), array="0-7"))
    core = loaded(monkeypatch, KEPT + 20)
    assert dropped(core.handle(Instant(1, 1), Request(1, array))) == list(range(1, 10))
