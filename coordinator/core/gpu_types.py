"""Facts about types of GPU: what to expect of one before anything of ours has run on it.

Problem: a job has to be judged on a type that it has not met, and that this fleet may not have met
either. What is public of a type is not its speed for this job, but it orders the types and says by
how much they may differ. So the facts stand here, dated and with their sources, and everything else
is learned (`estimates.py`). A name that is not in the table is an unknown type, not a guess.

Sources. Peaks, bandwidth and memory are those of NVIDIA's data sheets and architecture papers, as
written down on 2026-11-29: dense figures (without sparsity), with sums in 32 bits. `half_tflops`
are those of the tensor cores in 16 bits, or the plain rate where there are none; `single_tflops`
those of float32 without TF32, which torch does not use unless it is told to. Of boards with two
GPUs (K80) the figures are one GPU's, as NVML counts them. `relative_training`: MLPerf Training,
Llama 2 70B LoRA, closed division, samples a second and GPU over those of the H100 in NVIDIA's v4.0
results (H200 and L40S: v4.0, the latter against 64 H100; B200: v5.0), unofficial; NVIDIA's runs use
FP8.

Prices: US dollars an hour and GPU, on demand, as published transcripts of providers' pages have
them: https://lambda.ai/instances, read on 2026-09-20, the largest box of each type; H200 and A100
PCIe from https://www.runpod.io/pricing, read on 2026-10-07; RTX 4090 and 3090 from
https://openrelay.inc/gpu-pricing-calculator, read on 2026-09-20. They are for comparing types,
since providers differ by a factor of four; `baton fit --price` takes your own.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from coordinator.core.model import GpuFacts

PRICES_SOURCE = "lambda.ai and openrelay.inc 2026-09-20, runpod.io 2026-10-07, on demand"

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class GpuType:
    """What is public of a type. `words` must all be in a GPU's name, in any case; `memory_gib_min`
    tells apart what has one name and several sizes."""

    key: str
    words: tuple[str, ...]
    half_tflops: float
    single_tflops: float
    bandwidth_gb_per_s: float
    memory_gib: int
    memory_gib_min: int = 0
    relative_training: float | None = None
    usd_per_hour: float | None = None
    bfloat16: bool = True


# In the order in which they are looked for: what says more stands before what says less.
TYPES = (
    GpuType("B200", ("b200",), 2250, 75, 7700, 180, 0, 2.45, 6.69),
    GpuType("H200 NVL", ("h200", "nvl"), 835, 60, 4800, 141),
    GpuType("H200", ("h200",), 989, 67, 4800, 141, 0, 1.15, 4.59),
    GpuType("H100 NVL", ("h100", "nvl"), 835, 60, 3900, 94),
    GpuType("H100 PCIe", ("h100", "pcie"), 756, 51, 2000, 80, 0, None, 3.29),
    GpuType("H100", ("h100",), 989, 67, 3350, 80, 0, 1.0, 3.99),
    GpuType("A100 80GB PCIe", ("a100", "pcie"), 312, 19.5, 1935, 80, 60, None, 1.59),
    GpuType("A100 80GB", ("a100",), 312, 19.5, 2039, 80, 60, None, 2.79),
    GpuType("A100 40GB", ("a100",), 312, 19.5, 1555, 40, 0, None, 1.99),
    GpuType("L40S", ("l40s",), 362, 91.6, 864, 48, 0, 0.22),
    GpuType("L40", ("l40",), 181, 90.5, 864, 48),
    GpuType("L4", ("l4",), 121, 30.3, 300, 24),
    GpuType("A40", ("a40",), 150, 37.4, 696, 48),
    GpuType("A10", ("a10",), 125, 31.2, 600, 24, 0, None, 1.29),
    GpuType("RTX A6000", ("rtx", "a6000"), 155, 38.7, 768, 48, 0, None, 1.09),
    GpuType("RTX 6000 Ada", ("rtx", "6000", "ada"), 364, 91.1, 960, 48),
    GpuType("RTX 5090", ("rtx", "5090"), 210, 105, 1792, 32),
    GpuType("RTX 4090", ("rtx", "4090"), 165, 82.6, 1008, 24, 0, None, 0.29),
    GpuType("RTX 3090", ("rtx", "3090"), 71, 35.6, 936, 24, 0, None, 0.18),
    GpuType("T4", ("t4",), 65, 8.1, 320, 16, bfloat16=False),
    GpuType("V100", ("v100",), 125, 15.7, 900, 16, 0, None, 0.79, bfloat16=False),
    GpuType("P100", ("p100",), 21.2, 10.6, 732, 16, bfloat16=False),
    GpuType("K80", ("k80",), 4.1, 4.1, 240, 12, bfloat16=False),
)

# Of names with sizes; a fleet has some tens, and a decision asks for each of its GPUs.
KEYS_KEPT = 1_024

OTHERS = ("mig", "laptop", "max")
_SEPARATORS = re.compile(r"[^a-z0-9]+")


def find(name: str, memory_bytes: int = 0) -> GpuType | None:
    """The type of a GPU that NVML calls `name`; `None` for one that is not in the table. A MIG
    instance is a part of a GPU, and what is sold for laptops is another one under the same name."""
    words = _SEPARATORS.split(name.lower())
    if any(other in words for other in OTHERS):
        return None
    for known in TYPES:
        if not all(word in words for word in known.words):
            continue
        if not memory_bytes or memory_bytes >= known.memory_gib_min * GIB:
            return known
    return None


@lru_cache(maxsize=KEYS_KEPT)
def key_of(name: str, memory_bytes: int = 0) -> str:
    """What observations of it are filed under: the table's word, or the name of an unknown type."""
    known = find(name, memory_bytes)
    return known.key if known is not None else name


@lru_cache(maxsize=KEYS_KEPT)
def most_of(kinds: tuple[tuple[str, int], ...]) -> str:
    """Of GPUs by name and memory, the type of which there are most; empty where there is none."""
    keys = [key_of(*kind) for kind in kinds]
    return max(keys, key=keys.count, default="")


@lru_cache(maxsize=KEYS_KEPT)
def counted(names: tuple[str, ...]) -> str:
    """These GPUs in words."""
    return ", ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))


def facts_of(key: str, count: int) -> tuple[GpuFacts, ...]:
    """What a node with so many GPUs of a type will have, as far as the table says."""
    known = next((one for one in TYPES if one.key == key), None)
    memory_bytes = 0 if known is None else known.memory_gib * GIB
    return tuple(GpuFacts(str(place), key, memory_bytes) for place in range(count))
