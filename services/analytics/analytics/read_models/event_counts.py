"""How many events of each type each service recorded, by day of their business time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from analytics.read_models.base import GenerationalModel
from kehu.events import Event, Recorded
from kehu.postgres import Connection


class EventCounts(GenerationalModel):
    """A sum for each (service, type, day). Adding is safe because progress moves in the same transaction."""

    name = "event_counts"
    version = 1
    tables = ("event_counts",)
    types: tuple[type[Event], ...] | None = None

    def apply(self, connection: Connection, events: Sequence[Recorded]) -> None:
        counts = Counter((e.producer, e.type, e.time.astimezone(self.timezone).date()) for e in events)
        rows = [(*key, count) for key, count in sorted(counts.items())]  # one order of locking for all consumers
        if rows:
            connection.execute(
                self.sql(
                    "INSERT INTO {event_counts} AS t (service, type, day, events)"
                    " SELECT * FROM unnest(%s::text[], %s::text[], %s::date[], %s::bigint[])"
                    " ON CONFLICT (service, type, day) DO UPDATE SET events = t.events + excluded.events"
                ),
                [list(column) for column in zip(*rows, strict=True)],
            )
