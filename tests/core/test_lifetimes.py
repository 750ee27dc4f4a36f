"""Every end is told once, a restart tells the same, and plans go by how long jobs last."""

import pytest

from coordinator.core import held_ahead
from coordinator.core.demand_history import MINUTE_MS
from coordinator.core.life_table import kind_of
from coordinator.core.messages import CancelJob, Request, Tick
from coordinator.core.model import JobSpec
from coordinator.core.phases import JobPhase
from tests.core.training_fleet import A100, Fleet

EIGHT = JobSpec(command=("train",), gpus=8)


def trained(*minutes: int) -> Fleet:
    """One after the other a whole box for so long, and then one that nobody ends."""
    here = Fleet("8xA100")
    for lasts_min in minutes:
        job_id = here.submit(EIGHT)
        here.tick_ms = 20_000
        here.run(60 * lasts_min, saving=False)
        here.rig.handle(Request(1, CancelJob(job_id)))
        here.run(120)
        assert here.state.jobs[job_id].phase is JobPhase.CANCELLED
    here.submit(EIGHT)
    here.run(60)
    return here


def half_frees_min(here: Fleet) -> float:
    """Of the last one's GPUs, so when it is as likely gone as not."""
    return held_ahead.frees_ms(here.state, here.rig.now, {A100: 4.0})[A100] / MINUTE_MS


def test_a_plan_hears_how_long_such_jobs_last() -> None:
    """By their age alone it would be a minute."""
    assert half_frees_min(trained()) == pytest.approx(1.0, rel=0.2)
    assert 9 < half_frees_min(trained(*[15] * 6)) < 16


def test_every_end_is_told_once_and_a_restart_tells_the_same() -> None:
    here = trained(6, 6, 6)
    kind = kind_of(A100, 8)
    counts = here.state.scaler.lives.table._counts[kind]
    assert sum(counts.ended) == pytest.approx(3.0, rel=1e-3)
    assert not here.state.demand_history.counted.left
    here.rig.restart()
    here.rig.handle(Tick())
    again = here.state.scaler.lives.table._counts[kind]
    assert again.ended == pytest.approx(counts.ended, rel=1e-3)
    assert again.by_rule == pytest.approx(counts.by_rule, rel=1e-3)
