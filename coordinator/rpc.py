"""The gRPC services: people's requests and the agents' streams, translated and passed on.

Nothing is decided here. A request becomes a value, waits for the shell's answer, and an answer that
says no becomes the one status code that fits it, with the core's sentence unchanged.
"""

from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from functools import partial
from typing import NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator import wire, wire_explain, wire_fit, wire_nodes, wire_projects
from coordinator.access import Access
from coordinator.agent_session import Context, Session
from coordinator.capacity_rpc import add_capacity_service
from coordinator.checkpoint_rpc import OpenChannel, add_checkpoint_service
from coordinator.core import messages as m
from coordinator.core import traces
from coordinator.core.fit_requests import FitPage
from coordinator.core.model import JobSpec, JobView, NodeView
from coordinator.core.node_requests import ForgetNode, SetTelemetryRate
from coordinator.core.project_requests import ListProjects, ProjectPage
from coordinator.cost_rpc import add_cost_service
from coordinator.demand_rpc import add_demand_service
from coordinator.peers import ALL, Fleet, LogReader, Place
from coordinator.ports import Store
from coordinator.shell import CoordinatorShell, Unavailable
from protos.baton.v1 import (
    agent_pb2,
    agent_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    nodes_pb2,
    nodes_pb2_grpc,
)

EVENTS_MAX = 1_000  # lines of history per answer, as jobs.proto says
TIME_KEY = "baton-unix-ms"  # likewise
AGENTS = agent_pb2.DESCRIPTOR.services_by_name["AgentService"].full_name

