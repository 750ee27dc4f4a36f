"""What happens in `make demo-scaling`: the days before, a fleet that is on, a day, the conclusion.

Problem: a forecast that knows nothing can only react. So the coordinator finds two days of demand
in its database when it starts, the real ones before the day that is played. They end a little in
the future, so that the time in which the fleet starts is no gap and no hour without demand.

The plan's rules are those of production, hours and days included; its minute lasts `MINUTE_MS`.
What has to do with machines is in real time: how often a plan is made, boots, leases.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from coordinator.capacity import hostlist
from coordinator.core.demand_history import DemandRow, PutDemand, PutDemandSeries, Series
from coordinator.core.model import JobClass
from coordinator.sim.capacity_replay import Switch
from coordinator.store.sqlite import SqliteStore
from protos.baton.v1 import capacity_pb2, capacity_pb2_grpc, jobs_pb2, nodes_pb2, types_pb2
from tests.e2e import demo_story, scaling_day, scaling_report, scaling_switch
from tests.e2e.cluster import ROOT, Cluster, ClusterError
from tests.e2e.demo_view import View
from tests.e2e.scaling_report import GPU_TYPE, Day, Sample
from tests.e2e.trainers import ticking
from tests.e2e.work import ENDED, submit
from tests.fakenvml.build import BuildError, h100

NODES = tuple(f"n{number}" for number in range(1, 11))
GPUS_PER_NODE = 2
MINUTE_MS = 250
# Time for a coordinator and its agents to start, on a busy machine as well.
LEAD_S = 15.0
SAMPLE_S = 0.4
SAY_EVERY_MINUTES = 60
TAIL_S = 60.0
# Whoever is switched off comes back no sooner than it is told to: nobody has to wait for it.
ABSENCE_MS = 500
TICK_MS, CHECKPOINT_MS = 500, 1_000
# Of a job that is not its work: from its submission until its first step, and its last checkpoint.
AROUND_MS = 1_500
CONFIG = {
    "demand_minute_ms": MINUTE_MS,
    "scaling_mode": "act",
    "scaling_interval_ms": 1_000,
    "scaling_boot_ms": 2_000,
    "scaling_boot_deadline_ms": 30_000,
    "scaling_stop_deadline_ms": 40_000,
    "scaling_spares": 0,
    "heartbeat_interval_ms": 500,
    "closed_grace_ms": 1_000,
}
POWERS = {
    types_pb2.NODE_POWER_ON: "is on",
    types_pb2.NODE_POWER_LEAVING: "takes nothing new",
    types_pb2.NODE_POWER_STOPPING: "is drained and ordered off",
    types_pb2.NODE_POWER_OFF: "is off",
    types_pb2.NODE_POWER_STARTING: "is ordered on",
    types_pb2.NODE_POWER_FAILED: "did not come up",
}
CAN_GO_OFF = "can go off"  # so says who is moved for it (`consolidation.py`)
SWITCHES = {types_pb2.NODE_POWER_STARTING: "start", types_pb2.NODE_POWER_STOPPING: "stop"}


def run(*, first_step: int, steps: int, step_minutes: int, plot: Path, keep: bool) -> int:
    """Tell the whole story. Returns the exit status."""
    with View(as_json=False) as view:
        demo_story.sweep()
        cluster = Cluster(demo_story.DATA / f"run-{os.getpid()}")
        held = False
        try:
            with cluster:
                day = _tell(cluster, view, first_step, steps, step_minutes)
            failures = _conclude(view, day, plot)
            held = not failures
        except (ClusterError, BuildError, OSError, grpc.RpcError) as error:
            failures = [demo_story.sentence(error)]
        finally:
            demo_story.sweep()
            if held and not keep:
                shutil.rmtree(cluster.directory, ignore_errors=True)
        view.text()
        for failure in failures:
            view.text(f"FAILED: {failure}")
        if keep or not held:
            view.text(f"Logs and state are in {cluster.directory.relative_to(ROOT)}/")
        if held:
            view.text("Nodes went off, came back ahead of need, and no job was lost.")
        return 0 if held else 1


def _tell(cluster: Cluster, view: View, first_step: int, steps: int, step_minutes: int) -> Day:
    course = scaling_day.scaled(len(NODES) * GPUS_PER_NODE)
    begin = len(course) - scaling_day.STEPS_PER_DAY + first_step
    view.title("Starting one coordinator, which knows two days of demand, and ten agents")
    begins_s = _remember(cluster, course[:begin], step_minutes)
    _start_fleet(cluster)
    view.text(f"  {len(NODES)} nodes with {GPUS_PER_NODE} GPUs (stand-ins for NVML), all on")
    played = course[begin : begin + steps]
    view.title(f"A day: {len(played)} steps of ten minutes, each in {_step_s(step_minutes):g} s")
    story = _Story(cluster, view, scaling_day.wishes(played), step_minutes, begins_s)
    cluster.wait_until(lambda: time.time() >= begins_s, 2 * LEAD_S, "the past is over")
    deadline_s = len(played) * _step_s(step_minutes) + TAIL_S
    cluster.wait_until(story.look, deadline_s, "the day is over and its jobs have ended")
    return story.day()


def _step_s(step_minutes: int) -> float:
    return step_minutes * MINUTE_MS / 1_000


def _remember(cluster: Cluster, past: tuple[int, ...], step_minutes: int) -> float:
    """Demand before the coordinator's time; returns when it ends, in seconds since 1970."""
    minutes = [float(gpus) for gpus in past for _ in range(step_minutes)]
    end = time.time_ns() // 1_000_000 // MINUTE_MS + round(LEAD_S * 1_000) // MINUTE_MS
    series = PutDemandSeries(0, Series(GPU_TYPE, "earlier", JobClass.STANDARD.value))
    rows = [
        PutDemand(DemandRow(1, end - len(minutes) + place, (0,), (gpus,)))
        for place, gpus in enumerate(minutes)
    ]

    async def write() -> None:
        directory = cluster.directory / "coordinator"
        directory.mkdir(mode=0o700)
        store = SqliteStore(directory / "baton.sqlite3")
        await store.open()
        await store.commit([series, *rows])
        await store.close()

    asyncio.run(write())
    return end * MINUTE_MS / 1_000


