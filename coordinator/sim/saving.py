"""What checkpoints cost a job that runs, and what they leave of it when its node fails.

Problem: saving often loses little in a failure and costs time all along, and a simulation that
counts only one of the two recommends nonsense. So a job trains for `checkpoint_s`, stands still for
`save_s`, and so on, from the moment at which it is ready; what was trained since the last save that
was completed is lost. Where `checkpoint_s` is 0 it saves only when it is asked to stop.
"""

import math

from coordinator.sim.model import Chance


def trained_s(elapsed_s: float, chance: Chance) -> float:
    """Of the time since a job was ready, what it has trained."""
    if not chance.checkpoint_s:
        return elapsed_s
    cycles, rest_s = divmod(elapsed_s, chance.checkpoint_s + chance.save_s)
    return cycles * chance.checkpoint_s + min(rest_s, chance.checkpoint_s)


def elapsed_s(trained_s: float, chance: Chance) -> float:
    """When it has trained so long; what is then done is not saved any more."""
    if not chance.checkpoint_s:
        return trained_s
    saves = max(0, math.ceil(trained_s / chance.checkpoint_s) - 1)
    return trained_s + saves * chance.save_s


def unsaved_s(elapsed_s: float, chance: Chance) -> float:
    """What it has trained since the last save that it completed."""
    if not chance.checkpoint_s:
        return elapsed_s
    return min(elapsed_s % (chance.checkpoint_s + chance.save_s), chance.checkpoint_s)
