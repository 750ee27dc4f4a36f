"""Views in which everything has a value, and no two values are the same where they could be mixed
up."""

from dataclasses import replace

import agent.core.census
import agent.counts
import agent.histogram
import coordinator.counts
import coordinator.histogram
from agent.core.attempt import Phase
from agent.core.health import GpuVerdict, Verdict, XidRecord
from agent.core.values import (
    GpuFacts,
    GpuInventory,
    GpuProcess,
    GpuSample,
    GpuUsage,
    HostFacts,
    HostSample,
    Reading,
    Sample,
)
from agent.histogram import SECONDS_BOUNDS
from coordinator.core.census import census
from coordinator.core.model import Snapshot
from coordinator.core.state import Options, State

GIB = 1 << 30
USAGE = GpuUsage(
    "GPU-1",
    processes=(GpuProcess(17, GIB),),
    ecc_volatile_corrected=31,
    ecc_volatile_uncorrected=32,
    memory_temperature_celsius=33,
    ecc_aggregate_corrected=37,
    ecc_aggregate_uncorrected=38,
    pcie_replays=34,
)
INVENTORY = GpuInventory(
    "GPU-1",
    remapped_rows_corrected=35,
    remapped_rows_uncorrected=36,
    remapped_rows_failed=False,
    pcie_width=8,
    pcie_width_max=16,
    nvlinks_up=16,
    nvlinks_down=2,
    sm_activity_ratio=0.75,
    tensor_activity_ratio=0.25,
    pcie_sent_bytes_per_second=39_000,
    pcie_received_bytes_per_second=40_000,
)
FULL = GpuSample(
    "GPU-1", 0.87, 3 * GIB, 71, 512_345, 9_876_543, 1_980, 2_619, usage=USAGE, inventory=INVENTORY
)
SILENT = GpuSample("GPU-2")
LOST = GpuSample("GPU-3", error="GPU-3 has fallen off the bus; reboot the node")
READING = Reading(
    "normal",
    (("nvmlDeviceGetPowerUsage", "unknown", 21),),
    (("sample", 22), ("usage", 23), ("inventory", 24)),
    (("sample", 25), ("usage", 26)),
)
VERDICTS = (
    GpuVerdict(
        "GPU-1",
        Verdict.NEEDS_RESET,
        xids=(XidRecord(95, 3, 1_000, 3_000), XidRecord(63, 1, 2_000, 2_000)),
    ),
    GpuVerdict("GPU-3", Verdict.UNKNOWN),
)
FACTS = (
    GpuFacts("GPU-1", 'NVIDIA "H100"', 80 * GIB),
    GpuFacts("GPU-2", "NVIDIA A100", 0),
    GpuFacts("GPU-3", "NVIDIA A100", 40 * GIB),
)


def agent_view(*gpus: GpuSample, age_ms: int = 1_500) -> agent.counts.View:
    """An agent that has read these GPUs so long ago."""
    sample = Sample(HostSample(0.5, GIB, GIB, 0.1), gpus, READING)
    counts = agent.counts.Counts(rounds=11, events=12, samples_late=0)
    counts.sampled(sample, 250, 1_000)
    phases = tuple((phase, index) for index, phase in enumerate(Phase))
    counted = agent.core.census.Census(
        HostFacts("box", "", 1, GIB, "550", "0.1.0"),
        FACTS,
        sample,
        age_ms,
        phases,
        4,
        True,
        VERDICTS,
    )
    return agent.counts.View(counted, counts, 5, 6)


def unread_agent_view() -> agent.counts.View:
    """An agent that has not read anything yet."""
    view = agent_view()
    return replace(
        view,
        counts=agent.counts.Counts(),
        census=replace(
            view.census, host=None, gpus=(), sample=None, sample_age_ms=None, verdicts=()
        ),
    )


def coordinator_view(snapshot: Snapshot, unix_ms: int) -> coordinator.counts.View:
    """A coordinator that has loaded this and done nothing yet."""
    state = State(Options())
    state.load(snapshot, 0)
    return coordinator.counts.View(census(state, unix_ms), coordinator.counts.Counts(), 3, 2, True)


def agent_lag() -> agent.histogram.Histogram:
    """Two timers that came late, one by more than any bound."""
    made = agent.histogram.Histogram(SECONDS_BOUNDS)
    made.observe(0.02)
    made.observe(60.0)
    return made


def coordinator_lag() -> coordinator.histogram.Histogram:
    """No timer that came late."""
    return coordinator.histogram.Histogram(SECONDS_BOUNDS)
