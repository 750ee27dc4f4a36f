"""A job that shares its GPU hands its part to torch before anything is on the GPU.

The part itself is torch's to keep; here it is counted who tells it, when, and how much.
"""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

import baton_hook.trainer
import baton_sdk
from tests.trainers import tasks
from trainers import loop, ranks, sharing

Calls = list[tuple[str, float]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A machine with a GPU that nothing can be put on: what was asked of it, in order."""
    made: Calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda ratio: made.append(("limit", ratio))
    )

    def device(_: ranks.World) -> torch.device:
        made.append(("device", 0.0))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return torch.device("cpu")

    monkeypatch.setattr(ranks.World, "device", device)
    return made


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"BATON_GPU_MEMORY_RATIO": "0.2500"}, [("limit", 0.25), ("device", 0.0)]),
        ({"BATON_GPU_MEMORY_RATIO": "1.0000"}, [("device", 0.0)]),
        ({}, [("device", 0.0)]),
    ],
)
def test_the_loop_limits_itself_first(
    environment: dict[str, str], expected: Calls, calls: Calls
) -> None:
    trainer = loop.Trainer(tasks.finetune_task(), tasks.OPTIONS, baton_sdk.Session(environment))
    trainer.prepare()
    assert calls == expected


def test_without_a_gpu_there_is_nothing_to_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", pytest.fail)
    sharing.keep_to(0.25)


@pytest.mark.parametrize("ratio", ["0.2500", ""])
def test_the_hook_limits_before_trainer_puts_the_model_there(
    ratio: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer:
        def __init__(self, word: str) -> None:
            calls.append((word, 0.0))

        def train(self) -> None: ...

    module: Any = ModuleType("transformers.trainer")
    module.Trainer = Trainer
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setenv("BATON_GPU_MEMORY_RATIO", ratio)
    baton_hook.trainer.install(module)
    module.Trainer("model")
    assert calls == ([("limit", 0.25)] if ratio else []) + [("model", 0.0)]


@pytest.mark.parametrize(
    ("given", "cuda", "seen", "warns"),
    [
        ("GPU-1", "13.0", False, True),
        ("GPU-1", "13.0", True, False),
        ("GPU-1", None, False, False),  # this torch has none to lose: the stand-in's GPUs
        ("", "13.0", False, False),
    ],
)
def test_a_gpu_that_was_given_and_is_not_seen_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: str,
    cuda: str | None,
    *,
    seen: bool,
    warns: bool,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(ranks.World, "device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    tasks.trainer(tasks.finetune_task()).prepare()
    assert ("CUDA_VISIBLE_DEVICES is GPU-1" in capsys.readouterr().out) == warns
