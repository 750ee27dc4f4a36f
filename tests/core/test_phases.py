"""The tables of phases: closed, reachable, and obeyed.

Problem: a table that names a phase nobody can reach, or leaves one out, draws a diagram that lies.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any

import pytest

from coordinator.core import phases
from coordinator.core.capacity_model import Power

Table = Mapping[Any, tuple[Any, ...]]

CASES = pytest.mark.parametrize(
    ("table", "kind", "first"),
    [
        pytest.param(phases.JOB_TRANSITIONS, phases.JobPhase, "queued", id="job"),
        pytest.param(phases.ATTEMPT_TRANSITIONS, phases.AttemptPhase, "assigned", id="attempt"),
        pytest.param(phases.NODE_TRANSITIONS, phases.NodePhase, "suspect", id="node"),
        pytest.param(phases.INTENT_TRANSITIONS, phases.NodeIntent, "open", id="intent"),
        pytest.param(phases.GPU_TRANSITIONS, phases.GpuPhase, "absent", id="gpu"),
        pytest.param(phases.POWER_TRANSITIONS, Power, "on", id="power"),
    ],
)


@CASES
def test_every_phase_can_be_reached(table: Table, kind: type[Enum], first: str) -> None:
    assert list(table) == list(kind)
    reached, edge = {first: True}, [kind(first)]
    while edge:
        for step in table[edge.pop()]:
            if step.value not in reached:
                reached[step.value] = True
                edge.append(step)
    assert sorted(reached) == sorted(phase.value for phase in kind)


@CASES
def test_advance_obeys_the_table(table: Table, kind: type[Enum], first: str) -> None:
    for present in kind:
        for following in kind:
            if following is present or following in table[present]:
                assert phases.advance(table, present, following, "it") is following
            else:
                with pytest.raises(phases.IllegalTransition, match="it cannot go from"):
                    phases.advance(table, present, following, "it")


def test_an_ended_attempt_never_goes_on() -> None:
    assert all(phases.ATTEMPT_TRANSITIONS[phase] == () for phase in phases.ATTEMPT_ENDED)


def test_the_diagram_names_every_step() -> None:
    text = phases.diagram(phases.NODE_TRANSITIONS)
    assert text.splitlines()[0] == "stateDiagram-v2"
    assert "    lost --> up" in text
    assert "    lost --> [*]" in phases.diagram(phases.ATTEMPT_TRANSITIONS)
