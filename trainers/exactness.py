"""How exactly a resumed training goes on: bit for bit, sample for sample, or step for step.

Problem: "resumed" says nothing. The same state on the same kind of GPU gives the same bits; on
another kind, or with another number of ranks, sums are taken in another order and the last bits
differ; with another global batch the steps no longer mean the same. Whoever compares two loss
curves must know which of these happened, so every restart says it, with the reason.

A checkpoint carries a fingerprint of where and how it was computed. ``level`` compares it with the
fingerprint of the process that resumes:

    E0  bitwise           everything that decides bits is the same
    E1  state- and        parameters, optimizer and data position are exact, the arithmetic may
        sample-exact      round differently
    E2  step-consistent   the same step of the same schedule; numbers or samples differ

On a GPU the same hardware is not enough: kernels with atomic additions sum in the order in which
threads happen to finish. E0 is promised there only with deterministic algorithms switched on
(https://docs.pytorch.org/docs/stable/notes/randomness.html). On a CPU the number of threads decides
how a sum is split.
"""

import enum
import functools
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import torch

CPU_DESCRIPTION = Path("/proc/cpuinfo")

CUBLAS_WORKSPACE = ":4096:8"
"""What its matrix products need to give the same bits each time (cuBLAS, "Results
reproducibility"); torch refuses them without. 8 pieces of 4 MiB of a GPU's memory."""


class Level(enum.Enum):
    """How a resumed run relates to the one that was not interrupted; the value is the sentence."""

    E0 = "bitwise"
    E1 = "state- and sample-exact"
    E2 = "step-consistent"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Software, hardware and choices that decide what a step computes."""

    torch: str
    cuda: str
    """Version of the CUDA runtime; empty on a CPU."""

    numpy: str
    """Its generators may draw otherwise in another version."""

    device: str
    """The GPU's name, or the CPU's model."""

    world_size: int
    precision: str
    deterministic: bool
    """Deterministic algorithms only, and no benchmark that picks a kernel by its time."""

    tf32: bool
    """Matrix products of float32 may be rounded to 10 bits of mantissa."""

    threads: int
    """Of one process, for work within an operation; matters on a CPU."""

    global_batch: int
    """Samples in one step over all ranks."""

    micro_batch: int
    """Samples that go through the model at once: their gradients are one sum."""

    data_seed: int

    compiler: str = ""
    """Of compiled steps: its name and version; empty where steps are not compiled."""

    libraries: dict[str, str] | None = None
    """Versions of those whose code is in the model, without torch; None: it is not known. Not part
    of ``document``: programs from before this was looked at refuse what they do not know there."""

    def document(self) -> dict[str, Any]:
        """As JSON. Without a compiler as it was before there was one to name."""
        document = asdict(self)
        del document["libraries"]
        if not self.compiler:
            del document["compiler"]
        return document


@dataclass(frozen=True)
class Verdict:
    """A level and the sentence that says why it is not better, or why it is the best."""

    level: Level
    why: str


def insist_on_bits() -> None:
    """Deterministic algorithms alone, from here on in this process: what E0 asks for on a GPU.
    Before anything is computed there. An operation that has none raises RuntimeError, by name."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def current(
    device: torch.device,
    *,
    world_size: int,
    precision: str,
    global_batch: int,
    micro_batch: int,
    data_seed: int,
    compiler: str = "",
    libraries: dict[str, str] | None = None,
) -> Fingerprint:
    """The fingerprint of this process, training on ``device``."""
    on_gpu = device.type == "cuda"
    benchmark = on_gpu and torch.backends.cudnn.benchmark
    return Fingerprint(
        torch=str(torch.__version__),
        cuda=(torch.version.cuda or "") if on_gpu else "",
        numpy=numpy.__version__,
        device=torch.cuda.get_device_name(device) if on_gpu else cpu_model(CPU_DESCRIPTION),
        world_size=world_size,
        precision=precision,
        deterministic=torch.are_deterministic_algorithms_enabled() and not benchmark,
        tf32=on_gpu and torch.get_float32_matmul_precision() != "highest",
        threads=torch.get_num_threads(),
        global_batch=global_batch,
        micro_batch=micro_batch,
        data_seed=data_seed,
        compiler=compiler,
        libraries=libraries,
    )


