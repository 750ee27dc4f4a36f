"""The agent's metrics: what each is called and means, and its value in a view of the shell.

Problem: dashboards and alerts outlive the code, so names, units and meanings must be decided once
and be right: base units in the name (watts, not milliwatts), `_total` for what only grows, and no
sample for what the driver does not say, since zero watts and no answer are different facts. They
stand here as data, `docs/metrics.md` is checked against them, and a test checks the names.

Whoever has dashboards for NVIDIA's DCGM exporter gets its names, labels and units as well, for what
Baton reads (github.com/NVIDIA/dcgm-exporter, `etc/default-counters.csv`).
"""

from collections.abc import Iterator
from itertools import chain
from typing import Final

from prometheus_client.metrics_core import Metric

from agent.core.values import GpuFacts, GpuSample
from agent.counts import Counts, View
from agent.exposition import Described
from agent.gpu_metrics import (
    DCGM_DETAIL_METRICS,
    DETAIL_METRICS,
    dcgm,
    dcgm_detail_figures,
    detail_figures,
    health_figures,
    of_gpu,
)
from agent.histogram import Histogram

# A reading that old is history: Prometheus itself shows no sample of a target that has been silent
# for five minutes. A driver that hangs leaves its last reading behind.
SAMPLE_AGE_MS_MAX: Final = 300_000
MEBIBYTE: Final = 1 << 20

GPU_UP = of_gpu("baton_gpu_up", "Whether the GPU answered when it was last read (1) or not (0).")
GPU_FAILURES = of_gpu(
    "baton_gpu_reading_failures_total", "Readings that the GPU answered nothing of.", "counter"
)
GPU_UTILIZATION = of_gpu(
    "baton_gpu_utilization_ratio", "Share of the time in which some kernel ran, 0 to 1."
)
GPU_MEMORY_USED = of_gpu("baton_gpu_memory_used_bytes", "Memory that is allocated.")
GPU_MEMORY_TOTAL = of_gpu("baton_gpu_memory_total_bytes", "Memory that there is.")
GPU_TEMPERATURE = of_gpu("baton_gpu_temperature_celsius", "Temperature of the chip.")
GPU_POWER = of_gpu("baton_gpu_power_watts", "Power that the board draws.")
GPU_ENERGY = of_gpu(
    "baton_gpu_energy_joules_total", "Energy since the driver was loaded.", "counter"
)
GPU_CLOCK = of_gpu("baton_gpu_clock_hertz", "Clock; its kind is sm or memory.", "gauge", "kind")

SAMPLE_AGE = Described("baton_agent_sample_age_seconds", "gauge", "Since GPUs and host were read.")
SAMPLE_DURATION = Described(
    "baton_agent_sample_duration_seconds", "gauge", "How long the last reading took."
)
SAMPLES = Described("baton_agent_samples_total", "counter", "Readings of GPUs and host.")
SAMPLES_LATE = Described(
    "baton_agent_samples_late_total",
    "counter",
    "Readings that took longer than sample_interval_ms, so that the next one came late.",
)
READING_DURATION = Described(
    "baton_agent_reading_duration_seconds",
    "gauge",
    "How long the driver took to answer the last time; by class: sample, usage or inventory.",
    ("class",),
)
READING_MISSES = Described(
    "baton_agent_reading_deadline_misses_total",
    "counter",
    "Times that the driver did not answer within the deadline, by class of readings.",
    ("class",),
)
NVML_ERRORS = Described(
    "baton_agent_nvml_errors_total",
    "counter",
    "Calls that the driver failed, by call and code; what it does not support is no failure.",
    ("call", "code"),
)
LOOP_LAG = Described(
    "baton_agent_loop_lag_seconds", "histogram", "How late the event loop came to a timer."
)
LOOP_ROUNDS = Described("baton_agent_loop_rounds_total", "counter", "Rounds of the shell's loop.")
EVENTS = Described("baton_agent_events_total", "counter", "Events that the core has handled.")
INBOX = Described("baton_agent_inbox_length", "gauge", "Events that wait to be handled.")
COMMIT = Described(
    "baton_agent_journal_commit_seconds", "histogram", "How long the journal took to be durable."
)
SPOOL = Described(
    "baton_agent_spool_length", "gauge", "Events that the coordinator has not acknowledged."
)
LINK_UP = Described(
    "baton_agent_link_up",
    "gauge",
    "Whether the coordinator has welcomed this agent (1) or not (0).",
)
SESSIONS = Described(
    "baton_agent_sessions_total", "counter", "Streams to the coordinator that were opened."
)
SENT = Described("baton_agent_messages_sent_total", "counter", "Messages to the coordinator.")
RECEIVED = Described("baton_agent_orders_received_total", "counter", "Orders of the coordinator.")
OUTBOX = Described("baton_agent_outbox_length", "gauge", "Messages that wait to be sent.")
ATTEMPTS = Described(
    "baton_agent_attempts",
    "gauge",
    "Attempts on this node; running ones have a trainer.",
    ("phase",),
)
STORED = Described(
    "baton_agent_checkpoints_stored_total", "counter", "Checkpoints made durable on this node."
)
STORED_BYTES = Described(
    "baton_agent_checkpoint_stored_bytes_total",
    "counter",
    "What they added to the chunk store; what was there already does not count.",
)
REPLICATED = Described(
    "baton_agent_checkpoints_replicated_total", "counter", "Checkpoints copied off this node."
)
PROPOSED = Described(
    "baton_agent_checkpoints_proposed_total",
    "counter",
    "Checkpoints proposed to the coordinator, each once.",
)
STORE_FAILURES = Described(
    "baton_agent_checkpoint_store_failures_total",
    "counter",
    "Checkpoints that could not be stored.",
)
REPLICATION_FAILURES = Described(
    "baton_agent_checkpoint_replication_failures_total",
    "counter",
    "Copies of checkpoints that failed; they are tried again.",
)

