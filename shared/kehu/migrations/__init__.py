"""Schema migrations: numbered SQL files, applied once, in order, each in its own transaction."""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from kehu.postgres import connect

log = logging.getLogger(__name__)
_NAME = re.compile(r"^(\d{4})_[a-z0-9_]+\.sql$")
# All migrators of one database wait for each other on this advisory lock.
_LOCK = 0x6B656875


class MigrationError(RuntimeError):
    """A migration is missing, was changed after it ran, or failed."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file. `owner` is `kehu` for the backbone, else the service."""

    owner: str
    number: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def find(owner: str, folder: Path) -> list[Migration]:
    """The migrations in a folder, in order. Raises MigrationError on a gap or a bad name."""
    found = []
    for path in sorted(folder.glob("*.sql")):
        match = _NAME.match(path.name)
        if match is None:
            raise MigrationError(f"{path.name}: a migration is named NNNN_what_it_does.sql")
        found.append(Migration(owner, int(match[1]), path.stem, path.read_text()))
    if [m.number for m in found] != list(range(1, len(found) + 1)):
        raise MigrationError(f"{owner}: migrations must be numbered 0001, 0002, … without a hole")
    return found


def of_service(package: str) -> list[Migration]:
    """The backbone's migrations, then those of a service's package (`lead_intake`)."""
    module = importlib.import_module(package)
    assert module.__file__ is not None
    root = Path(module.__file__).parent
    installed, checkout = root / "_migrations", root.parent / "migrations"
    backbone = find("kehu", Path(__file__).parent)
    return backbone + find(package, installed if installed.is_dir() else checkout)


def create_database(url: str, database: str) -> str:
    """Make the database when it is not there, and give its URL. Safe to call by several at once."""
    with connect(url, "migrate") as admin:
        exists = admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,)).fetchone()
        if exists is None:
            try:
                admin.execute(
                    sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(sql.Identifier(database))
                )
            except (psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                log.info("the database was made by another process meanwhile")
    parts = {**conninfo_to_dict(url), "dbname": database}
    return make_conninfo("", **parts)


def migrate(url: str, migrations: list[Migration]) -> list[str]:
    """Apply what is missing and give its names.

    Raises:
        MigrationError: a file was changed after it ran, or failed; what ran before it stays.
    """
    applied: list[str] = []
    with connect(url, "migrate") as connection:
        connection.execute("SET statement_timeout = 0; SET lock_timeout = 0")
        connection.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
        connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (owner text, number integer, name text NOT NULL, checksum text NOT NULL,"
            " applied_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (owner, number))"
        )
        done = {(o, n): c for o, n, c in connection.execute("SELECT owner, number, checksum FROM schema_migrations")}
        for migration in migrations:
            seen = done.get((migration.owner, migration.number))
            if seen is not None:
                if seen != migration.checksum:
                    raise MigrationError(
                        f"{migration.owner}/{migration.name} was changed after it ran: write a new one"
                    )
                continue
            try:
                with connection.transaction():
                    connection.execute(migration.text.encode())
                    connection.execute(
                        "INSERT INTO schema_migrations (owner, number, name, checksum) VALUES (%s, %s, %s, %s)",
                        (migration.owner, migration.number, migration.name, migration.checksum),
                    )
            except psycopg.Error as error:
                raise MigrationError(f"{migration.owner}/{migration.name} failed: {error}") from error
            applied.append(f"{migration.owner}/{migration.name}")
    return applied
