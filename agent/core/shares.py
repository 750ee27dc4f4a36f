"""Jobs that share a GPU of this node: what each is held to, and whether there is room for one more.

Problem: two programs on one GPU know nothing of each other, and take its memory until there is
none. So each has a cap, and is told of it in words that programs understand: a share of the GPU's
memory (`BATON_GPU_MEMORY_RATIO`, which our trainers hand to torch, and the variable that JAX reads
for itself). One that heeds neither is held to its cap only where MPS runs (`docs/sharing.md`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agent.core.values import GpuFacts, JobSpec

if TYPE_CHECKING:
    from agent.core.attempt import AttemptRecord
    from agent.core.state import State

RATIO_STEPS = 10_000  # a hundredth of a percent: 8 MB of an 80 GB card


def ratio(gpus: Sequence[GpuFacts], gpu_uuids: Sequence[str], spec: JobSpec) -> float:
    """How much of its GPU's memory a job may take, rounded down; 1 where it has it alone."""
    sizes = [gpu.memory_bytes for gpu in gpus if gpu.uuid in gpu_uuids and gpu.memory_bytes]
    if not spec.shared_gpu_memory_bytes or not sizes:
        return 1.0
    steps = spec.shared_gpu_memory_bytes * RATIO_STEPS // min(sizes)
    return min(1.0, max(1, steps) / RATIO_STEPS)


def stand_together(one: "AttemptRecord", other: "AttemptRecord") -> bool:
    """Whether both may be on one GPU."""
    return bool(one.spec.shared_gpu_memory_bytes and other.spec.shared_gpu_memory_bytes)


def why_not(state: "State", record: "AttemptRecord") -> str:
    """The sentence that says why there is no room for this attempt's share; empty when there is."""
    share_bytes = record.spec.shared_gpu_memory_bytes
    if not share_bytes:
        return ""
    for gpu in state.gpus:
        if gpu.uuid not in record.gpu_uuids:
            continue
        taken_bytes = sum(
            live.record.spec.shared_gpu_memory_bytes
            for live in state.attempts.values()
            if live.live and live.record.id != record.id and gpu.uuid in live.record.gpu_uuids
        )
        if taken_bytes + share_bytes > gpu.memory_bytes:
            return (
                f"GPU {gpu.uuid} has {gpu.memory_bytes} bytes of memory, {taken_bytes} of them are"
                f" shared out already, and {share_bytes} more are too much"
            )
    return ""


def environment(record: "AttemptRecord") -> dict[str, str]:
    """What a job that shares its GPU is told, over what its owner says."""
    if not record.spec.shared_gpu_memory_bytes:
        return {}
    value = f"{record.gpu_memory_ratio:.4f}"
    # JAX would otherwise take three quarters of the whole GPU at its first operation.
    return {"BATON_GPU_MEMORY_RATIO": value, "XLA_PYTHON_CLIENT_MEM_FRACTION": value}
