"""Fine-tune a causal language model with LoRA: ``python -m trainers.lora --config FILE``.

The same data and the same measure as ``finetune``, and a small part of its memory: the model is
frozen, and what is trained are small matrices beside its linear layers. Why that is enough stands
in ``adapters.py``.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trainers import start
from trainers.configuration import Allowed
from trainers.finetune import FinetuneOptions

if TYPE_CHECKING:
    from trainers.loop import Task

BASE_PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class LoraOptions(FinetuneOptions):
    """Fine-tune a causal language model with low-rank adapters."""

    learning_rate: Annotated[float, Allowed(least=0)] = 2e-4
    """The highest one. Customary for LoRA, with an alpha of twice the rank: about ten times what
    all layers would get."""

    rank: Annotated[int, Allowed(least=1)] = 16
    """Of the matrices: each layer learns 2 * rank * its width numbers."""

    alpha: Annotated[int, Allowed(least=1)] = 32
    """The adapters count by alpha / rank; twice the rank is customary."""

    dropout: Annotated[float, Allowed(least=0, below=1)] = 0.0
    """Share of the adapters' inputs that is left out in training, against learning by heart."""

    target_modules: tuple[str, ...] = ()
    """Names, or ends of names, of the layers that get adapters, such as ["q_proj", "v_proj"].
    Empty: every linear layer but the last."""

    base_precision: Annotated[str, Allowed(words=BASE_PRECISIONS)] = "float32"
    """Of the frozen model: float32, or bfloat16 in half of its memory."""

    merge: bool = False
    """Write the whole model with the adapters added to ``output_directory``, which programs that
    know nothing of adapters can open; else the adapters alone."""

    @property
    def model_precision(self) -> str:
        """What the model is opened in."""
        return self.base_precision

    def problems(self) -> list[str]:
        """What is wrong, as sentences that say what to change."""
        found = super().problems()
        if self.from_scratch:
            found.append("'from_scratch' leaves the adapters nothing to add to: use finetune")
        if self.merge and not self.output_directory:
            found.append("'merge' needs an 'output_directory' to write the model to")
        return found


def import_builder() -> "Callable[[LoraOptions, Path], Task]":
    """The slow imports."""
    from trainers.adapters import build

    return build


if __name__ == "__main__":
    start.leave(start.run(LoraOptions, import_builder, sys.argv[1:]))
