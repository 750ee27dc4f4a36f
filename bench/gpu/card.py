"""Which card this machine has, in words; or why there is none for torch, in a sentence that helps.

Problem: "no CUDA device" has three causes, and each wants something else: a torch that was built
without CUDA, a driver that is not there, and one that torch cannot use.
"""

import platform
import sys
from dataclasses import dataclass

import pynvml
import torch

from bench.gpu import EXIT_NO_DEVICE


@dataclass(frozen=True, slots=True)
class Card:
    """The device that torch takes first. Empty fields are not known."""

    name: str
    memory_gib: float
    capability: str
    driver: str
    torch: str
    cuda: str
    python: str

    def __str__(self) -> str:
        driver = self.driver or "of unknown version"
        return (
            f"{self.name}, {self.memory_gib:.0f} GiB, compute capability {self.capability}, driver"
            f" {driver}, torch {self.torch}, CUDA {self.cuda}, Python {self.python}"
        )


def missing() -> str:
    """Why there is no CUDA device to measure on; empty where there is one."""
    if torch.cuda.is_available():
        return ""
    version = torch.__version__
    if torch.version.cuda is None:
        return (
            f"no CUDA device: torch {version} is built without CUDA;"
            " install the ordinary build (make clean, then make setup without TORCH_INDEX_URL)"
        )
    driver = driver_version()
    if not driver:
        return f"no CUDA device: torch {version} has CUDA, and there is no NVIDIA driver here"
    return (
        f"no CUDA device: the driver is {driver}, and torch {version} with CUDA"
        f" {torch.version.cuda} cannot use it (CUDA_VISIBLE_DEVICES; an older driver than that CUDA"
        " needs: TORCH_INDEX_URL in the Makefile names another build; or no /dev/nvidia-uvm:"
        " nvidia-modprobe -u -c 0 makes it)"
    )


def described() -> Card:
    """Where ``missing`` is empty."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Card(
        name=device.name,
        memory_gib=device.total_memory / 2**30,
        capability=f"{device.major}.{device.minor}",
        driver=driver_version(),
        torch=str(torch.__version__),
        cuda=torch.version.cuda or "",
        python=platform.python_version(),
    )


def driver_version() -> str:
    """As NVML tells it; empty where it does not."""
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return ""


if __name__ == "__main__":
    reason = missing()
    sys.stdout.write(f"{reason or described()}\n")
    sys.exit(EXIT_NO_DEVICE if reason else 0)
