"""A trace (CSV) and a fleet (TOML), as people write them.

Problem: what a simulation is asked is only as good as what it is given, and a misspelt column that
is read as nothing gives a plausible wrong answer. So every column must be known or be a GPU type of
the fleet, every cell must be what its column says, and a sentence names file, line and column of
whatever is not.

    job,arrival_s,gpus,steps,class,project,A100,K80
    1,0,1,36000,standard,vision,12.5,1.9

A column of a GPU type has the steps a second that the job makes there, on all its GPUs together;
an empty cell: it cannot run there.

    restart_s = 60
    [gpus.A100]
    count = 8
    price_per_h = 1.9
    [projects.vision]
    gpu_hours_per_day = 48
    [chance]
    node_mtbf_h = 2000

`[projects.NAME]` are quotas, as in the coordinator's configuration.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from coordinator.core.model import CLASS_RANK
from coordinator.core.quotas import Quota
from coordinator.sim.csv_file import read_csv, shown
from coordinator.sim.model import Chance, Fleet, PairRates, SimJob
from coordinator.sim.toml_file import BadFile, check_number, read_table, read_toml

JOBS_MAX: Final = 1_000_000  # some 500 MB; a mistyped path may name anything
# A job that takes longer where it is fastest is a mistake in a rate; the clock would tick for ever.
NUMBER_MAX: Final = 1e15
HOURS_MAX: Final = 10 * 8760
CLASSES: Final = {each.value: rank for each, rank in CLASS_RANK.items()}
REQUIRED: Final = {
    "job": "its number",
    "arrival_s": "seconds",
    "gpus": "how many it takes",
    "steps": "how many it makes: its seconds, where its rate is 1",
}
HINTS: Final = {
    "job": "; number the jobs",
    "arrival_s": "; seconds since any time that is the same for all",
}
# Of Unix time that would be the year 5138: who writes more writes milliseconds, and then a minute
# between two jobs would be taken for most of a day.
SECONDS_MAX: Final = 1e11
# Columns of traces that others have published, and what they are here.
MEANT: Final = {
    "job_id": "job", "id": "job", "jobid": "job", "submit_time": "arrival_s",
    "submitted_time": "arrival_s", "creation_time": "arrival_s", "arrival_time": "arrival_s",
    "num_gpu": "gpus", "num_gpus": "gpus", "gpu_num": "gpus", "total_steps": "steps",
    "iteration": "steps", "iterations": "steps", "duration": "steps", "model_name": "model",
    "ddl": "deadline_s", "deadline": "deadline_s",
}  # fmt: skip
PAIR_COLUMNS: Final = ("gpu_type", "model", "beside", "steps_per_s")
OPTIONAL: Final = ("class", "project", "model", "restart_s", "deadline_s")


class GpuType(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`count` GPUs of a type; `price_per_h` is of one."""

    count: int
    price_per_h: float = 0.0


class ChanceTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong; see `Chance`."""

    node_mtbf_h: float = 0.0
    node_gpus: int = 4
    mend_h: float = 4.0
    checkpoint_s: float = 600.0
    save_s: float = 0.0
    boot_s: float = 0.0
    rate_error: float = 0.0
    blind: bool = False


class ProjectTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As `coordinator/config.py` has it."""

    gpu_hours_per_day: float = 0.0
    weight: float = 1.0


class FleetFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`restart_s` is what a restart costs a job whose line does not say."""

    gpus: dict[str, GpuType]
    restart_s: float = 60.0
    chance: ChanceTable = ChanceTable()
    projects: dict[str, ProjectTable] = {}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a fleet's file says."""

    fleet: Fleet
    chance: Chance
    restart_s: float
    quotas: Mapping[str, Quota]


def read_fleet(path: Path, seed: int) -> Inputs:
    """The fleet, and its chances with this seed."""
    said = read_toml(path, FleetFile)
    _check_fleet(path, said)
    fleet = Fleet(
        {name: each.count for name, each in said.gpus.items()},
        {name: each.price_per_h for name, each in said.gpus.items()},
    )
    chance = Chance(seed=seed, **msgspec.structs.asdict(said.chance))
    return Inputs(fleet, chance, said.restart_s, _quotas(said.projects))


