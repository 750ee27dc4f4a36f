"""The whole state survives a checkpoint, and the loss of any one component of it is noticed.

Losses prove little: running statistics that were forgotten leave every loss of a training equal. So
``whole_state`` lists every value that decides anything, read from the live objects and not through
the code under test, and two trainings are equal when all of these are. The training here has one of
everything: frozen and trained parameters, buffers, an optimizer with moments and step counters,
schedulers of torch, a gradient scaler, an average of the weights, every kind of random generator,
and values of the user's.

The matrix takes one entry after another out of a checkpoint. Each must be refused or show up as a
difference; the process that resumes was built with other values everywhere, so that nothing is
right by chance.
"""

import copy
import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from trainers import checkpoint, extra, order

STEPS_BEFORE, STEPS_AFTER = 3, 4
SAMPLES = 19
Path_ = tuple[str | int, ...]


class UserValues:
    """Counters and tables of a user's script."""

    def __init__(self, offset: int) -> None:
        self.values: dict[str, Any] = {
            "seen": 10 * offset,
            "name": f"run {offset}",
            "best": float("inf") if offset == 0 else 1.0,
            "pair": (offset, "x"),
            "by_class": {offset: 1},
            "$odd": offset,
            "table": torch.full((2, 2), float(offset)),
            "nested": [{"deep": torch.tensor(offset)}],
        }

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values.update(state)


class Training:
    """One of everything. Two of different ``variant`` agree in shapes and names only."""

    def __init__(self, variant: int = 0) -> None:
        torch.manual_seed(100 + variant)
        numpy.random.seed(100 + variant)
        random.seed(100 + variant)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(5, 6),
            torch.nn.BatchNorm1d(6),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(6, 2),
        )
        self.model[0].requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": trained[:2], "lr": 0.02 + variant},
                {"params": trained[2:], "weight_decay": 0.1 + variant},
            ],
            lr=0.01 + variant,
            betas=(0.8 + 0.05 * variant, 0.9 + 0.05 * variant),
            eps=1e-8 * (1 + variant),
            weight_decay=0.01 + variant,
            amsgrad=True,
        )
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(
            self.optimizer, milestones=[2 + variant, 5], gamma=0.5 + variant
        )
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=0.5 / (1 + variant), patience=variant
        )
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0 ** (4 + variant), growth_interval=2 + variant
        )
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.torch_generator = torch.Generator().manual_seed(variant)
        self.numpy_generator = numpy.random.Generator(numpy.random.Philox(variant))
        self.python_generator = random.Random(variant)
        self.user = UserValues(variant)
        self.samples = variant
        self.losses: list[float] = []

    def objects(self) -> dict[str, extra.Object]:
        return {
            "scheduler": self.scheduler,
            "plateau": self.plateau,
            "scaler": self.scaler,
            "average": self.average,
            "torch_generator": self.torch_generator,
            "numpy_generator": self.numpy_generator,
            "python_generator": self.python_generator,
            "user": self.user,
        }

    def advance(self, steps: int) -> None:
        """Each step draws once from every generator: an odd number, so that the second of a pair of
        normal numbers is always waiting in those that make two at once."""
        for _ in range(steps):
            positions = range(self.samples, self.samples + 4)
            chosen = [order.sample_at(position, SAMPLES, 1) for position in positions]
            x = torch.stack([torch.linspace(0, 1, 5) * (1 + sample) for sample in chosen])
            x = x + torch.rand(4, 5, generator=self.torch_generator)
            noise = self.numpy_generator.normal() + self.python_generator.gauss(0, 1)
            noise += numpy.random.standard_normal() + random.gauss(0, 1)
            self.optimizer.zero_grad()
            loss = (self.model(x) ** 2).mean() * (1 + 0.01 * noise)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.plateau.step(float(loss.detach()))
            self.average.update_parameters(self.model)
            self.user.values["seen"] += 1
            self.user.values["by_class"][chosen[0]] = self.samples
            self.samples += 4
            self.losses.append(float(loss.detach()))

    def capture(self) -> checkpoint.Snapshot:
        progress = {"samples": self.samples}
        return checkpoint.copied(
            checkpoint.live(self.model, self.optimizer, progress, self.objects())
        )

    def restore(self, snapshot: checkpoint.Snapshot) -> None:
        progress = checkpoint.restore(snapshot, self.model, self.optimizer, self.objects())
        self.samples = progress["samples"]


