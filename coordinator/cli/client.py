"""The one file of the CLI that knows gRPC and the generated code: calls in, plain values out.

Problem: what goes wrong on a wire has a dozen names, and a person at a terminal has three
questions: was I refused and why, did nobody answer, and did my submission happen? So every failure
leaves here as `CommandFailed` with one sentence and an exit code. A refusal's sentence is the
coordinator's own, unchanged.

UNAVAILABLE is used by two speakers: by gRPC for "no connection", and by the coordinator for "not
durable now". Nothing in the status tells them apart, so the channel is asked: if it is still
connected, the coordinator said it.

A followed log outlives its coordinator: each part says its place, so who was cut off asks again for
what follows it, until the coordinator is back or has been away for too long.

A submission whose answer is lost may have happened. Each one carries a request id, the same in
every try, and the coordinator answers a known id with the job that it made then. The tries are
bounded; the last sentence says how to go on.
"""

import os
import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

# gRPC's C core writes its own lines to stderr (a failed handshake, a fork), beside the one sentence
# that we owe.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from coordinator.cli import trouble, values
from coordinator.cli.decoding import (
    decode,
    decode_change,
    decode_job,
    decode_node,
    decode_requeue,
)
from coordinator.cli.settings import EXIT_UNREACHABLE, BadInput, CommandFailed, Settings
from protos.baton.v1 import jobs_pb2, jobs_pb2_grpc, nodes_pb2, nodes_pb2_grpc, types_pb2

_Answer = TypeVar("_Answer", bound=Message)

# Between tries of a submission: a coordinator that is restarted is back within a few seconds.
RETRY_PAUSES_S = (0.2, 0.5, 1.0, 2.0)

# Between tries to go on with a log, the last one again and again; and for how long. A coordinator
# is back in seconds, its machine in some minutes.
FOLLOW_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0)
FOLLOW_AWAY_S_MAX = 600.0

# The contract's largest page, of jobs and of nodes.
PAGE_SIZE_MAX = 1000

# A history is bounded by the coordinator; this bounds one that would page for ever (1000 pages of
# 1000 events).
EVENT_PAGES_MAX = 1000

# A coordinator before pages of nodes told all in one: 20,000 with 8 GPUs each are about 50 MiB.
MESSAGE_BYTES_MAX = 256 * 1024 * 1024

# Where the coordinator says its wall time (jobs.proto), and the last one of the year 9999.
TIME_KEY = "baton-unix-ms"
_UNIX_MS_MAX = 253_402_300_799_999

# Until the channel says in which state it is; it answers at once, from a thread of its own.
STATE_WAIT_S = 2.0

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A coordinator is a machine of ours; http_proxy is for the world outside.
    ("grpc.enable_http_proxy", 0),
    # Without these a try within a second of a refused connection is refused from memory.
    # Not the least of them as well: that is gRPC's limit for a handshake, and TLS to another
    # continent takes longer than such a pause. 20 s by default; --timeout-s is sooner.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # `logs -f` of a silent job notices a dead machine. gRPC servers count pings under 5 minutes as
    # abuse.
    ("grpc.keepalive_time_ms", 330_000),
)


