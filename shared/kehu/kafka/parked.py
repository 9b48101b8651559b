"""Looking at parked events, and asking for them: for the command line and the API. The consumer does the rest.

A parked event is `waiting` when it failed itself, and `behind` when an earlier event of its stream waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from kehu.kafka.guard import header_bytes
from kehu.postgres import Pool

Status = Literal["waiting", "behind", "resolved", "dropped"]
What = Literal["replay", "accept_hole", "drop"]


class NotParked(LookupError):
    """There is no such parked event, or it is not open any more."""


class NotFirst(ValueError):
    """An earlier event of the stream waits: deal with that one."""


@dataclass(frozen=True, slots=True)
class ParkedEvent:
    """One parked record, as it was on Kafka, with what happened to it since.

    Args:
        version: None when the record could not be read; its stream is empty then.
        error: what and where, without values of the event.
        request: what a person asked for and the consumer has not done yet.
    """

    id: int
    consumer: str
    stream: str
    version: int | None
    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    status: Status
    error: str
    attempts: int
    first_failed_at: datetime
    parked_at: datetime
    resolved_at: datetime | None
    request: What | None
    requested_by: str | None
    requested_at: datetime | None

    @property
    def text(self) -> str:
        """The value for people. Personal data in it is sealed."""
        return (self.value or b"").decode(errors="backslashreplace")


_ONE = """
SELECT id, consumer, stream, version, topic, partition, "offset", key, value, headers, status, error, attempts,
    first_failed_at, parked_at, resolved_at, request, requested_by, requested_at
FROM parked_events WHERE id = %s
"""
_SOME = """
SELECT id, consumer, stream, version, topic, partition, "offset", key, value, headers, status, error, attempts,
    first_failed_at, parked_at, resolved_at, request, requested_by, requested_at
FROM parked_events
WHERE id > %(after)s AND status = ANY(%(statuses)s) AND (%(consumer)s::text IS NULL OR consumer = %(consumer)s)
    AND (%(stream)s::text IS NULL OR stream = %(stream)s)
ORDER BY id LIMIT %(limit)s
"""


def _event(row: Sequence[Any]) -> ParkedEvent:
    values = list(row)
    values[9] = [(name, header_bytes(value)) for name, value in values[9]]
    return ParkedEvent(*values)


def list_parked(
    pool: Pool,
    consumer: str | None = None,
    stream: str | None = None,
    statuses: Sequence[Status] = ("waiting", "behind"),
    after: int = 0,
    limit: int = 100,
) -> list[ParkedEvent]:
    """Parked events in order of their ids.

    Args:
        after: only those with a higher id, for the next page.
        limit: 1 to 1 000.
    """
    if not 1 <= limit <= 1000:
        raise ValueError("limit must be 1 to 1 000")
    with pool.connection() as connection:
        rows = connection.execute(
            _SOME, {"after": after, "statuses": list(statuses), "consumer": consumer, "stream": stream, "limit": limit}
        ).fetchall()
    return [_event(row) for row in rows]


def show(pool: Pool, id_: int) -> ParkedEvent:
    """One parked event. Raises NotParked."""
    with pool.connection() as connection:
        row = connection.execute(_ONE, (id_,)).fetchone()
    if row is None:
        raise NotParked(f"there is no parked event {id_}")
    return _event(row)


def counts(pool: Pool) -> dict[tuple[str, str], int]:
    """How many are open, by consumer and status."""
    with pool.connection() as connection:
        rows = connection.execute(
            "SELECT consumer, status, count(*) FROM parked_events WHERE status IN ('waiting', 'behind') GROUP BY 1, 2 ORDER BY 1, 2"
        ).fetchall()
    return {(consumer, status): count for consumer, status, count in rows}


def ask(pool: Pool, id_: int, what: What, by: str) -> ParkedEvent:
    """Ask the consumer to do something with the stream of a parked event; it does within seconds, when it runs.

    Args:
        what: `replay`: handle the stream's parked events again, in order, until one fails. `drop`: never handle this one;
            the stream goes on behind it. `accept_hole`: take this version although earlier ones are missing, and go on.
        by: who asks, e.g. `user:<id>`.

    Raises:
        NotParked: it does not exist or is resolved or dropped.
        NotFirst: `drop` and `accept_hole` are for the first event that waits in a stream.
    """
    with pool.connection() as connection, connection.transaction():
        row = connection.execute(_ONE + " FOR UPDATE", (id_,)).fetchone()
        if row is None:
            raise NotParked(f"there is no parked event {id_}")
        event = _event(row)
        if event.status not in ("waiting", "behind"):
            raise NotParked(f"parked event {id_} is {event.status}")
        if what == "accept_hole" and event.version is None:
            raise NotFirst(f"parked event {id_} could not be read: it has no version that could be accepted")
        first = connection.execute(
            "SELECT id, version FROM parked_events WHERE consumer = %s AND stream = %s AND status IN ('waiting', 'behind')"
            " ORDER BY version, id LIMIT 1",
            (event.consumer, event.stream),
        ).fetchone()
        if what != "replay" and event.stream and first is not None and first[0] != id_:
            raise NotFirst(f"version {first[1]} of {event.stream} waits before it (parked event {first[0]})")
        connection.execute(
            "UPDATE parked_events SET request = %s, requested_by = %s, requested_at = now() WHERE id = %s",
            (what, by, id_),
        )
    return show(pool, id_)


def ask_all(pool: Pool, consumer: str, by: str, limit: int = 1000) -> int:
    """Ask for a replay of every stream of a consumer that waits, after its effect was repaired. Gives the number of streams."""
    with pool.connection() as connection:
        return connection.execute(
            "UPDATE parked_events SET request = 'replay', requested_by = %s, requested_at = now() WHERE id IN ("
            " SELECT id FROM parked_events WHERE consumer = %s AND status = 'waiting' AND request IS NULL ORDER BY id LIMIT %s)",
            (by, consumer, limit),
        ).rowcount
