"""A trainer's configuration is refused at submission as the trainer itself would refuse it."""

import dataclasses
import json
from typing import Any, get_origin

import pytest

from coordinator.core import trainer_keys
from coordinator.core.model import JobSpec
from coordinator.core.trainer_keys import Key
from trainers import configuration
from trainers.configuration import LoopOptions
from trainers.finetune import FinetuneOptions
from trainers.lora import LoraOptions
from trainers.transfer import TransferOptions

KINDS: dict[str, type[LoopOptions]] = {
    "finetune": FinetuneOptions,
    "lora": LoraOptions,
    "transfer": TransferOptions,
}
MINIMAL = {"steps": 10, "model": "m", "train_data": "d", "evaluation_data": "e"}
# Around every bound that there is, and of every type.
VALUES: list[Any] = [
    -2, -1, -1.0, -0.5, 0, 0.5, 1, 1.0, 2, 8, 9, 10**30, float("nan"), float("inf"), "five", "",
    "1", "linear", "random", "bfloat16", "float16", True, False, None, [], ["a"], [1], {"a": 1},
    [[["x"]]],
]  # fmt: skip


def spec(trainer: str, **changed: Any) -> JobSpec:
    config = json.dumps({**MINIMAL, **changed})
    return JobSpec(trainer=trainer, trainer_config_json=config, gpus=1)


@pytest.mark.parametrize("trainer", KINDS)
def test_the_keys_are_those_of_the_trainers(trainer: str) -> None:
    """Where this fails, `trainers/` has changed: what it has now belongs into `trainer_keys`."""
    kind = KINDS[trainer]
    needed = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    theirs = {
        name: Key(
            get_origin(typed) or typed, **dataclasses.asdict(allowed), required=name in needed
        )
        for name, (typed, allowed) in configuration.keys(kind).items()
    }
    assert theirs == trainer_keys.KEYS[trainer]


@pytest.mark.long
@pytest.mark.parametrize("trainer", KINDS)
def test_what_is_refused_is_what_the_trainer_refuses_in_the_same_words(trainer: str) -> None:
    to = {} if trainer == "transfer" else {"output_directory": "o"}
    for name in trainer_keys.KEYS[trainer]:
        for value in VALUES:
            given, theirs = {**MINIMAL, **to, name: value}, ""
            try:
                configuration.build(KINDS[trainer], given, source="the trainer's configuration")
            except configuration.ConfigurationError as error:
                theirs = str(error)
            assert trainer_keys.refuse(spec(trainer, **given)) == theirs


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"steps": "five"}, "'steps' must be a whole number of at least 1, not 'five'"),
        ({"learning_rate": -1}, "'learning_rate' must be a number of at least 0, not -1"),
        ({"model": {"name": "m"}}, "'model' must be a text, not {'name': 'm'}"),
        ({"schedule": "x"}, "'schedule' must be one of cosine, linear, constant, not 'x'"),
        ({"held_out_ratio": 1}, "'held_out_ratio' must be a number above 0 and below 1, not 1"),
        ({"compile": None}, "'compile' must be true or false, not null"),
        ({"steps": True}, "'steps' must be a whole number of at least 1, not true"),
        ({"target_modules": [True]}, "'target_modules' must be a list of words, not [true]"),
        ({"merge": True}, "'merge' needs an 'output_directory' to write the model to"),
        ({"steps": "1" * 999, "seed": -1}, "'seed' must be a whole number of at least 0, not -1"),
    ],
)
def test_the_sentence_names_the_key_what_was_given_and_what_is_expected(
    changed: dict[str, Any], sentence: str
) -> None:
    said = trainer_keys.refuse(spec("lora", **changed))
    assert said.startswith("the trainer's configuration: ")
    assert sentence in said
    assert len(said) < 250


@pytest.mark.parametrize(
    ("array", "key", "value", "sentence"),
    [
        ("0-9", "seed", "{index}", ""),
        ("0-9", "batch_size", "{index}", "must be a whole number of at least 1, not 0"),
        ("1-9", "prefetch_depth", "{index}", "whole number of at least 1 and at most 8, not 9"),
        ("0-9", "learning_rate", "0.{index}", "must be a number of at least 0, not '0.0'"),
        ("", "seed", "{index}", "{index} stands for a trial's number, with --array alone; 'seed'"),
        ("", "model", "{index}", ""),
    ],
)  # fmt: skip
def test_an_array_is_judged_by_what_its_trials_are_started_with(
    array: str, key: str, value: str, sentence: str
) -> None:
    said = trainer_keys.refuse(dataclasses.replace(spec("finetune", **{key: value}), array=array))
    assert sentence in said
    assert bool(said) == bool(sentence)


@pytest.mark.parametrize("config", ["[]", "{", "5", "[" * 60_000])
def test_what_is_no_table_of_keys_is_refused(config: str) -> None:
    wanted = JobSpec(trainer="lora", trainer_config_json=config, gpus=1)
    assert "is no table of keys and values in JSON" in trainer_keys.refuse(wanted)


@pytest.mark.parametrize(
    ("config", "lacking"),
    [
        ("", "'steps', 'model', 'train_data', 'evaluation_data'"),
        ('{"model": "m", "train_data": "d", "evaluation_data": "d"}', "'steps'"),
    ],
)
def test_what_a_trainer_cannot_start_without_is_asked_for_before_the_queue(
    config: str, lacking: str
) -> None:
    wanted = JobSpec(trainer="transfer", trainer_config_json=config, gpus=1)
    assert trainer_keys.refuse(wanted) == f"the trainer's configuration lacks {lacking}"
