"""Kill a process that writes checkpoints, over and over, and look at what can be restored.

Problem: that a checkpoint appears whole or not at all cannot be seen by reading the code; it must
hold at every instant, also between two system calls. So a real process writes checkpoints in a
tight loop, keeps the last two as the training loop does, and is killed with SIGKILL: half of the
times at a chosen system call (before it, halfway through a write, after it; each in turn, so that
none is left out), half of the times from outside at a random instant. Then the newest checkpoint is
read as a trainer would read it. It must be there, be whole, hold exactly what was written (the
content of every step is known), and not lie before the last one whose writing had returned. The
next process goes on in the same directory, with whatever the one before left behind.

The processes are forked from one that has imported torch and computed nothing: importing it takes
seconds. A kill ends a process and not the machine: what the kernel holds is not lost. That the
files are synced before the rename is seen in their order, by ``test_torn_checkpoint``.

    python -m tests.trainers.torture --kills 1000 --seed 1

Exit status 1 when anything that must hold did not.
"""

import argparse
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import baton_sdk
from tests.trainers import faultshim
from trainers import checkpoint, exactness, manifest, ranges, ranks, restoring
from trainers.configuration import LoopOptions

KEPT = 2
"""As the training loop keeps outside Baton."""

RANDOM_INSTANT_S_MAX = 0.03
"""Some ten checkpoints of this size."""

CHILD_S_MAX = 60.0
"""A child that was to kill itself and lives on after so long never will."""

STEP_BYTES = 8


@dataclass
class Count:
    """What happened, and what must not have."""

    kills_at_calls: int = 0
    kills_at_instants: int = 0
    checkpoints: int = 0
    calls: int = 0
    fired: dict[str, int] = field(default_factory=dict)
    torn_older: int = 0
    bad: list[str] = field(default_factory=list)


def snapshot_of(step: int) -> checkpoint.Snapshot:
    """The whole state at ``step``; every step has another one."""
    tensors = {
        part: {name: torch.arange(size) + step * (1 + number) for number, (name, size) in layout}
        for part, layout in (
            ("frozen", list(enumerate([("embedding", 64)]))),
            ("model", list(enumerate([("weight", 256), ("running_mean", 16)]))),
            ("optimizer", list(enumerate([("weight|exp_avg", 256), ("weight|step", 1)]))),
            ("random", list(enumerate([("torch_cpu", 128)]))),
        )
    }
    described = manifest.Manifest(
        job=7,
        epoch=1,
        step=step,
        samples=step * 8,
        parent="",
        world_size=1,
        fingerprint=exactness.current(
            torch.device("cpu"),
            world_size=1,
            precision="float32",
            global_batch=8,
            micro_batch=8,
            data_seed=1,
        ),
        level=None,
        tensors=manifest.layout(tensors, {}),
        files={},
    )
    state = {
        "format": checkpoint.FORMAT_VERSION,
        "optimizer": {"groups": [{"lr": 1 / (1 + step)}]},
        "progress": {"step": step},
    }
    return checkpoint.Snapshot(
        frozen=tensors["frozen"],
        model=tensors["model"],
        optimizer=tensors["optimizer"],
        random=tensors["random"],
        state=manifest.seal(described, state),
    )


def directories(root: Path) -> list[Path]:
    """Oldest first, as the training loop lists them."""
    return sorted(root.glob("checkpoint-?????????"))


def write_one(root: Path, step: int) -> None:
    """A checkpoint, then the removal of what is older than the last two."""
    checkpoint.write(snapshot_of(step), root / f"checkpoint-{step:09d}")
    for old in directories(root)[:-KEPT]:
        shutil.rmtree(old)


def write_for_ever(root: Path, first_step: int, report: int) -> None:
    """Tell each step when it is written."""
    step = first_step
    while True:
        write_one(root, step)
        os.write(report, step.to_bytes(STEP_BYTES, "little"))
        step += 1


def judge(root: Path, committed: int, count: Count) -> int:
    """Restore as a trainer would; returns the step that was found, -1 for none."""
    torn: list[str] = []
    found = restoring.find(
        baton_sdk.Session({}),
        LoopOptions(steps=1, checkpoint_directory=str(root)),
        torch.nn.Module(),
        ranks.ALONE,
        lambda _, message: torn.append(message),
    )
    if found is None:
        if committed >= 0:
            count.bad.append(f"step {committed} was written and nothing can be restored: {torn}")
        return -1
    step = int(found.state["progress"]["step"])
    if torn:
        count.bad.append(f"the newest has its name and is not whole: {torn}")
    if not committed <= step <= committed + 1:
        count.bad.append(f"step {committed} was written, step {step} is found")
    if wrong := differing(snapshot_of(step), found):
        count.bad.append(f"step {step} differs in {wrong}")
    try:
        ranges.verify(root / f"checkpoint-{step:09d}")
    except manifest.ManifestError as error:
        count.bad.append(f"step {step}: {error}")
    for older in directories(root)[:-1]:
        try:
            checkpoint.read(older)
        except checkpoint.CheckpointError:
            count.torn_older += 1  # killed while it was removed: it is past its time
    return step


