"""A training script as people bring it: Hugging Face's Trainer, and not a word about Baton.

It trains a tiny GPT-2 with dropout on tokens from a seed, and prints the loss of every step and, in
the end, a digest of the weights. `--gate FILE` holds it at the step that the file names, so that a
test decides how far it gets before something happens; a real script has no such thing. With
`--sharded` each of several ranks has a part of the model (FSDP).
"""

import argparse
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

VOCABULARY, WINDOW, SAMPLES = 64, 16, 48
POLL_S = 0.02
SHARDED: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"},
}


def say(**line: Any) -> None:
    """One JSON object, for whoever reads along."""
    print(json.dumps(line), flush=True)


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random tokens; the labels are the inputs, as for any language model."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self._tokens = torch.randint(0, VOCABULARY, (samples, WINDOW), generator=generator)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


class Log(TrainerCallback):
    """Prints the steps, and waits at the gate."""

    def __init__(self, gate: Path | None) -> None:
        self._gate = gate

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kind = PartialState().distributed_type.value
        say(event="begin", step=state.global_step, pid=os.getpid(), distributed=kind)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        nothing = threading.Event()
        while self._gate is not None and state.global_step >= int(self._gate.read_text("ascii")):
            nothing.wait(POLL_S)

    def on_log(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        logs = values["logs"]
        if "loss" in logs:
            say(event="step", step=state.global_step, loss=logs["loss"])


def shard_on_cpus() -> None:
    """Accelerate has FSDP for accelerators only: on CPUs it trains with DDP, and says nothing. So
    it is told that there are some; all that follows is Trainer's and Accelerate's own."""
    original = PartialState.__init__

    def begin(self: PartialState, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **keywords)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = begin


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-steps", type=int, default=4)
    parser.add_argument("--output", default="output")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--gate", type=Path)
    parser.add_argument("--sharded", action="store_true")
    given = parser.parse_args()
    if given.sharded:
        shard_on_cpus()
    set_seed(3)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=WINDOW, n_embd=16, n_layer=2, n_head=2,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=given.output,
        max_steps=given.steps,
        per_device_train_batch_size=4,
        save_steps=given.save_steps,
        save_total_limit=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **(SHARDED if given.sharded else {}),
    )
    trainer = Trainer(model, arguments, train_dataset=Tokens(SAMPLES), callbacks=[Log(given.gate)])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=True if given.resume else None)
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        digest.update(own.numpy().tobytes())
    say(event="end", step=trainer.state.global_step, digest=digest.hexdigest())


if __name__ == "__main__":
    main()
