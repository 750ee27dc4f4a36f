"""The production `GpuProbe`: the sampler process for the GPUs, psutil for the host.

Problem: a sick driver can block a call for ever, and neither a heartbeat nor a restart of the
agent may wait for it. So a reading takes a deadline at most (`remote.py`), and runs in a worker
thread, since that is still too long for a loop. The shell may ask for facts while a sample is under
way; one lock lets one caller in at a time.

A driver that is blocked when the agent starts says nothing of its GPUs, and a hello without them
would take them from the jobs that run there. So the GPUs that were seen last are kept in a file of
the state directory. They count until the next boot: no job outlives that, and cards may have been
changed.

There is no simulated branch: a box without GPUs is a box with zero GPUs. Where a test needs GPUs,
it brings a library.
"""

import os
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import structlog

from agent.core.gpu_messages import OWN_RATE
from agent.core.values import GpuFacts, GpuOccupancy, HostFacts, Sample
from agent.telemetry.host import Host, boot_id
from agent.telemetry.remote import SAMPLER, Deadlines, RemoteGpus, monotonic_ms

SEEN_NAME: Final = "gpus.json"

log = structlog.get_logger()


class Seen(msgspec.Struct, frozen=True):
    """The GPUs of this boot, as they were last seen."""

    boot_id: str
    driver_version: str = ""
    gpus: tuple[GpuFacts, ...] = ()


class NvmlProbe:
    """Reads this box. Use as a context manager, or `open` and `close`.

    `state_directory` is the agent's, for the free disk space. `allowed_uuids` limits the GPUs that
    are seen; `None` means all, and an allowed GPU that the driver does not know is sampled with an
    error.
    """

    def __init__(
        self,
        state_directory: Path,
        *,
        allowed_uuids: Collection[str] | None = None,
        deadlines: Deadlines | None = None,
        command: Sequence[str] = SAMPLER,
        now_ms: Callable[[], int] = monotonic_ms,
        event_descriptor: int | None = None,
        rate: str = "normal",
        pcie_throughput: bool = False,
    ) -> None:
        self._host = Host(state_directory)
        self._gpus = RemoteGpus(
            allowed_uuids,
            deadlines=deadlines,
            command=command,
            now_ms=now_ms,
            event_descriptor=event_descriptor,
            rate=rate,
            pcie_throughput=pcie_throughput,
        )
        self._seen_path = state_directory / SEEN_NAME
        self._seen = Seen("")
        self._own_rate, self._ordered_rate = rate, OWN_RATE
        self._lock = threading.Lock()

    def open(self) -> None:
        """Start the sampler and enumerate. A missing library or driver is not an error, nor is one
        that does not answer."""
        with self._lock:
            self._host.open()
            self._seen = self._recall()
            self._gpus.open(self._seen.gpus, self._seen.driver_version)
            self._remember()

    def close(self) -> None:
        """End the sampler. Closing twice is closing once."""
        with self._lock:
            self._gpus.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def absence(self) -> str:
        """Why there are fewer GPUs than there could be, as a sentence for the log; else empty."""
        return self._gpus.absence

    def host_facts(self) -> HostFacts:
        """Of the host; `driver_version` is empty where there is no NVML, no driver, or no answer
        yet."""
        with self._lock:
            gpus = self._gpus
            return self._host.facts(driver_version=gpus.driver_version, gpu_absence=gpus.absence)

    def gpu_facts(self) -> tuple[GpuFacts, ...]:
        """Every GPU seen since `open`. Enumerates again, to find a driver or GPU that came late."""
        with self._lock:
            self._gpus.refresh()
            self._remember()
            return self._gpus.facts()

    def sample(self) -> Sample:
        """Host and GPUs, read together. Blocks for a deadline of each class at most."""
        with self._lock:
            gpus = self._gpus.samples()
            self._remember()
            return Sample(
                host=self._host.sample(),
                gpus=gpus,
                reading=self._gpus.reading(),
                facts=self._gpus.facts(),
                driver_version=self._gpus.driver_version,
                gpu_absence=self._gpus.absence,
            )

    def set_rate(self, rate: str) -> None:
        """How often the driver is asked where nobody has ordered anything else: off, slow, normal
        or watch. Does not block."""
        self._own_rate = rate
        self.follow_rate(self._ordered_rate)

    def follow_rate(self, rate: str) -> None:
        """What is ordered, `OWN_RATE`: nothing. Does not block."""
        self._ordered_rate = rate
        self._gpus.set_rate(self._own_rate if rate == OWN_RATE else rate)

    def occupancy(self, gpu_uuids: Sequence[str]) -> tuple[GpuOccupancy, ...]:
        """Who uses these. Blocks for a deadline at most."""
        with self._lock:
            return self._gpus.occupancies(gpu_uuids)

    def _recall(self) -> Seen:
        """Of this boot; else nothing."""
        here = Seen(boot_id())
        try:
            seen = msgspec.json.decode(self._seen_path.read_bytes(), type=Seen)
        except (OSError, msgspec.DecodeError):
            return here  # never written, or not whole: the driver is asked anyway
        return seen if seen.boot_id == here.boot_id else here

    def _remember(self) -> None:
        """Nothing is lost where that fails, as long as the driver answers the next time."""
        gpus = self._gpus.facts()
        seen = msgspec.structs.replace(
            self._seen, driver_version=self._gpus.driver_version, gpus=gpus
        )
        if not gpus or seen == self._seen:
            return
        scratch = self._seen_path.with_suffix(".new")
        try:
            scratch.touch(mode=0o600)
            scratch.chmod(0o600)  # one that was left behind may have any
            scratch.write_bytes(msgspec.json.encode(seen))
            os.replace(scratch, self._seen_path)
        except OSError as error:
            log.warning("gpu.not_remembered", reason=str(error))
        else:
            self._seen = seen
