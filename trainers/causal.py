"""Windows of text for a causal language model, measured in bits per byte.

The loss per token says nothing across tokenizers, since a larger vocabulary has fewer but harder
tokens; so the loss on held-out text is spread over the bytes that its tokens stand for. With
``"tokenizer": "bytes"`` a token is a UTF-8 byte and no tokenizer is needed.

Samples are windows that follow each other without overlap; the loop shuffles them anew in each
epoch. A window of n tokens has n - 1 predictions, in training and in evaluation alike.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainers import data, models
from trainers.configuration import ConfigurationError, resolve

if TYPE_CHECKING:
    from trainers.finetune import FinetuneOptions

EVALUATION_BATCH = 16
"""Windows evaluated at once: no gradients are kept, so what fits in training fits here."""

BYTE_VALUES = 256


class CausalTextTask:
    """A causal language model and its windows of tokens, of shape [windows, tokens]."""

    metric = "bits_per_byte"

    def __init__(
        self,
        model: torch.nn.Module,
        train: torch.Tensor,
        held_out: torch.Tensor,
        *,
        bytes_per_token: float,
        identity: str,
    ) -> None:
        self.model = model
        self.train = train
        self.held_out = held_out
        self.bytes_per_token = bytes_per_token
        self.identity = identity
        self.sample_count = len(train)

    def loss(self, samples: Sequence[int], device: torch.device) -> torch.Tensor:
        """Mean loss per predicted token, in nats."""
        return self._loss(self.train[list(samples)], device)

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Bits per byte over all held-out windows."""
        nats, predictions = 0.0, 0
        for windows in self.held_out.split(EVALUATION_BATCH):
            count = windows.numel() - len(windows)
            nats += float(self._loss(windows, device)) * count
            predictions += count
        bits_per_token = nats / predictions / math.log(2)
        return {"bits_per_byte": bits_per_token / self.bytes_per_token}

    def _loss(self, windows: torch.Tensor, device: torch.device) -> torch.Tensor:
        tokens = windows.to(device=device, dtype=torch.long)
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), tokens[:, 1:].reshape(-1)
        )


def build(options: "FinetuneOptions", base: Path) -> CausalTextTask:
    """The task of a configuration. Raises ConfigurationError."""
    texts = data.read_texts(resolve(options.train_data, base))
    if options.evaluation_data:
        held_out = data.read_texts(resolve(options.evaluation_data, base))
    else:
        texts, held_out = data.split_ends(texts, options.held_out_ratio)
    model_name = resolve(options.model, base)
    model = models.open_causal(model_name, random=options.from_scratch)
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
    return CausalTextTask(
        model,
        _windows(train_tokens, options.window_tokens, "train_data"),
        _windows(held_out_tokens, options.window_tokens, "the held-out text")[
            : options.evaluation_windows_max
        ],
        bytes_per_token=held_out_bytes / len(held_out_tokens),
        identity=f"finetune {data.digest_of(repr(texts).encode())} {options.window_tokens}",
    )


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
