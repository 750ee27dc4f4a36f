"""Which of those that wait are a reason to rent, and how many nodes each of them takes.

Problem: a plan counts GPUs, and a job takes nodes: whoever forgets it pays for half of a gang. And
it is asked each minute, of ten thousand.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from coordinator.core import rentals, validate
from coordinator.core.capacity_model import Outlook
from coordinator.core.messages import Submit
from coordinator.core.model import GpuFacts, JobSpec
from tests.core.test_rentals import RentingRig


@pytest.fixture(autouse=True)
def _only_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.core.test_fleet_scaling.NAMES", ("n1",))


def test_of_many_that_wait_equal_ones_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = RentingRig.renting(budget_usd=0.0)
    fleet.hello("n2", "4xH100")
    for _ in range(20):
        for gpus in (1, 2, 4):  # four are on no rented node
            asks = JobSpec(command=("train",), gpus=gpus, gpu_types=("H100",))
            fleet.ask(Submit(asks))
    looked: list[JobSpec] = []
    holds = validate.could_hold

    def counted(spec: JobSpec, gpus: Sequence[GpuFacts], memory_bytes: int) -> bool:
        looked.append(spec)
        return holds(spec, gpus, memory_bytes)

    monkeypatch.setattr(rentals, "could_hold", counted)
    state = fleet.rig.core.state
    (found,) = rentals.outlooks(state, fleet.rig.now, [Outlook("H100", 0, 200, 0)])
    specs = [state.jobs[job_id].spec for job_id in state.queued]
    assert len(specs) > 50
    assert found.rentable_gpus == sum(spec.gpus for spec in specs if spec.gpus <= 2)
    assert len(looked) == 3


@pytest.mark.parametrize(("budget_usd", "nodes"), [(7.9, 0), (8.0, 2)])
def test_a_gang_gets_all_of_its_nodes_or_none(budget_usd: float, nodes: int) -> None:
    """Two ranks of two GPUs, a node each, of which an hour costs four dollars."""
    fleet = RentingRig.renting(budget_usd=budget_usd)
    fleet.hello("n2", "4xH100")
    for spec in (JobSpec(command=("train",), gpus=4), JobSpec(command=("go",), gpus=2, ranks=2)):
        fleet.ask(Submit(replace(spec, gpu_types=("H100",))))
    fleet.live(305)
    assert [verb for _, verb in fleet.verbs()].count("create") == nodes
    rails = [record.rail for record in fleet.rig.disk.scaled.values()]
    assert rails[0] == ("" if nodes else "budget")