def read_quotas(path: Path) -> Mapping[str, Quota]:
    """Those of a coordinator's configuration, of which nothing else is looked at."""
    projects = read_table(path, "projects", ProjectTable)
    _check_projects(path, projects)
    return _quotas(projects)


def _quotas(projects: Mapping[str, ProjectTable]) -> dict[str, Quota]:
    return {name: Quota(each.gpu_hours_per_day, each.weight) for name, each in projects.items()}


def _check_projects(path: Path, projects: Mapping[str, ProjectTable]) -> None:
    for name, quota in projects.items():
        check_number(path, f"projects.{name}.gpu_hours_per_day", quota.gpu_hours_per_day)
        check_number(path, f"projects.{name}.weight", quota.weight, above=True)


def _check_fleet(path: Path, said: FleetFile) -> None:
    if not said.gpus:
        raise BadFile(f"{path}: there is no GPU type; [gpus.NAME] is one")
    for name, each in said.gpus.items():
        if name in (*REQUIRED, *OPTIONAL):
            raise BadFile(f"{path}: a GPU type cannot be called {name!r}, as a column is")
        check_number(path, f"gpus.{name}.count", each.count, above=True)
        check_number(path, f"gpus.{name}.price_per_h", each.price_per_h)
    for key, number in msgspec.structs.asdict(said.chance).items():
        check_number(path, f"chance.{key}", number, above=key == "node_gpus")
    check_number(path, "restart_s", said.restart_s)
    _check_projects(path, said.projects)


def read_jobs(path: Path, inputs: Inputs, added: Sequence[str] = ()) -> list[SimJob]:
    """The jobs of a trace, in the order of the file. Types that may be `added` may have a
    column."""
    jobs: dict[int, SimJob] = {}
    with read_csv(path) as table:
        _check_columns(path, table.columns, (*inputs.fleet.gpus, *added))
        for place, row in table.rows():
            job = _job(place, row, inputs, added)
            if job.job_id in jobs:
                raise BadFile(
                    f"{place}: job {job.job_id} is there twice; each needs its own number"
                )
            if len(jobs) >= JOBS_MAX:
                raise BadFile(f"{path} has more than {JOBS_MAX:,} jobs")
            jobs[job.job_id] = job
    if not jobs:
        raise BadFile(f"{path} has no jobs")
    return list(jobs.values())


def read_pairs(path: Path) -> PairRates:
    """What jobs of one GPU make beside each other: columns gpu_type, model, beside, steps_per_s."""
    found: dict[tuple[str, str, str], float] = {}
    with read_csv(path) as table:
        if sorted(filter(None, table.columns)) != sorted(PAIR_COLUMNS):
            raise BadFile(f"{path}: the columns are not {', '.join(PAIR_COLUMNS)}")
        for place, row in table.rows():
            rate = _number(row["steps_per_s"])
            if rate is None:
                raise BadFile(f"{place}: steps_per_s is no number of 0 or more")
            pair = row["gpu_type"], row["model"], row["beside"]
            if pair in found:
                raise BadFile(f"{place}: {' beside '.join(pair[1:])} on {pair[0]} is there twice")
            found[pair] = rate
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < NUMBER_MAX else None


