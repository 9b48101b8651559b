"""Writes Kafka records into the lake, exactly once.

The offsets are in the commit itself: rows and the offset after them become visible in one step or not at all. So a
consumer that starts again asks the lake where it stands (`offsets`), seeks there, and neither loses nor repeats an event,
wherever it was killed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from kehu.lake.engine import connect, scan_events
from kehu.lake.errors import LakeConflict, LakeGap, LakeMissing, SnapshotGone
from kehu.lake.format import (
    REJECTED,
    REJECTED_SCHEMA,
    SCHEMA,
    TAIL,
    NotAnEvent,
    ParquetFile,
    Record,
    parse,
    table_of,
)
from kehu.lake.log import Change, DataFile, Log, Place, Snapshot
from kehu.lake.repeats import Repeats

MAX_BATCH = 200_000  # records in one append
DEFAULT_BUCKETS = 16


@dataclass(frozen=True, slots=True)
class AppendResult:
    """What an append did.

    Attributes:
        version: of the lake after it.
        events: rows that were added.
        known: records below the lake's offset, so in it already.
        repeated: events that Kafka carries twice, under a new offset; kept once.
        rejected: records that are not events; in `_rejected/` with their offsets.
        offsets: the next offset of each (topic, partition) in the lake.
    """

    version: int
    events: int
    known: int
    repeated: int
    rejected: int
    offsets: dict[Place, int] = field(default_factory=dict)


class LakeWriter:
    """Appends to a lake. One process for each set of topic-partitions; a second one gets LakeConflict.

    Args:
        path: directory of the lake, on a local file system with hard links; made when it is missing.
        buckets: for a new lake: a power of two, about one for each two million events a month. See `Log.create`.

    Raises:
        ValueError: `buckets` is not a power of two up to 1024.
        LakeError: the lake that is there has another number of buckets.
    """

    def __init__(self, path: Path | str, *, buckets: int | None = None) -> None:
        self.root = Path(path)
        self._log = Log(self.root)
        self._snapshot = self._open(buckets)
        self._repeats = Repeats(self._snapshot.positions, self._ids_in_lake)
        self._stale = False

    def offsets(self) -> dict[Place, int]:
        """The next offset of each (topic, partition): where a consumer goes on."""
        self._reload()
        return dict(self._snapshot.offsets)

    def append(self, records: Sequence[Record], *, allow_gaps: bool = False) -> AppendResult:
        """Commit a batch: rows, rejected records and offsets in one step.

        Args:
            records: of any topic-partitions, at most 200 000; those below the lake's offset are passed over.
            allow_gaps: take a batch that does not begin where the lake ends (a topic whose start was deleted).

        Raises:
            LakeGap: records between the lake's offset and the batch are missing.
            LakeConflict: another writer moved one of these topic-partitions; nothing of this batch was added.
            ValueError: too many records.
        """
        if len(records) > MAX_BATCH:
            raise ValueError(f"{len(records)} records, the limit is {MAX_BATCH}: append them in parts")
        if self._stale:
            self._reload()
        self._stale = True  # until the commit is certain, so that a failure here forgets what this batch taught us
        result = self._append(records, allow_gaps=allow_gaps)
        self._stale = False
        return result

    def _append(self, records: Sequence[Record], *, allow_gaps: bool) -> AppendResult:
        self._follow({(record.topic, record.partition) for record in records})
        offsets, fresh_records, known = self._beyond(records, allow_gaps=allow_gaps)
        if not offsets:
            return AppendResult(self._snapshot.version, 0, known, 0, 0, dict(self._snapshot.offsets))
        rows, rejected = _parsed(fresh_records)
        rows, repeated = self._repeats.without(rows, set(self._snapshot.offsets))
        files = []
        if rows:
            files.append(self._write_tail(rows))
        if rejected:
            files.append(self._write_rejected(rejected))
        positions = {place: high for place, high in self._repeats.positions().items() if place in offsets}
        change = Change("append", add=tuple(files), offsets=offsets, positions=positions)
        try:
            self._snapshot = self._log.commit(self._snapshot, change, lambda other: _refuse_overlap(other, offsets))
        except LakeConflict:
            for file in files:
                (self.root / file.path).unlink()
            raise
        return AppendResult(
            self._snapshot.version, len(rows), known, repeated, len(rejected), dict(self._snapshot.offsets)
        )

    def _open(self, buckets: int | None) -> Snapshot:
        if buckets is None:
            try:
                return self._log.read()
            except LakeMissing:
                buckets = DEFAULT_BUCKETS
        return self._log.create(buckets)

    def _reload(self) -> None:
        self._snapshot = self._log.read()
        self._repeats = Repeats(self._snapshot.positions, self._ids_in_lake)
        self._stale = False

    def _follow(self, places: set[Place]) -> None:
        """Take in what others committed (compactions, other topics); another writer of these places is a conflict."""
        try:
            others = self._log.newer(self._snapshot)
        except SnapshotGone:  # we slept through a vacuum: what counts is whether our places are where we left them
            newest = self._log.read()
            for topic, partition in places:
                if newest.offsets.get((topic, partition)) != self._snapshot.offsets.get((topic, partition)):
                    raise LakeConflict(f"another writer moved {topic}[{partition}]") from None
            self._snapshot = newest
            return
        for version, other in others:
            _refuse_overlap(other, places)
            self._snapshot = self._snapshot.after(version, other)

    def _beyond(self, records: Sequence[Record], *, allow_gaps: bool) -> tuple[dict[Place, int], list[Record], int]:
        """The next offsets after the batch, the records that the lake does not have, and how many it has."""
        by_place: dict[Place, dict[int, Record]] = defaultdict(dict)
        for record in records:
            by_place[record.topic, record.partition].setdefault(record.offset, record)
        offsets: dict[Place, int] = {}
        fresh: list[Record] = []
        for (topic, partition), found in by_place.items():
            expected = self._snapshot.offsets.get((topic, partition), 0)
            for offset in sorted(found):
                if offset < expected:
                    continue
                if offset > expected and not allow_gaps:
                    raise LakeGap(topic, partition, expected, offset)
                fresh.append(found[offset])
                offsets[topic, partition] = expected = offset + 1
        return offsets, fresh, len(records) - len(fresh)

    def _write_tail(self, rows: list[dict[str, Any]]) -> DataFile:
        file = ParquetFile(self.root, TAIL, SCHEMA)
        file.write(table_of(rows))
        return DataFile(
            file.path,
            "tail",
            len(rows),
            file.close(),
            min_time=min(row["time"] for row in rows),
            max_time=max(row["time"] for row in rows),
            max_recorded=max(row["recordedtime"] for row in rows),
            ranges=_ranges((row["topic"], row["partition"], row["offset"]) for row in rows),
        )

    def _write_rejected(self, rejected: list[tuple[Record, str]]) -> DataFile:
        file = ParquetFile(self.root, REJECTED, REJECTED_SCHEMA)
        columns = {
            "topic": [record.topic for record, _ in rejected],
            "partition": [record.partition for record, _ in rejected],
            "offset": [record.offset for record, _ in rejected],
            "reason": [reason for _, reason in rejected],
            "value": [record.value for record, _ in rejected],
        }
        file.write(pa.table(columns, REJECTED_SCHEMA))
        ranges = _ranges((record.topic, record.partition, record.offset) for record, _ in rejected)
        return DataFile(file.path, "rejected", len(rejected), file.close(), ranges=ranges)

    def _ids_in_lake(self, ids: set[str]) -> set[str]:
        """Which of these event ids the lake has. A rare question, so it reads the id column of every file."""
        source = scan_events(self.root, self._snapshot.of("tail", "events"))
        with connect(self.root) as connection:
            connection.execute("CREATE TEMP TABLE asked AS SELECT unnest($1::VARCHAR[]) AS id", [sorted(ids)])
            found = connection.execute(f"SELECT DISTINCT id FROM {source} SEMI JOIN asked USING (id)").fetchall()  # noqa: S608 - our own paths
        return {row[0] for row in found}


def _parsed(records: Iterable[Record]) -> tuple[list[dict[str, Any]], list[tuple[Record, str]]]:
    rows, rejected = [], []
    for record in records:
        try:
            rows.append(parse(record))
        except NotAnEvent as reason:
            rejected.append((record, str(reason)))
    return rows, rejected


def _ranges(places: Iterable[tuple[str, int, int]]) -> tuple[tuple[str, int, int, int], ...]:
    spans: dict[Place, tuple[int, int]] = {}
    for topic, partition, offset in places:
        low, high = spans.get((topic, partition), (offset, offset))
        spans[topic, partition] = min(low, offset), max(high, offset)
    return tuple((t, p, low, high + 1) for (t, p), (low, high) in sorted(spans.items()))


def _refuse_overlap(other: Change, places: Iterable[Place]) -> None:
    for topic, partition in places:
        if (topic, partition) in other.offsets:
            raise LakeConflict(f"another writer moved {topic}[{partition}] to {other.offsets[topic, partition]}")