def differing(expected: checkpoint.Snapshot, found: checkpoint.Snapshot) -> list[str]:
    """The parts that are not the same, bit for bit."""
    wrong = [] if expected.state == found.state else ["state"]
    for part in checkpoint.TENSOR_FILES:
        ours, theirs = getattr(expected, part), getattr(found, part)
        same = ours.keys() == theirs.keys() and all(
            ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
            for name in ours
        )
        if not same:
            wrong.append(part)
    return wrong


def calls_of_one(root: Path, step: int) -> int:
    """How many calls change the directory for one checkpoint among others."""
    outcome, report = os.pipe()
    child = os.fork()
    if child == 0:
        faultshim.arm(root, 0, "before")
        write_one(root, step)
        os.write(report, faultshim.counted().to_bytes(STEP_BYTES, "little"))
        os._exit(0)
    os.close(report)
    calls = int.from_bytes(os.read(outcome, STEP_BYTES), "little")
    os.close(outcome)
    os.waitpid(child, 0)
    return calls


def kill_one(root: Path, first_step: int, plan: "tuple[int, str] | float") -> tuple[int, bool]:
    """One life of a writer. Returns the last step that it said was written (or one before
    ``first_step``), and whether it died by the kill that was planned."""
    outcome, report = os.pipe()
    child = os.fork()
    if child == 0:
        if not isinstance(plan, float):
            faultshim.arm(root, *plan)
        write_for_ever(root, first_step, report)
    os.close(report)
    began_s, last, told = time.monotonic(), first_step - 1, b""
    deadline_s = began_s + (plan if isinstance(plan, float) else CHILD_S_MAX)
    while True:
        ready, _, _ = select.select([outcome], [], [], max(0, deadline_s - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            deadline_s += CHILD_S_MAX
            continue
        piece = os.read(outcome, 1 << 16)
        if not piece:
            break
        told += piece
    os.close(outcome)
    _, status = os.waitpid(child, 0)
    if told:
        last = int.from_bytes(told[-STEP_BYTES:], "little")
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    in_time = isinstance(plan, float) or time.monotonic() - began_s < CHILD_S_MAX
    return last, killed and in_time


def torture(root: Path, kills: int, seed: int) -> Count:
    """Do it. The directory must be empty."""
    chance = random.Random(seed)
    count = Count()
    for step in range(KEPT + 1):
        write_one(root, step)
    step = KEPT + 1
    count.calls = calls_of_one(root, step)
    # Two checkpoints' worth of calls: the second begins with what the first left.
    plans = [(at, moment) for at in range(1, 2 * count.calls + 1) for moment in faultshim.MOMENTS]
    chance.shuffle(plans)
    for number in range(kills):
        at_call = number % 2 == 0 or kills <= len(plans)
        plan: tuple[int, str] | float = chance.uniform(0, RANDOM_INSTANT_S_MAX)
        if at_call:
            plan = plans[(number if kills <= len(plans) else number // 2) % len(plans)]
        committed, fired = kill_one(root, step + 1, plan)
        if not fired:
            count.bad.append(f"the kill did not happen: {plan}")
        count.checkpoints += committed - step
        if isinstance(plan, tuple):
            count.kills_at_calls += 1
            name = f"{plan[0]} {plan[1]}"
            count.fired[name] = count.fired.get(name, 0) + 1
        else:
            count.kills_at_instants += 1
        step = max(committed, judge(root, committed, count))
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """Torture, and print what happened."""
    parser = argparse.ArgumentParser("python -m tests.trainers.torture", description=main.__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="how many; default: 1000")
    parser.add_argument("--seed", type=int, default=1, help="of the plan; default: 1")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of words")
    options = parser.parse_args(arguments)
    if not faultshim.preloaded():
        words = [
            "-m",
            "tests.trainers.torture",
            *(sys.argv[1:] if arguments is None else arguments),
        ]
        environment = {**os.environ, "LD_PRELOAD": str(faultshim.build())}
        return subprocess.run([sys.executable, *words], env=environment, check=False).returncode
    torch.set_num_threads(1)
    began_s = time.monotonic()
    if not options.json:
        print(f"python -m tests.trainers.torture --kills {options.kills} --seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="baton-torn-") as directory:
        count = torture(Path(directory).resolve(), options.kills, options.seed)
    if options.json:
        print(json.dumps(asdict(count)))
    else:
        kills = count.kills_at_calls + count.kills_at_instants
        print(
            f"{kills} kills in {time.monotonic() - began_s:.0f} s: {count.kills_at_calls} at "
            f"{len(count.fired)} different calls and moments (one checkpoint makes {count.calls} "
            f"calls), {count.kills_at_instants} at random instants"
        )
        print(
            f"{count.checkpoints} checkpoints were written; {count.torn_older} times an older one"
        )
        print("was half removed, which no restore looks at")
        print(f"{len(count.bad)} bad restores", *count.bad[:20], sep="\n  ")
    return 1 if count.bad else 0


if __name__ == "__main__":
    sys.exit(main())
