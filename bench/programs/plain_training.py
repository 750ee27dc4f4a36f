"""A plain PyTorch fine-tuning that saves every second, as tutorials show it; run under torchrun.

plain_training.py PREPARED_DIRECTORY SCRATCH_DIRECTORY
"""

import os
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

BATCH_SIZE, WINDOW_TOKENS, SAVE_EVERY_S = 8, 128, 1.0


def main(prepared: Path, scratch: Path) -> None:
    folder = next(prepared.glob("text-*"))
    text = "\n".join(file.read_text("utf-8") for file in sorted((folder / "licences").iterdir()))
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    windows = tokens[: len(tokens) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS).long()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    newest = scratch / "newest.pt"
    step = saves = 0
    if newest.exists():
        state = torch.load(newest)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    saved_at_s = time.monotonic()
    with (scratch / "steps").open("a", encoding="ascii") as steps:
        while True:
            batch = windows[torch.randint(len(windows), (BATCH_SIZE,))]
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if time.monotonic() - saved_at_s >= SAVE_EVERY_S:
                state = {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step
                }  # fmt: skip
                torch.save(state, scratch / "partial.pt")
                os.replace(scratch / "partial.pt", newest)
                saves, saved_at_s = saves + 1, time.monotonic()
            steps.write(f"{os.getpid()} {time.time():.6f} {saves}\n")
            steps.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
