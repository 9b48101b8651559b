"""Counts that move while one looks: events by minute and by day of their business time, by service, type and channel.

The stream worker writes them. For numbers that are kept for ever and can be rebuilt there is event_counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

from kehu.events import Recorded
from kehu.postgres import Connection

Span = Literal["minute", "day"]
# Minutes older than this are dropped, and are not made for events of long ago: history belongs to the days.
MINUTES_KEPT = timedelta(days=3)
_CHANNEL_MOST = 100  # characters of a channel code


def buckets(
    events: Sequence[Recorded], timezone: ZoneInfo, now: datetime
) -> Counter[tuple[str, datetime, str, str, str]]:
    """The counts of these events by (span, start of the bucket, service, type, channel)."""
    counts: Counter[tuple[str, datetime, str, str, str]] = Counter()
    oldest_minute = now - MINUTES_KEPT
    for recorded in events:
        time = recorded.time
        channel = recorded.data.get("channel")
        named = channel[:_CHANNEL_MOST] if isinstance(channel, str) else ""
        day = time.astimezone(timezone).replace(hour=0, minute=0, second=0, microsecond=0)
        counts["day", day.astimezone(UTC), recorded.producer, recorded.type, named] += 1
        if time >= oldest_minute:
            counts["minute", time.replace(second=0, microsecond=0), recorded.producer, recorded.type, named] += 1
    return counts


def add(connection: Connection, counts: Counter[tuple[str, datetime, str, str, str]]) -> None:
    """Add to the stored counts, in the caller's transaction, in which the progress of the stream moves as well."""
    if counts:
        rows = [(*key, count) for key, count in sorted(counts.items())]  # one order of locking for all workers
        connection.execute(
            "INSERT INTO live_counters AS t (span, bucket, service, type, channel, events)"
            " SELECT * FROM unnest(%b::text[], %b::timestamptz[], %b::text[], %b::text[], %b::text[], %b::bigint[])"
            " ON CONFLICT (span, bucket, service, type, channel) DO UPDATE SET events = t.events + excluded.events",
            [list(column) for column in zip(*rows, strict=True)],
        )


def forget_old_minutes(connection: Connection, now: datetime, most: int = 10_000) -> int:
    """Delete up to `most` minutes that are older than we keep them, and give how many there were."""
    deleted = connection.execute(
        "DELETE FROM live_counters WHERE ctid = ANY(ARRAY("
        "SELECT ctid FROM live_counters WHERE span = 'minute' AND bucket < %s LIMIT %s))",
        (now - MINUTES_KEPT - timedelta(hours=1), most),
    )
    return deleted.rowcount


@dataclass(frozen=True, slots=True)
class Count:
    """One bucket."""

    bucket: datetime
    service: str
    type: str
    channel: str | None
    events: int


def counters(
    connection: Connection,
    span: Span,
    since: datetime,
    until: datetime,
    service: str | None = None,
    type_: str | None = None,
    channel: str | None = None,
    most: int = 10_000,
) -> list[Count]:
    """The buckets that begin in [since, until), oldest first, at most `most` of them."""
    rows = connection.execute(
        "SELECT bucket, service, type, nullif(channel, ''), events FROM live_counters"
        " WHERE span = %(span)s AND bucket >= %(since)s AND bucket < %(until)s"
        " AND (%(service)s::text IS NULL OR service = %(service)s) AND (%(type)s::text IS NULL OR type = %(type)s)"
        " AND (%(channel)s::text IS NULL OR channel = %(channel)s)"
        " ORDER BY bucket, service, type, channel LIMIT %(most)s",
        {
            "span": span,
            "since": since,
            "until": until,
            "service": service,
            "type": type_,
            "channel": channel,
            "most": most,
        },
    ).fetchall()
    return [Count(*row) for row in rows]
