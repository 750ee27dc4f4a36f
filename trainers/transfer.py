"""Transfer learning: ``python -m trainers.transfer --config FILE``.

A pre-trained backbone (any folder or hub id that transformers opens as a model of images or text),
frozen, and a new head, trained on a user's labelled data. The same configuration with
``"backbone": "random"``, or with ``"freeze": false`` as well, gives the two baselines that prove
that something was transferred: an untrained frozen backbone, and training from scratch.

Of several ranks each has a frozen backbone whole, and makes the features of the samples that fall
to it; the head, or all layers where they are trained, is spread over them as ``finetune``'s model.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trainers import start
from trainers.configuration import Allowed, LoopOptions

if TYPE_CHECKING:
    from trainers.loop import Task

BACKBONES = ("pretrained", "random")


@dataclass(frozen=True, kw_only=True)
class TransferOptions(LoopOptions):
    """Train a new head on a frozen pre-trained backbone."""

    model: str
    """Folder (relative to the configuration file) or hub id."""

    train_data: str
    """A .npz with arrays, or a .csv or .jsonl with columns."""

    evaluation_data: str
    """The same for evaluation: labelled samples that are not trained on."""

    sample_column: str = "x"
    """Array or column of the samples: images ([n,h,w] or [n,channels,h,w]) or text."""

    label_column: str = "y"
    """Array or column of the labels; any values, numbered in sorted order."""

    backbone: Annotated[str, Allowed(words=BACKBONES)] = "pretrained"
    """pretrained, or random: only the architecture is taken from ``model``."""

    freeze: bool = True
    """Train the head alone. False trains all layers."""

    head_hidden: Annotated[int, Allowed(least=0)] = 0
    """Width of a hidden layer in the head; 0 for a linear head."""

    pixel_mean: float = 0.0
    """Subtracted from pixels, after integers were divided by ``pixel_scale``."""

    pixel_deviation: Annotated[float, Allowed(above=0)] = 1.0
    """Pixels are divided by it, after the mean was subtracted."""

    pixel_scale: Annotated[float, Allowed(above=0)] = 255.0
    """What integer pixels are divided by: their largest value. Other pixels are left alone."""

    feature_cache_bytes: Annotated[int, Allowed(least=0)] = 1 << 30
    """Memory, on the GPU where there is one, for what a frozen backbone makes of the samples, so
    that each is looked at once: 350,000 samples of 768 numbers in the default of 1 GiB. 0 for
    none."""

    text_tokens_max: Annotated[int, Allowed(least=1)] = 256
    """Longer texts are cut, as the model's positions demand."""


def import_builder() -> "Callable[[TransferOptions, Path], Task]":
    """The slow imports."""
    from trainers.classify import build

    return build


if __name__ == "__main__":
    start.leave(start.run(TransferOptions, import_builder, sys.argv[1:]))
