"""Answers of `baton projects` on the wire.

Problem: a project without a quota is not one whose quota is 0, so what was not configured is absent
in the message.
"""

from coordinator.core.project_requests import ProjectPage, ProjectView
from protos.baton.v1 import jobs_pb2 as pb


def encode(page: ProjectPage) -> pb.ListProjectsResponse:
    projects = [_project(view) for view in page.projects]
    return pb.ListProjectsResponse(projects=projects, half_life_hours=page.half_life_hours)


def _project(view: ProjectView) -> pb.Project:
    return pb.Project(
        name=view.name,
        quota_gpu_hours_per_day=view.quota_hours,
        weight=view.weight,
        used_gpu_hours=view.used_hours,
        entitled_gpus=view.entitled_gpus,
        running_gpus=view.running_gpus,
        borrowed_gpus=view.borrowed_gpus,
        lent_gpus=view.lent_gpus,
        running_jobs=view.running_jobs,
        waiting_jobs=view.waiting_jobs,
        waiting_gpus=view.waiting_gpus,
    )
