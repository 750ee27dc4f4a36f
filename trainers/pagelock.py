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
import weakref
from typing import Any

import torch

LIBRARY = "libcuda.so.1"
PORTABLE = 1
"""CU_MEMHOSTREGISTER_PORTABLE: for all GPUs of this process, not for the current one alone."""


class PageLock:
    """Of one piece of memory, which it keeps; made by ``lock``. The pages are let go of with this
    object, and the memory after that. No copy into it may be under way then."""

    def __init__(self, driver: Any, memory: torch.Tensor) -> None:
        self._memory = memory
        # Runs before what the object holds is dropped. At the process's end the driver does it.
        address = ctypes.c_void_p(memory.data_ptr())
        weakref.finalize(self, driver.cuMemHostUnregister, address).atexit = False


def lock(memory: torch.Tensor) -> PageLock | None:
    """Lock the pages of a CPU tensor, a third of a second per GB or so. None where no GPU is in
    use, and where the driver refuses."""
    if not torch.cuda.is_initialized() or not memory.numel():
        return None
    driver = loaded_driver()
    size_bytes = ctypes.c_size_t(memory.numel() * memory.element_size())
    arguments = ctypes.c_void_p(memory.data_ptr()), size_bytes, ctypes.c_uint(PORTABLE)
    if driver is None or driver.cuMemHostRegister_v2(*arguments):
        return None
    return PageLock(driver, memory)


def loaded_driver() -> Any | None:
    """CUDA's driver; None for another maker's."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None
