"""What people ask of jobs: submit, cancel, hold, release, requeue, and look.

Every answer is a value: a refusal is an answer too, with a sentence that says what to change.
Submission is idempotent by the caller's request id, so a client that lost the answer may ask again
and gets the same job. An array (`arrays.py`) is made within one event, so all of its trials become
durable together; its first one stands for it.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from coordinator.core import (
    accounting,
    arrays,
    attempts,
    checkpoints,
    deadlines,
    found,
    outcomes,
    restored,
    retention,
    trainer_keys,
    trials,
)
from coordinator.core.demand import ask_of
from coordinator.core.explain import explain
from coordinator.core.job_requests import ON_HOLD
from coordinator.core.messages import (
    Answer,
    CancelJob,
    ExplainJob,
    GetJob,
    HoldJob,
    JobPage,
    ListJobs,
    Refusal,
    RefusalKind,
    ReleaseJob,
    RequeueJob,
    Submit,
    Submitted,
)
from coordinator.core.model import Job, JobIntent, JobSpec, JobView
from coordinator.core.phases import ATTEMPT_ENDED, JOB_ENDED, JobPhase
from coordinator.core.sentences import quantity
from coordinator.core.state import JOBS_OPEN_MAX, Instant, State
from coordinator.core.validate import (
    REQUEST_ID_CHARACTERS_MAX,
    refuse_fleet,
    refuse_spec,
    spec_bytes,
)

ID_IN_USE = "an earlier request had this id and was another one: nothing new is submitted"
PAGE_DEFAULT = 100
PAGE_MAX = 1_000
# A client of gRPC takes messages of 4 MiB unless told otherwise. Of a thousand usual jobs a page is
# half a megabyte; a single one, of a gang of a thousand ranks say, may be more than this.
PAGE_BYTES_MAX = 3 << 20
# Of those of a restored store, at once: as many lines of history are one commit's worth.
RELEASED_MAX = 1_000
# Of the oldest, in a tick: with the 500 lines of history that each may have that is a commit of
# half a second, and with the dozen that most have one of milliseconds.
FORGOTTEN_PER_TICK_MAX = 100


def submit(state: State, now: Instant, body: Submit) -> Answer:
    if body.deadline_in_ms:
        deadline_unix_ms = now.unix_ms + body.deadline_in_ms
        body = replace(body, spec=replace(body.spec, deadline_unix_ms=deadline_unix_ms))
    if len(body.request_id) > REQUEST_ID_CHARACTERS_MAX:
        return _invalid(f"request_id is longer than {REQUEST_ID_CHARACTERS_MAX} characters")
    known = state.requests.get(body.request_id) if body.request_id else None
    if known is not None:
        job = state.jobs[known]
        reason = state.wait_reason(job)
        # "In six hours" is another time in each try.
        if replace(job.spec, deadline_unix_ms=0) != replace(body.spec, deadline_unix_ms=0):
            reason = f"{ID_IN_USE}; {reason}"
        return Submitted(known, reason, len(_indices(job.spec)))
    spec = body.spec
    # One node of each kind stands for all.
    kinds = state.indices.kinds.values()
    nodes = [state.nodes[next(iter(alike))].node for alike in kinds]
    fleet, counts = [(node.host, node.gpus) for node in nodes], [len(alike) for alike in kinds]
    sentence = refuse_spec(spec) or trainer_keys.refuse(spec)
    sentence = sentence or refuse_fleet(spec, fleet, counts) or deadlines.refuse(now, spec)
    if sentence:
        return _invalid(sentence)
    if body.forgotten_job_id:
        return _submit_again(state, now, body)
    open_count = len(state.jobs) - len(state.ended)
    indices = _indices(spec)
    if open_count + len(indices) > JOBS_OPEN_MAX:
        limit = (
            f"{quantity(open_count, 'job is', 'jobs are')} open and {JOBS_OPEN_MAX} is the limit"
        )
        return Refusal(
            RefusalKind.EXHAUSTED, f"{limit}; cancel some, or wait until some have ended"
        )
    _forget_oldest(state, len(indices) + 1)
    job = _make(state, now, body, indices)
    reason = job.reason or ("" if fleet else "no node has joined the fleet yet")
    warning = deadlines.warning(state, now, job) if fleet else ""
    return Submitted(job.id, "; ".join(filter(None, (reason, warning))), len(indices))


def _submit_again(state: State, now: Instant, body: Submit) -> Answer:
    job = state.jobs.get(body.forgotten_job_id)
    if job is None:
        return _not_found(body.forgotten_job_id)
    if not restored.is_forgotten(job) or job.phase is not JobPhase.HELD:
        return _wrong(job, "its request is known")
    if body.spec.array:
        return _invalid("it was one trial of an array; say what that one is, without an array")
    found.submitted_again(state, now, job, body.spec, body.request_id)
    return Submitted(job.id, state.jobs[job.id].reason)


def _indices(spec: JobSpec) -> tuple[int, ...]:
    return arrays.parse(spec.array).indices if spec.array else (0,)


def _make(state: State, now: Instant, body: Submit, indices: tuple[int, ...]) -> Job:
    """One, or the trials of an array, under ids that follow one another; returns the first."""
    spec, first_id = body.spec, state.last_job_id + 1
    array_id = first_id if spec.array else 0
    phase = JobPhase.HELD if spec.hold else JobPhase.QUEUED
    reason = ON_HOLD if spec.hold else ""
    intent = JobIntent.HOLD if spec.hold else JobIntent.RUN
    for job_id, index in enumerate(indices, first_id):
        # A request is known by its first job.
        request_id = body.request_id if job_id == first_id else ""
        job = Job(
            job_id, spec, phase, now.unix_ms, request_id, intent, reason,
            event_count=1, array_id=array_id, array_index=index,
        )  # fmt: skip
        what = f"trial {index} of array {first_id}" if array_id else "job"
        state.put_job(job)
        line = reason or f"{spec.job_class.value} {what}"
        state.write_line(job, now.unix_ms, "job.submitted", line)
    state.demand.note(ask_of(spec), spec.ranks * len(indices))
    state.last_job_id += len(indices)
    return state.jobs[first_id]


def tick(state: State) -> None:
    """A hundred thousand jobs may end together, and are not to be forgotten together."""
    if len(state.ended) > state.options.jobs_kept:
        _forget_oldest(state, FORGOTTEN_PER_TICK_MAX, room=0)


def _forget_oldest(state: State, jobs_max: int = 1, room: int = 1) -> None:
    """History is bounded, and so is what leaves it at once. Whoever submits makes `room`, and
    forgets one more than he adds: so it never grows for ever, however fast jobs come."""
    count = min(len(state.ended) + room - state.options.jobs_kept, jobs_max)
    if count <= 0:
        return
    gone = list(islice(_to_forget(state), count))
    if len(gone) < count:
        # There are as many: PINS_MAX is below what may be set.
        known = dict.fromkeys(gone)
        others = (other for other in _unpinned(state) if other not in known)
        gone += islice(others, count - len(gone))
    for job_id in gone:
        state.drop_job(job_id)


def first_to_forget(state: State) -> int | None:
    """The ended job that is next to make room."""
    return next(_to_forget(state), None)


def _to_forget(state: State) -> Iterator[int]:
    """The ended jobs without a pin, that which ended first first; those that stand for an open
    array make room only where there is no other."""
    stands = state.indices.arrays.stands_for_others
    return (known for known in _unpinned(state) if not stands(state.jobs[known]))


def _unpinned(state: State) -> Iterator[int]:
    return (known for known in state.ended if not retention.pins(state, known))


def cancel(state: State, now: Instant, body: CancelJob) -> Answer:
    if body.array:
        return trials.each(state, now, body, cancel)
    job = state.jobs.get(body.job_id)
    if job is None:
        return _not_found(body.job_id)
    if job.phase in JOB_ENDED:
        return _wrong(job, "it has ended already")
    attempt = state.current(job)
    if job.phase is JobPhase.ACTIVE and attempt is not None:
        state.put_job(replace(job, phase=JobPhase.CANCELLING, intent=JobIntent.CANCEL))
        attempts.stop(state, now, attempt, "cancelled by its owner")
    elif job.phase in (JobPhase.QUEUED, JobPhase.HELD):
        attempts.let_go(state, now, job, "cancelled while its node was out of reach")
        job = state.jobs[job.id]
        outcomes.end_job(state, now, job, JobPhase.CANCELLED, "cancelled by its owner")
    return view(state, state.jobs[job.id])


def hold(state: State, now: Instant, body: HoldJob) -> Answer:
    if body.array:
        return trials.each(state, now, body, hold)
    job = state.jobs.get(body.job_id)
    if job is None:
        return _not_found(body.job_id)
    if job.phase in (*JOB_ENDED, JobPhase.CANCELLING):
        return _wrong(job, "only a queued or an active job can be held")
    attempt = state.current(job)
    if job.phase is JobPhase.ACTIVE and attempt is not None:
        # That nobody knew whether it runs is no reason any more to let it run.
        reason = "held by its owner" if restored.is_unsure(job) else job.reason
        job = state.put_job(replace(job, intent=JobIntent.HOLD, reason=reason))
        attempts.stop(state, now, attempt, "held by its owner")
    elif job.phase is JobPhase.QUEUED:
        attempts.let_go(state, now, job, "held while its node was out of reach")
        job = replace(state.jobs[job.id], intent=JobIntent.HOLD)
        outcomes.requeue(state, now, job, "held by its owner")
    return view(state, state.jobs[job.id])


def release(state: State, now: Instant, body: ReleaseJob) -> Answer:
    if body.restored:
        return _release_restored(state, now)
    if body.array:
        return trials.each(state, now, body, release)
    job = state.jobs.get(body.job_id)
    if job is None:
        return _not_found(body.job_id)
    if job.intent is not JobIntent.HOLD:
        return _wrong(job, "it is not held")
    if restored.is_forgotten(job):
        return _wrong(job, job.reason)
    if job.trouble is not None and job.trouble.quarantined:
        job = replace(job, trouble=None, failures=0)
    job = replace(job, intent=JobIntent.RUN)
    if job.phase is JobPhase.HELD:
        state.eligible_ms.pop(job.id, None)
        state.put_job(
            replace(job, phase=JobPhase.QUEUED, reason="", queued_unix_ms=_since(now, job))
        )
        state.tell(now.unix_ms, job.id, "job.released", "released by its owner")
    else:
        # Still saving for the hold: it goes back to the queue when it has left.
        state.put_job(job)
    return view(state, state.jobs[job.id])


def _release_restored(state: State, now: Instant) -> Answer:
    """Somebody says that the store is the one that it was, only moved, or answers for all."""
    unsure = (
        job_id
        for job_id, job in sorted(state.jobs.items())
        if restored.is_unsure(job) and not restored.is_forgotten(job)
    )
    answers = [release(state, now, ReleaseJob(each)) for each in islice(unsure, RELEASED_MAX)]
    views = [answer for answer in answers if isinstance(answer, JobView)]
    if views:
        return replace(views[0], changed=len(views))
    sentence = "no job is held since the database was put back"
    return Refusal(RefusalKind.WRONG_PHASE, sentence)


def requeue(state: State, now: Instant, body: RequeueJob) -> Answer:
    if body.array:
        leave = () if body.all_trials else (JobPhase.ACTIVE, JobPhase.SUCCEEDED)
        return trials.each(state, now, body, requeue, leave)
    job = state.jobs.get(body.job_id)
    if job is None:
        return _not_found(body.job_id)
    if body.abandon_unreachable_checkpoints:
        return _abandon(state, now, job)
    attempt = state.current(job)
    if restored.is_forgotten(job):
        return _wrong(job, "its request is not known")
    if job.phase is JobPhase.ACTIVE and attempt is not None:
        attempts.stop(state, now, attempt, "requeued by its owner")
    elif job.phase in JOB_ENDED:
        fresh = replace(
            job, phase=JobPhase.QUEUED, intent=JobIntent.RUN, failures=0, yields=0,
            ended_unix_ms=None, reason="", queued_unix_ms=_since(now, job),
        )  # fmt: skip
        state.put_job(fresh)
        state.tell(now.unix_ms, job.id, "job.queued", "requeued by its owner")
    elif job.trouble is not None and job.trouble.quarantined:
        return release(state, now, ReleaseJob(job.id))
    else:
        return _wrong(job, "only an active, an ended or a quarantined job can be requeued")
    return view(state, state.jobs[job.id])


def _since(now: Instant, job: Job) -> int | None:
    """A wait counts from now, if it is one between two attempts."""
    return now.unix_ms if job.epoch else None


def _abandon(state: State, now: Instant, job: Job) -> Answer:
    if job.phase is not JobPhase.QUEUED or not checkpoints.may_abandon(state, job):
        return _wrong(job, "it does not wait for a checkpoint out of reach")
    attempts.let_go(state, now, job, "its checkpoints were given up by its owner")
    count = checkpoints.abandon_unreachable(state, state.jobs[job.id])
    state.waits.pop(job.id, None)
    job = state.jobs[job.id]
    what = f"{quantity(count, 'checkpoint')} out of reach"
    where = f"goes on from step {job.head_step}" if job.head else "begins again"
    state.tell(
        now.unix_ms, job.id, "checkpoint.abandoned",
        f"{what} given up by its owner; it {where}",
    )  # fmt: skip
    return view(state, state.jobs[job.id])


def get(state: State, body: GetJob) -> Answer:
    job = state.jobs.get(body.job_id)
    return _not_found(body.job_id) if job is None else view(state, job)


def explain_job(state: State, now: Instant, body: ExplainJob) -> Answer:
    job = state.jobs.get(body.job_id)
    if job is None:
        return _not_found(body.job_id)
    return explain(state, now, job)


def list_jobs(state: State, body: ListJobs) -> Answer:
    size = body.page_size or PAGE_DEFAULT
    if not 1 <= size <= PAGE_MAX:
        return _invalid(f"page_size is {size}; it must be between 1 and {PAGE_MAX}, or 0")
    before = body.before_job_id or state.last_job_id + 1
    page: list[JobView] = []
    place, left_bytes = 0, PAGE_BYTES_MAX
    for job_id in sorted((known for known in state.jobs if known < before), reverse=True):
        job = state.jobs[job_id]
        if body.phases and job.phase not in body.phases:
            continue
        if body.project and job.spec.project != body.project:
            continue
        # An array has its place by its first trial: which is the newest that is asked for may be
        # another one when the next page is.
        array_id = job.array_id if body.fold_arrays else 0
        if array_id and array_id == place:
            continue
        if len(page) == size:
            return JobPage(tuple(page), place)
        shown = view(state, job, newest_only=True)
        left_bytes -= _bytes(shown)
        if page and left_bytes < 0:
            return JobPage(tuple(page), place)
        place = array_id or job_id
        page.append(shown)
    return JobPage(tuple(page), 0)


def _bytes(shown: JobView) -> int:
    """About as many as it has on the wire."""
    attempts = sum(
        300 + 50 * len(attempt.gpu_uuids) + len(attempt.reason) for attempt in shown.attempts
    )
    return 500 + spec_bytes(shown.job.spec) + len(shown.job.reason) + attempts


def view(state: State, job: Job, newest_only: bool = False) -> JobView:
    """A job as a reply shows it, with the reason that holds at present."""
    tries = state.attempts_of(job.id)
    shown = state.gang(job) if newest_only else tries
    good = state.good_checkpoints(job)
    progress = None
    for attempt in reversed(tries):
        if attempt.rank:
            continue  # rank 0 speaks for its gang
        progress = state.progress.get(attempt.id)
        if progress is not None or attempt.phase not in ATTEMPT_ENDED:
            break
    array = state.indices.arrays.of(job)
    tally = None if array is None else array.tally()
    job = replace(job, reason=state.wait_reason(job))
    return JobView(job, tuple(shown), good[0] if good else None, progress, trials=tally)


def accounted(state: State, now: Instant, answer: Answer) -> Answer:
    """A reply about one job also says where its time went; nothing is said before its first
    attempt."""
    if not isinstance(answer, JobView) or not answer.attempts:
        return answer
    accounts = tuple(
        accounting.account(attempt, state.progress.get(attempt.id), now.unix_ms)
        for attempt in answer.attempts
    )
    waited = accounting.waiting(answer.job, now.unix_ms)
    # Ranks of one gang spend the same time together: it counts once, as rank 0 tells it.
    tries = [
        account
        for attempt, account in zip(answer.attempts, accounts, strict=True)
        if attempt.rank == 0
    ]
    return replace(answer, accounts=accounts, accounting=accounting.total((*tries, waited)))


def _invalid(sentence: str) -> Refusal:
    return Refusal(RefusalKind.INVALID, sentence)


def _not_found(job_id: int) -> Refusal:
    return Refusal(RefusalKind.NOT_FOUND, f"there is no job {job_id}")


def _wrong(job: Job, why: str) -> Refusal:
    verb = "has" if job.phase in (JobPhase.FAILED, JobPhase.SUCCEEDED) else "is"
    return Refusal(RefusalKind.WRONG_PHASE, f"job {job.id} {verb} {job.phase.value}: {why}")