def _check_columns(path: Path, columns: Sequence[str], types: Sequence[str]) -> None:
    known = {name.casefold(): name for name in (*REQUIRED, *OPTIONAL, *types)}
    other = [column for column in columns if column and known.get(column.casefold()) != column]
    meant: dict[str, str] = {}  # what it may be meant to be -> a column
    for column in other:
        name = _meant(column, known)
        if name is not None and (name not in columns or len(other) == 1):
            meant.setdefault(name, column)
    renames = ", ".join(f"{column} to {name}" for name, column in meant.items())
    if not any(name in columns for name in REQUIRED):
        hint = f"; rename {renames}" if meant else ""
        raise BadFile(
            f"{path}: its first line names none of the columns {', '.join(REQUIRED)}{hint}"
        )
    if len(other) == 1:
        hint = f"did you mean {min(meant)}? Else leave it out" if meant else "leave it out"
        raise BadFile(f"{path}: {other[0]!r} is no column and no GPU type of the fleet; {hint}")
    if other:
        hint = f"rename {renames}" if meant else "leave them out"
        hint += ", and leave the others out" if 0 < len(meant) < len(other) else ""
        named = ", ".join(map(repr, other))
        raise BadFile(f"{path}: {named} are no columns and no GPU types of the fleet; {hint}")
    missing = [column for column in REQUIRED if column not in columns]
    if missing:
        raise BadFile(f"{path}: the column {missing[0]} is missing: {REQUIRED[missing[0]]}")
    twice = [column for column in columns if column and columns.count(column) > 1]
    if twice:
        raise BadFile(f"{path}: the column {twice[0]} is there twice")
    if not any(name in columns for name in types):
        raise BadFile(
            f"{path}: there is no column of a GPU type of the fleet ({', '.join(types)}), with the"
            " steps a second that a job makes there"
        )


def _meant(column: str, known: Mapping[str, str]) -> str | None:
    """The column that this is most likely meant to be."""
    if (name := MEANT.get(column.casefold())) is not None:
        return name
    near = difflib.get_close_matches(column.casefold(), known, 1)
    return known[near[0]] if near else None


def _job(place: str, row: Mapping[str, str], inputs: Inputs, added: Sequence[str]) -> SimJob:
    def number(column: str, default: float | None = None) -> float:
        text = row.get(column) or ""
        value = _number(text) if text or default is None else default
        if value is None:
            hint = HINTS.get(column, "")
            raise BadFile(f"{place}: {column} is {shown(text)}, not a number of 0 or more{hint}")
        return value

    def at_ms(column: str) -> int:
        if number(column) > SECONDS_MAX:
            raise BadFile(
                f"{place}: {column} is {shown(row[column])}; in seconds that is after the year"
                " 5000, so divide milliseconds by 1000"
            )
        return round(number(column) * 1000)

    def whole(column: str) -> int:
        if number(column) % 1:
            raise BadFile(f"{place}: {column} is {row[column]!r}, not a whole number")
        return int(number(column))

    rank = CLASSES.get(row.get("class") or "standard")
    if rank is None:
        raise BadFile(f"{place}: class is {shown(row['class'])}, not one of {', '.join(CLASSES)}")
    there = inputs.fleet.gpus
    # Of a type that is added, an empty cell means that nobody knows: it is estimated.
    rates = {name: number(name, 0.0) for name in there}
    rates |= {name: number(name) for name in added if name not in there and row.get(name)}
    gpus, steps = whole("gpus"), number("steps")
    if gpus < 1:
        raise BadFile(f"{place}: gpus is {row['gpus']!r}, not 1 or more; leave such a job out")
    able = [rate for name, rate in rates.items() if rate > 0 and there.get(name, 0) >= gpus]
    if not able:
        named = ", ".join(f"{there.get(n, 0)} x {n}" for n, rate in rates.items() if rate > 0)
        where = f"it has a rate on {named}" if named else "it has no rate on any"
        raise BadFile(f"{place}: no GPU type of the fleet can run it on {gpus}; {where}")
    hours = steps / max(able) / 3600
    if hours > HOURS_MAX:
        raise BadFile(
            f"{place}: it takes {hours:.3g} hours where it is fastest, of {HOURS_MAX:,} at most;"
            " steps or a rate is wrong"
        )
    return SimJob(
        job_id=whole("job"),
        gpus=gpus,
        steps=steps,
        rates={name: rate for name, rate in rates.items() if rate > 0},
        model=row.get("model") or "",
        project=row.get("project") or "",
        rank=rank,
        arrival_ms=at_ms("arrival_s"),
        restart_s=number("restart_s", inputs.restart_s),
        deadline_ms=at_ms("deadline_s") if row.get("deadline_s") else None,
    )
