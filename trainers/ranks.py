"""The world of a training: which rank this process is, and what all ranks decide together.

Problem: ranks that compute together hang together. Each forward and backward pass is a collective,
so whoever leaves it, saves, or ends early alone leaves the others waiting for ever. A stop request
reaches one rank before another, clocks differ, and one rank's memory may be full.

So no rank follows its own judgement. After each step all ranks say what they know, a ``Vote`` (its
share of the loss, whether it was asked to stop, whether a checkpoint is due, whether it still waits
for the one before), and ``decide``, a pure function of all votes in the order of the ranks, says
the same everywhere. It is one small collective a step, over the host's network (gloo), where the
loop reads the loss from the device anyway; gradients go between the devices (nccl).

A job of one rank is a world of its own: everything here is then plain Python, and
``torch.distributed`` is not touched.

The variables are torchrun's: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
(https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables). Nobody waits for the
others at the end: whoever is done leaves, and who lost its peers is ended by its agent, or at last
by the timeout of its collectives.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b

import torch

from trainers import launcher

PROTOCOL = 2
"""What ranks tell each other, in which order and form; one higher with each change of that. Each
node's agent brings its own trainers, so in the middle of an upgrade ranks may have two of them.
That this is compared first, as a text like any, is the same in all."""

TEXT_BYTES_MAX = 1024
"""Of what one rank tells the others: a sentence. Longer ones are cut."""

NO_STOP_S = math.inf
"""The grace of a stop that nobody asked for."""


class RankError(RuntimeError):
    """The ranks cannot go on together; the sentence says which one, and why."""


class ProtocolError(RankError):
    """They cannot before a node is upgraded."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What one rank knows after a step."""

    loss: float
    """Its share of the mean over the global batch: the shares add up to it."""

    stop_s: float = NO_STOP_S
    """Seconds of grace left, where it was asked to stop."""

    due: bool = False
    """Whether a checkpoint is due by its clock. Rank 0's counts."""

    busy: bool = False
    """Whether it could not keep a checkpoint now: the one before is still being stored."""

    tight: bool = False
    """Whether its memory is nearly full."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks do next."""

    loss: float
    stop_s: float
    """Seconds of grace of the most urgent stop; ``NO_STOP_S``: go on."""

    save: bool
    tight: bool = False

    @property
    def stop(self) -> bool:
        return self.stop_s < NO_STOP_S


def decide(votes: Sequence[Vote]) -> Decision:
    """Pure. A checkpoint is taken when rank 0 finds it due and no rank is busy, so that the newest
    steps are everybody's; one rank's stop is a stop for all."""
    return Decision(
        loss=sum(vote.loss for vote in votes),
        stop_s=min(vote.stop_s for vote in votes),
        save=votes[0].due and not any(vote.busy for vote in votes),
        tight=any(vote.tight for vote in votes),
    )