def whole_state(training: Training) -> dict[str, Any]:
    """Every value by its name, read from the live objects."""
    stored = training.optimizer.state_dict()["state"]
    parts = {
        "model": training.model.state_dict(),
        "optimizer": {index: dict(sorted(stored[index].items())) for index in sorted(stored)},
        "groups": training.optimizer.state_dict()["param_groups"],
        "scheduler": training.scheduler.state_dict(),
        "plateau": training.plateau.state_dict(),
        "scaler": training.scaler.state_dict(),
        "average": training.average.state_dict(),
        "user": training.user.values,
        "samples": training.samples,
        "torch": torch.get_rng_state(),
        "numpy": numpy.random.get_state(legacy=True),
        "python": random.getstate(),
        "torch_generator": training.torch_generator.get_state(),
        "numpy_generator": training.numpy_generator.bit_generator.state,
        "python_generator": training.python_generator.getstate(),
        "requires_grad": [p.requires_grad for p in training.model.parameters()],
    }
    return dict(leaves(parts, ""))


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Bit for bit and with its type: tensors and arrays as bytes, numbers as they print."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, (str(value.dtype), tuple(value.shape), raw)
    elif isinstance(value, numpy.ndarray):
        yield name, (str(value.dtype), value.shape, value.tobytes())
    elif isinstance(value, dict):
        yield name, (type(value).__name__, [repr(key) for key in value])
        for key, item in value.items():
            yield from leaves(item, f"{name}/{key!r}")
    elif isinstance(value, list | tuple):
        yield name, (type(value).__name__, len(value))
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}/{index}")
    else:
        yield name, repr(value)


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    return sorted(n for n in left.keys() | right.keys() if left.get(n) != right.get(n))


@functools.cache
def _saved() -> tuple[checkpoint.Snapshot, dict[str, Any]]:
    training = Training()
    training.advance(STEPS_BEFORE)
    return training.capture(), whole_state(training)


def saved() -> tuple[checkpoint.Snapshot, dict[str, Any]]:
    """A checkpoint to take apart, and the state that it must bring back."""
    snapshot, state = _saved()
    return copy.deepcopy(snapshot), state


def other_training() -> Training:
    """What resumes: everything in it has another value."""
    training = Training(variant=1)
    training.advance(2)
    for holder in (
        *training.optimizer.param_groups,
        training.scheduler.__dict__,
        training.plateau.__dict__,
    ):
        for key, value in holder.items():
            if isinstance(value, bool) or value is None:
                holder[key] = not value
            elif isinstance(value, str):
                holder[key] = "max" if key == "mode" else f"other than {value}"
            elif isinstance(value, int | float):
                holder[key] = value * 3 + 1
            elif key == "min_lrs":
                holder[key] = [0.5]
    return training


# --- it all comes back ----------------------------------------------------------------------------


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    straight = Training()
    straight.advance(STEPS_BEFORE)
    checkpoint.write(straight.capture(), tmp_path / "one")
    middle = whole_state(straight)
    straight.advance(STEPS_AFTER)
    expected = whole_state(straight)
    resumed = other_training()
    assert len(differences(middle, whole_state(resumed))) > 100
    resumed.restore(checkpoint.read(tmp_path / "one"))
    assert differences(middle, whole_state(resumed)) == []
    resumed.losses.clear()
    resumed.advance(STEPS_AFTER)
    assert resumed.losses == straight.losses[STEPS_BEFORE:]
    assert differences(expected, whole_state(resumed)) == []


def test_capturing_changes_nothing_and_shares_nothing() -> None:
    training = Training()
    training.advance(STEPS_BEFORE)
    before = whole_state(training)
    snapshot = training.capture()
    assert differences(before, whole_state(training)) == []
    training.advance(1)
    resumed = other_training()
    resumed.restore(snapshot)
    assert differences(before, whole_state(resumed)) == []


def test_equal_losses_prove_nothing() -> None:
    """Running statistics are used in evaluation only: a comparison of losses never misses them."""
    straight = Training()
    straight.advance(STEPS_BEFORE)
    snapshot = straight.capture()
    straight.advance(STEPS_AFTER)
    expected = whole_state(straight)
    snapshot.model["1.running_mean"].zero_()
    resumed = other_training()
    resumed.restore(snapshot)
    resumed.losses.clear()
    resumed.advance(STEPS_AFTER)
    assert resumed.losses == straight.losses[STEPS_BEFORE:]
    assert differences(expected, whole_state(resumed)) == [
        "/'average'/'module.1.running_mean'",
        "/'model'/'1.running_mean'",
    ]


