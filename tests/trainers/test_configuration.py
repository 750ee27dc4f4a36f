"""A wrong configuration is answered at once, with a sentence that says what to change."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainers import configuration
from trainers.finetune import FinetuneOptions
from trainers.transfer import TransferOptions

MINIMAL = {"model": "m", "train_data": "d", "steps": 1}


def refusal(**values: Any) -> str:
    with pytest.raises(configuration.ConfigurationError) as error:
        configuration.build(FinetuneOptions, {**MINIMAL, **values}, source="job.json")
    return str(error.value)


def test_an_unknown_key_names_the_nearest_right_one() -> None:
    assert refusal(learning_rat=0.1) == (
        "job.json: unknown key 'learning_rat'; did you mean 'learning_rate'?"
    )
    assert "known keys: steps, batch_size" in refusal(zzzzzz=1)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 0}, "'steps' must be a whole number of at least 1, not 0"),
        ({"steps": "many"}, "'steps' must be a whole number of at least 1, not 'many'"),
        ({"steps": True}, "'steps' must be a whole number of at least 1, not true"),
        ({"schedule": "cosin"}, "'schedule' must be one of cosine, linear, constant, not 'cosin'"),
        ({"held_out_ratio": 1.0}, "'held_out_ratio' must be a number above 0 and below 1, not 1.0"),
        ({"clip_norm": float("nan")}, "'clip_norm' must be a number of at least 0, not nan"),
        ({"precision": "float8"}, "'precision' must be one of float32, bfloat16, float16, not"),
        (
            {"early_stop_patience": -1},
            "'early_stop_patience' must be a whole number of at least 0, not -1",
        ),
        ({"prefetch_depth": 0}, "a whole number of at least 1 and at most 8, not 0"),
        ({"window_tokens": 1}, "'window_tokens' must be a whole number of at least 2, not 1"),
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(**values)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(configuration.ConfigurationError) as error:
        configuration.build(TransferOptions, {"steps": 5, "mode": "m"}, source="job.json")
    assert str(error.value) == (
        "job.json: unknown key 'mode'; did you mean 'model'?; 'model' is missing; "
        "'train_data' is missing; 'evaluation_data' is missing"
    )


def test_json_and_toml_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({**MINIMAL, "learning_rate": 1}))
    (tmp_path / "job.toml").write_text(
        'model = "m"\ntrain_data = "d"\nsteps = 1\nlearning_rate = 1\n'
    )
    read = [
        configuration.load(FinetuneOptions, tmp_path / name) for name in ("job.json", "job.toml")
    ]
    assert read[0] == read[1]
    assert read[0].learning_rate == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("job.json", "{", "is not JSON"),
        ("job.toml", "= 1", "is not TOML"),
        ("job.json", "[]", "must hold one object"),
        ("absent.json", None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read(
    name: str, content: str | None, sentence: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(configuration.ConfigurationError, match=sentence):
        configuration.load(FinetuneOptions, tmp_path / name)


def test_paths_are_relative_to_the_file_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert configuration.resolve("model", tmp_path) == str(tmp_path / "model")
    assert configuration.resolve("openai-community/gpt2", tmp_path) == "openai-community/gpt2"
    assert configuration.resolve("", tmp_path) == ""


@pytest.mark.parametrize("module", ["trainers.finetune", "trainers.transfer"])
def test_the_command_refuses_before_the_slow_imports(module: str, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"stepz": 3}')
    program = (
        "import os, runpy, sys\n"
        "os._exit = sys.exit\n"
        f"sys.argv = ['x', '--config', {str(tmp_path / 'job.json')!r}]\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as leaving:\n"
        "    print(leaving.code, 'torch' in sys.modules)\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment.pop("BATON_SOCKET", None)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["2", "False"]
    assert "unknown key 'stepz'; did you mean 'steps'?" in done.stderr
