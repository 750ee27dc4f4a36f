"""What is read of a GPU less often, from an agent's reading to `baton nodes --json`.

Problem: four descriptions of one thing (the agent's, the contract's, the coordinator's, the command
line's) lose a field where one of them forgets it, and a field that is unknown becomes a zero where
one of them has no way to say so.
"""

from dataclasses import fields
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent import wire as agent_wire
from agent.core import messages as am
from agent.core import values as av
from coordinator import wire as coordinator_wire
from coordinator import wire_nodes
from coordinator.cli.decoding import decode_node
from coordinator.cli.values import GpuDetails
from coordinator.core import messages as cm
from coordinator.core import model
from coordinator.core.phases import GpuPhase, NodePhase

COUNT = st.integers(0, 2**31 - 1)
STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    "int | None": COUNT,
    "bool | None": st.booleans(),
    "float | None": st.floats(0, 1),
    "str | None": st.text(max_size=3),
    str(tuple[av.GpuProcess, ...] | None): st.lists(
        st.builds(av.GpuProcess, COUNT, st.none() | COUNT), max_size=3
    ).map(tuple),
}


def readings(of: type) -> st.SearchStrategy[Any]:
    drawn = {
        field.name: st.none() | STRATEGIES[str(field.type)]
        for field in fields(of)
        if field.name != "uuid"
    }
    return st.none() | st.builds(of, uuid=st.just("GPU-1"), **drawn)


def shown(sample: av.GpuSample) -> GpuDetails | None:
    beat = am.Heartbeat(1, None, (sample,), (), ())
    heard = coordinator_wire.decode(agent_wire.encode(beat))
    assert isinstance(heard, cm.Heartbeat)
    facts = model.GpuFacts("GPU-1", "H100", 1)
    host = model.HostFacts("", "", 1, 1)
    view = model.NodeView(
        model.Node("n1", "j1", "", host, (facts,)),
        NodePhase.UP,
        (model.GpuView(facts, GpuPhase.FREE, figures=heard.gpus[0].figures),),
        (),
        "",
    )
    (gpu,) = decode_node(wire_nodes.encode_node(view)).gpus
    assert gpu.telemetry is not None
    return gpu.telemetry.details


@given(readings(av.GpuUsage), readings(av.GpuInventory))
def test_what_is_known_is_shown_and_nothing_else(
    usage: av.GpuUsage | None, inventory: av.GpuInventory | None
) -> None:
    found = shown(av.GpuSample("GPU-1", usage=usage, inventory=inventory))
    for name in GpuDetails.__struct_fields__:
        source = usage if hasattr(av.GpuUsage, name) else inventory
        wanted = None if source is None else getattr(source, name)
        if name == "processes" and wanted is not None:
            wanted = len(wanted)
        assert (None if found is None else getattr(found, name)) == wanted, name


def test_of_a_gpu_that_says_nothing_nothing_is_shown() -> None:
    assert shown(av.GpuSample("GPU-1", power_mw=1)) is None
    empty = av.GpuSample("GPU-1", usage=av.GpuUsage("GPU-1"), inventory=av.GpuInventory("GPU-1"))
    assert shown(empty) is None
    none_runs = av.GpuSample("GPU-1", usage=av.GpuUsage("GPU-1", processes=()))
    details = shown(none_runs)
    assert details is not None
    assert (details.processes, details.nvlinks_down) == (0, None)
