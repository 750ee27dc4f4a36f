"""Which processes on a GPU are of another service than ours.

Problem: a display server or a monitor that begins anew while a job runs has another pid afterwards,
and looks like something that the job has left behind.

How: every process is of a service (or a scope) of systemd by its control group, which it cannot
leave by itself. Jobs are in the agent's own, or in units that the launcher has made for them;
whatever is in another one is not of a job. Where no services are told apart (a container) everyone
counts as ours: memory decides then (`core/clean.py`). What a job has had another service start, a
container say, is not found.
"""

PROC = "/proc"
UNIT_SUFFIXES = (".service", ".scope")
JOB_UNIT_PREFIX = "baton-job-"  # as `processes/launcher.py` names them


def is_of_another_service(pid: int, proc: str = PROC) -> bool:
    """Whether this process is of a service that is neither ours nor a job's."""
    own, its = _unit(f"{proc}/self"), _unit(f"{proc}/{pid}")
    return bool(own and its) and its != own and not its.startswith(JOB_UNIT_PREFIX)


def _unit(process: str) -> str:
    """The innermost unit that it is in; empty where there is none, or the process has gone."""
    try:
        with open(f"{process}/cgroup", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return ""
    for line in lines:
        hierarchy, controllers, path = (*line.split(":", 2), "", "")[:3]
        if hierarchy == "0" or controllers == "name=systemd":
            steps = [step for step in path.split("/") if step.endswith(UNIT_SUFFIXES)]
            if steps:
                return steps[-1]
    return ""
