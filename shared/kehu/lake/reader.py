"""Reads a lake: SQL, events and timelines of any past, and funnels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import orjson
import pyarrow as pa

from kehu.lake.engine import connect, identifier, quoted, scan_events, scan_rejected
from kehu.lake.errors import QueryRefused
from kehu.lake.format import COLUMNS, bucket_of
from kehu.lake.log import Log, Place, Snapshot
from kehu.lake.spec import FunnelSpec
from kehu.lake.sql import time_limits

if TYPE_CHECKING:
    from kehu.lake.funnel import FunnelResult
    from kehu.lake.outcome import Scratch


class Lake:
    """A lake to ask. Each question is answered from one version of it, whatever is written meanwhile.

    Args:
        path: directory of the lake.
        threads: of the engines; None for all cores.
        memory_limit: of SQL, such as `2GB`; None for 80 % of the memory.

    Raises:
        LakeMissing: no lake there.
    """

    def __init__(self, path: Path | str, *, threads: int | None = None, memory_limit: str | None = None) -> None:
        self.root = Path(path)
        self.threads = threads or os.cpu_count() or 1
        self.memory_limit = memory_limit
        self._log = Log(self.root)
        self._log.read()
        self._spare: list[Scratch] = []  # memory of the funnels, one for each thread, for the next one

    def snapshot(self, version: int | None = None) -> Snapshot:
        """A version of the lake to read from, the newest unless one is given.

        Raises:
            SnapshotGone: this version is not there, or was vacuumed.
        """
        return self._log.read(version)

    def offsets(self) -> dict[Place, int]:
        """The next Kafka offset of each (topic, partition)."""
        return dict(self.snapshot().offsets)

    def events(
        self,
        *,
        as_of: datetime | None = None,
        until: datetime | None = None,
        types: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        snapshot: Snapshot | None = None,
    ) -> pa.Table:
        """Events as an Arrow table, in no particular order.

        Args:
            as_of: what was recorded by then (what we knew then).
            until: what happened by then.
            types: wire types, exact; None for all.
            columns: of the lake; None for all.
            snapshot: of this lake; None for the newest.

        Raises:
            ValueError: a column that there is not, or a time without a zone.
        """
        unknown = [column for column in columns or () if column not in COLUMNS]
        if unknown:
            raise ValueError(f"the lake has no column {', '.join(unknown)}")
        chosen = ", ".join(map(identifier, columns or COLUMNS))
        condition = f"type IN ({', '.join(map(quoted, types))})" if types else "true" if types is None else "false"
        with self._open(as_of, until, snapshot) as connection:
            return connection.sql(f"SELECT {chosen} FROM events WHERE {condition}").to_arrow_table()  # noqa: S608 - parts are quoted

    def sql(
        self,
        query: str,
        *,
        parameters: Sequence[Any] | dict[str, Any] | None = None,
        as_of: datetime | None = None,
        until: datetime | None = None,
        snapshot: Snapshot | None = None,
    ) -> pa.Table:
        """The answer to one SELECT over the views `events` and `rejected`, in DuckDB's SQL.

        The query can read the files of this lake and nothing else, and change nothing.

        Args:
            query: one SELECT. `offset` and `partition` are words of SQL: write `"offset"`.
            parameters: for `?` or `$1`, or by name.
            as_of, until, snapshot: as for `events`.

        Raises:
            QueryRefused: not exactly one SELECT.
            duckdb.Error: the query is wrong.
        """
        with self._open(as_of, until, snapshot) as connection:
            statements = connection.extract_statements(query)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise QueryRefused("one SELECT at a time; the lake is read-only")
            return connection.sql(query, params=parameters).to_arrow_table()

    def funnel(self, spec: FunnelSpec, *, snapshot: Snapshot | None = None) -> FunnelResult:
        """Count a funnel.

        Raises:
            ValueError: the breakdown has too many values.
        """
        from kehu.lake.funnel import run

        return run(
            self.root,
            snapshot or self.snapshot(),
            spec,
            threads=self.threads,
            memory_limit=self.memory_limit,
            spare=self._spare,
        )

    def rerun(self, result: str) -> FunnelResult:
        """Count the funnel of `FunnelResult.to_json` again, on the version it was counted on.

        Raises:
            SnapshotGone: that version was vacuumed; run the spec of the result on a newer one.
            ValueError: not such a text, or of another lake.
        """
        content = orjson.loads(result)
        if not isinstance(content, dict) or content.get("kind") != "funnel" or not content.get("snapshot"):
            raise ValueError("not the result of a funnel over a lake")
        snapshot = self.snapshot(int(content["snapshot"].partition("-")[0]))
        if snapshot.id != content["snapshot"]:
            raise ValueError(f"version {snapshot.version} of this lake is {snapshot.id}, not {content['snapshot']}")
        return self.funnel(FunnelSpec.model_validate(content["spec"]), snapshot=snapshot)

    def timeline(
        self,
        customer_id: str,
        *,
        as_of: datetime | None = None,
        until: datetime | None = None,
        snapshot: Snapshot | None = None,
    ) -> pa.Table:
        """All events of a customer in the order of time; reads only the customer's bucket and the tail."""
        snapshot = snapshot or self.snapshot()
        bucket = bucket_of(customer_id, snapshot.buckets)
        files = [*(f for f in snapshot.of("events") if f.bucket == bucket), *snapshot.of("tail")]
        conditions = " AND ".join([f"customer = {quoted(customer_id)}", *time_limits(as_of, until)])
        with connect(self.root, threads=self.threads, memory_limit=self.memory_limit) as connection:
            return connection.sql(
                f"SELECT * FROM {scan_events(self.root, files)} WHERE {conditions} "  # noqa: S608 - parts are quoted
                'ORDER BY "time", "sequence", topic, "partition", "offset"'
            ).to_arrow_table()

    def rejected(self, *, snapshot: Snapshot | None = None) -> pa.Table:
        """The records that were no events: topic, partition, offset, reason, value."""
        return self.sql('SELECT * FROM rejected ORDER BY topic, "partition", "offset"', snapshot=snapshot)

    def connect(
        self,
        *,
        as_of: datetime | None = None,
        until: datetime | None = None,
        snapshot: Snapshot | None = None,
    ) -> duckdb.DuckDBPyConnection:
        """A DuckDB connection of one's own with the views `events` and `rejected`, for relations and notebooks.

        Close it after use. It can read this lake and nothing else.
        """
        return self._open(as_of, until, snapshot)

    def _open(
        self, as_of: datetime | None, until: datetime | None, snapshot: Snapshot | None
    ) -> duckdb.DuckDBPyConnection:
        snapshot = snapshot or self.snapshot()
        limits = " AND ".join(time_limits(as_of, until)) or "true"
        connection = connect(self.root, threads=self.threads, memory_limit=self.memory_limit)
        events = scan_events(self.root, snapshot.of("events", "tail"))
        connection.execute(f"CREATE VIEW events AS SELECT * FROM {events} WHERE {limits}")  # noqa: S608 - parts are quoted
        rejected = scan_rejected(self.root, snapshot.of("rejected"))
        connection.execute(f"CREATE VIEW rejected AS SELECT * FROM {rejected}")  # noqa: S608 - parts are quoted
        return connection
