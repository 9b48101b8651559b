"""How many events of each type each service recorded, by day of their business time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from analytics.read_models.base import GenerationalModel
from kehu.events import Event, Recorded
from kehu.postgres import Connection


class EventCounts(GenerationalModel):
    """A sum for each (service, type, day). Adding is safe because progress moves in the same transaction."""

    name = "event_counts"
    version = 1
    tables = ("event_counts",)
    types: tuple[type[Event], ...] | None = None
    envelopes_only = True

    def apply(self, connection: Connection, events: Sequence[Recorded]) -> None:
        counts = Counter((e.producer, e.type, e.time.astimezone(self.timezone).date()) for e in events)
        rows = [(*key, count) for key, count in sorted(counts.items())]  # one order of locking for all consumers
        if rows:
            connection.execute(
                self.sql(
                    "INSERT INTO {event_counts} AS t (service, type, day, events)"
                    " SELECT * FROM unnest(%b::text[], %b::text[], %b::date[], %b::bigint[])"
                    " ON CONFLICT (service, type, day) DO UPDATE SET events = t.events + excluded.events"
                ),
                [list(column) for column in zip(*rows, strict=True)],
            )


@dataclass(frozen=True, slots=True)
class DayCount:
    """Events of one type on one day."""

    day: date
    service: str
    type: str
    events: int


def counts(
    connection: Connection,
    first: date,
    last: date,
    service: str | None = None,
    type_: str | None = None,
    most: int = 10_000,
) -> list[DayCount]:
    """The counts of the days from `first` to `last`, both included, oldest first, at most `most` rows."""
    rows = connection.execute(
        "SELECT day, service, type, events FROM event_counts_v1 WHERE day BETWEEN %(first)s AND %(last)s"
        " AND (%(service)s::text IS NULL OR service = %(service)s) AND (%(type)s::text IS NULL OR type = %(type)s)"
        " ORDER BY day, service, type LIMIT %(most)s",
        {"first": first, "last": last, "service": service, "type": type_, "most": most},
    ).fetchall()
    return [DayCount(*row) for row in rows]
