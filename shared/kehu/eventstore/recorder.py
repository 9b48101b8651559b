"""Mapper and recorder: how an event becomes a row. Wire name as topic, envelope JSON as state, no class path in the database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from eventsourcing.persistence import (
    ApplicationRecorder,
    JSONTranscoder,
    Mapper,
    Notification,
    StoredEvent,
    Subscription,
)

from kehu.events import Envelope, Event, Recorded
from kehu.postgres import Connection, Pool


@dataclass(frozen=True, slots=True)
class Pending:
    """An event with its envelope, on its way into the store. Its personal data is sealed.

    The two properties are what the library's mapper asks of an event.
    """

    envelope: Envelope
    event: Event

    @property
    def originator_id(self) -> str:
        return self.envelope.stream

    @property
    def originator_version(self) -> int:
        return self.envelope.version

    @property
    def timestamp(self) -> datetime:
        return self.envelope.recorded


@dataclass(frozen=True, slots=True)
class CarriedOut:
    """A command that is recorded with its events, so that a resent one can be answered.

    Args:
        fingerprint: hash of the request it came with, None when it has none.
        result: the answer, JSON text.
    """

    command_id: UUID
    fingerprint: bytes | None
    result: str


class EnvelopeMapper(Mapper[Any]):
    """Between Pending/Recorded and the library's StoredEvent."""

    def __init__(self) -> None:
        super().__init__(transcoder=JSONTranscoder())

    def to_stored_event(self, domain_event: Any) -> StoredEvent:
        pending: Pending = domain_event
        return StoredEvent(
            originator_id=pending.envelope.stream,
            originator_version=pending.envelope.version,
            topic=pending.event.TYPE,
            state=pending.envelope.encode(pending.event),
        )

    def to_domain_event(self, stored_event: StoredEvent) -> Any:
        return Recorded.from_bytes(stored_event.state)


class Recorder(ApplicationRecorder):
    """Appends through the one SQL function, in the caller's transaction, and reads.

    The library's own PostgreSQL recorder takes a table lock for each append and notifies inside it, which serialises all
    writers; see the ADR on the event store.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int] | None:
        """Append in one statement, which is a transaction of its own when the caller has none open.

        `connection=` is the caller's; nothing may have been written in its transaction before. `commands=` are
        recorded with the events.
        """
        connection: Connection = kwargs["connection"]
        commands: Sequence[CarriedOut] = kwargs.get("commands", ())
        connection.execute(
            "SELECT append_events(%b::text[], %b::bigint[], %b::text[], %b::bytea[], %b::uuid[], %b::bytea[], %b::text[])",
            (
                [str(e.originator_id) for e in stored_events],
                [e.originator_version for e in stored_events],
                [e.topic for e in stored_events],
                [e.state for e in stored_events],
                [c.command_id for c in commands],
                [c.fingerprint for c in commands],
                [c.result for c in commands],
            ),
        )
        return None

    def select_events(
        self,
        originator_id: Any,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> Sequence[StoredEvent]:
        with self.pool.connection() as connection:
            rows = connection.execute(
                "SELECT originator_id, originator_version, topic, state FROM stored_events WHERE originator_id = %s"
                " AND originator_version > %s"
                " AND originator_version <= %s ORDER BY originator_version * %s LIMIT %s",
                (str(originator_id), gt or 0, lte if lte is not None else 2**62, -1 if desc else 1, limit),
            ).fetchall()
        return [StoredEvent(*row) for row in rows]

    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> Sequence[Notification]:
        """By position, for looking at the log. Followers use EventStore.read, which cannot skip a late commit."""
        after = (start or 0) - (1 if inclusive_of_start else 0)
        with self.pool.connection() as connection:
            rows = connection.execute(
                "SELECT originator_id, originator_version, topic, state, notification_id FROM stored_events"
                " WHERE notification_id > %s AND notification_id <= %s"
                " AND (%s::text[] = '{}' OR topic = ANY(%s)) AND txid < pg_snapshot_xmin(pg_current_snapshot())"
                " ORDER BY notification_id LIMIT %s",
                (after, stop if stop is not None else 2**62, list(topics), list(topics), limit),
            ).fetchall()
        return [Notification(*row) for row in rows]

    def max_notification_id(self) -> int | None:
        with self.pool.connection() as connection:
            row = connection.execute("SELECT max(notification_id) FROM stored_events").fetchone()
        return row[0] if row else None

    def subscribe(self, gt: int | None = None, topics: Sequence[str] = ()) -> Subscription[ApplicationRecorder]:
        raise NotImplementedError(
            "follow the log with kehu.follower: a subscription loses wake-ups and ends at the first error"
        )
