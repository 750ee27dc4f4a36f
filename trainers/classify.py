"""A head on a backbone, and the images or texts that it learns to classify.

A backbone gives one vector per patch or token; the head sees their mean (of real tokens only, when
texts are padded). The class token that some backbones train for this purpose is not there in
all of them; the mean is, and does about as well.

A frozen backbone stays in evaluation mode while the head trains: its dropout would be noise, and
its running statistics would move, frozen or not. What it makes of a sample is then always the
same, and is computed once (``features``) if there is room for it and samples are seen again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainers import data, models
from trainers.configuration import ConfigurationError, resolve
from trainers.features import FeatureTable
from trainers.ranks import ALONE, World

if TYPE_CHECKING:
    from trainers.transfer import TransferOptions

EVALUATION_BATCH = 64
"""Samples evaluated at once; nothing is kept for gradients."""

FEATURE_BYTES = 4
"""Of one number in a table of features: float32, or less where the arithmetic is in 16 bits."""

Inputs = dict[str, torch.Tensor]


class Classifier(torch.nn.Module):
    """A backbone and a head. Takes what the backbone takes, gives logits [batch, classes]."""

    def __init__(self, backbone: Any, head: torch.nn.Module, *, frozen: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.frozen = frozen
        if frozen:
            for parameter in backbone.parameters():
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "Classifier":
        """As usual, except that a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, made: torch.Tensor | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits of shape [batch, classes]. ``made``: the features, where they are known."""
        return self.classify(self.features(inputs) if made is None else made)

    def features(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the backbone makes of its inputs: [batch, width]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            hidden = self.backbone(**inputs).last_hidden_state
            hidden = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
            mask = inputs.get("attention_mask")
            if mask is None:
                features = hidden.mean(dim=1)
            else:
                weights = mask.unsqueeze(-1).to(hidden.dtype)
                features = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        assert isinstance(features, torch.Tensor)
        return features

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """What the head makes of features: logits of shape [batch, classes]."""
        logits = self.head(features)
        assert isinstance(logits, torch.Tensor)
        return logits


class ClassifyTask:
    """A classifier and its samples: inputs of the backbone by name, samples first.

    ``keep_features``: of (training, held-out) samples; only for a frozen backbone."""

    metric = "accuracy"
    higher_is_better = True
    delivers = False

    def __init__(
        self,
        model: Classifier,
        train: tuple[Inputs, torch.Tensor],
        held_out: tuple[Inputs, torch.Tensor],
        *,
        identity: str,
        keep_features: tuple[bool, bool] = (False, False),
    ) -> None:
        self.model: torch.nn.Module = model
        self.evaluation_batch = EVALUATION_BATCH
        self.train = train
        self.held_out = held_out
        self.identity = identity
        self.sample_count = len(train[1])
        # Features are made of whichever samples a rank lacks, when it lacks them.
        self.whole_modules: Sequence[str] = ("backbone",) if model.frozen else ()
        self._tables = [
            FeatureTable(self._backbone, part[0], self._features) if kept else None
            for part, kept in zip((train, held_out), keep_features, strict=True)
        ]

    def batch(self, samples: Sequence[int]) -> dict[str, Any]:
        """Labels, and what the model needs to look at: the numbers of the samples, or them."""
        chosen = list(samples)
        labels = self.train[1][chosen]
        if self._tables[0] is not None:
            return {"labels": labels, "samples": chosen}
        return {"labels": labels, "inputs": {k: v[chosen] for k, v in self.train[0].items()}}

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Mean cross-entropy, in nats."""
        labels, table = batch["labels"], self._tables[0]
        if table is not None:
            logits = self.model(table.take(batch["samples"], labels.device))
        else:
            logits = self.model(**batch["inputs"])
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    def evaluate(self, device: torch.device, world: World = ALONE) -> dict[str, float]:
        """Accuracy (0 to 1) and mean loss over all held-out samples, dealt to the ranks batch by
        batch. One that has none left takes part with a batch that does not count."""
        right, nats, count = 0.0, 0.0, len(self.held_out[1])
        batches = torch.arange(count).split(self.evaluation_batch)
        for first in range(0, len(batches), world.size):
            own = first + world.rank
            chosen = batches[min(own, len(batches) - 1)]
            labels = self.held_out[1][chosen].to(device)
            logits = self._held_out_logits(chosen, device).float()
            if own < len(batches):
                right += int((logits.argmax(dim=1) == labels).sum())
                nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        right, nats = world.sums([right, nats])
        return {"accuracy": right / count, "evaluation_loss": nats / count}

    def deliver(self) -> None:
        """The last checkpoint holds the head; there is no folder format for one."""

    def _held_out_logits(self, chosen: torch.Tensor, device: torch.device) -> torch.Tensor:
        table = self._tables[1]
        if table is not None:
            logits = self.model(table.take(chosen.tolist(), device))
        else:
            logits = self.model(**{k: v[chosen].to(device) for k, v in self.held_out[0].items()})
        assert isinstance(logits, torch.Tensor)
        return logits

    def _backbone(self) -> torch.nn.Module:
        """Of the present model: ranks that ran out of memory go on with another one."""
        return self.model.get_submodule("backbone")

    def _features(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        assert isinstance(self.model, Classifier)
        return self.model.features(inputs)


def build(options: "TransferOptions", base: Path) -> ClassifyTask:
    """The task of a configuration. Raises ConfigurationError."""
    columns = (options.sample_column, options.label_column)
    train = data.read_labelled(Path(resolve(options.train_data, base)), columns)
    held_out = data.read_labelled(
        Path(resolve(options.evaluation_data, base)), columns, classes=train.classes
    )
    name = resolve(options.model, base)
    backbone = models.open_backbone(name, random=options.backbone == "random")
    width = _width(backbone, name)
    head = make_head(width, options.head_hidden, len(train.classes))
    inputs = [_inputs(part, backbone, name, options) for part in (train, held_out)]
    return ClassifyTask(
        Classifier(backbone, head, frozen=options.freeze),
        (inputs[0], torch.from_numpy(train.y)),
        (inputs[1], torch.from_numpy(held_out.y)),
        identity=f"transfer {train.digest} {len(train.classes)} classes",
        keep_features=kept_features(options, width, (len(train.y), len(held_out.y))),
    )


def kept_features(
    options: "TransferOptions", width: int, counts: tuple[int, int]
) -> tuple[bool, bool]:
    """Whether to keep the features of the ``counts`` samples to train on and to evaluate: where
    they are frozen, are seen more than once, and have room; all of them or none."""
    room_bytes = options.feature_cache_bytes if options.freeze else 0
    seen = options.steps * options.batch_size * options.accumulate
    train_bytes, held_out_bytes = (count * width * FEATURE_BYTES for count in counts)
    keep_train = seen > counts[0] and train_bytes <= room_bytes
    room_bytes -= train_bytes if keep_train else 0
    return keep_train, held_out_bytes <= room_bytes


def make_head(features: int, hidden: int, classes: int) -> torch.nn.Module:
    """Linear, or with one hidden layer. Normalised first: backbones differ in scale."""
    if not hidden:
        return torch.nn.Sequential(torch.nn.LayerNorm(features), torch.nn.Linear(features, classes))
    return torch.nn.Sequential(
        torch.nn.LayerNorm(features),
        torch.nn.Linear(features, hidden),
        torch.nn.GELU(),
        torch.nn.Linear(hidden, classes),
    )


def _width(backbone: Any, name: str) -> int:
    """Features per patch or token; convolutional backbones list them stage by stage."""
    stages = getattr(backbone.config, "hidden_sizes", None)
    width = getattr(backbone.config, "hidden_size", None) or (stages[-1] if stages else None)
    if not isinstance(width, int):
        raise ConfigurationError(f"model '{name}' does not say how wide its features are")
    return width


def _inputs(part: data.Labelled, backbone: Any, name: str, options: "TransferOptions") -> Inputs:
    if isinstance(part.x, list):
        tokenizer = models.open_tokenizer(name)
        encoded = tokenizer(
            part.x, truncation=True, max_length=options.text_tokens_max, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}
    pixels = torch.from_numpy(part.x.astype("float32"))
    if part.x.dtype.kind in "iu":
        pixels = pixels / options.pixel_scale
    if pixels.dim() == 3:
        pixels = pixels.unsqueeze(1)
    if pixels.dim() != 4:
        raise ConfigurationError(
            f"images must be of shape [n,h,w] or [n,channels,h,w], not {list(part.x.shape)}"
        )
    channels = getattr(backbone.config, "num_channels", pixels.shape[1])
    if pixels.shape[1] == 1 and channels > 1:
        pixels = pixels.expand(-1, channels, -1, -1)
    size = getattr(backbone.config, "image_size", None)
    if isinstance(size, int) and tuple(pixels.shape[2:]) != (size, size):
        pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear")
    return {"pixel_values": (pixels - options.pixel_mean) / options.pixel_deviation}
