"""LoRA: small matrices beside the frozen ones of a causal language model, trained in their place.

Problem: fine-tuning all layers needs memory for the gradients and AdamW's two averages of every
parameter, and each checkpoint is as large as three models. LoRA (Hu et al., 2021) leaves the
weights W alone and learns a difference of low rank, B A, with B zero at first:
W x + (alpha / rank) B A x.
The base model is then the same bytes in every checkpoint, and is stored and sent once.

The matrices are peft's, so its names and files are what other programs expect. Which layers get
them matters more than their rank: all linear ones but the last reach what full fine-tuning does,
where attention alone does not (Dettmers et al., "QLoRA", 2023), so that is the default.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers

from trainers import causal
from trainers.configuration import ConfigurationError

if TYPE_CHECKING:
    from trainers.lora import LoraOptions

LINEAR = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
"""GPT-2's layers are called convolutions of width 1; they are linear, with transposed weights."""

NAMES_SHOWN_MAX = 12
"""In a sentence: enough to see how the layers of a model are called."""


def build(options: "LoraOptions", base: Path) -> causal.CausalTextTask:
    """The task of a configuration. Raises ConfigurationError."""
    trained = causal.Trained(
        "lora",
        lambda model: with_adapters(model, options),
        lambda model: model.merge_and_unload() if options.merge else model,
    )
    return causal.build(options, base, trained=trained)


def with_adapters(model: Any, options: "LoraOptions") -> Any:
    """The model with its adapters, the rest frozen. Raises ConfigurationError where
    ``target_modules`` names no layer."""
    names = linear_names(model)
    for wanted in options.target_modules:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            shown = sorted({name.rpartition(".")[2] for name in names})[:NAMES_SHOWN_MAX]
            raise ConfigurationError(
                f"'target_modules' has '{wanted}'; the linear layers of the model are "
                f"{', '.join(shown)}"
            )
    chosen = [
        name
        for name in names
        if not options.target_modules
        or any(name == wanted or name.endswith(f".{wanted}") for wanted in options.target_modules)
    ]
    transposed = any(not isinstance(model.get_submodule(name), torch.nn.Linear) for name in chosen)
    described = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=chosen,
        fan_in_fan_out=transposed,
    )
    with warnings.catch_warnings():
        # Between two libraries, and no business of who reads the job's log.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(model, described)


def linear_names(model: Any) -> list[str]:
    """Full names of the linear layers, without the one that makes the logits."""
    last = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and module is not last
    ]
