"""`baton fit`: what is read of a model's folder, what is asked, and how an answer is shown."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.cli import fit, model_folder
from coordinator.cli.values import JobSpec, ModelFacts
from protos.baton.v1 import jobs_pb2
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator, Refusal

LLAMA = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "intermediate_size": 160,
    "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
}  # fmt: skip
GPT2 = {"n_embd": 768, "n_layer": 12, "vocab_size": 50_257, "n_positions": 1024, "n_head": 12}

ANSWER = jobs_pb2.FitJobResponse(
    fits=[
        jobs_pb2.Fit(
            gpu_type="NVIDIA A100-SXM4-80GB", memory_bytes=80 * 2**30, gpus=0, gpus_of_job=1,
            speed_why="unknown: nothing has run on it", memory_why="unknown: no folder",
            unsuited="none of them takes work at present",
        ),
        jobs_pb2.Fit(
            gpu_type="NVIDIA H100 80GB HBM3", memory_bytes=85 * 10**9, gpus=8, gpus_of_job=2,
            speed=jobs_pb2.FitSpeed(
                steps_per_second=2.04, steps_per_second_low=1.5, steps_per_second_high=2.75
            ),
            speed_why="estimated from facts", fitting=jobs_pb2.FITTING_ACCUMULATES,
            memory_why="fits with gradient accumulation: 4 of 8 samples at once",
            memory_needed_bytes=70 * 10**9, samples_at_once=4, tokens_per_step=8192,
            usd_per_hour=7.98, usd_per_million_tokens=0.1327, duration_seconds=4900,
        ),
    ],
    prices_source="a provider 2026-09-20",
)  # fmt: skip

HEADINGS = ["GPU", "GPUS", "MEMORY", "STEPS/S", "TOKENS/S", "$/H", "$/M TOKENS", "TIME"]
NOT_KNOWN = ["NVIDIA A100-SXM4-80GB", "1 of 0", *6 * "-"]
KNOWN = [
    *("NVIDIA H100 80GB HBM3", "2 of 8", "accumulates", "2.0 (1.5 to 2.8)"),
    *("17,000 (12,000 to 23,000)", "7.98", "0.13", "1h21m"),
]
SENTENCES = """\
NVIDIA A100-SXM4-80GB: unknown: no folder
NVIDIA A100-SXM4-80GB: unknown: nothing has run on it
NVIDIA A100-SXM4-80GB: none of them takes work at present
NVIDIA H100 80GB HBM3: fits with gradient accumulation: 4 of 8 samples at once
NVIDIA H100 80GB HBM3: estimated from facts
prices that --price does not give: a provider 2026-09-20
"""


def test_why_memory_is_not_known_is_not_said_again_of_speed(
    baton: Baton, fake: FakeCoordinator, tmp_path: Path
) -> None:
    why = "unknown: a command does not say how much work a step is"
    more = f"{why}, and no job like it has run in this project yet"
    fits = [jobs_pb2.Fit(gpu_type="H100", memory_why=why, speed_why=more)]
    fake.answers["FitJob"] = [jobs_pb2.FitJobResponse(fits=fits)]
    _, _, *below = baton("fit", job_file(tmp_path, 'command = ["x"]\n')).stdout.splitlines()
    assert below == [f"H100: {more}"]


def folder(tmp_path: Path, config: dict[str, Any], shapes: dict[str, list[int]] | None) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config), "utf-8")
    if shapes is not None:
        head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        head |= {name: {"dtype": "F32", "shape": shape} for name, shape in shapes.items()}
        told = json.dumps(head).encode()
        (made / "model.safetensors").write_bytes(struct.pack("<Q", len(told)) + told)
    return made


def job_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "job.toml"
    path.write_text(text, "utf-8")
    return str(path)


def test_dimensions_alone(tmp_path: Path) -> None:
    found = model_folder.read(folder(tmp_path, GPT2, None))
    assert (found.hidden, found.layers, found.intermediate) == (768, 12, 3072)
    assert (found.gated, found.tied) == (False, True)
    # 124,439,808 in truth: norms and biases are a thousandth.
    assert found.parameters == pytest.approx(124_439_808, rel=0.002)


def test_shapes_are_counted(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": [100, 64], "lm_head.weight": [100, 64]}
    shapes["model.layers.0.mlp.gate_proj.weight"] = [160, 64]
    found = model_folder.read(folder(tmp_path, LLAMA, shapes))
    assert found == ModelFacts(
        parameters=6400 + 6400 + 160 * 64, layers=2, hidden=64, intermediate=160, vocabulary=100,
        gated=True, tied=False,
    )  # fmt: skip


def test_a_model_within_another_and_one_without_files(tmp_path: Path) -> None:
    found = model_folder.read(folder(tmp_path, {"text_config": LLAMA}, None))
    attention, mlp = 3 * 64 * 64, 3 * 64 * 160
    assert found.parameters == 2 * 100 * 64 + 2 * (attention + mlp)
    assert (found.gated, found.tied) == (True, False)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ('{"n_layer": 2}', "its config.json does not say hidden and intermediate and vocabulary"),
        ("[]", "its config.json is no table"),
        ("{", "Expecting property name"),
    ],
)
def test_what_cannot_be_known_says_why(tmp_path: Path, config: str, why: str) -> None:
    made = folder(tmp_path, {}, None)
    (made / "config.json").write_text(config, "utf-8")
    told = json.dumps({"model": "model"})
    spec = JobSpec(trainer="lora", trainer_config_json=told, working_directory=str(tmp_path))
    found = model_folder.of_job(spec)
    assert isinstance(found, str)
    assert found.startswith(f"the size of model 'model' is not known: {why}")


def test_a_torn_file_is_said(tmp_path: Path) -> None:
    made = folder(tmp_path, GPT2, None)
    (made / "model.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        model_folder.read(made)


def test_a_name_that_is_no_folder(tmp_path: Path) -> None:
    spec = JobSpec(trainer="lora", trainer_config_json='{"model": "org/name"}')
    assert model_folder.of_job(spec) == (
        "model 'org/name' is no folder here, so its size is not known"
    )
    assert "names no model" in str(model_folder.of_job(JobSpec(trainer="lora")))


def test_what_is_asked(baton: Baton, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.answers["FitJob"] = [ANSWER]
    folder(tmp_path, GPT2, None)
    text = f'trainer = "finetune"\ngpus = 1\nworkdir = "{tmp_path}"\n[config]\nmodel = "model"\n'
    result = baton("fit", job_file(tmp_path, text), "--price", "H100=2.5", "--price", "RTX 4090=0")
    assert result.exit_code == 0, result.stderr
    (asked,) = fake.requests
    assert asked.spec.trainer == "finetune"
    assert (asked.model.layers, asked.model.vocabulary) == (12, 50_257)
    assert asked.usd_per_gpu_hour == {"H100": 2.5, "RTX 4090": 0}
    assert asked.model_why == ""


def test_a_command_has_no_model(baton: Baton, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.answers["FitJob"] = [ANSWER]
    assert baton("fit", job_file(tmp_path, 'command = ["true"]')).exit_code == 0
    (asked,) = fake.requests
    assert not asked.HasField("model")


def test_the_table_in_a_pipe(baton: Baton, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.answers["FitJob"] = [ANSWER]
    result = baton("fit", job_file(tmp_path, 'command = ["true"]'))
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    table = [re.split(r"\s{2,}", line.strip()) for line in lines[:3]]
    assert table == [HEADINGS, NOT_KNOWN, KNOWN]
    assert lines[3:] == SENTENCES.splitlines()


def test_the_document(baton: Baton, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.answers["FitJob"] = [ANSWER]
    document = json.loads(baton("fit", job_file(tmp_path, 'command = ["true"]'), "--json").stdout)
    unknown, known = document["fits"]
    assert unknown["speed"] is None
    assert unknown["fitting"] is None
    assert unknown["usd_per_hour"] is None
    assert known["fitting"] == "accumulates"
    assert known["speed"]["steps_per_second_low"] == 1.5
    assert (known["samples_at_once"], known["tokens_per_step"]) == (4, 8192)
    assert document["prices_source"] == "a provider 2026-09-20"


def test_a_fleet_without_gpus(baton: Baton, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.answers["FitJob"] = [jobs_pb2.FitJobResponse()]
    result = baton("fit", job_file(tmp_path, 'command = ["true"]'))
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == (
        "baton: no node with a GPU has joined yet; start baton-agent on a machine\n"
    )


@pytest.mark.parametrize("price", ["H100", "=2", "H100=cheap", "H100=-1", "H100=inf", "H100=nan"])
def test_what_is_no_price(baton: Baton, tmp_path: Path, price: str) -> None:
    result = baton("fit", job_file(tmp_path, 'command = ["true"]'), "--price", price)
    assert result.exit_code == 2
    assert "is not a name and dollars an hour, like H100=2.50" in result.stderr


def test_a_refusal_is_the_coordinators(baton: Baton, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.answers["FitJob"] = [Refusal(grpc.StatusCode.INVALID_ARGUMENT, "gpus is too many")]
    result = baton("fit", job_file(tmp_path, 'command = ["true"]'))
    assert (result.exit_code, result.stderr) == (1, "baton: gpus is too many\n")
    assert baton("fit", str(tmp_path / "none.toml")).exit_code == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.00123, "0.0012"), (0.0996, "0.10"), (2.04, "2.0"), (9.96, "10"), (1234, "1,200")],
)
def test_two_digits(value: float, shown: str) -> None:
    assert fit.number(value) == shown
