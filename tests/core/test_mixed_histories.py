"""A few of the histories of `mixed_histories.py`, and that what they are for happens in them."""

from collections import Counter

import pytest

from tests.core.mixed_histories import play

pytestmark = pytest.mark.long

SEEDS = (0, 3, 6, 8)
HAPPENS = (
    "emptied by handoff", "displaced", "restarted", "forgotten", "scale.decided", "node.power",
    "node.power_failed", "node.lost", "node.drained", "gang.no_precopy",
)  # fmt: skip


def test_every_invariant_holds_where_everything_happens_together() -> None:
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        seen += play(seed, steps=40)
    assert not [what for what in HAPPENS if not seen[what]], seen
    assert seen["emptied by handoff"] > 1
