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
from coordinator.core.model import Attempt, GpuFacts, Job, JobSpec
from coordinator.core.state import Instant, State

JOBS_MAX = 5_000  # that are looked at
RUNS_MAX = 256  # that are learned from; more change the third digit, and cost some 50 ms in all
# Less is the first steps, which are slower than the rest.
STEPS_MIN = 5
SECONDS_MIN = 5.0
# How a built-in trainer ends for which not even one sample fits (`trainers/start.py`).
EXIT_OUT_OF_MEMORY = 12


@dataclass(frozen=True, slots=True)
class Run:
    """What an attempt did: `family` and `job` as `names` says, where it had `gpu_memory_bytes`."""

    family: str
    job: str
    spec: JobSpec
    place: Place
    gpu_memory_bytes: int
    steps_per_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TooLarge:
    """A training of which not even one sample fitted."""

    family: str
    spec: JobSpec
    gpu_memory_bytes: int


@dataclass(frozen=True, slots=True)
class History:
    """Each oldest first, and at most `RUNS_MAX`."""

    runs: tuple[Run, ...] = ()
    too_large: tuple[TooLarge, ...] = ()


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


def seen(state: State, now: Instant) -> History:
    """What the newest jobs did; those that still wait have done nothing."""
    runs: list[Run] = []
    too_large: list[TooLarge] = []
    for job_id in sorted(state.job_attempts, reverse=True)[:JOBS_MAX]:
        job = state.jobs[job_id]
        for attempt in reversed(state.attempts_of(job_id)):
            run = run_of(state, now, job, attempt)
            if run is not None:
                runs.append(run)
            elif attempt.exit_code == EXIT_OUT_OF_MEMORY and job.spec.trainer:
                too_large += _too_large(state, job, attempt)
        if len(runs) >= RUNS_MAX:
            break
    newest = tuple(reversed(runs[:RUNS_MAX]))
    return History(newest, tuple(reversed(too_large[:RUNS_MAX])))


def run_of(state: State, now: Instant, job: Job, attempt: Attempt) -> Run | None:
    """`None` where it has not told enough, or where it ran is not known any more."""
    if attempt.rank or not attempt.gpu_uuids:
        return None  # rank 0 speaks for its gang
    steps, seconds = _spent(state, now, job, attempt)
    if steps < STEPS_MIN:
        return None
    facts = _gpus(state, attempt)
    types = {gpu_types.key_of(gpu.name, gpu.memory_bytes): None for gpu in facts}
    if seconds < SECONDS_MIN or len(types) != 1:
        return None
    family, name = names(job.spec)
    place = Place(next(iter(types)), attempt.ranks * len(attempt.gpu_uuids))
    least = job.spec.shared_gpu_memory_bytes or min(gpu.memory_bytes for gpu in facts)
    return Run(family, name, job.spec, place, least, steps / seconds, seconds)


def _spent(state: State, now: Instant, job: Job, attempt: Attempt) -> tuple[int, float]:
    """Steps and seconds of training, where these are enough to tell anything; of who shares his GPU
    those without company."""
    if job.spec.shared_gpu_memory_bytes:
        alone = [one for one in attempt.stretches if not one.beside]
        return (alone[-1].steps, alone[-1].seconds) if alone else (0, 0.0)
    progress = state.progress.get(attempt.id)
    step = progress.step if progress is not None else attempt.times.step
    steps = (step or 0) - attempt.restored_step
    if steps < STEPS_MIN:  # as of most in a fleet whose programs say nothing
        return steps, 0.0
    spent = accounting.account(attempt, progress, now.unix_ms)
    return steps, spent.productive_s + spent.recompute_s + spent.input_wait_s


def _too_large(state: State, job: Job, attempt: Attempt) -> list[TooLarge]:
    """Of several ranks, and on a GPU that is shared, it says nothing of one GPU alone."""
    facts = _gpus(state, attempt)
    if attempt.ranks > 1 or job.spec.shared_gpu_memory_bytes or not facts:
        return []
    family, _ = names(job.spec)
    return [TooLarge(family, job.spec, min(gpu.memory_bytes for gpu in facts))]


def _gpus(state: State, attempt: Attempt) -> list[GpuFacts]:
    """Those that it had; none where they are not known any more."""
    live = state.nodes.get(attempt.node)
    gone = state.forgotten.get(attempt.node)
    facts = [gpu.facts for gpu in live.gpus.values()] if live is not None else []
    facts += gone.node.gpus if gone is not None else ()
    return [gpu for gpu in facts if gpu.uuid in attempt.gpu_uuids]
