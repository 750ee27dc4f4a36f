"""What an agent's view becomes: base units, and no sample for what is not known."""

import pytest

from agent.core.attempt import Phase
from agent.counts import View
from agent.exposition import exposed
from agent.metrics import DCGM_METRICS, SAMPLE_AGE_MS_MAX, figures
from tests.metrics.reading import Series, named, series
from tests.metrics.views import (
    FULL,
    GIB,
    LOST,
    SILENT,
    agent_lag,
    agent_view,
    unread_agent_view,
)

NAME = 'NVIDIA "H100"'


def said(view: View, *, dcgm_names: bool = False) -> Series:
    return series(exposed(lambda: figures(view, agent_lag(), dcgm_names=dcgm_names)).decode())


def test_readings_are_in_base_units() -> None:
    found = said(agent_view(FULL))
    whose = (NAME, "GPU-1")
    assert named(found, "baton_gpu_up") == {whose: 1}
    assert named(found, "baton_gpu_utilization_ratio") == {whose: 0.87}
    assert named(found, "baton_gpu_memory_used_bytes") == {whose: 3 * GIB}
    assert named(found, "baton_gpu_memory_total_bytes")[whose] == 80 * GIB
    assert named(found, "baton_gpu_temperature_celsius") == {whose: 71}
    assert named(found, "baton_gpu_power_watts") == {whose: 512.345}
    assert named(found, "baton_gpu_energy_joules_total") == {whose: 9_876.543}
    assert named(found, "baton_gpu_clock_hertz") == {
        ("sm", *whose): 1_980_000_000,
        ("memory", *whose): 2_619_000_000,
    }


def test_what_the_driver_does_not_say_is_left_out() -> None:
    found = said(agent_view(SILENT, LOST))
    assert named(found, "baton_gpu_up") == {
        ("NVIDIA A100", "GPU-2"): 1,
        ("NVIDIA A100", "GPU-3"): 0,
    }
    assert ("NVIDIA A100", "GPU-2") not in named(found, "baton_gpu_memory_total_bytes")
    for name in "utilization_ratio memory_used_bytes power_watts clock_hertz".split():
        assert named(found, f"baton_gpu_{name}") == {}
    assert named(found, "baton_gpu_reading_failures_total") == {
        ("NVIDIA A100", "GPU-2"): 0,
        ("NVIDIA A100", "GPU-3"): 1,
    }


def test_a_known_zero_is_a_sample() -> None:
    idle = type(FULL)("GPU-1", utilization_ratio=0.0, power_mw=0)
    found = said(agent_view(idle))
    assert named(found, "baton_gpu_utilization_ratio") == {(NAME, "GPU-1"): 0}
    assert named(found, "baton_gpu_power_watts") == {(NAME, "GPU-1"): 0}


def test_before_the_first_reading_nothing_is_made_up() -> None:
    found = said(unread_agent_view(), dcgm_names=True)
    assert not [name for name, _ in found if name.startswith(("baton_gpu_", "DCGM"))]
    assert named(found, "baton_agent_sample_age_seconds") == {}
    assert named(found, "baton_agent_sample_duration_seconds") == {}
    assert named(found, "baton_agent_samples_total") == {(): 0}


@pytest.mark.parametrize(("age_ms", "shown"), [(SAMPLE_AGE_MS_MAX, 1), (SAMPLE_AGE_MS_MAX + 1, 0)])
def test_a_reading_that_is_history_is_not_shown_as_if_it_were_now(age_ms: int, shown: int) -> None:
    found = said(agent_view(FULL, age_ms=age_ms), dcgm_names=True)
    assert len(named(found, "baton_gpu_utilization_ratio")) == shown
    assert len(named(found, "DCGM_FI_DEV_GPU_UTIL")) == shown
    assert named(found, "baton_agent_sample_age_seconds") == {(): age_ms / 1000}


