"""How soon the coordinator knows that a GPU is in trouble: errors, hangs, and one that is gone.

Coordinator and agents are the real programs, on loopback; the GPUs are those of the stand-in for
NVML. An error (XID) is injected either way that the agent hears of one: as an event of NVML, and as
a record in the kernel's log, here a pipe that can be waited for as /dev/kmsg can. Each injection is
another code or another GPU, since a code that is told again is a count and may follow later. Then a
driver whose calls hang, all of them or those about one GPU, and a GPU that has fallen off the bus:
each is done to an agent that has just been started, since a sampler that was replaced may not be
again for five minutes.

The end of each span is the moment when the coordinator's own list of nodes says so, asked again as
soon as it has answered. So a span has the list's few milliseconds in it, and, where NVML tells, up
to ten of the stand-in, which looks for events a hundred times a second.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench import report
from protos.baton.v1 import types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import FakeGpu, describe, h100

GPUS = 8
CODES = (46, 62, 64, 95, 109, 110, 119, 120)  # each asks for a reset, and stays until there is one
CODES_QUICK = CODES[:2]
REPEATS, REPEATS_QUICK = 5, 1
SICK_GPUS = 2
APART_S = 0.037  # no divisor of the second that readings are made in
LATE_S_MAX = 60.0  # for what should take a second, or ten
XID_GOAL_S = 1.0
VERDICT_GOAL_S = 10.0

UNKNOWN = types_pb2.GPU_VERDICT_UNKNOWN
LOST = types_pb2.GPU_VERDICT_LOST
HEALTHY = types_pb2.GPU_VERDICT_HEALTHY


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    codes = CODES_QUICK if asked.quick else CODES
    repeats = REPEATS_QUICK if asked.quick else REPEATS
    rows: list[report.Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch,
        Cluster(Path(scratch) / "cluster", patient=False) as cluster,
    ):
        cluster.start_coordinator()
        report.say(f"xid: {len(codes) * GPUS} errors, by NVML and by the kernel's log")
        for source, inject in (("NVML's event", by_nvml), ("the kernel's log", by_kernel)):
            rows += xid_rows(source, inject(cluster, codes))
        for what, sick, verdict, name in TROUBLES:
            report.say(f"xid: {what}, {repeats} times")
            spans_s = [
                until_verdict(cluster, f"{name}{index}", sick, verdict) for index in range(repeats)
            ]
            row = report.row_of(f"{what}: until the coordinator says so", spans_s, "s")
            rows.append(replace(row, goal=VERDICT_GOAL_S))
    report.show("Trouble of GPUs, until the coordinator knows", rows, asked)
    return 0


def xid_rows(source: str, spans_s: list[float]) -> list[report.Row]:
    name = f"XID by {source}, {len(spans_s)} injections"
    p99_s = report.percentile(spans_s, 0.99)
    return [
        report.row_of(f"{name}: p50", spans_s, "s"),
        report.Row(name=f"{name}: p99", value=p99_s, unit="s", goal=XID_GOAL_S),
    ]


# --- errors ---------------------------------------------------------------------------------------


def by_nvml(cluster: Cluster, codes: Sequence[int]) -> list[float]:
    """Spans in seconds."""
    gpus = list(h100(GPUS, node="nvml"))
    started(cluster, "nvml", gpus)

    def inject(index: int, code: int, number: int) -> None:
        gpus[index] = replace(gpus[index], xids=(*gpus[index].xids, (number, code)))
        show(cluster, "nvml", gpus)

    spans_s = injections(cluster, "nvml", codes, inject)
    cluster.stop_agent("nvml")
    return spans_s


def by_kernel(cluster: Cluster, codes: Sequence[int]) -> list[float]:
    """Spans in seconds."""
    pipe = cluster.directory / "kmsg"
    os.mkfifo(pipe, 0o600)
    started(cluster, "kernel", h100(GPUS, node="kernel"), kernel_log=str(pipe))
    descriptor = os.open(pipe, os.O_WRONLY)

    def inject(index: int, code: int, number: int) -> None:
        now_us = time.monotonic_ns() // 1_000
        text = f"NVRM: Xid (PCI:0000:{index + 1:02x}:00): {code}, pid=7, name=python"
        os.write(descriptor, f"4,{number},{now_us},-;{text}\n".encode())

    spans_s = injections(cluster, "kernel", codes, inject)
    os.close(descriptor)
    cluster.stop_agent("kernel")
    return spans_s


def injections(
    cluster: Cluster,
    node: str,
    codes: Sequence[int],
    inject: Callable[[int, int, int], None],
) -> list[float]:
    """Each code on each GPU, one after the other; `inject` gets GPU, code and a growing number."""
    pause, spans_s = threading.Event(), []
    cases = [(index, code) for code in codes for index in range(GPUS)]
    for number, (index, code) in enumerate(cases, start=1):
        pause.wait(APART_S)
        began_s = time.perf_counter()
        inject(index, code, number)
        uuid = h100(GPUS, node=node)[index].uuid
        until(cluster, node, partial(has_xid, code), (uuid,))
        spans_s.append(time.perf_counter() - began_s)
    return spans_s


def has_xid(code: int, gpu: types_pb2.Gpu) -> bool:
    return any(record.code == code for record in gpu.health.xids)


# --- hangs and losses -----------------------------------------------------------------------------

Sick = Callable[[Cluster, str, Sequence[FakeGpu]], tuple[str, ...]]


def driver_hangs(cluster: Cluster, node: str, gpus: Sequence[FakeGpu]) -> tuple[str, ...]:
    show(cluster, node, gpus, driver_state="hangs")
    return tuple(gpu.uuid for gpu in gpus)


def one_hangs(cluster: Cluster, node: str, gpus: Sequence[FakeGpu]) -> tuple[str, ...]:
    show(cluster, node, [replace(gpus[0], state="hangs"), *gpus[1:]])
    return (gpus[0].uuid,)


def one_is_lost(cluster: Cluster, node: str, gpus: Sequence[FakeGpu]) -> tuple[str, ...]:
    show(cluster, node, [replace(gpus[0], state="lost"), *gpus[1:]])
    return (gpus[0].uuid,)


TROUBLES: tuple[tuple[str, Sick, types_pb2.GpuVerdict.ValueType, str], ...] = (
    ("every call to the driver hangs, verdict unknown", driver_hangs, UNKNOWN, "driver"),
    ("calls about one GPU hang, verdict unknown", one_hangs, UNKNOWN, "hang"),
    ("a GPU falls off the bus, verdict lost", one_is_lost, LOST, "lost"),
)


def until_verdict(
    cluster: Cluster, node: str, sick: Sick, verdict: types_pb2.GpuVerdict.ValueType
) -> float:
    """Seconds until all GPUs that are ill have this verdict."""
    gpus = h100(SICK_GPUS, node=node)
    started(cluster, node, gpus)
    began_s = time.perf_counter()
    ill = sick(cluster, node, gpus)
    until(cluster, node, lambda gpu: gpu.health.verdict == verdict, ill)
    span_s = time.perf_counter() - began_s
    show(cluster, node, gpus)  # what hangs would hold up the end of its agent
    cluster.stop_agent(node)
    return span_s


# --- the programs ---------------------------------------------------------------------------------


def started(cluster: Cluster, node: str, gpus: Sequence[FakeGpu], kernel_log: str = "") -> None:
    """An agent of which the coordinator knows that every GPU is well."""
    cluster.start_agent(node, gpus, kernel_log=kernel_log)
    cluster.wait_for_nodes(node)
    uuids = tuple(gpu.uuid for gpu in gpus)
    until(cluster, node, lambda gpu: gpu.health.verdict == HEALTHY, uuids)


def show(cluster: Cluster, node: str, gpus: Sequence[FakeGpu], *, driver_state: str = "ok") -> None:
    """From now on these are the GPUs."""
    path = cluster.node_directory(node).with_suffix(".gpus")
    describe(gpus, path, driver_state=driver_state)


def until(
    cluster: Cluster,
    node: str,
    holds: Callable[[types_pb2.Gpu], bool],
    uuids: Sequence[str],
) -> None:
    """Ask the coordinator for these GPUs until all are so. Raises `ClusterError` after a minute."""
    end_s = time.monotonic() + LATE_S_MAX
    while not all(holds(gpu) for gpu in work.node(cluster, node).gpus if gpu.uuid in uuids):
        cluster.check_alive()
        if time.monotonic() > end_s:
            cluster.wait_until(lambda: False, 0.0, f"{node}'s GPUs are told of")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
