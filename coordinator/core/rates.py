"""What facts say of a job's speed: the time of a step by peak figures and the work of the step.

Problem: peak figures order the types and little more, but before anything has run they are all
there is. A step is as long as its arithmetic at a share of the peak, and then its traffic at a
share of the bandwidth: they overlap less than a roofline says, since many kernels are limited by
one of them alone. A small model is done before the host has told the GPU what comes next, and then
no GPU is faster than another. Where the work is not known, both parts are taken as equally long on
an H100, which leaves the ratios between types. By how much all that is wrong is learned in
`estimates.py`.
"""

import math
from dataclasses import dataclass

from coordinator.core import gpu_types
from coordinator.core.estimates import Place, Prior
from coordinator.core.gpu_types import GpuType

# Of the peaks; what a training of plain PyTorch reaches where its matrices are large. Smaller
# models reach less: that is what the level of a job is for.
HALF_RATIO = 0.40
SINGLE_RATIO = 0.60
BANDWIDTH_RATIO = 0.70
# Of each doubling of the number of GPUs this much speed is got, where nothing else is known.
SCALING_RATIO = 0.85
_REFERENCE = next(one for one in gpu_types.TYPES if one.key == "H100")
TFLOP = 1e12
GIGABYTE = 1e9


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step, whatever it runs on. `half`: in 16 bits on tensor cores. `launch_s`: how long
    the host is busy with telling the GPU, of each rank."""

    flops: float
    traffic_bytes: float
    half: bool
    launch_s: float = 0.0


def place_prior(place: Place, work: Work | None = None, *, half: bool = False) -> Prior:
    """What facts say of `work` at a place; without it, relative to one H100 in the precision that
    `half` says. A type without facts is taken for an H100, and is said not to be known."""
    known = next((one for one in gpu_types.TYPES if one.key == place.gpu_type), None)
    gpu = known or _REFERENCE
    half = work.half if work is not None else half
    gain = math.log2(place.gpus) * math.log(2 * SCALING_RATIO)
    speed_log = -math.log(_relative_s(gpu, half=half))
    if work is None:
        return Prior(speed_log + gain, speed_log, known=known is not None)
    peak, ratio = _peak(gpu, half=work.half)
    seconds = work.flops / (peak * TFLOP * ratio)
    seconds += work.traffic_bytes / (gpu.bandwidth_gb_per_s * GIGABYTE * BANDWIDTH_RATIO)
    seconds = max(seconds / math.exp(gain), work.launch_s)
    return Prior(-math.log(seconds), speed_log, known is not None, work_known=True)


def _peak(gpu: GpuType, *, half: bool) -> tuple[float, float]:
    """A type without bfloat16 computes it in float32, at that rate."""
    if half and gpu.bfloat16:
        return gpu.half_tflops, HALF_RATIO
    return gpu.single_tflops, SINGLE_RATIO


def _relative_s(gpu: GpuType, *, half: bool) -> float:
    """How long a step takes that is half arithmetic and half traffic on the reference, 1 there;
    where a benchmark of training has measured the type, that has half of the say."""
    arithmetic = _peak(_REFERENCE, half=half)[0] / _peak(gpu, half=half)[0]
    traffic = _REFERENCE.bandwidth_gb_per_s / gpu.bandwidth_gb_per_s
    seconds = (arithmetic + traffic) / 2
    if half and gpu.relative_training is not None:
        return math.sqrt(seconds / gpu.relative_training)
    return seconds
