"""Opening models and tokenizers: the one place that knows how transformers does it.

A folder or a hub id, in float32 unless it is not trained (a checkpoint in half precision would be
trained in it, and badly), always without running code that comes with a model. What cannot be
opened is the user's mistake and answered with a sentence. transformers' own progress bars and
reports are switched off: a job's log is made of one JSON object a line.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from trainers.configuration import ConfigurationError

logging.disable_progress_bar()
logging.set_verbosity_error()


def open_causal(name: str, *, random: bool, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model; ``random``: its architecture with random values."""
    return _open(transformers.AutoModelForCausalLM, name, random=random, dtype=dtype)


def open_backbone(name: str, *, random: bool) -> Any:
    """A model without a head; ``random``: its architecture with random values."""
    return _open(transformers.AutoModel, name, random=random)


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub id."""
    _refuse_missing("tokenizer", name)
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot open tokenizer '{name}': {error}") from error


def save(model: Any, directory: Path) -> None:
    """Write a folder that ``open_causal`` (or peft, for an adapter) opens; older files of the same
    names are replaced, each when its successor is whole. Raises OSError."""
    partial = directory / f".partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        mode = partial.stat().st_mode & 0o666  # as the umask has it; safetensors lets nobody read
        for file in sorted(partial.iterdir()):
            file.chmod(mode)
            file.replace(directory / file.name)
    finally:
        shutil.rmtree(partial)


def _open(automatic: Any, name: str, *, random: bool, dtype: torch.dtype = torch.float32) -> Any:
    _refuse_missing("model", name)
    try:
        if random:
            described = transformers.AutoConfig.from_pretrained(name)
            return automatic.from_config(described, dtype=dtype)
        return automatic.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot open model '{name}': {error}") from error


def _refuse_missing(what: str, name: str) -> None:
    """What is plainly a path is no hub id, as whose transformers would judge it; and a file that
    may not be read is, in safetensors' words, not there."""
    try:
        if name.startswith(("/", "./", "../", "~")) and not Path(name).exists():
            raise ConfigurationError(f"cannot open {what} '{name}': there is no such folder here")
        for path in Path(name).iterdir() if Path(name).is_dir() else ():
            if path.is_file():
                path.open("rb").close()
    except PermissionError as error:
        raise ConfigurationError(
            f"cannot open {what} '{name}': user {os.geteuid()} may not read {error.filename}"
        ) from error
