"""A Hugging Face Trainer fine-tuning that resumes from its newest checkpoint, as its manual does.

hugging_face_training.py PREPARED_DIRECTORY SCRATCH_DIRECTORY
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

BATCH_SIZE, WINDOW_TOKENS, SAVE_STEPS = 8, 128, 25


class Windows(Dataset[dict[str, torch.Tensor]]):
    """The prepared text in windows of bytes."""

    def __init__(self, folder: Path) -> None:
        files = sorted((folder / "licences").iterdir())
        text = "\n".join(file.read_text("utf-8") for file in files)
        tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        whole = tokens[: len(tokens) // WINDOW_TOKENS * WINDOW_TOKENS]
        self.windows = whole.view(-1, WINDOW_TOKENS).long()

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class Notes(TrainerCallback):
    """Writes the wall time of every step, and how often was saved."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("a", encoding="ascii")
        self.saves = 0

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saves += 1

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.file.write(f"{os.getpid()} {time.time():.6f} {self.saves}\n")
        self.file.flush()


def main(prepared: Path, scratch: Path) -> None:
    folder = next(prepared.glob("text-*"))
    output = scratch / "output"
    output.mkdir(exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=1_000_000,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        learning_rate=2e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(folder),
        callbacks=[Notes(scratch / "steps")],
    )
    newest = get_last_checkpoint(str(output))  # type: ignore[no-untyped-call]
    trainer.train(resume_from_checkpoint=newest)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
