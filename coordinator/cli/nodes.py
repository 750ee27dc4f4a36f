"""`baton nodes`, `cordon`, `drain`, `uncordon`, `forget`: what the operator of a fleet does.

A node's figures are sums or extremes over its GPUs. A sum is shown only if every GPU answers: "310
W" for a node of which one GPU is silent would be a wrong number, and "-" is a true one; so it is
for figures that nobody has read for a while. `--json` has each GPU's own figures, and their age.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from coordinator.cli import completion, units
from coordinator.cli.render import (
    UNKNOWN,
    Column,
    write_json,
    write_notice,
    write_sentence,
    write_table,
)
from coordinator.cli.settings import common_options, connect, settings_of
from coordinator.core.sentences import quantity

if TYPE_CHECKING:
    from coordinator.cli.client import Client
    from coordinator.cli.values import Gpu, GpuShare, GpuTelemetry, Node

RATES = ("own", "off", "slow", "normal", "watch")
# More would push the reason off a terminal; --json has all.
ATTEMPTS_SHOWN = 2
# Older figures are history, and "-". Those that are read slowly by order are some 15 s old at most.
STALE_S = 90.0

_NODE = click.argument("node", shell_complete=completion.nodes)

_COLUMNS = (
    Column("NODE"),
    Column("PHASE"),
    Column("INTENT"),
    Column("GPUS FREE", wrap=True),
    Column("UTIL", right=True),
    Column("MEMORY", right=True),
    Column("TEMP", right=True),
    Column("POWER", right=True),
    Column("ATTEMPTS"),
    Column("REASON", wrap=True),
)


@click.command()
@common_options
@click.pass_context
def nodes(context: click.Context) -> None:
    """List the nodes of the fleet.

    GPUS FREE is free/all for each type of GPU, and how many jobs share GPUs of it with how much
    memory (--json says which), UTIL the mean over a node's GPUs, MEMORY their
    used/all, TEMP the hottest, POWER the sum; "-" where the driver does not say.

    \b
    Example:
      baton nodes
      baton nodes --json | jq -r '.[] | select(.phase == "lost") | .id'
    """
    with connect(context) as client:
        found = client.nodes()
    if settings_of(context).as_json:
        write_json(found)
        return
    if found:
        write_table(_COLUMNS, map(_row, found))
    else:
        write_notice("no node has joined yet; start baton-agent on a machine")


def _verb(name: str, call: "Callable[[Client, str], Node]", help_text: str) -> click.Command:
    """One command that takes a node and shows what became of it."""

    @click.command(name, help=help_text)
    @_NODE
    @common_options
    @click.pass_context
    def command(context: click.Context, node: str) -> None:
        with connect(context) as client:
            changed = call(client, node)
        if settings_of(context).as_json:
            write_json(changed)
            return
        tail = f"; {changed.reason}" if changed.reason else ""
        write_sentence(f"node {changed.id}: {changed.intent or UNKNOWN}{tail}")

    return command


cordon = _verb(
    "cordon",
    lambda client, node: client.cordon(node),
    """Take no new work on NODE; what runs there goes on.

    \b
    Example:
      baton cordon n3
      baton uncordon n3
    """,
)
drain = _verb(
    "drain",
    lambda client, node: client.drain(node),
    """Empty NODE: take no new work, and hand off what runs there.

    Each job is asked to checkpoint, and goes on where there is room. `baton nodes` shows the intent
    `drained` when the node is empty.

    \b
    Example:
      baton drain n3
    """,
)
uncordon = _verb(
    "uncordon",
    lambda client, node: client.uncordon(node),
    """Take work on NODE again, after cordon or drain.

    \b
    Example:
      baton uncordon n3
    """,
)


@click.command()
@_NODE
@click.option(
    "--lose-checkpoints", is_flag=True, help="Also with checkpoints that lie nowhere else."
)
@common_options
@click.pass_context
def forget(context: click.Context, node: str, *, lose_checkpoints: bool) -> None:
    """Take NODE, which is lost for good, out of the fleet.

    Refused while it is connected, may still run something, or alone has a checkpoint. What ran
    there stays in `baton cost`. If its agent says hello again, it joins as a new node does.

    \b
    Example:
      baton forget n3
    """
    with connect(context) as client:
        was = client.forget(node, lose_checkpoints=lose_checkpoints)
    if settings_of(context).as_json:
        write_json(was)
        return
    click.echo(f"node {was.id}: forgotten")


@click.command()
@_NODE
@click.option(
    "--rate",
    required=True,
    type=click.Choice(RATES),
    help="off, slow (a tenth), normal, watch (five times as often); own: as its agent's file says.",
)
@common_options
@click.pass_context
def telemetry(context: click.Context, node: str, rate: str) -> None:
    """Say how often the GPUs of NODE are read.

    A reading takes the driver's lock for some milliseconds, which trainers wait for: slow or off
    suits a benchmark, watch the hunt for a fault. It counts until it is said otherwise, also after
    a restart. With off, nothing is known of the GPUs but the driver's own errors.

    \b
    Example:
      baton telemetry n3 --rate watch
      baton telemetry n3 --rate own
    """
    with connect(context) as client:
        changed = client.set_telemetry_rate(node, rate)
    if settings_of(context).as_json:
        write_json(changed)
        return
    click.echo(f"node {changed.id}: telemetry {changed.telemetry_rate}")


def _row(node: "Node") -> tuple[object, ...]:
    telemetries = [_fresh(gpu) for gpu in node.gpus if gpu.phase != "absent"]
    utilizations = _known(telemetries, lambda said: said.utilization_ratio)
    temperatures = _known(telemetries, lambda said: said.temperature_celsius)
    powers_mw = _known(telemetries, lambda said: said.power_mw)
    return (
        node.id,
        node.phase,
        node.intent,
        _free(node.gpus),
        f"{sum(utilizations) / len(utilizations):.0%}" if utilizations else None,
        _memory(node.gpus),
        f"{max(temperatures):.0f} °C" if temperatures else None,
        f"{sum(powers_mw) / 1000:.0f} W"
        if powers_mw and len(powers_mw) == len(telemetries)
        else None,
        _attempts(node.attempts),
        _remarks(node),
    )


def _remarks(node: "Node") -> str:
    rate = "" if node.telemetry_rate == "own" else f"telemetry {node.telemetry_rate}, by order"
    absence = node.host.gpu_absence if node.host is not None and node.phase == "up" else ""
    return "; ".join(filter(None, (node.reason, absence, rate, _staleness(node.gpus))))


def _fresh(gpu: "Gpu") -> "GpuTelemetry | None":
    telemetry = gpu.telemetry
    stale = telemetry is not None and telemetry.age_s is not None and telemetry.age_s > STALE_S
    return None if stale else telemetry


def _staleness(gpus: "list[Gpu]") -> str:
    stale = [gpu for gpu in gpus if gpu.phase != "absent" and _fresh(gpu) is not gpu.telemetry]
    ages_s = [gpu.telemetry.age_s or 0.0 for gpu in stale if gpu.telemetry is not None]
    return f"GPUs were last read {max(ages_s):.0f} s ago" if ages_s else ""


def _attempts(ids: list[str]) -> str:
    """The first of them, and how many more there are: a list may be cut, an id may not."""
    more = len(ids) - ATTEMPTS_SHOWN
    return " ".join([*ids[:ATTEMPTS_SHOWN], *([f"+{more}"] if more > 0 else [])])


def _known(
    telemetries: Iterable["GpuTelemetry | None"],
    figure: "Callable[[GpuTelemetry], float | None]",
) -> list[float]:
    """The figure of each GPU that says it."""
    said = (figure(telemetry) for telemetry in telemetries if telemetry is not None)
    return [value for value in said if value is not None]


def _free(gpus: "list[Gpu]") -> str:
    """ "3/4 H100 80GB HBM3, 0/1 RTX 4090", types by name; absent GPUs are counted apart."""
    texts = []
    for name in sorted({gpu.name for gpu in gpus}):
        phases = [gpu.phase for gpu in gpus if gpu.name == name]
        absent = phases.count("absent")
        # Everything here is NVIDIA's; what tells two types apart comes after.
        short_name = name.removeprefix("NVIDIA ").removeprefix("GeForce ")
        text = f"{phases.count('free')}/{len(phases) - absent} {short_name}"
        shares = [share for gpu in gpus if gpu.name == name for share in gpu.shares]
        text += f" ({absent} absent)" if absent else ""
        texts.append(f"{text} ({_sharers(shares)})" if shares else text)
    return ", ".join(texts)


def _sharers(shares: "list[GpuShare]") -> str:
    memory = units.format_size(sum(share.memory_bytes for share in shares))
    return f"{quantity(len(shares), 'job shares', 'jobs share')} {memory}"


def _memory(gpus: "list[Gpu]") -> str | None:
    present = [gpu for gpu in gpus if gpu.phase != "absent"]
    used = _known([_fresh(gpu) for gpu in present], lambda said: said.memory_used_bytes)
    if not present or len(used) < len(present):
        return None
    all_bytes = sum(gpu.memory_bytes for gpu in present)
    return f"{sum(used) / 1024**3:.0f}/{units.format_size(all_bytes)}"