def test_dcgm_names_have_dcgms_units_and_labels() -> None:
    found = said(agent_view(FULL, SILENT, LOST), dcgm_names=True)
    shown = {name: named(found, name) for name in (metric.name for metric in DCGM_METRICS)}
    whose = ("box", "GPU-1", "0", NAME)  # Hostname, UUID, gpu, modelName
    assert {name: values.get(whose) for name, values in shown.items()} == {
        "DCGM_FI_DEV_GPU_UTIL": 87,
        "DCGM_FI_DEV_FB_USED": 3 * 1024,
        "DCGM_FI_DEV_FB_FREE": 77 * 1024,
        "DCGM_FI_DEV_GPU_TEMP": 71,
        "DCGM_FI_DEV_POWER_USAGE": 512.345,
        "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": 9_876_543,
        "DCGM_FI_DEV_SM_CLOCK": 1_980,
        "DCGM_FI_DEV_MEM_CLOCK": 2_619,
    }
    assert all(len(values) == 1 for values in shown.values())
    labels = next(labels for name, labels in found if name == "DCGM_FI_DEV_GPU_UTIL")
    assert [name for name, _ in labels] == ["Hostname", "UUID", "gpu", "modelName"]


def test_dcgm_names_are_there_only_when_asked_for() -> None:
    assert not [name for name, _ in said(agent_view(FULL)) if name.startswith("DCGM")]


def test_the_agents_own_health() -> None:
    found = said(agent_view(FULL))
    assert named(found, "baton_agent_sample_age_seconds") == {(): 1.5}
    assert named(found, "baton_agent_sample_duration_seconds") == {(): 0.25}
    assert named(found, "baton_agent_spool_length") == {(): 4}
    assert named(found, "baton_agent_inbox_length") == {(): 5}
    assert named(found, "baton_agent_outbox_length") == {(): 6}
    assert named(found, "baton_agent_link_up") == {(): 1}
    assert named(found, "baton_agent_attempts") == {
        (phase.value,): index for index, phase in enumerate(Phase)
    }
    assert named(found, "process_resident_memory_bytes")[()] > 0
    assert named(found, "process_cpu_seconds_total")[()] > 0


def test_what_is_read_less_often_is_there_where_it_is_known() -> None:
    found = said(agent_view(FULL, SILENT))
    links = named(found, "baton_gpu_nvlinks")
    assert list(links.values()) == [16, 2], "a GPU that says nothing of links has none that is down"
    assert list(named(found, "baton_gpu_ecc_errors_total").values()) == [31, 32]
    assert list(named(found, "baton_gpu_processes").values()) == [1]
    assert list(named(found, "baton_gpu_tensor_activity_ratio").values()) == [0.25]


def test_how_the_driver_answers() -> None:
    found = said(agent_view(FULL))
    errors = named(found, "baton_agent_nvml_errors_total")
    assert errors == {("nvmlDeviceGetPowerUsage", "unknown"): 21}
    misses = named(found, "baton_agent_reading_deadline_misses_total")
    assert misses == {("sample",): 22, ("usage",): 23, ("inventory",): 24}
    durations = named(found, "baton_agent_reading_duration_seconds")
    assert durations == {("sample",): 0.025, ("usage",): 0.026}


def test_lag_is_cumulative_by_bucket() -> None:
    found = said(agent_view(FULL))
    buckets = named(found, "baton_agent_loop_lag_seconds_bucket")
    assert [buckets[end,] for end in "0.005 0.02 0.1 8.0 +Inf".split()] == [0, 1, 1, 1, 2]
    assert named(found, "baton_agent_loop_lag_seconds_count") == {(): 2}
    assert named(found, "baton_agent_loop_lag_seconds_sum") == {(): 60.02}


def test_a_reading_over_its_interval_is_late() -> None:
    view = agent_view(FULL)
    assert view.census.sample is not None
    for duration_ms in (999, 1_000, 1_001):
        view.counts.sampled(view.census.sample, duration_ms, 1_000)
    assert named(said(view), "baton_agent_samples_late_total") == {(): 1}
    assert named(said(view), "baton_agent_samples_total") == {(): 4}
