"""Brings the tail of the lake into the sorted form, and removes files that no version needs.

A compaction takes the rows of the tail, month by month and bucket by bucket, merges them with the sorted file that is
there, and commits the new files in one step. Readers keep the version that they opened: old files go only with `vacuum`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from kehu.lake.engine import connect, quoted, scan_events
from kehu.lake.errors import LakeConflict
from kehu.lake.format import (
    COLUMNS,
    CUSTOMER_SCHEMA,
    CUSTOMERS,
    EVENTS,
    LOG,
    REJECTED,
    ROW_GROUP_ROWS,
    SCHEMA,
    SCRATCH,
    TAIL,
    ParquetFile,
    bucket_sql,
    partition_path,
    row_groups,
)
from kehu.lake.log import Change, DataFile, Log, Snapshot

MAX_TAIL_FILES = 5_000  # taken in one compaction; the rest waits for the next
ORPHAN_AGE = timedelta(days=1)

_BATCH = 100_000  # rows at a time between DuckDB and the file
_ORDER = '"customer", "time", "sequence", "topic", "partition", "offset"'


@dataclass(frozen=True, slots=True)
class CompactResult:
    """What a compaction did: the version after it, rows brought from the tail, files written and files replaced."""

    version: int
    rows: int
    written: int
    replaced: int


@dataclass(frozen=True, slots=True)
class VacuumResult:
    """What a vacuum did: the oldest version that can still be read, and the files that it removed."""

    oldest: int
    removed: tuple[str, ...]


def compact(
    path: Path | str, *, memory_limit: str | None = "1GB", threads: int | None = None, target: int = ROW_GROUP_ROWS
) -> CompactResult:
    """Move the rows of the tail into the sorted files.

    Args:
        path: the lake.
        memory_limit: of the sort; beyond it runs go to the lake's scratch directory. None for 80 % of the memory.
        threads: of the sort; None for all cores.
        target: rows of a row group.

    Raises:
        LakeMissing: no lake here.
        LakeConflict: another compaction replaced the same files; nothing was changed by this one.
    """
    root = Path(path)
    log = Log(root)
    base = log.read()
    tail = base.of("tail")[:MAX_TAIL_FILES]
    if not tail:
        return CompactResult(base.version, 0, 0, 0)
    run = _Compaction(root, base, tail, target)
    try:
        with connect(root, threads=threads, memory_limit=memory_limit, spill=True) as connection:
            change = run.change(connection)
        after = log.commit(
            base, change, lambda _: None
        )  # files that another compaction took are a conflict by themselves
    except (LakeConflict, duckdb.Error, pa.ArrowException, OSError):
        run.discard_unless_committed(log)
        raise
    return CompactResult(after.version, sum(f.rows for f in tail), len(change.add), len(change.remove))


def _refuse_compaction(other: Change) -> None:
    if other.kind == "compact":
        raise LakeConflict("another compaction was first")


class _Compaction:
    def __init__(self, root: Path, base: Snapshot, tail: list[DataFile], target: int) -> None:
        self.root, self.base, self.tail, self.target = root, base, tail, target
        self.added: list[DataFile] = []
        self.removed = [f.path for f in tail]

    def change(self, connection: duckdb.DuckDBPyConnection) -> Change:
        connection.execute(
            f"CREATE TEMP TABLE tail AS SELECT *, strftime(\"time\", '%Y-%m') AS month, "  # noqa: S608 - our own paths
            f"{bucket_sql('customer', self.base.buckets)} AS bucket FROM {scan_events(self.root, self.tail)}"
        )
        places = connection.execute("SELECT DISTINCT bucket, month FROM tail ORDER BY ALL").fetchall()
        for bucket in sorted({bucket for bucket, _ in places}):
            self._number_customers(connection, bucket)
            for month in [month for b, month in places if b == bucket]:
                self._merge(connection, bucket, month)
        return Change("compact", add=tuple(self.added), remove=tuple(self.removed))

    def _number_customers(self, connection: duckdb.DuckDBPyConnection, bucket: int) -> None:
        """Make the table `numbers` (customer, unit) of a bucket, with a number for each customer that is new."""
        old = [f for f in self.base.of("customers") if f.bucket == bucket]
        known = " UNION ALL ".join(
            f"SELECT customer, unit FROM read_parquet({quoted(str((self.root / f.path).absolute()))})"  # noqa: S608 - our own paths
            for f in old
        )
        connection.execute(
            f"CREATE OR REPLACE TEMP TABLE numbers AS {known}"
            if known
            else "CREATE OR REPLACE TEMP TABLE numbers (customer VARCHAR, unit INTEGER)"
        )
        before = _one(connection, "SELECT count(*) FROM numbers")
        connection.execute(
            "INSERT INTO numbers SELECT customer, CAST(($1 + row_number() OVER (ORDER BY customer) - 1) * $2 + $3 AS INTEGER) "
            "FROM (SELECT DISTINCT customer FROM tail WHERE bucket = $3 AND customer IS NOT NULL) ANTI JOIN numbers USING (customer)",
            [before, self.base.buckets, bucket],
        )
        if _one(connection, "SELECT count(*) FROM numbers") == before:
            return
        file = ParquetFile(self.root, partition_path(CUSTOMERS, bucket, self.base.buckets), CUSTOMER_SCHEMA)
        self._write(file, _batches(connection, "SELECT unit, customer FROM numbers ORDER BY unit", CUSTOMER_SCHEMA))
        self.added.append(DataFile(file.path, "customers", file.rows, file.close(), bucket=bucket))
        self.removed += [f.path for f in old]

    def _merge(self, connection: duckdb.DuckDBPyConnection, bucket: int, month: str) -> None:
        """Write the sorted file of a month and bucket: the one that is there, and the rows of the tail."""
        old = [f for f in self.base.of("events") if (f.month, f.bucket) == (month, bucket)]
        rest = ", ".join(f'"{column}"' for column in COLUMNS if column != "unit")
        tail_rest = rest.replace('"customer"', 'tail."customer"')
        query = (
            f"SELECT * FROM (SELECT unit, {rest} FROM {scan_events(self.root, old)} UNION ALL "  # noqa: S608 - our own paths
            f"SELECT coalesce(numbers.unit, -1), {tail_rest} FROM tail "
            f"LEFT JOIN numbers ON tail.customer = numbers.customer WHERE bucket = {bucket:d} AND month = {quoted(month)}"
            f") ORDER BY {_ORDER}"
        )
        file = ParquetFile(self.root, partition_path(EVENTS, bucket, self.base.buckets, month), SCHEMA)
        rising = self._write(file, _batches(connection, query, SCHEMA))
        low, high, recorded = _bounds(connection, bucket, month)
        self.added.append(
            DataFile(
                file.path,
                "events",
                file.rows,
                file.close(),
                month=month,
                bucket=bucket,
                min_time=min([low, *(f.min_time for f in old if f.min_time is not None)]),
                max_time=max([high, *(f.max_time for f in old if f.max_time is not None)]),
                max_recorded=max([recorded, *(f.max_recorded for f in old if f.max_recorded is not None)]),
                rising=rising,
            )
        )
        self.removed += [f.path for f in old]

    def _write(self, file: ParquetFile, batches: Iterator[pa.RecordBatch]) -> bool:
        """Write the rows, in row groups; whether `unit` never falls, but for rows without a customer at the end."""
        rising, last = True, -1
        try:
            for table in row_groups(batches, self.target):
                file.write(table)
                unit = table["unit"].to_numpy()
                unit = unit[: len(unit) - table["customer"].null_count]  # those come last
                rising = rising and bool(np.all(np.diff(unit, prepend=last) >= 0))
                last = int(unit[-1]) if len(unit) else last
        except BaseException:
            file.discard()
            raise
        return rising

    def discard_unless_committed(self, log: Log) -> None:
        """Remove what this compaction wrote, when no commit names it."""
        named = log.read().files
        for file in self.added:
            if file.path not in named:
                (self.root / file.path).unlink(missing_ok=True)


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    return int(connection.execute(query).fetchall()[0][0])


def _bounds(connection: duckdb.DuckDBPyConnection, bucket: int, month: str) -> tuple[int, int, int]:
    """Earliest and latest time, and latest recorded time, of the rows that come from the tail."""
    rows = connection.execute(
        'SELECT epoch_us(min("time")), epoch_us(max("time")), epoch_us(max(recordedtime)) FROM tail WHERE bucket = $1 AND month = $2',
        [bucket, month],
    ).fetchall()
    low, high, recorded = rows[0]
    return int(low), int(high), int(recorded)


def _batches(connection: duckdb.DuckDBPyConnection, query: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for batch in connection.sql(query).to_arrow_reader(_BATCH):
        yield pa.RecordBatch.from_arrays([batch.column(field.name).cast(field.type) for field in schema], schema=schema)


def vacuum(path: Path | str, *, keep: int = 100, orphan_age: timedelta = ORPHAN_AGE) -> VacuumResult:
    """Remove the files that none of the newest `keep` versions names, and those that no commit ever named.

    A reader that still uses an older version than these finds its files gone.

    Args:
        path: the lake.
        keep: how many versions stay readable, at least 1.
        orphan_age: files of no version younger than this stay: a writer may be about to commit them.

    Raises:
        LakeMissing: no lake here.
        ValueError: `keep` is below 1.
    """
    if keep < 1:
        raise ValueError("at least the newest version stays")
    root = Path(path)
    log = Log(root)
    files = list(_data_files(root))  # before the log is read: what is committed from here on is not in this list
    versions = log.versions()
    snapshot = log.read(max(versions.start, versions.stop - keep))
    ever = _named(log, log.read(versions.start))
    needed = _named(log, snapshot)
    log.forget_before(snapshot)
    removed = []
    for file in files:
        name = file.relative_to(root).as_posix()
        if name not in needed and (name in ever or _older(file, orphan_age)):
            file.unlink(missing_ok=True)
            removed.append(name)
    for scratch in (root / SCRATCH).glob("*"):
        if _older(scratch, orphan_age):
            shutil.rmtree(scratch, ignore_errors=True) if scratch.is_dir() else scratch.unlink(missing_ok=True)
    return VacuumResult(snapshot.version, tuple(sorted(removed)))


def _named(log: Log, first: Snapshot) -> set[str]:
    """Every file that a version from `first` on names."""
    named = set(first.files)
    for _, change in log.newer(first):
        named.update(f.path for f in change.add)
    return named


def _data_files(root: Path) -> Iterator[Path]:
    for directory in (TAIL, EVENTS, CUSTOMERS, REJECTED):
        yield from sorted((root / directory).rglob("*.parquet"))
    yield from sorted((root / LOG).glob(".*.tmp"))


def _older(file: Path, age: timedelta) -> bool:
    try:
        return time.time() - file.stat().st_mtime > age.total_seconds()
    except FileNotFoundError:
        return False
