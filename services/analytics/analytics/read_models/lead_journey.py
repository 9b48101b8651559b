"""The way of each lead: captured, qualified, converted, and the score it had just before.

Two topics feed it, and there is no order between them, so every statement gives the same rows in whatever order the
events of the one arrive beside those of the other. Within one customer the events of lead-intake keep their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg import sql

from analytics.read_models.base import GenerationalModel
from kehu.events import Event, Recorded
from kehu.events.lead_intake import BehaviourRecorded, LeadCaptured, LeadMerged, LeadRejected
from kehu.events.scoring import LeadQualified, LeadScoreChanged
from kehu.postgres import Connection

# The behaviour that makes a customer of a lead, until the pipeline's events say it better.
CONVERSION = "offer_accepted"
# A chain of merges longer than this is not followed.
MAX_MERGES = 16
_NEVER = datetime.max.replace(tzinfo=UTC)


# A score that fades, or is counted anew by another model, says nothing of what the lead did. Leads that never convert fade
# for longer than those that do: with faded scores a high one would seem to promise more than it does.
BY_ITSELF = ("decay", "model")


@dataclass(frozen=True, slots=True)
class Lead:
    """What attribution needs to know of a lead."""

    lead_id: UUID
    captured_at: datetime | None
    merged_into: UUID | None
    rejected_at: datetime | None


@dataclass(frozen=True, slots=True)
class Conversion:
    """A customer accepted an offer; the event may or may not name the lead."""

    lead_id: UUID | None
    time: datetime


def attribute(leads: Iterable[Lead], conversions: Iterable[Conversion]) -> dict[UUID, datetime]:
    """Which lead of one customer converted when: the earliest of its conversions.

    A conversion belongs to the lead that it names, else to the first lead that was open at its time, else to the first;
    and from there to the lead that it was merged into.
    """
    by_id = {lead.lead_id: lead for lead in leads}
    unmerged = [lead for lead in by_id.values() if lead.merged_into is None]
    in_order = sorted(unmerged, key=lambda lead: (lead.captured_at or _NEVER, lead.lead_id))
    converted: dict[UUID, datetime] = {}
    for conversion in conversions:
        target = by_id.get(conversion.lead_id) if conversion.lead_id is not None else None
        if target is None:
            still_open = (x for x in in_order if x.rejected_at is None or x.rejected_at > conversion.time)
            target = next(still_open, None) or next(iter(in_order), None)
        for _ in range(MAX_MERGES):
            if target is None or target.merged_into is None or target.merged_into not in by_id:
                break
            target = by_id[target.merged_into]
        if target is not None:
            converted[target.lead_id] = min(conversion.time, converted.get(target.lead_id, conversion.time))
    return converted


@dataclass(slots=True)
class _Facts:
    """What a batch says, by kind; the last word of the batch on each lead."""

    captured: dict[UUID, tuple[Any, ...]] = field(default_factory=dict)
    merged: dict[UUID, tuple[Any, ...]] = field(default_factory=dict)
    rejected: dict[UUID, tuple[Any, ...]] = field(default_factory=dict)
    conversions: dict[UUID, tuple[Any, ...]] = field(default_factory=dict)
    qualified: dict[UUID, tuple[Any, ...]] = field(default_factory=dict)
    newest_score: dict[UUID, tuple[Any, ...]] = field(default_factory=dict)
    scores: list[tuple[Any, ...]] = field(default_factory=list)
    touched: set[UUID] = field(default_factory=set)  # customers whose attribution may be another now


class LeadJourney(GenerationalModel):
    """One row for each lead, merged and rejected ones included."""

    name = "lead_journey"
    version = 1
    tables = ("lead_journey", "lead_journey_scores", "lead_journey_conversions")
    types: tuple[type[Event], ...] | None = (
        LeadCaptured,
        LeadMerged,
        LeadRejected,
        BehaviourRecorded,
        LeadScoreChanged,
        LeadQualified,
    )

    def apply(self, connection: Connection, events: Sequence[Recorded]) -> None:
        facts = self._sort(events)
        # Rows of leads are written, and so locked, before the tables beside them are read: two consumers that hold the two
        # topics then see each other's work, whichever comes second.
        self._upsert(
            connection,
            facts.captured,
            "INSERT INTO {lead_journey} (lead_id, customer_id, channel, campaign, source, captured_at, month)"
            " SELECT * FROM unnest(%b::uuid[], %b::uuid[], %b::text[], %b::text[], %b::text[], %b::timestamptz[], %b::date[])"
            " ON CONFLICT (lead_id) DO UPDATE SET customer_id = excluded.customer_id, channel = excluded.channel,"
            " campaign = excluded.campaign, source = excluded.source, captured_at = excluded.captured_at, month = excluded.month",
        )
        self._upsert(
            connection,
            facts.merged,
            "INSERT INTO {lead_journey} (lead_id, customer_id, merged_into, merged_at)"
            " SELECT * FROM unnest(%b::uuid[], %b::uuid[], %b::uuid[], %b::timestamptz[])"
            " ON CONFLICT (lead_id) DO UPDATE SET merged_into = excluded.merged_into, merged_at = excluded.merged_at",
        )
        self._upsert(
            connection,
            facts.rejected,
            "INSERT INTO {lead_journey} (lead_id, customer_id, rejected_at)"
            " SELECT * FROM unnest(%b::uuid[], %b::uuid[], %b::timestamptz[])"
            " ON CONFLICT (lead_id) DO UPDATE SET rejected_at = excluded.rejected_at",
        )
        self._upsert(
            connection,
            facts.qualified,
            "INSERT INTO {lead_journey} AS t (lead_id, customer_id, qualified_at)"
            " SELECT * FROM unnest(%b::uuid[], %b::uuid[], %b::timestamptz[])"
            " ON CONFLICT (lead_id) DO UPDATE SET qualified_at = least(t.qualified_at, excluded.qualified_at)",
        )
        self._upsert(
            connection,
            facts.newest_score,
            "INSERT INTO {lead_journey} AS t (lead_id, customer_id, score, scored_version)"
            " SELECT * FROM unnest(%b::uuid[], %b::uuid[], %b::float8[], %b::bigint[])"
            " ON CONFLICT (lead_id) DO UPDATE SET score = excluded.score, scored_version = excluded.scored_version"
            " WHERE t.scored_version IS NULL OR t.scored_version < excluded.scored_version",
        )
        if facts.scores:
            connection.execute(
                self.sql(
                    "INSERT INTO {lead_journey_scores} (lead_id, version, time, score)"
                    " SELECT * FROM unnest(%b::uuid[], %b::bigint[], %b::timestamptz[], %b::float8[])"
                    " ON CONFLICT (lead_id, version) DO NOTHING"
                ),
                [list(column) for column in zip(*facts.scores, strict=True)],
            )
        self._upsert(
            connection,
            facts.conversions,
            "INSERT INTO {lead_journey_conversions} (behaviour_id, customer_id, lead_id, time)"
            " SELECT * FROM unnest(%b::uuid[], %b::uuid[], %b::uuid[], %b::timestamptz[])"
            " ON CONFLICT (behaviour_id) DO NOTHING",
        )
        converted = self._attribute(connection, facts.touched)
        self._score_at_conversion(connection, converted | set(facts.newest_score))

    def _sort(self, events: Sequence[Recorded]) -> _Facts:
        facts = _Facts()
        for recorded in events:
            if recorded.is_a(BehaviourRecorded) and recorded.data.get("kind") != CONVERSION:
                continue  # most of the traffic: not worth decoding
            match recorded.event:
                case LeadCaptured() as e:
                    month = recorded.time.astimezone(self.timezone).date().replace(day=1)
                    facts.captured[e.lead_id] = (
                        e.lead_id,
                        e.customer_id,
                        e.channel,
                        e.campaign,
                        e.source,
                        recorded.time,
                        month,
                    )
                    facts.touched.add(e.customer_id)
                case LeadMerged() as e:
                    facts.merged[e.lead_id] = (e.lead_id, e.customer_id, e.survivor_lead_id, recorded.time)
                    facts.touched.add(e.customer_id)
                case LeadRejected() as e:
                    facts.rejected[e.lead_id] = (e.lead_id, e.customer_id, recorded.time)
                    facts.touched.add(e.customer_id)
                case BehaviourRecorded() as e:
                    facts.conversions[e.behaviour_id] = (e.behaviour_id, e.customer_id, e.lead_id, recorded.time)
                    facts.touched.add(e.customer_id)
                case LeadQualified() as e:
                    seen = facts.qualified.get(e.lead_id)
                    if seen is None or recorded.time < seen[2]:
                        facts.qualified[e.lead_id] = (e.lead_id, e.customer_id, recorded.time)
                case LeadScoreChanged() as e if e.cause not in BY_ITSELF:
                    facts.scores.append((e.lead_id, recorded.version, recorded.time, e.score))
                    newest = facts.newest_score.get(e.lead_id)
                    if newest is None or newest[3] < recorded.version:
                        facts.newest_score[e.lead_id] = (e.lead_id, e.customer_id, e.score, recorded.version)
        return facts

    def _upsert(self, connection: Connection, rows: Mapping[UUID, tuple[Any, ...]], text: Any) -> None:
        if rows:
            in_order = [rows[key] for key in sorted(rows)]  # one order of locking for all consumers
            connection.execute(self.sql(text), [list(column) for column in zip(*in_order, strict=True)])

    def _attribute(self, connection: Connection, customers: set[UUID]) -> set[UUID]:
        """Write converted_at of the leads of these customers anew, and give the leads where it changed."""
        if not customers:
            return set()
        conversions: dict[UUID, list[Conversion]] = {}
        for customer, lead_id, time in connection.execute(
            self.sql("SELECT customer_id, lead_id, time FROM {lead_journey_conversions} WHERE customer_id = ANY(%b)"),
            [list(customers)],
        ):
            conversions.setdefault(customer, []).append(Conversion(lead_id, time))
        if not conversions:
            return set()
        leads: dict[UUID, list[Lead]] = {}
        before: dict[UUID, datetime | None] = {}
        for customer, lead_id, captured_at, merged_into, rejected_at, converted_at in connection.execute(
            self.sql(
                "SELECT customer_id, lead_id, captured_at, merged_into, rejected_at, converted_at FROM {lead_journey}"
                " WHERE customer_id = ANY(%b)"
            ),
            [list(conversions)],
        ):
            leads.setdefault(customer, []).append(Lead(lead_id, captured_at, merged_into, rejected_at))
            before[lead_id] = converted_at
        after: dict[UUID, datetime | None] = dict.fromkeys(before)
        for customer, known in leads.items():
            after.update(attribute(known, conversions[customer]))
        changed = sorted(lead_id for lead_id, time in after.items() if before[lead_id] != time)
        if changed:
            connection.execute(
                self.sql(
                    "UPDATE {lead_journey} t SET converted_at = new.time, score_at_conversion = NULL"
                    " FROM unnest(%b::uuid[], %b::timestamptz[]) AS new (lead_id, time) WHERE t.lead_id = new.lead_id"
                ),
                [changed, [after[lead_id] for lead_id in changed]],
            )
        return set(changed)

    def _score_at_conversion(self, connection: Connection, leads: set[UUID]) -> None:
        """The last score before the conversion; the score that the conversion itself made does not count."""
        if leads:
            connection.execute(
                self.sql(
                    "UPDATE {lead_journey} t SET score_at_conversion = last.score"
                    " FROM {lead_journey} j CROSS JOIN LATERAL (SELECT s.score FROM {lead_journey_scores} s"
                    "  WHERE s.lead_id = j.lead_id AND s.time < j.converted_at ORDER BY s.time DESC, s.version DESC LIMIT 1) last"
                    " WHERE j.lead_id = ANY(%b) AND j.converted_at IS NOT NULL AND t.lead_id = j.lead_id"
                    " AND t.score_at_conversion IS DISTINCT FROM last.score"
                ),
                [sorted(leads)],
            )


@dataclass(frozen=True, slots=True)
class Group:
    """How the leads of one group fared. Merged leads count as the lead that they became part of."""

    group: str
    leads: int
    qualified: int
    converted: int
    rejected: int


# What the leads can be grouped by.
GROUPS: Mapping[str, LiteralString] = {
    "channel": "coalesce(channel, '')",
    "month": "to_char(month, 'YYYY-MM')",
    "score-band": "CASE WHEN scored IS NULL THEN 'none' WHEN scored >= %(hot)s THEN 'hot' WHEN scored >= %(warm)s THEN 'warm'"
    " ELSE 'cold' END",
}


def conversion(
    connection: Connection,
    by: str,
    first: date | None = None,
    last: date | None = None,
    channel: str | None = None,
    hot: float = 80.0,
    warm: float = 40.0,
) -> list[Group]:
    """Leads that were captured, qualified, converted and rejected, by channel, month or score band.

    The score of a lead is the last one before its conversion, or the newest of a lead that has not converted; what time
    alone made of it does not count.

    Args:
        by: a key of GROUPS.
        first, last: months of the capture, both included; None is no limit.
        hot, warm: lower edges of the score bands.
    """
    rows = connection.execute(
        sql.SQL(
            "SELECT {label} AS label, count(*), count(qualified_at), count(converted_at), count(rejected_at)"
            " FROM (SELECT *, CASE WHEN converted_at IS NULL THEN score ELSE score_at_conversion END AS scored"
            " FROM lead_journey_v1) j"
            " WHERE captured_at IS NOT NULL AND merged_into IS NULL"
            " AND (%(first)s::date IS NULL OR month >= %(first)s) AND (%(last)s::date IS NULL OR month <= %(last)s)"
            " AND (%(channel)s::text IS NULL OR channel = %(channel)s)"
            " GROUP BY label ORDER BY label"
        ).format(label=sql.SQL(GROUPS[by])),
        {"first": first, "last": last, "channel": channel, "hot": hot, "warm": warm},
    ).fetchall()
    return [Group(*row) for row in rows]
