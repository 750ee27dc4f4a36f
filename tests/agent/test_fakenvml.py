"""The NVML stand-in, asked by the real binding: what it must do for the probe's tests to mean
anything.

A stand-in that is kinder than the driver hides bugs. So its refusals are tested as much as its
answers: a symbol that is not there, a call before initialisation, a wrong structure version, a file
that does not parse.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakenvml import build as build_module
from tests.fakenvml.build import (
    SONAME,
    BuildError,
    a100,
    build,
    describe,
    environment,
    gpu_uuid,
    h100,
    h200,
    rtx4090,
)

ROOT = Path(__file__).resolve().parents[2]
CHILD_S_MAX = 60  # it ends in milliseconds; a child that hangs must not hang the run


def test_the_agent_does_not_know_of_it() -> None:
    """It has no branch for a simulation: what runs in tests is what runs beside GPUs."""
    modules = sorted((ROOT / "agent").rglob("*.py"))
    assert len(modules) > 50
    assert not [path for path in modules if "fakenvml" in path.read_text().lower()]


PRELUDE = """
import json, sys
from pathlib import Path
from pynvml import *
from tests.fakenvml.build import *

def code(call, *arguments):
    try:
        call(*arguments)
    except NVMLError as error:
        return error.value
    return 0

path = Path(os.environ["BATON_FAKENVML_FILE"])
"""


def run(
    script: str, path: Path, *, library: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with the stand-in; it prints what the test compares."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        cwd=ROOT,
        env={**os.environ, **environment(library or build(), path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=CHILD_S_MAX,
    )


@pytest.fixture
def described(tmp_path: Path) -> Path:
    return tmp_path / "gpus.txt"


def test_nothing_works_before_initialisation_or_after_shutdown(described: Path) -> None:
    describe(h100(1), described)
    script = """
nvmlInit(); nvmlInit()
handle = nvmlDeviceGetHandleByIndex(0)
nvmlShutdown()
assert code(nvmlDeviceGetCount) == 0, "initialised twice, shut down once"
nvmlShutdown()
assert code(nvmlDeviceGetCount) == NVML_ERROR_UNINITIALIZED
assert code(nvmlDeviceGetPowerUsage, handle) == NVML_ERROR_UNINITIALIZED
assert code(nvmlShutdown) == NVML_ERROR_UNINITIALIZED
nvmlInit()
assert code(nvmlDeviceGetPowerUsage, handle) == 0
print("done")
"""
    assert run(script, described).stdout == "done\n"


def test_a_missing_symbol_is_function_not_found(described: Path) -> None:
    describe(h100(1), described)
    script = """
nvmlInit()
handle = nvmlDeviceGetHandleByIndex(0)
print(code(nvmlDeviceGetFanSpeed, handle), code(nvmlDeviceGetPowerUsage, handle))
"""
    assert run(script, described).stdout == "13 0\n"
    old = build(without=["nvmlDeviceGetPowerUsage"])
    assert run(script, described, library=old).stdout == "13 13\n"


def test_handles_by_uuid_and_index(described: Path) -> None:
    describe([*h100(2), replace(h100(3)[2], state="lost")], described)
    script = f"""
nvmlInit()
print(nvmlDeviceGetCount())
print(nvmlDeviceGetUUID(nvmlDeviceGetHandleByUUID({gpu_uuid("n1", 1)!r})))
print(nvmlDeviceGetName(nvmlDeviceGetHandleByIndex(1)))
print(code(nvmlDeviceGetHandleByUUID, "GPU-no"), code(nvmlDeviceGetHandleByIndex, 3))
print(code(nvmlDeviceGetHandleByIndex, 2), code(nvmlDeviceGetUUID, c_nvmlDevice_t()))
"""
    assert run(script, described).stdout.splitlines() == [
        "3",
        gpu_uuid("n1", 1),
        "NVIDIA H100 80GB HBM3",
        "6 2",
        "15 2",
    ]


def test_memory_of_both_versions_adds_up(described: Path) -> None:
    gpu = replace(h200(1)[0], memory_bytes=1000, memory_reserved_bytes=100, memory_used_bytes=250)
    describe([gpu], described)
    script = """
nvmlInit()
handle = nvmlDeviceGetHandleByIndex(0)
two = nvmlDeviceGetMemoryInfo(handle, nvmlMemory_v2)
print(two.total, two.reserved, two.free, two.used)
one = nvmlDeviceGetMemoryInfo(handle)
print(one.total, one.free, one.used)
print(code(nvmlDeviceGetMemoryInfo, handle, 0x03000028))
"""
    assert run(script, described).stdout.splitlines() == ["1000 100 650 250", "1000 650 350", "25"]


def test_processes_on_a_gpu(described: Path) -> None:
    idle, busy = h100(2)
    describe([idle, replace(busy, processes=((4242, 1 << 33), (17, 5)))], described)
    script = """
nvmlInit()
for index in range(2):
    handle = nvmlDeviceGetHandleByIndex(index)
    print([(p.pid, p.usedGpuMemory) for p in nvmlDeviceGetComputeRunningProcesses_v3(handle)])
"""
    assert run(script, described).stdout.splitlines() == ["[]", "[(4242, 8589934592), (17, 5)]"]


def test_every_change_is_seen_however_quick(described: Path) -> None:
    """Two replacements between two calls, sizes and perhaps times alike: the inode tells."""
    describe(h100(1), described)
    script = """
