"""`baton fit`: what a job would do on each type of GPU of the fleet, before it is submitted.

Problem: which GPU is worth its price for this job, and does it fit there at all? The coordinator
knows the fleet, its history and public facts; the user's side knows the model's folder. So the
dimensions are read here (`model_folder.py`), sent along, and the answer is shown as a table with
the reasons below it: a number without its origin would be believed too much or not at all.

"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.goodput import duration
from coordinator.cli.render import (
    UNKNOWN,
    Column,
    write_json,
    write_notice,
    write_sentence,
    write_table,
)
from coordinator.cli.settings import common_options, connect, settings_of
from coordinator.cli.submit import here

if TYPE_CHECKING:
    from coordinator.cli.values import Fit, FitReport

_COLUMNS = (
    Column("GPU"),
    Column("GPUS", right=True),
    Column("MEMORY"),
    Column("STEPS/S", right=True),
    Column("TOKENS/S", right=True),
    Column("$/H", right=True),
    Column("$/M TOKENS", right=True),
    Column("TIME", right=True),
)
_FITTINGS = {"fits": "fits", "accumulates": "accumulates", "does_not_fit": "does not fit"}


class Price(click.ParamType[tuple[str, float]]):
    """A part of a GPU's name, and dollars an hour."""

    name = "gpu=usd"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        name, _, amount = str(value).rpartition("=")
        try:
            usd = float(amount)
        except ValueError:
            usd = -1.0
        if not name or not 0 <= usd < float("inf"):
            self.fail(f"{value!r} is not a name and dollars an hour, like H100=2.50", param, ctx)
        return name, usd


@click.command()
@click.argument("job_file", metavar="JOB.toml", type=click.Path(path_type=Path))
@click.option(
    "--price",
    "prices",
    multiple=True,
    type=Price(),
    envvar="BATON_GPU_PRICES",
    show_envvar=True,
    help="US dollars an hour of one GPU with this in its name; repeatable. Where none is given, "
    "public prices, whose date and source stand below the table.",
)
@common_options
@click.pass_context
def fit(context: click.Context, job_file: Path, prices: tuple[tuple[str, float], ...]) -> None:
    """Say what a job would do on each GPU.

    JOB.toml is what `baton submit` takes, and nothing is submitted. Speed is the median, and in
    brackets what it lies between eight times of ten: by what jobs of this fleet did, and by
    public facts where nothing has run yet. Of a trainer of language models, memory is counted,
    too; "accumulates" means that it fits with fewer samples at once and trains the same. What
    is not known is "-", and below the table stands why.

    \b
    Example:
      baton fit job.toml
      baton fit job.toml --price H100=2.50 --price 4090=0.35
      baton fit job.toml --json | jq -r '.fits[] | select(.fitting == "fits") | .gpu_type'
    """
    import msgspec

    from coordinator.cli import jobfile, model_folder

    spec = jobfile.to_spec(jobfile.read(job_file), here())
    if spec.share_automatic:  # what it does on a GPU of its own
        spec = msgspec.structs.replace(spec, share_automatic=False, shared_gpu_memory_bytes=0)
    model = model_folder.of_job(spec) if spec.trainer else ""
    with connect(context) as client:
        report = client.fit(spec, model, dict(prices))
    if settings_of(context).as_json:
        write_json(report)
        return
    _write(report)


def _write(report: "FitReport") -> None:
    if not report.fits:
        write_notice("no node with a GPU has joined yet; start baton-agent on a machine")
        return
    write_table(_COLUMNS, map(_row, report.fits))
    for sentence, types in _sentences(report.fits).items():
        write_sentence(f"{', '.join(types)}: {sentence}")
    if any(one.usd_per_hour is not None for one in report.fits) and report.prices_source:
        write_sentence(f"prices that --price does not give: {report.prices_source}")


def _row(one: "Fit") -> list[object]:
    speed = one.speed
    tokens = None
    if speed is not None and one.tokens_per_step is not None:
        tokens = [rate * one.tokens_per_step for rate in _rates(one)]
    return [
        one.gpu_type,
        f"{one.gpus_of_job} of {one.gpus}",
        _FITTINGS.get(one.fitting or "", UNKNOWN),
        None if speed is None else _band(_rates(one)),
        None if tokens is None else _band(tokens),
        None if one.usd_per_hour is None else f"{one.usd_per_hour:.2f}",
        None if one.usd_per_million_tokens is None else number(one.usd_per_million_tokens),
        None if one.duration_seconds is None else duration(one.duration_seconds),
    ]


def _rates(one: "Fit") -> list[float]:
    assert one.speed is not None
    speed = one.speed
    return [speed.steps_per_second, speed.steps_per_second_low, speed.steps_per_second_high]


def _band(values: list[float]) -> str:
    median, low, high = map(number, values)
    return f"{median} ({low} to {high})"


def number(value: float) -> str:
    """Two significant digits: more is not known."""
    rounded = float(f"{value:.1e}")
    if rounded >= 10 or rounded == 0:
        return f"{rounded:,.0f}"
    return f"{rounded:.{1 - math.floor(math.log10(rounded))}f}"


def _sentences(fits: "list[Fit]") -> dict[str, list[str]]:
    """Each reason once, with the types that it is about; one that another begins with, not at
    all."""
    found: dict[str, list[str]] = {}
    for one in fits:
        reasons = dict.fromkeys([one.memory_why, one.speed_why, one.unsuited])
        for sentence in reasons:
            longer = any(other != sentence and other.startswith(sentence) for other in reasons)
            if sentence and not longer:
                found.setdefault(sentence, []).append(one.gpu_type)
    return found
