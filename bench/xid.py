"""How soon the coordinator knows that a GPU is ill: the driver's errors, a hanging call, a loss.

The agent, its sampler and the coordinator are the real ones; NVML is the stand-in, and the kernel's
log a pipe. Measured is the time from the stand-in's change, or from the line in the log, until the
coordinator answers a caller with it: what an operator's tool would see. Errors come one at a time,
each once the one before was seen, and each is of a code that its GPU did not have: repetitions of
one are a storm, whose count is told every five seconds. A blocked driver gets a new agent each
time, since a sampler is replaced only once in five minutes. There is no reference.
"""

import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench import report
from protos.baton.v1 import types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import FakeGpu, describe, h100

NODE = "n1"
GPUS = 8
CODES, CODES_QUICK = 15, 3  # on each GPU by each witness; an agent keeps 32 of a GPU
REPETITIONS, REPETITIONS_QUICK = 5, 1
ERROR_GOAL_MS = 1_000.0
ILL_GOAL_S = 10.0
# In no table, so that all are alike: somebody has to look at the GPU.
NVML_CODES, KERNEL_CODES = range(500, 500 + CODES), range(600, 600 + CODES)
POLL_S = 0.001  # a call takes about as long


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    codes = CODES_QUICK if asked.quick else CODES
    repetitions = REPETITIONS_QUICK if asked.quick else REPETITIONS
    report.say(f"xid: {codes * GPUS} errors by each witness")
    with fleet() as (cluster, kernel_log):
        by_nvml = nvml_errors_ms(cluster, NVML_CODES[:codes])
        by_kernel = kernel_errors_ms(cluster, kernel_log, KERNEL_CODES[:codes])
    report.say(f"xid: a blocked driver and a lost GPU, {repetitions} times each")
    hangs = [ill_s("hangs", types_pb2.GPU_VERDICT_UNKNOWN) for _ in range(repetitions)]
    losses = [ill_s("lost", types_pb2.GPU_VERDICT_LOST) for _ in range(repetitions)]
    rows = [
        *error_rows("error told by NVML, until the coordinator has it", by_nvml),
        *error_rows("error in the kernel's log, until the coordinator has it", by_kernel),
        ill_row("driver call hangs, until the GPU is unknown", hangs),
        ill_row("GPU gone from the bus without a word, until it is lost", losses),
    ]
    report.show("From a GPU's illness to the coordinator", rows, asked)
    return 0


@contextlib.contextmanager
def fleet() -> Iterator[tuple[Cluster, int]]:
    """A coordinator, a node whose GPUs are healthy, and the end of its kernel's log to write to."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        pipe = Path(scratch) / "kmsg"
        os.mkfifo(pipe)
        log = os.open(pipe, os.O_RDWR)  # both ends, so that opening waits for nobody
        try:
            with Cluster(Path(scratch) / "cluster") as cluster:
                cluster.start_coordinator()
                cluster.start_agent(NODE, h100(GPUS), kernel_log=str(pipe))
                cluster.wait_for_nodes(NODE)
                healthy = types_pb2.GPU_VERDICT_HEALTHY
                wait(lambda: all(verdict(cluster, gpu) == healthy for gpu in h100(GPUS)))
                yield cluster, log
        finally:
            os.close(log)


def nvml_errors_ms(cluster: Cluster, codes: Sequence[int]) -> list[float]:
    """Each code once on each GPU."""
    gpus = list(h100(GPUS))
    taken = []
    for number, (code, index) in enumerate(itertools.product(codes, range(GPUS)), start=1):
        gpus[index] = replace(gpus[index], xids=(*gpus[index].xids, (number, code)))
        began_s = time.monotonic()
        put(cluster, gpus)
        wait(lambda: has(cluster, gpus[index], code))  # noqa: B023 - called before they change
        taken.append((time.monotonic() - began_s) * 1e3)
    return taken


def kernel_errors_ms(cluster: Cluster, log: int, codes: Sequence[int]) -> list[float]:
    """The same by lines as the driver writes them."""
    gpus = h100(GPUS)
    taken = []
    for number, (code, index) in enumerate(itertools.product(codes, range(GPUS)), start=1):
        began_s = time.monotonic()
        text = f"NVRM: Xid (PCI:0000:{index + 1:02x}:00): {code}, pid=7, name=python"
        os.write(log, f"4,{number},{int(began_s * 1e6)},-;{text}\n".encode())
        wait(lambda: has(cluster, gpus[index], code))  # noqa: B023
        taken.append((time.monotonic() - began_s) * 1e3)
    return taken


def ill_s(state: str, expected: types_pb2.GpuVerdict.ValueType) -> float:
    """From the stand-in's change until the coordinator has the verdict."""
    with fleet() as (cluster, _):
        began_s = time.monotonic()
        sick, *well = h100(GPUS)
        put(cluster, [replace(sick, state=state), *well])
        wait(lambda: verdict(cluster, sick) == expected)
        return time.monotonic() - began_s


def put(cluster: Cluster, gpus: Sequence[FakeGpu]) -> None:
    describe(gpus, cluster.node_directory(NODE).with_suffix(".gpus"))


def wait(seen: Callable[[], bool]) -> None:
    """Raises TimeoutError after a minute: then there is nothing to measure."""
    end_s = time.monotonic() + work.DEADLINE_S
    while not seen():
        if time.monotonic() > end_s:
            raise TimeoutError(f"the coordinator did not hear of it within {work.DEADLINE_S:g} s")
        time.sleep(POLL_S)


def verdict(cluster: Cluster, gpu: FakeGpu) -> int:
    return health(cluster, gpu).verdict


def has(cluster: Cluster, gpu: FakeGpu, code: int) -> bool:
    """Whether the coordinator has heard of such an error."""
    return any(record.code == code for record in health(cluster, gpu).xids)


def health(cluster: Cluster, gpu: FakeGpu) -> types_pb2.GpuHealth:
    """Empty before the first word."""
    told = (it.health for it in work.node(cluster, NODE).gpus if it.uuid == gpu.uuid)
    return next(told, types_pb2.GpuHealth())


def error_rows(name: str, taken_ms: list[float]) -> list[report.Row]:
    median = report.row_of(f"{name}, p50", taken_ms, "ms")
    p99 = report.percentile(taken_ms, 0.99)
    return [median, report.Row(name=f"{name}, p99", value=p99, unit="ms", goal=ERROR_GOAL_MS)]


def ill_row(name: str, taken_s: list[float]) -> report.Row:
    return replace(report.row_of(name, taken_s, "s"), goal=ILL_GOAL_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
