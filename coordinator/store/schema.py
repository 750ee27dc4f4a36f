"""Migrations: numbered SQL files that are applied once, in order, and never edited.

Problem: a coordinator that is upgraded finds yesterday's database, and one that is rolled back
finds tomorrow's. Guessing from the tables' shape fails quietly; so the database remembers each
applied migration with a checksum of its text and the version that first needed it, and a
coordinator that cannot explain what it finds refuses to start, with a sentence.

`NNNN.pre.<name>.sql` only adds: the version before still works on the result.
`NNNN.post.<name>.sql` takes away what no running version needs any more. A store with one
coordinator at a time (SQLite, guarded by its lock) applies both kinds when it opens, since nothing
older can be running. The first line of a file is `-- Since <version>: <sentence>`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from sqlite3 import complete_statement

from blake3 import blake3

from coordinator.ports import StoreUnavailable

_FILE_NAME = re.compile(r"^\d{4}\.(pre|post)\.[a-z0-9_]+\.sql$")
_FIRST_LINE = re.compile(r"\A-- Since (?P<version>\d+\.\d+\.\d+): .+\n")


@dataclass(frozen=True, slots=True)
class Migration:
    """`name` is the file's, `since` the first version of Baton that needs it."""

    name: str
    since: str
    text: str

    @property
    def checksum(self) -> str:
        return blake3(self.text.encode()).hexdigest()

    def statements(self) -> Iterator[str]:
        """The statements one by one: SQLite's `executescript` would commit the transaction they
        belong to."""
        statement = ""
        for line in self.text.splitlines(keepends=True):
            statement += line
            if complete_statement(statement):
                yield statement
                statement = ""
        if statement.strip():
            raise ValueError(f"migration {self.name}: the last statement lacks its semicolon")


@dataclass(frozen=True, slots=True)
class AppliedMigration:
    name: str
    checksum: str
    since: str


def load_migrations() -> tuple[Migration, ...]:
    """The project's own migrations, in order. Raises `ValueError` for a file that is named or begun
    wrongly."""
    folder = files("coordinator.store").joinpath("migrations")
    return tuple(
        read_migration(file.name, file.read_text(encoding="utf-8"))
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".sql")
    )


def read_migration(name: str, text: str) -> Migration:
    first_line = _FIRST_LINE.match(text)
    if _FILE_NAME.match(name) is None or first_line is None:
        raise ValueError(
            f"migration {name}: want NNNN.pre|post.<name>.sql and a first line"
            " '-- Since <version>: <sentence>'"
        )
    return Migration(name, first_line["version"], text)


def pending_migrations(
    known: Sequence[Migration], applied: Sequence[AppliedMigration]
) -> list[Migration]:
    """What is still to be applied, in order.

    Raises `StoreUnavailable` with a sentence when the database was made by a newer version, or by
    another text of an old migration: both mean that this program does not know what the tables
    hold.
    """
    known_by_name = {migration.name: migration for migration in known}
    for entry in applied:
        migration = known_by_name.get(entry.name)
        if migration is None:
            raise StoreUnavailable(
                f"the database has migration {entry.name}, which this version does not know:"
                f" run gpu-baton {entry.since} or newer, or restore an older backup"
            )
        if migration.checksum != entry.checksum:
            raise StoreUnavailable(
                f"migration {entry.name} was edited after it was applied to this database"
                f" (checksum {migration.checksum[:12]}, applied was {entry.checksum[:12]}):"
                " restore its text and put the change into a new migration"
            )
    applied_names = {entry.name for entry in applied}
    return [migration for migration in known if migration.name not in applied_names]