class Client:
    """Speaks to one coordinator. A context manager; the constructor only stores."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._channel: grpc.Channel | None = None
        self._ahead = timedelta(0)  # the coordinator's clock, of ours

    def __enter__(self) -> Self:
        """Opens the channel; nothing is sent yet. Raises `click.UsageError` for settings that
        cannot be used, `BadInput` for an unreadable certificate."""
        self._settings.check()
        self._channel = _open_channel(self._settings)
        self._jobs = jobs_pb2_grpc.JobServiceStub(self._channel)
        self._nodes = nodes_pb2_grpc.NodeServiceStub(self._channel)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._channel is not None:
            self._channel.close()

    def now(self) -> datetime:
        """The wall time of the coordinator that has answered; of an older one, ours."""
        return datetime.now(UTC) + self._ahead

    def submit(
        self,
        spec: values.JobSpec,
        request_id: str,
        for_job: int | None = None,
        deadline_in_ms: int = 0,
    ) -> values.Submission:
        """Submit, up to `1 + len(RETRY_PAUSES_S)` times while the coordinator is unavailable.
        `deadline_in_ms`, above 0: the deadline is so long after the coordinator hears of it."""
        request = jobs_pb2.SubmitRequest(
            request_id=request_id, spec=_spec_to_wire(spec), forgotten_job_id=for_job or 0
        )
        if deadline_in_ms:
            request.deadline_in.CopyFrom(_duration(deadline_in_ms))
        pauses_s = list(RETRY_PAUSES_S)
        unsettled = False
        while True:
            try:
                answer = self._jobs.Submit(request, timeout=self._settings.timeout_s)
            except grpc.RpcError as error:
                sent = not _NOT_SENT.search(error.details() or "")
                unsettled = unsettled or (sent and error.code() in _UNSETTLED)
                if error.code() is grpc.StatusCode.UNAVAILABLE and pauses_s:
                    time.sleep(pauses_s.pop(0))
                    continue
                failed = self._failed(error)
                if unsettled:
                    raise CommandFailed(
                        f"{failed}; to try again without submitting twice, add "
                        f"--request-id {request_id}",
                        failed.exit_code,
                    ) from error
                raise failed from error
            jobs = answer.jobs or 1  # an older coordinator does not say
            return decode(answer, values.Submission, request_id=request_id, jobs=jobs)

    def job(self, job_id: int) -> values.Job:
        """Everything about one job."""
        request = jobs_pb2.GetJobRequest(job_id=job_id)
        return decode_job(self._call(self._jobs.GetJob, request).job)

    def jobs(
        self, phases: list[str], project: str, limit: int, *, fold: bool = False
    ) -> tuple[list[values.Job], bool]:
        """The newest `limit` jobs in one of `phases` (empty: any), newest first, and whether there
        are more; `fold`: of an array the newest trial alone."""
        found: list[values.Job] = []
        before_job_id = 0
        while len(found) < limit:
            answer = self._call(
                self._jobs.ListJobs,
                jobs_pb2.ListJobsRequest(
                    phases=[
                        types_pb2.JobPhase.Value(f"JOB_PHASE_{word.upper()}") for word in phases
                    ],
                    project=project,
                    page_size=min(limit - len(found), PAGE_SIZE_MAX),
                    before_job_id=before_job_id,
                    fold_arrays=fold,
                ),
            )
            found.extend(decode_job(job) for job in answer.jobs)
            before_job_id = answer.next_before_job_id
            if before_job_id == 0:
                return found[:limit], len(found) > limit
        return found[:limit], True

    def cancel(self, job_id: int, array: bool) -> "Changed":
        """End a job, or all of its array, for good."""
        request = jobs_pb2.CancelJobRequest(job_id=job_id, array=array)
        return _changed(self._call(self._jobs.CancelJob, request), array)

    def hold(self, job_id: int, array: bool) -> "Changed":
        """Keep a job from running."""
        request = jobs_pb2.HoldJobRequest(job_id=job_id, array=array)
        return _changed(self._call(self._jobs.HoldJob, request), array)

    def release(self, job_id: int, array: bool) -> "Changed":
        """Put a held job back to its old place in the queue."""
        request = jobs_pb2.ReleaseJobRequest(job_id=job_id, array=array)
        return _changed(self._call(self._jobs.ReleaseJob, request), array)

    def release_restored(self) -> int:
        """Put back all jobs that are held since the database was; returns how many."""
        request, count = jobs_pb2.ReleaseJobRequest(restored=True), 0
        while True:
            try:
                released = self._call(self._jobs.ReleaseJob, request).jobs
            except CommandFailed as failed:
                if "there is no job 0" in str(failed):
                    raise CommandFailed(
                        "the coordinator knows no --restored; is it older?"
                    ) from failed
                if count and failed.exit_code != EXIT_UNREACHABLE:
                    return count  # none is left
                raise
            count += released
            if not released:
                return count

    def requeue(self, job_id: int, array: bool, abandon: bool, every: bool) -> "Changed":
        """Stop a job with its work saved and queue it again."""
        request = jobs_pb2.RequeueJobRequest(
            job_id=job_id, abandon_unreachable_checkpoints=abandon, array=array, all_trials=every
        )
        answer = self._call(self._jobs.RequeueJob, request)
        return decode_requeue(answer) if array else decode_job(answer.job)

    def explain(self, job_id: int) -> values.Explanation:
        """One sentence with numbers, and the figures of it."""
        answer = self._call(self._jobs.ExplainJob, jobs_pb2.ExplainJobRequest(job_id=job_id))
        return decode(answer, values.Explanation, job_id=job_id)

    def fit(
        self, spec: values.JobSpec, model: values.ModelFacts | str, prices: dict[str, float]
    ) -> values.FitReport:
        """What the job would do on each type of GPU; a string says why the model is not known."""
        request = jobs_pb2.FitJobRequest(spec=_spec_to_wire(spec), usd_per_gpu_hour=prices)
        if isinstance(model, str):
            request.model_why = model
        else:
            request.model.CopyFrom(jobs_pb2.ModelFacts(**msgspec.structs.asdict(model)))
        answer = self._call(self._jobs.FitJob, request)
        return decode(answer, values.FitReport)

    def projects(self) -> values.ProjectReport:
        """How projects stand by their quotas."""
        answer = self._call(self._jobs.ListProjects, jobs_pb2.ListProjectsRequest())
        return decode(answer, values.ProjectReport)

    def events(self, job_id: int) -> Iterator[values.JobEvent]:
        """A job's history, oldest first."""
        after_sequence = 0
        for _ in range(EVENT_PAGES_MAX):
            request = jobs_pb2.ListJobEventsRequest(job_id=job_id, after_sequence=after_sequence)
            page = self._call(self._jobs.ListJobEvents, request).events
            if not page:
                return
            yield from (decode(event, values.JobEvent) for event in page)
            after_sequence = page[-1].sequence

    def logs(
        self, job_id: int, *, follow: bool, tail_bytes: int, rank: int = 0
    ) -> Iterator[values.LogPart]:
        """What a job wrote, in order. No deadline: a followed job may be silent for days. Once the
        coordinator has been reached, a follower outlives it."""
        request = jobs_pb2.StreamLogsRequest(
            job_id=job_id, follow=follow, tail_bytes=tail_bytes, rank=rank
        )
        away = _Away(follow)
        part = values.LogPart(attempt="", node="", data=b"", notice="")
        while True:
            call = self._jobs.StreamLogs(request)
            try:
                call.initial_metadata()  # waits until it answers, or nobody does
                if call.is_active():
                    away.ends()
                for answer in call:
                    # An older coordinator says no place, and would begin again.
                    away.may_end &= bool(answer.next_offset or not answer.data)
                    request.after_attempt = answer.attempt
                    request.after_offset = answer.next_offset
                    part = decode(answer, values.LogPart)
                    yield part
                return
            except grpc.RpcError as error:
                failed = self._failed(error)
                if not away.goes_on(error.code()):
                    raise failed from error
                if away.tries == 1:
                    address = self._settings.coordinator
                    notice = f"{address} does not answer; the output goes on when it does"
                    yield msgspec.structs.replace(part, data=b"", notice=notice)
            away.pause()

    def nodes(self) -> list[values.Node]:
        """All nodes, by id."""
        found: list[values.Node] = []
        request = nodes_pb2.ListNodesRequest(page_size=PAGE_SIZE_MAX)
        while True:
            answer = self._call(self._nodes.ListNodes, request)  # an older coordinator tells all
            found += [decode_node(node) for node in answer.nodes]
            if answer.next_after_node <= request.after_node:
                return found
            request.after_node = answer.next_after_node

    def cordon(self, node: str) -> values.Node:
        """Take no new work; what runs goes on."""
        request = nodes_pb2.CordonNodeRequest(node=node)
        return decode_node(self._call(self._nodes.CordonNode, request).node)

    def drain(self, node: str) -> values.Node:
        """Take no new work, and hand off what runs."""
        request = nodes_pb2.DrainNodeRequest(node=node)
        return decode_node(self._call(self._nodes.DrainNode, request).node)

    def uncordon(self, node: str) -> values.Node:
        """Take work again."""
        request = nodes_pb2.UncordonNodeRequest(node=node)
        return decode_node(self._call(self._nodes.UncordonNode, request).node)

    def set_telemetry_rate(self, node: str, rate: str) -> values.Node:
        """How often its GPUs are read; `own`: as its agent's configuration says."""
        word = "UNSPECIFIED" if rate == "own" else rate.upper()
        wanted = types_pb2.TelemetryRate.Value(f"TELEMETRY_RATE_{word}")
        request = nodes_pb2.SetTelemetryRateRequest(node=node, rate=wanted)
        return decode_node(self._call(self._nodes.SetTelemetryRate, request).node)

    def forget(self, node: str, *, lose_checkpoints: bool) -> values.Node:
        """Take a lost node out of all lists; returns it as it was."""
        request = nodes_pb2.ForgetNodeRequest(node=node, lose_checkpoints=lose_checkpoints)
        return decode_node(self._call(self._nodes.ForgetNode, request).node)

    def _call(
        self, method: "grpc.UnaryUnaryMultiCallable[Any, _Answer]", request: Message
    ) -> _Answer:
        try:
            answer, call = method.with_call(request, timeout=self._settings.timeout_s)
        except grpc.RpcError as error:
            raise self._failed(error) from error
        for key, value in call.trailing_metadata() or ():
            if key == TIME_KEY and (digits := str(value)).isdecimal():
                theirs = datetime.fromtimestamp(min(int(digits), _UNIX_MS_MAX) / 1000, UTC)
                self._ahead = theirs - datetime.now(UTC)
        return answer

    def _failed(self, error: grpc.RpcError) -> CommandFailed:
        """The sentence and the exit code for what gRPC reports."""
        address = self._settings.coordinator
        details = " ".join((error.details() or "").split())
        code = error.code()
        if code is grpc.StatusCode.UNAVAILABLE and not self._is_connected():
            return CommandFailed(
                f"cannot reach the coordinator at {address}: "
                f"{trouble.in_words(details, self._settings.tls_doubt())}",
                EXIT_UNREACHABLE,
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return CommandFailed(
                f"the coordinator at {address} has not answered within "
                f"{self._settings.timeout_s:g} s; see --timeout-s",
                EXIT_UNREACHABLE,
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return CommandFailed(
                f"the coordinator at {address} does not know this call; is it an older version?"
            )
        return CommandFailed(details or f"the coordinator answered {code.name}")

    def _is_connected(self) -> bool:
        assert self._channel is not None
        answered = threading.Event()
        states: list[grpc.ChannelConnectivity] = []

        def note(state: grpc.ChannelConnectivity) -> None:
            states.append(state)
            answered.set()

        self._channel.subscribe(note)
        answered.wait(STATE_WAIT_S)
        self._channel.unsubscribe(note)
        return states[:1] == [grpc.ChannelConnectivity.READY]


class _Away:
    """A coordinator that a follower has lost: whether to ask again, and when."""

    def __init__(self, follow: bool) -> None:
        self.may_end = follow
        self.tries = 0
        self._was_here = False
        self._since_s = 0.0

    def ends(self) -> None:
        self.tries, self._was_here = 0, True

    def goes_on(self, code: grpc.StatusCode) -> bool:
        """A server that stops ends its calls in either way; one that was never there is no loss."""
        lost = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        self._since_s = self._since_s if self.tries else time.monotonic()
        self.tries += 1
        away_s = time.monotonic() - self._since_s
        return lost and self.may_end and self._was_here and away_s < FOLLOW_AWAY_S_MAX

    def pause(self) -> None:
        time.sleep(FOLLOW_PAUSES_S[min(self.tries, len(FOLLOW_PAUSES_S)) - 1])


_UNSETTLED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})
# There was no connection that a request could have gone over.
_NOT_SENT = re.compile(
    r"failed to connect to all addresses|resolution failed|errors resolving|name not found",
    re.IGNORECASE,
)