_STATUS = {
    m.RefusalKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    m.RefusalKind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    m.RefusalKind.WRONG_PHASE: grpc.StatusCode.FAILED_PRECONDITION,
    m.RefusalKind.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


async def _abort(context: Context, code: grpc.StatusCode, sentence: str) -> NoReturn:
    await context.abort(code, sentence)
    raise AssertionError("abort returned")


async def _ask(shell: CoordinatorShell, context: Context, body: m.RequestBody) -> m.Answer:
    """The shell's answer; a refusal or an outage ends the call."""
    context.set_trailing_metadata(((TIME_KEY, str(shell.unix_ms())),))
    try:
        answer = await shell.request(body)
    except Unavailable as error:
        await _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
    if isinstance(answer, m.Refusal):
        await _abort(context, _STATUS[answer.kind], answer.sentence)
    return answer


def _in_trace(spec: JobSpec, context: Context) -> JobSpec:
    """With the caller's trace, as instrumented clients send it, unless the job names one itself."""
    given = dict(context.invocation_metadata() or ()).get("traceparent")
    if not isinstance(given, str) or not traces.is_traceparent(given):
        return spec
    if any(name == traces.VARIABLE for name, _ in spec.environment):
        return spec
    return replace(spec, environment=(*spec.environment, (traces.VARIABLE, given)))


def _view(answer: m.Answer) -> JobView:
    if not isinstance(answer, JobView):
        raise TypeError(f"expected a job, got {type(answer).__name__}")
    return answer


class JobService(jobs_pb2_grpc.JobServiceServicer):
    def __init__(self, shell: CoordinatorShell, store: Store, logs: LogReader) -> None:
        self._shell = shell
        self._store = store
        self._logs = logs

    async def Submit(
        self, request: jobs_pb2.SubmitRequest, context: Context
    ) -> jobs_pb2.SubmitResponse:
        try:
            spec = wire.decode_spec(request.spec)
            relative = request.HasField("deadline_in")
            deadline_in_ms = wire.decode_deadline_in(request.deadline_in) if relative else 0
        except wire.WireError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        spec = _in_trace(spec, context)
        body = m.Submit(spec, request.request_id, request.forgotten_job_id, deadline_in_ms)
        answer = await _ask(self._shell, context, body)
        if not isinstance(answer, m.Submitted):
            raise TypeError(f"expected a submission, got {type(answer).__name__}")
        return jobs_pb2.SubmitResponse(job_id=answer.job_id, reason=answer.reason, jobs=answer.jobs)

    async def _job(self, context: Context, body: m.RequestBody) -> JobView:
        return _view(await _ask(self._shell, context, body))

    async def GetJob(
        self, request: jobs_pb2.GetJobRequest, context: Context
    ) -> jobs_pb2.GetJobResponse:
        view = await self._job(context, m.GetJob(request.job_id))
        return jobs_pb2.GetJobResponse(job=wire.encode_job(view))

    async def ListJobs(
        self, request: jobs_pb2.ListJobsRequest, context: Context
    ) -> jobs_pb2.ListJobsResponse:
        try:
            phases = wire.decode_phases(list(request.phases))
        except wire.WireError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        body = m.ListJobs(
            phases, request.project, request.page_size, request.before_job_id, request.fold_arrays
        )
        answer = await _ask(self._shell, context, body)
        if not isinstance(answer, m.JobPage):
            raise TypeError(f"expected jobs, got {type(answer).__name__}")
        return jobs_pb2.ListJobsResponse(
            jobs=[wire.encode_job(view) for view in answer.jobs],
            next_before_job_id=answer.next_before_job_id,
        )

    async def CancelJob(
        self, request: jobs_pb2.CancelJobRequest, context: Context
    ) -> jobs_pb2.CancelJobResponse:
        view = await self._job(context, m.CancelJob(request.job_id, request.array))
        return jobs_pb2.CancelJobResponse(job=wire.encode_job(view), jobs=view.changed)

    async def HoldJob(
        self, request: jobs_pb2.HoldJobRequest, context: Context
    ) -> jobs_pb2.HoldJobResponse:
        view = await self._job(context, m.HoldJob(request.job_id, request.array))
        return jobs_pb2.HoldJobResponse(job=wire.encode_job(view), jobs=view.changed)

    async def ReleaseJob(
        self, request: jobs_pb2.ReleaseJobRequest, context: Context
    ) -> jobs_pb2.ReleaseJobResponse:
        view = await self._job(
            context, m.ReleaseJob(request.job_id, request.array, request.restored)
        )
        return jobs_pb2.ReleaseJobResponse(job=wire.encode_job(view), jobs=view.changed)

    async def RequeueJob(
        self, request: jobs_pb2.RequeueJobRequest, context: Context
    ) -> jobs_pb2.RequeueJobResponse:
        abandon = request.abandon_unreachable_checkpoints
        body = m.RequeueJob(request.job_id, abandon, request.array, request.all_trials)
        view = await self._job(context, body)
        return jobs_pb2.RequeueJobResponse(
            job=wire.encode_job(view), jobs=view.changed,
            left_running=view.left[0], left_succeeded=view.left[1],
        )  # fmt: skip

    async def ExplainJob(
        self, request: jobs_pb2.ExplainJobRequest, context: Context
    ) -> jobs_pb2.ExplainJobResponse:
        answer = await _ask(self._shell, context, m.ExplainJob(request.job_id))
        if not isinstance(answer, m.Explanation):
            raise TypeError(f"expected a sentence, got {type(answer).__name__}")
        return wire_explain.encode(answer)

    async def FitJob(
        self, request: jobs_pb2.FitJobRequest, context: Context
    ) -> jobs_pb2.FitJobResponse:
        try:
            asked = wire_fit.decode(request)
        except wire.WireError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        answer = await _ask(self._shell, context, asked)
        if not isinstance(answer, FitPage):
            raise TypeError(f"expected fits, got {type(answer).__name__}")
        return wire_fit.encode(answer)

    async def ListProjects(
        self, request: jobs_pb2.ListProjectsRequest, context: Context
    ) -> jobs_pb2.ListProjectsResponse:
        answer = await _ask(self._shell, context, ListProjects())
        if not isinstance(answer, ProjectPage):
            raise TypeError(f"expected projects, got {type(answer).__name__}")
        return wire_projects.encode(answer)

    async def ListJobEvents(
        self, request: jobs_pb2.ListJobEventsRequest, context: Context
    ) -> jobs_pb2.ListJobEventsResponse:
        await self._job(context, m.GetJob(request.job_id))
        events = await self._store.events(request.job_id, request.after_sequence, EVENTS_MAX)
        return jobs_pb2.ListJobEventsResponse(events=[wire.encode_event(e) for e in events])

    async def StreamLogs(
        self, request: jobs_pb2.StreamLogsRequest, context: Context
    ) -> AsyncIterator[jobs_pb2.StreamLogsResponse]:
        ranks = (await self._job(context, m.GetJob(request.job_id))).job.spec.ranks
        if not 0 <= request.rank < ranks:
            has = "one rank, 0" if ranks == 1 else f"ranks 0 to {ranks - 1}"
            sentence = f"job {request.job_id} has {has}; there is no rank {request.rank}"
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, sentence)
        after = None
        if request.after_attempt:
            if not request.after_attempt.startswith(f"{request.job_id}."):
                sentence = f"{request.after_attempt!r} is no attempt of job {request.job_id}"
                await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, sentence)
            after = Place(request.after_attempt, request.after_offset)
        if request.tail_bytes < 0 or request.after_offset < ALL:
            sentence = "tail_bytes is 0 or more, and after_offset -1 or more"
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, sentence)
        # A job may be silent for hours, and its follower wants to know that it is heard.
        await context.send_initial_metadata(())

        async def look() -> JobView:
            return await self._job(context, m.GetJob(request.job_id))

        async def node(node_id: str) -> NodeView | None:
            answer = await _ask(self._shell, context, m.ListNodes(nodes=(node_id,)))
            nodes = answer.nodes if isinstance(answer, m.NodePage) else ()
            return next(iter(nodes), None)

        pieces = self._logs.stream(
            Fleet(look, node),
            follow=request.follow,
            tail_bytes=request.tail_bytes,
            rank=request.rank,
            after=after,
        )
        async for piece in pieces:
            yield jobs_pb2.StreamLogsResponse(**asdict(piece))


