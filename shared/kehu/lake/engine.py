"""DuckDB over the files of a snapshot: set up so that a query reads this lake and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import duckdb
import pyarrow as pa

from kehu.lake.format import REJECTED_SCHEMA, SCHEMA, SCRATCH
from kehu.lake.log import DataFile

_SQL_TYPES = {"int32": "INTEGER", "int64": "BIGINT", "string": "VARCHAR", "binary": "BLOB"}


def quoted(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def identifier(column: str) -> str:
    """A SQL identifier."""
    return '"' + column.replace('"', '""') + '"'


def sql_type(column: pa.Field) -> str:
    """The type of a column of the lake in DuckDB."""
    return _SQL_TYPES.get(str(column.type), "TIMESTAMPTZ")


def connect(
    root: Path, *, threads: int | None = None, memory_limit: str | None = None, spill: bool = False
) -> duckdb.DuckDBPyConnection:
    """A connection that can read the lake, has no network and loads no extension.

    Args:
        root: the lake.
        threads: of the engine; None for all cores.
        memory_limit: such as `2GB`; None for DuckDB's default of 80 % of the memory.
        spill: may write sorted runs to the lake's scratch directory.
    """
    connection = duckdb.connect(":memory:")
    settings = {
        "TimeZone": "'UTC'",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "threads": str(threads or os.cpu_count() or 1),
        "temp_directory": quoted(str(root.absolute() / SCRATCH) if spill else ""),
        "allowed_directories": f"[{quoted(str(root.absolute()))}]",
    }
    if memory_limit is not None:
        settings["memory_limit"] = quoted(memory_limit)
    for key, value in settings.items():
        connection.execute(f"SET {key} = {value}")
    # Only now: with external access off, the list of allowed directories cannot be widened any more.
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def scan_events(root: Path, files: Iterable[DataFile]) -> str:
    """SQL that reads these event files; no rows when there are none."""
    return _scan(root, files, SCHEMA)


def scan_rejected(root: Path, files: Iterable[DataFile]) -> str:
    """SQL that reads these files of rejected records; no rows when there are none."""
    return _scan(root, files, REJECTED_SCHEMA)


def _scan(root: Path, files: Iterable[DataFile], schema: pa.Schema) -> str:
    paths = [quoted(str(root.absolute() / f.path)) for f in files]
    if paths:
        return f"read_parquet([{', '.join(paths)}], hive_partitioning = false)"
    columns = (f"CAST(NULL AS {sql_type(f)}) AS {identifier(f.name)}" for f in schema)
    return f"(SELECT {', '.join(columns)} WHERE false)"
