"""Build the NVML stand-in, and describe a node's GPUs to it.

Problem: the dynamic linker reads `LD_LIBRARY_PATH` once, when a process starts, and the binding
opens the bare soname; so the library must lie ready in a directory, under its right name, before an
agent is started. Compiling it for every test would cost seconds and, with several test workers,
race. So it is compiled once into a directory named by the hash of everything that goes into it, in
a scratch directory that is renamed into place: whoever comes second finds it complete.

An old driver is a library that lacks symbols. `build(without=...)` really leaves them out, by a
linker version script.

    lib=$(python -m tests.fakenvml.build --node n1 --gpus 2 --type h100 --out /tmp/n1)
    LD_LIBRARY_PATH=$lib BATON_FAKENVML_FILE=/tmp/n1/gpus.txt baton-agent ...
"""

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SONAME = "libnvidia-ml.so.1"
DRIVER_VERSION = "550.54.15"
HANGS_VARIABLE = "BATON_FAKENVML_HANGS"  # names a file in which a call that is blocked says so
SOURCE = Path(__file__).with_name("nvml.c")
INCLUDED = [Path(__file__).with_name(name) for name in ("detail.h", "events.h")]
CACHE = Path(__file__).resolve().parents[2] / "build" / "fakenvml"

_COMPILE = ("gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread")
_COMPILE_S_MAX = 120  # it takes about one second; a compiler that hangs must not hang the tests
_UUID_NAMESPACE = uuid.UUID("5d0f6a52-6c0b-4d39-9f0e-0b6f4f4e7a10")
_MIB = 1 << 20
_UNWRITABLE = re.compile(r'["\x00-\x1f\x7f]')  # what the line format has no escape for


_PCIE = (("pcie_generation_max", 4), ("pcie_width", 16), ("pcie_width_max", 16))
_SAMPLES = (
    ("utilization_percent_samples", "0,0,0"),
    ("memory_utilization_percent_samples", "0,0,0"),
    ("power_mw_samples", "70000,70000,70000"),
)
_DATA_CENTRE: tuple[tuple[str, int | str], ...] = (
    ("ecc_enabled", 1),
    ("ecc_volatile_corrected", 0),
    ("ecc_volatile_uncorrected", 0),
    ("ecc_aggregate_corrected", 0),
    ("ecc_aggregate_uncorrected", 0),
    ("memory_temperature_celsius", 40),
    ("pcie_replays", 0),
    ("remapped_rows_corrected", 0),
    ("remapped_rows_uncorrected", 0),
    ("remapped_rows_pending", 0),
    ("remapped_rows_failed", 0),
    ("nvlinks_down", 0),
    ("vbios_version", "96.00.74.00.01"),
    *_PCIE,
    *_SAMPLES,
)
_HOPPER = (
    ("pcie_generation", 5),
    ("pcie_generation_max", 5),
    ("nvlinks_up", 18),
    ("fabric_state", 3),
    ("sm_activity_percent", 0),
    ("tensor_activity_percent", 0),
)
_AMPERE = (("pcie_generation", 4), ("nvlinks_up", 12))
_GEFORCE: tuple[tuple[str, int | str], ...] = (
    ("remapped_rows_corrected", 0),
    ("remapped_rows_uncorrected", 0),
    ("remapped_rows_pending", 0),
    ("remapped_rows_failed", 0),
    ("pcie_generation", 4),
    ("pcie_replays", 0),
    ("vbios_version", "95.02.3C.00.04"),
    *_PCIE,
    *_SAMPLES,
)