class World:
    """All ranks of one training, seen from one of them."""

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, *, shared: bool = False
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.shared = shared
        """Whether the ranks are processes of one attempt, of which the first speaks for all."""

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def device(self) -> torch.device:
        """Where this rank computes."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.alone:
            return torch.device("cuda")
        # A rank with several GPUs sees its own ones only, and any of them will do.
        device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    def open(self, device: torch.device, timeout_s: float) -> None:
        """Meet the others. Raises RuntimeError when they do not come within ``timeout_s``, which is
        also what each collective waits for a rank that is gone, ProtocolError, and RankError where
        two of them would compute on one GPU."""
        if self.alone:
            return
        from torch import distributed

        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=timeout_s),
        )
        try:
            what = "the protocol of the trainers (upgrade the agent of the rank with the older one)"
            self.check_same(what, str(PROTOCOL))
        except RankError as error:
            raise ProtocolError(str(error)) from None
        check_apart(self.texts(gpu_of(device)))

    def decide(self, vote: Vote) -> Decision:
        """The same on every rank. A collective."""
        flags = [float(flag) for flag in (vote.due, vote.busy, vote.tight)]
        told = self.gather([vote.loss, vote.stop_s, *flags])
        return decide([Vote(loss, stop, *(f > 0 for f in flags)) for loss, stop, *flags in told])

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """What each rank says, in the order of the ranks; as many numbers from each. A collective,
        exact: nothing is summed on the way."""
        if self.alone:
            return [list(values)]
        return [part.tolist() for part in self._gather(torch.tensor(values, dtype=torch.float64))]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Of each number the sum over all ranks, the same bits everywhere. A collective."""
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def texts(self, text: str) -> list[str]:
        """What each rank says. A collective."""
        if self.alone:
            return [text]
        data = text.encode()[:TEXT_BYTES_MAX].ljust(TEXT_BYTES_MAX, b"\0")
        parts = self._gather(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return [bytes(part.tolist()).rstrip(b"\0").decode(errors="ignore") for part in parts]

    def check_same(self, what: str, text: str) -> None:
        """Raises RankError, on every rank, unless all say the same of ``what``. A collective."""
        texts = self.texts(text)
        for rank, other in enumerate(texts):
            if other != texts[0]:
                raise RankError(f"{what} differs: '{texts[0]}' on rank 0, '{other}' on rank {rank}")

    def check_none_failed(self, failure: str) -> None:
        """Raises RankError on every rank for the first of those that have a ``failure`` to tell;
        empty for none. A collective: nobody is left waiting for a rank that gave up."""
        for rank, text in enumerate(self.texts(failure)):
            if text:
                raise RankError(f"rank {rank}: {text}")

    def norm(self, own: torch.Tensor) -> torch.Tensor:
        """The norm of a vector of which this rank's part has the norm ``own``. A collective, on the
        device."""
        if self.alone:
            return own
        from torch import distributed

        squares = own.float().square()
        distributed.all_reduce(squares)
        return squares.sqrt()

    def seed_of(self, seed: int, samples: int) -> int:
        """What this rank's generators begin with: ranks draw different numbers, and a world of
        another size begins anew after ``samples``. 0 to 2**64 - 1."""
        text = b"%d/%d/%d" % (seed, samples, self.rank)
        return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")

    def _gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        from torch import distributed

        parts = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(parts, own)
        return parts


ALONE = World()


def gpu_of(device: torch.device) -> str:
    """The UUID of a GPU that no other rank may compute on. Empty on a CPU, and where NCCL was told
    that ranks share one (NCCL_MULTI_RANK_GPU_ENABLE, off by default)."""
    if device.type != "cuda" or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") != "0":
        return ""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def check_apart(uuids: Sequence[str]) -> None:
    """Raises RankError where two ranks, in the order of whose ranks these are, compute on one GPU:
    NCCL calls that an "invalid usage", in the first step and with a stack of its callers."""
    users: dict[str, int] = {}
    for rank, uuid in enumerate(uuids):
        if uuid and users.setdefault(uuid, rank) != rank:
            raise RankError(
                f"ranks {users[uuid]} and {rank} both compute on {uuid}, and NCCL takes one rank of"
                " a training for each GPU: start as many ranks as there are GPUs (--ranks N"
                " --gpus 1, or below torchrun --gpus N and --nproc-per-node=N)"
            )


def unseen(environment: Mapping[str, str]) -> str:
    """Where this process was given GPUs and torch, which could use them, sees none: the sentence
    that says so, since a training on the CPU looks like a slow one. Else empty."""
    given = environment.get("CUDA_VISIBLE_DEVICES", "")
    if not given or torch.version.cuda is None or torch.cuda.is_available():
        return ""
    return (
        f"CUDA_VISIBLE_DEVICES is {given}, and torch {torch.__version__} sees no GPU: training goes"
        " on on the CPU. The driver may be older than this CUDA needs, or /dev/nvidia-uvm is not"
        " there (nvidia-modprobe -u -c 0 makes it)"
    )


def world_of(environment: Mapping[str, str]) -> World:
    """As torchrun and Baton describe it."""
    size = int(environment.get("WORLD_SIZE") or 1)
    if size <= 1:
        return ALONE
    local_rank = int(environment.get("LOCAL_RANK") or 0)
    return World(int(environment["RANK"]), size, local_rank, shared=launcher.shared(environment))
