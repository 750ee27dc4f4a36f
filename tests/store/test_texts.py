"""The texts a store lives on: queries, migrations, and documents of other versions."""

import re

import msgspec
import pytest

from coordinator.core.model import Job, JobIntent, JobSpec
from coordinator.core.phases import JobPhase
from coordinator.ports import StoreUnavailable
from coordinator.store import rows
from coordinator.store.queries import load_queries, parse_queries
from coordinator.store.schema import (
    AppliedMigration,
    load_migrations,
    pending_migrations,
    read_migration,
)

# Checksums of the migrations that were released: an edit of one of them fails here before it is
# refused in the field.
RELEASED = {
    "0001.pre.initial.sql": "cd6ea7cead80ed8796711c4987babfe8c37c9d1075060d2e0f5393c6e209abda",
    "0002.pre.gangs.sql": "ac374de366bf85bb65b3030749d15cf545b612558c6dca90286aa2aabe032ec4",
    "0003.pre.demand.sql": "bbf5ec670e3fbfc9e114e8036b290ceb4142013d7d3803932daa0ea1840dbee6",
    "0004.pre.scaling.sql": "aa2aaae52efa27defa6117465d12943e25446aa3024e019de91be6ecb7a60767",
    "0005.pre.lease_days.sql": "cae17e3449b957816a273d5b74324c26a9b64971eab4556f22fb9cf8196585ed",
}


def entry(name: str) -> str:
    return f"-- name: {name}\n-- One sentence.\nSELECT 1;\n\n"


def test_every_query_has_a_statement() -> None:
    assert load_queries().lock_leader.startswith("UPDATE leader SET epoch = epoch WHERE")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (entry("put_everything"), r"unknown \['put_everything'\]"),
        (entry("put_job") + entry("put_job"), "put_job stands there twice"),
        (entry("put_job"), r"missing \['create_schema_migrations'"),
        ("-- name: put_job\nSELECT 1;\n", "put_job: want lines"),
        ("-- name: put_job\n-- No semicolon.\nSELECT 1\n", "put_job: want lines"),
        ("-- name: put_job\n-- Two statements.\nSELECT 1; SELECT 2;\n", "put_job: want lines"),
    ],
)
def test_a_query_file_with_a_mistake_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_queries(text)


def test_released_migrations_were_not_edited() -> None:
    checksums = {migration.name: migration.checksum for migration in load_migrations()}
    assert checksums == RELEASED


def test_statements_of_a_migration_are_its_text() -> None:
    migrations = load_migrations()
    statements = [part for migration in migrations for part in migration.statements()]
    assert "".join(statements) == "".join(migration.text for migration in migrations)
    created = [name for part in statements for name in re.findall(r"CREATE TABLE (\w+)", part)]
    assert created == [
        *("leader", "counters", "jobs", "attempts", "checkpoints", "nodes", "events"),
        *("ranks", "parts", "demand_series", "demand", "scale_records", "lease_days"),
    ]
    assert all(len(re.findall(r";$", part, re.MULTILINE)) == 1 for part in statements)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("1.pre.short.sql", "-- Since 1.0.0: x.\n"),
        ("0001.during.x.sql", "-- Since 1.0.0: x.\n"),
        ("0001.pre.x.sql", "CREATE TABLE x (a TEXT);\n"),
    ],
)
def test_a_misnamed_or_anonymous_migration_is_refused(name: str, text: str) -> None:
    with pytest.raises(ValueError, match="want NNNN"):
        read_migration(name, text)


def test_an_unfinished_statement_is_refused() -> None:
    migration = read_migration("0001.pre.x.sql", "-- Since 1.0.0: x.\nSELECT 1;\nSELECT 2\n")
    with pytest.raises(ValueError, match="lacks its semicolon"):
        list(migration.statements())


def test_pending_migrations_are_those_not_applied_in_order() -> None:
    known = [read_migration(f"000{n}.pre.x.sql", f"-- Since 0.{n}.0: x.\n") for n in (1, 2, 3)]
    applied = [AppliedMigration(m.name, m.checksum, m.since) for m in known]
    assert pending_migrations(known, []) == known
    assert pending_migrations(known, applied[:1]) == known[1:]
    assert pending_migrations(known, applied) == []
    with pytest.raises(StoreUnavailable, match=r"gpu-baton 0\.3\.0 or newer"):
        pending_migrations(known[:2], applied)


def test_a_document_of_an_older_version_gets_today_s_defaults() -> None:
    text = '{"id": 1, "spec": {"name": "old"}, "phase": "queued", "submitted_unix_ms": 5}'
    assert rows.job_decoder.decode(text) == Job(1, JobSpec(name="old"), JobPhase.QUEUED, 5)


def test_a_document_of_a_newer_version_loses_only_what_is_unknown() -> None:
    job = Job(1, JobSpec(command=("a",)), JobPhase.HELD, 5, intent=JobIntent.HOLD)
    newer = msgspec.json.decode(rows.document(job))
    newer["colour"] = "red"
    newer["spec"]["shape"] = {"round": True}
    assert rows.job_decoder.decode(msgspec.json.encode(newer)) == job