# --- one component at a time ----------------------------------------------------------------------


def tensor_entries() -> list[tuple[str, str]]:
    snapshot, _ = saved()
    return [
        (part, name) for part in checkpoint.TENSOR_FILES for name in sorted(getattr(snapshot, part))
    ]


def state_entries(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path of every key and pair in a JSON document, at any depth."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
        yield from ((*path, key) for key in value)
    elif isinstance(value, list):
        items = list(enumerate(value))
        if path[-1] in ("$pairs", "$counter"):
            yield from ((*path, index) for index in range(len(value)))
    for key, item in items:
        yield from state_entries(item, (*path, key))


def state_paths() -> list[Path_]:
    """But what is looked at when the file is read, and what torch derives from another entry."""
    state = saved()[0].state
    (derived,) = (
        index
        for index, (key, _) in enumerate(state["extra"]["plateau"]["$pairs"])
        if key == "mode_worse"
    )
    elsewhere = [("format",), ("extra", "plateau", "$pairs", derived)]
    return [
        path
        for path in state_entries(state)
        if not any(path[: len(known)] == known for known in elsewhere)
    ]


def caught(snapshot: checkpoint.Snapshot, expected: dict[str, Any]) -> bool:
    """Refused, or seen by the comparison."""
    resumed = other_training()
    try:
        resumed.restore(snapshot)
    except (checkpoint.CheckpointError, LookupError, RuntimeError, TypeError, ValueError):
        return True
    return differences(expected, whole_state(resumed)) != []


def test_the_whole_checkpoint_is_not_caught() -> None:
    assert not caught(*saved())


@pytest.mark.parametrize(("part", "name"), tensor_entries())
def test_no_tensor_can_be_left_out(part: str, name: str) -> None:
    snapshot, expected = saved()
    del getattr(snapshot, part)[name]
    assert caught(snapshot, expected)


@pytest.mark.parametrize(("part", "name"), tensor_entries())
def test_no_tensor_can_have_lost_its_value(part: str, name: str) -> None:
    """One bit of it is another."""
    snapshot, expected = saved()
    tensor = getattr(snapshot, part)[name]
    flat = tensor.numpy().reshape(-1)
    flat[flat.size // 2 :].view(numpy.uint8)[0] ^= 1
    assert caught(snapshot, expected)


@pytest.mark.parametrize("path", state_paths(), ids=lambda path: "/".join(map(str, path)))
def test_no_value_can_be_left_out(path: Path_) -> None:
    snapshot, expected = saved()
    holder: Any = snapshot.state
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    assert caught(snapshot, expected)


# --- states that cannot be kept -------------------------------------------------------------------


class Holding:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def contains_itself() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (print, "extra/mine/value is a builtin_function_or_method; only tensors and plain values"),
        ({1, 2}, "extra/mine/value is a set"),
        ({(1, 2): 3}, "has a key of type tuple"),
        ({"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)}, "the path of two tensors"),
        (contains_itself(), "nested deeper than"),
    ],
    ids=["function", "set", "key", "clash", "loop"],
)
def test_what_is_neither_tensor_nor_plain_is_refused_by_its_path(value: Any, why: str) -> None:
    with pytest.raises(extra.ExtraError, match=why):
        extra.describe({"mine": Holding(value)})


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        ({"a": Holding(1)}, {}, "'a' is missing in the checkpoint"),
        ({}, {"a": Holding(1)}, "'a' is stored but not given"),
    ],
    ids=["missing", "too many"],
)
def test_other_objects_than_the_stored_ones_are_refused_and_nothing_is_changed(
    ours: dict[str, extra.Object], theirs: dict[str, extra.Object], why: str
) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snapshot = checkpoint.copied(checkpoint.live(model, optimizer, {}, theirs))
    with torch.no_grad():
        model.weight.add_(1)
    before = model.weight.clone()
    with pytest.raises(checkpoint.CheckpointError, match=why):
        checkpoint.restore(snapshot, model, optimizer, ours)
    assert torch.equal(model.weight, before)


def test_a_name_with_a_slash_is_refused() -> None:
    with pytest.raises(extra.ExtraError, match="cannot name an object"):
        extra.describe({"a/b": Holding(1)})
