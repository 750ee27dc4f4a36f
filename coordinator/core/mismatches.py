"""Ranks that did not understand one another, as their nodes' agents are of different versions.

Problem: each node's agent brings the trainers with it. While a fleet is upgraded node by node, for
hours, a gang may have ranks of two kinds. They find that out before they train, and all leave with
one status. That says nothing of the job, so no number of such tries may end it; and each of them
has GPUs for nothing, so they must cost nobody anything.

1. Such a try counts neither as a failure nor as a round of "run me again", unless no upgrade is
   why: where the agents of all its nodes are of one version, it is such a round. Else a job that
   always leaves so would make others leave for it for ever.
2. The next one comes soon, in case an agent was just being replaced, and each one after that
   `RETRY_MS`, as long as it takes: as Kubernetes does it, whose waits grow to five minutes and go
   on (https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#restart-policy). Nothing is
   kept for it meanwhile.
3. It goes to nodes whose agents are of one version, where others may have to leave for it as for
   any job. Which versions understand one another nobody here knows: so it may also start on others,
   if their GPUs are free anyway.

What a job's last try ended with is recorded, so a coordinator that restarts goes on with this.
"""

from collections.abc import Sequence

from coordinator.core.messages import AttemptExited
from coordinator.core.model import Attempt, Job
from coordinator.core.offers import is_open
from coordinator.core.phases import AttemptPhase
from coordinator.core.state import State

# EX_PROTOCOL of sysexits.h; so do `trainers/start.py` and `baton_hook/versions.py` leave.
EXIT_PROTOCOL = 76
RETRY_MS_FIRST = 10_000
RETRY_MS = 300_000


def told(job: Job, attempt: Attempt, body: AttemptExited) -> bool:
    """Whether it has ended for this. A program that leaves with that status for a reason of its own
    has said no sentence, or its owner has said what the status means."""
    ours = EXIT_PROTOCOL not in job.spec.run_again_exit_codes
    said = EXIT_PROTOCOL in (body.exit_code, body.said_exit_code) and bool(body.reason)
    return ours and said and attempt.ranks > 1


def found(job: Job, gang: Sequence[Attempt]) -> Attempt | None:
    """The first rank that has said so; one is enough, whatever became of the others."""
    if EXIT_PROTOCOL in job.spec.run_again_exit_codes:
        return None
    # Of who was asked to stop the status says less, and one alone has nobody to understand.
    itself = [
        rank
        for rank in gang
        if rank.phase is AttemptPhase.YIELDED and not rank.stop_reason and rank.ranks > 1
    ]
    return next((rank for rank in itself if rank.exit_code == EXIT_PROTOCOL), None)


def again(state: State, job: Job) -> bool:
    """Whether the try before the last one has ended for this too."""
    before = [one for one in state.attempts_of(job.id) if one.epoch == job.epoch - 1]
    return found(job, before) is not None


def unexplained(state: State, job: Job) -> bool:
    """Whether no upgrade is why: the agents of all its nodes are of one version. They are asked as
    they are now, and one may have been replaced during the last try; so this is of two in a row."""
    nodes = [state.nodes.get(rank.node) for rank in state.gang(job)]
    versions = {"" if live is None else live.node.host.agent_version for live in nodes}
    return again(state, job) and len(versions) == 1 and "" not in versions


def alike(state: State, job: Job) -> tuple[tuple[str, ...], ...]:
    """The nodes that take ranks, by the version of their agents, most of them first; empty where
    the job's last try has not ended for this, and where all are of one version."""
    if job.spec.ranks == 1 or found(job, state.gang(job)) is None:
        return ()
    by_version = _by_version(state)
    return tuple(map(tuple, by_version.values())) if len(by_version) > 1 else ()


def _by_version(state: State) -> dict[str, list[str]]:
    versions: dict[str, list[str]] = {}
    for live in state.nodes.values():
        if is_open(live) and live.gangs:
            versions.setdefault(live.node.host.agent_version, []).append(live.node.id)
    return dict(sorted(versions.items(), key=lambda pair: (-len(pair[1]), pair[0])))


def describe(state: State, job: Job) -> str:
    """What that means for a job that waits for room; empty where it means nothing."""
    if not alike(state, job):
        return ""
    counts = [f"{name or 'unknown'} on {len(ids)}" for name, ids in _by_version(state).items()]
    return (
        "; its ranks did not understand one another, so others leave for it only on nodes with one"
        f" version of the agent ({', '.join(counts)})"
    )
