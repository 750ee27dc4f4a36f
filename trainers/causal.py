"""Windows of text for a causal language model, measured in bits per byte.

The loss per token says nothing across tokenizers, since a larger vocabulary has fewer but harder
tokens; so the loss on held-out text is spread over the bytes that its tokens stand for. With
``"tokenizer": "bytes"`` a token is a UTF-8 byte and no tokenizer is needed.

Samples are windows that follow each other without overlap; the loop shuffles them anew in each
epoch. A window of n tokens has n - 1 predictions, in training and in evaluation alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainers import data, models, weights
from trainers.configuration import ConfigurationError, resolve
from trainers.ranks import ALONE, World

if TYPE_CHECKING:
    from trainers.finetune import FinetuneOptions

EVALUATION_BATCH = 16
"""Windows evaluated at once: no gradients are kept, so what fits in training fits here."""

BYTE_VALUES = 256


@dataclass(frozen=True)
class Trained:
    """Which part of a model is trained."""

    name: str
    """Part of the identity of its checkpoints."""

    prepare: Callable[[Any], Any]
    """From the model as it was opened to the one that is trained."""

    result: Callable[[Any], Any]
    """From that, after the last step, to what is written to ``output_directory``."""


class CausalTextTask:
    """A causal language model and its windows of tokens, of shape [windows, tokens]."""

    metric = "bits_per_byte"
    higher_is_better = False
    whole_modules: Sequence[str] = ()

    def __init__(
        self,
        model: torch.nn.Module,
        train: torch.Tensor,
        held_out: torch.Tensor,
        *,
        bytes_per_token: float,
        identity: str,
        deliver: Callable[[torch.nn.Module], None] | None = None,
    ) -> None:
        self.model = model
        self.evaluation_batch = EVALUATION_BATCH
        self.delivers = deliver is not None
        self._deliver = deliver
        self.train = train
        self.held_out = held_out
        self.bytes_per_token = bytes_per_token
        self.identity = identity
        self.sample_count = len(train)

    def batch(self, samples: Sequence[int]) -> torch.Tensor:
        """Windows, [samples, tokens]."""
        return self.train[list(samples)]

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean loss per predicted token, in nats."""
        return self._loss(batch)

    def evaluate(self, device: torch.device, world: World = ALONE) -> dict[str, float]:
        """Bits per byte over all held-out windows, dealt to the ranks batch by batch. One that has
        none left takes part with a batch that does not count."""
        nats, predictions = 0.0, 0.0
        batches = self.held_out.split(self.evaluation_batch)
        for first in range(0, len(batches), world.size):
            own = first + world.rank
            windows = batches[min(own, len(batches) - 1)]
            count = windows.numel() - len(windows) if own < len(batches) else 0
            nats += float(self._loss(windows.to(device))) * count
            predictions += count
        nats, predictions = world.sums([nats, predictions])
        bits_per_token = nats / predictions / math.log(2)
        return {"bits_per_byte": bits_per_token / self.bytes_per_token}

    def deliver(self) -> None:
        """The trained model, as a folder, where one was asked for."""
        if self._deliver is not None:
            self._deliver(self.model)

    def _loss(self, windows: torch.Tensor) -> torch.Tensor:
        tokens = windows.long()
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), tokens[:, 1:].reshape(-1)
        )


def build(
    options: "FinetuneOptions", base: Path, *, trained: "Trained | None" = None
) -> CausalTextTask:
    """The task of a configuration; ``trained`` says what is trained, else all layers are. Raises
    ConfigurationError."""
    texts = data.read_texts(resolve(options.train_data, base))
    if options.evaluation_data:
        held_out = data.read_texts(resolve(options.evaluation_data, base))
    else:
        texts, held_out = data.split_ends(texts, options.held_out_ratio)
    model_name = resolve(options.model, base)
    model = models.open_causal(
        model_name, random=options.from_scratch, dtype=getattr(torch, options.model_precision)
    )
    if options.start_from:
        _give_weights(model, resolve(options.start_from, base))
    positions = getattr(model.config, "max_position_embeddings", options.window_tokens)
    if options.window_tokens > positions:
        raise ConfigurationError(
            f"'window_tokens' is {options.window_tokens}; the model has {positions} positions"
        )
    encode = _encoder(resolve(options.tokenizer or options.model, base))
    train_tokens, held_out_tokens = encode("\n".join(texts)), encode("\n".join(held_out))
    largest = int(max(train_tokens.max(), held_out_tokens.max()))
    if largest >= model.config.vocab_size:
        raise ConfigurationError(
            f"the text has token {largest}; the vocabulary of the model ends "
            f"at {model.config.vocab_size - 1}: 'tokenizer' does not belong to 'model'"
        )
    held_out_bytes = len("\n".join(held_out).encode())
    trained = trained or Trained("finetune", lambda whole: whole, lambda whole: whole)
    model = trained.prepare(model)
    target = base / options.output_directory if options.output_directory else None
    return CausalTextTask(
        model,
        _windows(train_tokens, options.window_tokens, "train_data"),
        _windows(held_out_tokens, options.window_tokens, "the held-out text")[
            : options.evaluation_windows_max
        ],
        bytes_per_token=held_out_bytes / len(held_out_tokens),
        identity=f"{trained.name} {data.digest_of(repr(texts).encode())} {options.window_tokens}",
        deliver=(lambda whole: models.save(trained.result(whole), target)) if target else None,
    )


def _give_weights(model: torch.nn.Module, name: str) -> None:
    try:
        weights.load_into(model, Path(name))
    except weights.WeightsError as error:
        raise ConfigurationError(f"cannot start from '{name}': {error}") from error


def _encoder(name: str) -> Any:
    """A function from text to a tensor of token numbers."""
    if name == "bytes":
        return lambda text: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    tokenizer = models.open_tokenizer(name)
    return lambda text: torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int32
    )


def _windows(tokens: torch.Tensor, window_tokens: int, name: str) -> torch.Tensor:
    count = len(tokens) // window_tokens
    if count == 0:
        raise ConfigurationError(
            f"{name} has {len(tokens)} tokens, fewer than one window of {window_tokens}"
        )
    return tokens[: count * window_tokens].view(count, window_tokens)
