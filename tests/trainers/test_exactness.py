"""A restart says how exact it is, and why: a pure comparison of two fingerprints."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.trainers import tasks
from trainers import exactness
from trainers.exactness import Fingerprint, Level

CPU = Fingerprint(
    torch="2.13.0+cpu",
    cuda="",
    numpy="2.4.6",
    device="a processor",
    world_size=1,
    precision="float32",
    deterministic=False,
    tf32=False,
    threads=1,
    global_batch=8,
    micro_batch=4,
    data_seed=1,
)
CHOICES: dict[str, Any] = {
    "world_size": 1,
    "precision": "float32",
    "global_batch": 8,
    "micro_batch": 4,
    "data_seed": 1,
}
GPU = replace(CPU, torch="2.13.0+cu130", cuda="13.0", device="NVIDIA H200", deterministic=True)


@pytest.mark.parametrize("same", [CPU, GPU, replace(GPU, world_size=4)])
def test_the_same_place_is_bitwise(same: Fingerprint) -> None:
    verdict = exactness.level(same, same)
    assert verdict.level is Level.E0
    assert same.device in verdict.why


@pytest.mark.parametrize(
    ("change", "expected", "why"),
    [
        ({"device": "NVIDIA A100"}, Level.E1, "the device was NVIDIA H200 and is NVIDIA A100"),
        ({"world_size": 2}, Level.E1, "the number of ranks was 1 and is 2"),
        ({"micro_batch": 2}, Level.E1, "the number of samples at once was 4 and is 2"),
        ({"torch": "2.14.0"}, Level.E1, "torch was 2.13.0+cu130 and is 2.14.0"),
        ({"cuda": "13.1"}, Level.E1, "CUDA was 13.0 and is 13.1"),
        ({"numpy": "3.0"}, Level.E1, "numpy was 2.4.6 and is 3.0"),
        (
            {"deterministic": False},
            Level.E1,
            "the choice of deterministic algorithms was on and is off",
        ),
        ({"tf32": True}, Level.E1, "the use of TF32 was off and is on"),
        ({"compiler": "triton 3.6"}, Level.E1, "the compiler was none and is triton 3.6"),
        ({"precision": "bfloat16"}, Level.E2, "the precision was float32 and is bfloat16"),
        ({"global_batch": 16}, Level.E2, "the global batch was 8 and is 16"),
        ({"data_seed": 2}, Level.E2, "the seed of the data order was 1 and is 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_change_has_its_level_and_its_sentence(
    change: dict[str, Any], expected: Level, why: str
) -> None:
    verdict = exactness.level(GPU, replace(GPU, **change))
    assert (verdict.level, verdict.why) == (expected, why)


def test_every_field_of_the_fingerprint_counts() -> None:
    """A field that no comparison looks at would be a promise that nobody keeps."""
    for name, value in CPU.document().items():
        changed: Any = {bool: True, int: 99, str: "other"}[type(value)]
        assert exactness.level(CPU, replace(CPU, **{name: changed})).level is not Level.E0, name


def test_threads_split_sums_on_a_processor_only() -> None:
    assert exactness.level(CPU, replace(CPU, threads=2)).why == (
        "the number of threads was 1 and is 2"
    )
    assert exactness.level(GPU, replace(GPU, threads=2)).level is Level.E0


def test_a_gpu_without_deterministic_algorithms_promises_no_bits() -> None:
    loose = replace(GPU, deterministic=False)
    verdict = exactness.level(loose, loose)
    assert verdict.level is Level.E1
    assert "deterministic algorithms are off" in verdict.why


def test_from_a_processor_to_a_gpu_is_exact_in_state_and_samples() -> None:
    verdict = exactness.level(CPU, GPU)
    assert verdict.level is Level.E1
    assert "the device was a processor and is NVIDIA H200" in verdict.why
    assert "CUDA was none and is 13.0" in verdict.why


def test_steps_count_more_than_rounding() -> None:
    moved = replace(GPU, device="NVIDIA A100", global_batch=16)
    assert exactness.level(GPU, moved).level is Level.E2


def test_a_checkpoint_without_a_fingerprint_promises_steps_only() -> None:
    assert exactness.level(None, CPU).level is Level.E2


def test_this_process_has_a_fingerprint_that_survives_json() -> None:
    now = exactness.current(torch.device("cpu"), **CHOICES)
    assert (now.torch, now.cuda, now.threads) == (torch.__version__, "", torch.get_num_threads())
    assert now.device
    assert exactness.parse(json.loads(json.dumps(now.document()))) == now
    torch.use_deterministic_algorithms(True)
    try:
        assert exactness.current(torch.device("cpu"), **CHOICES).deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_strange_fingerprint_is_refused_by_name() -> None:
    document = CPU.document()
    with pytest.raises(ValueError, match="moon"):
        exactness.parse({**document, "moon": "full"})
    with pytest.raises(ValueError, match="'threads'"):
        exactness.parse({**document, "threads": "1"})
    del document["torch"]
    with pytest.raises(ValueError, match="torch"):
        exactness.parse(document)


def test_a_processor_without_a_name_has_its_architecture(tmp_path: Path) -> None:
    assert exactness.cpu_model(tmp_path / "nothing")
    description = tmp_path / "cpuinfo"
    description.write_text("processor : 0\nmodel name\t: Abacus 9\n")
    assert exactness.cpu_model(description) == "Abacus 9"


def test_compiled_steps_are_bitwise_on_a_cpu_alone() -> None:
    on_cpu = replace(CPU, compiler="g++ 13.2.0")
    assert exactness.level(on_cpu, on_cpu).level is Level.E0
    on_gpu = replace(GPU, compiler="triton 3.6")
    verdict = exactness.level(on_gpu, on_gpu)
    assert verdict == exactness.Verdict(Level.E1, "triton 3.6 picks its kernels by their time")


MADE_OF = replace(CPU, libraries={"transformers": "5.23.0"})


@pytest.mark.parametrize(
    ("libraries", "why"),
    [
        ({"transformers": "5.24.0"}, "transformers was 5.23.0 and is 5.24.0"),
        ({"peft": "0.19.1", "transformers": "5.23.0"}, "peft was none and is 0.19.1"),
        ({}, "transformers was 5.23.0 and is none"),
    ],
)
def test_the_libraries_of_a_model_decide_its_bits(libraries: dict[str, str], why: str) -> None:
    assert exactness.level(MADE_OF, MADE_OF).level is Level.E0
    verdict = exactness.level(MADE_OF, replace(CPU, libraries=libraries))
    assert verdict == exactness.Verdict(Level.E1, why)


def test_a_checkpoint_that_names_no_libraries_is_not_called_bitwise() -> None:
    """One from before they were written down; a model of torch alone has none."""
    verdict = exactness.level(CPU, replace(CPU, libraries={"peft": "1", "transformers": "5"}))
    assert verdict.level is Level.E1
    assert verdict.why == (
        "the checkpoint does not say whether it was written with peft 1 and transformers 5"
    )
    assert exactness.level(CPU, replace(CPU, libraries={})).level is Level.E0


def test_the_libraries_of_a_model_are_those_of_its_code() -> None:
    """Whatever else the process has imported."""
    own = {"transformers": transformers.__version__}
    assert exactness.libraries_of(torch.nn.Sequential(torch.nn.Linear(2, 2))) == {}
    assert exactness.libraries_of(tasks.finetune_task().model) == own
    with_adapters = exactness.libraries_of(tasks.lora_task().model)
    assert with_adapters == {**own, "peft": peft.__version__}


@pytest.mark.parametrize("libraries", [[], {"transformers": 5}, "transformers"])
def test_strange_libraries_are_refused(libraries: object) -> None:
    with pytest.raises(ValueError, match="libraries"):
        exactness.parse(CPU.document(), libraries)


def test_older_programs_read_the_document_as_ever() -> None:
    """They refuse a word that they do not know."""
    assert MADE_OF.document() == CPU.document()
    assert exactness.parse(MADE_OF.document(), {"transformers": "5.23.0"}) == MADE_OF


def test_a_document_from_before_there_were_compilers_reads_as_ever() -> None:
    assert "compiler" not in CPU.document()
    assert exactness.parse(CPU.document()) == CPU
    compiled = replace(CPU, compiler="g++ 13.2.0")
    assert exactness.parse(compiled.document()) == compiled
