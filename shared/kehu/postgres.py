"""Connections to PostgreSQL: one place for time limits, keepalives and the meaning of errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool

Connection = psycopg.Connection[TupleRow]
Pool = ConnectionPool[Connection]


@dataclass(frozen=True, slots=True)
class Unnest:
    """Constant SQL with one array parameter for each column: the rows of a whole batch are one statement.

    Write `INSERT … SELECT … FROM unnest(%s::…[], %s::…[]) ORDER BY` the unique key: two batches with the same keys in
    another order would wait for each other for ever.
    """

    sql: LiteralString


# Constant SQL and its parameters. Rows are executed inside somebody's transaction, grouped by the text.
Statement = tuple[LiteralString, tuple[Any, ...]]
Row = Statement | tuple[Unnest, tuple[Any, ...]]

# Errors that go away by themselves: the server restarts, a connection is cut, a lock or a disk is late.
TRANSIENT = (psycopg.OperationalError, psycopg.InterfaceError)

_SESSION = {
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "connect_timeout": "5",
    "client_encoding": "utf8",
}


def dsn(url: str, name: str, statement_timeout: float = 60.0) -> str:
    """The connection string with our session settings.

    Args:
        name: shown in pg_stat_activity.
        statement_timeout: seconds after which the server ends one statement.
    """
    options = (
        f"-c statement_timeout={int(statement_timeout * 1000)} -c lock_timeout=10000"
        " -c idle_in_transaction_session_timeout=30000 -c client_connection_check_interval=5000 -c timezone=UTC"
    )
    given = conninfo_to_dict(url)
    merged = {**_SESSION, **given, "application_name": name, "options": f"{given.get('options', '')} {options}".strip()}
    return make_conninfo("", **merged)


def open_pool(url: str, name: str, size: int = 8) -> Pool:
    """A pool of autocommit connections; use `with pool.connection() as c, c.transaction():` for more than one statement.

    Args:
        size: the most connections; requests beyond wait up to 10 s, at most 1 000 of them.
    """
    pool: Pool = ConnectionPool(
        dsn(url, name),
        min_size=1,
        max_size=size,
        timeout=10.0,
        max_waiting=1000,
        max_lifetime=1800.0,
        reconnect_timeout=10.0,
        kwargs={"autocommit": True},
        name=name,
        open=False,
    )
    pool.open()
    return pool


def connect(url: str, name: str) -> Connection:
    """One autocommit connection outside a pool."""
    return psycopg.connect(dsn(url, name), autocommit=True)


def write_rows(connection: Connection, rows: list[Row]) -> None:
    """Execute rows in the caller's transaction, in order of each SQL's first appearance: one statement for all rows of
    an Unnest, one executemany for each other text.
    """
    grouped: dict[LiteralString | Unnest, list[tuple[Any, ...]]] = {}
    for sql, parameters in rows:
        grouped.setdefault(sql, []).append(parameters)
    with connection.cursor() as cursor:
        for sql, many in grouped.items():
            if isinstance(sql, Unnest):
                cursor.execute(sql.sql, [list(column) for column in zip(*many, strict=True)])
            elif len(many) == 1:
                cursor.execute(sql, many[0])
            else:
                cursor.executemany(sql, many)
