"""Ranks as real processes, and a host that starts them in no time.

A process that imports torch and transformers takes seconds, and the tests of several ranks need
dozens of them. So one host imports once and computes nothing; each rank is forked from it, which is
how agents start trainers too. What a rank does is its module's affair (`gang.py`, `hook_rank.py`):
the host imports it, and what its `serve_ranks` calls, `serve`, forks.

    python -m tests.trainers.forking MODULE    a JSON line in for each set of ranks, one out with
                                               their statuses
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.held_port import HOST, held_port

RANKS_S_MAX = 200
"""Of ranks that hang, on a busy machine, where nothing else is said."""


@dataclass(frozen=True)
class Ended:
    """A rank that has ended."""

    status: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.events if line["event"] == "step"]

    def event(self, name: str) -> dict[str, Any]:
        """The only one of this name."""
        (found,) = [line for line in self.events if line["event"] == name]
        return found


class Host:
    """Starts ranks, one set after another."""

    def __init__(self, folder: Path, module: str, ranks_s_max: int = RANKS_S_MAX) -> None:
        self.folder = folder
        self._ranks_s_max = ranks_s_max
        self._module = module
        self._process: subprocess.Popen[str]
        self._sets = 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.trainers.forking", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(self._ranks_s_max) == 0

    def place(self) -> Path:
        """A folder for the next set of ranks."""
        self._sets += 1
        place = self.folder / f"ranks-{self._sets}"
        place.mkdir()
        return place

    def run_in(self, place: Path, environments: Sequence[Mapping[str, str]]) -> list[Ended]:
        """Run as many ranks as there are environments to their end; what became of each."""
        with held_port() as port:
            return self._run_at(port, place, environments)

    def _run_at(
        self, port: int, place: Path, environments: Sequence[Mapping[str, str]]
    ) -> list[Ended]:
        size = len(environments)
        common = {"MASTER_ADDR": HOST, "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        told = {
            "place": str(place),
            "ranks_s_max": self._ranks_s_max,
            "environments": [
                {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **own}
                for rank, own in enumerate(environments)
            ],
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        while answer["place"] != str(
            place
        ):  # of ranks that a test which timed out did not wait for
            answer = json.loads(self._process.stdout.readline())
        texts = [
            [(place / f"{name}-{rank}").read_text() for name in ("out", "err")]
            for rank in range(size)
        ]
        return [
            Ended(status, *text) for status, text in zip(answer["statuses"], texts, strict=True)
        ]


def serve(run_rank: Callable[[Path], int], leave: Callable[[int], object]) -> None:
    """Fork the ranks that are asked for, until nobody asks any more. ``run_rank`` gets the set's
    folder and returns an exit status; ``leave`` ends the process with it."""
    for line in sys.stdin:
        told = json.loads(line)
        children = []
        for environment in told["environments"]:
            child = os.fork()
            if child == 0:
                become(Path(told["place"]), environment)
                signal.alarm(told["ranks_s_max"])
                leave(run_rank(Path(told["place"])))
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        answer = {"place": told["place"], "statuses": statuses}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def become(place: Path, environment: Mapping[str, str]) -> None:
    """In a forked process: have a rank's environment, and write into its files."""
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        opened = os.open(place / f"{name}-{environment['RANK']}", os.O_CREAT | os.O_WRONLY)
        os.dup2(opened, number)


def main() -> None:
    """The host: what imports make stays, and is not looked through for garbage."""
    gc.disable()
    module = importlib.import_module(sys.argv[1])
    gc.freeze()
    gc.enable()
    module.serve_ranks()


if __name__ == "__main__":
    main()
