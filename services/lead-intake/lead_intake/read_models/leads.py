"""Read model leads_v1: lists of leads by channel, rating, status and customer. No personal data."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from kehu.events import Event, Recorded
from kehu.events.lead_intake import LeadCaptured, LeadDetailsUpdated, LeadMerged, LeadRejected
from kehu.postgres import Connection

_CAPTURED = """
INSERT INTO leads_v1 (lead_id, customer_id, status, rating, source, channel, captured_at, changed_at, version)
SELECT l, c, 'open', r, s, ch, at, at, 1
FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::text[], %s::text[], %s::timestamptz[]) AS new (l, c, r, s, ch, at)
ON CONFLICT (lead_id) DO NOTHING
"""
# The last change of each lead in the batch; one that was applied before changes nothing.
_CHANGED = """
UPDATE leads_v1 SET status = coalesce(new.status, leads_v1.status), survivor = coalesce(new.survivor, leads_v1.survivor),
    changed_at = new.at, version = new.version
FROM unnest(%s::uuid[], %s::text[], %s::uuid[], %s::timestamptz[], %s::bigint[]) AS new (lead_id, status, survivor, at, version)
WHERE leads_v1.lead_id = new.lead_id AND leads_v1.version < new.version
"""


class Leads:
    """Rows of leads_v1."""

    name = "leads"
    version = 1
    types: tuple[type[Event], ...] | None = (LeadCaptured, LeadDetailsUpdated, LeadMerged, LeadRejected)

    def apply(self, connection: Connection, events: Sequence[Recorded]) -> None:
        captured: list[tuple[Any, ...]] = []
        changed: dict[UUID, tuple[Any, ...]] = {}
        for recorded in events:
            event = recorded.event
            match event:
                case LeadCaptured():
                    customer, at = str(event.customer_id), recorded.time
                    captured.append((event.lead_id, customer, event.rating, event.source, event.channel, at))
                    continue
                case LeadMerged():
                    change: tuple[str | None, UUID | None] = ("merged", event.survivor_lead_id)
                case LeadRejected():
                    change = ("rejected", None)
                case LeadDetailsUpdated():
                    change = (None, None)
                case _:
                    continue
            lead_id = event.lead_id
            before = changed.get(lead_id, (lead_id, None, None))
            status, survivor = change[0] or before[1], change[1] or before[2]
            changed[lead_id] = (lead_id, status, survivor, recorded.time, recorded.version)
        if captured:
            connection.execute(_CAPTURED, [list(column) for column in zip(*captured, strict=True)])
        if changed:
            connection.execute(_CHANGED, [list(column) for column in zip(*changed.values(), strict=True)])

    def truncate(self, connection: Connection) -> None:
        connection.execute("TRUNCATE leads_v1")


class LeadRow(NamedTuple):
    """A line of the list."""

    lead_id: UUID
    customer_id: str
    status: str
    survivor: UUID | None
    rating: str
    source: str
    channel: str
    captured_at: datetime
    changed_at: datetime
    version: int


class After(NamedTuple):
    """Where a page ends: the next one begins behind it."""

    captured_at: datetime
    lead_id: UUID


_COLUMNS = "lead_id, customer_id, status, survivor, rating, source, channel, captured_at, changed_at, version"


def page(
    connection: Connection,
    limit: int,
    after: After | None = None,
    *,
    channel: str | None = None,
    rating: str | None = None,
    status: str | None = None,
    customer_id: UUID | None = None,
) -> list[LeadRow]:
    """Leads, newest first.

    Args:
        limit: the most rows.
        after: the last row of the page before.
    """
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM leads_v1"  # noqa: S608 a constant
        " WHERE (%(channel)s::text IS NULL OR channel = %(channel)s) AND (%(rating)s::text IS NULL OR rating = %(rating)s)"
        " AND (%(status)s::text IS NULL OR status = %(status)s)"
        " AND (%(customer)s::text IS NULL OR customer_id = %(customer)s)"
        " AND (%(at)s::timestamptz IS NULL OR (captured_at, lead_id) < (%(at)s, %(lead)s::uuid))"
        " ORDER BY captured_at DESC, lead_id DESC LIMIT %(limit)s",
        {
            "channel": channel,
            "rating": rating,
            "status": status,
            "customer": None if customer_id is None else str(customer_id),
            "at": None if after is None else after.captured_at,
            "lead": None if after is None else after.lead_id,
            "limit": limit,
        },
    ).fetchall()
    return [LeadRow(*row) for row in rows]
