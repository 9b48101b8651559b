"""Lists of leads by score: the newest score of each, its band, and since when the lead is qualified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from kehu.events import Event, Recorded
from kehu.events.scoring import Band, LeadQualified, LeadScoreBandChanged, LeadScoreChanged
from kehu.postgres import Connection

# Every event of a score tells all of it, so the last one of a lead in the batch is its row.
_UPSERT = """
INSERT INTO scores_v1 AS s (lead_id, customer_id, score, band, qualified_at, model_version, at, version)
SELECT * FROM unnest(%s::uuid[], %s::uuid[], %s::numeric[], %s::text[], %s::timestamptz[], %s::int[], %s::timestamptz[], %s::bigint[])
AS new (lead_id, customer_id, score, band, qualified_at, model_version, at, version) ORDER BY lead_id
ON CONFLICT (lead_id) DO UPDATE SET score = EXCLUDED.score, band = EXCLUDED.band,
    qualified_at = coalesce(s.qualified_at, EXCLUDED.qualified_at),
    model_version = EXCLUDED.model_version, at = EXCLUDED.at, version = EXCLUDED.version
WHERE s.version < EXCLUDED.version
"""
_PAGE = """
SELECT lead_id, customer_id, score::float8 AS score, band, qualified_at, model_version, at FROM scores_v1 s
WHERE (%(band)s::text IS NULL OR band = %(band)s) AND score >= %(min)s AND (NOT %(qualified)s OR qualified_at IS NOT NULL)
  AND (%(score)s::numeric IS NULL OR score < %(score)s OR (score = %(score)s AND lead_id > %(lead_id)s))
  AND NOT EXISTS (SELECT FROM leads l WHERE l.lead_id = s.lead_id AND l.closed_at IS NOT NULL)
ORDER BY score DESC, lead_id LIMIT %(limit)s
"""
_COLUMNS = ("lead_id", "customer_id", "score", "band", "qualified_at", "model_version", "at")


class Scores:
    """Read model scores_v1."""

    name = "scores"
    version = 1
    types: tuple[type[Event], ...] | None = (LeadScoreChanged, LeadScoreBandChanged, LeadQualified)

    def apply(self, connection: Connection, events: Sequence[Recorded]) -> None:
        newest: dict[UUID, tuple[Any, ...]] = {}
        qualified_at = {
            event.lead_id: event.at for recorded in events if isinstance(event := recorded.event, LeadQualified)
        }
        for recorded in events:
            event = recorded.event
            if isinstance(event, LeadScoreChanged | LeadScoreBandChanged | LeadQualified):
                newest[event.lead_id] = (
                    event.lead_id,
                    event.customer_id,
                    event.score,
                    event.band,
                    qualified_at.get(event.lead_id),
                    event.model_version,
                    event.at,
                    recorded.version,
                )
        connection.execute(_UPSERT, [list(column) for column in zip(*newest.values(), strict=True)])

    def truncate(self, connection: Connection) -> None:
        connection.execute("TRUNCATE scores_v1")


def page(
    connection: Connection,
    limit: int,
    band: Band | None = None,
    least: float = 0.0,
    qualified: bool = False,
    after: tuple[float, UUID] | None = None,
) -> list[dict[str, Any]]:
    """Open leads, the highest score first.

    Args:
        least: the lowest score that is listed.
        qualified: only leads that are, or have been, qualified.
        after: score and id of the last lead of the page before.
    """
    score, lead_id = after if after is not None else (None, None)
    rows = connection.execute(
        _PAGE,
        {"band": band, "min": least, "qualified": qualified, "score": score, "lead_id": lead_id, "limit": limit},
    ).fetchall()
    return [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
