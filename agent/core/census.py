"""What this node has now, counted: what its metrics say beside what the shell counts itself.

Problem: counters that are raised and lowered along the way are wrong after the first forgotten
place. So nothing is kept for the sake of being counted: this looks at the state when it is asked.
"""

from dataclasses import dataclass

from agent.core import gpus
from agent.core.attempt import Phase
from agent.core.health import GpuVerdict
from agent.core.state import State
from agent.core.values import GpuFacts, HostFacts, Sample


@dataclass(frozen=True, slots=True)
class Census:
    """`attempts` has every phase, those without an attempt too. `sample` is the last reading and
    `sample_age_ms` how old it is; `None` before the first. `verdicts`: what was
    told of GPUs."""

    host: HostFacts | None
    gpus: tuple[GpuFacts, ...]
    sample: Sample | None
    sample_age_ms: int | None
    attempts: tuple[tuple[Phase, int], ...]
    spool_length: int
    welcomed: bool
    verdicts: tuple[GpuVerdict, ...] = ()


def census(state: State, now_ms: int) -> Census:
    """The state as it is. Costs one step for each attempt."""
    attempts = dict.fromkeys(Phase, 0)
    for live in state.attempts.values():
        attempts[live.record.phase] += 1
    return Census(
        state.host,
        state.gpus,
        state.sample,
        None if state.sample is None else now_ms - state.sample_ms,
        tuple(attempts.items()),
        len(state.spool),
        state.welcomed,
        gpus.verdicts(state),
    )
