"""Reads `queries.sql`: each statement by its name, as an attribute that a type checker knows.

Problem: SQL in Python strings cannot be read by a database shell, is written twice for two
databases, and a misspelt lookup is found in production. So all statements stand in one file, each
with a name and one sentence, and `Queries` lists the names. Loading refuses a file that has a name
too many, too few or twice, hence a typing mistake on either side fails the first test that opens a
store. (The habit is procrastinate's.)

The format: a line `-- name: <name>`, one or more lines `-- <sentence>`, then one statement that
ends in a semicolon. What stands before the first name is for people.
"""

import re
from dataclasses import dataclass, fields
from importlib.resources import files

_NAME_LINE = re.compile(r"^-- name: (?P<name>[a-z_]+)$", re.MULTILINE)
_ENTRY = re.compile(r"\A\n(?P<sentence>(?:-- .+\n)+)(?P<statement>[^-;][^;]*;)\s*\Z")


@dataclass(frozen=True, slots=True)
class Queries:
    """The statements of `queries.sql`, where each has its sentence."""

    create_schema_migrations: str
    list_schema_migrations: str
    add_schema_migration: str
    advance_leader: str
    read_leader: str
    lock_leader: str
    raise_leader: str
    list_counters: str
    put_counter: str
    mark_copy: str
    mark_copy_leader: str
    raise_last_job_id: str
    list_jobs: str
    put_job: str
    drop_job: str
    list_attempts: str
    put_attempt: str
    trim_ranks: str
    trim_attempts: str
    drop_attempts: str
    list_ranks: str
    put_rank: str
    drop_ranks: str
    list_checkpoints: str
    put_checkpoint: str
    drop_checkpoint: str
    drop_checkpoints: str
    list_parts: str
    put_part: str
    drop_part: str
    drop_parts: str
    list_nodes: str
    put_node: str
    drop_node: str
    list_events: str
    put_event: str
    trim_events: str
    drop_events: str
    list_demand_series: str
    put_demand_series: str
    list_demand: str
    put_demand: str
    trim_demand: str
    drop_demand: str
    list_scale_records: str
    put_scale_record: str
    trim_scale_records: str
    list_lease_days: str
    put_lease_day: str
    trim_lease_days: str


def load_queries() -> Queries:
    """The project's own statements. Raises `ValueError` where file and class disagree."""
    text = files("coordinator.store").joinpath("queries.sql").read_text(encoding="utf-8")
    return parse_queries(text)


def parse_queries(text: str) -> Queries:
    """Raises `ValueError` with a sentence for a malformed entry and an unknown, missing or repeated
    name."""
    parts = _NAME_LINE.split(text)
    statements: dict[str, str] = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        entry = _ENTRY.match(body)
        if entry is None:
            raise ValueError(
                f"query {name}: want lines '-- <sentence>', then one statement that ends in ';'"
            )
        if name in statements:
            raise ValueError(f"query {name} stands there twice")
        statements[name] = entry["statement"]
    wanted = [field.name for field in fields(Queries)]
    unknown = [name for name in statements if name not in wanted]
    missing = [name for name in wanted if name not in statements]
    if unknown or missing:
        raise ValueError(
            "queries.sql and Queries disagree:"
            f" unknown {unknown or 'none'}, missing {missing or 'none'}"
        )
    return Queries(**statements)
