"""The production `GpuProbe`: NVML for the GPUs, psutil for the host.

Problem: readings run in worker threads because a sick driver can block a call for seconds, and the
shell may ask for facts (a new session says hello) while a sample is still under way. The caches
behind are plain dictionaries, so one lock lets one caller in at a time; the cost is that a hello
waits for a stuck reading, which it would anyway.

There is no simulated branch: a box without GPUs is a box with zero GPUs. Where a test needs GPUs,
it brings a library.
"""

import threading
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Self

from agent.core.values import GpuFacts, HostFacts, Sample
from agent.telemetry.host import Host
from agent.telemetry.nvml import NvmlGpus


class NvmlProbe:
    """Reads this box. Use as a context manager, or `open` and `close`.

    `state_directory` is the agent's, for the free disk space. `allowed_uuids` limits the GPUs that
    are seen; `None` means all, and an allowed GPU that the driver does not know is sampled with an
    error.
    """

    def __init__(
        self, state_directory: Path, *, allowed_uuids: Collection[str] | None = None
    ) -> None:
        self._host = Host(state_directory)
        self._gpus = NvmlGpus(allowed_uuids)
        self._lock = threading.Lock()

    def open(self) -> None:
        """Initialise NVML and enumerate. A missing library or driver is not an error."""
        with self._lock:
            self._host.open()
            self._gpus.open()

    def close(self) -> None:
        """Let go of NVML. Closing twice is closing once."""
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
        """Of the host; `driver_version` is empty where there is no NVML or no driver."""
        with self._lock:
            return self._host.facts(driver_version=self._gpus.driver_version())

    def gpu_facts(self) -> tuple[GpuFacts, ...]:
        """Every GPU seen since `open`. Enumerates again, to find a driver or GPU that came late."""
        with self._lock:
            self._gpus.open()
            return self._gpus.facts()

    def sample(self) -> Sample:
        """Host and GPUs, read together. Blocks for as long as the driver does."""
        with self._lock:
            return Sample(host=self._host.sample(), gpus=self._gpus.samples())