def _start_fleet(cluster: Cluster) -> None:
    nodes = hostlist.written(NODES)
    programs = scaling_switch.written(cluster)
    table = {"nodes": nodes, "driver": "programs", "deadline_ms": 30_000, **programs}
    cluster.start_coordinator(**CONFIG, capacity={"fleet": table})
    for node in NODES:
        gpus = h100(GPUS_PER_NODE, node=node)
        launch = cluster.prepare_agent(node, gpus, restart_absence_ms=ABSENCE_MS)
        scaling_switch.describe(cluster, node, launch)
    subprocess.run([programs["resume_program"], nodes], check=True)
    cluster.wait_for_nodes(*NODES)


@dataclass(slots=True)
class _Story:
    """The day while it passes."""

    cluster: Cluster
    view: View
    wishes: list[scaling_day.Wish]
    step_minutes: int
    begins_s: float
    submitted: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    switches: list[Switch] = field(default_factory=list)
    boots_min: list[float] = field(default_factory=list)
    powers: dict[str, int] = field(default_factory=dict)
    ordered_min: dict[str, float] = field(default_factory=dict)
    said_hour: int = -1
    ended: list[types_pb2.Job] = field(default_factory=list)

    def look(self) -> bool:
        """Submit what is due and see how things are; true when all is over."""
        minute = (time.time() - self.begins_s) * 1_000 / MINUTE_MS
        while len(self.submitted) < len(self.wishes):
            wish = self.wishes[len(self.submitted)]
            if wish.begin * self.step_minutes > minute:
                break
            self._submit(wish)
        if self.samples and minute - self.samples[-1].minute < SAMPLE_S * 1_000 / MINUTE_MS:
            return False
        self._sample(minute)
        self._watch_power(minute)
        if len(self.submitted) < len(self.wishes) or self.samples[-1].wanted_gpus:
            return False
        listed = self.cluster.jobs.ListJobs(jobs_pb2.ListJobsRequest(page_size=1_000))
        self.ended = list(listed.jobs)
        return all(job.phase in ENDED for job in self.ended)

    def _submit(self, wish: scaling_day.Wish) -> None:
        number = len(self.submitted) + 1
        end_s = self.begins_s + wish.end * _step_s(self.step_minutes)
        duration_ms = round((end_s - time.time()) * 1_000) - AROUND_MS
        words = [sys.executable, ticking.__file__, "--file", self._witness(number)]
        words += ["--steps", max(1, duration_ms // TICK_MS), "--step-ms", TICK_MS]
        words += ["--checkpoint-ms", CHECKPOINT_MS]
        command = [str(word) for word in words]
        self.submitted.append(submit(self.cluster, command, name=f"job-{number}", gpus=1))

    def _witness(self, number: int) -> Path:
        return self.cluster.directory / f"job-{number}.lines"

    def _sample(self, minute: float) -> None:
        stub = capacity_pb2_grpc.CapacityServiceStub(self.cluster.channel)
        plan = stub.GetPlan(capacity_pb2.GetPlanRequest())
        (told,) = (one for one in plan.types if one.gpu_type == GPU_TYPE)
        sample = Sample(
            minute,
            told.running_gpus,
            told.queued_gpus,
            told.on_gpus + told.leaving_gpus,
            told.starting_gpus,
            told.on_gpus + told.leaving_gpus - told.running_gpus,
            () if told.stale else tuple(told.soon_gpus),
        )
        self.samples.append(sample)
        hour = int(minute) // SAY_EVERY_MINUTES
        if hour > self.said_hour:
            self.said_hour = hour
            self.view.happened(
                f"{hour:2} h: {sample.wanted_gpus} GPUs wanted, {sample.on_gpus} on, "
                f"{told.need_gpus} needed until a node would be there"
            )

    def _watch_power(self, minute: float) -> None:
        listed = self.cluster.nodes.ListNodes(nodes_pb2.ListNodesRequest()).nodes
        for node in listed:
            before = self.powers.get(node.id, types_pb2.NODE_POWER_ON)
            self.powers[node.id] = node.power
            if node.power == before:
                continue
            if before == types_pb2.NODE_POWER_STARTING and node.power == types_pb2.NODE_POWER_ON:
                self.boots_min.append(minute - self.ordered_min[node.id])
                self._switched(minute, node.id, "up")
            if node.power in SWITCHES:
                self.ordered_min[node.id] = minute
                self._switched(minute, node.id, SWITCHES[node.power])
            words = POWERS[node.power]
            if before == types_pb2.NODE_POWER_LEAVING and node.power == types_pb2.NODE_POWER_ON:
                words = "takes work again"
            self.view.happened(f"      {node.id} {words}")

    def _switched(self, minute: float, node: str, what: str) -> None:
        self.switches.append(Switch(round(minute * scaling_report.MINUTE_MS), node, what))

    def day(self) -> Day:
        lost = [
            f"{job.spec.name}: {job.reason}"
            for job in self.ended
            if job.phase != types_pb2.JOB_PHASE_SUCCEEDED
        ]
        missing = len(self.submitted) - len(self.ended)
        lost += [f"{missing} are not known any more"] if missing else []
        waits_min = [
            (job.attempts[-1].assign_time.ToMilliseconds() - job.submit_time.ToMilliseconds())
            / MINUTE_MS
            for job in self.ended
            if job.attempts and job.epoch == 1
        ]
        return Day(
            nodes=len(NODES),
            gpus_per_node=GPUS_PER_NODE,
            samples=tuple(self.samples),
            switches=tuple(self.switches),
            boots_min=tuple(self.boots_min),
            jobs=len(self.submitted),
            lost=tuple(lost),
            moved=self._moved(),
            waits_min=tuple(waits_min),
        )

    def _moved(self) -> int:
        """A listed job has its last attempt alone; so who began again is asked for."""
        ids = [job.id for job in self.ended if job.epoch > 1]
        jobs = [self.cluster.jobs.GetJob(jobs_pb2.GetJobRequest(job_id=one)).job for one in ids]
        return sum(CAN_GO_OFF in attempt.reason for job in jobs for attempt in job.attempts)


def _conclude(view: View, day: Day, plot: Path) -> list[str]:
    """Show the table, write the plot; returns what did not hold."""
    view.title("The day, beside two rules that have names")
    for line in scaling_report.lines(day):
        view.text(line)
    plot.write_text(scaling_report.drawing(day), "utf-8")
    view.text(f"  The plot is {plot}")
    return day.failures()
