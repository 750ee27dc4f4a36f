"""Unmodified `Trainer` scripts of several ranks, none of which sees another's files."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from baton_hook import resume, states

RANKS = 2
RANKS_S_MAX = 200

pytestmark = pytest.mark.timeout(2 * RANKS_S_MAX + 20)


def test_ranks_on_two_nodes_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Each with its own random numbers: a dropout that begins anew is another training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainers.hook_rank", str(tmp_path)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=RANKS_S_MAX)
            assert rank.returncode == 0, err
            told = json.loads(out.splitlines()[-1])
            wanted = dict.fromkeys(("done", "weights", "losses", "draws"), True)
            assert told == {"status": 75, **wanted}, err
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    handed = {path.name for path in (tmp_path / "handed").iterdir()}
    assert {states.name_of(rank) for rank in range(RANKS)} <= handed
    assert not (tmp_path / "node-0" / "first" / "checkpoint-5" / states.name_of(1)).exists()


def test_states_that_are_not_there_or_too_large_are_left_out(tmp_path: Path) -> None:
    assert states.read(tmp_path, 1) == b""
    (tmp_path / states.name_of(1)).write_bytes(b"x" * (states.BYTES_MAX + 1))
    assert states.read(tmp_path, 1) == b""
    (tmp_path / states.name_of(0)).write_bytes(b"own")
    states.add([b"", b"", b"two"], tmp_path)
    assert states.read(tmp_path, 0) == b"own"
    assert states.read(tmp_path, 2) == b"two"


def test_a_state_of_an_earlier_attempt_gives_way_and_is_not_written_into(tmp_path: Path) -> None:
    """Rank 1 ran on this node then; what the script has keeps its bytes."""
    saved = tmp_path / "checkpoint-100"
    saved.mkdir()
    (saved / states.name_of(0)).write_bytes(b"new 0")
    (saved / states.name_of(1)).write_bytes(b"old 1")
    staged = tmp_path / "staged"
    resume.link_tree(saved, staged)
    states.add([b"new 0", b"new 1"], staged)
    assert [states.read(staged, rank) for rank in range(RANKS)] == [b"new 0", b"new 1"]
    assert states.read(saved, 1) == b"old 1"
    assert len(list(staged.iterdir())) == RANKS
