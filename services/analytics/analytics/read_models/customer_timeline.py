"""Everything that happened to a customer, in order of business time. Without personal data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson

from analytics.read_models.base import GenerationalModel
from kehu.events import Event, Recorded, UnknownEvent, event_class
from kehu.postgres import Connection

# A summary is for reading on a screen: short values of the event's own fields, at most this many.
MAX_FIELDS = 20
MAX_TEXT = 200
# Sorts after every entry.
_NEWEST = (datetime.max.replace(tzinfo=UTC), UUID(int=2**128 - 1))


class CustomerTimeline(GenerationalModel):
    """One row for each event that names a customer."""

    name = "customer_timeline"
    version = 1
    tables = ("customer_timeline",)
    types: tuple[type[Event], ...] | None = None
    envelopes_only = True

    def apply(self, connection: Connection, events: Sequence[Recorded]) -> None:
        rows = [
            (
                e.customer_id,
                e.time,
                e.recorded,
                e.type,
                e.stream,
                e.version,
                e.producer,
                e.id,
                orjson.dumps(summary(e)).decode(),
            )
            for e in events
            if e.customer_id is not None
        ]
        if rows:
            connection.execute(
                self.sql(
                    "INSERT INTO {customer_timeline}"
                    " (customer_id, time, recorded, type, stream, version, service, event_id, summary)"
                    " SELECT customer, time, recorded, type, stream, version, service, id, summary::json"
                    " FROM unnest(%b::uuid[], %b::timestamptz[], %b::timestamptz[], %b::text[], %b::text[], %b::bigint[],"
                    " %b::text[], %b::uuid[], %b::text[])"
                    " AS new (customer, time, recorded, type, stream, version, service, id, summary)"
                    " ON CONFLICT DO NOTHING"
                ),
                [list(column) for column in zip(*rows, strict=True)],
            )


def summary(recorded: Recorded) -> dict[str, Any]:
    """The plain facts of an event: its scalar fields and small groups of them, without ids it is filed under and without personal data."""
    return _scalars(recorded.data, _personal_fields(recorded.type))


def _scalars(data: Mapping[str, Any], personal: frozenset[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in data.items():
        if len(kept) == MAX_FIELDS:
            break
        if name in personal or value is None or name == "customer_id":
            continue
        if isinstance(value, str):
            kept[name] = value[:MAX_TEXT]
        elif isinstance(value, int | float | bool):
            kept[name] = value
        elif isinstance(value, dict) and "sealed" not in value and "erased" not in value:
            group = {k: v for k, v in value.items() if isinstance(v, str | int | float | bool)}
            if group:
                kept[name] = dict(list(group.items())[:MAX_FIELDS])
    return kept


_personal: dict[str, frozenset[str]] = {}


def _personal_fields(wire: str) -> frozenset[str]:
    """The personal fields of a wire type. Those of a type this release does not know are recognised by their sealed form."""
    if wire not in _personal:
        try:
            _personal[wire] = frozenset(event_class(wire).PERSONAL)
        except UnknownEvent:
            return frozenset()
    return _personal[wire]


@dataclass(frozen=True, slots=True)
class Entry:
    """One event of a customer."""

    time: datetime
    recorded: datetime
    type: str
    stream: str
    version: int
    service: str
    event_id: UUID
    summary: dict[str, Any]


def timeline(
    connection: Connection, customer_id: UUID, before: tuple[datetime, UUID] | None, limit: int
) -> list[Entry]:
    """The newest `limit` events of a customer, or those before an entry of the page before, newest first."""
    rows = connection.execute(
        "SELECT time, recorded, type, stream, version, service, event_id, summary FROM customer_timeline_v1"
        " WHERE customer_id = %s AND (time, event_id) < (%s, %s) ORDER BY time DESC, event_id DESC LIMIT %s",
        (customer_id, *(before or _NEWEST), limit),
    ).fetchall()
    return [Entry(*row) for row in rows]
