"""Loading, appending and following the events of one service."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from eventsourcing.persistence import EventStore as LibraryEventStore

from kehu.events import Recorded
from kehu.events.envelope import with_position
from kehu.eventstore.recorder import CarriedOut, EnvelopeMapper, Pending, Recorder
from kehu.postgres import Connection, Pool


class Conflict(Exception):
    """Somebody else appended to the stream, or did the command, in between.

    Args:
        constraint: name of the constraint that told, e.g. `stored_events_version` or `commands_once`.
    """

    def __init__(self, constraint: str) -> None:
        super().__init__(constraint)
        self.constraint = constraint


class AppendFirst(RuntimeError):
    """A programming error: something was written in the transaction before the append."""


class Cursor(NamedTuple):
    """A place in the log. Its order is the order in which followers see events."""

    txid: int = 0
    position: int = 0

    def __str__(self) -> str:
        return f"{self.txid}:{self.position}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Read `txid:position`. Raises ValueError."""
        txid, _, position = text.partition(":")
        return cls(int(txid), int(position))


class LogRow(NamedTuple):
    """One row of the log as the relay needs it: bytes, not objects."""

    txid: int
    position: int
    stream: str
    version: int
    type: str
    state: bytes

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.txid, self.position)

    def recorded(self) -> Recorded:
        """The parsed envelope with its position."""
        return Recorded.from_bytes(self.state, self.position)

    def value(self) -> bytes:
        """What goes to Kafka."""
        return with_position(self.state, self.position)


@dataclass(slots=True)
class StreamSlice:
    """The events of one stream so far; version 0 when there are none."""

    stream: str
    version: int = 0
    events: list[Recorded] = field(default_factory=list)

    @property
    def partition_key(self) -> str | None:
        """The Kafka key, fixed when the stream was opened; None when it is new."""
        return self.events[0].partition_key if self.events else None

    @property
    def customer_id(self) -> str | None:
        return self.events[0].customer_id if self.events else None


@contextmanager
def translated() -> Iterator[None]:
    """Turn constraint violations into Conflict, and a broken append rule into AppendFirst."""
    try:
        yield
    except psycopg.errors.UniqueViolation as error:
        raise Conflict(error.diag.constraint_name or "unknown") from error
    except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure) as error:
        raise Conflict("deadlock") from error  # the server rolled one of two writers back: it decides again
    except psycopg.Error as error:
        if error.sqlstate == "KH001":
            raise AppendFirst(str(error)) from error
        raise


class EventStore:
    """The events of one service in its own database.

    Args:
        pool: connections to that database.
        producer: name of the service, e.g. `lead-intake`.
    """

    def __init__(self, pool: Pool, producer: str) -> None:
        self.pool = pool
        self.producer = producer
        self.recorder = Recorder(pool)
        self._library: LibraryEventStore[Any] = LibraryEventStore(EnvelopeMapper(), self.recorder)
        self._epoch: str | None = None

    @property
    def epoch(self) -> str:
        """Which life of the store this is; another one after a restore."""
        if self._epoch is None:
            with self.pool.connection() as connection:
                row = connection.execute("SELECT epoch FROM store").fetchone()
            assert row is not None, "the backbone migration ran"
            self._epoch = str(row[0])
        return self._epoch

    def load(self, connection: Connection, streams: Sequence[str]) -> dict[str, StreamSlice]:
        """All events of these streams, in one query. A stream that does not exist has version 0."""
        return self.load_for_decision(connection, [], streams)[1]

    def load_for_decision(
        self, connection: Connection, command_ids: Sequence[UUID], streams: Sequence[str]
    ) -> tuple[dict[UUID, CarriedOut], dict[str, StreamSlice]]:
        """Which of these commands were carried out already, and all events of these streams, in one query."""
        slices = {stream: StreamSlice(stream) for stream in streams}
        done: dict[UUID, CarriedOut] = {}
        if command_ids or slices:
            rows = connection.execute(
                "SELECT key, version, notification_id, payload, fingerprint FROM load_for_decision(%b::uuid[], %b::text[])",
                (list(command_ids), list(slices)),
                binary=True,
            )
            for key, version, position, payload, fingerprint in rows:
                if version == 0:
                    command_id = UUID(key)
                    done[command_id] = CarriedOut(command_id, fingerprint, bytes(payload).decode())
                else:
                    part = slices[key]
                    part.version = version
                    part.events.append(Recorded.from_bytes(payload, position))
        return done, slices

    def load_newest(self, connection: Connection, streams: Sequence[str]) -> dict[str, StreamSlice]:
        """The newest event of each of these streams, in one query: enough to know version, key and customer."""
        slices = {stream: StreamSlice(stream) for stream in streams}
        if slices:
            rows = connection.execute(
                "SELECT e.originator_id, e.originator_version, e.notification_id, e.state FROM unnest(%s::text[]) AS s (name)"
                " CROSS JOIN LATERAL (SELECT * FROM stored_events WHERE originator_id = s.name"
                " ORDER BY originator_version DESC LIMIT 1) AS e",
                (list(slices),),
                binary=True,
            )
            for stream, version, position, state in rows:
                slices[stream] = StreamSlice(stream, version, [Recorded.from_bytes(state, position)])
        return slices

    def stream(self, stream: str) -> StreamSlice:
        """One stream, read now."""
        with self.pool.connection() as connection:
            return self.load(connection, [stream])[stream]

    def append(self, connection: Connection, pending: Sequence[Pending], commands: Sequence[CarriedOut] = ()) -> None:
        """Append events, and record the commands that caused them, as the first write of the caller's transaction.

        Outside a transaction it is one by itself. In pipeline mode errors come at the next sync: wrap the whole
        transaction in `translated()`.
        """
        if pending or commands:
            self._library.put(pending, connection=connection, commands=commands)

    def read(self, after: Cursor, limit: int = 500, connection: Connection | None = None) -> list[LogRow]:
        """The next rows of the log that no running transaction can still overtake, in order.

        Args:
            limit: the most rows, 1 to 10 000.
        """
        if not 1 <= limit <= 10_000:
            raise ValueError("limit must be 1 to 10 000")
        if connection is None:
            with self.pool.connection() as pooled:
                return self.read(after, limit, pooled)
        rows = connection.execute(
            "SELECT txid::text::bigint, notification_id, originator_id, originator_version, topic, state"
            " FROM read_events(%s::text::xid8, %s, %s)",
            (str(after.txid), after.position, limit),
            binary=True,
        ).fetchall()
        return [LogRow(*row) for row in rows]

    def newest(self, connection: Connection) -> Cursor:
        """The cursor of the newest committed row (0:0 when the log is empty)."""
        row = connection.execute(
            "SELECT txid::text::bigint, notification_id FROM stored_events ORDER BY txid DESC, notification_id DESC LIMIT 1"
        ).fetchone()
        return Cursor(*row) if row else Cursor()
