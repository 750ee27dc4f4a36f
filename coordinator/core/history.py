"""What the fleet has seen of speeds: measurements from the attempts that the coordinator keeps.

Problem: an estimator with a store of its own has to be kept true to the jobs', through restarts,
replays and jobs that are forgotten. But everything it needs is in the attempts already: how many
steps each made, in how much time of training (`accounting.py`), and on which GPUs. So nothing is
recorded anew, and history is a function of the state: what is replayed is seen again, and what is
dropped is gone. It is bounded by what is looked at, the newest first.

Jobs are told apart by what makes their steps what they are, not by their ids: the same training
submitted twice is one job here, and what it did the first time counts the second time.

"""

import json
from dataclasses import dataclass

from coordinator.core import accounting, gpu_types, workload
from coordinator.core.estimates import Place
from coordinator.core.model import Attempt, Job, JobSpec
from coordinator.core.state import Instant, State

JOBS_MAX = 5_000  # that are looked at
RUNS_MAX = 256  # that are learned from; more change the third digit, and cost some 50 ms in all
# Less is the first steps, which are slower than the rest.
STEPS_MIN = 5
SECONDS_MIN = 5.0


@dataclass(frozen=True, slots=True)
class Run:
    """What an attempt did: `family` and `job` as `names` says, on `gpu_name` with
    `gpu_memory_bytes`."""

    family: str
    job: str
    spec: JobSpec
    place: Place
    gpu_memory_bytes: int
    steps_per_s: float
    seconds: float


def names(spec: JobSpec) -> tuple[str, str]:
    """The family of a job, empty for none, and what it is itself."""
    training = workload.read(spec)
    if isinstance(training, str):
        told = [spec.project, spec.name, spec.trainer, spec.trainer_config_json, *spec.command]
        return "", json.dumps(told)
    kind = [spec.project, training.trainer, spec.working_directory, training.model]
    kind += ["16 bits" if training.half else "32 bits"]
    shape = [training.batch_size, training.accumulate, training.window_tokens, training.rank]
    return json.dumps(kind), json.dumps([*kind, *shape, training.base_precision])


def runs(state: State, now: Instant) -> tuple[Run, ...]:
    """Oldest first; at most `RUNS_MAX`."""
    found: list[Run] = []
    for job_id in sorted(state.jobs, reverse=True)[:JOBS_MAX]:
        job = state.jobs[job_id]
        for attempt in reversed(state.attempts_of(job_id)):
            run = _run(state, now, job, attempt)
            if run is not None:
                found.append(run)
            if len(found) == RUNS_MAX:
                return tuple(reversed(found))
    return tuple(reversed(found))


def _run(state: State, now: Instant, job: Job, attempt: Attempt) -> Run | None:
    """`None` where it has not told enough, or where it ran is not known any more."""
    if attempt.rank or not attempt.gpu_uuids or job.spec.shared_gpu_memory_bytes:
        return None  # rank 0 speaks for its gang; a share says nothing of a whole GPU
    progress = state.progress.get(attempt.id)
    step = progress.step if progress is not None else attempt.times.step
    steps = (step or 0) - attempt.restored_step
    if steps < STEPS_MIN:
        return None
    spent = accounting.account(attempt, progress, now.unix_ms)
    seconds = spent.productive_s + spent.recompute_s + spent.input_wait_s
    live = state.nodes.get(attempt.node)
    facts = (
        [] if live is None else [g.facts for u, g in live.gpus.items() if u in attempt.gpu_uuids]
    )
    types = {gpu_types.key_of(gpu.name, gpu.memory_bytes): None for gpu in facts}
    if seconds < SECONDS_MIN or len(types) != 1:
        return None
    family, name = names(job.spec)
    place = Place(next(iter(types)), attempt.ranks * len(attempt.gpu_uuids))
    least = min(gpu.memory_bytes for gpu in facts)
    return Run(family, name, job.spec, place, least, steps / seconds, seconds)
