"""What a frozen backbone makes of each sample, computed once.

Problem: a backbone that is not trained gives the same features for the same sample in every epoch,
and computing them is nearly all of the work. So they are kept, on the device, in the bytes that the
configuration allows, and computed again after a resume rather than stored in checkpoints.

Exact resume asks for more than "the same features": they must be the same to the last bit whenever
and in whatever company they are computed, and a matrix product may round differently with other
rows around. So a sample's features are always computed with the same company, its block of
``BLOCK_SAMPLES`` neighbours in the data, at the first time that one of the block is wanted.
Nothing then depends on the history of the run. For the same reason the features may differ in the
last bit from those that a batch of the training would give.

The table notices when a parameter of the backbone was written to, and begins anew.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

BLOCK_SAMPLES = 16
"""Enough for matrix products to be worth their start; few, because in the first epoch nearly every
sample of a batch needs its whole block, and a stop request waits for the end of a step."""

Inputs = Mapping[str, torch.Tensor]


class FeatureTable:
    """The features of the samples in ``inputs`` (tensors on the CPU, samples first)."""

    def __init__(
        self,
        backbone: Callable[[], torch.nn.Module],
        inputs: Inputs,
        compute: Callable[[Inputs], torch.Tensor],
    ) -> None:
        self.backbone = backbone
        self.inputs = inputs
        self.compute = compute
        self._table: torch.Tensor | None = None
        self._missing: set[int] = set()
        self._seen = (0, 0)

    def take(self, samples: Sequence[int], device: torch.device) -> torch.Tensor:
        """Features [samples, width], on the device. Called within the training's autocast."""
        seen = _writes(self.backbone())
        if self._table is None or seen != self._seen:
            self._table, self._seen = None, seen
            count = len(next(iter(self.inputs.values())))
            self._missing = set(range(-(-count // BLOCK_SAMPLES)))
        if self._missing:
            for block in sorted({sample // BLOCK_SAMPLES for sample in samples} & self._missing):
                self._fill(block, device)
        assert self._table is not None
        return self._table[torch.as_tensor(samples).to(device, non_blocking=True)]

    def _fill(self, block: int, device: torch.device) -> None:
        place = slice(block * BLOCK_SAMPLES, (block + 1) * BLOCK_SAMPLES)
        with torch.no_grad():
            inputs = {name: tensor[place].to(device) for name, tensor in self.inputs.items()}
            features = self.compute(inputs)
        if self._table is None:
            count = len(next(iter(self.inputs.values())))
            self._table = features.new_empty(count, *features.shape[1:])
        self._table[place] = features
        self._missing.discard(block)


def _writes(backbone: torch.nn.Module) -> tuple[int, int]:
    """Changes when parameters are moved or written to: torch counts the writes to each tensor."""
    place = writes = 0
    for parameter in backbone.parameters():
        place = place or parameter.data_ptr()
        writes += parameter._version
    return place, writes