class BuildError(Exception):
    """The library could not be built; the text is a sentence that says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeGpu:
    """One GPU as the driver will tell of it. `None` is what this GPU does not support.

    `state` is `ok`, `lost`, `reset_required` or `hangs`. `unsupported` names fields (utilization,
    memory, temperature, power, energy, sm_clock, memory_clock); `failing` pairs them with an NVML
    return code. `processes` are (pid, bytes) pairs. `pci_bus` is the number of its bus, by default
    its place, from 1. `xids` are its errors as (number, code): the numbers grow over all GPUs, and
    whoever waits gets what is new. `details` are keys of `detail.h` with their values. `parent`
    makes it a MIG instance of that GPU, which has to have `mig`.
    """

    uuid: str
    name: str
    memory_bytes: int
    memory_reserved_bytes: int = 512 * _MIB
    utilization_percent: int | None = 0
    memory_used_bytes: int | None = 0
    temperature_celsius: int | None = 35
    power_mw: int | None = 70_000
    energy_mj: int | None = 0
    sm_clock_mhz: int | None = 345
    memory_clock_mhz: int | None = 2_619
    state: str = "ok"
    unsupported: tuple[str, ...] = ()
    failing: tuple[tuple[str, int], ...] = ()
    processes: tuple[tuple[int, int], ...] = ()
    pci_bus: int | None = None
    xids: tuple[tuple[int, int], ...] = ()
    details: tuple[tuple[str, int | str], ...] = ()
    parent: str | None = None
    mig: bool = False


def build(*, without: Sequence[str] = (), cache: Path = CACHE) -> Path:
    """The directory to put on `LD_LIBRARY_PATH`, compiled now if need be. `without` names symbols
    to leave out.

    Raises `BuildError` when there is no gcc or it fails.
    """
    hidden = sorted(without)
    sources = [path.read_bytes() for path in (SOURCE, *INCLUDED)]
    ingredients = [*sources, *(part.encode() for part in (*_COMPILE, SONAME, *hidden))]
    digest = hashlib.sha256(b"\0".join([platform.machine().encode(), *ingredients])).hexdigest()
    directory = cache / digest[:16]
    if (directory / SONAME).exists():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
    try:
        _compile(scratch, hidden)
        scratch.rename(directory)
    except OSError:
        if not (directory / SONAME).exists():  # else another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # gone already when the rename succeeded
    return directory


def describe(
    gpus: Sequence[FakeGpu],
    path: Path,
    *,
    driver_version: str = DRIVER_VERSION,
    driver_state: str = "ok",
) -> None:
    """Write the file that `BATON_FAKENVML_FILE` names, atomically; a running process sees it on its
    next call, or in the one that hangs.

    An empty `driver_version` describes a machine whose driver is not loaded; `driver_state` is
    `ok`, `mismatch` (the library is of another version) or `hangs`. Raises `ValueError` for text
    that the format cannot hold.
    """
    driver = f"driver version={driver_version} state={driver_state}"
    if not driver_version:
        driver = "driver state=not_loaded"
    lines = [driver, *(_line(gpu) for gpu in gpus)]
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    os.replace(scratch, path)


def environment(library_directory: Path, path: Path) -> dict[str, str]:
    """What a process needs in its environment, before it starts, to have the GPUs of `path`."""
    return {"LD_LIBRARY_PATH": str(library_directory), "BATON_FAKENVML_FILE": str(path)}


def gpu_uuid(node: str, index: int) -> str:
    """The same for the same node and index, on every machine and in every run."""
    return f"GPU-{uuid.uuid5(_UUID_NAMESPACE, f'{node}/{index}')}"


def with_details(gpu: FakeGpu, **details: int | str | None) -> FakeGpu:
    """With these beside, or instead of, what it has; `None`: it does not support that."""
    merged = {**dict(gpu.details), **details}
    said = tuple((key, value) for key, value in merged.items() if value is not None)
    return replace(gpu, details=said)


def mig(gpu: FakeGpu, count: int) -> tuple[FakeGpu, ...]:
    """The GPU in MIG mode, and after it so many instances of equal size, which say as little of
    themselves as real ones: their memory."""
    whole = replace(gpu, mig=True)
    instances = (
        FakeGpu(
            uuid=f"MIG-{uuid.uuid5(_UUID_NAMESPACE, f'{gpu.uuid}/{index}')}",
            name=f"{gpu.name} MIG 1g",
            memory_bytes=gpu.memory_bytes // count,
            utilization_percent=None,
            temperature_celsius=None,
            power_mw=None,
            energy_mj=None,
            sm_clock_mhz=None,
            memory_clock_mhz=None,
            parent=gpu.uuid,
        )
        for index in range(count)
    )
    return whole, *instances


def h100(count: int, *, node: str = "n1") -> tuple[FakeGpu, ...]:
    """`count` of the SXM5 H100 with 80 GB."""
    details = (*_DATA_CENTRE, *_HOPPER)
    return _fleet(node, count, "NVIDIA H100 80GB HBM3", memory_mib=81_559, details=details)


def h200(count: int, *, node: str = "n1") -> tuple[FakeGpu, ...]:
    """`count` of the SXM5 H200 with 141 GB."""
    details = (*_DATA_CENTRE, *_HOPPER)
    return _fleet(node, count, "NVIDIA H200", memory_mib=143_771, details=details)


def a100(count: int, *, node: str = "n1") -> tuple[FakeGpu, ...]:
    """`count` of the SXM4 A100 with 80 GB."""
    details = (*_DATA_CENTRE, *_AMPERE)
    return _fleet(node, count, "NVIDIA A100-SXM4-80GB", memory_mib=81_920, details=details)


def rtx4090(count: int, *, node: str = "n1") -> tuple[FakeGpu, ...]:
    """`count` of the GeForce RTX 4090 with 24 GB: no ECC, no NVLink, no GPM, and remapped rows that
    answer zero although there is nothing to remap (leptonai/gpud #351)."""
    return _fleet(node, count, "NVIDIA GeForce RTX 4090", memory_mib=24_564, details=_GEFORCE)


PRESETS: dict[str, Callable[..., tuple[FakeGpu, ...]]] = {
    "h100": h100,
    "h200": h200,
    "a100": a100,
    "rtx4090": rtx4090,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Describe a node under `--out`, and print the library directory."""
    parser = argparse.ArgumentParser("python -m tests.fakenvml.build", description=main.__doc__)
    parser.add_argument("--node", required=True, help="node name; the GPUs' UUIDs follow from it")
    parser.add_argument("--gpus", type=int, required=True, help="how many GPUs, 0 to 64")
    parser.add_argument("--type", choices=sorted(PRESETS), default="h100", help="default: h100")
    parser.add_argument("--out", type=Path, required=True, help="directory for gpus.txt")
    options = parser.parse_args(arguments)
    try:
        directory = build()
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    describe(PRESETS[options.type](options.gpus, node=options.node), options.out / "gpus.txt")
    print(directory)
    return 0


def _compile(directory: Path, hidden: Sequence[str]) -> None:
    command = [*_COMPILE, f"-Wl,-soname,{SONAME}"]
    if hidden:
        script = directory / "hidden.map"
        script.write_text("{ local: " + " ".join(f"{name};" for name in hidden) + " };\n")
        command.append(f"-Wl,--version-script={script}")
    command += [str(SOURCE), "-o", str(directory / SONAME)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S_MAX)
    except FileNotFoundError as error:
        raise BuildError("the NVML stand-in needs gcc: apt-get install gcc libc6-dev") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"gcc could not build {SOURCE.name}: {error.stderr.strip()}") from error


def _fleet(
    node: str, count: int, name: str, *, memory_mib: int, details: tuple[tuple[str, int | str], ...]
) -> tuple[FakeGpu, ...]:
    return tuple(
        FakeGpu(
            uuid=gpu_uuid(node, index),
            name=name,
            memory_bytes=memory_mib * _MIB,
            details=(*details, ("serial", f"165{index:010}")),
        )
        for index in range(count)
    )


def _line(gpu: FakeGpu) -> str:
    for text in (gpu.uuid, gpu.name, *(str(value) for _, value in gpu.details)):
        if not text or _UNWRITABLE.search(text):
            raise ValueError(f"not writable in the GPU file: {text!r}")
    words = [f'gpu uuid="{gpu.uuid}" name="{gpu.name}" memory_bytes={gpu.memory_bytes}']
    words.append(f"memory_reserved_bytes={gpu.memory_reserved_bytes} state={gpu.state}")
    optional = {
        "utilization_percent": gpu.utilization_percent,
        "memory_used_bytes": gpu.memory_used_bytes,
        "temperature_celsius": gpu.temperature_celsius,
        "power_mw": gpu.power_mw,
        "energy_mj": gpu.energy_mj,
        "sm_clock_mhz": gpu.sm_clock_mhz,
        "memory_clock_mhz": gpu.memory_clock_mhz,
        "unsupported": ",".join(gpu.unsupported) or None,
        "failing": ",".join(f"{field}:{code}" for field, code in gpu.failing) or None,
        "pci_bus": gpu.pci_bus,
        "xids": ",".join(f"{number}:{code}" for number, code in gpu.xids) or None,
        "parent": gpu.parent,
        "mig": 1 if gpu.mig else None,
        **{key: f'"{value}"' for key, value in gpu.details},
        "processes": ",".join(f"{pid}:{used_bytes}" for pid, used_bytes in gpu.processes) or None,
    }
    words += [f"{key}={value}" for key, value in optional.items() if value is not None]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
