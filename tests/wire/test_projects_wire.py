"""Answers of `baton projects` on the wire: what was not configured is absent."""

from coordinator import wire_projects
from coordinator.core.project_requests import ProjectPage, ProjectView


def test_an_answer_arrives() -> None:
    first = ProjectView("a", 48.0, 2.0, 41.5, 3.6, 2.0, 0.5, 0.25, 3, 4, 5.0)
    second = ProjectView("b", None, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0.0)
    sent = wire_projects.encode(ProjectPage((first, second), 16.6))
    a, b = sent.projects
    assert (a.name, a.quota_gpu_hours_per_day, a.weight) == ("a", 48, 2)
    assert (a.used_gpu_hours, a.entitled_gpus, a.running_gpus) == (41.5, 3.6, 2)
    assert (a.borrowed_gpus, a.lent_gpus) == (0.5, 0.25)
    assert (a.running_jobs, a.waiting_jobs, a.waiting_gpus) == (3, 4, 5)
    assert not b.HasField("quota_gpu_hours_per_day")
    assert sent.half_life_hours == 16.6
