"""Metrics of how GPUs are, and of what is read every ten seconds and once a minute; see
`metrics.py`.

Problem: these figures are absent more often than not (a GeForce has no ECC, an A100 no GPM), and an
absent one must not become a zero on a dashboard. So each is a function of a reading that may answer
`None`, and a table of them is all there is.

A verdict that is unknown is absent too, since neither 1 nor 0 would be true. Errors are counted as
long as they are not over: a gauge that repeats the last one for ever calls a mended GPU broken
(NVIDIA/dcgm-exporter #500), so the DCGM name for the last XID is 0 again then.

DCGM's names have dcgm-exporter's units: `PROF` fields are ratios, the others whole numbers.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client.metrics_core import Metric

from agent.core.health import GpuVerdict, Verdict
from agent.core.values import GpuInventory, GpuSample, GpuUsage
from agent.exposition import Described, Kind

_GPU: Final = ("uuid", "name")
_NO_USAGE: Final = GpuUsage("")
_NO_INVENTORY: Final = GpuInventory("")

_Figure = Callable[[GpuUsage, GpuInventory], float | None]


def of_gpu(name: str, text: str, kind: Kind = "gauge", *labels: str) -> Described:
    return Described(name, kind, text, (*_GPU, *labels))


# What is described, and by the values of its own labels, how it is answered.
_TABLE: Final[tuple[tuple[Described, dict[tuple[str, ...], _Figure]], ...]] = (
    (
        of_gpu("baton_gpu_processes", "Processes that compute on the GPU."),
        {(): lambda usage, _: None if usage.processes is None else len(usage.processes)},
    ),
    (
        of_gpu(
            "baton_gpu_ecc_errors_total",
            "Memory errors since the driver was loaded, by kind: corrected or uncorrected.",
            "counter",
            "kind",
        ),
        {
            ("corrected",): lambda usage, _: usage.ecc_volatile_corrected,
            ("uncorrected",): lambda usage, _: usage.ecc_volatile_uncorrected,
        },
    ),
    (
        of_gpu("baton_gpu_memory_temperature_celsius", "Temperature of the memory."),
        {(): lambda usage, _: usage.memory_temperature_celsius},
    ),
    (
        of_gpu("baton_gpu_pcie_replays_total", "Transfers that PCIe had to repeat.", "counter"),
        {(): lambda usage, _: usage.pcie_replays},
    ),
    (
        of_gpu(
            "baton_gpu_remapped_rows",
            "Rows of memory that were replaced for good, by kind of error.",
            "gauge",
            "kind",
        ),
        {
            ("corrected",): lambda _, inventory: inventory.remapped_rows_corrected,
            ("uncorrected",): lambda _, inventory: inventory.remapped_rows_uncorrected,
        },
    ),
    (
        of_gpu("baton_gpu_nvlinks", "NVLinks that there are; state: up or down.", "gauge", "state"),
        {
            ("up",): lambda _, inventory: inventory.nvlinks_up,
            ("down",): lambda _, inventory: inventory.nvlinks_down,
        },
    ),
    (
        of_gpu("baton_gpu_pcie_lanes", "Lanes of PCIe in use."),
        {(): lambda _, inventory: inventory.pcie_width},
    ),
    (
        of_gpu("baton_gpu_pcie_lanes_max", "Lanes of PCIe that the GPU and its slot have."),
        {(): lambda _, inventory: inventory.pcie_width_max},
    ),
    (
        of_gpu(
            "baton_gpu_pcie_throughput_bytes",
            "Over PCIe in a second, by direction: sent or received by the GPU. Off by default.",
            "gauge",
            "direction",
        ),
        {
            ("sent",): lambda _, inventory: inventory.pcie_sent_bytes_per_second,
            ("received",): lambda _, inventory: inventory.pcie_received_bytes_per_second,
        },
    ),
    (
        of_gpu("baton_gpu_sm_activity_ratio", "Share of busy multiprocessors (GPM), 0 to 1."),
        {(): lambda _, inventory: inventory.sm_activity_ratio},
    ),
    (
        of_gpu(
            "baton_gpu_tensor_activity_ratio", "Share of time with tensor operations (GPM), 0 to 1."
        ),
        {(): lambda _, inventory: inventory.tensor_activity_ratio},
    ),
)
HEALTHY: Final = of_gpu(
    "baton_gpu_healthy", "Whether the verdict on the GPU is healthy (1) or not (0)."
)
XIDS: Final = of_gpu(
    "baton_gpu_xid_errors",
    "Errors of the driver (XIDs) that are not over, by code.",
    "gauge",
    "xid",
)
DETAIL_METRICS: Final = (HEALTHY, XIDS, *(described for described, _ in _TABLE))

_DCGM_LABELS: Final = ("gpu", "UUID", "modelName", "Hostname")


def dcgm(name: str, text: str, kind: Kind = "gauge") -> Described:
    return Described(f"DCGM_FI_{name}", kind, text, _DCGM_LABELS)


# Of kind unknown are counters there; a counter's name has to end in _total.
_DCGM_TABLE: Final[tuple[tuple[Described, _Figure], ...]] = (
    (
        dcgm("DEV_MEMORY_TEMP", "Memory temperature (in C)."),
        lambda usage, _: usage.memory_temperature_celsius,
    ),
    (
        dcgm("DEV_PCIE_REPLAY_COUNTER", "Total number of PCIe retries.", "unknown"),
        lambda usage, _: usage.pcie_replays,
    ),
    (
        dcgm("DEV_ECC_SBE_VOL_TOTAL", "Single-bit volatile ECC errors.", "unknown"),
        lambda usage, _: usage.ecc_volatile_corrected,
    ),
    (
        dcgm("DEV_ECC_DBE_VOL_TOTAL", "Double-bit volatile ECC errors.", "unknown"),
        lambda usage, _: usage.ecc_volatile_uncorrected,
    ),
    (
        dcgm("DEV_ECC_SBE_AGG_TOTAL", "Single-bit persistent ECC errors.", "unknown"),
        lambda usage, _: usage.ecc_aggregate_corrected,
    ),
    (
        dcgm("DEV_ECC_DBE_AGG_TOTAL", "Double-bit persistent ECC errors.", "unknown"),
        lambda usage, _: usage.ecc_aggregate_uncorrected,
    ),
    (
        dcgm(
            "DEV_UNCORRECTABLE_REMAPPED_ROWS", "Rows remapped for uncorrectable errors.", "unknown"
        ),
        lambda _, inventory: inventory.remapped_rows_uncorrected,
    ),
    (
        dcgm("DEV_CORRECTABLE_REMAPPED_ROWS", "Rows remapped for correctable errors.", "unknown"),
        lambda _, inventory: inventory.remapped_rows_corrected,
    ),
    (
        dcgm("DEV_ROW_REMAP_FAILURE", "Whether remapping of rows has failed."),
        lambda _, inventory: inventory.remapped_rows_failed,
    ),
    (
        dcgm("PROF_SM_ACTIVE", "Ratio of cycles in which an SM has a warp assigned."),
        lambda _, inventory: inventory.sm_activity_ratio,
    ),
    (
        dcgm("PROF_PIPE_TENSOR_ACTIVE", "Ratio of cycles in which the tensor pipe is active."),
        lambda _, inventory: inventory.tensor_activity_ratio,
    ),
)
_DCGM_XID: Final = dcgm("DEV_XID_ERRORS", "Value of the last XID error that is not over, or 0.")
DCGM_DETAIL_METRICS: Final = (_DCGM_XID, *(described for described, _ in _DCGM_TABLE))


def health_figures(
    verdicts: Iterable[GpuVerdict], named: Callable[[str], tuple[str, str]]
) -> Iterator[Metric]:
    """Of GPUs that were judged."""
    judged = [(named(one.uuid), one) for one in verdicts]
    yield from HEALTHY.of(
        (gpu, None if one.verdict is Verdict.UNKNOWN else one.verdict is Verdict.HEALTHY)
        for gpu, one in judged
    )
    yield from XIDS.of(
        ((*gpu, str(record.code)), record.count) for gpu, one in judged for record in one.xids
    )


def dcgm_detail_figures(
    seen: Iterable[tuple[tuple[str, ...], GpuSample]], verdicts: Iterable[GpuVerdict]
) -> Iterator[Metric]:
    """By DCGM's names, of GPUs that answered, with their labels."""
    known = list(seen)
    last = {one.uuid: _last_xid(one) for one in verdicts}
    yield from _DCGM_XID.of((labels, last.get(gpu.uuid)) for labels, gpu in known)
    for described, answer in _DCGM_TABLE:
        yield from described.of(
            (labels, answer(gpu.usage or _NO_USAGE, gpu.inventory or _NO_INVENTORY))
            for labels, gpu in known
        )


def _last_xid(one: GpuVerdict) -> int:
    records = sorted(one.xids, key=lambda record: record.last_unix_ms)
    return records[-1].code if records else 0


def detail_figures(
    readings: Iterable[GpuSample], named: Callable[[str], tuple[str, str]]
) -> Iterator[Metric]:
    """Of GPUs that answered. `named` gives the labels of a GPU."""
    known = [
        (named(gpu.uuid), gpu.usage or _NO_USAGE, gpu.inventory or _NO_INVENTORY)
        for gpu in readings
    ]
    for described, answers in _TABLE:
        yield from described.of(
            ((*gpu, *labels), answer(usage, inventory))
            for gpu, usage, inventory in known
            for labels, answer in answers.items()
        )