Changed = values.Job | values.ArrayChange
_Changes = jobs_pb2.CancelJobResponse | jobs_pb2.HoldJobResponse | jobs_pb2.ReleaseJobResponse


def _changed(answer: _Changes, array: bool) -> Changed:
    return decode_change(answer.job, answer.jobs) if array else decode_job(answer.job)


def _open_channel(settings: Settings) -> grpc.Channel:
    if not (settings.tls_cert and settings.tls_key and settings.tls_ca):
        return grpc.insecure_channel(settings.coordinator, options=_CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read(settings.tls_ca),
        private_key=_read(settings.tls_key),
        certificate_chain=_read(settings.tls_cert),
    )
    return grpc.secure_channel(settings.coordinator, credentials, options=_CHANNEL_OPTIONS)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error


def _spec_to_wire(spec: values.JobSpec) -> types_pb2.JobSpec:
    return types_pb2.JobSpec(
        name=spec.name,
        project=spec.project,
        job_class=types_pb2.JobClass.Value(f"JOB_CLASS_{_constant(spec.job_class)}"),
        command=spec.command,
        trainer=spec.trainer,
        trainer_config_json=spec.trainer_config_json,
        environment=spec.environment,
        working_directory=spec.working_directory,
        gpus=spec.gpus,
        gpu_types=spec.gpu_types,
        gpu_memory_bytes_min=spec.gpu_memory_bytes_min,
        memory_bytes=spec.memory_bytes,
        grace=None if spec.grace_ms is None else _duration(spec.grace_ms),
        stop_signal=types_pb2.StopSignal.Value(f"STOP_SIGNAL_{_constant(spec.stop_signal)}"),
        max_restarts=spec.max_restarts,
        run_again_exit_codes=spec.run_again_exit_codes,
        replication=types_pb2.Replication.Value(f"REPLICATION_{_constant(spec.replication)}"),
        slurm_environment=spec.slurm_environment,
        hold=spec.hold,
        keep_checkpoints=spec.keep_checkpoints,
        # Unsaid where there is one, as before there were gangs.
        ranks=0 if spec.ranks == 1 else spec.ranks,
        shared_gpu_memory_bytes=spec.shared_gpu_memory_bytes,
        flexible=_duration(spec.flexible_ms) if spec.flexible_ms else None,
        deadline=None if spec.deadline is None else _timestamp(spec.deadline),
        share_automatic=spec.share_automatic,
        array=spec.array,
    )


def _constant(word: str | None) -> str:
    return "UNSPECIFIED" if word is None else word.upper()


def _timestamp(time: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(time)
    return timestamp


def _duration(duration_ms: int) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(duration_ms)
    return duration