nvmlInit()
handle = nvmlDeviceGetHandleByIndex(0)
for power_mw in range(10_000, 10_500):
    describe([replace_power(power_mw + 1000)], path)
    describe([replace_power(power_mw)], path)
    assert nvmlDeviceGetPowerUsage(handle) == power_mw, power_mw
print("done")
"""
    helper = """
from dataclasses import replace
def replace_power(power_mw):
    return replace(h100(1)[0], power_mw=power_mw)
"""
    assert run(helper + script, described).stdout == "done\n"


def test_the_file_vanishes_and_returns(described: Path) -> None:
    describe(h100(1), described)
    script = """
nvmlInit()
handle = nvmlDeviceGetHandleByIndex(0)
path.unlink()
print(code(nvmlDeviceGetPowerUsage, handle), code(nvmlInit))
describe(h100(1), path)
print(code(nvmlDeviceGetPowerUsage, handle), code(nvmlInit))
"""
    assert run(script, described).stdout.splitlines() == ["15 9", "0 0"]


GPU = 'gpu uuid=GPU-1 name="A GPU" memory_bytes=1000'


@pytest.mark.parametrize(
    "line",
    [
        "gpu",
        "gpus uuid=GPU-2 name=x memory_bytes=1",
        "gpu uuid=GPU-2 name=x memory_bytes=many",
        "gpu uuid=GPU-2 name=x memory_bytes=-1",
        "gpu uuid=GPU-2 name=x memory_bytes=99999999999999999999999",
        'gpu uuid=GPU-2 name="no end memory_bytes=1',
        "gpu uuid=GPU-2 name=x memory_bytes=1 powr_mw=3",
        "gpu uuid=GPU-2 name=x memory_bytes=1 unsupported=powr",
        "gpu uuid=GPU-2 name=x memory_bytes=1 failing=power",
        "gpu uuid=GPU-2 name=x memory_bytes=1 state=tired",
        "gpu uuid=GPU-2 name=x memory_bytes=1 processes=1",
        f"gpu uuid={'G' * 96} name=x memory_bytes=1",
        GPU,  # the same UUID twice
        "driver version=",
        "driver state=asleep",
    ],
)
def test_a_line_that_does_not_parse_is_named_and_changes_nothing(
    described: Path, line: str
) -> None:
    described.write_text(f"# two lines and a comment\n{GPU} power_mw=7\n{line}\n")
    script = f"""
print(code(nvmlInit))
path.write_text({GPU!r} + " power_mw=8\\n")
print(code(nvmlInit), nvmlDeviceGetPowerUsage(nvmlDeviceGetHandleByIndex(0)))
path.write_text({GPU!r} + " power_mw=9\\n" + {line!r} + "\\n")
print(nvmlDeviceGetPowerUsage(nvmlDeviceGetHandleByIndex(0)))
"""
    outcome = run(script, described)
    assert outcome.stdout.splitlines() == ["999", "0 8", "8"]
    assert outcome.stderr.splitlines() == [
        f"fakenvml: {described}: line 3 does not parse",
        f"fakenvml: {described}: line 2 does not parse",
    ]


def test_more_gpus_than_there_is_room_for_are_refused(described: Path) -> None:
    describe(h100(64), described)
    script = "print(code(nvmlInit), code(nvmlDeviceGetHandleByIndex, 63))"
    assert run(script, described).stdout == "0 0\n"
    describe(h100(65), described)
    assert "line 66 does not parse" in run("code(nvmlInit)", described).stderr


def test_text_that_the_format_cannot_hold_is_refused(described: Path) -> None:
    for name in ('a "quoted" GPU', "two\nlines", ""):
        with pytest.raises(ValueError, match="not writable"):
            describe([replace(h100(1)[0], name=name)], described)
    assert not list(described.parent.iterdir()), "nothing was written, nothing left behind"


def test_uuids_follow_from_node_and_index() -> None:
    assert gpu_uuid("n1", 0) == "GPU-e7f76eb9-6342-5ba0-97e1-b4989b9e34fb"
    uuids = [gpu.uuid for node in ("n1", "n2") for gpu in h100(8, node=node)]
    assert len(set(uuids)) == 16
    assert [gpu.uuid for gpu in rtx4090(2)] == [gpu.uuid for gpu in a100(2)]


def test_builds_side_by_side_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        directories = list(pool.map(lambda _: build(cache=tmp_path), range(4)))
    assert len(set(directories)) == 1
    assert list(tmp_path.iterdir()) == [directories[0]], "no scratch directory is left"
    assert (directories[0] / SONAME).stat().st_size > 0


def test_another_library_for_other_symbols() -> None:
    assert build() != build(without=["nvmlDeviceGetName"])


def test_without_a_compiler_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="apt-get install gcc"):
        build(cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_source_that_does_not_compile_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "nvml.c"
    broken.write_text("int nvmlInit_v2(void) { return missing; }\n")
    monkeypatch.setattr(build_module, "SOURCE", broken)
    with pytest.raises(BuildError, match="missing"):
        build(cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_the_command_prints_the_library_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fakenvml.build", "--node", "n7", "--gpus", "2"]
    finished = subprocess.run(
        [*command, "--type", "rtx4090", "--out", str(tmp_path / "n7")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=CHILD_S_MAX,
    )
    library = Path(finished.stdout.strip())
    script = "nvmlInit(); print(nvmlDeviceGetUUID(nvmlDeviceGetHandleByIndex(1)))"
    outcome = run(script, tmp_path / "n7" / "gpus.txt", library=library)
    assert outcome.stdout.strip() == gpu_uuid("n7", 1)
