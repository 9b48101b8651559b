"""The lake on disk: what a row is, how rows are written as Parquet, and how a Kafka record becomes a row.

::

    _log/0000000042.json                     one commit each, created in one step (see kehu.lake.log)
    tail/<name>.parquet                      what came in since the last compaction, ordered by time
    events/month=2026-03/bucket=07/<name>.parquet   the rest, sorted by (customer, time, sequence)
    customers/bucket=07/<name>.parquet       the numbers (`unit`) that customers of the bucket have in the sorted files
    _rejected/<name>.parquet                 records that are not events, with their offsets, byte for byte

A row is one event with its whole envelope. `month` is of the business time in UTC; `bucket` is the first seven hex
digits of md5(customer), as a number, modulo the number of buckets (a power of two); events without a customer are in
bucket 0. `unit` is `number · buckets + bucket`, −1 in the tail: an integer that stands for the customer, so that
counting customers does not read strings.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT = 1
TAIL, EVENTS, CUSTOMERS, REJECTED, LOG, SCRATCH = "tail", "events", "customers", "_rejected", "_log", "_tmp"

MAX_BUCKETS = 1024
ROW_GROUP_ROWS = 1_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

_TIME = pa.timestamp("us", tz="UTC")  # stored as INT64: microseconds since 1970, UTC

# Hot columns first: a funnel reads the first three and nothing else.
SCHEMA = pa.schema(
    [
        pa.field("unit", pa.int32(), nullable=False),
        pa.field("type", pa.string(), nullable=False),
        pa.field("time", _TIME, nullable=False),
        pa.field("customer", pa.string()),
        pa.field("sequence", pa.int64(), nullable=False),
        pa.field("recordedtime", _TIME, nullable=False),
        pa.field("subject", pa.string(), nullable=False),
        pa.field("streamversion", pa.int64(), nullable=False),
        pa.field("topic", pa.string(), nullable=False),
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("position", pa.int64()),
        pa.field("storeepoch", pa.string()),
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("actor", pa.string()),
        pa.field("partitionkey", pa.string()),
        pa.field("correlationid", pa.string()),
        pa.field("causationid", pa.string()),
        pa.field("traceparent", pa.string()),
        pa.field("dataschema", pa.string()),
        pa.field("data", pa.string()),
    ]
)
COLUMNS: tuple[str, ...] = tuple(SCHEMA.names)

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("topic", pa.string(), nullable=False),
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("value", pa.binary()),
    ]
)

CUSTOMER_SCHEMA = pa.schema(
    [pa.field("unit", pa.int32(), nullable=False), pa.field("customer", pa.string(), nullable=False)]
)

_DICTIONARY = (
    "type", "customer", "subject", "topic", "storeepoch", "source", "actor", "partitionkey", "dataschema"
)  # fmt: skip
# Sorted and dense numbers as differences: a third of the bytes, and read twice as fast as dictionary codes.
_DELTA = dict.fromkeys(
    ("unit", "time", "sequence", "recordedtime", "streamversion", "partition", "offset", "position"),
    "DELTA_BINARY_PACKED",
)

_INT64 = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Record:
    """One Kafka record: where it stands and its bytes (a structured CloudEvent in JSON)."""

    topic: str
    partition: int
    offset: int
    value: bytes | None


class NotAnEvent(ValueError):
    """A record that is not one of our events, and why."""


def micros(at: datetime) -> int:
    """Microseconds since 1970 UTC of an aware instant.

    Raises:
        ValueError: a naive datetime.
    """
    if at.tzinfo is None:
        raise ValueError(f"{at.isoformat()} has no time zone")
    return (at - EPOCH) // MICROSECOND


def instant(value: int) -> datetime:
    """The aware UTC instant of microseconds since 1970."""
    return EPOCH + timedelta(microseconds=value)


def bucket_of(customer: str | None, buckets: int) -> int:
    """The bucket of a customer, the same in every engine and release."""
    if customer is None:
        return 0
    return int(hashlib.md5(customer.encode(), usedforsecurity=False).hexdigest()[:7], 16) % buckets


def bucket_sql(column: str, buckets: int) -> str:
    """`bucket_of` as DuckDB SQL."""
    return f"coalesce(CAST('0x' || substr(md5({column}), 1, 7) AS INTEGER) % {buckets:d}, 0)"


def month_of(time: int) -> str:
    """The month of microseconds since 1970 UTC, e.g. `2026-03`."""
    return instant(time).strftime("%Y-%m").zfill(7)


def partition_path(level: str, bucket: int, buckets: int, month: str | None = None) -> str:
    """The directory of a sorted or customers file, relative to the lake."""
    width = max(2, len(str(buckets - 1)))
    middle = f"month={month}/" if month is not None else ""
    return f"{level}/{middle}bucket={bucket:0{width}d}"


def fresh_name() -> str:
    """A name that no other file has."""
    return f"{uuid.uuid4().hex}.parquet"


def parse(record: Record) -> dict[str, Any]:
    """The row of a record.

    Raises:
        NotAnEvent: not JSON, not a CloudEvent, or an attribute has the wrong type.
    """
    if not record.value:
        raise NotAnEvent("no value")
    try:
        envelope = orjson.loads(record.value)
    except orjson.JSONDecodeError as error:
        raise NotAnEvent(f"not JSON: {error}") from None
    if not isinstance(envelope, dict):
        raise NotAnEvent("not a JSON object")
    if envelope.get("specversion") != "1.0":
        raise NotAnEvent("not a CloudEvent 1.0")
    position = _integer(envelope, "position", required=False)
    return {
        "unit": -1,
        "type": _string(envelope, "type"),
        "time": _time(envelope, "time"),
        "customer": _text(envelope, "customerid"),
        # Events of one instant are in the order in which the store took them.
        "sequence": position if position is not None else record.offset,
        "recordedtime": _time(envelope, "recordedtime"),
        "subject": _string(envelope, "subject"),
        "streamversion": _integer(envelope, "streamversion"),
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "position": position,
        "storeepoch": _text(envelope, "storeepoch"),
        "id": _string(envelope, "id"),
        "source": _text(envelope, "source"),
        "actor": _text(envelope, "actor"),
        "partitionkey": _text(envelope, "partitionkey"),
        "correlationid": _text(envelope, "correlationid"),
        "causationid": _text(envelope, "causationid"),
        "traceparent": _text(envelope, "traceparent"),
        "dataschema": _text(envelope, "dataschema"),
        "data": orjson.dumps(envelope["data"]).decode() if "data" in envelope else None,
    }


def _string(envelope: Mapping[str, Any], name: str) -> str:
    value = envelope.get(name)
    if not isinstance(value, str) or not value:
        raise NotAnEvent(f"{name} is missing or not a string")
    return value


def _text(envelope: Mapping[str, Any], name: str) -> str | None:
    value = envelope.get(name)
    if value is None or isinstance(value, str):
        return value
    raise NotAnEvent(f"{name} is not a string")


def _integer(envelope: Mapping[str, Any], name: str, *, required: bool = True) -> int | None:
    value = envelope.get(name)
    if value is None and not required:
        return None
    # A bool is an int in Python, not in JSON.
    if not isinstance(value, int) or isinstance(value, bool) or not -_INT64 <= value <= _INT64:
        raise NotAnEvent(f"{name} is missing or not a 64-bit integer")
    return value


def _time(envelope: Mapping[str, Any], name: str) -> int:
    try:
        return micros(datetime.fromisoformat(_string(envelope, name)))
    except (ValueError, OverflowError) as error:
        raise NotAnEvent(f"{name}: {error}") from None


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of `parse`, as a table in the order of the tail: by time and sequence."""
    rows = sorted(rows, key=lambda row: (row["time"], row["sequence"], row["topic"], row["partition"], row["offset"]))
    return pa.table({field.name: pa.array([r[field.name] for r in rows], field.type) for field in SCHEMA}, SCHEMA)


