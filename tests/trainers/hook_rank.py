"""One rank of an unmodified `Trainer` script, with an agent and an output directory of its own, as
ranks on different nodes have them: `python -m tests.trainers.hook_rank DIRECTORY`.

It trains undisturbed, then is stopped, then goes on from what rank 0 has handed over. Prints one
line of JSON.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import trainer as module

from baton_hook import trainer as bridge
from tests.trainers.test_hook import STEPS, Room, losses, make_trainer, weights

STOPPED_AT = 5


def main(directory: Path, rank: int) -> None:
    node = directory / f"node-{rank}"
    node.mkdir()
    patch = pytest.MonkeyPatch()
    room = Room(node, patch)
    bridge.install(module)
    room.attempt()
    undisturbed = make_trainer(node / "undisturbed")
    undisturbed.train()
    expected = torch.rand(1).item()
    room.attempt()
    status: object = "not stopped"
    try:
        make_trainer(node / "first", stop_at=STOPPED_AT if rank == 1 else 0).train()
    except SystemExit as left:
        status = left.code
    if rank == 0:
        handed = Path(room.agent.checkpoints(STOPPED_AT)[-1]["path"])
        shutil.copytree(handed, directory / "handed")
    torch.distributed.barrier()
    room.attempt(str(directory / "handed"))
    again = make_trainer(node / "second")
    again.train(resume_from_checkpoint=True)
    same = {
        "weights": weights(again) == weights(undisturbed),
        "losses": losses(again) == losses(undisturbed),
        "draws": torch.rand(1).item() == expected,
    }
    step = again.state.global_step
    room.end()
    room.agent.stop()
    patch.undo()
    sys.stdout.write(json.dumps({"status": status, "done": step == STEPS, **same}) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]))