METRICS: Final = (
    GPU_UP, GPU_FAILURES, GPU_UTILIZATION, GPU_MEMORY_USED, GPU_MEMORY_TOTAL, GPU_TEMPERATURE,
    GPU_POWER, GPU_ENERGY, GPU_CLOCK, SAMPLE_AGE, SAMPLE_DURATION, SAMPLES, SAMPLES_LATE,
    READING_DURATION, READING_MISSES, NVML_ERRORS, LOOP_LAG,
    LOOP_ROUNDS, EVENTS, INBOX, COMMIT, SPOOL, LINK_UP, SESSIONS, SENT, RECEIVED, OUTBOX, ATTEMPTS,
    STORED, STORED_BYTES, REPLICATED, PROPOSED, STORE_FAILURES, REPLICATION_FAILURES,
    *DETAIL_METRICS,
)  # fmt: skip

DCGM_UTILIZATION = dcgm("DEV_GPU_UTIL", "GPU utilization (in %).")
DCGM_USED = dcgm("DEV_FB_USED", "Framebuffer memory used (in MiB).")
DCGM_FREE = dcgm(
    "DEV_FB_FREE", "Framebuffer memory free (in MiB): all that there is, less the used."
)
DCGM_TEMPERATURE = dcgm("DEV_GPU_TEMP", "GPU temperature (in C).")
DCGM_POWER = dcgm("DEV_POWER_USAGE", "Power draw (in W).")
# It only grows, but a counter's name has to end in _total, and this is not our name. rate() does
# not ask.
DCGM_ENERGY = dcgm("DEV_TOTAL_ENERGY_CONSUMPTION", "Energy since boot (in mJ).", "unknown")
DCGM_SM_CLOCK = dcgm("DEV_SM_CLOCK", "SM clock frequency (in MHz).")
DCGM_MEMORY_CLOCK = dcgm("DEV_MEM_CLOCK", "Memory clock frequency (in MHz).")

DCGM_METRICS: Final = (
    DCGM_UTILIZATION, DCGM_USED, DCGM_FREE, DCGM_TEMPERATURE, DCGM_POWER, DCGM_ENERGY,
    DCGM_SM_CLOCK, DCGM_MEMORY_CLOCK, *DCGM_DETAIL_METRICS,
)  # fmt: skip


def figures(view: View, lag: Histogram, *, dcgm_names: bool) -> Iterator[Metric]:
    """Everything that is known now."""
    counts = view.counts
    yield from _gpu_figures(view)
    if dcgm_names:
        yield from _dcgm_figures(view)
    yield from _sample_figures(view)
    yield from LOOP_LAG.spread(lag)
    yield from LOOP_ROUNDS.one(counts.rounds)
    yield from EVENTS.one(counts.events)
    yield from INBOX.one(view.inbox_length)
    yield from COMMIT.spread(counts.commit_s)
    yield from SPOOL.one(view.census.spool_length)
    yield from LINK_UP.one(view.census.welcomed)
    yield from SESSIONS.one(counts.sessions)
    yield from SENT.one(counts.messages_sent)
    yield from RECEIVED.one(counts.orders_received)
    yield from OUTBOX.one(view.outbox_length)
    yield from ATTEMPTS.of(((phase.value,), count) for phase, count in view.census.attempts)
    yield from _checkpoint_figures(counts)


def _sample_figures(view: View) -> Iterator[Metric]:
    counts = view.counts
    yield from SAMPLE_AGE.one(_seconds(view.census.sample_age_ms))
    yield from SAMPLE_DURATION.one(_seconds(counts.sample_duration_ms))
    yield from SAMPLES.one(counts.samples)
    yield from SAMPLES_LATE.one(counts.samples_late)
    if view.census.sample is not None:
        went = view.census.sample.reading
        durations_s = [(kind, duration_ms / 1000) for kind, duration_ms in went.durations_ms]
        yield from READING_DURATION.of(((kind,), value) for kind, value in durations_s)
        yield from READING_MISSES.of(((kind,), count) for kind, count in went.misses)
        yield from NVML_ERRORS.of(((call, code), count) for call, code, count in went.nvml_errors)


