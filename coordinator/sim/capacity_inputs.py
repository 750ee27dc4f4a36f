"""A fleet of nodes that can be switched off (TOML), as people write it.

    nodes = 133
    gpus_per_node = 8
    boot_s = 600
    busy_w = 5000
    idle_w = 1500
    usd_per_kwh = 0.12
    wait_usd_per_gpu_h = 0.95
    idle_usd_per_gpu_h = 0.05
    spares = 1

The last three are what Baton decides by: what a GPU-hour of waiting work and of an idle GPU costs,
and how many empty nodes stay on. A misspelt key, or a number that makes no sense, is an error.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from coordinator.core.guard_rails import Bounds
from coordinator.core.scaling import Rules
from coordinator.sim.capacity_replay import BUSY_W, IDLE_W, OFF_W, Boxes
from coordinator.sim.toml_file import BadFile, check_number, read_toml

NODES_MAX: Final = 10_000  # each is looked at at each step
BOOT_S_MAX: Final = 86_400.0
# Where waiting or idling costs nothing, there is nothing to decide.
ABOVE_0: Final = ("gpus_per_node", "boot_s", "busy_w", "wait_usd_per_gpu_h", "idle_usd_per_gpu_h")


class BoxesFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Zero `nodes`: as many as the most that is wanted takes."""

    nodes: int = 0
    gpus_per_node: int = 8
    gpu_type: str = "GPU"
    boot_s: float = 600.0
    busy_w: float = BUSY_W
    idle_w: float = IDLE_W
    off_w: float = OFF_W
    usd_per_kwh: float = 0.12
    wait_usd_per_gpu_h: float = 0.95
    idle_usd_per_gpu_h: float = 0.05
    spares: int = 1


@dataclass(frozen=True, slots=True)
class PowerInputs:
    fleet: Boxes
    rules: Rules


def read_boxes(path: Path | None, most_gpus: float) -> PowerInputs:
    """The fleet of this file, or one of the defaults that holds the most that is wanted."""
    said = BoxesFile() if path is None else read_toml(path, BoxesFile)
    named = path or "the fleet"
    for key, value in msgspec.structs.asdict(said).items():
        if not isinstance(value, str):
            check_number(named, key, value, above=key in ABOVE_0)
    if said.boot_s > BOOT_S_MAX:
        raise BadFile(f"{named}: boot_s is {said.boot_s:g}; a node boots within a day")
    if not said.off_w <= said.idle_w <= said.busy_w:
        raise BadFile(
            f"{named}: busy_w is {said.busy_w:g}, idle_w {said.idle_w:g} and off_w {said.off_w:g};"
            " a node takes most when busy and least when off"
        )
    nodes = said.nodes or max(1, math.ceil(most_gpus / said.gpus_per_node))
    if nodes > NODES_MAX:
        raise BadFile(f"{named}: {nodes} nodes; {NODES_MAX} at most")
    fleet = Boxes(
        nodes,
        said.gpus_per_node,
        said.gpu_type,
        said.boot_s,
        said.busy_w,
        said.idle_w,
        said.off_w,
        said.usd_per_kwh,
    )
    rules = Rules(
        wait_usd_per_gpu_h=said.wait_usd_per_gpu_h,
        idle_usd_per_gpu_h=said.idle_usd_per_gpu_h,
        bounds=Bounds(spares_min=said.spares),
    )
    return PowerInputs(fleet, rules)
