"""What a trainer brings to the loop: a model, its samples, its loss, its figure."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from trainers.ranks import World


class Task(Protocol):
    """A model and its data."""

    model: torch.nn.Module
    sample_count: int
    metric: str
    """The name, in what ``evaluate`` returns, of the figure that counts."""

    higher_is_better: bool
    """Of that figure."""

    evaluation_batch: int
    """Samples evaluated at once; the loop lowers it when they do not fit into memory."""

    identity: str
    """Describes data and model; a checkpoint of another identity is refused."""

    whole_modules: Sequence[str]
    """Names of modules of the model that several ranks each have in one piece: nothing in them is
    trained or written to, and they compute without the others."""

    delivers: bool
    """Whether ``deliver`` writes anything: for a model that is spread over ranks it costs the
    gathering."""

    def batch(self, samples: Sequence[int]) -> Any:
        """These samples as tensors on the CPU, in any nesting. Called from another thread than the
        rest, ahead of time: it depends on nothing that changes, and on no random generator."""
        ...

    def loss(self, batch: Any) -> torch.Tensor:
        """The mean loss over the samples of a ``batch`` that lies on the model's device."""
        ...

    def evaluate(self, device: torch.device, world: World) -> dict[str, float]:
        """Figures on held-out data, the same on all ranks: each looks at a part of it, with as many
        passes through the model as the others. Draws nothing from any random generator."""
        ...

    def deliver(self) -> None:
        """After the last step and its checkpoint: write the result where the configuration wants
        it, if anywhere. ``model`` is in one piece then, on the CPU or where it was trained, and
        is not used any more. Rank 0 alone is asked. Raises OSError."""
        ...
