"""Metrics of what is read of GPUs every ten seconds and once a minute; see `metrics.py`.

Problem: these figures are absent more often than not (a GeForce has no ECC, an A100 no GPM), and an
absent one must not become a zero on a dashboard. So each is a function of a reading that may answer
`None`, and a table of them is all there is.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client.metrics_core import Metric

from agent.core.values import GpuInventory, GpuSample, GpuUsage
from agent.exposition import Described, Kind

_GPU: Final = ("uuid", "name")
_NO_USAGE: Final = GpuUsage("")
_NO_INVENTORY: Final = GpuInventory("")

_Figure = Callable[[GpuUsage, GpuInventory], float | None]


def _of_gpu(name: str, text: str, kind: Kind = "gauge", *labels: str) -> Described:
    return Described(name, kind, text, (*_GPU, *labels))


# What is described, and by the values of its own labels, how it is answered.
_TABLE: Final[tuple[tuple[Described, dict[tuple[str, ...], _Figure]], ...]] = (
    (
        _of_gpu("baton_gpu_processes", "Processes that compute on the GPU."),
        {(): lambda usage, _: None if usage.processes is None else len(usage.processes)},
    ),
    (
        _of_gpu(
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
        _of_gpu("baton_gpu_memory_temperature_celsius", "Temperature of the memory."),
        {(): lambda usage, _: usage.memory_temperature_celsius},
    ),
    (
        _of_gpu("baton_gpu_pcie_replays_total", "Transfers that PCIe had to repeat.", "counter"),
        {(): lambda usage, _: usage.pcie_replays},
    ),
    (
        _of_gpu(
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
        _of_gpu(
            "baton_gpu_nvlinks", "NVLinks that there are; state: up or down.", "gauge", "state"
        ),
        {
            ("up",): lambda _, inventory: inventory.nvlinks_up,
            ("down",): lambda _, inventory: inventory.nvlinks_down,
        },
    ),
    (
        _of_gpu("baton_gpu_pcie_lanes", "Lanes of PCIe in use."),
        {(): lambda _, inventory: inventory.pcie_width},
    ),
    (
        _of_gpu("baton_gpu_sm_activity_ratio", "Share of busy multiprocessors (GPM), 0 to 1."),
        {(): lambda _, inventory: inventory.sm_activity_ratio},
    ),
    (
        _of_gpu(
            "baton_gpu_tensor_activity_ratio", "Share of time with tensor operations (GPM), 0 to 1."
        ),
        {(): lambda _, inventory: inventory.tensor_activity_ratio},
    ),
)
DETAIL_METRICS: Final = tuple(described for described, _ in _TABLE)


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
