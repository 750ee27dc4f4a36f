"""How long nodes take to come up, by model: the time within which 19 of 20 have.

Problem: demand has to be looked at until a node that is started now would be there. Two machines of
one rack take two minutes and twelve, and whoever plans with a mean is late every other time. So the
95th percentile of what was seen counts, by node model; what an operator says (or the table of
defaults) stands in as one boot more, which speaks until twenty have been seen.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

PERCENT: Final = 95
PRIOR_MS: Final = 600_000  # ten minutes: a server with eight GPUs that checks its memory


@dataclass(frozen=True, slots=True)
class BootTimes:
    """`seen_ms` by node model, the newest last; `priors_ms` where somebody has said one."""

    priors_ms: Mapping[str, int] = field(default_factory=dict)
    prior_ms: int = PRIOR_MS
    seen_ms: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def of(self, model: str) -> int:
        """Within so many milliseconds a node of this model is there."""
        seen = self.seen_ms.get(model, ())
        ordered = sorted((*seen, self.priors_ms.get(model, self.prior_ms)))
        return ordered[math.ceil(len(ordered) * PERCENT / 100) - 1]
