"""Memory of the host that a GPU copies into by itself: page-locked, and let go of before it goes.

Problem: only into page-locked memory does a copy from the device run at the speed of the bus and
beside the training (CUDA driver API, "API synchronization behavior"). torch's allocator hands such
memory out; ours is the agent's slab, which was mapped from a descriptor, so it has to be
registered. That goes wrong in two quiet ways:

1. What is unmapped while it is registered stays known to the driver by its addresses. Whatever is
   mapped there next is taken for page-locked, and copies into it land in the pages of before.
2. A refusal by the runtime (``cudaHostRegister``) is kept as the thread's last error, which torch
   takes for that of the next kernel: the training dies of it somewhere else (vllm-project/vllm
   #50070 tells of it). The driver's own functions keep nothing, so those are called here. They
   want a current context, which the thread of a training on a GPU has.

Memory that cannot be locked is no failure: copies go by way of pinned buffers then (``drain``).
"""

import ctypes
from typing import Any

import torch

LIBRARY = "libcuda.so.1"
PORTABLE = 1
"""CU_MEMHOSTREGISTER_PORTABLE: for all GPUs of this process, not for the current one alone."""


class PageLock:
    """Of one piece of memory; made by ``lock``."""

    def __init__(self, driver: Any, address: int) -> None:
        self._driver = driver
        self._address = address

    def release(self) -> None:
        """Call it before the memory is unmapped, when no copy into it is under way."""
        self._driver.cuMemHostUnregister(ctypes.c_void_p(self._address))


def lock(memory: torch.Tensor) -> PageLock | None:
    """Lock the pages of a CPU tensor, a third of a second per GB or so. None where no GPU is in
    use, and where the driver refuses."""
    if not torch.cuda.is_initialized() or not memory.numel():
        return None
    driver = loaded_driver()
    address, size_bytes = memory.data_ptr(), memory.numel() * memory.element_size()
    arguments = ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), ctypes.c_uint(PORTABLE)
    if driver is None or driver.cuMemHostRegister_v2(*arguments):
        return None
    return PageLock(driver, address)


def loaded_driver() -> Any | None:
    """CUDA's driver; None for another maker's."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None
