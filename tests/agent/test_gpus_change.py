"""What a driver has at its start is not what it has for ever: GPUs and instances come and go, and
another driver takes its place, while the sampler runs.
"""

import os
import signal
from dataclasses import replace

from structlog.testing import capture_logs

from agent.core.values import GpuCondition
from agent.telemetry.remote import (
    GONE_AGAIN_MS,
    NO_DRIVER_AGAIN_MS,
    UNANSWERED_AGAIN_MS,
    RemoteGpus,
)
from agent.telemetry.schedule import INVENTORY, PERIODS_MS
from tests.agent.sampler_worlds import Box, all_read, until
from tests.fakenvml.build import describe, h100, mig

INVENTORY_MS = PERIODS_MS["normal"][INVENTORY]


def test_another_driver_is_opened_by_another_sampler(box: Box, opened: RemoteGpus) -> None:
    """A library stays as it was loaded; nobody has to restart the agent for a new one."""
    until(opened, all_read)
    pid = opened.pid()
    box.describe(*(replace(gpu, failing=(("utilization", 18),)) for gpu in h100(3)))
    with capture_logs() as logs:
        opened.samples()
    assert [line["event"] for line in logs] == ["sampler.ended", "sampler.replaced"]
    assert "the driver that it had opened is no more" in logs[0]["reason"]
    assert logs[0]["gpu"] == "", "no GPU is to blame"
    assert opened.pid() != pid
    describe(h100(3), box.path, driver_version="575.1")
    box.now_ms += INVENTORY_MS
    until(opened, all_read)
    assert opened.driver_version == "575.1"


def test_a_driver_that_is_not_there_for_a_while_is_opened_again(
    box: Box, opened: RemoteGpus
) -> None:
    until(opened, all_read)
    describe(h100(3), box.path, driver_version="")
    os.kill(opened.pid(), signal.SIGKILL)
    absent = until(opened, lambda samples: "Driver Not Loaded" in samples[0].error)
    assert all(sample.condition is None for sample in absent)
    opened.set_rate("slow")
    box.describe(*h100(3))
    box.now_ms += NO_DRIVER_AGAIN_MS
    assert all_read(opened.samples())


def test_a_library_that_does_not_fit_may_be_another_one_later(box: Box) -> None:
    """After an upgrade that is not over yet. Asking twice at the start is no time."""
    box.describe(*h100(2), driver_state="mismatch")
    gpus = box.gpus()
    with capture_logs() as logs:
        gpus.open()
        gpus.refresh()
        assert logs == []
        box.now_ms += NO_DRIVER_AGAIN_MS
        gpus.samples()
    assert [line["event"] for line in logs] == ["sampler.ended", "sampler.replaced"]
    assert "the driver was upgraded: reboot" in gpus.absence
    box.describe(*h100(2))
    box.now_ms += NO_DRIVER_AGAIN_MS
    assert len(gpus.samples()) == 2
    gpus.close()


def test_a_gpu_that_comes_later_is_found_and_one_that_went_is_not_forgotten(
    box: Box, opened: RemoteGpus
) -> None:
    """The driver counts more of them, then fewer; another card is on the bus of one that went."""
    more = h100(4)
    box.describe(*more)
    box.now_ms += INVENTORY_MS
    assert len(opened.samples()) == 4
    other = replace(h100(1, node="other")[0], pci_bus=1)
    box.describe(*more[1:3], other)
    box.now_ms += INVENTORY_MS
    samples = {sample.uuid: sample.error for sample in opened.samples()}
    assert list(samples) == [*(gpu.uuid for gpu in more[1:]), other.uuid], "the first was replaced"
    assert [bool(error) for error in samples.values()] == [False, False, True, False]


def test_who_hangs_without_a_name_costs_the_others_no_more_than_a_start(box: Box) -> None:
    """To ask again which GPUs there are would end each sampler in its first minute."""
    first, second, third = h100(3)
    box.describe(first, replace(second, state="hangs"), third)
    gpus = box.gpus()
    with capture_logs() as logs:
        gpus.open()
        until(gpus, all_read)
        assert [facts.uuid for facts in gpus.facts()] == [first.uuid]
        pid = gpus.pid()
        logs.clear()
        for _ in range(5):
            box.now_ms += INVENTORY_MS
            assert all_read(gpus.samples())
    assert logs == []
    assert gpus.pid() == pid
    box.describe(first, second, third)
    box.now_ms += UNANSWERED_AGAIN_MS
    assert len(gpus.samples()) == 3
    box.describe(*h100(4))
    box.now_ms += INVENTORY_MS
    assert len(gpus.samples()) == 4, "it has answered"
    gpus.close()


def test_how_much_memory_a_gpu_has_may_be_said_late(box: Box) -> None:
    (gpu,) = h100(1)
    box.describe(replace(gpu, failing=(("memory", 999),)))
    gpus = box.gpus()
    gpus.open()
    assert [facts.memory_bytes for facts in gpus.facts()] == [0]
    box.describe(gpu)
    for _ in range(2):
        box.now_ms += INVENTORY_MS
        gpus.samples()
        assert [facts.memory_bytes for facts in gpus.facts()] == [gpu.memory_bytes]
        box.describe(replace(gpu, failing=(("memory", 999),)))
    gpus.close()


def test_instances_come_and_go_while_the_agent_runs(box: Box) -> None:
    """One that was destroyed is nobody's fault, and has not fallen off the bus."""
    whole, *instances = mig(h100(1)[0], 3)
    box.describe(whole, *instances[:2])
    gpus = box.gpus()
    gpus.open()
    assert all_read(gpus.samples())
    box.describe(whole, *instances)
    box.now_ms += INVENTORY_MS
    assert [sample.uuid for sample in gpus.samples()] == [one.uuid for one in instances]

    pid = gpus.pid()
    os.kill(pid, signal.SIGKILL)
    until(gpus, lambda samples: gpus.pid() != pid and all_read(samples))
    box.describe(whole, *instances[1:])  # as one sees it that has not looked for them itself
    gone, *others = gpus.samples()
    assert "is no instance of its GPU any more" in gone.error
    assert gone.condition is None
    assert all_read(tuple(others))
    box.now_ms += GONE_AGAIN_MS
    assert [sample.uuid for sample in gpus.samples()] == [one.uuid for one in instances[1:]]
    assert [facts.uuid for facts in gpus.facts()] == [one.uuid for one in instances[1:]]

    box.describe(replace(whole, mig=False))
    box.now_ms += INVENTORY_MS
    assert [sample.uuid for sample in gpus.samples()] == [whole.uuid]
    box.describe(whole, *instances)
    box.now_ms += INVENTORY_MS
    assert [sample.uuid for sample in gpus.samples()] == [one.uuid for one in instances]

    box.describe(replace(whole, failing=(("mig_mode", 999),)), *instances)
    box.now_ms += INVENTORY_MS
    assert [sample.uuid for sample in gpus.samples()] == [one.uuid for one in instances]
    assert "the GPU at index 0 cannot be named" in gpus.absence
    box.describe(*(replace(gpu, state="lost") for gpu in (whole, *instances)))
    assert [sample.condition for sample in gpus.samples()] == [GpuCondition("lost")] * 3
    box.now_ms += INVENTORY_MS
    assert len(gpus.samples()) == 3, "their GPU does not say that they are no more"
    gpus.close()
