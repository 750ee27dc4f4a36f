"""Opening models and tokenizers: the one place that knows how transformers does it.

A folder or a hub id, always in float32 (a checkpoint in half precision would be trained in it, and
badly), always without running code that comes with a model. What cannot be opened is the user's
mistake and answered with a sentence. transformers' own progress bars and reports are switched off:
a job's log is made of one JSON object a line.
"""

from typing import Any

import torch
import transformers
from transformers.utils import logging

from trainers.configuration import ConfigurationError

logging.disable_progress_bar()
logging.set_verbosity_error()


def open_causal(name: str, *, random: bool) -> Any:
    """A causal language model; ``random``: its architecture with random values."""
    return _open(transformers.AutoModelForCausalLM, name, random=random)


def open_backbone(name: str, *, random: bool) -> Any:
    """A model without a head; ``random``: its architecture with random values."""
    return _open(transformers.AutoModel, name, random=random)


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub id."""
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot open tokenizer '{name}': {error}") from error


def _open(automatic: Any, name: str, *, random: bool) -> Any:
    try:
        if random:
            return automatic.from_config(transformers.AutoConfig.from_pretrained(name))
        return automatic.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot open model '{name}': {error}") from error
