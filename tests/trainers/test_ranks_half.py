"""float16 on several ranks: an overflow that one of them finds is everybody's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers import tasks
from tests.trainers.forking import Ended
from tests.trainers.gang import Host
from tests.trainers.test_ranks import PLAIN, RANDOM, SAVED, STEPS, only, parts

pytestmark = pytest.mark.xdist_group("ranks")

FIRST_SCALE = 65536.0
"""torch's own."""


def scales(rank: Ended) -> list[float]:
    return [line["loss_scale"] for line in rank.events if line["event"] == "step"]


@pytest.mark.parametrize("clip_norm", [0.4, 0.0])
@pytest.mark.parametrize("overflow_rank", [-1, 0, 1])
def test_a_step_is_left_out_by_all_ranks_or_none(
    overflow_rank: int, clip_norm: float, host: Host, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {**PLAIN, "steps": 3, "checkpoint_every_steps": 1}
    chosen |= {"clip_norm": clip_norm, "checkpoint_directory": str(tmp_path)}
    chosen |= {"schedule": "constant"}  # the others end with a rate of 0, which leaves all as it is
    fault: dict[str, Any] = {"overflow_rank": overflow_rank, "overflow_step": 3}
    ranks = host.run(2, **chosen, **fault, precision="float16")
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    left_out = overflow_rank >= 0
    scale = FIRST_SCALE / 2 if left_out else FIRST_SCALE
    assert scales(ranks[0]) == [FIRST_SCALE, FIRST_SCALE, scale]
    for before, after in zip(parts(tmp_path, 2), parts(tmp_path, 3), strict=True):
        for tensors, later in ((before.model, after.model), (before.optimizer, after.optimizer)):
            same = [torch.equal(tensors[name], later[name]) for name in tensors]
            assert same
            assert all(same) if left_out else not any(same)
        assert dict(after.state["extra"]["scaler"]["$pairs"])["scale"] == scale


def test_the_scale_goes_on_bit_for_bit(host: Host, tmp_path: Path) -> None:
    chosen = {**RANDOM, "precision": "float16"}
    kept, again = tmp_path / "straight", tmp_path / "again"
    fault: dict[str, Any] = {"overflow_rank": 1, "overflow_step": 2}
    first, _ = host.run(2, **chosen, **fault, checkpoint_directory=str(kept))
    then, _ = host.run(2, **chosen, checkpoint_directory=only(kept, SAVED, again))
    assert then.event("resumed")["level"] == "E0", then.event("resumed")
    assert then.losses == first.losses[SAVED:]
    assert scales(then) == scales(first)[SAVED:] == [FIRST_SCALE / 2] * (STEPS - SAVED)
    for left, right in zip(parts(kept, STEPS), parts(again, STEPS), strict=True):
        assert tasks.differences(left, right) == []
