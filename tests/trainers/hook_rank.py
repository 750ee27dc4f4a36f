"""One rank of an unmodified `Trainer` script, with an agent and an output directory of its own, as
ranks on different nodes have them. It is forked (``forking``), and its environment says what it
plays, in `PLAY`, and where, in `PLAY_DIRECTORY`.

`stopped`: it trains undisturbed, then is stopped, then goes on from what rank 0 has handed over.
`newer`: rank 0's directory holds a checkpoint that is newer than the committed one, as after the
death of the other node; then one that is newer than none. `torn_on_one_node`: both have one
directory, with a torn checkpoint and nothing else; `torn_on_one_of_two`: so has rank 0, and the
other's is empty. `alone`: their hooks are of different versions; then rank 0 talks to its agent
itself. `sharded`: as `stopped`, with FSDP, so that each rank has half of the model, and hands over
a part; in the end the best model is loaded. `sharded_on_one_node`: both have one directory. Prints
one line of JSON.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers import trainer as module

import baton_sdk
from baton_hook import torn, versions
from baton_hook import trainer as bridge
from tests.e2e.scripts.hf_script import SHARDED, shard_on_cpus
from tests.trainers import forking
from tests.trainers.test_hook import EVERY, STEPS, Room, losses, make_trainer, weights
from tests.trainers.test_hook_ranks import FOLDERS, STOPPED_AT
from trainers import start

EVALUATED = {"eval_strategy": "steps", "eval_steps": EVERY}
BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}
"""The first one is the best."""

STALE = b"of an earlier attempt"


class Follower(TrainerCallback):
    """After which step training began, and what `look` has shown after each."""

    began: int | None = None

    def __init__(self, look: Callable[[], object] = lambda: None) -> None:
        self.look = look
        self.seen: dict[int, object] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = state.global_step if self.began is None else self.began

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen[state.global_step] = self.look()


def stopped(room: Room, directory: Path, rank: int) -> dict[str, object]:
    undisturbed = make_trainer(room.directory / "undisturbed")
    undisturbed.train()
    expected = torch.rand(1).item()
    room.attempt()
    status = stop(room.directory / "first", STOPPED_AT if rank == 1 else 0)
    room.attempt(committed(room, directory, rank, STOPPED_AT))
    again = make_trainer(room.directory / "second")
    again.train(resume_from_checkpoint=True)
    return {
        "status": status,
        "done": again.state.global_step == STEPS,
        "weights": weights(again) == weights(undisturbed),
        "losses": losses(again) == losses(undisturbed),
        "draws": torch.rand(1).item() == expected,
    }


def sharded(room: Room, directory: Path, rank: int) -> dict[str, object]:
    """Before, the ranks had run here the other way round, and had saved that step. Afterwards rank
    0 is on another node, and rank 1 where it was; paths are the same everywhere."""
    shard_on_cpus()
    room.patch.setenv("BATON_RANK", str(rank))
    room.patch.setenv("BATON_WORLD_SIZE", os.environ["WORLD_SIZE"])
    os.chdir(room.directory)
    undisturbed, all_along = follow(Path("undisturbed"), **SHARDED, **EVALUATED)
    undisturbed.train()
    expected = torch.rand(1).item()
    room.attempt()
    output, best = Path("output"), {**SHARDED, **EVALUATED, **BEST}
    for folder in FOLDERS:
        older = output / f"checkpoint-{STOPPED_AT}" / folder
        older.mkdir(parents=True)
        (older / f"__{1 - rank}_0.distcp").write_bytes(STALE)
    status = stop(output, STOPPED_AT if rank == 1 else 0, **best)
    own = room.agent.checkpoints(STOPPED_AT)[-1]
    handed = directory / "handed"
    shutil.copytree(own["path"], handed / f"rank-{rank:05d}")
    shutil.copytree(output, "before")
    if rank == 0:
        shutil.rmtree(output)
    torch.distributed.barrier()
    room.attempt(str(handed))
    again, later = follow(output, **best)
    again.train(resume_from_checkpoint=True)
    return {
        "status": status,
        "parts": own["parts"],
        "done": again.state.global_step == STEPS,
        "weights": later.seen[STEPS] == all_along.seen[STEPS],
        "best": own_rows(again) == all_along.seen[EVERY] != all_along.seen[STEPS],
        "losses": losses(again) == losses(undisturbed),
        "draws": torch.rand(1).item() == expected,
    }


def follow(output: Path, **arguments: Any) -> tuple[Any, Follower]:
    """A Trainer, and its weights after each step."""
    trainer = make_trainer(output, **arguments)
    follower = Follower(lambda: own_rows(trainer))
    trainer.add_callback(follower)
    return trainer, follower


def own_rows(trainer: Any) -> dict[str, list[float]]:
    """Of parameters that are spread over the ranks."""
    return {name: rows.to_local().tolist() for name, rows in trainer.model.state_dict().items()}


def sharded_on_one_node(room: Room, directory: Path, rank: int) -> dict[str, object]:
    shard_on_cpus()
    room.patch.setenv("BATON_RANK", str(rank))
    room.patch.setenv("BATON_WORLD_SIZE", os.environ["WORLD_SIZE"])
    status = stop(directory / "output", STOPPED_AT if rank == 0 else 0, **SHARDED)
    saved = [message for message in room.all() if message["type"] == "checkpoint"]
    paths = sorted(Path(saved[-1]["path"]).rglob("*.distcp")) if saved else []
    return {
        "status": status,
        "parts": [message.get("parts", 1) for message in saved],
        "shards": [f"{path.parent.name}/{path.name}" for path in paths],
    }


def newer(room: Room, directory: Path, rank: int) -> dict[str, object]:
    undisturbed = make_trainer(room.directory / "undisturbed")
    undisturbed.train()
    output = room.directory / "output"
    told: dict[str, object] = {}
    room.attempt()
    stop(output, 3 * EVERY)
    restored = committed(room, directory, rank, 2 * EVERY)  # the node died before the last commit
    for name in ("committed", "nothing"):
        room.attempt(restored if name == "committed" else "")
        follower = Follower()
        again = make_trainer(output)
        again.add_callback(follower)
        own = [path.name for path in torn.numbered(output) if not torn.problem(path)]
        again.train(resume_from_checkpoint=True)
        same = weights(again) == weights(undisturbed)
        told[name] = {"own": own[:1], "began": follower.began, "same": same}
        room.patch.delenv("BATON_RESTORE_DIR", raising=False)
    return told


def torn_on_one_node(_room: Room, directory: Path, rank: int) -> dict[str, object]:
    return begin_after_a_tear(directory / "output", rank)


def torn_on_one_of_two(room: Room, _directory: Path, rank: int) -> dict[str, object]:
    return begin_after_a_tear(room.directory / "output", rank)


def begin_after_a_tear(output: Path, rank: int) -> dict[str, object]:
    if rank == 0:
        (output / f"checkpoint-{EVERY}").mkdir(parents=True)
    trainer, follower = make_trainer(output), Follower()
    trainer.add_callback(follower)
    trainer.train(resume_from_checkpoint=True)
    return {"began": follower.began, "done": trainer.state.global_step == STEPS}


def alone(room: Room, _directory: Path, rank: int) -> dict[str, object]:
    trainer = make_trainer(room.directory / "output")
    room.patch.setenv("BATON_NODE", f"n{rank + 1}")
    protocols = (versions.PROTOCOL + 1, versions.UNNUMBERED)
    statuses = [status_of_upgraded(room, trainer, protocol, rank) for protocol in protocols]
    with baton_sdk.connect() if rank == 0 else contextlib.nullcontext():
        trainer.train()
    saved = [message for message in room.all() if message["type"] == "checkpoint"]
    done = trainer.state.global_step == STEPS
    return {"statuses": statuses, "done": done, "handed_over_count": len(saved)}


def status_of_upgraded(room: Room, trainer: Any, protocol: int, rank: int) -> object:
    """Where the second rank's hook speaks another protocol than the first's, how the call of
    `train` ends, which no rank may hang in."""
    with room.patch.context() as patched:
        if rank == 1:
            patched.setattr(versions, "PROTOCOL", protocol)
        with pytest.raises(SystemExit) as left:
            trainer.train()
    room.attempt()
    return left.value.code


def stop(output: Path, step: int, **arguments: Any) -> object:
    """Train up to a stop, of this rank or of another; the status of the program."""
    try:
        make_trainer(output, stop_at=step, **arguments).train()
    except SystemExit as left:
        return left.code
    return "not stopped"


def committed(room: Room, directory: Path, rank: int, step: int) -> str:
    """Where every rank finds what rank 0 has handed over at this step."""
    handed = directory / "handed"
    if rank == 0:
        shutil.copytree(Path(room.agent.checkpoints(step)[-1]["path"]), handed)
    torch.distributed.barrier()
    return str(handed)


PLAYS = {
    "stopped": stopped,
    "newer": newer,
    "torn_on_one_node": torn_on_one_node,
    "torn_on_one_of_two": torn_on_one_of_two,
    "alone": alone,
    "sharded": sharded,
    "sharded_on_one_node": sharded_on_one_node,
}


def run_rank(_place: Path) -> int:
    """In a forked process."""
    directory, rank = Path(os.environ["PLAY_DIRECTORY"]), int(os.environ["RANK"])
    node = directory / f"node-{rank}"
    node.mkdir()
    patch = pytest.MonkeyPatch()
    room = Room(node, patch)
    bridge.install(module)
    room.attempt()
    told = PLAYS[os.environ["PLAY"]](room, directory, rank)
    room.end()
    room.agent.stop()
    patch.undo()
    sys.stdout.write(json.dumps(told) + "\n")
    torch.distributed.destroy_process_group()
    return 0


def serve_ranks() -> None:
    """In the host."""
    forking.serve(run_rank, start.leave)