def libraries_of(model: torch.nn.Module) -> dict[str, str]:
    """The versions of the packages that the classes of its parts, and what these inherit from, are
    made of: of transformers, of peft around it. torch has a field of its own."""
    classes = dict.fromkeys(kind for part in model.modules() for kind in type(part).__mro__)
    found = {}
    for root in sorted({kind.__module__.partition(".")[0] for kind in classes} - {"torch"}):
        version = getattr(sys.modules.get(root), "__version__", None)
        if version is not None:
            found[root] = str(version)
    return found


@functools.cache
def cpu_model(description: Path) -> str:
    """The processor's name for people, as Linux tells it, or at least its architecture. Asked once:
    a machine with many processors takes milliseconds to describe them."""
    try:
        for line in description.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        return platform.machine()
    return platform.machine()


def parse(document: Mapping[str, Any], libraries: object = None) -> Fingerprint:
    """From JSON. Raises ValueError naming what is missing, unknown or of another type."""
    known = {field.name: field.type for field in fields(Fingerprint) if field.name != "libraries"}
    document = {"compiler": "", **document}
    strange = sorted(known.keys() ^ document.keys())
    if strange:
        raise ValueError(f"the fingerprint lacks or does not know {', '.join(strange)}")
    for name, kind in known.items():
        if type(document[name]) is not kind:
            raise ValueError(f"'{name}' of the fingerprint is {document[name]!r}")
    if libraries is None:
        return Fingerprint(**document)
    if not isinstance(libraries, dict) or not all(
        isinstance(word, str) for pair in libraries.items() for word in pair
    ):
        raise ValueError(f"the versions of the model's libraries are {libraries!r}")
    return Fingerprint(**document, libraries=libraries)


def level(stored: Fingerprint | None, now: Fingerprint) -> Verdict:
    """How exactly a process with fingerprint ``now`` continues a checkpoint of ``stored``; None
    when the checkpoint has none. Pure."""
    if stored is None:
        return Verdict(Level.E2, "the checkpoint does not say where it was written")
    for name, words in _CHANGES_STEPS:
        if getattr(stored, name) != getattr(now, name):
            return Verdict(Level.E2, _changed(words, stored, now, name))
    changes = [
        _changed(words, stored, now, name)
        for name, words in _CHANGES_ROUNDING
        if getattr(stored, name) != getattr(now, name)
    ]
    changes += _changed_libraries(stored.libraries, now.libraries)
    if not now.cuda and stored.threads != now.threads:
        changes.append(_changed("the number of threads", stored, now, "threads"))
    if changes:
        return Verdict(Level.E1, "; ".join(changes))
    if now.cuda and not now.deterministic:
        return Verdict(
            Level.E1, f"the same {now.device} and world, but deterministic algorithms are off"
        )
    if now.cuda and now.compiler:
        return Verdict(Level.E1, f"{now.compiler} picks its kernels by their time")
    ranks = "1 rank" if now.world_size == 1 else f"{now.world_size} ranks"
    return Verdict(Level.E0, f"the same software on the same {now.device}, with {ranks}")


_CHANGES_STEPS = (
    ("data_seed", "the seed of the data order"),
    ("global_batch", "the global batch"),
    ("precision", "the precision"),
)
"""What makes a step mean something else."""

_CHANGES_ROUNDING = (
    ("device", "the device"),
    ("world_size", "the number of ranks"),
    ("micro_batch", "the number of samples at once"),
    ("torch", "torch"),
    ("cuda", "CUDA"),
    ("numpy", "numpy"),
    ("compiler", "the compiler"),
    ("deterministic", "the choice of deterministic algorithms"),
    ("tf32", "the use of TF32"),
)
"""What makes the same step round differently."""


def _changed(words: str, stored: Fingerprint, now: Fingerprint, name: str) -> str:
    return f"{words} was {_shown(getattr(stored, name))} and is {_shown(getattr(now, name))}"


def _changed_libraries(stored: dict[str, str] | None, now: dict[str, str] | None) -> list[str]:
    now = now or {}
    if stored is None:
        named = " and ".join(f"{name} {version}" for name, version in now.items())
        return [f"the checkpoint does not say whether it was written with {named}"] if now else []
    return [
        f"{name} was {stored.get(name, 'none')} and is {now.get(name, 'none')}"
        for name in sorted(stored.keys() | now.keys())
        if stored.get(name) != now.get(name)
    ]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) or "none"
