"""Fine-tune all layers of a causal language model: ``python -m trainers.finetune --config FILE``.

Any folder or hub id that transformers opens as a causal language model, on a user's own text. What
is trained and measured, and why in bits per byte, stands in ``causal.py``.
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


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(LoopOptions):
    """Fine-tune all layers of a causal language model on text."""

    model: str
    """Folder (relative to the configuration file) or hub id."""

    train_data: str
    """A text file, a folder of them, a glob pattern, or .jsonl lines with ``text``."""

    evaluation_data: str = ""
    """The same for evaluation. Empty: the end of each text in ``train_data`` is held out."""

    held_out_ratio: Annotated[float, Allowed(above=0, below=1)] = 0.1
    """How much of each text is held out, when there is no ``evaluation_data``."""

    tokenizer: str = ""
    """A folder or hub id, "bytes" for UTF-8 bytes; empty for the tokenizer of the model."""

    window_tokens: Annotated[int, Allowed(least=2)] = 128
    """Length of a sample; at most what the model's positions allow."""

    evaluation_windows_max: Annotated[int, Allowed(least=2)] = 256
    """Held-out windows that are looked at: evaluation stays a small part of the time."""

    from_scratch: bool = False
    """Take only the architecture from ``model`` and start from random values."""

    start_from: str = ""
    """Folder of weights to begin with, as `baton checkpoint import` makes it: values for ``model``,
    relative to the configuration file. Step, optimizer and data begin anew. Empty: the values of
    ``model``."""

    output_directory: str = ""
    """Where the trained model is written after the last step, as a folder that transformers opens;
    relative to the configuration file. Empty: checkpoints only."""

    @property
    def model_precision(self) -> str:
        """What the model is opened in: what is trained, is trained in float32."""
        return "float32"


def import_builder() -> "Callable[[FinetuneOptions, Path], Task]":
    """The slow imports."""
    from trainers.causal import build

    return build


if __name__ == "__main__":
    start.leave(start.run(FinetuneOptions, import_builder, sys.argv[1:]))