class NodeService(nodes_pb2_grpc.NodeServiceServicer):
    def __init__(self, shell: CoordinatorShell) -> None:
        self._shell = shell

    async def ListNodes(
        self, request: nodes_pb2.ListNodesRequest, context: Context
    ) -> nodes_pb2.ListNodesResponse:
        body = m.ListNodes(request.page_size, request.after_node)
        answer = await _ask(self._shell, context, body)
        if not isinstance(answer, m.NodePage):
            raise TypeError(f"expected nodes, got {type(answer).__name__}")
        return nodes_pb2.ListNodesResponse(
            nodes=[wire_nodes.encode_node(v) for v in answer.nodes],
            next_after_node=answer.next_after_node,
        )

    async def _node(self, context: Context, body: m.RequestBody) -> NodeView:
        answer = await _ask(self._shell, context, body)
        if not isinstance(answer, NodeView):
            raise TypeError(f"expected a node, got {type(answer).__name__}")
        return answer

    async def CordonNode(
        self, request: nodes_pb2.CordonNodeRequest, context: Context
    ) -> nodes_pb2.CordonNodeResponse:
        view = await self._node(context, m.CordonNode(request.node))
        return nodes_pb2.CordonNodeResponse(node=wire_nodes.encode_node(view))

    async def DrainNode(
        self, request: nodes_pb2.DrainNodeRequest, context: Context
    ) -> nodes_pb2.DrainNodeResponse:
        view = await self._node(context, m.DrainNode(request.node))
        return nodes_pb2.DrainNodeResponse(node=wire_nodes.encode_node(view))

    async def UncordonNode(
        self, request: nodes_pb2.UncordonNodeRequest, context: Context
    ) -> nodes_pb2.UncordonNodeResponse:
        view = await self._node(context, m.UncordonNode(request.node))
        return nodes_pb2.UncordonNodeResponse(node=wire_nodes.encode_node(view))

    async def SetTelemetryRate(
        self, request: nodes_pb2.SetTelemetryRateRequest, context: Context
    ) -> nodes_pb2.SetTelemetryRateResponse:
        try:
            rate = wire_nodes.decode_rate(request.rate)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        view = await self._node(context, SetTelemetryRate(request.node, rate))
        return nodes_pb2.SetTelemetryRateResponse(node=wire_nodes.encode_node(view))

    async def ForgetNode(
        self, request: nodes_pb2.ForgetNodeRequest, context: Context
    ) -> nodes_pb2.ForgetNodeResponse:
        view = await self._node(context, ForgetNode(request.node, request.lose_checkpoints))
        return nodes_pb2.ForgetNodeResponse(node=wire_nodes.encode_node(view))


class AgentService(agent_pb2_grpc.AgentServiceServicer):
    """One call is one session."""

    def __init__(self, shell: CoordinatorShell, access: Access | None = None) -> None:
        self._shell = shell
        self._access = access or Access()

    # A coroutine that reads and writes by itself is the other form that grpc.aio takes; the types
    # that are generated know generators alone.
    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[agent_pb2.SessionRequest], context: Context
    ) -> None:
        await Session(self._shell, context, self._access).serve()


async def add_services(
    server: grpc.aio.Server,
    shell: CoordinatorShell,
    store: Store,
    *,
    logs: LogReader,
    open_channel: OpenChannel,
    access: Access,
) -> None:
    """Everything that the coordinator serves, with health and reflection, so that stock gRPC tools
    can list and call it."""
    jobs_pb2_grpc.add_JobServiceServicer_to_server(JobService(shell, store, logs), server)
    nodes_pb2_grpc.add_NodeServiceServicer_to_server(NodeService(shell), server)
    agent_pb2_grpc.add_AgentServiceServicer_to_server(AgentService(shell, access), server)
    names = [
        module.DESCRIPTOR.services_by_name[name].full_name
        for module, name in (
            (jobs_pb2, "JobService"),
            (nodes_pb2, "NodeService"),
            (agent_pb2, "AgentService"),
        )
    ]
    names.append(add_checkpoint_service(server, partial(_ask, shell), open_channel))
    names.append(add_cost_service(server, partial(_ask, shell)))
    names.append(add_demand_service(server, partial(_ask, shell)))
    names.append(add_capacity_service(server, partial(_ask, shell)))
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    for name in ("", *names):
        await checker.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection(
        (*names, reflection.SERVICE_NAME, health.SERVICE_NAME), server
    )