def _checkpoint_figures(counts: Counts) -> Iterator[Metric]:
    yield from STORED.one(counts.checkpoints_stored)
    yield from STORED_BYTES.one(counts.checkpoint_bytes_stored)
    yield from REPLICATED.one(counts.checkpoints_replicated)
    yield from PROPOSED.one(counts.checkpoints_proposed)
    yield from STORE_FAILURES.one(counts.store_failures)
    yield from REPLICATION_FAILURES.one(counts.replication_failures)


def _gpu_figures(view: View) -> Iterator[Metric]:
    facts = {gpu.uuid: gpu for gpu in view.census.gpus}
    readings = _readings(view)

    def named(uuid: str) -> tuple[str, str]:
        return uuid, facts[uuid].name if uuid in facts else ""

    def each(one: Described, values: dict[str, float | None]) -> Iterator[Metric]:
        return one.of((named(uuid), value) for uuid, value in values.items())

    said = {gpu.uuid: gpu for gpu in readings if not gpu.error}
    yield from each(GPU_UP, {gpu.uuid: not gpu.error for gpu in readings})
    yield from each(GPU_FAILURES, dict(view.counts.gpu_failures))
    yield from each(GPU_UTILIZATION, {uuid: gpu.utilization_ratio for uuid, gpu in said.items()})
    yield from each(GPU_MEMORY_USED, {uuid: gpu.memory_used_bytes for uuid, gpu in said.items()})
    yield from each(
        GPU_MEMORY_TOTAL, {uuid: gpu.memory_bytes or None for uuid, gpu in facts.items()}
    )
    yield from each(GPU_TEMPERATURE, {uuid: gpu.temperature_celsius for uuid, gpu in said.items()})
    yield from each(GPU_POWER, {uuid: _thousandth(gpu.power_mw) for uuid, gpu in said.items()})
    yield from each(GPU_ENERGY, {uuid: _thousandth(gpu.energy_mj) for uuid, gpu in said.items()})
    clocks = [(uuid, "sm", gpu.sm_clock_mhz) for uuid, gpu in said.items()]
    clocks += [(uuid, "memory", gpu.memory_clock_mhz) for uuid, gpu in said.items()]
    yield from GPU_CLOCK.of(
        ((*named(uuid), kind), None if mhz is None else mhz * 1_000_000)
        for uuid, kind, mhz in clocks
    )
    yield from health_figures(view.census.verdicts, named)
    yield from detail_figures(said.values(), named)


def _dcgm_figures(view: View) -> Iterator[Metric]:
    """`gpu` is the place among the GPUs that this agent sees, in the driver's order."""
    said = {gpu.uuid: gpu for gpu in _readings(view) if not gpu.error}
    host = view.census.host.hostname if view.census.host else ""
    seen: list[tuple[tuple[str, ...], GpuFacts, GpuSample]] = [
        ((str(index), gpu.uuid, gpu.name, host), gpu, said[gpu.uuid])
        for index, gpu in enumerate(view.census.gpus)
        if gpu.uuid in said
    ]
    yield from chain(
        DCGM_UTILIZATION.of((labels, _percent(now.utilization_ratio)) for labels, _, now in seen),
        DCGM_USED.of((labels, _mebibytes(now.memory_used_bytes)) for labels, _, now in seen),
        DCGM_FREE.of((labels, _mebibytes(_free_bytes(gpu, now))) for labels, gpu, now in seen),
        DCGM_TEMPERATURE.of((labels, now.temperature_celsius) for labels, _, now in seen),
        DCGM_POWER.of((labels, _thousandth(now.power_mw)) for labels, _, now in seen),
        DCGM_ENERGY.of((labels, now.energy_mj) for labels, _, now in seen),
        DCGM_SM_CLOCK.of((labels, now.sm_clock_mhz) for labels, _, now in seen),
        DCGM_MEMORY_CLOCK.of((labels, now.memory_clock_mhz) for labels, _, now in seen),
        dcgm_detail_figures(((labels, now) for labels, _, now in seen), view.census.verdicts),
    )


def _readings(view: View) -> tuple[GpuSample, ...]:
    age_ms = view.census.sample_age_ms
    if view.census.sample is None or age_ms is None or age_ms > SAMPLE_AGE_MS_MAX:
        return ()
    return view.census.sample.gpus


def _free_bytes(facts: GpuFacts, now: GpuSample) -> int | None:
    if not facts.memory_bytes or now.memory_used_bytes is None:
        return None
    return facts.memory_bytes - now.memory_used_bytes


def _seconds(duration_ms: int | None) -> float | None:
    return None if duration_ms is None else duration_ms / 1000


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1000


def _percent(ratio: float | None) -> float | None:
    return None if ratio is None else round(100 * ratio, 6)


def _mebibytes(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes // MEBIBYTE
