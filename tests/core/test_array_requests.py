"""What is asked of a whole array, and how it stands in a list."""

from dataclasses import replace

from coordinator.core.messages import (
    CancelJob,
    GetJob,
    HoldJob,
    JobPage,
    ListJobs,
    Refusal,
    ReleaseJob,
    RequeueJob,
)
from coordinator.core.model import JobView
from coordinator.core.phases import JobPhase
from tests.core.test_arrays import ask
from tests.core.training_fleet import Fleet


def phases(fleet: Fleet) -> list[str]:
    return [job.phase.value for job in fleet.state.jobs.values()]


def test_the_whole_array_is_held_released_cancelled_and_run_again() -> None:
    fleet = Fleet("4xH100")
    fleet.submit(array="0-3%2")
    other = fleet.submit()
    held = ask(fleet.rig, HoldJob(3, array=True))
    assert isinstance(held, JobView)
    assert held.changed == 4
    fleet.run(5)
    assert phases(fleet) == ["held"] * 4 + ["active"]
    assert fleet.state.indices.arrays.by_id[1].tally() == (4, 0, 0, 4, 0)
    ask(fleet.rig, ReleaseJob(1, array=True))
    fleet.run(0)
    assert phases(fleet) == ["active"] * 2 + ["queued"] * 2 + ["active"]
    ask(fleet.rig, CancelJob(2))
    cancelled = ask(fleet.rig, CancelJob(1, array=True))
    assert isinstance(cancelled, JobView)
    fleet.run(5)
    assert phases(fleet) == ["cancelled"] * 4 + ["active"]
    over = ask(fleet.rig, CancelJob(1, array=True))
    assert isinstance(over, Refusal)
    assert over.sentence.startswith("this can be done for no trial of array 1; job 1 is cancelled")
    assert "has ended already" in over.sentence
    again = ask(fleet.rig, RequeueJob(4, array=True))
    assert isinstance(again, JobView)
    assert again.changed == 4
    assert phases(fleet) == ["active"] * 2 + ["queued"] * 2 + ["active"]
    for wrong in (other, 99):
        assert isinstance(ask(fleet.rig, CancelJob(wrong, array=True)), Refusal)
    assert fleet.job(other).phase is JobPhase.ACTIVE


def test_trials_that_run_or_have_succeeded_are_run_again_by_demand_alone() -> None:
    fleet = Fleet("2xH100")
    array_id = fleet.submit(array="0-3%2")
    fleet.end(array_id)
    ask(fleet.rig, CancelJob(array_id + 3))
    assert phases(fleet) == ["succeeded", "active", "active", "cancelled"]
    again = ask(fleet.rig, RequeueJob(array_id, array=True))
    assert isinstance(again, JobView)
    assert (again.job.id, again.changed, again.left) == (array_id + 3, 1, (2, 1))
    ask(fleet.rig, CancelJob(array_id + 3))
    fleet.end(array_id + 1)
    fleet.end(array_id + 2)
    ask(fleet.rig, RequeueJob(array_id + 3))
    none = ask(fleet.rig, RequeueJob(array_id, array=True))
    assert isinstance(none, Refusal)
    assert none.sentence == (
        f"this can be done for no trial of array {array_id}; 1 runs and 3 have succeeded: see --all"
    )
    every = ask(fleet.rig, RequeueJob(array_id, array=True, all_trials=True))
    assert isinstance(every, JobView)
    assert (every.changed, every.left) == (4, (0, 0))


def test_a_list_has_one_line_for_an_array_on_whichever_page() -> None:
    fleet = Fleet("8xH100")
    for array in ("", "0-4%2", "", "0-2"):
        fleet.submit(array=array)
    shown: list[list[int]] = []
    before = 0
    while not shown or before:
        page = ask(fleet.rig, ListJobs(page_size=2, before_job_id=before, fold_arrays=True))
        assert isinstance(page, JobPage)
        shown.append([view.job.id for view in page.jobs])
        before = page.next_before_job_id
    assert shown == [[10, 7], [6, 1]]
    view = ask(fleet.rig, GetJob(6))
    assert isinstance(view, JobView)
    assert view.trials == (5, 2, 3, 0, 0)
    plain = ask(fleet.rig, GetJob(1))
    assert isinstance(plain, JobView)
    assert plain.trials is None


def test_an_array_is_on_one_page_although_its_trials_change_between_two() -> None:
    fleet = Fleet("3xH100")
    fleet.submit()
    fleet.submit()
    array_id = fleet.submit(array="0-4%1")
    body = ListJobs((JobPhase.ACTIVE, JobPhase.QUEUED), page_size=1, fold_arrays=True)
    first = ask(fleet.rig, body)
    assert isinstance(first, JobPage)
    assert [view.job.id for view in first.jobs] == [array_id + 4]
    ask(fleet.rig, CancelJob(array_id + 4))
    second = ask(fleet.rig, replace(body, before_job_id=first.next_before_job_id))
    assert isinstance(second, JobPage)
    assert [view.job.id for view in second.jobs] == [array_id - 1], "not the array once more"