def ensure_directory(path: Path) -> None:
    """Make a directory whose entry survives a power cut, and its parents."""
    if path.is_dir():
        return
    ensure_directory(path.parent)
    path.mkdir(exist_ok=True)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class ParquetFile:
    """A Parquet file of the lake while it is written; durable, name and bytes, once `close` has returned.

    Args:
        root: the lake.
        directory: relative to it.
        schema: of the rows.
    """

    def __init__(self, root: Path, directory: str, schema: pa.Schema) -> None:
        self.path = f"{directory}/{fresh_name()}"
        self.rows = 0
        self._file = root / self.path
        ensure_directory(self._file.parent)
        names = set(schema.names)
        self._writer = pq.ParquetWriter(
            self._file,
            schema,
            compression="zstd",
            use_dictionary=[name for name in _DICTIONARY if name in names],
            # Customers and streams repeat within a sorted file: let their dictionaries grow instead of falling back.
            dictionary_pagesize_limit=64 * 1024 * 1024,
            column_encoding={name: encoding for name, encoding in _DELTA.items() if name in names},
            store_schema=False,
        )

    def write(self, table: pa.Table) -> None:
        """Add a table as one row group."""
        self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        self.rows += table.num_rows

    def close(self) -> int:
        """Flush to the disk; returns the size in bytes."""
        self._writer.close()
        handle = os.open(self._file, os.O_RDONLY)
        try:
            os.fsync(handle)
            size = os.fstat(handle).st_size
        finally:
            os.close(handle)
        fsync_directory(self._file.parent)
        return size

    def discard(self) -> None:
        """Give up: close and remove what was written."""
        self._writer.close()
        self._file.unlink(missing_ok=True)


def row_groups(batches: Iterator[pa.RecordBatch], target: int = ROW_GROUP_ROWS) -> Iterator[pa.Table]:
    """Cut rows sorted by customer into row groups of about `target` rows without splitting a customer.

    So a reader may take each row group by itself: no instant of a customer is spread over two.
    """
    waiting: list[pa.RecordBatch] = []
    count, limit = 0, target
    for batch in batches:
        if batch.num_rows == 0:
            continue
        waiting.append(batch)
        count += batch.num_rows
        if count < limit:
            continue
        table = pa.Table.from_batches(waiting).combine_chunks()
        cut = _last_customer(table)
        rest = table.slice(cut)
        waiting, count = rest.to_batches(), rest.num_rows
        if cut:
            yield table.slice(0, cut)
            limit = target
        else:
            limit = 2 * count  # one customer alone: look again when it has doubled, not at every batch
    if count:
        yield pa.Table.from_batches(waiting).combine_chunks()


def _last_customer(table: pa.Table) -> int:
    """Where the last customer of a sorted table begins; 0 when there is but one."""
    column = table["customer"].combine_chunks()
    last = column[len(column) - 1]
    low, high = 0, len(column) - 1
    while low < high:  # the last customer's rows are one run at the end: bisect for its first row
        middle = (low + high) // 2
        if column[middle] == last:
            high = middle
        else:
            low = middle + 1
    return low
