"""Which jobs are accepted: no request breaks the judge, and each bound refuses just beyond itself.

The sentences of ordinary refusals are in `tests/golden/coordinator/refused_submissions.txt`.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import shares, validate
from coordinator.core.model import GpuFacts, HostFacts, JobSpec
from tests.core.coordinator_harness import GIGABYTE

GOOD = JobSpec(command=("train",))
CODES = tuple(range(1, 256))

AT_THE_BOUND = [
    replace(GOOD, name="n" * validate.NAME_CHARACTERS_MAX),
    replace(GOOD, command=("x" * (validate.COMMAND_BYTES_MAX - 1),)),
    replace(GOOD, gpus=validate.GPUS_MAX),
    replace(GOOD, grace_ms=validate.GRACE_MS_MAX),
    replace(GOOD, max_restarts=validate.MAX_RESTARTS_MAX),
    replace(GOOD, gpus=1, gpu_types=("t",) * validate.GPU_TYPES_MAX),
    replace(GOOD, gpus=1, gpu_types=("t" * validate.GPU_TYPE_CHARACTERS_MAX,)),
    replace(GOOD, working_directory="/" * validate.PATH_BYTES_MAX),
    replace(GOOD, environment=(("A", "x" * (validate.ENVIRONMENT_BYTES_MAX - 3)),)),
    replace(GOOD, environment=(("A", ""),) * validate.ENVIRONMENT_ENTRIES_MAX),
    replace(GOOD, run_again_exit_codes=CODES),
    replace(GOOD, gpus=1, shared_gpu_memory_bytes=shares.SHARE_BYTES_MIN),
    replace(GOOD, gpus=1, deadline_unix_ms=1),
    replace(GOOD, gpus=1, shared_gpu_memory_bytes=GIGABYTE, deadline_unix_ms=1),
]
BEYOND = [
    replace(GOOD, name="n" * (validate.NAME_CHARACTERS_MAX + 1)),
    replace(GOOD, command=("x" * validate.COMMAND_BYTES_MAX,)),
    replace(GOOD, command=("",)),
    replace(GOOD, command=("a\0b",)),
    replace(GOOD, gpus=validate.GPUS_MAX + 1),
    replace(GOOD, grace_ms=validate.GRACE_MS_MAX + 1),
    replace(GOOD, max_restarts=validate.MAX_RESTARTS_MAX + 1),
    replace(GOOD, gpus=1, gpu_types=("t",) * (validate.GPU_TYPES_MAX + 1)),
    replace(GOOD, gpus=1, gpu_types=("t" * (validate.GPU_TYPE_CHARACTERS_MAX + 1),)),
    replace(GOOD, working_directory="/" * (validate.PATH_BYTES_MAX + 1)),
    replace(GOOD, environment=(("A", "x" * (validate.ENVIRONMENT_BYTES_MAX - 2)),)),
    replace(GOOD, environment=(("A", ""),) * (validate.ENVIRONMENT_ENTRIES_MAX + 1)),
    replace(GOOD, environment=(("A", "\0"),)),
    replace(GOOD, run_again_exit_codes=(*CODES, 1)),
    replace(GOOD, run_again_exit_codes=(0,)),
    replace(GOOD, gpu_memory_bytes_min=-1),
    replace(GOOD, gpus=1, shared_gpu_memory_bytes=shares.SHARE_BYTES_MIN - 1),
    replace(GOOD, gpus=1, shared_gpu_memory_bytes=-GIGABYTE),
    replace(GOOD, gpus=0, shared_gpu_memory_bytes=GIGABYTE),
    replace(GOOD, gpus=2, shared_gpu_memory_bytes=GIGABYTE),
    replace(GOOD, gpus=1, ranks=2, shared_gpu_memory_bytes=GIGABYTE),
    replace(GOOD, gpus=1, deadline_unix_ms=-1),
    replace(GOOD, gpus=0, deadline_unix_ms=1),
    replace(GOOD, trainer_config_json="x" * (validate.CONFIG_BYTES_MAX + 1)),
]


@pytest.mark.parametrize("number", range(len(AT_THE_BOUND)))
def test_a_bound_is_allowed(number: int) -> None:
    assert validate.refuse_spec(AT_THE_BOUND[number]) == ""


@pytest.mark.parametrize("number", range(len(BEYOND)))
def test_beyond_a_bound_is_refused_with_a_short_sentence(number: int) -> None:
    assert 0 < len(validate.refuse_spec(BEYOND[number])) < 200


@pytest.mark.long
@given(st.builds(JobSpec, name=st.text(), project=st.text(), command=st.tuples(st.text())))
def test_any_text_is_judged(spec: JobSpec) -> None:
    assert isinstance(validate.refuse_spec(spec), str)


@given(
    st.integers(0, 4),
    st.integers(0, 200),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 200)), max_size=3),
)
def test_what_no_node_could_run_is_refused_and_nothing_else(
    gpus: int, memory: int, nodes: list[tuple[int, int]]
) -> None:
    fleet = [
        (HostFacts(memory_bytes=size * GIGABYTE), (GpuFacts("g", "H100", GIGABYTE),) * count)
        for count, size in nodes
    ]
    spec = replace(GOOD, gpus=gpus, memory_bytes=memory * GIGABYTE)
    possible = not nodes or any(count >= gpus and size >= memory for count, size in nodes)
    assert (validate.refuse_fleet(spec, fleet) == "") == possible


def test_a_fleet_without_gpus_is_no_reason_to_ask_for_fewer() -> None:
    said = validate.refuse_fleet(replace(GOOD, gpus=2), [(HostFacts(), ())])
    assert said.startswith("needs 2 GPUs, and no node has a GPU that its agent can read")
    assert validate.refuse_fleet(replace(GOOD, gpus=0), [(HostFacts(), ())]) == ""
